"""
Servers for tests: the real one, under the real uvicorn, on a free port of this machine.
"""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
from real import clip, micro, packaged

from whispercache.engine.naming import ModelSpec
from whispercache.server import ServerOptions, create_app
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

    from whispercache import ModelCache

__all__ = [
    "TINY",
    "A",
    "B",
    "asking",
    "error_of",
    "micros",
    "offered",
    "options_of",
    "request_of",
    "running",
    "serving",
    "transcribe",
]

TINY = "tiny.en"
A, B = "micro-a", "micro-b"


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


def micros() -> tuple[ModelSpec, ...]:
    """
    Two models that take a few milliseconds.
    """
    return tuple(ModelSpec(name, str(micro(name.replace("-", " ")))) for name in (A, B))


def options_of(**options: Any) -> ServerOptions:
    """
    A server of one micro model, "m".
    """
    options.setdefault("models", (ModelSpec("m", str(micro("micro says hello"))),))
    return ServerOptions(device="cpu", decoders=1, **options)


def transcribe(client: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    """
    What a server hears in a short clip.
    """
    with Path(clip("en-bread")).open("rb") as file:
        return client.post(
            "/v1/audio/transcriptions",
            data={"model": model, **fields},
            files={"file": ("a.flac", file)},
        )


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """
    The error in an answer.
    """
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def request_of(model: str, length: int | None, clip_name: str) -> bytes:
    """
    The same request as bytes; one that stops in the middle of *length* if given.
    """
    with Path(clip(clip_name)).open("rb") as file:
        audio = file.read()
    fields = {"model": model}
    url = "http://127.0.0.1/v1/audio/transcriptions"
    request = httpx.Request("POST", url, data=fields, files={"file": ("a", audio)})
    body = request.read()
    headers = {**request.headers, "content-length": str(length or len(body))}
    lines = [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join(["POST /v1/audio/transcriptions HTTP/1.1", *lines])
    return f"{head}\r\n\r\n".encode() + body


@contextmanager
def asking(
    client: httpx.Client,
    model: str,
    length: int | None = None,
    clip_name: str = "en-bread",
) -> Iterator[socket.socket]:
    """
    Somebody who asks for *model*, and hangs up at the end.
    """
    address = (client.base_url.host, client.base_url.port or 80)
    with socket.create_connection(address, timeout=30) as asked:
        asked.sendall(request_of(model, length, clip_name))
        yield asked
