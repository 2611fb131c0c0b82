"""
Limits of uploads: too large or slow ones are refused before they are read whole.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio

from whispercache.errors import format_bytes

from .errors import ApiError, refused_for_now, shutting_down

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Arrivals:
    """
    The uploads that are under way, for the end of the server: what has not arrived by
    then would only be refused when it has.
    """

    def __init__(self) -> None:
        self.is_closed: bool = False
        self._awaited: set[anyio.CancelScope] = set()

    def open(self) -> None:
        """
        Lets uploads arrive, at each start of the server.
        """
        self.is_closed = False

    def close(self) -> None:
        """
        Ends all that is under way, and whatever comes.
        """
        self.is_closed = True
        for scope in self._awaited:
            scope.cancel()

    @contextmanager
    def awaited(self, deadline_s: float) -> Iterator[anyio.CancelScope]:
        """
        Cancels the ``with`` block at its deadline, or by `close`.
        """
        with anyio.CancelScope(deadline=deadline_s) as scope:
            if self.is_closed:
                scope.cancel()
            self._awaited.add(scope)
            try:
                yield scope
            finally:
                self._awaited.remove(scope)


class UploadLimit:
    """
    ASGI middleware that answers 413 to bodies that are too large, 408 to slow ones, and
    503 to those that are under way when *arrivals* are closed.

    A refused request looks to the *app* as if its client had left in mid-upload, which
    every app can handle; half a body never looks like a whole one. What the app answers
    then is dropped.

    For *linger_s* more of a refused body is read, and dropped: a connection that is
    closed in mid-upload would be reset, and its client never see the answer.

    At most *max_at_once* requests with a body are under way.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        timeout_s: float | None = None,
        linger_s: float = 2.0,
        max_at_once: Callable[[], float] = lambda: math.inf,
        *,
        arrivals: Arrivals | None = None,
    ) -> None:
        self._app = app
        self.arrivals: Arrivals = arrivals or Arrivals()
        self.max_bytes = max_bytes
        self.max_at_once = max_at_once
        self._at_once = 0
        self.timeout_s = timeout_s
        self.linger_s = linger_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Answers a request, or passes it on.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        upload = _Upload(self, receive, send)
        headers = dict(scope["headers"])
        # Told at once, before a byte of the body has arrived.
        if _claimed_bytes(headers) > self.max_bytes:
            upload.refuse_large()
        elif _has_body(headers) and self._at_once >= self.max_at_once():
            text = f"{self._at_once} uploads are under way; try again later"
            upload.refusal = refused_for_now(429, text, "too_many_requests")
        if upload.refusal is not None:
            # A client that waits until it is told to go on is not told so: reading
            # would do that.
            await upload.answer(0 if b"expect" in headers else self.linger_s)
            return
        # Only those with a body take room on the disk.
        self._at_once += _has_body(headers)
        try:
            await self._app(scope, upload.receive, upload.send)
        except Exception:
            # Apps end in various ways when their client has gone.
            if upload.refusal is None:
                raise
        finally:
            self._at_once -= _has_body(headers)
        if upload.refusal is not None:
            await upload.answer(self.linger_s)


class _Upload:
    def __init__(self, limit: UploadLimit, receive: Receive, send: Send) -> None:
        self._limit = limit
        self._receive = receive
        self._send = send
        self.refusal: ApiError | None = None
        self._n_bytes = 0
        self._is_over = False  # nothing more of it comes
        self._is_answered = False
        # Counted from the first look at the request, and not anew for each piece.
        self._deadline_s = math.inf
        if limit.timeout_s is not None:
            self._deadline_s = anyio.current_time() + limit.timeout_s

    def refuse_large(self) -> None:
        limit_bytes = self._limit.max_bytes
        message = f"the upload is larger than {format_bytes(limit_bytes)}"
        self.refusal = ApiError(413, message, code="upload_too_large")

    async def receive(self) -> Message:
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        # The body is complete: what comes now is the end of the connection.
        if self._is_over:
            return await self._receive()
        # What the app sees where the time is over.
        message: Message = {"type": "http.disconnect"}
        with self._limit.arrivals.awaited(self._deadline_s) as scope:
            message = await self._receive()
        if scope.cancelled_caught:
            self.refusal = self._too_late()
            return message
        self._is_over = not message.get("more_body", False)
        # Counted too, since a length may be false or missing.
        self._n_bytes += len(message.get("body", b""))
        if self._n_bytes > self._limit.max_bytes:
            self.refuse_large()
            return {"type": "http.disconnect"}
        return message

    def _too_late(self) -> ApiError:
        if self._limit.arrivals.is_closed:
            return shutting_down()
        text = f"the upload did not arrive within {self._limit.timeout_s:g} s"
        return ApiError(408, text, code="upload_timeout")

    async def send(self, message: Message) -> None:
        """
        Sends the app's answer; drops it once the upload is refused.
        """
        # The client gets one answer: the refusal.
        if self.refusal is not None and not self._is_answered:
            return
        self._is_answered = True
        await self._send(message)

    async def answer(self, linger_s: float) -> None:
        """
        Sends the refusal, unless the app has begun to answer before it.
        """
        # Too late: a status has been sent.
        if self._is_answered or self.refusal is None:
            return
        response = self.refusal.response()
        await self._send(
            {
                "type": "http.response.start",
                "status": response.status_code,
                "headers": [*response.raw_headers, (b"connection", b"close")],
            }
        )
        await self._send(
            # The end comes after the rest of the upload, or the connection would be
            # reset with the answer in it.
            {"type": "http.response.body", "body": response.body, "more_body": True}
        )
        if linger_s:
            with anyio.move_on_after(linger_s):
                while not self._is_over:
                    self._is_over = not (await self._receive()).get("more_body", False)
        await self._send({"type": "http.response.body", "body": b""})


def _has_body(headers: Mapping[bytes, bytes]) -> bool:
    return _claimed_bytes(headers) > 0 or b"transfer-encoding" in headers


def _claimed_bytes(headers: Mapping[bytes, bytes]) -> int:
    """
    Returns the length that a request states, which may be false; 0 if it states none.
    """
    claim = headers.get(b"content-length", b"")
    # No number of more digits is needed, and Python reads none without end.
    return int(claim[:20]) if claim.isdigit() else 0
