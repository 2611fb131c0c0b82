"""
Requests that wait for the server: turns, time limits, and clients that hang up.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from real import SILENCE, clip, micro
from served import (
    A,
    B,
    asking,
    error_of,
    micros,
    serving,
    transcribe,
    waiting,
)

from whispercache import AsyncModelCache, ModelCache, aio
from whispercache.server import calls
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.process


@pytest.fixture
def cache() -> Iterator[ModelCache]:
    """
    A cache with room for one model.
    """
    with ModelCache(max_models=1) as cache:
        yield cache


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


def test_a_wait_that_was_in_vain_is_told_in_whole(cache: ModelCache) -> None:
    """
    However many turns others have had meanwhile.
    """
    with (
        serving(cache, models=micros(), timeout_s=1, parallel=1) as client,
        cache.lease(micro("micro a"), "cpu"),
        asking(client, B),
    ):
        wait_until(lambda: len(cache.waiting()) == 1, "the first in the cache")
        told = error_of(transcribe(client, B))["message"]
    match = re.search(r"within (\d+\.\d) s", told)
    assert match, told
    assert float(match[1]) >= 1, told


def test_what_never_fits_is_refused_with_the_numbers() -> None:
    """
    Whoever reads it sees by how much.
    """
    with ModelCache(ram="1MiB") as small, serving(small, models=micros()) as client:
        answer = transcribe(client, A)
    assert answer.status_code == 503
    assert error_of(answer)["code"] == "no_room"
    assert re.match(
        r"the model needs [\d.]+ MiB for this on cpu, of which at most 1\.0 MiB can be "
        "had: that is the limit; raise it",
        error_of(answer)["message"],
    )


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
            wait_until(lambda: waiting(client) == 2, "the second, too")
            answer = transcribe(client, B)
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) > 0
            assert error_of(answer)["type"] == "rate_limit_error"
        for each in (first, second):
            assert each.recv(100).startswith(b"HTTP/1.1 200")
        assert waiting(client) == 0


def test_a_client_that_leaves_while_it_waits_is_forgotten(
    cache: ModelCache, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Be it the first or not; its place goes to the next, and it is no error.
    """
    with (
        serving(cache, models=micros(), parallel=1) as client,
        cache.lease(micro("micro a"), "cpu"),
    ):
        with asking(client, B):
            wait_until(lambda: len(cache.waiting()) == 1, "the first in the cache")
            with asking(client, B):
                wait_until(lambda: waiting(client) == 2, "the second, too")
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
                wait_until(lambda: waiting(client) == 1, "the next in the cache")
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
        begun = calls.transcribe(pool, lease, SILENCE, {}, cache.loader.batched)
        call = asyncio.create_task(begun)
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
        # The others hold no model meanwhile.
        wait_until(lambda: cache.stats().leases == 2, "two leases")
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
