"""
Manage: models as resources, what is in memory, health, metrics, and the page.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from whispercache.version import __version__

from .errors import responses
from .forms import check_keep_alive
from .presence import while_present
from .service import Served, Service

if TYPE_CHECKING:
    from fastapi import FastAPI

    from .offers import Offer

__all__ = ["add_page", "health", "router"]

router: APIRouter = APIRouter(tags=["models"])
health: APIRouter = APIRouter(tags=["health"])

_PAGE = Path(__file__).with_name("page")
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
    What was done to a model.
    """

    model: str
    status: Literal["loaded", "pinned", "unpinned", "evicted", "absent"]


class Health(BaseModel):
    """
    Whether the server is alive, or ready.

    Attributes:
        status: In one word; ``"closing"`` once no more work is taken.
        pending: Models that are still to be loaded, and why they are not yet.
    """

    status: Literal["alive", "ready", "loading", "closing"]
    pending: dict[str, str] = {}


@router.get("/v1/models", responses=responses(401))
async def list_models(service: Served) -> Models:
    """
    The models that are served, in memory or not.
    """
    return Models(data=[Model(id=offer.name) for offer in service.offers])


@router.get("/v1/models/{model:path}", responses=responses(401, 404))
async def show_model(service: Served, model: str) -> Model:
    """
    One model that is served.
    """
    service.offer(model)
    return Model(id=model)


@router.get("/api/ps", responses=responses(401))
async def show_processes(service: Served) -> dict[str, object]:
    """
    What is in memory, where, with how many bytes and leases, idle for how long; who
    waits; and what happened last.
    """
    return {
        "version": __version__,
        "requires_key": bool(service.options.keys),
        **service.snapshot().as_json(),
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
    Load a model, and wait until it is in memory.
    """
    offer = service.offer(name)
    await while_present(request, _load(service, offer, keep_alive))
    return Done(model=name, status="loaded")


async def _load(service: Service, offer: Offer, keep_alive: str | None) -> None:
    if keep_alive is not None:
        check_keep_alive(keep_alive)
    (await service.lease(offer, service.options.timeout_s, keep_alive)).release()


@router.post("/api/models/{name:path}/pin", responses=_ASKED)
async def pin(request: Request, service: Served, name: str) -> Done:
    """
    Load a model, and keep it, idle or not.
    """
    offer = service.offer(name)
    await while_present(request, _pin(service, offer))
    return Done(model=name, status="pinned")


async def _pin(service: Service, offer: Offer) -> None:
    lease = await service.lease(offer, service.options.timeout_s)
    with lease:
        lease.pin()


@router.delete("/api/models/{name:path}/pin", responses=_ASKED)
async def unpin(service: Served, name: str) -> Done:
    """
    Let a model leave again when it is idle.
    """
    key = service.offer(name).key()
    if key is None or not service.cache.unpin(key.model, key.device, key.compute_type):
        return Done(model=name, status="absent")
    return Done(model=name, status="unpinned")


@router.delete("/api/models/{name:path}", responses=_ASKED)
async def evict(request: Request, service: Served, name: str) -> Done:
    """
    Unload a model, pinned or not, and wait until its memory is back. One that works
    leaves when it is idle.
    """
    key = service.offer(name).key()
    if key is None:
        return Done(model=name, status="absent")
    leaving = service.cache.evict(
        key.model,
        key.device,
        key.compute_type,
        timeout_s=service.options.timeout_s,
    )
    left = await while_present(request, leaving)
    return Done(model=name, status="evicted" if left else "absent")


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
    Counters, gauges and histograms, as Prometheus reads them.
    """
    try:
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
    except (TypeError, ValueError):  # a version in it that is no number
        encode, media_type = choose_encoder("")
    text = await run_in_threadpool(encode, service.registry)
    return Response(text, media_type=media_type)


@health.head("/healthz", include_in_schema=False)
@health.get("/healthz")
async def healthz() -> Health:
    """
    Whether the server is alive.
    """
    return Health(status="alive")


@health.head("/readyz", include_in_schema=False)
@health.get("/readyz", responses={503: {"model": Health}})
async def readyz(service: Served) -> Response:
    """
    Whether work is taken, and all models have been up that were to be loaded at the
    start. Those that are not pinned may have left since; they come back when asked for.
    """
    state = Health(status=service.state, pending=service.pending)
    return JSONResponse(state.model_dump(), 200 if state.status == "ready" else 503)


def add_page(app: FastAPI) -> None:
    """
    Serve the page at ``/``.
    """

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=_PAGE, html=False))
