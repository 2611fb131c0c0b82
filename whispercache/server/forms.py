"""
Forms: an upload and a handful of short fields. What is no file is kept in memory while
a request waits, so there must not be much of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi.routing import APIRoute
from starlette.requests import Request

from whispercache.units import parse_duration

from .errors import nonsense

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette._utils import AwaitableOrContextManager
    from starlette.datastructures import FormData
    from starlette.responses import Response

__all__ = ["SmallForm", "check_keep_alive"]

_FILES = 1
_FIELDS = 50
_FIELD_BYTES = 64 * 1024


class SmallForm(APIRoute):
    """
    A route whose forms hold one file, and little else.
    """

    def get_route_handler(
        self,
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """
        The route's handler, given requests with limits.
        """
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return handler


class _Request(Request):
    def form(self, **_limits: object) -> AwaitableOrContextManager[FormData]:
        """
        The form, as far as it is within the limits.
        """
        return super().form(
            max_files=_FILES, max_fields=_FIELDS, max_part_size=_FIELD_BYTES
        )


def check_keep_alive(text: str) -> None:
    """
    See whether *text* is a time in Ollama's words.

    Raises:
        ApiError: it is none.
    """
    try:
        parse_duration(text, "keep_alive")
    except ValueError as error:
        raise nonsense("keep_alive", str(error)) from None
