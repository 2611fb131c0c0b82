"""
Routes for models as resources, the state of memory, health, metrics, and the page.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from whispercache.engine.calls.languages import LANGUAGES
from whispercache.version import __version__

from . import seen
from .calls import while_present
from .engine import Terms
from .errors import responses
from .forms import check_keep_alive, level_of
from .service import Served, Service

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fastapi import FastAPI
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from .offers import Offer

router: APIRouter = APIRouter(tags=["models"])
health: APIRouter = APIRouter(tags=["health"])

_PAGE = Path(__file__).with_name("page")
# OpenAI's models have a date; these were made when the server started.
_STARTED_AT_S = int(time.time())

_ASKED = responses(400, 401, 403, 404, 503)


class Model(BaseModel):
    """
    A model that is served.
    """

    id: str
    object: Literal["model"] = "model"
    created: int = _STARTED_AT_S
    owned_by: str = "whispercache"


class Models(BaseModel):
    """
    All models that are served.
    """

    object: Literal["list"] = "list"
    data: list[Model]


class Done(BaseModel):
    """
    The outcome of a change of a model.
    """

    model: str
    status: Literal["loaded", "pinned", "unpinned", "evicted", "absent"]


class Health(BaseModel):
    """
    The health of the server: ``"closing"`` once no more work is taken. *pending* are
    the models that are still to be loaded, and why they are not yet.
    """

    status: Literal["alive", "ready", "loading", "closing"]
    pending: dict[str, str] = {}


@router.get("/v1/models", responses=responses(401))
async def list_models(service: Served) -> Models:
    """
    Returns the models that are served, in memory or not.
    """
    return Models(data=[Model(id=offer.name) for offer in service.offers])


@router.get("/v1/models/{model:path}", responses=responses(401, 404))
async def show_model(service: Served, model: str) -> Model:
    """
    Returns one model that is served.
    """
    # Raises the 404.
    service.offer(model)
    return Model(id=model)


@router.get("/api/languages", responses=responses(401))
async def list_languages() -> dict[str, str]:
    """
    Returns the languages that Whisper knows: their English names by code.
    """
    return dict(LANGUAGES)


@router.get("/api/ps", responses=responses(401))
async def show_processes(service: Served) -> dict[str, object]:
    """
    Returns the models in memory with their devices, bytes and leases, the requests that
    wait, and the last events.
    """
    return {
        "version": __version__,
        "requires_key": bool(service.options.keys),
        **(await service.engine.snapshot()).as_json(),
    }


KeepAlive = Annotated[
    str | None,
    Query(description='How long it stays when idle: seconds, "5m", 0 or -1.'),
]


@router.post("/api/models/{name:path}/load", responses=_ASKED)
async def load(
    request: Request, service: Served, name: str, keep_alive: KeepAlive = None
) -> Done:
    """
    Loads a model, and waits until it is in memory.
    """
    offer = service.offer(name)
    level = level_of(request)
    await while_present(request, _load(service, offer, keep_alive, level))
    return Done(model=name, status="loaded")


async def _load(
    service: Service, offer: Offer, keep_alive: str | None, level: float
) -> None:
    # Nonsense is told before a load.
    if keep_alive is not None:
        check_keep_alive(keep_alive)
    terms = Terms(service.options.timeout_s, keep_alive, priority=level)
    await service.engine.load(offer, terms, seen.teller())


@router.post("/api/models/{name:path}/pin", responses=_ASKED)
async def pin(request: Request, service: Served, name: str) -> Done:
    """
    Loads a model, and keeps it in memory, idle or not.
    """
    offer = service.offer(name)
    terms = Terms(service.options.timeout_s, priority=level_of(request))
    pinning = service.engine.pin(offer, terms, seen.teller())
    await while_present(request, pinning)
    return Done(model=name, status="pinned")


@router.delete("/api/models/{name:path}/pin", responses=_ASKED)
async def unpin(service: Served, name: str) -> Done:
    """
    Ends a pin: the model may be evicted again when it is idle.
    """
    was_there = await service.engine.unpin(service.offer(name))
    return Done(model=name, status="unpinned" if was_there else "absent")


@router.delete("/api/models/{name:path}", responses=_ASKED)
async def evict(request: Request, service: Served, name: str) -> Done:
    """
    Unloads a model, pinned or not, and waits until its memory is free. A model at work
    is unloaded when it is idle.
    """
    eviction = service.engine.evict(service.offer(name), service.options.timeout_s)
    seen.enter("waiting")
    was_there = await while_present(request, eviction)
    return Done(model=name, status="evicted" if was_there else "absent")


class _Figures:
    """
    The server's own figures and its engine's, as an encoder reads a registry.
    """

    def __init__(self, own: CollectorRegistry, further: Sequence[Metric]) -> None:
        self._own, self._further = own, further

    def collect(self) -> Iterator[Metric]:
        yield from self._own.collect()
        yield from self._further


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {}}, "description": "For Prometheus."},
        **responses(401),
    },
)
async def metrics(request: Request, service: Served) -> Response:
    """
    Returns counters, gauges and histograms, as Prometheus reads them.
    """
    try:
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
    except (TypeError, ValueError):  # a version in it that is no number
        # The plain format, which all versions read.
        encode, media_type = choose_encoder("")
    seen = _Figures(service.registry, await service.engine.metrics())
    text = await run_in_threadpool(encode, cast("CollectorRegistry", seen))
    return Response(text, media_type=media_type)


@health.get("/health")
async def plain_health() -> dict[str, str]:
    """
    Answers as whisper.cpp's server does.
    """
    return {"status": "ok"}


@health.get("/healthz")
async def healthz() -> Health:
    """
    Answers as long as the server is alive.
    """
    return Health(status="alive")


@health.get("/readyz", responses={503: {"model": Health}})
async def readyz(service: Served) -> Response:
    """
    Tells if work is taken, and if all models were loaded that were to be at the start.
    Those that are not pinned may have been evicted since; a request reloads them.
    """
    # No body model of FastAPI's, since the status goes with it.
    state = Health(status=service.state, pending=service.pending)
    return JSONResponse(state.model_dump(), 200 if state.status == "ready" else 503)


def add_page(app: FastAPI) -> None:
    """
    Serves the page at ``/``.
    """

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=_PAGE, html=False))
