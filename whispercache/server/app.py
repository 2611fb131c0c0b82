"""
The server as one ASGI application.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware

from whispercache.cache import ModelCache

from . import audio, errors, manage, others, requests
from .answers import MODEL, REQUEST_ID, WARNING, Answers
from .docs import add_docs
from .drain import Unfinished
from .following import Following
from .guard import Guard
from .limits import UploadLimit
from .local import LocalEngine
from .offers import offers_of
from .origins import ANY_ORIGIN, pattern_of
from .service import Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from .options import ServerOptions


def create_app(options: ServerOptions, cache: ModelCache | None = None) -> FastAPI:
    """
    Returns the server for uvicorn, or any other ASGI server, in one process: the models
    are in its memory.

    It may be mounted in another application. That does not tell it when it starts and
    ends: it then starts with its first request, and ends with the event loop. To have
    it start at once, and end in order, let the other application's lifespan enter
    ``server.router.lifespan_context(server)``.

    Args:
        options: The models that it offers, and their terms.
        cache: The cache of the models; it stays open. If None, a cache with default
            limits, which is closed when the server ends. A ``parallel`` of its own is
            for others: the server's requests have that of *options*.

    Raises:
        WhisperCacheError: a model on the list does not exist, or its device does not.
    """
    offers = offers_of(options)
    # Names and devices are checked here, so that a wrong option ends the command and
    # not the first request.
    engine = LocalEngine(
        offers,
        cache or ModelCache(),
        options.parallel,
        options.audio_in_memory_s,
    )
    # A cache of the caller's own stays open; others may use it.
    closing = engine.cache if cache is None else nullcontext()
    return application(Service(options, offers, engine), closing)


def application(
    service: Service, closing: AbstractAsyncContextManager[object]
) -> FastAPI:
    """
    Returns the routes over a service, whatever its engine; *closing* is entered while
    it runs.
    """
    options = service.options

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with closing, service.running():
            yield

    app = FastAPI(
        title="whispercache",
        summary="faster-whisper models, in the memory there is.",
        # Of the API: strangers may read this, and need not know what answers them.
        version="1",
        lifespan=lifespan,
        # These pages load their scripts from another site; ours does not.
        docs_url=None,
        redoc_url=None,
        # A slash at the end is dropped: a client that is sent elsewhere would upload
        # all of it once more, if at all.
        redirect_slashes=False,
    )
    app.state.service = service
    app.state.seen = service.seen
    routers = (audio.router, others.router, manage.router, requests.router)
    errors.install(app, (*routers, manage.health))
    # `Guard` asks for the key; this is for the schema.
    key = [Depends(HTTPBearer(auto_error=False))] if options.keys else []
    app.include_router(audio.router, dependencies=key)
    app.include_router(others.router, dependencies=key)
    app.include_router(manage.router, dependencies=key)
    app.include_router(requests.router, dependencies=key)
    # Probes have no key.
    app.include_router(manage.health)
    manage.add_page(app)
    add_docs(app, service)
    _add_middleware(app, service)
    return app


def _add_middleware(app: FastAPI, service: Service) -> None:
    options = service.options
    # The last one added sees a request first.
    app.add_middleware(
        UploadLimit,
        max_bytes=options.max_upload_bytes,
        timeout_s=options.upload_timeout_s,
        max_at_once=lambda: service.most,
        arrivals=service.arrivals,
    )
    app.add_middleware(
        Guard,
        keys=options.keys,
        hosts=options.hosts,
        origins=options.origins,
        names=options.key_names,
        levels=options.levels(),
    )
    # Outside the guard: whatever is cancelled gets an answer.
    app.add_middleware(Unfinished)
    if options.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[ANY_ORIGIN] if ANY_ORIGIN in options.origins else [],
            # Sites with any port are patterns.
            allow_origin_regex=pattern_of(options.origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", REQUEST_ID, MODEL, WARNING],
        )
    app.add_middleware(Following, seen=app.state.seen)
    # Outside all of it: whatever the answer is, it has an id.
    app.add_middleware(Answers)
