"""
What clients of other services send by default, and what their answers tell: real
models, real speech.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shlex
from html import escape, unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
from caches import cache_of
from real import clip, micro, reference
from served import (
    CLIP,
    TINY,
    URL,
    client_of_micro,
    client_of_real,
    error_of,
    micros,
    multipart,
    options_of,
    serving,
)
from starlette.testclient import TestClient

from whispercache.comparison.score import normalise
from whispercache.engine.naming import ModelSpec
from whispercache.server import answers, create_app
from whispercache.testing import wait_until

if TYPE_CHECKING:
    import httpx

    from whispercache import ModelCache

pytestmark = pytest.mark.process

BREAD = CLIP.read_bytes()
BASE = "base:int8"

cache = cache_of("module", keep_alive=-1, variants=False)
http = client_of_real()
client = client_of_micro()


def heard(http: httpx.Client, audio: bytes = BREAD, **fields: Any) -> httpx.Response:
    """
    The answer to a request for a transcript.
    """
    fields.setdefault("model", TINY)
    answer = http.post(URL, data=fields, files={"file": ("a.flac", audio)})
    assert answer.status_code == 200, answer.text
    return answer


def wav(samples: np.ndarray[Any, Any]) -> bytes:
    """
    Samples as a file.
    """
    import io
    import wave

    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((samples * 32_767).astype("<i2").tobytes())
    return out.getvalue()


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """
    The events of a stream.
    """
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


# Names --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "served"),
    [
        ("whisper-1", TINY),
        ("gpt-4o-mini-transcribe", TINY),
        ("gpt-4o-transcribe-diarize", TINY),
        ("base", BASE),
        ("openai/whisper-base", BASE),
        ("Systran/faster-whisper-tiny.en", TINY),
    ],
)
def test_the_answer_tells_which_model_it_is_of(
    http: httpx.Client, name: str, served: str
) -> None:
    """
    Which is not the one that was named; there is a resource of that name, too.
    """
    answer = heard(http, model=name)
    assert answer.headers["whispercache-model"] == served
    assert http.get(f"/v1/models/{name}").json()["id"] == name
    assert [m["id"] for m in http.get("/v1/models").json()["data"]] == [TINY, BASE]


def test_strict_names_and_another_default(cache: ModelCache) -> None:
    """
    As options of the server.
    """
    with serving(cache, models=micros(), strict_names=True) as client:
        for name in ("whisper-1", "gpt-transcribe", "base"):
            assert client.get(f"/v1/models/{name}").status_code == 404
    with serving(cache, models=micros(), default="micro-b") as client:
        assert heard(client, model="whisper-1").json()["text"] == "micro b"


# Fields -------------------------------------------------------------------------------


def test_silence_is_no_speech(http: httpx.Client) -> None:
    """
    Unless a request wants to hear it: then the model makes up a word.
    """
    silence = wav(np.zeros(3 * 16_000))
    for model in (TINY, BASE):
        assert heard(http, silence, model=model).json()["text"] == ""
        assert heard(http, silence, model=model, vad_filter="false").json()["text"]
        stream = events(heard(http, silence, model=model, stream="true"))
        assert [event["type"] for event in stream] == ["transcript.text.done"]


def test_a_server_may_hear_all_by_default(cache: ModelCache) -> None:
    """
    As its operator wishes; a request has the last word.
    """
    silence = wav(np.zeros(3 * 16_000))
    with serving(cache, TINY, vad=False) as client:
        assert heard(client, silence).json()["text"]
        assert heard(client, silence, vad_filter="on").json()["text"] == ""


@pytest.mark.parametrize("form", ["fields", "json", "auto"])
def test_a_chunking_strategy_is_pauses_and_batches(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """
    In either spelling of its parameters.
    """
    from faster_whisper import BatchedInferencePipeline

    asked: list[Any] = []
    plain = BatchedInferencePipeline.transcribe

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        asked.append((options["batch_size"], options.get("vad_parameters")))
        return plain(self, *args, **options)

    monkeypatch.setattr(BatchedInferencePipeline, "transcribe", noted)
    fields: dict[str, Any] = {
        "fields": {
            "chunking_strategy[type]": "server_vad",
            "chunking_strategy[threshold]": "0.4",
        },
        "json": {"chunking_strategy": '{"type": "server_vad", "threshold": 0.4}'},
        "auto": {"chunking_strategy": "auto"},
    }[form]
    audio = Path(clip("en-harbour-long")).read_bytes()
    answer = heard(http, audio, **fields).json()
    ((size, parameters),) = asked
    # Of 36 s there are no more windows than these.
    assert size == 3
    assert (parameters or {}).get("threshold") == (None if form == "auto" else 0.4)
    said = normalise(reference("en-harbour-long"), "en").split()
    found = normalise(answer["text"], "en").split()
    assert abs(len(found) - len(said)) <= 3
    # Subtitles are cut at pauses, too, but a window of a batch would be one cue.
    cues = heard(http, audio, **fields, response_format="srt").text
    assert cues.count("-->") > 2
    assert len(asked) == 1


def test_openais_own_client_sends_all_of_it(http: httpx.Client) -> None:
    """
    With the types that it has for fields and answers.
    """
    url = str(http.base_url.join("/v1"))
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
        answer: Any = client.audio.transcriptions.create(
            model="gpt-4o-transcribe",
            file=("a.flac", BREAD),
            chunking_strategy={"type": "server_vad", "threshold": 0.4},
            include=["logprobs"],
            keywords=["grandmother", "bread"],
            languages=["en", "de"],
        )
        assert answer._request_id
        text = "".join(each.token for each in answer.logprobs)
        assert text.strip() == answer.text
        assert [each.code for each in answer.languages] == ["en"]
        kinds: tuple[Any, ...] = ("json", "text", "srt", "vtt", "verbose_json")
        for kind in kinds:
            stream: Any = client.audio.transcriptions.create(
                model="whisper-1",
                file=("a.flac", BREAD),
                stream=True,
                response_format=kind,
            )
            *deltas, done = list(stream)
            assert done.type == "transcript.text.done"
            text = "".join(each.delta for each in deltas)
            assert text.strip() == done.text.strip()
            assert ("-->" in text) is (kind in ("srt", "vtt"))


def test_log_probabilities_come_word_by_word(http: httpx.Client) -> None:
    """
    In a stream with each piece, and all of them at the end.
    """
    fields: dict[str, Any] = {"include[]": "logprobs"}
    plain = heard(http, **fields).json()
    *deltas, done = events(heard(http, **fields, stream="true"))
    assert done["logprobs"] == plain["logprobs"]
    assert [each for delta in deltas for each in delta["logprobs"]] == plain["logprobs"]
    assert all(-20 < each["logprob"] <= 0 for each in plain["logprobs"])
    assert math.exp(plain["logprobs"][-1]["logprob"]) > 0.5


def test_a_stream_of_verbose_json_ends_with_all_of_it(http: httpx.Client) -> None:
    """
    LiteLLM asks for it by itself. The end has what the answer without a stream has.
    """
    fields: dict[str, Any] = {
        "response_format": "verbose_json",
        "timestamp_granularities[]": ["word", "segment"],
    }
    plain = heard(http, **fields).json()
    *_, done = events(heard(http, **fields, stream="true"))
    assert {name: done[name] for name in plain} == plain
    assert done["usage"] == {"type": "duration", "seconds": 3}


def test_of_several_languages_the_likeliest_is_taken(http: httpx.Client) -> None:
    """
    Though another one is spoken.
    """
    audio = Path(clip("de-zug")).read_bytes()
    fields: dict[str, Any] = {"model": BASE, "response_format": "verbose_json"}
    assert heard(http, audio, **fields).json()["language"] == "german"
    answer = heard(http, audio, **fields, **{"languages[]": ["de", "en"]}).json()
    assert answer["language"] == "german"
    fields["chunking_strategy"] = '{"type": "server_vad", "threshold": 0.4}'
    answer = heard(http, audio, **fields, **{"languages[]": ["ja", "en"]}).json()
    assert answer["language"] in ("japanese", "english")


def test_hot_words_leave_room_for_what_is_said(http: httpx.Client) -> None:
    """
    However many tokens they are, in each window of a long recording.
    """
    audio = Path(clip("en-harbour-long")).read_bytes()
    for words in ("harbour summer fishermen " * 32, "\N{GOTHIC LETTER HWAIR}" * 200):
        answer = heard(http, audio, hotwords=words[:800].strip())
        text = answer.json()["text"].lower()
        assert "harbo" in text
        assert text.rstrip(".").endswith("next summer")


def test_a_seed_is_the_same_text_again(http: httpx.Client) -> None:
    """
    In noise, where Whisper would try again and draw its words.
    """
    noise = wav(0.2 * np.random.default_rng(5).standard_normal(6 * 16_000).clip(-4, 4))
    fields: dict[str, Any] = {
        "vad_filter": "false",
        "seed": "7",
        "response_format": "verbose_json",
    }
    answers_ = [heard(http, noise, **fields).json() for _ in range(2)]
    assert answers_[0] == answers_[1]
    assert all(each["temperature"] == 0 for each in answers_[0]["segments"])


def test_no_cue_ends_after_the_audio(http: httpx.Client) -> None:
    """
    Whisper's segments may, since it hears windows of 30 s.
    """
    for name in ("en-bread", "en-weather", "en-garden"):
        audio = Path(clip(name)).read_bytes()
        answer = heard(http, audio, response_format="verbose_json").json()
        ends = [each["end"] for each in answer["segments"]]
        assert 0 < max(ends) <= answer["duration"]


def test_srt_is_plain_text(http: httpx.Client) -> None:
    """
    As OpenAI's.
    """
    kind = heard(http, response_format="srt").headers["content-type"]
    assert kind == "text/plain; charset=utf-8"


def test_unknown_fields_are_told_and_refused_if_strict(
    cache: ModelCache, client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    """
    In the answer and, once for each name, in the log.
    """
    answers._logged.clear()
    parts = multipart(
        ('name="model"', "", b"m"),
        ('name="file"; filename="a"', "", BREAD),
        ('name="beam_width"', "", b"5"),
        ('name="näme"', "", b"5"),
    )
    with caplog.at_level(logging.WARNING, "whispercache"):
        for _ in range(2):
            answer = client.post(URL, **parts)
            assert answer.status_code == 200
            told = answer.headers["whispercache-warning"]
            assert told == "unknown fields: 'beam_width', 'n\\xe4me'"
    (record,) = [r for r in caplog.records if "unknown fields" in r.getMessage()]
    assert "beam_width" in record.getMessage()
    assert "whispercache-warning" not in client.post(URL).headers
    with TestClient(create_app(options_of(strict=True), cache)) as strict:
        answer = strict.post(URL, **parts)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == ("beam_width", "unknown_parameter")


# Addresses ----------------------------------------------------------------------------


def test_each_answer_has_an_id(client: TestClient) -> None:
    """
    The client's own, if it is a proper one; refusals have one, too.
    """
    ids = {client.get(path).headers["x-request-id"] for path in ("/nix", "/healthz")}
    assert len(ids) == 2
    assert all(each.startswith("req_") for each in ids)
    sent = {"x-request-id": "trace-7.a:b"}
    assert client.get("/", headers=sent).headers["x-request-id"] == "trace-7.a:b"
    for odd in ("a b", "", "x" * 200, "\xe4"):
        answer = client.get("/", headers=[(b"x-request-id", odd.encode("latin-1"))])
        assert answer.headers["x-request-id"].startswith("req_")


def test_a_slash_at_the_end_means_nothing(client: TestClient) -> None:
    """
    No upload is sent twice for it.
    """
    file = {"file": ("a", BREAD)}
    answer = client.post(
        f"{URL}/", data={"model": "m"}, files=file, follow_redirects=False
    )
    assert answer.status_code == 200
    for path in ("/v1/models/", "/v1/models/m/", "/healthz/", "/metrics/", "/docs/"):
        assert client.get(path, follow_redirects=False).status_code == 200, path


@pytest.mark.parametrize(
    "path",
    ["//v1/models", "/v1//models", "///v1///models/m", "//healthz", "//", "//docs/"],
)
def test_slashes_of_a_base_url_mean_nothing(client: TestClient, path: str) -> None:
    """
    At its end, before a path that begins with one.
    """
    url = f"http://testserver{path}"
    assert client.get(url, follow_redirects=False).status_code == 200, path


@pytest.mark.parametrize(
    "query",
    [
        "vad_filter=&encode=&task=&output=&language=&word_timestamps=&model=",
        "vad_filter&initial_prompt=&unknown=",
        "output=txt&language=&word_timestamps=",
    ],
)
def test_a_parameter_without_a_value_is_none(client: TestClient, query: str) -> None:
    """
    As a field of a form without one is.
    """
    answer = client.post(f"/asr?{query}", files={"audio_file": ("a", BREAD)})
    assert answer.status_code == 200, answer.text
    assert "whispercache-warning" not in answer.headers
    assert client.post("/api/models/m/load?keep_alive=").status_code == 200


def test_a_head_is_a_get_without_its_body(client: TestClient) -> None:
    """
    With the same headers, the length among them.
    """
    for path in ("/", "/docs", "/v1/models", "/v1/models/m", "/page/app.js", "/nix"):
        head, get = client.head(path), client.get(path)
        assert head.status_code == get.status_code, path
        assert head.content == b""
        assert head.headers["content-length"] == get.headers["content-length"]
    assert client.head(URL).status_code == 405


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("/audio/transcriptions", URL),
        ("/v1/v1/audio/transcriptions", URL),
        ("/api/v1/audio/transcriptions", URL),
        ("/audio/translations/", "/v1/audio/translations"),
        ("/models", "/v1/models"),
        ("/v1/v1/models", "/v1/models"),
    ],
)
def test_a_wrong_base_url_is_told_the_right_one(
    client: TestClient, wrong: str, right: str
) -> None:
    """
    In the 404 that its client shows.
    """
    answer = client.get(wrong)
    assert answer.status_code == 404
    message = answer.json()["error"]["message"]
    assert f"it is {right}:" in message
    assert "base URL" in message
    assert "base URL" not in client.get("/nix").json()["error"]["message"]


def test_health_has_the_words_of_other_servers(cache: ModelCache) -> None:
    """
    Without a key.
    """
    with TestClient(create_app(options_of(keys=("secret",)), cache)) as client:
        assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("keys", [(), ("secret",)])
@pytest.mark.parametrize("strict", [False, True])
def test_the_page_of_the_api_has_an_example_that_works(
    cache: ModelCache, keys: tuple[str, ...], *, strict: bool
) -> None:
    """
    With a key where one is asked for; strangers read no name of a model, but what the
    page refers to.
    """
    name = "m & s"
    options = options_of(
        models=(ModelSpec(name, str(micro("micro says hello"))),),
        strict_names=strict,
        keys=keys,
    )
    with TestClient(create_app(options, cache)) as client:
        page = client.get("/docs").text
        assert client.get("/openapi.json").status_code == 200
        assert (escape(name) in page) is (strict and not keys)
        # As a shell reads it, with what it leaves to its reader.
        text = page[page.index("<pre>") : page.index("</pre>")]
        text = unescape(re.sub("<[^>]+>", "", text)).replace("\\\n", " ")
        text = text.replace("one of /v1/models", f"'{name}'").replace("$KEY", "secret")
        command, *words, url = shlex.split(text)
        pairs = list(zip(words[::2], words[1::2], strict=True))
        fields = dict(each.split("=") for option, each in pairs if option == "-F")
        headers = dict(each.split(": ") for option, each in pairs if option == "-H")
        assert (command, fields.pop("file")) == ("curl", "@talk.wav")
        answer = client.post(
            url.removeprefix("address"),
            headers=headers,
            data=fields,
            files={"file": ("talk.wav", BREAD)},
        )
        assert answer.status_code == 200, answer.text
        assert answer.headers["whispercache-model"] == name


PYTHONS = re.compile(r"\b(None|True|False|boolean|dict\w*|instance|\w+Error)\b|<class")


def test_refusals_are_in_the_words_of_http(client: TestClient) -> None:
    """
    Of nonsense in every field of every form, and of a form without its file; so is the
    page of the API.
    """
    schema = client.get("/openapi.json").json()
    told = [client.get("/docs").text]
    for path, operation in schema["paths"].items():
        if "multipart/form-data" not in str(operation.get("post")):
            continue
        (body,) = operation["post"]["requestBody"]["content"].values()
        form = schema["components"]["schemas"][body["schema"]["$ref"].split("/")[-1]]
        query = [each["name"] for each in operation["post"].get("parameters", ())]
        (part,) = (name for name in form["properties"] if name.endswith("file"))
        told.append(client.post(path, data={"model": "m"}).json()["error"]["message"])
        for name in {*query, *form["properties"]} - {part}:
            for value in ("nonsense", "{}", '{"type": []}', "x" * 11_000):
                answer = client.post(
                    path,
                    params={name: value} if name in query else {},
                    data={"model": "m", name: value},
                    files={part: ("a", BREAD)},
                )
                if answer.is_error:
                    told.append(answer.json()["error"]["message"])
    assert len(told) > 100
    assert [each for each in told if PYTHONS.search(each)] == []
    assert f"{part}: send the audio as a file of a multipart form" in told


# Other servers' forms -----------------------------------------------------------------


def samples() -> bytes:
    """
    A clip as Bazarr sends it: 16 bits, mono, 16 kHz, and no header.
    """
    from real import decode_audio

    heard_ = decode_audio(clip("en-bread"))
    return (heard_ * 32_767).astype("<i2").tobytes()


@pytest.mark.parametrize("output", ["txt", "srt", "vtt", "tsv", "json"])
def test_whisper_asr_webservice(http: httpx.Client, output: str) -> None:
    """
    Samples and files, in each of its formats, all of them as plain text.
    """
    files = [(samples(), "false"), (BREAD, "true")]
    answers_ = [
        http.post(
            "/asr",
            params={
                "output": output,
                "encode": encode,
                "task": "transcribe",
                "language": "en",
            },
            files={"audio_file": audio},
        )
        for audio, encode in files
    ]
    for answer in answers_:
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert "grandmother bakes bread" in answer.text
    assert answers_[0].text.count("\n") == answers_[1].text.count("\n")
    if output == "json":
        found = json.loads(answers_[0].text)
        assert found["language"] == "en"
        assert found["segments"][0]["text"].strip() == found["text"]
        assert found["segments"][0]["tokens"]
    if output == "tsv":
        start, end, text = answers_[0].text.splitlines()[1].split("\t")
        assert int(start) < int(end) <= 3000
        assert text


def test_what_whisper_asr_webservice_does_not_read_is_told(http: httpx.Client) -> None:
    """
    Its parameters are in the address; in the form they would mean nothing.
    """
    for path in ("/asr", "/detect-language"):
        answer = http.post(
            path,
            params={"diarize": "true"},
            files={"audio_file": BREAD},
            data={"task": "translate"},
        )
        assert answer.status_code == 200, answer.text
        told = answer.headers["whispercache-warning"]
        assert told == "unknown fields: 'diarize', 'task'"


def test_whisper_asr_webservice_detects_and_translates(http: httpx.Client) -> None:
    """
    With a model that can, which the request may name; the lease is given back.
    """
    audio = {"audio_file": ("a.flac", Path(clip("de-zug")).read_bytes())}
    query = {"model": "base"}
    answer = http.post("/detect-language", params=query, files=audio).json()
    assert (answer["detected_language"], answer["language_code"]) == ("german", "de")
    assert 0.5 < answer["confidence"] <= 1
    answer = http.post("/detect-language", files=audio).json()
    assert (answer["language_code"], answer["confidence"]) == ("en", 1)
    text = http.post("/asr", params={**query, "task": "translate"}, files=audio).text
    assert text.strip()
    assert "Zug" not in text
    wait_until(
        lambda: all(m["leases"] == 0 for m in http.get("/api/ps").json()["models"]),
        "the leases",
    )
    refused = http.post("/asr", params={"output": "pdf"}, files=audio)
    assert refused.status_code == 400
    assert error_of(refused)["param"] == "output"
    # Bazarr's button for a test asks for it.
    assert http.get("/status").json()["version"].startswith("whispercache ")


def test_whisper_cpp(http: httpx.Client) -> None:
    """
    Its fields that mean nothing here are told.
    """
    fields = {"temperature": "0.0", "temperature_inc": "0.2"}
    for kind in ("json", "text", "srt", "vtt", "verbose_json"):
        answer = http.post(
            "/inference",
            data={**fields, "response_format": kind, "no_speech_thold": "0.6"},
            files={"file": ("a.flac", BREAD)},
        )
        assert answer.status_code == 200, answer.text
        assert "grandmother bakes bread" in answer.text
        assert "no_speech_thold" in answer.headers["whispercache-warning"]
