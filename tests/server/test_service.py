"""
The server under strain: queues, limits, keys, clients that leave, and its own end.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import psutil
import pytest
from real import SILENCE, child_environment, clip, micro, micro_copy, packaged
from served import TINY, offered, running, serving

from whispercache import AsyncModelCache, ModelCache, aio
from whispercache.engine.naming import ModelSpec, parse_spec
from whispercache.server import ServerOptions, calls, create_app, service
from whispercache.server.offers import Offers
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.process

A, B = "micro-a", "micro-b"


def micros() -> tuple[ModelSpec, ...]:
    """
    Two models that take a few milliseconds.
    """
    return tuple(ModelSpec(name, str(micro(name.replace("-", " ")))) for name in (A, B))


@pytest.fixture
def cache() -> Iterator[ModelCache]:
    """
    A cache with room for one model.
    """
    with ModelCache(max_models=1) as cache:
        yield cache


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


# Queues -------------------------------------------------------------------------------


def test_who_waits_too_long_for_a_model_is_told_when_to_try_again(
    cache: ModelCache,
) -> None:
    """
    503 with Retry-After, as for every model that is busy.
    """
    with (
        serving(cache, models=micros(), timeout_s=0.2) as client,
        cache.lease(micro("micro a"), "cpu"),
    ):
        answer = transcribe(client, B)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert error_of(answer)["code"] == "model_busy"
        assert cache.stats().timeouts == 1
        for action in ("load", "pin"):
            assert client.post(f"/api/models/{B}/{action}").status_code == 503
        assert transcribe(client, A).json()["text"] == "micro a"


def test_more_than_max_waiting_are_refused_at_the_door(cache: ModelCache) -> None:
    """
    429 with Retry-After; those who wait are served in the end.
    """
    with (
        serving(cache, models=micros(), max_waiting=1, parallel=1) as client,
        ExitStack() as asked,
    ):
        with cache.lease(micro("micro a"), "cpu"):
            first = asked.enter_context(asking(client, B))
            wait_until(lambda: len(cache.waiting()) == 1, "the first in the cache")
            second = asked.enter_context(asking(client, B))
            wait_until(lambda: waiting(client) == 2, "the second at the gate")
            answer = transcribe(client, B)
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) > 0
            assert error_of(answer)["type"] == "rate_limit_error"
        for each in (first, second):
            assert each.recv(100).startswith(b"HTTP/1.1 200")
        assert waiting(client) == 0


def waiting(client: httpx.Client) -> int:
    """
    How many requests a server says that wait.
    """
    return len(client.get("/api/ps").json()["waiting"])


def test_a_client_that_leaves_while_it_waits_is_forgotten(
    cache: ModelCache, caplog: pytest.LogCaptureFixture
) -> None:
    """
    In the cache and at the gate; its place goes to the next, and it is no error.
    """
    with (
        serving(cache, models=micros(), parallel=1) as client,
        cache.lease(micro("micro a"), "cpu"),
    ):
        with asking(client, B):
            wait_until(lambda: len(cache.waiting()) == 1, "the first in the cache")
            with asking(client, B):
                wait_until(lambda: waiting(client) == 2, "the second at the gate")
            wait_until(lambda: waiting(client) == 1, "the second gone")
            assert len(cache.waiting()) == 1
        wait_until(lambda: not cache.waiting(), "the first gone")
        assert waiting(client) == 0
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_load_that_nobody_waits_for_is_forgotten(cache: ModelCache) -> None:
    """
    A client that asked for a model by hand, and left.
    """
    with (
        serving(cache, models=micros()) as client,
        cache.lease(micro("micro a"), "cpu"),
    ):
        with pytest.raises(httpx.ReadTimeout):
            client.post(f"/api/models/{B}/load", timeout=0.3)
        wait_until(lambda: not cache.waiting(), "the request gone")


def test_a_client_that_leaves_in_mid_stream_lets_its_model_go(
    cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Once the step in flight is over: a long clip, and a client that hears its beginning.
    """
    step, steps, has_left = aio._next, itertools.count(), threading.Event()

    def slow(items: Any) -> object:
        if next(steps) > 0:
            assert has_left.wait(30)
        return step(items)

    monkeypatch.setattr(aio, "_next", slow)
    with (
        serving(cache, models=micros()) as client,
        Path(clip("en-harbour-long")).open("rb") as file,
    ):
        with client.stream(
            "POST",
            "/v1/audio/transcriptions",
            data={"model": A, "stream": "true"},
            files={"file": ("a.flac", file)},
        ) as answer:
            assert answer.status_code == 200
            # A generator that is dropped closes the connection, as the client would.
            lines = answer.iter_lines()
            assert next(lines)
            assert cache.stats().leases == 1
        has_left.set()
        wait_until(lambda: cache.stats().leases == 0, "the lease")
        assert transcribe(client, A).status_code == 200


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("CUDA failed with error out of memory"), "device_failed"),
        (KeyError("/secret/path"), "KeyError"),
    ],
)
def test_an_error_in_mid_stream_is_told(
    cache: ModelCache, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    """
    As an event, since the status has been sent; OpenAI's client raises it.
    """

    def fail(_items: object) -> None:
        raise error

    monkeypatch.setattr("whispercache.aio._next", fail)
    with serving(cache, models=micros()) as client:
        answer = transcribe(client, A, stream="true")
        assert answer.status_code == 200
        (told,) = (line for line in answer.text.splitlines() if "data:" in line)
        document = json.loads(told.removeprefix("data:"))
        assert document["error"]["code"] == code
        assert "secret" not in answer.text
        url = f"{client.base_url}/v1"
        with (
            openai.OpenAI(base_url=url, api_key="-", max_retries=0) as official,
            pytest.raises(openai.APIError, match=document["error"]["message"][:20]),
        ):
            list(
                official.audio.transcriptions.create(
                    model=A, file=Path(clip("en-bread")), stream=True
                )
            )
    wait_until(lambda: cache.stats().leases == 0, "the lease")


def test_an_error_of_the_device_is_no_fault_of_the_client(
    cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Out of memory is a 503, to be tried again; what nobody foresaw a 500 that names no
    file of ours.
    """
    errors: list[Exception] = [
        RuntimeError("CUDA failed with error out of memory"),
        RuntimeError("/secret/path"),
    ]

    def fail(_items: object) -> None:
        raise errors.pop(0)

    monkeypatch.setattr("whispercache.aio._next", fail)
    with serving(cache, models=micros()) as client:
        answer = transcribe(client, A)
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        answer = transcribe(client, A)
        assert answer.status_code == 500
        assert error_of(answer)["type"] == "server_error"
        assert "secret" not in answer.text
    assert cache.stats().leases == 0


def test_a_client_that_leaves_in_mid_upload_leaves_nothing(
    cache: ModelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    No file, no lease, no place in the queue.
    """
    models = micros()  # made in a temporary directory, too
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with serving(cache, models=models) as client:
        for _ in range(5):
            with asking(client, A, 9_000_000) as upload:
                upload.sendall(b"\0" * 4_000_000)
        assert transcribe(client, A).status_code == 200
        wait_until(lambda: not list(tmp_path.iterdir()), "no files")
    assert cache.stats().requests == 1


def test_a_call_that_nobody_waits_for_keeps_its_turn_until_it_ends(
    cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    It cannot be stopped: others who were let in would only wait behind it, on threads.
    """
    go, running, most = threading.Event(), 0, 0

    def slow(*_args: object, **_options: object) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        assert go.wait(30)
        running -= 1
        raise RuntimeError("nobody hears this")

    monkeypatch.setattr("faster_whisper.WhisperModel.transcribe", slow)
    with serving(cache, models=micros(), parallel=1, max_waiting=8) as client:
        with asking(client, A):
            wait_until(lambda: running == 1, "the call")
        for _ in range(3):
            with asking(client, A):
                wait_until(lambda: waiting(client) == 1, "the next at the gate")
            wait_until(lambda: waiting(client) == 0, "it to be forgotten")
        assert cache.stats().leases == most == 1
        go.set()
        wait_until(lambda: cache.stats().leases == 0, "the end of the call")
        assert transcribe(client, A).status_code == 500
    assert most == 1


def test_a_call_holds_its_lease_however_often_it_is_cancelled(
    cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The client leaves, then the server ends: the model must not leave under the call.
    """
    running, go = threading.Event(), threading.Event()

    def slow(*_args: object, **_options: object) -> None:
        running.set()
        assert go.wait(30)
        raise RuntimeError("nobody hears this")

    monkeypatch.setattr("faster_whisper.WhisperModel.transcribe", slow)

    async def main() -> None:
        pool = ThreadPoolExecutor(1)
        lease = await AsyncModelCache(cache).lease(micro("micro a"), "cpu")
        call = asyncio.create_task(calls.transcribe(pool, lease, SILENCE, {}))
        del lease
        await asyncio.to_thread(running.wait, 10)
        for _ in range(2):
            call.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await call
        assert cache.stats().leases == 1
        go.set()
        await asyncio.to_thread(wait_until, lambda: cache.stats().leases == 0)

    asyncio.run(main())


def test_only_so_much_audio_is_in_memory(
    cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    More waits on disk; what alone is too much has its turn all the same.
    """
    go, running = threading.Event(), 0

    def slow(*_args: object, **_options: object) -> None:
        nonlocal running
        running += 1
        assert go.wait(30)
        raise RuntimeError("that was all")

    monkeypatch.setattr("faster_whisper.WhisperModel.transcribe", slow)
    with (
        serving(cache, models=micros(), parallel=8, max_audio_s=6.5) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        asked = [pool.submit(transcribe, client, A) for _ in range(4)]  # 2.9 s each
        wait_until(lambda: (running, waiting(client)) == (2, 2), "two at work")
        go.set()
        assert [each.result().status_code for each in asked] == [500] * 4
        assert running == 4
    with serving(cache, models=micros(), max_audio_s=1) as client:
        assert transcribe(client, A).status_code == 500


def test_uploads_beyond_those_who_may_wait_are_not_even_read(
    cache: ModelCache,
) -> None:
    """
    429 before the body, for what fits neither in the queue nor on the disk.
    """
    with (
        serving(cache, models=micros(), max_waiting=0, parallel=1) as client,
        ExitStack() as asked,
    ):
        for _ in range(4):
            asked.enter_context(asking(client, A, 9_000_000))

        def refused() -> bool:
            answer = transcribe(client, A)
            return answer.status_code == 429 and "under way" in answer.text

        wait_until(refused, "a refusal")
        assert client.get("/v1/models").status_code == 200


def test_calls_on_one_model_take_turns(cache: ModelCache) -> None:
    """
    However many ask at once, all are served, and no more than so many hold it.
    """
    most = 0

    def watch() -> int:
        nonlocal most
        for _ in range(3):
            most = max(most, cache.stats().leases)
        return most

    with (
        serving(cache, models=micros(), parallel=2) as client,
        ThreadPoolExecutor(12) as pool,
    ):
        asked = [pool.submit(transcribe, client, (A, B)[i % 2]) for i in range(24)]
        while not all(each.done() for each in asked):
            watch()
        texts = [each.result().json()["text"] for each in asked]
    assert texts == ["micro a", "micro b"] * 12
    assert 1 <= most <= 2


# Limits -------------------------------------------------------------------------------


def test_an_upload_that_is_too_large_is_refused(cache: ModelCache) -> None:
    """
    Before it is read, if it says how large it is; otherwise as soon as it is too much.
    """
    with serving(cache, models=micros(), max_upload_bytes=20_000) as client:
        answer = transcribe(client, A)
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "upload_too_large"
        head = (
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        )
        chunks = (head if not i else b"\0" * 1000 for i in range(100))
        kind = {"content-type": "multipart/form-data; boundary=x"}
        url = "/v1/audio/transcriptions"
        answer = client.post(url, content=chunks, headers=kind)
        assert answer.status_code == 413
    assert cache.stats().requests == 0


@pytest.mark.parametrize(
    "form",
    [
        {"files": [("file", b"a"), ("file", b"b")]},
        {"files": [("file", b"a")], "data": {"prompt": "x" * 70_000}},
        {"files": [("file", b"a")], "data": {str(i): "x" for i in range(60)}},
    ],
)
def test_a_form_holds_one_file_and_a_few_short_fields(
    cache: ModelCache, form: dict[str, Any]
) -> None:
    """
    Fields are kept in memory while a request waits; files are not.
    """
    with serving(cache, models=micros()) as client:
        answer = client.post("/v1/audio/transcriptions", **form)
        assert answer.status_code == 400
        assert "Too many" in answer.text or "exceeded" in answer.text


@pytest.mark.parametrize(
    "where", ["tempfile.SpooledTemporaryFile.write", "shutil.copyfileobj"]
)
def test_a_full_disk_is_no_fault_of_the_client(
    cache: ModelCache, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """
    503, while the upload arrives and afterwards.
    """

    def fail(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "secret")

    with serving(cache, models=micros()) as client:
        monkeypatch.setattr(where, fail)
        answer = transcribe(client, A)
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "disk_full"
        assert "retry-after" in answer.headers
        assert "secret" not in answer.text


def test_audio_that_is_too_long_is_refused(cache: ModelCache) -> None:
    """
    Without a model: nothing is loaded for it.
    """
    with serving(cache, models=micros(), max_duration_s=1) as client:
        answer = transcribe(client, A)
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "audio_too_long"
        assert "1 s" in error_of(answer)["message"]
    assert cache.stats().requests == 0


# Keys ---------------------------------------------------------------------------------


def test_without_a_key_only_the_page_and_the_probes_are_open(cache: ModelCache) -> None:
    """
    Any of the keys will do, and nothing else.
    """
    keys = ("first", "sécond")
    with serving(cache, models=micros(), keys=keys) as client:
        for path in ("/healthz", "/readyz"):
            assert client.get(path).status_code == 200
        closed = ("/v1/models", "/api/ps", "/metrics", "/openapi.json", "/nix")
        for path in closed:
            for given in (None, "Bearer", "Bearer fir", "Basic first", "first"):
                headers = {} if given is None else {"authorization": given}
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401, (path, given)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert error_of(answer)["code"] == "invalid_api_key"
        for key in keys:
            sent = [(b"authorization", f"Bearer {key}".encode())]
            answer = client.get("/v1/models", headers=sent)
            assert answer.status_code == 200
        assert transcribe(client, A).status_code == 401


def test_pages_of_other_sites_can_do_nothing(cache: ModelCache) -> None:
    """
    Neither through the browser of somebody who may, nor by a name rebound to us; an
    origin that was allowed can.
    """
    friend = "https://friend.example"
    with serving(
        cache, models=micros(), hosts=("127.0.0.1",), origins=(friend,)
    ) as client:
        path = f"/api/models/{A}/load"
        own = str(client.base_url).rstrip("/")
        for headers, status in (
            ({"origin": "https://evil.example"}, 403),
            ({"origin": "null"}, 403),
            ({"origin": own, "sec-fetch-site": "cross-site"}, 403),
            ({"sec-fetch-site": "same-site"}, 403),
            ({"host": "evil.example"}, 403),
            ({"host": "[::1"}, 403),
            ({"origin": "http://[::1"}, 403),
            ({"origin": own}, 200),
            ({"origin": own, "sec-fetch-site": "same-origin"}, 200),
            ({"origin": friend, "sec-fetch-site": "cross-site"}, 200),
            ({}, 200),
        ):
            answer = client.post(path, headers=headers)
            assert answer.status_code == status, headers
        allowed = "access-control-allow-origin"
        assert answer.headers.get(allowed) is None
        answer = client.get("/v1/models", headers={"origin": friend})
        assert answer.headers[allowed] == friend
        answer = client.get("/v1/models", headers={"origin": "https://evil.example"})
        assert allowed not in answer.headers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ()}, "at least one model"),
        ({"models": (parse_spec("base"), parse_spec("base=tiny"))}, "one name"),
        ({"preload": ("tiny",)}, "tiny is not among"),
        ({"pin": ("tiny",)}, "tiny is not among"),
        ({"keys": ("a", " ")}, "everybody"),
        ({"parallel": 0}, "parallel"),
        ({"origins": ("https://*.example",)}, "no origin"),
        ({"origins": ("https://app.example/",)}, "no origin"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"max_duration_s": float("nan")}, "max_duration_s"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict[str, Any], message: str
) -> None:
    """
    When they are made, not at the first request.
    """
    with pytest.raises(ValueError, match=message):
        ServerOptions(**{"models": (parse_spec("base"),), **options})


def test_models_are_named_as_on_the_command_line() -> None:
    """
    Texts will do; a single text would be a list of letters.
    """
    options = ServerOptions(models=("base:int8", "mine=tiny"))
    assert options.offered == (parse_spec("base:int8"), parse_spec("mine=tiny"))
    assert [spec.name for spec in options.offered] == ["base:int8", "mine"]
    with pytest.raises(TypeError, match="a tuple of models"):
        ServerOptions(models="base")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no compute type"):
        ServerOptions(models=("base:int7",))


def test_known_sizes_answer_to_all_their_names() -> None:
    """
    As far as they are served under their own.
    """
    specs = [parse_spec(text) for text in ("large:int8", "base", "mine=tiny")]
    with ModelCache() as cache:
        offers = Offers(specs, "cpu", cache)
        for name, found in (
            ("large:int8", "large:int8"),
            ("large-v3:int8", "large:int8"),
            ("Systran/faster-whisper-base", "base"),
            ("whisper-1", "large:int8"),
            ("tiny", None),
            ("base:int8", None),
            ("large", None),
        ):
            offer = offers.find(name)
            assert (offer.name if offer else None) == found, name


# Life ---------------------------------------------------------------------------------


def test_it_is_ready_once_all_is_loaded_that_should_be(
    cache: ModelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A model that cannot be loaded is tried again, and the reason told.
    """
    monkeypatch.setattr(service, "RETRY_S", 0.05)
    directory = micro_copy(tmp_path / "model")
    whole = (directory / "tokenizer.json").read_bytes()
    (directory / "tokenizer.json").write_bytes(whole[:-10])  # seen by the load alone
    specs = (ModelSpec("mine", str(directory)),)
    with serving(cache, models=specs, pin=("mine",)) as client:
        assert client.get("/healthz").json()["status"] == "alive"
        wait_until(
            lambda: client.get("/readyz").json()["pending"] == {"mine": "LoadFailed"},
            "the reason",
        )
        assert client.get("/readyz").status_code == 503
        answer = transcribe(client, "mine")
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        assert str(tmp_path) not in answer.text
        (directory / "tokenizer.json").write_bytes(whole)
        wait_until(lambda: client.get("/readyz").status_code == 200, "it to be ready")
        (model,) = client.get("/api/ps").json()["models"]
        assert model["pinned"] is True


def test_it_is_not_ready_when_it_takes_no_more_work(cache: ModelCache) -> None:
    """
    The cache under it was closed.
    """
    with serving(cache, models=micros(), preload=(A,)) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200, "it to be ready")
        cache.close()
        assert client.get("/readyz").status_code == 503
        assert client.get("/readyz").json()["status"] == "closing"
        answer = transcribe(client, A)
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "shutting_down"


def test_an_application_can_be_started_again(cache: ModelCache) -> None:
    """
    As test clients do.
    """
    app = create_app(ServerOptions(models=micros(), device="cpu"), cache)
    for _ in range(2):
        with running(app) as url, httpx.Client(base_url=url) as client:
            assert transcribe(client, A).json()["text"] == "micro a"


def test_a_cache_of_its_own_is_closed_and_a_given_one_is_not(cache: ModelCache) -> None:
    """
    Whoever made it closes it.
    """
    with serving(cache, models=micros()) as client:
        transcribe(client, A)
    assert [info.state for info in cache.models()] == ["resident"]
    app = create_app(ServerOptions(models=micros(), device="cpu"))
    own = app.state.service.cache.cache
    with running(app) as url, httpx.Client(base_url=url) as client:
        transcribe(client, A)
    assert own._core.is_closed


HANGING = """
import time
from whispercache.engine.loader import FasterWhisperLoader
from whispercache.cli import main as cli

if __name__ == "__main__":
    locate = FasterWhisperLoader.locate

    def hang(*args, download, **options):
        if download:
            time.sleep(1000)
        return locate(*args, download=download, **options)

    FasterWhisperLoader.locate = hang
    cli.EXIT_S = 0.5
    cli.script()
"""


def test_a_download_that_never_ends_holds_up_nobody(tmp_path: Path) -> None:
    """
    Neither the request, beyond its time limit, nor the end of the server.
    """
    program = tmp_path / "hanging.py"
    program.write_text(HANGING, encoding="utf-8")
    place = (f"m={micro('micro a')}", "--device", "cpu", "--timeout", "200ms")
    with command(*place, program=str(program)) as (process, client):
        with ThreadPoolExecutor(70) as pool:
            asked = [
                pool.submit(client.post, "/api/models/m/load", timeout=60)
                for _ in range(70)
            ]
            codes = [error_of(each.result())["code"] for each in asked]
        assert set(codes) == {"model_busy"}
        assert psutil.Process(process.pid).num_threads() < 50
        assert transcribe(client, "m").status_code == 503
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in log


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


def test_sigterm_lets_what_has_begun_be_finished() -> None:
    """
    The client gets the whole answer; the exit code is 0, and no process stays.
    """
    (spec,) = offered(TINY)
    place = f"{TINY}={spec.model}"
    with (
        command(place, "--device", "cpu", "--pin", TINY) as (process, client),
        Path(clip("en-harbour-long")).open("rb") as file,
    ):
        with client.stream(
            "POST",
            "/v1/audio/transcriptions",
            data={"model": TINY, "stream": "true"},
            files={"file": ("a.flac", file)},
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert any("transcript.text.done" in line for line in rest)
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0, log
        assert "Traceback" not in log
        assert "leaked" not in log


def test_what_is_not_finished_in_time_is_told_so() -> None:
    """
    503 with Retry-After for those who wait, and for those who worked for too long.
    """
    (spec,) = offered(TINY)
    place = (f"{TINY}={spec.model}", "--device", "cpu", "--preload", TINY)
    with (
        command(*place, "--drain", "1", "--parallel", "1") as (process, client),
        ExitStack() as asked,
    ):
        for _ in range(3):
            there = asking(client, TINY, clip_name="en-harbour-long")
            last = asked.enter_context(there)
        wait_until(lambda: waiting(client) == 2, "the others at the gate")
        last.settimeout(30)
        process.send_signal(signal.SIGTERM)
        answer = "".join(piece.decode() for piece in iter(lambda: last.recv(999), b""))
        assert answer.startswith("HTTP/1.1 503"), answer
        assert "retry-after" in answer
        assert "shutting_down" in answer
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in log


def test_ctrl_c_ends_it_as_usual() -> None:
    """
    With the shell's exit code, and no traceback.
    """
    with command(f"m={micro('micro a')}", "--device", "cpu") as (process, client):
        assert transcribe(client, "m").json()["text"] == "micro a"
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in log


def test_keys_come_from_a_file_and_from_the_environment(tmp_path: Path) -> None:
    """
    Never from the command line, which others can read.
    """
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n", encoding="utf-8")
    arguments = (f"m={micro('micro a')}", "--key-file", str(file), "--device", "cpu")
    with command(*arguments, WHISPERCACHE_API_KEYS="three,four") as (server, client):
        for key, status in (("one", 200), ("two", 200), ("four", 200), ("-", 401)):
            headers = {"authorization": f"Bearer {key}"}
            assert client.get("/v1/models", headers=headers).status_code == status
        children = psutil.Process(server.pid).children()
        assert children
        assert not [c for c in children if "four" in str(c.environ())]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no-such-size",), "unknown model 'no-such-size'"),
        (("base:in8",), "no compute type"),
        (("base", "--pin", "tiny"), "tiny is not among"),
        (("base", "--timeout", "-1"), "--timeout must have an end"),
        (("base", "--max-upload", "lots"), "--max-upload"),
        (("base", "--key-file", os.devnull), "holds no key"),
    ],
)
def test_wrong_use_is_told_in_one_line(arguments: tuple[str, ...], said: str) -> None:
    """
    With exit code 2, before anything is served.
    """
    done = subprocess.run(
        [sys.executable, "-m", "whispercache", "serve", *arguments],
        env=child_environment({}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    """
    In words, with an exit code.
    """
    assert packaged(TINY)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        started_s = time.monotonic()
        line = ["serve", f"m={micro('micro a')}", "--port", str(port)]
        done = subprocess.run(
            [sys.executable, "-m", "whispercache", *line],
            env=child_environment({"TMPDIR": tmp_path}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode != 0
    assert "address already in use" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started_s < 30


def test_top_shows_a_server(cache: ModelCache, tmp_path: Path) -> None:
    """
    With the key from a file or from the environment; what is wrong is one line.
    """
    (tmp_path / "key").write_text("secret\n", encoding="utf-8")
    file = ("--key-file", str(tmp_path / "key"))

    def top(*arguments: str, key: str = "") -> subprocess.CompletedProcess[str]:
        place = str(client.base_url)
        line = [
            "-m",
            "whispercache",
            "top",
            "--once",
            "--url",
            place,
            *arguments,
        ]
        return subprocess.run(
            [sys.executable, *line],
            env=child_environment({"WHISPERCACHE_API_KEY": key}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    with serving(cache, models=micros(), keys=("secret",)) as client:
        cache.preload(micro("micro a"), "cpu")
        for done in (top(*file), top(key="secret")):
            assert done.returncode == 0, done.stderr
            assert A in done.stdout
        for done in (top(), top(key="wrong"), top("--interval", "-1", *file)):
            assert done.returncode == 2
            assert not done.stdout
            assert done.stderr.count("\n") == 1
