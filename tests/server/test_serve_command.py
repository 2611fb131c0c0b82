"""
The command ``whispercache serve``: its options, its signals and its end.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from caches import cache_of
from real import child_environment, clip, micro
from served import (
    TINY,
    URL,
    A,
    asking,
    command,
    error_of,
    micros,
    offered,
    serving,
    transcribe,
    waiting,
)

from whispercache.cli.main import main
from whispercache.console import WRONG_USE
from whispercache.server.command import server_options
from whispercache.settings.table import SETTINGS
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from whispercache import ModelCache

pytestmark = pytest.mark.process

cache = cache_of(max_models=1)


def test_sigterm_lets_what_has_begun_be_finished() -> None:
    """
    The client gets the whole answer; the exit code is 0, and no process stays.
    """
    (spec,) = offered(TINY)
    place = f"{TINY}={spec.model}"
    with (
        command(place, "--device", "cpu", "--pin", TINY) as (process, client),
        Path(clip("en-harbour-long")).open("rb") as file,
    ):
        with client.stream(
            "POST",
            URL,
            data={"model": TINY, "stream": "true"},
            files={"file": ("a.flac", file)},
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert any("transcript.text.done" in line for line in rest)
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0, log
        assert "Traceback" not in log
        assert "leaked" not in log


def test_what_is_not_finished_in_time_is_told_so() -> None:
    """
    503 with Retry-After for those who wait, and for those who worked for too long.
    """
    (spec,) = offered(TINY)
    place = (f"{TINY}={spec.model}", "--device", "cpu", "--preload", TINY)
    with (
        command(*place, "--drain", "1", "--parallel", "1") as (process, client),
        ExitStack() as asked,
    ):
        for _ in range(3):
            there = asking(client, TINY, clip_name="en-harbour-long")
            last = asked.enter_context(there)
        wait_until(lambda: waiting(client) == 2, "the others at the gate")
        last.settimeout(30)
        process.send_signal(signal.SIGTERM)
        answer = "".join(piece.decode() for piece in iter(lambda: last.recv(999), b""))
        assert answer.startswith("HTTP/1.1 503"), answer
        assert "retry-after" in answer
        assert "shutting_down" in answer
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in log


def test_an_upload_that_stalls_does_not_hold_up_the_end() -> None:
    """
    It is told so, long before the time for what has begun is over; one at work is
    finished.
    """
    (spec,) = offered(TINY)
    place = (f"{TINY}={spec.model}", "--device", "cpu", "--preload", TINY)
    with (
        command(*place, "--drain", "120") as (process, client),
        asking(client, TINY, clip_name="en-harbour-long") as at_work,
        asking(client, TINY, length=10**6) as stalled,
    ):
        wait_until(lambda: client.get("/api/ps").json()["models"][0]["leases"], "work")
        process.send_signal(signal.SIGTERM)
        for asked, told in ((stalled, "503"), (at_work, "200")):
            asked.settimeout(60)
            answer = b"".join(iter(lambda: asked.recv(9999), b""))  # noqa: B023
            assert answer.startswith(f"HTTP/1.1 {told}".encode()), answer
            assert (b"shutting_down" in answer) is (told == "503")
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in log


def test_ctrl_c_ends_it_as_usual() -> None:
    """
    With the shell's exit code, and no traceback.
    """
    with command(f"m={micro('micro a')}", "--device", "cpu") as (process, client):
        assert transcribe(client, "m").json()["text"] == "micro a"
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in log


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_terminal_that_is_closed_ends_it_in_order() -> None:
    """
    As SIGTERM does: what has begun is finished.
    """
    (spec,) = offered(TINY)
    place = (f"{TINY}={spec.model}", "--device", "cpu", "--preload", TINY)
    with (
        command(*place) as (process, client),
        asking(client, TINY, clip_name="en-harbour-long") as at_work,
    ):
        wait_until(lambda: client.get("/api/ps").json()["models"][0]["leases"], "work")
        process.send_signal(signal.SIGHUP)
        at_work.settimeout(60)
        answer = b"".join(iter(lambda: at_work.recv(9999), b""))
        assert answer.startswith(b"HTTP/1.1 200"), answer
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in log


def test_keys_come_from_a_file_and_from_the_environment(tmp_path: Path) -> None:
    """
    Never from the command line, which others can read.
    """
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n", encoding="utf-8")
    arguments = (f"m={micro('micro a')}", "--key-file", str(file), "--device", "cpu")
    with command(*arguments, WHISPERCACHE_API_KEYS="three,four") as (server, client):
        for key, status in (("one", 200), ("two", 200), ("four", 200), ("-", 401)):
            headers = {"authorization": f"Bearer {key}"}
            assert client.get("/v1/models", headers=headers).status_code == status
        children = psutil.Process(server.pid).children()
        assert children
        assert not [c for c in children if "four" in str(c.environ())]


def test_priorities_of_keys_are_by_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    What cannot be meant is told in one line, before anything starts.
    """
    file = tmp_path / "keys"
    file.write_text("night: one\n", encoding="utf-8")
    start = ["serve", f"m={micro('micro a')}", "--key-file", str(file)]
    for told, text in (
        ("night", "key_priority must be as night=batch, not 'night'"),
        ("day=batch", "no key is called day"),
        ("night=late", "priority must be one of interactive, batch, or a number"),
    ):
        assert main([*start, "--key-priority", told]) != 0
        assert text in capsys.readouterr().err
    setting = {**_defaults(), "models": ["m"], "key_file": [str(file)]}
    options = server_options({**setting, "key_priority": ["night = -1"]})
    assert options.levels() == {"one": -1.0}


def _defaults() -> dict[str, Any]:
    start = "serve."
    return {
        key.removeprefix(start): setting.default
        for key, setting in SETTINGS.items()
        if key.startswith(start)
    }


def test_its_settings_come_from_a_file_and_from_variables(tmp_path: Path) -> None:
    """
    Models, keys and limits; the command line has the port alone.
    """
    (tmp_path / "keys").write_text("one\n", encoding="utf-8")
    file = tmp_path / "served.toml"
    file.write_text(
        f"""
        max_models = 7
        [serve]
        models = ["m={micro("micro a")}"]
        device = "cpu"
        key_file = ["keys"]
        max_upload = "1MiB"
        """,
        encoding="utf-8",
    )
    outside = {"WHISPERCACHE_SERVE_MAX_UPLOAD": "2KiB", "WHISPERCACHE_RAM": "3GiB"}
    with command("--config", str(file), **outside) as (_, client):
        assert client.get("/v1/models").status_code == 401
        client.headers["authorization"] = "Bearer one"
        (model,) = [each["id"] for each in client.get("/v1/models").json()["data"]]
        assert model == "m"
        assert client.post("/api/models/m/load").status_code == 200
        (host,) = client.get("/api/ps").json()["devices"]
        assert host["capacity_bytes"] == 3 * 1024**3
        refused = transcribe(client, "m")
        assert refused.status_code == 413
        assert "larger than 2.0 KiB" in error_of(refused)["message"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name at least one model"),
        (("base", "--parallel", "0"), "--parallel must be at least 1"),
        (("base", "--config", "gone.toml"), "gone.toml: No such file"),
        (("no-such-size",), "unknown model 'no-such-size'"),
        (("base:in8",), "no compute type"),
        (("base", "--pin", "tiny"), "tiny is not among"),
        (("base", "--default", "tiny"), "the default tiny is not among"),
        (("base", "--allow-host", "http://a.example"), "name it as in a.example"),
        (("base", "--allow-origin", "a.example"), "browsers send https://a.example"),
        (("base", "--timeout", "-1"), "--timeout must have an end"),
        (("base", "--max-upload", "lots"), "--max-upload"),
        (("base", "--key-file", os.devnull), "holds no key"),
    ],
)
def test_wrong_use_is_told_in_one_line(arguments: tuple[str, ...], said: str) -> None:
    """
    With exit code 2, before anything is served.
    """
    done = subprocess.run(
        [sys.executable, "-m", "whispercache", "serve", *arguments],
        env=child_environment({}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


class Configured(Exception):
    """
    uvicorn got this far.
    """


@pytest.mark.parametrize(
    ("given", "seconds"), [((), 75), (("--idle-timeout", "1.5m"), 90)]
)
def test_idle_connections_stay_open(
    monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], seconds: int
) -> None:
    """
    As long as those of a proxy in front do, or as long as is said.
    """
    asked: dict[str, object] = {}

    def configured(_app: object, **options: object) -> None:
        asked.update(options)
        raise Configured

    monkeypatch.setattr("uvicorn.Config", configured)
    monkeypatch.delenv("WHISPERCACHE_API_KEYS", raising=False)
    line = ["serve", f"m={micro('micro says hello')}", "--port", "0", *given]
    with pytest.raises(Configured):
        main([*line, "--device", "cpu"])
    assert asked["timeout_keep_alive"] == seconds


@pytest.mark.parametrize("protocol", ["HTTP", "Wyoming"])
def test_a_port_that_is_taken_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    """
    Before anything starts: uvicorn would tell it in many.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = {
            "HTTP": ["--port", f"{port}"],
            "Wyoming": ["--port", "0", "--wyoming", f"127.0.0.1:{port}"],
        }
        assert main(["serve", f"m={micro()}", *options[protocol]]) == WRONG_USE
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{protocol} cannot be spoken on 127.0.0.1:{port}: " in said


def test_a_name_of_no_machine_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """
    As a port that is taken.
    """
    line = ["serve", f"m={micro()}", "--host", "nobody.invalid", "--port", "0"]
    assert main(line) == WRONG_USE
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "HTTP cannot be spoken on nobody.invalid:0: " in said


def test_top_shows_a_server(cache: ModelCache, tmp_path: Path) -> None:
    """
    With the key from a file or from the environment; what is wrong is one line.
    """
    (tmp_path / "key").write_text("secret\n", encoding="utf-8")
    file = ("--key-file", str(tmp_path / "key"))

    def top(*arguments: str, key: str = "") -> subprocess.CompletedProcess[str]:
        place = str(client.base_url)
        line = [
            "-m",
            "whispercache",
            "top",
            "--once",
            "--url",
            place,
            *arguments,
        ]
        return subprocess.run(
            [sys.executable, *line],
            env=child_environment({"WHISPERCACHE_API_KEY": key}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    with serving(cache, models=micros(), keys=("secret",)) as client:
        cache.preload(micro("micro a"), "cpu")
        for done in (top(*file), top(key="secret")):
            assert done.returncode == 0, done.stderr
            assert A in done.stdout
        for done in (top(), top(key="wrong"), top("--interval", "-1", *file)):
            assert done.returncode == 2
            assert not done.stdout
            assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("port", ["65536", "-1", "http", ""])
def test_a_port_that_is_none_is_told_in_one_line(
    port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Before anything is served.
    """
    assert main(["serve", "m", f"--port={port}"]) == WRONG_USE
    told = capsys.readouterr().err
    assert f"{port!r} is no port" in told
    assert told.count("\n") == 1
