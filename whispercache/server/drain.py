"""
The orderly end of the server: work that has begun is finished within a time.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import uvicorn

from .errors import shutting_down

if TYPE_CHECKING:
    import socket

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .service import Service


class Server(uvicorn.Server):
    """
    uvicorn that, before it ends, refuses the requests that wait or still arrive.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """
        Refuses new work, and waits for the work that has begun.
        """
        # First: those that wait, or arrive, would only begin work that is then waited
        # for.
        self._service.gate.close()
        self._service.arrivals.close()
        draining = asyncio.ensure_future(self._service.drain())
        await super().shutdown(sockets)
        # A second signal ends it at once.
        if self.force_exit:
            draining.cancel()
        await asyncio.wait((draining,))


class Unfinished:
    """
    ASGI middleware that answers requests which the server cancels for lack of time:
    with 503 if nothing was answered yet. Without it, that is a 500 and a traceback.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Answers a request, or passes it on.
        """
        is_answered = False

        async def note(message: Message) -> None:
            nonlocal is_answered
            is_answered = True
            await send(message)

        try:
            await self._app(scope, receive, note)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            # The server asks for no more than that this ends.
            if not is_answered:
                await shutting_down().response()(scope, receive, send)
