"""
The errors that clients see: an HTTP status, and JSON in the shape of OpenAI's API.
"""

from __future__ import annotations

import errno
import logging
import math
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from whispercache.devices.faults import Fault, classify
from whispercache.errors import (
    AudioError,
    CacheClosed,
    DownloadTimeout,
    EvictionTimeout,
    LeaseTimeout,
    LoadFailed,
    ModelTooLarge,
    TooManyWaiters,
    WhisperCacheError,
    format_bytes,
)

from . import seen
from .decode import AudioTooLong, DecodeCrashed, DecoderClosed, DecodeTimeout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fastapi import APIRouter, FastAPI, Request
    from starlette.routing import BaseRoute

_log = logging.getLogger("whispercache")

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

# Seconds after which a refused client may try again; by then a queue has moved on.
RETRY_S = 5

# The fields that are files.
_FILES = ("file", "audio_file")

# Where OpenAI's clients look, below their base URL.
_PLACES = ("/audio/transcriptions", "/audio/translations", "/models")


class ErrorDetail(BaseModel):
    """
    A description of the error.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """
    The body of every answer that is no success.
    """

    error: ErrorDetail


class ApiError(Exception):
    """
    An answer that is no success, with its HTTP status, headers and body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        # As OpenAI calls them.
        is_ours = status >= HTTPStatus.INTERNAL_SERVER_ERROR
        kind = (
            "server_error" if is_ours else _TYPES.get(status, "invalid_request_error")
        )
        self.detail: ErrorDetail = ErrorDetail(
            message=message, type=kind, param=param, code=code
        )
        self.headers: dict[str, str] = dict(headers or {})

    def __reduce__(self) -> tuple[object, ...]:
        # The default would pass the message alone, by position.
        told = self.detail
        return _again, (self.status, told.message, told.code, told.param, self.headers)

    def response(self) -> JSONResponse:
        """
        Returns the answer itself.
        """
        seen.failed(self.detail.code)
        body = ErrorBody(error=self.detail).model_dump()
        return JSONResponse(body, self.status, self.headers)


def _again(
    status: int,
    message: str,
    code: str,
    param: str | None,
    headers: Mapping[str, str],
) -> ApiError:
    return ApiError(status, message, code=code, param=param, headers=headers)


def as_refusal(error: Exception) -> ApiError:
    """
    Returns the answer to a client for an error: never a path of this machine.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, WhisperCacheError):
        return _from_cache(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        _log.error("%s", error)
        message = "the server's disk is full; try again later"
        return refused_for_now(503, message, "disk_full")
    # CTranslate2 raises RuntimeError for everything; its text tells them apart.
    if classify(error) is not Fault.OTHER:
        _log.error("%s", error)
        message = "the device ran out of memory, or failed; the server's log tells more"
        return refused_for_now(503, message, "device_failed")
    # The only error that is logged with a traceback: it is a bug.
    _log.error("a request failed", exc_info=error)
    message = "something went wrong in the server; its log tells what"
    return ApiError(500, message, code=type(error).__name__)


def _from_cache(error: WhisperCacheError) -> ApiError:
    if isinstance(error, AudioTooLong):
        return ApiError(413, str(error), code="audio_too_long", param="file")
    if isinstance(error, (AudioError, DecodeTimeout, DecodeCrashed)):
        return ApiError(400, str(error), code="invalid_audio", param="file")
    if isinstance(error, TooManyWaiters):
        message = f"{error.waiting} requests wait already; try again later"
        return refused_for_now(429, message, "too_many_requests")
    return _unavailable(error)


def _unavailable(error: WhisperCacheError) -> ApiError:
    if isinstance(error, LeaseTimeout):
        waits = "could not be had within"
        if isinstance(error, DownloadTimeout):
            waits = "is still being downloaded after"
        elif isinstance(error, EvictionTimeout):
            waits = "is still at work after"
        message = f"the model {waits} {error.waited_s:.1f} s; try again later"
        return refused_for_now(503, message, "model_busy")
    if isinstance(error, (CacheClosed, DecoderClosed)):
        return shutting_down()
    if isinstance(error, ModelTooLarge):
        message = (
            f"the model needs {format_bytes(error.needed_bytes)} for this on "
            f"{error.device}, of which at most {format_bytes(error.capacity_bytes)} "
            f"can be had: {error.reason}"
        )
        return refused_for_now(503, message, "no_room")
    # Its message may name files of this machine: that is for the log.
    _log.error("%s", error)
    message = "the model cannot be had at present; the server's log tells why"
    # The cache knows when it will try to load again.
    retry_s = error.retry_in_s if isinstance(error, LoadFailed) else None
    return refused_for_now(503, message, "model_unavailable", retry_s or RETRY_S)


def shutting_down() -> ApiError:
    """
    Returns the refusal for clients that come too late.
    """
    message = "the server is shutting down"
    return refused_for_now(503, message, "shutting_down")


def nonsense(param: str, message: str) -> ApiError:
    """
    Returns a refusal of a parameter that makes no sense.
    """
    return ApiError(400, message, code="invalid_value", param=param)


def refused_for_now(
    status: int, message: str, code: str, retry_s: float = RETRY_S
) -> ApiError:
    """
    Returns a refusal that says after how many seconds to try again.
    """
    # Whole seconds are all that HTTP has, and 0 would be at once.
    headers = {"Retry-After": str(max(1, math.ceil(retry_s)))}
    return ApiError(status, message, code=code, headers=headers)


def install(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """
    Gives all errors of *app*, with the routes of *routers*, this shape.
    """
    routes = [route for router in routers for route in router.routes]
    # RuntimeError is CTranslate2's. What is not listed here is a bug, which `Following`
    # answers and raises again, and uvicorn ends the connection.
    told = (ApiError, WhisperCacheError, RuntimeError, MemoryError, OSError)
    for kind in told:
        app.add_exception_handler(kind, _failed)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(RequestValidationError, _misshapen)
    app.add_exception_handler(HTTPException, partial(_other, routes))


async def _failed(_request: Request, error: Exception) -> JSONResponse:
    return as_refusal(error).response()


async def _left(_request: Request, _error: Exception) -> Response:
    return Response(status_code=seen.CLIENT_LEFT)  # for the log alone


async def _misshapen(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    # OpenAI's shape has room for one.
    first = error.errors()[0]
    param = _field_of(first["loc"])
    text = "send the audio as a file of a multipart form"
    if param not in _FILES:
        # Python's word for it is no client's.
        is_switch = first["type"].startswith("bool_")
        text = "Input should be true or false" if is_switch else first["msg"]
    message = f"{param}: {text}"
    return nonsense(param, message).response()


async def _other(
    routes: Sequence[BaseRoute], request: Request, error: Exception
) -> JSONResponse:
    """
    Returns the answer to what Starlette and FastAPI refuse by themselves.
    """
    assert isinstance(error, HTTPException)
    cause = error.__cause__
    # While the form was read, or the upload was kept.
    if isinstance(cause, (ApiError, OSError)):
        return as_refusal(cause).response()
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    headers = dict(error.headers or {})
    if "Allow" in headers:  # of the first route of that path, where there are more
        headers["Allow"] = _methods(routes, request)
    message = str(error.detail)
    if error.status_code == HTTPStatus.NOT_FOUND:
        message += _hint(request.url.path)
    refusal = ApiError(
        error.status_code,
        message,
        code=code or "invalid_request",
        headers=headers,
    )
    return refusal.response()


def _hint(path: str) -> str:
    """
    Returns where the API is, for clients that were given a wrong address of it.
    """
    for place in _PLACES:
        if path.endswith(place):
            # A base URL ends in /v1, or its client adds that.
            return f"; it is /v1{place}: mind the /v1 in the base URL of your client"
    return ""


def _field_of(place: Sequence[str | int]) -> str:
    """
    Returns the field of a place in a request; of an item of a list, that of the list.
    """
    within = place[1:] or place  # after "body", "query" or "path"
    # A number is the place in a list.
    named = next((part for part in within if isinstance(part, str)), place[0])
    return str(named).partition("[")[0]


def _methods(routes: Sequence[BaseRoute], request: Request) -> str:
    methods: set[str] = set()
    for route in routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= getattr(route, "methods", None) or set()
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(sorted(methods))


def responses(*statuses: int) -> dict[int | str, dict[str, object]]:
    """
    Returns the errors of a route, for its schema.
    """
    told = {
        400: "The request makes no sense, or the audio cannot be decoded.",
        401: "No key, or a wrong one.",
        403: "The request comes from a page of another site.",
        404: "No such model is served.",
        408: "The request did not arrive in time.",
        413: "The upload is too large, or the audio too long.",
        429: "Too many requests wait already. `Retry-After` says when to try again.",
        503: "The model cannot be had now. `Retry-After` says when to try again.",
    }
    return {
        status: {"model": ErrorBody, "description": told[status]} for status in statuses
    }
