"""
Servers for tests: the real one, under the real uvicorn, on a free port of this machine.
"""

from __future__ import annotations

import fcntl
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn
from real import child_environment, clip, micro, packaged
from starlette.testclient import TestClient

from whispercache.engine.naming import ModelSpec
from whispercache.server import ServerOptions, create_app
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

    from whispercache import ModelCache

__all__ = [
    "BOUNDARY",
    "CLIP",
    "TINY",
    "URL",
    "A",
    "B",
    "asking",
    "client_of_micro",
    "client_of_real",
    "command",
    "error_of",
    "is_ready",
    "micros",
    "multipart",
    "offered",
    "options_of",
    "request_of",
    "running",
    "serving",
    "transcribe",
    "waiting",
]

TINY = "tiny.en"
A, B = "micro-a", "micro-b"
URL = "/v1/audio/transcriptions"
CLIP = Path(clip("en-bread"))


# What nobody sends by chance: it parts the parts of a form.
BOUNDARY = "------------------------d74496d66958873e"


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
    # As the command has it, whatever else is installed.
    config = uvicorn.Config(app, port=0, log_level="warning", lifespan="on", http="h11")
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


def client_of_micro() -> object:
    """
    The fixture of a client of one micro model, without a socket between.
    """

    @pytest.fixture(scope="module")
    def client(cache: ModelCache) -> Iterator[TestClient]:
        """
        A client of the model "m", without a socket between.
        """
        with TestClient(create_app(options_of(), cache)) as made:
            yield made

    return client


def client_of_real() -> object:
    """
    The fixture of a client of tiny.en and base.
    """

    @pytest.fixture(scope="module")
    def http(cache: ModelCache) -> Iterator[httpx.Client]:
        """
        A client of a server of tiny.en and base.
        """
        with serving(cache, TINY, "base:int8") as client:
            yield client

    return http


def transcribe(client: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    """
    What a server hears in a short clip.
    """
    with CLIP.open("rb") as file:
        return client.post(
            URL,
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


def request_of(
    model: str, length: int | None, clip_name: str, key: str | None = None
) -> bytes:
    """
    The same request as bytes; one that stops in the middle of *length* if given.
    """
    with Path(clip(clip_name)).open("rb") as file:
        audio = file.read()
    fields = {"model": model}
    url = f"http://127.0.0.1{URL}"
    request = httpx.Request("POST", url, data=fields, files={"file": ("a", audio)})
    body = request.read()
    headers = {**request.headers, "content-length": str(length or len(body))}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    lines = [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join([f"POST {URL} HTTP/1.1", *lines])
    return f"{head}\r\n\r\n".encode() + body


@contextmanager
def asking(
    client: httpx.Client,
    model: str,
    length: int | None = None,
    clip_name: str = "en-bread",
    key: str | None = None,
) -> Iterator[socket.socket]:
    """
    Somebody who asks for *model*, and hangs up at the end.
    """
    address = (client.base_url.host, client.base_url.port or 80)
    with socket.create_connection(address, timeout=30) as asked:
        asked.sendall(request_of(model, length, clip_name, key))
        yield asked


def waiting(client: httpx.Client) -> int:
    """
    How many requests a server says that wait.
    """
    return len(client.get("/api/ps").json()["waiting"])


@contextmanager
def command(
    *arguments: str, program: str = "", **environment: str
) -> Iterator[tuple[Any, httpx.Client]]:
    """
    ``whispercache serve`` as a process, and a client of it.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = [program] if program else ["-m", "whispercache"]
    line = [*start, "serve", *arguments, "--port", str(port)]
    with (
        subprocess.Popen(
            [sys.executable, *line],
            env=child_environment(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        for pipe in filter(None, (process.stdout, process.stderr)):
            # Nobody reads its log meanwhile, and a full pipe would stop the server.
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 2**20)
        try:
            wait_until(lambda: process.poll() is not None or is_ready(client), "server")
            yield process, client
        finally:
            process.kill()


def is_ready(client: httpx.Client) -> bool:
    """
    Whether a server is there and ready.
    """
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def multipart(*parts: tuple[str, str, bytes]) -> dict[str, Any]:
    """
    A form of parts: the parameters of each one's Content-Disposition, more headers, and
    what is in it. Clients differ in just these.
    """
    start = f"--{BOUNDARY}\r\nContent-Disposition: form-data; "
    body = b"".join(
        f"{start}{named}\r\n{more}\r\n".encode() + content + b"\r\n"
        for named, more, content in parts
    )
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    return {
        "content": body + f"--{BOUNDARY}--\r\n".encode(),
        "headers": {"content-type": kind},
    }
