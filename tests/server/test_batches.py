"""
Priority over HTTP: people before batches.
"""

from __future__ import annotations

import io
import json
import time
import wave
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from real import micro
from served import A, B, error_of, micros, serving, transcribe, waiting

from whispercache import ModelCache, aio
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

pytestmark = pytest.mark.process


@pytest.fixture
def cache() -> Iterator[ModelCache]:
    """
    A cache with room for one model.
    """
    with ModelCache(max_models=1) as cache:
        yield cache
        cache._core.check()
        assert cache.stats().leases == 0


def film(seconds: int) -> io.BytesIO:
    """
    A silent film's sound: a micro model says its text once for each half minute.
    """
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(8000)
        file.writeframes(b"\x80" * 8000 * seconds)
    sound.seek(0)
    return sound


def deltas(answer: httpx.Response) -> Iterator[str]:
    """
    The texts of a stream, as they come.
    """
    for line in answer.iter_lines():
        if line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            assert event["type"] != "error", event
            if event["type"] == "transcript.text.delta":
                yield event["delta"]


@pytest.mark.parametrize(
    ("urgent", "fields", "headers"),
    [(A, {}, {"X-Priority": "-1"}), (B, {"priority": "batch"}, {})],
    ids=["its turn, by a header", "its memory, by a field"],
)
def test_a_batch_makes_way_for_a_person(
    cache: ModelCache,
    monkeypatch: pytest.MonkeyPatch,
    urgent: str,
    fields: dict[str, str],
    headers: dict[str, str],
) -> None:
    """
    Be it for its model's turn or for its memory; and says the same as without.
    """
    n_windows, step = 20, aio._next

    def slow(items: Any) -> object:
        time.sleep(0.1)  # or the batch might be over before the person comes
        return step(items)

    monkeypatch.setattr(aio, "_next", slow)
    with (
        serving(cache, models=micros(), parallel=1) as client,
        client.stream(
            "POST",
            "/v1/audio/transcriptions",
            data={"model": A, "stream": "true", "vad_filter": "false", **fields},
            headers=headers,
            files={"file": ("film.wav", film(30 * n_windows))},
            timeout=120,
        ) as answer,
    ):
        texts = deltas(answer)
        first = next(texts)
        assert transcribe(client, urgent).status_code == 200
        rest = list(texts)
        assert {text.strip() for text in (first, *rest)} == {"micro a"}
        assert len(rest) == n_windows - 1
    # Its model had to go, and came back.
    assert cache.stats().loads == (3 if urgent == B else 1)


@pytest.mark.parametrize("value", ["urgent", "nan", "1", "interactive, batch"])
def test_what_is_no_priority_is_refused(cache: ModelCache, value: str) -> None:
    """
    As is one above the usual: every client would take it.
    """
    with serving(cache, models=micros()) as client:
        answer = transcribe(client, A, priority=value)
        assert answer.status_code == 400
        assert error_of(answer)["param"] == "priority"
        for usual in ("", "interactive", "0", "-0.5"):
            assert transcribe(client, A, priority=usual).status_code == 200


def test_waiting_requests_are_shown_with_their_priority(cache: ModelCache) -> None:
    """
    In the order in which they are served.
    """
    snapshot: dict[str, Any]
    with (
        serving(cache, models=micros(), parallel=1) as client,
        cache.lease(micro("micro b"), "cpu"),
        ThreadPoolExecutor(3) as pool,
    ):
        asked = [pool.submit(transcribe, client, A, priority=-1)]
        wait_until(lambda: waiting(client) == 1, "the batch in the cache")
        asked += [pool.submit(transcribe, client, A, priority=-1)]
        wait_until(lambda: waiting(client) == 2, "another one before it")
        asked += [pool.submit(transcribe, client, A)]
        wait_until(lambda: waiting(client) == 3, "a person before that")
        snapshot = client.get("/api/ps").json()
        levels = [each["priority"] for each in snapshot["waiting"]]
        assert levels == [0.0, -1.0, -1.0]
        cache.resize(max_models=2)
        assert all(each.result().status_code == 200 for each in asked)
