"""
Each request from its first byte to its last: its place in the list, its line in the
log, and its trace.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .answers import request_id
from .errors import as_refusal
from .logs import FIELDS
from .seen import LOOKING, following
from .telemetry import Trace

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .seen import Outcome, RequestsSeen, SeenRequest

_log = logging.getLogger("whispercache")


class Following:
    """
    ASGI middleware that has the phases of each request noted, within `Answers`, which
    gives it an id.
    """

    def __init__(self, app: ASGIApp, seen: RequestsSeen) -> None:
        self._app = app
        self._seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Passes a request on, and answers it if nothing else does.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = self._seen.begin(request_id(scope), scope["method"])
        with following(request), Trace(request, scope) as trace:
            followed = _Followed(request, trace, scope, receive, send)
            try:
                await self._app(scope, followed.receive, followed.send)
            except Exception as error:
                answer = as_refusal(error)
                request.error = answer.detail.code
                # Starlette would answer it outside of this, unseen.
                if request.status is None:
                    await answer.response()(scope, receive, followed.send)
                followed.end("failed")
                raise
            finally:
                # Nobody was there for the whole answer.
                followed.end("left")


class _Followed:
    def __init__(
        self,
        request: SeenRequest,
        trace: Trace,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self._request = request
        self._trace = trace
        self._scope = scope
        self._receive = receive
        self._send = send

    async def receive(self) -> Message:
        # Known by now: routes read the body.
        self._note_route()
        return await self._receive()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._request.status = message["status"]
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            # Before it is sent: with that, a framework's own span ends.
            self.end()
        await self._send(message)

    def end(self, outcome: Outcome | None = None) -> None:
        """
        Ends the request, in the list, the trace and the log.
        """
        request = self._request
        if request.is_over:
            return
        self._note_route()
        request.end(outcome)
        self._trace.finish()
        log_end(request)

    def _note_route(self) -> None:
        route = self._scope.get("route")
        self._request.route = getattr(route, "path_format", None)


def log_end(request: SeenRequest) -> None:
    """
    Writes the line of a request that is over into the log.
    """
    if request.method not in LOOKING and _log.isEnabledFor(logging.INFO):
        _log.info("%s", _sentence(request), extra={FIELDS: _fields(request)})


def _fields(request: SeenRequest) -> dict[str, object]:
    return {
        "event": "request",
        "request_id": request.id,
        "method": request.method,
        "route": request.route,
        "who": request.who,
        "model": request.model,
        "audio_s": request.audio_s,
        "priority": request.priority,
        "status": request.status,
        "outcome": request.outcome,
        "error": request.error,
        "seconds": {name: round(s, 6) for name, s in request.seconds().items()},
    }


def _sentence(request: SeenRequest) -> str:
    """
    Returns a line for people, such as "POST /v1/audio/transcriptions answered (200):
    base, waiting 0.20 s, loading 1.10 s, working 0.53 s".
    """
    spent = [f"{name} {s:.2f} s" for name, s in request.seconds().items()]
    told = ", ".join((*filter(None, (request.who, request.model)), *spent))
    route = request.route or "of no route"
    facts = filter(None, (request.status, request.error))
    ended = ", ".join(map(str, facts)) or "no status"
    return f"{request.method} {route} {request.outcome} ({ended}): {told}"
