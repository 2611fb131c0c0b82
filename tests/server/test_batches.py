"""
Priority over HTTP: people before batches.
"""

from __future__ import annotations

import io
import json
import time
import wave
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from real import micro
from served import A, B, error_of, micros, running, serving, transcribe, waiting

from whispercache import ModelCache, aio
from whispercache.server import ServerOptions, create_app
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Segments that take a moment, or a batch might be over before a person comes.
    """
    step = aio._next

    def next_of(items: Any) -> object:
        time.sleep(0.1)
        return step(items)

    monkeypatch.setattr(aio, "_next", next_of)


@contextmanager
def hearing(
    client: httpx.Client,
    n_windows: int,
    fields: Mapping[str, str],
    headers: Mapping[str, str] | None = None,
) -> Iterator[Iterator[str]]:
    """
    The texts of a film for model A, as they come.
    """
    with client.stream(
        "POST",
        "/v1/audio/transcriptions",
        data={"model": A, "stream": "true", "vad_filter": "false", **fields},
        headers=headers,
        files={"file": ("film.wav", film(30 * n_windows))},
        timeout=120,
    ) as answer:
        yield deltas(answer)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(
    ("urgent", "fields", "headers"),
    [(A, {}, {"X-Priority": "batch"}), (B, {"priority": "batch"}, {})],
    ids=["its turn, by a header", "its memory, by a field"],
)
def test_a_batch_makes_way_for_a_person(
    cache: ModelCache, urgent: str, fields: dict[str, str], headers: dict[str, str]
) -> None:
    """
    Be it for its model's turn or for its memory; and says the same as without.
    """
    n_windows = 20
    with (
        serving(cache, models=micros(), parallel=1) as client,
        hearing(client, n_windows, fields, headers) as texts,
    ):
        first = next(texts)
        assert transcribe(client, urgent).status_code == 200
        assert under_way(client) == ["batch"]
        rest = list(texts)
        assert {text.strip() for text in (first, *rest)} == {"micro a"}
        assert len(rest) == n_windows - 1
    assert cache.stats().batch_stops == 1
    # Its model had to go, and came back.
    assert cache.stats().loads == (3 if urgent == B else 1)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("urgent", [A, B])
def test_a_person_does_not_wait_for_the_audio_of_a_batch(
    cache: ModelCache, urgent: str
) -> None:
    """
    That is in memory as long as the batch lasts, which has stopped for the person.
    """
    with (
        serving(
            cache, models=micros(), parallel=1, max_audio_s=1, timeout_s=20
        ) as client,
        hearing(client, 20, {"priority": "batch"}) as texts,
    ):
        next(texts)
        assert transcribe(client, urgent).status_code == 200
        assert under_way(client) == ["batch"]
        assert len(list(texts)) == 19


@pytest.mark.usefixtures("slow")
def test_batches_that_wait_for_audio_do_not_keep_its_holder_from_its_model(
    cache: ModelCache,
) -> None:
    """
    The one that came first has stopped for the other, and has the room; it goes on.
    """
    with (
        serving(
            cache, models=micros(), parallel=1, max_audio_s=1, timeout_s=20
        ) as client,
        hearing(client, 10, {"priority": "-2"}) as texts,
    ):
        next(texts)
        assert transcribe(client, A, priority="-1").status_code == 200
        assert len(list(texts)) == 9


@pytest.mark.usefixtures("slow")
def test_a_batch_that_gave_way_goes_on_when_the_server_shuts_down(
    cache: ModelCache,
) -> None:
    """
    It has begun, as the person for whom it stopped; others that wait are refused.
    """
    options = ServerOptions(models=micros(), device="cpu", parallel=1)
    app = create_app(options, cache)
    with (
        running(app) as url,
        httpx.Client(base_url=url, timeout=60) as client,
        ThreadPoolExecutor(2) as pool,
        hearing(client, 10, {"priority": "batch"}) as texts,
    ):
        next(texts)
        asked = [pool.submit(list, _person(client))]
        wait_until(lambda: levels(client) == [-1.0], "the batch to stop")
        asked.append(pool.submit(transcribe, client, A))  # type: ignore[arg-type]
        wait_until(lambda: levels(client) == [0.0, -1.0], "another person")
        service: Any = app.state.service
        service._loop.call_soon_threadsafe(service.gate.close)
        refused: Any = asked[1].result()
        assert refused.status_code == 503
        assert error_of(refused)["code"] == "shutting_down"
        assert len(asked[0].result()) == 10
        assert len(list(texts)) == 9


@pytest.mark.usefixtures("slow")
def test_a_batch_that_gave_way_and_is_not_wanted_any_more_is_forgotten(
    cache: ModelCache,
) -> None:
    """
    At once, and not when it would have its next turn.
    """
    with (
        serving(cache, models=micros(), parallel=1) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        with hearing(client, 10, {"priority": "batch"}) as texts:
            next(texts)
            asked = pool.submit(list, _person(client))
            wait_until(lambda: levels(client) == [-1.0], "the batch to stop")
        wait_until(lambda: under_way(client) == [None], "the batch to be forgotten")
        assert not cache.waiting()
        assert len(asked.result()) == 10
        assert cache.stats().batch_stops == 1


def _person(client: httpx.Client) -> Iterator[str]:
    with hearing(client, 10, {}) as texts:
        yield from texts


def under_way(client: httpx.Client) -> list[str]:
    """
    The priorities of the requests under way, as they were asked for.
    """
    found: list[dict[str, Any]] = client.get("/api/requests").json()["under_way"]
    return [each["priority"] for each in found]


def levels(client: httpx.Client) -> list[float]:
    """
    The priorities of what waits.
    """
    waiting: list[dict[str, Any]] = client.get("/api/ps").json()["waiting"]
    return [each["priority"] for each in waiting]


@pytest.mark.usefixtures("slow")
def test_a_model_that_is_at_work_is_loaded_and_pinned_without_a_turn(
    cache: ModelCache,
) -> None:
    """
    It is there already, whoever waits for a turn with it.
    """
    with (
        serving(cache, models=micros(), parallel=1, timeout_s=1) as client,
        hearing(client, 40, {}) as texts,
    ):
        next(texts)
        for action in ("load", "pin"):
            assert client.post(f"/api/models/{A}/{action}").status_code == 200
        assert transcribe(client, A).status_code == 503


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


def test_a_key_has_a_priority_that_its_requests_do_not_exceed(
    cache: ModelCache,
) -> None:
    """
    They may ask for a later turn. Loads have it, too.
    """
    names = {"film": "night", "talk": "anna", "siren": "chief", "plain": ""}
    keys = {"keys": tuple(names), "key_names": names}
    levels = {"night": "batch", "chief": 1}

    def answer(key: str, priority: str | None = None) -> tuple[int, str | None]:
        client.headers["authorization"] = f"Bearer {key}"
        fields = {} if priority is None else {"priority": priority}
        status = transcribe(client, A, **fields).status_code
        (last, *_) = client.get("/api/requests").json()["lately"]
        return status, last["priority"]

    with serving(cache, models=micros(), **keys, key_priorities=levels) as client:
        assert answer("film") == (200, "batch")
        assert answer("film", "-2") == (200, "-2")
        assert answer("film", "interactive") == (400, None)
        assert answer("talk") == (200, None)
        assert answer("talk", "batch") == (200, "batch")
        assert answer("siren") == (200, "1")
        assert answer("siren", "1.5") == (400, None)
        assert answer("plain", "1") == (400, None)
        client.headers["authorization"] = "Bearer film"
        assert client.post(f"/api/models/{B}/load").status_code == 200
        (last, *_) = client.get("/api/requests").json()["lately"]
        assert last["priority"] == "batch"


def test_priorities_of_keys_are_checked_at_the_start() -> None:
    """
    Of names that no key has, and those that are none.
    """
    names = {"film": "night"}
    with pytest.raises(ValueError, match="no key is called day"):
        ServerOptions(("m",), key_names=names, key_priorities={"day": "batch"})
    late: Any = "late"
    with pytest.raises(ValueError, match="priority must be"):
        ServerOptions(("m",), key_names=names, key_priorities={"night": late})


def test_waiting_requests_are_shown_with_their_priority(cache: ModelCache) -> None:
    """
    In the order in which they are served.
    """
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
        assert levels(client) == [0.0, -1.0, -1.0]
        cache.resize(max_models=2)
        assert all(each.result().status_code == 200 for each in asked)
