"""
The address at which the server speaks Wyoming, beside HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from wyoming.error import Error
from wyoming.event import async_write_event

from whispercache.server.errors import ApiError, refused_for_now, shutting_down

from .session import Session, hang_up
from .wire import LINE_BYTES

if TYPE_CHECKING:
    from typing_extensions import Self

    from whispercache.server.service import Service

_log = logging.getLogger("whispercache")


class _Connection(asyncio.StreamReaderProtocol):
    """
    A connection that tells when the other end has left, whatever is read from it.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.left = asyncio.Event()
        self._endpoint = endpoint
        reader = asyncio.StreamReader(LINE_BYTES)
        super().__init__(reader, self._connected)

    def _connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._endpoint.accept(reader, writer, self.left)

    def eof_received(self) -> bool | None:
        self.left.set()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.left.set()
        super().connection_lost(exc)


class Endpoint:
    """
    Listens in an ``async with`` block, and has a `Session` with each client. At its end
    clients that wait for an answer get it within *drain_s* seconds, or an error.

    Raises:
        OSError: The address cannot be had.
    """

    def __init__(
        self, service: Service, address: tuple[str, int], drain_s: float
    ) -> None:
        self._service = service
        self._address = address
        self._drain_s = drain_s
        self._sessions: dict[asyncio.Task[None], Session] = {}
        self._turned_away: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._closing: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """
        The port that it listens on.
        """
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aenter__(self) -> Self:
        host, port = self._address
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: _Connection(self), host, port
            )
        except OSError as error:
            _log.error("Wyoming cannot be spoken on %s:%d: %s", host, port, error)
            raise
        _log.info("Wyoming is spoken on %s:%d", host, self.port)
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    def accept(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        left: asyncio.Event,
    ) -> None:
        """
        Begins to talk with a client, unless there are too many.
        """
        refusal: ApiError | None = None
        if self._closing is not None:
            refusal = shutting_down()
        elif len(self._sessions) >= self._service.most:
            message = f"{len(self._sessions)} clients are here already; try again later"
            refusal = refused_for_now(429, message, "too_many_requests")
        if refusal is not None:
            task = asyncio.ensure_future(_turn_away(writer, refusal))
            self._turned_away.add(task)
            task.add_done_callback(self._turned_away.discard)
            return
        session = Session(self._service, reader, writer, left)
        task = asyncio.get_running_loop().create_task(session.run())
        self._sessions[task] = session
        task.add_done_callback(self._sessions.pop)

    async def close(self) -> None:
        """
        Ends it: no client is heard any more, and answers that are under way are given.
        """
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        answering = []
        for task, session in self._sessions.items():
            session.is_last = True
            if session.is_answering:
                answering.append(task)
            else:
                task.cancel()
        if answering:
            await asyncio.wait(answering, timeout=self._drain_s)
        left = list(self._sessions)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)


async def _turn_away(writer: asyncio.StreamWriter, refusal: ApiError) -> None:
    error = Error(str(refusal), refusal.detail.code)
    # Short enough for the socket to take it at once.
    with suppress(OSError):
        await async_write_event(error.event(), writer)
    await hang_up(writer)
