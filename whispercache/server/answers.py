"""
The outside of all requests: forms of addresses that are meant as one, and headers that
each answer has.
"""

from __future__ import annotations

import logging
import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from .errors import ApiError
from .guard import route_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastapi import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = "X-Request-ID"
MODEL = "Whispercache-Model"
WARNING = "Whispercache-Warning"

_TOLD = "whispercache.told"
# No more than goes through a log and a header as it is.
_PROPER_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
# The slashes before a path, and those after the part that a base URL ends in.
_JOINT = re.compile(r"^/+(v1/)?/*")
_LONGEST_SHOWN = 40
# Names that were in the log already: a client sends the same ones each time.
_MOST_LOGGED = 100
_logged: set[str] = set()

_log = logging.getLogger("whispercache")


@dataclass(slots=True)
class Told:
    """
    Facts about a request that its answer tells in headers.
    """

    request_id: str
    model: str | None = None
    unknown: list[str] = field(default_factory=list)

    def note(self, model: str, unknown: Sequence[str], *, strict: bool) -> None:
        """
        Notes the model that answers, and the fields that mean nothing here, which are
        an `ApiError` if *strict*.
        """
        self.model = model
        # They come from clients, and go into a header.
        self.unknown = [ascii(name[:_LONGEST_SHOWN]) for name in unknown]
        if not unknown:
            return
        if strict:
            name = unknown[0][:_LONGEST_SHOWN]
            message = f"{name}: there is no such field"
            raise ApiError(400, message, code="unknown_parameter", param=name)
        new = [name for name in self.unknown if name not in _logged]
        if new and len(_logged) < _MOST_LOGGED:
            _logged.update(new)
            text = "request %s has unknown fields, which are ignored: %s"
            _log.warning(text, self.request_id, ", ".join(new))

    def headers(self) -> dict[str, str]:
        """
        Returns the headers of the answer.
        """
        found = {REQUEST_ID: self.request_id}
        if self.model is not None:
            # Offers may have any name; headers have no other letters.
            found[MODEL] = ascii(self.model)[1:-1]
        if self.unknown:
            found[WARNING] = f"unknown fields: {', '.join(self.unknown)}"
        return found


def told(request: Request) -> Told:
    """
    Returns what is told of a request.
    """
    found: Told = request.scope[_TOLD]
    return found


def request_id(scope: Scope) -> str:
    """
    Returns the id of a request.
    """
    found: Told = scope[_TOLD]
    return found.request_id


class Answers:
    """
    ASGI middleware that gives each request an id, its client's own if it has one, and
    each answer its headers. HEAD is answered like GET, without the body. In an address
    a slash at the end means nothing, nor do further ones where a client has put its
    base URL before a path, nor does a parameter without a value.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Answers a request, or passes it on.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        is_proper = _PROPER_ID.fullmatch(given) is not None
        facts = Told(given if is_proper else f"req_{secrets.token_hex(16)}")
        is_head = scope["method"] == "HEAD"

        async def send_told(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(facts.headers())
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        inner = {
            **scope,
            _TOLD: facts,
            "path": _meant(scope),
            "query_string": _said(scope.get("query_string", b"")),
        }
        if is_head:
            inner["method"] = "GET"
        await self._app(inner, receive, send_told)


def _meant(scope: Scope) -> str:
    """
    Returns the path that is meant by the one which was asked for.
    """
    path: str = scope["path"]
    below = route_path(scope)
    if below == "/":
        return path
    joined = _JOINT.sub(lambda found: f"/{found[1] or ''}", below, count=1)
    return f"{path.removesuffix(below)}{joined}".removesuffix("/") or "/"


def _said(query: bytes) -> bytes:
    parts = query.split(b"&")
    return b"&".join(part for part in parts if part.partition(b"=")[2])
