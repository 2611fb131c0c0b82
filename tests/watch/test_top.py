"""
Top: the live view in terminals of all kinds, in a real one, and of real servers.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from real import child, child_environment
from rich.console import Console

from whispercache.events import DeviceInfo, ModelInfo, Stats, WaitingInfo
from whispercache.keys import ModelKey
from whispercache.watch import top
from whispercache.watch.live import LiveEvent, Snapshot, UnderWay, Watch
from whispercache.watch.top import remote, view, watch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import MakeCache

GIB = 1024**3
LONG = "Systran/faster-distil-whisper-large-v3:int8_float16"


def a_model(name: str, device: str = "cuda:0", **changes: Any) -> ModelInfo:
    """
    An idle model of 1 GiB.
    """
    model = ModelInfo(
        key=ModelKey(name, device, "float16"),
        device=device,
        state="resident",
        weights_bytes=GIB,
        workspace_bytes=0,
        leases=0,
        pinned=False,
        idle_s=83.0,
        expires_in_s=217.0,
        loads=1,
        load_s=1.2,
    )
    return replace(model, **changes)


def waiting_for(*names: str, waited_s: float = 1.0) -> WaitingInfo:
    """
    A request for the models of these *names*.
    """
    return WaitingInfo(tuple(ModelKey(name, "", "") for name in names), waited_s)


BUSY = Snapshot(
    at_s=1.79e9,
    devices=(
        DeviceInfo("cpu", None, 62 * GIB, 0, 0, 0),
        DeviceInfo("cuda:0", None, 10 * GIB, 5 * GIB, 6 * GIB, 2),
        DeviceInfo("cuda:1", 6 * GIB, 5 * GIB, 4 * GIB, 5 * GIB, 3),
    ),
    models=(
        a_model("small", leases=1, idle_s=None, expires_in_s=None),
        a_model("medium", weights_bytes=3 * GIB, workspace_bytes=GIB),
        a_model("base", "cuda:1", pinned=True, expires_in_s=None),
        a_model(LONG, "cuda:1", weights_bytes=2 * GIB, state="loading"),
        a_model("tiny", "cuda:1", expires_in_s=None),
    ),
    waiting=tuple(waiting_for("large-v3", "base", waited_s=11.0 * n) for n in range(7)),
    events=tuple(
        LiveEvent(n, 1.79e9 + n, "loaded", "base", f"loaded, number {n}")
        for n in range(50)
    ),
    stats=Stats(requests=11, hits=5, misses=6, loads=4, leases=1),
)
EMPTY = Snapshot(1.79e9, (), (), (), (), Stats())


def printed(snapshot: Snapshot, width: int = 100, **options: Any) -> list[str]:
    """
    The lines of a view, as a terminal of UTF-8 without colours shows them.
    """
    file = io.StringIO()
    Console(file=file, width=width, legacy_windows=False).print(
        view(snapshot, **options)
    )
    return [line.rstrip() for line in file.getvalue().splitlines()]


def line_of(lines: list[str], text: str) -> str:
    """
    The one line with *text*.
    """
    (line,) = (line for line in lines if text in line)
    return line


@pytest.mark.parametrize("width", [30, 60, 80, 140])
def test_a_view_is_no_wider_than_its_terminal(width: int) -> None:
    """
    Names give way; what models do stays readable from 60 columns on.
    """
    lines = printed(BUSY, width)
    assert max(map(len, lines)) <= width
    if width >= 60:
        assert "in use" in line_of(lines, "small")
        assert "idle 1:23" in line_of(lines, "medium")
        assert "4.0 GiB" in line_of(lines, "medium")
        assert line_of(lines, " medium").endswith("in 3:37")
        assert line_of(lines, "pinned").split()[1] == "base"
        assert line_of(lines, "never").split()[1] == "tiny"
        assert "Systran" in line_of(lines, "loading")


def test_bars_are_filled_as_far_as_the_memory() -> None:
    """
    4 and 1 of 10 GiB are 40 and 10 of 100 columns, each with its number and state.
    """
    lines = printed(BUSY, 100)
    bar = lines[lines.index(line_of(lines, "5.0 GiB of 10.0 GiB")) + 1]
    assert bar == "1" + "▒" * 39 + "2" + "█" * 9 + "·" * 50
    second = lines[lines.index(line_of(lines, "4.0 GiB of 5.0 GiB")) + 1]
    assert second.count("░") == 39  # on its way in


def test_more_than_all_memory_still_makes_a_bar() -> None:
    """
    Other programs can leave less than the models already hold.
    """
    device = DeviceInfo("cuda:0", None, GIB, 2 * GIB, 2 * GIB, 2)
    models = (a_model("a"), a_model("b"))
    lines = printed(replace(BUSY, devices=(device,), models=models), 50)
    bar = lines[lines.index(line_of(lines, "2.0 GiB of 1.0 GiB")) + 1]
    assert bar == "1" + "▒" * 24 + "2" + "▒" * 24


def test_who_waits_is_listed_but_not_everybody() -> None:
    """
    The first five, and how many more.
    """
    lines = printed(BUSY)
    assert line_of(lines, "Queue").split() == ["Queue", "7"]
    assert sum("large-v3 + base" in line for line in lines) == 5
    assert "and 2 more" in "\n".join(lines)
    assert "0:44" in line_of(lines, "  5  ")


@pytest.mark.parametrize("height", [26, 30, 40])
def test_old_events_give_way_where_lines_are_few(height: int) -> None:
    """
    The newest stay, the newest first.
    """
    lines = printed(BUSY, height=height)
    events = [line for line in lines if "number" in line]
    assert len(lines) <= height
    assert len(lines) >= height - 3 or not events
    assert [line.split()[-1] for line in events] == [
        str(49 - n) for n in range(len(events))
    ]


def test_an_empty_cache_is_said_to_be_empty() -> None:
    """
    And divides nothing by zero.
    """
    assert "Nothing is in memory yet." in "\n".join(printed(EMPTY))


def test_a_terminal_of_ascii_gets_ascii() -> None:
    """
    Marks, bars and cut names, too; states can still be told apart.
    """
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, "ascii")
    models = (*BUSY.models, a_model("mod\u00e8le"))
    console = Console(file=file, width=60, legacy_windows=False)
    console.print(view(replace(BUSY, models=models), trouble="d\u00e9sol\u00e9"))
    file.flush()
    text = raw.getvalue().decode("ascii")
    assert "# in use  = idle  ~ on its way" in text
    assert "mod?le" in text
    assert "2####" in text or "3####" in text


def test_nothing_in_a_name_steers_the_terminal() -> None:
    """
    Names, kinds and texts come from a server: no escape, no line, no markup, no turn.
    """
    evil = "\x1b[2J\x1b]0;owned\x07[red]x[/red]\n\r\u202eabc\u2028\x9b31m"
    snapshot = Snapshot(
        at_s=1e300,
        devices=(DeviceInfo(evil, None, GIB, GIB, GIB, 1),),
        models=(a_model(evil, evil), a_model("b", evil, state=evil)),
        waiting=(waiting_for(evil),),
        requests=(UnderWay(evil, 1e300, evil, evil),),
        events=(LiveEvent(1, -1e300, evil, evil, evil),),
        stats=Stats(),
    )
    lines = printed(snapshot, 200, trouble=evil)
    text = "\n".join(lines)
    assert not set(text) & set("\x1b\x07\r\u202e\u2028\x9b")
    assert "[red]x[/red]" in text
    assert "--:--:--" in text


def test_without_a_terminal_it_is_printed_once() -> None:
    """
    For scripts and files: no escape sequences, and an end.
    """
    file = io.StringIO()
    watch(lambda: BUSY, console=Console(file=file, width=80))
    assert "medium" in file.getvalue()
    assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize("interval_s", [None, 0, -1, "soon", float("inf"), True])
def test_an_interval_that_is_none_is_told_before_a_look(interval_s: Any) -> None:
    """
    And by its name.
    """
    with pytest.raises((TypeError, ValueError), match=r"^interval_s must be "):
        watch(pytest.fail, interval_s=interval_s)


def test_without_a_terminal_errors_are_raised() -> None:
    """
    A script sees that there was nothing to print.
    """

    def fail() -> Snapshot:
        raise ConnectionError("nobody answers")

    with pytest.raises(ConnectionError, match="nobody answers"):
        watch(fail, console=Console(file=io.StringIO()))


def test_a_cache_of_this_process_can_be_watched(make_cache: MakeCache) -> None:
    """
    What a `Watch` of it takes is what is shown.
    """
    cache, file = make_cache(), io.StringIO()
    with Watch(cache) as watching, cache.lease("small", "cuda:0"):
        watch(watching.snapshot, console=Console(file=file, width=90))
    text = file.getvalue()
    assert "cuda:0  2.0 GiB of 10.0 GiB" in text
    assert "small:float16 loaded in 0.00 s: 2.0 GiB" in text


IN_A_TERMINAL = """
import os, sys
os.open(os.ttyname(0), os.O_RDWR)  # so that Ctrl-C means this process
sys.path.append(sys.argv[1])
from test_top import BUSY
from whispercache.watch.top import watch

answers = iter([ConnectionError("nobody is there"), BUSY, OSError("gone again")])

def source():
    answer = next(answers, BUSY)
    if isinstance(answer, Exception):
        raise answer
    return answer

watch(source, interval_s=0.3)
print("ended well")
"""


class Terminal:
    """
    The outer end of a terminal, in which a program runs.

    Args:
        descriptor: What it is read from and written to.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unread = b""

    def read_until(self, text: bytes, patience_s: float = 30) -> bytes:
        """
        All that the program writes up to *text*; what comes after it is left for the
        next call, since the two may arrive together.
        """
        end_s = time.monotonic() + patience_s
        while text not in self._unread:
            assert time.monotonic() < end_s, self._unread
            try:
                self._unread += os.read(self._descriptor, 65536)
            except OSError as error:  # its end, as Linux tells it
                raise AssertionError(self._unread) from error
        before, found, self._unread = self._unread.partition(text)
        return before + found

    def write(self, text: bytes) -> None:
        """
        Type *text*.
        """
        os.write(self._descriptor, text)


@contextmanager
def a_terminal(code: str) -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    """
    A Python that runs *code* in a terminal of its own: the terminal, and the process.
    """
    outside, inside = os.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = child_environment(
        {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    )
    # Of the terminal in which the tests run; this one has a size of its own.
    for name in ("COLUMNS", "LINES"):
        environment.pop(name, None)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env=environment,
        start_new_session=True,
    ) as process:
        os.close(inside)
        try:
            yield Terminal(outside), process
        finally:
            process.kill()
            os.close(outside)


@pytest.mark.process
def test_ctrl_c_leaves_a_terminal_as_it_was() -> None:
    """
    Errors are shown and passed over; at the end the old screen and the cursor are back.
    """
    with a_terminal(IN_A_TERMINAL) as (terminal, process):
        seen = terminal.read_until(b"nobody is there")
        assert b"\x1b[?1049h" in seen  # a screen of its own
        assert b"\x1b[?25l" in seen  # no cursor
        assert b"medium" in terminal.read_until(b"number 49")
        terminal.read_until(b"gone again")
        terminal.write(b"\x03")
        rest = terminal.read_until(b"ended well")
        assert rest.index(b"\x1b[?1049l") < rest.index(b"ended well")
        assert b"\x1b[?25h" in rest
        assert b"Traceback" not in rest
        assert process.wait(10) == 0


class Answers(BaseHTTPRequestHandler):
    """
    Says what it was told to, to who has the key.
    """

    status = 200
    body = b""
    key = ""
    # Of the second address; none where that is missing.
    requests: bytes | None = None
    asked: list[str | None]

    def log_message(self, *_details: object) -> None:
        """
        Nothing.
        """

    def do_GET(self) -> None:
        """
        Answer.
        """
        self.asked.append(self.path)
        given = self.headers.get("Authorization")
        status = 401 if self.key and given != f"Bearer {self.key}" else self.status
        body = self.body
        if self.path.endswith("/api/requests"):
            status = 404 if self.requests is None else status
            body = self.requests or b""
        self.send_response(status)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def answering(**told: Any) -> Iterator[tuple[str, type[Answers]]]:
    """
    A server that says what it is *told*, and its address.
    """
    handler = type("Told", (Answers,), {"asked": [], **told})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def as_body(document: object) -> bytes:
    """
    JSON.
    """
    return json.dumps(document).encode()


def changed(**fields: object) -> bytes:
    """
    The answer of a server, but for one thing in its first model.
    """
    document: Any = BUSY.as_json()
    document["models"][0].update(fields)
    return as_body(document)


def test_a_server_is_asked_for_its_snapshot() -> None:
    """
    With its key; the same comes back, even with fields that are not known yet.
    """
    body = as_body({**BUSY.as_json(), "version": "9", "new": {"a": 1}})
    with answering(body=body, key="sesame") as (url, server):
        for address in (url, f"{url}/"):
            assert remote(address, "sesame")() == BUSY
        assert server.asked == ["/api/ps", "/api/requests"] * 2


def test_a_server_s_requests_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Those under way: the phase and its time, the model, and the name of the key.
    """
    seconds = {"arriving": 0.5, "working": 83.0, "total": 83.5}
    working = {"phase": "working", "seconds": seconds, "model": "base", "who": "anna"}
    arriving = {"phase": "arriving", "seconds": seconds, "model": None, "who": None}
    document = {"under_way": [working, *[arriving] * 6], "lately": [working]}
    with answering(body=as_body(BUSY.as_json()), requests=as_body(document)) as (
        url,
        server,
    ):
        snapshot = remote(url)()
        assert snapshot.as_json() == BUSY.as_json()
        lines = printed(snapshot)
        assert line_of(lines, "Requests").split() == ["Requests", "7"]
        assert line_of(lines, "anna").split() == ["working", "1:23", "base", "anna"]
        assert sum(line.startswith("arriving") for line in lines) == 4
        for nonsense in (
            b"[]",
            b'{"under_way": [{}]}',
            b'{"under_way": [{"phase": 1}]}',
        ):
            monkeypatch.setattr(server, "requests", nonsense)
            with pytest.raises(ValueError, match="/api/requests: no whispercache"):
                remote(url)()


@pytest.mark.parametrize(
    ("key", "said"), [(None, "it asks for a key"), ("wrong", "the key does not fit")]
)
def test_a_wrong_key_is_said_to_be_wrong(key: str | None, said: str) -> None:
    """
    In one line, which does not tell the key.
    """
    with answering(body=b"{}", key="sesame") as (url, _):
        with pytest.raises(PermissionError, match=f"{url}/api/ps: {said}") as caught:
            remote(url, key)()
        assert "wrong" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"<h1>Not here</h1>"),
        (500, b""),
        (302, b""),
        (200, b"<h1>Hello</h1>"),
        (200, b""),
        (200, b"[]"),
        (200, b"{}"),
        (200, b"null"),
        (200, b"[" * 100_000),
        (200, b"\xff\xfe{}"),
        (200, changed(name=3)),
        (200, changed(weights_bytes="many")),
        (200, changed(weights_bytes=10**400)),
        (200, changed(idle_s=float("nan"))),
        (200, changed(leases=None)),
        (200, as_body({**BUSY.as_json(), "events": [{}]})),
        (200, as_body({**BUSY.as_json(), "devices": 3})),
        (200, as_body({**BUSY.as_json(), "at_s": "now"})),
        (200, as_body({**BUSY.as_json(), "stats": {"loads": []}})),
        (200, as_body({**BUSY.as_json(), "waiting": [{"models": [1], "waited_s": 1}]})),
    ],
)
def test_whatever_else_answers_is_no_server_of_ours(status: int, body: bytes) -> None:
    """
    One line says so, and nobody is followed elsewhere with the key.
    """
    with answering(status=status, body=body) as (url, server):
        with pytest.raises(ValueError, match="no whispercache server") as caught:
            remote(url, "sesame")()
        assert "\n" not in str(caught.value)
        assert server.asked == ["/api/ps"]


def test_an_address_where_nobody_answers_is_named() -> None:
    """
    Refused, not found, silent, or no web server at all.
    """
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port}/api/ps: no answer"):
        remote(f"http://127.0.0.1:{port}")()
    with pytest.raises(ConnectionError, match="no answer"):
        remote("http://nowhere.invalid")()


def test_a_silent_server_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    It accepts the connection, and says nothing.
    """
    monkeypatch.setattr(top, "TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ConnectionError, match="no answer: timed out"):
            remote(f"http://127.0.0.1:{port}")()


def test_a_server_of_something_else_than_http_is_named() -> None:
    """
    Its greeting is no answer.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail.example ESMTP\r\n")

        greeter = threading.Thread(target=greet)
        greeter.start()
        with pytest.raises(ValueError, match="no HTTP server"):
            remote(f"http://127.0.0.1:{server.getsockname()[1]}")()
        greeter.join()


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "file:///etc/passwd", "ftp://host/", "http://"]
)
def test_only_web_addresses_are_asked(url: str) -> None:
    """
    Known before anything is asked.
    """
    with pytest.raises(ValueError, match="is no address such as"):
        remote(url)


@pytest.mark.parametrize("key", ["schl\u00fcssel", "a\r\nHost: b"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    """
    Known before anything is asked, and not repeated.
    """
    with pytest.raises(ValueError, match="the key must be") as caught:
        remote("http://127.0.0.1:1", key)
    assert key not in str(caught.value)


@pytest.mark.process
def test_nothing_is_imported_before_it_is_shown() -> None:
    """
    Both rich and urllib's client wait for whoever watches.
    """
    code = (
        "import sys, whispercache.watch.top\n"
        "print(sorted({'rich', 'urllib.request', 'numpy'} & set(sys.modules)))"
    )
    assert child(code).stdout.strip() == "[]"
