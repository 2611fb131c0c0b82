"""
OpenTelemetry's traces of requests, where its API package is installed and a program, or
``opentelemetry-instrument``, has set it up.

The span of the request is that of whoever has begun one, as newer FastAPIs do, or one
of our own. Its children are the phases of the request.

Source: OpenTelemetry's semantic conventions for HTTP server spans, and for generative
AI's ``gen_ai.request.model``.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers

from whispercache.version import __version__

if TYPE_CHECKING:
    from starlette.types import Scope
    from typing_extensions import Self

    from .seen import SeenRequest

try:
    from opentelemetry import propagate, trace
except ModuleNotFoundError:
    # Older FastAPIs do not bring it.
    _has_api = False
else:
    _has_api = True

_NS = 10**9
_FAILED = 500


def trace_ids() -> dict[str, str]:
    """
    Returns the ids of the trace and the span that are current; nothing without one.
    """
    if not _has_api:
        return {}
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {
        "trace_id": trace.format_trace_id(context.trace_id),
        "span_id": trace.format_span_id(context.span_id),
    }


class Trace:
    """
    The trace of a request, in a ``with`` block.
    """

    def __init__(self, request: SeenRequest, scope: Scope) -> None:
        self._request = request
        self._scope = scope
        self._span: Any = None
        self._is_own = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if not _is_set_up():
            return self
        self._span = trace.get_current_span()
        if not self._span.get_span_context().is_valid:
            self._begin()
        elif self._scope.get("query_string"):
            # That of a framework has it, and there may be texts in it.
            self._span.set_attribute("url.query", "REDACTED")
        return self

    def _begin(self) -> None:
        headers = dict(Headers(scope=self._scope))
        self._span = _tracer().start_span(
            self._scope["method"],
            context=propagate.extract(headers),
            kind=trace.SpanKind.SERVER,
            attributes=_of_http(self._scope, headers),
        )
        self._is_own = True
        used = trace.use_span(
            self._span,
            end_on_exit=True,
            record_exception=False,
            set_status_on_exception=False,
        )
        self._stack.enter_context(used)

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def finish(self) -> None:
        """
        Tells what became of the request, and how long each of its phases was.
        """
        if self._span is None or not self._span.is_recording():
            return
        request = self._request
        told = {
            "whispercache.request.id": request.id,
            "whispercache.audio.duration": request.audio_s,
            "whispercache.outcome": request.outcome,
            "whispercache.error.code": request.error,
            "whispercache.priority": request.priority,
            "gen_ai.request.model": request.model,
            "enduser.id": request.who,
        }
        self._set(told)
        if self._is_own:
            self._finish_own()
        # Those that only look have none worth telling.
        if request.model is not None:
            self._tell_phases()

    def _finish_own(self) -> None:
        request = self._request
        self._set(
            {
                "http.route": request.route,
                "http.response.status_code": request.status,
            }
        )
        if request.route:
            self._span.update_name(f"{request.method} {request.route}")
        if (request.status or 0) >= _FAILED:
            self._span.set_attribute("error.type", request.error or str(request.status))
            self._span.set_status(trace.StatusCode.ERROR)

    def _set(self, attributes: dict[str, Any]) -> None:
        given = {name: each for name, each in attributes.items() if each is not None}
        self._span.set_attributes(given)

    def _tell_phases(self) -> None:
        context = trace.set_span_in_context(self._span)
        spells = self._request.spells()
        # The clock of spells begins anywhere; that of traces in 1970.
        start_s = self._request.at_s - spells[0].began_s
        for spell in spells:
            child = _tracer().start_span(
                spell.phase, context, start_time=round((start_s + spell.began_s) * _NS)
            )
            child.end(round((start_s + spell.ended_s) * _NS))


def _is_set_up() -> bool:
    # The API's stand-in would do all that follows, for nothing.
    return _has_api and not isinstance(
        trace.get_tracer_provider(), trace.ProxyTracerProvider
    )


def _tracer() -> trace.Tracer:
    return trace.get_tracer("whispercache", __version__)


def _of_http(scope: Scope, headers: dict[str, str]) -> dict[str, Any]:
    client, server = scope.get("client"), scope.get("server")
    found = {
        "http.request.method": scope["method"],
        "url.path": scope["path"],
        "url.scheme": scope.get("scheme"),
        "network.protocol.version": scope.get("http_version"),
        "user_agent.original": headers.get("user-agent"),
        "client.address": client and client[0],
        "server.address": server and server[0],
        "server.port": server and server[1],
    }
    return {name: each for name, each in found.items() if each is not None}
