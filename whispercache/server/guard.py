"""
The guard, which decides on a request before its body is read.
"""

from __future__ import annotations

import hmac
import re
from hashlib import sha256
from types import MappingProxyType
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders

from . import seen
from .errors import ApiError
from .origins import ANY_ORIGIN, option_for, option_for_host, pattern_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Paths that need no key: the page itself, which asks for one, the description of the
# API, which is the same everywhere, and those of probes.
OPEN_PATHS = ("/", "/docs", "/openapi.json", "/health", "/healthz", "/readyz")
_OPEN_FOLDER = "/page/"
_HARMLESS = ("GET", "HEAD", "OPTIONS")
_LONGEST_SHOWN = 100

_HEADERS = {
    # Transcripts must not remain in a browser's cache.
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        "img-src 'self' data:; media-src blob:; connect-src 'self'; "
        "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """
    ASGI middleware that passes permitted requests alone.

    Three things are asked of a request: a host name that is ours, so that no page can
    rebind its own name to this machine; that no page of another site sent it, but of
    *origins*; and a bearer key. Where there are no *keys* or no *hosts*, any will do.
    *names* are those of keys.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str] = (),
        hosts: Sequence[str] = (),
        origins: Sequence[str] = (),
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._app = app
        # Digests are of one length, so that comparing takes the same time for all.
        self._digests = [sha256(key.encode()).digest() for key in keys]
        self._names = [names.get(key, "") for key in keys]
        # Browsers send them in any case.
        self._hosts = {host.lower() for host in hosts}
        self._is_open = ANY_ORIGIN in origins
        self._origins = re.compile(pattern_of(origins))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Answers a request, or passes it on.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    # A route may have set its own.
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        who = self._who(headers)
        refusal = self._refusal(scope, headers, has_key=who is not None)
        if refusal is None:
            seen.admit(who or None)
        app = self._app if refusal is None else refusal.response()
        await app(scope, receive, send_guarded)

    def _refusal(
        self, scope: Scope, headers: Headers, *, has_key: bool
    ) -> ApiError | None:
        host = _parts(f"//{headers.get('host', '')}").hostname
        # A page that rebinds its own name to this address sends that name.
        if self._hosts and host not in self._hosts:
            told = (host or "")[:_LONGEST_SHOWN]
            message = (
                f"this server does not go by the name {told!r}; if it should, start it "
                f"with {option_for_host(told)}"
            )
            return ApiError(403, message, code="unknown_host")
        # The harmless ones are the browser's to guard, which shows their answers to no
        # other page.
        if scope["method"] not in _HARMLESS and self._is_foreign(headers):
            return ApiError(403, _cross_site(headers), code="cross_site")
        path = route_path(scope)
        is_open = path in OPEN_PATHS or path.startswith(_OPEN_FOLDER)
        if is_open or not self._digests or has_key:
            return None
        return ApiError(
            401,
            "give one of this server's keys: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _is_foreign(self, headers: Headers) -> bool:
        """
        True for a request of another site's page. Other programs send neither header.
        """
        origin = headers.get("origin")
        if self._is_open:
            return False
        if origin and self._origins.fullmatch(origin):
            return False
        # The browser's own judgement, which a page cannot forge.
        if (site := headers.get("sec-fetch-site")) is not None:
            return site not in ("same-origin", "none")
        # Older browsers send the origin alone.
        return origin is not None and _parts(origin).netloc != headers.get("host")

    def _who(self, headers: Headers) -> str | None:
        """
        Returns the name of the key that is given, empty if it has none; None if it is
        not one of the keys.
        """
        # An empty key matches none, since there are no empty ones.
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = sha256(key.strip().encode("latin-1")).digest()  # the bytes as sent
        # All are compared, whichever it is.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            return None
        return self._names[matches.index(True)]


def _cross_site(headers: Headers) -> str:
    origin = headers.get("origin", "")[:_LONGEST_SHOWN]
    whose = f"those of {origin} may" if origin else "one may"
    option = option_for(origin) if origin else "--allow-origin"
    return (
        f"pages of other sites may not do this; if {whose}, start the server with "
        f"{option}"
    )


def route_path(scope: Scope) -> str:
    """
    Returns the path below the one where the server is mounted.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    # Frameworks differ in whether the path has the mount's own in it.
    if root and (path == root or path.startswith(f"{root}/")):
        return path[len(root) :] or "/"
    return path


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
