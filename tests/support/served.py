"""
Servers for tests: the real one, under the real uvicorn, on a free port of this machine.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
from real import packaged

from whispercache.engine.naming import ModelSpec
from whispercache.server import ServerOptions, create_app
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

    from whispercache import ModelCache

__all__ = ["TINY", "offered", "running", "serving"]

TINY = "tiny.en"


def offered(*names: str) -> tuple[ModelSpec, ...]:
    """
    Packaged models, such as ``"base"`` or ``"base:int8"``, to be served.
    """
    specs = []
    for name in names:
        size, _, kind = name.partition(":")
        specs.append(ModelSpec(name, str(packaged(size)), kind or "default"))
    return tuple(specs)


@contextmanager
def serving(cache: ModelCache, *names: str, **options: Any) -> Iterator[httpx.Client]:
    """
    A server of packaged models on the CPU, and a client of it.
    """
    options.setdefault("models", offered(*(names or (TINY,))))
    options.setdefault("device", "cpu")
    app = create_app(ServerOptions(**options), cache)
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """
    The address of *app*, while it runs on a thread of its own.
    """
    config = uvicorn.Config(app, port=0, log_level="warning", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), "the server")
        assert server.started, "the server did not start"
        (listener,) = server.servers[0].sockets
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not end"
