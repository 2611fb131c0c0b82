"""
The web examples: each as a process of its own, with real speech over real sockets.
"""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import os
import re
import subprocess
import sys
import wave
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from real import (
    at_once,
    child_environment,
    clip,
    decode_audio,
    packaged,
    reference,
)

from whispercache import AsyncModelCache
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import MakeCache

    from whispercache import ModelCache
    from whispercache.testing import FakeLoader

pytestmark = pytest.mark.process

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROGRAMS = {
    "flask_app": [str(EXAMPLES / "flask_app.py")],
    "fastapi_app": [
        *("-m", "uvicorn", "--app-dir", str(EXAMPLES), "fastapi_app:app"),
        *("--port", "0", "--timeout-graceful-shutdown", "10"),
    ],
}
ENDED_BY_SIGTERM = (0, -15)
PATIENCE_S = 60.0


@dataclass
class Service:
    """
    A program that serves.
    """

    client: httpx.Client
    process: subprocess.Popen[bytes]
    log: Path

    def leases(self) -> int:
        """
        How many it holds.
        """
        return int(self.client.get("/health").json()["leases"])


@contextmanager
def serving(name: str, directory: Path) -> Iterator[Service]:
    """
    One of the programs, ready; at the end of the block it is stopped, hard if need be.
    """
    packaged("tiny.en")
    log = directory / "log.txt"
    environment: dict[str, str | Path] = {"PORT": "0", "XDG_RUNTIME_DIR": directory}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *PROGRAMS[name]],
            env=child_environment(environment),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx.Client(base_url=address(process, log), timeout=PATIENCE_S) as client:
            yield Service(client, process, log)
    finally:
        process.kill()
        process.wait(PATIENCE_S)


def address(process: subprocess.Popen[bytes], log: Path) -> str:
    """
    Where a program serves, as its log tells.
    """
    found: list[str] = []

    def is_told() -> bool:
        found[:] = re.findall(r"http://127\.0\.0\.1:\d+", log.read_text())
        return bool(found) or process.poll() is not None

    wait_until(is_told, "an address")
    assert found, log.read_text()
    return found[0]


@pytest.fixture(scope="module", params=PROGRAMS)
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """
    Each of the programs, for the tests that leave it as it was.
    """
    with serving(request.param, tmp_path_factory.mktemp("web")) as service:
        yield service


def upload(name: str = "en-bread") -> dict[str, tuple[str, bytes]]:
    """
    A form with a clip in it.
    """
    return {"file": (f"{name}.flac", Path(clip(name)).read_bytes())}


def words(text: str) -> list[str]:
    """
    *text* without case and punctuation.
    """
    return re.findall(r"\w+", text.lower())


# What they are for --------------------------------------------------------------------


def test_an_upload_becomes_text(service: Service) -> None:
    """
    Whole, and with its segments; the model may leave when the answer is there.
    """
    answer = service.client.post("/transcriptions", files=upload())
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert words(told["text"]) == words(reference("en-bread"))
    assert told["language"] == "en"
    assert told["segments"][0]["start"] == 0
    assert told["segments"][-1]["end"] > 1
    wait_until(lambda: service.leases() == 0, "the end of the lease")


def test_two_uploads_at_once_get_their_own_texts(service: Service) -> None:
    """
    By one model, which they share.
    """
    names = ["en-bread", "en-weather"]
    answers = at_once(
        [
            lambda name=name: service.client.post(  # type: ignore[misc]
                "/transcriptions", files=upload(name)
            )
            for name in names
        ]
    )
    for name, answer in zip(names, answers, strict=True):
        assert words(answer.json()["text"])[:3] == words(reference(name))[:3]


def test_segments_come_line_by_line(service: Service) -> None:
    """
    Each a JSON object of its own.
    """
    with service.client.stream("POST", "/segments", files=upload()) as answer:
        assert answer.headers["content-type"].startswith("application/x-ndjson")
        told = [json.loads(line) for line in answer.iter_lines()]
    assert words("".join(line["text"] for line in told)) == words(reference("en-bread"))


def test_a_client_that_leaves_frees_the_model(service: Service) -> None:
    """
    Long before all of its six minutes would have been transcribed.
    """
    with service.client.stream("POST", "/segments", files=long_upload()) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert service.leases() == 1
    wait_until(lambda: service.leases() == 0, "the end of the lease")
    assert "Traceback" not in service.log.read_text()


def long_upload() -> dict[str, tuple[str, bytes]]:
    """
    A form with six minutes of speech in it: half a minute's work for tiny.en.
    """
    samples = np.tile(decode_audio(clip("en-harbour-long")), 10)
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes((samples * 32767).astype("<i2").tobytes())
    return {"file": ("long.wav", file.getvalue())}


# What they refuse ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "status"),
    [
        ({"files": {"file": ("a.wav", b"RIFF is not enough")}}, {422}),
        ({"files": {"file": ("a.wav", b"")}}, {422}),
        ({"files": {"other": ("a.wav", b"?")}}, {400, 422}),
        ({"files": upload(), "data": {"model": "/etc"}}, {400, 422}),
        ({"files": {"file": ("a.wav", bytes(26 * 2**20))}}, {413}),
        ({"content": b"not even a form"}, {400, 422}),
        ({"content": [b"in ", b"chunks"]}, {400, 411}),
    ],
    ids=["broken", "empty", "missing", "other model", "too large", "none", "chunks"],
)
def test_what_cannot_be_served_is_the_clients_fault(
    service: Service, form: dict[str, object], status: set[int]
) -> None:
    """
    It gets a status that says so, and nothing on the server's side looks like a crash.
    """
    answer = service.client.post("/segments", **form)  # type: ignore[arg-type]
    assert answer.status_code in status, answer.text
    assert service.leases() == 0
    assert "Traceback" not in service.log.read_text()


def in_process(
    name: str, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], httpx.Response]:
    """
    Sends a clip to one of the programs, which uses *cache*.
    """
    monkeypatch.syspath_prepend(str(EXAMPLES))
    program = importlib.import_module(name)
    if name == "flask_app":
        wsgi = httpx.WSGITransport(program.create_app(cache))

        def post(path: str) -> httpx.Response:
            with httpx.Client(transport=wsgi, base_url="http://test") as client:
                return client.post(path, files=upload())

        return post

    async def app(scope: Any, receive: Any, send: Any) -> None:
        state = {"cache": AsyncModelCache(cache)}
        await program.app({**scope, "state": state}, receive, send)

    async def post_async(path: str) -> httpx.Response:
        asgi = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=asgi, base_url="http://test") as client:
            return await client.post(path, files=upload())

    return lambda path: asyncio.run(post_async(path))


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_passes_is_to_be_tried_again(
    name: str,
    make_cache: MakeCache,
    loader: FakeLoader,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    503 with the seconds after which it may work, and none of our paths.
    """
    cache = make_cache()
    model = str(packaged("tiny.en"))
    loader.fail_loads[model] = [OSError(f"cannot read {model}")] * 5
    post = in_process(name, cache, monkeypatch)
    for seconds in (10, 10, 1):  # after two failures in a row, the cache says when
        answer = post("/transcriptions")
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == str(seconds)
        assert answer.json() == {"error": "busy"}
    cache.close()
    answer = post("/segments")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_never_passes_is_the_servers_fault(
    name: str, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    500 without a reason: it is in the log.
    """
    answer = in_process(name, make_cache(ram="1MiB"), monkeypatch)("/transcriptions")
    assert answer.status_code == 500
    assert "Retry-After" not in answer.headers
    assert os.sep not in answer.json()["error"]


# Their end ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_sigterm_ends_it_without_a_word(name: str, tmp_path: Path) -> None:
    """
    Soon, with a model in memory, and no traceback.
    """
    with serving(name, tmp_path) as service:
        answer = service.client.post("/transcriptions", files=upload())
        service.process.terminate()
        # The traceback of a 500 is written after the answer.
        code = service.process.wait(5)
        assert answer.status_code == 200, answer.text + service.log.read_text()
        assert code in ENDED_BY_SIGTERM
        assert "Traceback" not in service.log.read_text()
