"""
Requests that fail, in each way there is, leave nothing behind that refers to a model:
the next one gets its memory while the errors are still being answered.
"""

from __future__ import annotations

import itertools
import threading
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from caches import cache_of
from real import clip, micro
from served import URL, A, B, asking, micros, serving, transcribe

from whispercache import ModelCache, ModelStillReferenced
from whispercache.engine.construct import genuine
from whispercache.engine.naming import ModelSpec
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from whispercache.events import Event
    from whispercache.lease import Lease

pytestmark = pytest.mark.process

ENGLISH = "micro-en"
WORDS = {"timestamp_granularities[]": "word", "response_format": "verbose_json"}

cache = cache_of("module", max_models=1)


@pytest.fixture(scope="module")
def client(cache: ModelCache) -> Iterator[httpx.Client]:
    """
    A server for all failures, whose queue is short.
    """
    english = ModelSpec(ENGLISH, str(micro("micro english", english=True)))
    limits = {"timeout_s": 1.0, "max_upload_bytes": 2_000_000, "max_duration_s": 60.0}
    with serving(cache, models=(*micros(), english), **limits) as client:
        # After a bug, uvicorn ends the connection.
        client.headers["Connection"] = "close"
        yield client


@pytest.fixture
def left(cache: ModelCache) -> Iterator[list[Event]]:
    """
    The events of models that somebody still refers to.
    """
    found: list[Event] = []

    def note(event: Event) -> None:
        if isinstance(event, ModelStillReferenced):
            found.append(event)

    end = cache.subscribe(note)
    yield found
    end()


@contextmanager
def successor(cache: ModelCache, client: httpx.Client) -> Iterator[Lease]:
    """
    Somebody who gets the room of the first model as soon as that is idle, but for the
    lease that is the value; in the end they have got it.
    """
    answers: list[int] = []

    def ask() -> None:
        # Until the time is not over, and nothing is broken.
        while not answers or answers[-1] >= 500:
            answers.append(transcribe(client, B).status_code)

    thread = threading.Thread(target=ask)
    lease = cache.lease(micro("micro a"), "cpu")
    with lease:
        thread.start()
        wait_until(lambda: bool(cache.waiting()), "the successor in the cache")
        yield lease
    thread.join(60)
    assert answers[-1] == 200


def refused(**fields: str) -> Callable[[httpx.Client], None]:
    """
    A request that is refused before it is at work.
    """

    def act(client: httpx.Client) -> None:
        assert transcribe(client, fields.get("model", A), **_rest(fields)).is_error

    return act


def _rest(fields: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in fields.items() if name != "model"}


def broken(client: httpx.Client) -> None:
    """
    Audio that is none.
    """
    data = {"model": A}
    assert client.post(URL, data=data, files={"file": b"x"}).status_code == 400


def too_large(client: httpx.Client) -> None:
    """
    An upload that is refused while it comes.
    """
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    pieces = (bytes(100_000) if i else head for i in range(30))
    kind = {"content-type": "multipart/form-data; boundary=x"}
    with suppress(httpx.WriteError):
        assert client.post(URL, content=pieces, headers=kind).status_code == 413


def left_before(client: httpx.Client) -> None:
    """
    A client that hangs up in mid-upload.
    """
    with asking(client, A, length=1_000_000):
        pass


def phases(client: httpx.Client) -> list[str]:
    """
    The phases of the requests under way.
    """
    found = client.get("/api/requests").json()["under_way"]
    return [each["phase"] for each in found]


def left_in_a_stream(client: httpx.Client) -> None:
    """
    A client that has heard the beginning.
    """
    with (
        Path(clip("en-harbour-long")).open("rb") as file,
        client.stream(
            "POST",
            URL,
            data={"model": A, "stream": "true"},
            files={"file": ("a.flac", file)},
        ) as answer,
    ):
        next(answer.iter_lines())


def timed_out(client: httpx.Client) -> None:
    """
    A request that waits for too long for a third model, if others are in the way.
    """
    assert transcribe(client, ENGLISH).status_code in (200, 503)


def other_forms(client: httpx.Client) -> None:
    """
    Other services' forms, with languages that there are not.
    """
    with Path(clip("en-bread")).open("rb") as file:
        sent = {"audio_file": ("a.flac", file.read())}
    asked = {"language": "xx-YY"}
    assert client.post("/asr", params=asked, files=sent).is_error
    sent = {"file": sent["audio_file"]}
    assert client.post("/inference", data=asked, files=sent).is_error


REFUSED: dict[str, Callable[[httpx.Client], None]] = {
    "a language": refused(language="xx-YY"),
    "an English model's language": refused(model=ENGLISH, language="de"),
    "a temperature": refused(temperature="7"),
    "granularities": refused(**{**WORDS, "response_format": "srt"}),
    "an unknown granularity": refused(**{"timestamp_granularities[]": "letter"}),
    "a model": refused(model="nix"),
    "a keep-alive": refused(keep_alive="soon"),
    "broken audio": broken,
    "an upload too large": too_large,
    "left in mid-upload": left_before,
    "left in a stream": left_in_a_stream,
    "a time-out": timed_out,
    "other forms": other_forms,
}


@pytest.mark.parametrize("name", REFUSED)
def test_who_fails_leaves_no_reference(
    cache: ModelCache, client: httpx.Client, left: list[Event], name: str
) -> None:
    """
    While another waits for the room, and when the model is unloaded by hand.
    """
    act = REFUSED[name]
    with successor(cache, client):
        act(client)
    assert transcribe(client, A).status_code == 200
    act(client)
    wait_until(lambda: not cache.stats().leases, "the end of the request")
    assert cache.evict()
    assert not left


def test_who_hangs_up_leaves_no_reference(
    cache: ModelCache, client: httpx.Client, left: list[Event]
) -> None:
    """
    Though the call goes on, which cannot be stopped, and its model leaves when it ends.
    """
    for _ in range(5):
        with (
            successor(cache, client) as held,
            asking(client, A, clip_name="en-harbour-long"),
        ):
            wait_until(lambda: "working" in phases(client), "the request at work")
            held.release()
    assert not left


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, MemoryError])
@pytest.mark.parametrize(
    "where",
    [
        ("transcribe", 0, {}),
        ("detect_language", 0, {}),
        ("encode", 0, {}),
        ("encode", 1, {"language": "en"}),
        ("encode", 1, {"language": "en", "stream": "true"}),
        ("generate_with_fallback", 0, {"stream": "true"}),
        ("add_word_timestamps", 0, WORDS),
    ],
)
def test_an_error_of_a_model_leaves_no_reference(
    cache: ModelCache,
    client: httpx.Client,
    left: list[Event],
    where: tuple[str, int, dict[str, str]],
    kind: type[Exception],
) -> None:
    """
    Wherever in the model it is, before the answer has begun and after that; what it
    had is taken away in that moment.
    """
    method, calls, fields = where
    plain, count = getattr(genuine().model, method), itertools.count()

    def fail(self: Any, *args: Any, **options: Any) -> object:
        if next(count) >= calls:
            held.release()
            raise kind("it broke")
        return plain(self, *args, **options)

    with ExitStack() as stack:
        held = stack.enter_context(successor(cache, client))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(genuine().model, method, fail)
        with Path(clip("en-harbour-long")).open("rb") as file:
            answer = client.post(
                URL,
                data={"model": A, **fields},
                files={"file": ("a.flac", file)},
            )
        assert "error" in answer.text
    assert not left
