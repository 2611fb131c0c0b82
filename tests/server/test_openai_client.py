"""
The server, as OpenAI's own client sees it: real models, real speech, over real HTTP.
"""

from __future__ import annotations

import io
import itertools
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from caches import cache_of
from real import MIB, clip, packaged, reference
from served import TINY, URL, client_of_real

from whispercache.engine.calls.languages import LANGUAGES
from whispercache.testing import wait_until
from whispercache.transcripts import FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

    from whispercache import ModelCache

pytestmark = pytest.mark.process

BREAD = "en-bread"
TRAIN = "de-zug"


def opened(name: str) -> tuple[str, io.BytesIO]:
    """
    A clip as an upload.
    """
    with Path(clip(name)).open("rb") as file:
        return f"{name}.flac", io.BytesIO(file.read())


def words(text: str) -> set[str]:
    """
    The words of a text, case and punctuation aside.
    """
    return {word.strip(".,!?").lower() for word in text.split()}


cache = cache_of("module", keep_alive=-1, variants=False)
http = client_of_real()


@pytest.fixture
def client(http: httpx.Client) -> Iterator[openai.OpenAI]:
    """
    OpenAI's client of that server.
    """
    with openai_of(http) as client:
        yield client


@contextmanager
def openai_of(http: httpx.Client, key: str = "any") -> Iterator[openai.OpenAI]:
    """
    OpenAI's client of a server. It would try again by itself, and hide what happened.
    """
    base_url = str(http.base_url).rstrip("/") + "/v1"
    with openai.OpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
        yield client


def test_a_transcription_is_what_was_said(client: openai.OpenAI) -> None:
    """
    The plainest call of OpenAI's client works unchanged.
    """
    heard = client.audio.transcriptions.create(model=TINY, file=opened(BREAD))
    assert words(heard.text) == words(reference(BREAD))
    assert heard.usage is not None
    assert heard.usage.type == "duration"
    assert heard.usage.seconds == 3


def test_openais_name_is_the_first_model(client: openai.OpenAI) -> None:
    """
    Clients that can only ask for whisper-1 are served.
    """
    heard = client.audio.transcriptions.create(model="whisper-1", file=opened(BREAD))
    assert words(heard.text) == words(reference(BREAD))
    assert client.models.retrieve("whisper-1").id == "whisper-1"


# OpenAI now calls translations old; they are still there.
@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_a_translation_is_english(client: openai.OpenAI) -> None:
    """
    Whatever language was spoken.
    """
    heard = client.audio.translations.create(model="base:int8", file=opened(TRAIN))
    text = client.audio.transcriptions.create(model="base:int8", file=opened(TRAIN))
    assert "Zug" in text.text
    assert heard.text
    assert "Zug" not in heard.text


def test_plain_formats_are_text(client: openai.OpenAI) -> None:
    """
    As the same formats on the command line.
    """
    for kind in ("text", "srt", "vtt"):
        heard: Any = client.audio.transcriptions.create(
            model=TINY, file=opened(BREAD), response_format=kind
        )
        assert isinstance(heard, str)
        assert "bread" in heard
        assert ("-->" in heard) is (kind in FORMATS)
        assert heard.startswith("WEBVTT") is (kind == "vtt")


def test_verbose_answers_have_segments(client: openai.OpenAI) -> None:
    """
    With what Whisper tells of each, and the language.
    """
    heard = client.audio.transcriptions.create(
        model="base:int8", file=opened(TRAIN), response_format="verbose_json"
    )
    assert heard.language == "german"
    assert float(heard.duration) == pytest.approx(3, abs=1)
    assert heard.segments
    assert "".join(segment.text for segment in heard.segments).strip() == heard.text
    (first, *_) = heard.segments
    assert first.tokens
    assert -2 < first.avg_logprob < 0
    assert heard.words is None


@pytest.mark.parametrize("kinds", [["word"], ["word", "segment"], ["segment"]])
def test_verbose_answers_have_the_granularities_asked_for(
    client: openai.OpenAI, kinds: list[Any]
) -> None:
    """
    Words in the order in which they were said.
    """
    heard = client.audio.transcriptions.create(
        model=TINY,
        file=opened(BREAD),
        response_format="verbose_json",
        timestamp_granularities=kinds,
    )
    assert (heard.segments is not None) is ("segment" in kinds)
    assert (heard.words is not None) is ("word" in kinds)
    for word, following in itertools.pairwise(heard.words or []):
        assert word.start <= word.end <= following.end
    if heard.words:
        assert words(" ".join(word.word for word in heard.words)) == words(heard.text)


def test_a_stream_tells_the_text_as_it_is_heard(client: openai.OpenAI) -> None:
    """
    The pieces make up the whole that comes last.
    """
    stream = client.audio.transcriptions.create(
        model=TINY, file=opened("en-two-voices"), stream=True
    )
    events = list(stream)
    pieces = [e.delta for e in events if e.type == "transcript.text.delta"]
    (done,) = [e for e in events if e.type == "transcript.text.done"]
    assert events[-1] is done
    assert "".join(pieces).strip() == done.text
    assert words(done.text) & words(reference("en-two-voices"))


def test_languages_have_the_names_that_openai_has_for_them() -> None:
    """
    All of those that a model can tell apart.
    """
    from faster_whisper.tokenizer import _LANGUAGE_CODES

    assert set(LANGUAGES) == set(_LANGUAGE_CODES)
    assert LANGUAGES["ht"] == "haitian creole"
    assert len(set(LANGUAGES.values())) == len(LANGUAGES)


def test_prompt_language_and_temperature_reach_the_model(
    client: openai.OpenAI,
) -> None:
    """
    Each changes what is heard, or how it is written.
    """
    heard = client.audio.transcriptions.create(
        model="base:int8",
        file=opened(TRAIN),
        language="en",
        response_format="verbose_json",
        temperature=0.5,
        prompt="Zug, Berlin",
    )
    assert heard.language == "english"
    assert heard.segments
    assert heard.segments[0].temperature == 0.5


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    """
    Those that are served, and no others.
    """
    assert [model.id for model in client.models.list()] == [TINY, "base:int8"]
    with pytest.raises(openai.NotFoundError, match="large-v3"):
        client.models.retrieve("large-v3")


def test_nothing_but_what_is_served_can_be_had(
    client: openai.OpenAI, cache: ModelCache
) -> None:
    """
    No other size, no path, not even that of a model that is served.
    """
    before = cache.stats().requests
    for name in ("small", "large-v3", str(packaged(TINY)), "../tiny.en", "", "/etc"):
        with pytest.raises(openai.APIStatusError) as caught:
            client.audio.transcriptions.create(model=name, file=opened(BREAD))
        assert caught.value.status_code in (400, 404), name
    assert cache.stats().requests == before


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"language": "tlh"}, "language"),
        ({"language": "de"}, "language"),
        ({"temperature": 2}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"response_format": "xml"}, "response_format"),
        ({"timestamp_granularities": ["word"]}, "timestamp_granularities"),
        ({"response_format": "diarized_json"}, "response_format"),
        ({"known_speaker_names": ["agent"]}, "known_speaker_names"),
        ({"known_speaker_references": ["data:"]}, "known_speaker_references"),
        ({"include": ["logprobs"], "response_format": "vtt"}, "include"),
        ({"include": ["words"]}, "include"),
        ({"chunking_strategy": "never"}, "chunking_strategy"),
        ({"extra_body": {"chunking_strategy": "{"}}, "chunking_strategy"),
        ({"extra_body": {"batch_size": 0}}, "batch_size"),
        ({"extra_body": {"batch_size": 4, "vad_filter": False}}, "batch_size"),
        ({"extra_body": {"temperature[]": ["0", "2"]}}, "temperature"),
        ({"extra_body": {"temperature[]": "0,0.5", "batch_size": 4}}, "temperature"),
        ({"extra_body": {"seed": 7}, "temperature": 0.5}, "seed"),
        ({"extra_body": {"hotwords": "a" * 801}}, "hotwords"),
        ({"languages": ["de", "fr"]}, "languages"),
        ({"languages": ["tlh"]}, "languages"),
        ({"extra_body": {"keep_alive": "soon"}}, "keep_alive"),
        ({"prompt": "a" * 10_001}, "prompt"),
        ({"file": ("a.wav", b"")}, "file"),
        ({"file": ("a.wav", b"RIFF, or so")}, "file"),
    ],
)
def test_nonsense_is_refused_in_openais_shape(
    client: openai.OpenAI, options: dict[str, Any], param: str
) -> None:
    """
    With the parameter that is to blame.
    """
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.transcriptions.create(
            **{"model": TINY, "file": opened(BREAD), **options}
        )
    error: Any = caught.value.body
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]


def test_languages_go_by_code_or_name_and_granularities_with_or_without_brackets(
    http: httpx.Client,
) -> None:
    """
    Clients differ.
    """
    name, audio = opened(TRAIN)
    fields = {"model": "base:int8", "response_format": "verbose_json"}
    for language, brackets in (("German", ""), ("DE", "[]"), ("german", "[]")):
        answer = http.post(
            URL,
            data={
                **fields,
                "language": language,
                f"timestamp_granularities{brackets}": "word",
            },
            files={"file": (name, audio)},
        )
        audio.seek(0)
        assert answer.json()["language"] == "german", answer.text
        assert answer.json()["words"]


# OpenAI now calls translations old; they are still there.
@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_a_model_of_english_alone_translates_nothing(client: openai.OpenAI) -> None:
    """
    It would write nonsense.
    """
    with pytest.raises(openai.BadRequestError, match="English only"):
        client.audio.translations.create(model=TINY, file=opened(TRAIN))


def test_keep_alive_is_ollamas(http: httpx.Client, client: openai.OpenAI) -> None:
    """
    0 lets the model leave at once; what is in memory, and until when, is told.
    """
    client.audio.transcriptions.create(
        model="base:int8", file=opened(BREAD), extra_body={"keep_alive": "10m"}
    )
    (model,) = [
        m for m in http.get("/api/ps").json()["models"] if m["name"] == "base:int8"
    ]
    assert 590 < model["expires_in_s"] <= 600
    assert model["state"] == "resident"
    assert model["leases"] == 0
    assert 50 * MIB < model["weights_bytes"] < 200 * MIB
    client.audio.transcriptions.create(
        model="base:int8", file=opened(BREAD), extra_body={"keep_alive": 0}
    )

    def names() -> list[str]:
        return [m["name"] for m in http.get("/api/ps").json()["models"]]

    wait_until(lambda: "base:int8" not in names(), "it to leave")


def test_a_language_costs_no_second_lease(
    http: httpx.Client, cache: ModelCache, client: openai.OpenAI
) -> None:
    """
    A model that leaves at once is loaded once for a request.
    """
    http.delete("/api/models/base:int8")
    before = cache.stats()
    client.audio.transcriptions.create(
        model="base:int8",
        file=opened(TRAIN),
        language="de",
        extra_body={"keep_alive": 0},
    )
    after = cache.stats()
    assert after.requests == before.requests + 1
    assert after.loads == before.loads + 1


def test_models_are_resources(http: httpx.Client) -> None:
    """
    To be loaded, pinned, unpinned and evicted by name.
    """

    def present() -> dict[str, Any]:
        models = http.get("/api/ps").json()["models"]
        return {model["name"]: model for model in models}

    def done(method: str, path: str) -> str:
        answer = http.request(method, f"/api/models/{path}")
        assert answer.status_code == 200, answer.text
        return str(answer.json()["status"])

    assert done("POST", "base:int8/load") == "loaded"
    assert present()["base:int8"]["pinned"] is False
    assert done("POST", "base:int8/pin") == "pinned"
    assert present()["base:int8"]["pinned"] is True
    assert done("DELETE", "base:int8/pin") == "unpinned"
    assert done("DELETE", "base:int8/pin") == "absent"
    assert present()["base:int8"]["pinned"] is False
    assert done("DELETE", "base:int8") == "evicted"
    assert "base:int8" not in present()
    assert done("DELETE", "base:int8") == "absent"
    for method, path in (
        ("POST", "nope/load"),
        ("POST", "nope/pin"),
        ("DELETE", "nope"),
    ):
        answer = http.request(method, f"/api/models/{path}")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


def test_a_load_can_say_how_long_the_model_stays(http: httpx.Client) -> None:
    """
    With Ollama's keep_alive.
    """
    answer = http.post("/api/models/tiny.en/load", params={"keep_alive": "7m"})
    assert answer.status_code == 200
    (model,) = [m for m in http.get("/api/ps").json()["models"] if m["name"] == TINY]
    assert 410 < model["expires_in_s"] <= 420
    answer = http.post("/api/models/tiny.en/load", params={"keep_alive": "ever"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "keep_alive"


def test_the_metrics_are_those_of_the_cache(http: httpx.Client) -> None:
    """
    For Prometheus, beside those of the process.
    """
    http.post("/api/models/tiny.en/load")
    text = http.get("/metrics").text
    for name in (
        "whispercache_requests_total",
        "whispercache_loads_total",
        "whispercache_load_seconds_bucket",
        "process_resident_memory_bytes",
    ):
        assert f"\n{name}" in text, name


def test_what_happened_is_told(http: httpx.Client) -> None:
    """
    By the names that clients know; no path of the machine is among them.
    """
    http.post("/api/models/tiny.en/load")  # no test before may have needed it
    http.delete("/api/models/tiny.en")
    http.post("/api/models/tiny.en/load")
    seen = http.get("/api/ps")
    kinds = [e["kind"] for e in seen.json()["events"] if e["model"] == TINY]
    assert {"evicted", "loading", "loaded"} <= set(kinds)
    assert str(packaged(TINY)) not in seen.text


def test_an_unknown_path_is_a_404_in_openais_shape(http: httpx.Client) -> None:
    """
    Like every other answer that is no success.
    """
    for method, path, status in (("GET", "/nix", 404), ("PUT", "/v1/models", 405)):
        answer = http.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_method_that_a_path_does_not_know_is_told_those_it_knows(
    http: httpx.Client,
) -> None:
    """
    All of them, in whichever routes they are.
    """
    for path, methods in (
        ("/v1/models", "GET, HEAD"),
        ("/healthz", "GET, HEAD"),
        ("/api/models/tiny.en/pin", "DELETE, POST"),
    ):
        assert http.put(path).headers["allow"] == methods
    for path in ("/", "/health", "/healthz", "/readyz", "/v1/models", "/metrics"):
        assert http.head(path).status_code == 200
        assert http.head(path).content == b""


def test_a_scraper_that_asks_for_an_unknown_format_gets_the_plain_one(
    http: httpx.Client,
) -> None:
    """
    However little sense its version makes.
    """
    kind = "application/openmetrics-text"
    for version in ("1.0.0", "abc"):
        headers = {"accept": f"{kind}; version={version}"}
        answer = http.get("/metrics", headers=headers)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith((kind, "text/plain"))
        assert "whispercache_requests_total" in answer.text


def test_the_schema_describes_itself(http: httpx.Client) -> None:
    """
    Nothing in it names another site.
    """
    schema = http.get("/openapi.json").json()
    assert URL in schema["paths"]
    page = http.get("/docs").text
    assert "//" not in page.replace("https://app.example", "")
    for path in schema["paths"]:
        assert path in page
    for field in ("timestamp_granularities[]", "audio_file", "temperature_inc"):
        assert f"<td>{field}<td>" in page
    assert http.get("/page/docs.css").status_code == 200


def test_no_temporary_file_stays(
    http: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Not of what was heard, nor of what could not be.
    """
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    name, audio = opened(BREAD)
    for file in (audio, io.BytesIO(b"no audio"), io.BytesIO(b"\0" * 3 * MIB)):
        for stream in ("true", "false"):
            http.post(
                URL,
                data={"model": TINY, "stream": stream},
                files={"file": (name, file)},
            )
            file.seek(0)
    assert not list(tmp_path.iterdir())
