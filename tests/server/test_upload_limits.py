"""
Uploads that are too large or too slow are refused, and never taken for whole.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn

from whispercache.server.limits import Arrivals, UploadLimit
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MIB = 1024**2


class Client:
    """
    One request by hand: sends *parts*, then nothing more, and keeps what is answered.
    """

    def __init__(self, *parts: bytes, is_whole: bool = True) -> None:
        self._messages: list[Message] = [
            {"type": "http.request", "body": part, "more_body": True} for part in parts
        ]
        if is_whole:
            self._messages[-1]["more_body"] = False
        self.received = 0
        self.answers: list[Message] = []

    async def receive(self) -> Message:
        """
        The next part; after the last one the client keeps still.
        """
        self.received += 1
        if self._messages:
            return self._messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Message) -> None:
        """
        Keep one message of the answer.
        """
        self.answers.append(message)

    def ask(self, app: ASGIApp, **headers: str) -> tuple[int, Any]:
        """
        Status and body of the answer; the body's error if it has one.
        """
        pairs = [
            (name.replace("_", "-").encode(), value.encode())
            for name, value in headers.items()
        ]
        scope: Scope = {"type": "http", "headers": pairs}
        asyncio.run(asyncio.wait_for(app_call(app, scope, self), 20))
        start, *rest = self.answers
        body = b"".join(message["body"] for message in rest)
        assert not rest[-1].get("more_body")
        status = start["status"]
        assert isinstance(status, int)
        if status < 400:
            return status, body
        assert (b"connection", b"close") in start["headers"]
        return status, json.loads(body)["error"]


async def app_call(app: ASGIApp, scope: Scope, client: Client) -> None:
    """
    Pass the request of *client* to *app*.
    """
    await app(scope, client.receive, client.send)


class Echo:
    """
    An app that answers with the size of the body, and notes what it saw of it.
    """

    def __init__(self) -> None:
        self.saw = b""
        self.has_seen_all = False
        self.was_left = False

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """
        Read all, then answer; say 400 if the client leaves.
        """
        while not self.has_seen_all:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.was_left = (await receive())["type"] == "http.disconnect"
                await self._answer(send, 400, b"left")
                return
            self.saw += message["body"]
            self.has_seen_all = not message["more_body"]
        await self._answer(send, 200, str(len(self.saw)).encode())

    async def _answer(self, send: Send, status: int, body: bytes) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})


TOO_LARGE = {
    "message": "the upload is larger than 10 B",
    "type": "invalid_request_error",
    "param": None,
    "code": "upload_too_large",
}


def test_an_upload_within_the_limit_passes_unchanged() -> None:
    """
    As many bytes as are allowed reach the app, and its answer the client.
    """
    echo = Echo()
    client = Client(b"01234", b"56789")
    assert client.ask(UploadLimit(echo, 10), content_length="10") == (200, b"10")
    assert echo.saw == b"0123456789"


def test_a_large_claim_is_refused_unread() -> None:
    """
    A Content-Length above the limit is answered with 413; neither the app nor, with
    ``Expect``, the client is asked for the body.
    """
    echo, client = Echo(), Client(b"0" * 11)
    limit = UploadLimit(echo, 10)
    answer = client.ask(limit, content_length="11", expect="100-continue")
    assert answer == (413, TOO_LARGE)
    assert client.received == 0
    assert not echo.was_left
    digits = "9" * 5000
    assert Client(b"").ask(limit, content_length=digits) == (413, TOO_LARGE)


@pytest.mark.parametrize("claim", [{}, {"content_length": "7"}, {"content_length": ""}])
def test_a_body_that_grows_too_large_is_refused(claim: dict[str, str]) -> None:
    """
    Bytes are counted, whatever was claimed; the app is told that its client left, sees
    nothing of the part that was too much, and what it answers is dropped.
    """
    echo, client = Echo(), Client(b"01234", b"56789", b"x", b"more", b"and more")
    assert client.ask(UploadLimit(echo, 10), **claim) == (413, TOO_LARGE)
    assert client.received == 5
    assert echo.was_left
    assert not echo.has_seen_all
    assert echo.saw == b"0123456789"


def test_a_slow_upload_is_refused() -> None:
    """
    A body that has not arrived in time is answered with 408.
    """
    echo, client = Echo(), Client(b"01234", is_whole=False)
    status, error = client.ask(UploadLimit(echo, 10, 0.05, 0.05))
    assert (status, error["code"]) == (408, "upload_timeout")
    assert echo.was_left
    assert not echo.has_seen_all


def test_what_still_arrives_at_the_end_of_the_server_is_refused() -> None:
    """
    Whether it has begun by then or not; what has arrived goes on.
    """
    echo, arrivals = Echo(), Arrivals()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        asyncio.get_running_loop().call_later(0.05, arrivals.close)
        await echo(scope, receive, send)

    limit = UploadLimit(app, 10, 20, 0.05, arrivals=arrivals)
    assert Client(b"all").ask(limit) == (200, b"3")
    echo.has_seen_all = False
    status, error = Client(b"01234", is_whole=False).ask(limit)
    assert (status, error["code"]) == (503, "shutting_down")
    assert echo.was_left
    status, error = Client(b"01234", is_whole=False).ask(limit)
    assert (status, error["code"]) == (503, "shutting_down")


def test_the_time_limit_ends_with_the_body() -> None:
    """
    Work on a whole upload may take longer than its arrival.
    """

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == b"all"
        gone = asyncio.ensure_future(receive())
        await asyncio.wait([gone], timeout=0.2)
        assert not gone.done()
        gone.cancel()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    assert Client(b"all").ask(UploadLimit(app, 10, 0.05)) == (200, b"done")


def test_an_app_may_fail_at_the_departure() -> None:
    """
    What an app raises when its client seems to leave is no error; all else is.
    """

    async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
        while (await receive())["type"] == "http.request":
            pass
        raise ConnectionError

    assert Client(b"0" * 11).ask(UploadLimit(app, 10)) == (413, TOO_LARGE)

    async def broken(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Client(b"").ask(UploadLimit(broken, 10))


def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    """
    An app that answers before it has read all ends its own answer.
    """

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] == "http.request":
            pass
        await send({"type": "http.response.body", "body": b"early"})

    assert Client(b"0" * 11).ask(UploadLimit(app, 10)) == (200, b"early")


def test_other_protocols_pass() -> None:
    """
    Start-up and web sockets are no uploads.
    """
    seen: list[object] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope["type"])

    client = Client(b"")
    for kind in ("lifespan", "websocket"):
        asyncio.run(app_call(UploadLimit(app, 0), {"type": kind}, client))
    assert seen == ["lifespan", "websocket"]


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """
    The address of a server of *app*.
    """
    config = uvicorn.Config(app, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.should_exit = True
            thread.join(20)


def test_real_clients_get_to_read_the_refusal() -> None:
    """
    A client in the midst of sending megabytes is answered, not reset, whether it states
    their length or not; on the same server, smaller uploads go on.
    """
    echo = Echo()
    with served(UploadLimit(echo, MIB, 20)) as url, httpx.Client() as client:
        for content in (bytes(64 * MIB), (bytes(MIB // 4) for _ in range(256))):
            answer = client.post(url, content=content)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "upload_too_large"
            assert answer.headers["connection"] == "close"
        assert not echo.has_seen_all
        # A client that reads nothing before it has sent everything.
        plain = HTTPConnection(url.split("/")[2], timeout=20)
        plain.request("POST", "/", bytes(64 * MIB))
        assert plain.getresponse().status == 413
        plain.close()
        echo.saw = b""
        assert client.post(url, content=bytes(MIB)).text == str(MIB)
