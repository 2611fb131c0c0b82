"""
Hooks: what happens in a cache is told to commands and addresses, and to no cost.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from shlex import quote
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from real import clip, micro
from served import A, command, micros, transcribe

from whispercache import ModelEvicted, ModelKey, ModelTooLarge, NoRoom
from whispercache.cli.main import main
from whispercache.events import Event, EvictionCause
from whispercache.settings.sources import settle
from whispercache.testing import FakeMachine, wait_until
from whispercache.testing import settle as quiet
from whispercache.watch import hooks as module
from whispercache.watch.hooks import EVENTS, Hooks, as_json, parse_hook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import MakeCache

GIB = 1024**3
KEY = ModelKey("base", "cuda:0", "float16")


class Told:
    """
    A cache that says what it is told to.
    """

    def __init__(self) -> None:
        self.listeners: list[Callable[[Event], None]] = []

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """
        Listen until the end that is returned.
        """
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def say(self, event: Event) -> None:
        """
        Tell all who listen.
        """
        for listener in self.listeners:
            listener(event)


@contextmanager
def listening(
    status: int = 200, stuck: threading.Event | None = None
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """
    An address, and what is posted to it; *stuck* is waited for before an answer.
    """
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            got.append(json.loads(self.rfile.read(length)))
            if stuck is not None:
                stuck.wait(30)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/", got
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def saying(words: bytes) -> Iterator[str]:
    """
    An address at which *words* are said to whoever calls, whatever they want.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:

        def say() -> None:
            caller, _ = server.accept()
            with caller:
                caller.recv(65_536)
                caller.sendall(words)

        thread = threading.Thread(target=say)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        thread.join(30)


def keeping(file: Path) -> str:
    """
    A command that adds its standard input to *file*.
    """
    code = f"import sys; open({str(file)!r}, 'a').write(sys.stdin.read())"
    return f"{quote(sys.executable)} -c {quote(code)}"


def kept(file: Path) -> list[dict[str, Any]]:
    """
    What such a command has kept.
    """
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


EVICTED = ModelEvicted(KEY, EvictionCause.PRESSURE, GIB, None, 0.5)


# What is said -------------------------------------------------------------------------


def test_an_event_is_told_in_json_with_all_that_it_has() -> None:
    """
    Its name, its model, of a path the last part, and its own fields.
    """
    key = ModelKey("/models/mine", "cuda:0", "float16")
    told = json.loads(as_json(ModelEvicted(key, EvictionCause.PRESSURE, 7, 6, 0.5), 3))
    assert told == {
        "event": "ModelEvicted",
        "at_s": 3,
        "model": "mine",
        "device": "cuda:0",
        "compute_type": "float16",
        "cause": "pressure",
        "credited_bytes": 7,
        "returned_bytes": 6,
        "unload_s": 0.5,
        "unreturned_bytes": 0,
        "parked": False,
    }


def test_every_public_event_can_be_named() -> None:
    """
    And the class of all of them.
    """
    import whispercache

    public = {
        name
        for name in whispercache.__all__
        if isinstance(kind := getattr(whispercache, name), type)
        and issubclass(kind, Event)
    }
    assert public == set(EVENTS)
    for name in public:
        assert parse_hook(f"{name} true").kind is EVENTS[name]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ModelEvict true", "did you mean ModelEvicted?"),
        ("no-rom true", "did you mean NoRoom?"),
        ("xyzzy true", "there are Event, ModelLoading, "),
        ("ModelEvicted", "say what to run"),
        ("ModelEvicted ''", None),
        ("ModelEvicted echo 'half", "No closing quotation"),
    ],
)
def test_nonsense_is_told_before_anything_runs(text: str, told: str | None) -> None:
    """
    With the nearest name.
    """
    if told is None:
        assert parse_hook(text).target
        return
    with pytest.raises(ValueError, match=re.escape(told)):
        parse_hook(text)


def test_names_may_be_written_as_options_are() -> None:
    """
    In small letters, with hyphens.
    """
    assert parse_hook("model-evicted true").kind is ModelEvicted
    hook = parse_hook("Event https://example.org/x?a=b c")
    assert (hook.kind, hook.is_url) == (Event, True)


# What is done -------------------------------------------------------------------------


def test_an_address_gets_what_it_asked_for_and_no_more() -> None:
    """
    In order, while other events pass.
    """
    cache = Told()
    with listening() as (url, got):
        with Hooks([f"ModelEvicted {url}"], cache.subscribe):
            cache.say(NoRoom(KEY, "cuda:0", 2, 1, "so"))
            cache.say(EVICTED)
        assert not cache.listeners
        assert [each["event"] for each in got] == ["ModelEvicted"]
        assert got[0]["model"] == "base"


@pytest.mark.process
def test_a_command_gets_it_on_its_standard_input(tmp_path: Path) -> None:
    """
    Without a shell; one for all events sees each.
    """
    cache = Told()
    file = tmp_path / "a file"
    with Hooks([f"Event {keeping(file)}"], cache.subscribe):
        cache.say(NoRoom(KEY, "cuda:0", 2, 1, "so"))
        cache.say(EVICTED)
    assert [each["event"] for each in kept(file)] == ["NoRoom", "ModelEvicted"]


def test_a_slow_hook_costs_the_cache_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """
    What does not fit into the queue is passed over, which is logged once.
    """
    monkeypatch.setattr(module, "END_S", 0.2)
    cache, stuck = Told(), threading.Event()
    with listening(stuck=stuck) as (url, got):
        hooks = Hooks([f"ModelEvicted {url}"], cache.subscribe)
        cache.say(EVICTED)
        wait_until(lambda: got, "the first is there")
        with caplog.at_level(logging.WARNING, "whispercache"):
            for _ in range(3 * module.MOST_WAITING):
                cache.say(EVICTED)
            full = [each for each in caplog.messages if "too slow" in each]
            assert len(full) == 1
            assert hooks._queue.qsize() == module.MOST_WAITING
            hooks.close()
        assert "100 events were not told" in caplog.text
        stuck.set()
        # Its time is over: it ends, and does not go on for the rest.
        hooks._queue.put(None)
        hooks._thread.join(30)
        assert not hooks._thread.is_alive()


@pytest.mark.process
def test_what_fails_is_logged_and_the_next_one_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """
    A command that fails, one that is missing, and addresses that answer no, that are
    nobody's, that are none, and that do not speak HTTP.
    """
    cache = Told()
    file = tmp_path / "kept"
    with (
        listening(500) as (url, _),
        saying(b"SSH-2.0-OpenSSH_9.6\r\n") as stranger,
        caplog.at_level(logging.WARNING, "whispercache"),
    ):
        told = ["false", str(tmp_path / "missing"), url, "http://127.0.0.1:9/"]
        told += [stranger, "http://127.0.0.1/a b"]
        texts = [f"ModelEvicted {each}" for each in told]
        with Hooks([*texts, f"ModelEvicted {keeping(file)}"], cache.subscribe):
            cache.say(EVICTED)
    assert len(kept(file)) == 1
    assert len([line for line in caplog.messages if " failed: " in line]) == 6
    for text in ("exit status 1", "No such file", "500", "refused", "SSH-2.0", "a b"):
        assert text in caplog.text


def lingering(file: Path) -> str:
    """
    A command that waits for another one, whose process id it writes to *file*.
    """
    code = f"sleep 60 & echo $! > {quote(str(file))}; wait"
    return f"sh -c {quote(code)}"


def is_running(file: Path) -> bool:
    """
    True if the process whose id is in *file* is at work.
    """
    try:
        process = psutil.Process(int(file.read_text()))
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.process
def test_what_a_command_started_ends_with_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """
    The program that a shell waits for, too; the next hook runs.
    """
    monkeypatch.setattr(module, "TIMEOUT_S", 2.0)
    cache = Told()
    file = tmp_path / "id"
    hooks = [f"ModelEvicted {lingering(file)}", "ModelEvicted false"]
    with caplog.at_level(logging.WARNING, "whispercache"):
        with Hooks(hooks, cache.subscribe):
            cache.say(EVICTED)
            wait_until(lambda: "exit status 1" in caplog.text, "the next one")
        assert "it was killed after 2 s" in caplog.text
    wait_until(lambda: not is_running(file), "its end")


@pytest.mark.process
def test_a_command_at_work_ends_with_the_hooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    After the time that is left for it at the end, which is less than its own.
    """
    monkeypatch.setattr(module, "END_S", 0.2)
    cache = Told()
    file = tmp_path / "id"
    with Hooks([f"ModelEvicted {lingering(file)}"], cache.subscribe):
        cache.say(EVICTED)
        wait_until(lambda: file.exists() and file.read_text().strip(), "its id")
        assert is_running(file)
    wait_until(lambda: not is_running(file), "its end")


# No room ------------------------------------------------------------------------------


def test_a_request_without_room_tells_who_could_make_it(
    make_cache: MakeCache, machine: FakeMachine
) -> None:
    """
    It fails at once; when the others have left, the next one is served.
    """
    cache = make_cache()
    machine.others("cuda:0", 9 * GIB)
    told: list[Event] = []

    def leave(event: Event) -> None:
        if isinstance(event, NoRoom):
            told.append(event)
            machine.others("cuda:0", 0)

    cache.subscribe(leave)
    with pytest.raises(ModelTooLarge, match="other programs hold the rest"):
        cache.preload("large-v3", "cuda:0")
    [event] = told
    assert isinstance(event, NoRoom)
    assert event.device == "cuda:0"
    assert event.needed_bytes > event.reachable_bytes > 0
    assert "other programs" in event.reason
    cache.preload("large-v3", "cuda:0")
    quiet(cache)


# Commands -----------------------------------------------------------------------------


def test_options_variables_and_files_name_hooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Two words, a line, and a text.
    """
    said = settle({"on": [["ModelEvicted", "echo a, b"], ["Event", "true"]]})
    assert said["on"].value == ["ModelEvicted echo a, b", "Event true"]
    monkeypatch.setenv("WHISPERCACHE_ON", "ModelEvicted echo a, b\nEvent true")
    assert settle()["on"].value == said["on"].value
    monkeypatch.delenv("WHISPERCACHE_ON")
    file = tmp_path / "a.toml"
    file.write_text('on = ["ModelEvicted echo a, b", "Event true"]')
    assert settle(config=str(file))["on"].value == said["on"].value


def test_a_wrong_event_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """
    Before a model is looked for.
    """
    line = ["transcribe", "a.wav", "--model", "base", "--on", "ModelLoads", "true"]
    assert main(line) == 2
    assert "--on: there is no event ModelLoads; did you mean ModelLoaded?" in (
        capsys.readouterr().err
    )


@pytest.mark.process
def test_transcribe_tells_its_loads(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """
    And what a hook says is no part of the transcript.
    """
    file = tmp_path / "kept"
    line = ["transcribe", clip("en-bread"), "--model", str(micro("micro a"))]
    line += ["--device", "cpu", "--on", "ModelLoaded", keeping(file)]
    assert main([*line, "--on", "ModelLoading", "echo loads"]) == 0
    assert [each["event"] for each in kept(file)] == ["ModelLoaded"]
    out, err = capfd.readouterr()
    assert out == "micro a\n"
    assert "loads\n" in err


@pytest.mark.process
def test_a_server_tells_what_happens_by_its_clients_names(tmp_path: Path) -> None:
    """
    Until its end: the last eviction is told, too.
    """
    file = tmp_path / "kept"
    spec = next(each for each in micros() if each.name == A)
    arguments = (f"{A}={spec.model}", "--device", "cpu", "--on", "Event", keeping(file))
    with command(*arguments) as (process, client):
        assert transcribe(client, A).status_code == 200
        wait_until(lambda: {"ModelLoaded"} <= {each["event"] for each in kept(file)})
        process.terminate()
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0, log
    assert {each["model"] for each in kept(file)} == {A}
