"""
The server as a part of another application, and waits for downloads.
"""

from __future__ import annotations

import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from caches import cache_of
from fastapi import FastAPI
from real import micro
from served import CLIP, URL, client_of_micro, multipart, options_of
from starlette.testclient import TestClient

from whispercache.engine.loader import FasterWhisperLoader
from whispercache.server import create_app

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from whispercache import ModelCache

pytestmark = pytest.mark.process

cache = cache_of("module", ram="2GiB", variants=False)
client = client_of_micro()


def mounted(path: str, app: FastAPI) -> FastAPI:
    """
    An application that has another one below a path.
    """
    outer = FastAPI()
    outer.mount(path, app)
    return outer


def test_it_works_where_it_is_mounted(cache: ModelCache) -> None:
    """
    Though nobody tells a mounted application that it starts; each word of it.
    """
    app = create_app(options_of(preload=("m",)), cache)
    with TestClient(mounted("/speech", app)) as client:
        seen = client.get("/speech/api/ps")
        assert seen.status_code == 200, seen.text
        assert seen.json()["requires_key"] is False
        client.base_url = client.base_url.join("/speech/")
        answer = ask_below(client)
        assert answer.json()["text"] == "micro says hello"
        assert client.get("healthz").json()["status"] == "alive"
        assert client.get("readyz").json()["status"] == "ready"
        assert client.get("v1/models").json()["data"][0]["id"] == "m"
        assert client.post("api/models/m/pin").json()["status"] == "pinned"
        assert client.delete("api/models/m").json()["status"] == "evicted"
        assert "whispercache_loads_total" in client.get("metrics").text
        assert client.get("openapi.json").status_code == 200
        page = client.get("").text
        for address in ("page/app.js", "page/style.css"):
            assert f'"{address}"' in page
            assert client.get(address).status_code == 200
        events = client.get("api/ps").json()["events"]
        assert events


def ask_below(client: TestClient) -> Any:
    """
    A transcription, wherever the server is.
    """
    audio = ('name="file"; filename="a.flac"', "", CLIP.read_bytes())
    return client.post(URL[1:], **multipart(('name="model"', "", b"m"), audio))


@pytest.mark.parametrize("path", ["/speech", "/page", "/a/page/b"])
def test_a_mounted_server_asks_for_its_keys(cache: ModelCache, path: str) -> None:
    """
    But for the page itself and the probes; what the place is called opens nothing.
    """
    app = create_app(options_of(keys=("secret",)), cache)
    with TestClient(mounted(path, app)) as client:
        for word in ("/", "/healthz", "/readyz", "/page/app.js"):
            assert client.get(path + word).status_code in (200, 503), word
        for word in ("/api/ps", "/v1/models", "/metrics"):
            assert client.get(path + word).status_code == 401, word
            key = {"authorization": "Bearer secret"}
            assert client.get(path + word, headers=key).status_code == 200, word


def test_behind_a_proxy_that_cuts_the_path(cache: ModelCache) -> None:
    """
    With a root path, as ``uvicorn --root-path`` sets it.
    """
    app = create_app(options_of(keys=("secret",)), cache)
    with TestClient(app, root_path="/page") as client:
        assert client.get("/page/healthz").status_code == 200
        assert client.get("/page/api/ps").status_code == 401
        assert client.get("/page/page/app.js").status_code == 200


def test_the_outer_application_may_start_it_in_order(cache: ModelCache) -> None:
    """
    As documented: its models load before the first request, and all ends with it.
    """
    app = create_app(options_of(preload=("m",)), cache)

    @asynccontextmanager
    async def lifespan(_outer: FastAPI) -> AsyncIterator[None]:
        async with app.router.lifespan_context(app):
            yield

    outer = FastAPI(lifespan=lifespan)
    outer.mount("/speech", app)
    service = app.state.service
    with TestClient(outer) as client:
        assert service._loop is not None
        assert service._background is None
        assert client.get("/speech/api/ps").status_code == 200
        assert service._background is None
    assert service._loop is None


def test_it_ends_with_the_event_loop_and_may_start_again(cache: ModelCache) -> None:
    """
    Whether a client enters its own block or not: then each request has a loop.
    """
    app = create_app(options_of(), cache)
    for _ in "12":
        assert TestClient(app).get("/api/ps").status_code == 200
        assert app.state.service._loop is None
    with TestClient(mounted("/speech", app)) as client:
        asked = [
            threading.Thread(target=client.get, args=("/speech/api/ps",))
            for _ in range(4)
        ]
        for thread in asked:
            thread.start()
        for thread in asked:
            thread.join(30)
        assert client.get("/speech/api/ps").status_code == 200
    assert app.state.service._loop is None


def test_a_download_that_takes_too_long_is_told_as_one(
    cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Not as a model that is at work; and one that does not leave not as a download.
    """
    locate = FasterWhisperLoader.locate
    arrived = threading.Event()

    def wait(
        loader: FasterWhisperLoader, model: str, options: Any, *, download: bool
    ) -> Any:
        if download:
            arrived.wait(30)
        return locate(loader, model, options, download=download)

    app = create_app(options_of(timeout_s=0.05), cache)
    with TestClient(app) as client:
        with monkeypatch.context() as patch:
            patch.setattr(FasterWhisperLoader, "locate", wait)
            answer = client.post("/api/models/m/load")
            arrived.set()
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert error["code"] == "model_busy"
        assert "still being downloaded" in error["message"]
        with cache.lease(str(micro("micro says hello")), "cpu"):
            answer = client.delete("/api/models/m")
        assert answer.status_code == 503
        assert "still at work" in answer.json()["error"]["message"]
