"""
Forms of all clients: spellings of lists, words, parts and names of files.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import openai
import pytest
from caches import cache_of
from real import micro_copy
from served import BOUNDARY, CLIP, URL, client_of_micro, multipart, options_of, serving
from starlette.testclient import TestClient

from whispercache.engine.loader import FasterWhisperLoader
from whispercache.engine.naming import ModelSpec
from whispercache.server import create_app
from whispercache.server.forms import _in_one_spelling

if TYPE_CHECKING:
    from pathlib import Path

    from whispercache import ModelCache

pytestmark = pytest.mark.process

NAME = "timestamp_granularities"

cache = cache_of("module", ram="2GiB", variants=False)
client = client_of_micro()


def ask(client: TestClient, *fields: tuple[str, str], **more: str) -> Any:
    """
    The answer to a request with these fields, in this order.
    """
    usual = {"model": "m", "response_format": "verbose_json", **more}
    parts = [
        (f'name="{name}"', "", value.encode())
        for name, value in (*usual.items(), *fields)
    ]
    audio = ('name="file"; filename="a.flac"', "", CLIP.read_bytes())
    return client.post(URL, **multipart(*parts, audio))


WORD, BOTH = ["word"], ["segment", "word"]


SPELLINGS: list[tuple[list[tuple[str, str]], list[str]]] = [
    ([(f"{NAME}[]", "word")], WORD),
    ([(NAME, "word")], WORD),
    ([(f"{NAME}[0]", "word")], WORD),
    ([(f"{NAME}[1]", "segment"), (f"{NAME}[0]", "word")], BOTH),
    ([(f"{NAME}[0][]", "word")], WORD),
    ([(f"{NAME}.0", "word")], WORD),
    ([(f"{NAME}%5B%5D", "word")], WORD),
    ([(NAME, "segment"), (NAME, "word")], BOTH),
    ([(f"{NAME}[]", "segment"), (f"{NAME}[]", "word")], BOTH),
    ([(f"{NAME}[]", "segment"), (NAME, "word")], BOTH),
    ([(NAME, "segment"), (f"{NAME}[1]", "word")], BOTH),
    ([(NAME, "word"), (f"{NAME}[]", "word")], WORD),
    ([(NAME, '["word"]')], WORD),
    ([(NAME, '["segment", "word"]')], BOTH),
    ([(f"{NAME}[]", '["word"]')], WORD),
    ([(NAME, "['word']")], WORD),
    ([(NAME, "['segment', 'word']")], BOTH),
    ([(NAME, "('word',)")], WORD),
    ([(NAME, "{'word'}")], WORD),
    ([(NAME, "[word]")], WORD),
    ([(NAME, "segment,word")], BOTH),
    ([(NAME, " segment , word ")], BOTH),
    ([(NAME, '"word"')], WORD),
    ([(NAME, "Word")], WORD),
    ([(NAME, ""), (f"{NAME}[]", "word")], WORD),
    *(([(NAME, empty)], [""]) for empty in ("", "[]", "  ", "()", '""', ",", "{}")),
    ([(f"{NAME}[0]", "")], [""]),
    ([], []),
]


@pytest.mark.parametrize(("sent", "meant"), SPELLINGS)
def test_a_list_has_many_spellings(
    sent: list[tuple[str, str]], meant: list[str]
) -> None:
    """
    In a form there is no one of them; several together mean all that they name.
    """
    others = [("model", "m"), (f"{NAME}_too", "x"), (f"x{NAME}", "x")]
    found = list(_in_one_spelling([*others[:1], *sent, *others[1:]]))
    assert found == [*others, *((f"{NAME}[]", value) for value in meant)]


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        (["0.4"], [("temperature", "0.4")]),
        (["0,4"], [("temperature", "0,4")]),
        (["0", "0.4"], [("temperature[]", "0"), ("temperature[]", "0.4")]),
        (["[0, 0.4]"], [("temperature[]", "0"), ("temperature[]", "0.4")]),
    ],
)
def test_several_temperatures_are_a_list(
    sent: list[str], meant: list[tuple[str, str]]
) -> None:
    """
    None is left out; one alone is a number.
    """
    assert list(_in_one_spelling(("temperature", each) for each in sent)) == meant


@pytest.mark.parametrize("place", [2, 9, 13, 16])
def test_words_come_however_they_are_asked_for(client: TestClient, place: int) -> None:
    """
    With segments, if they are asked for, too.
    """
    sent, meant = SPELLINGS[place]
    answer = ask(client, *sent)
    assert answer.status_code == 200, answer.text
    heard = answer.json()
    assert [each["word"] for each in heard["words"]] == ["micro", "says", "hello"]
    assert bool(heard.get("segments")) is ("segment" in meant)


@pytest.mark.parametrize(
    "fields",
    [
        [(f"{NAME}[]", "sentence")],
        [(NAME, "sentence")],
        [(f"{NAME}[3]", "sentence")],
        [(NAME, "word"), (NAME, "sentence")],
        [(NAME, '["word", 3]')],
        [(NAME, "word segment")],
        [(NAME, "null")],
        [(NAME, "")],
        [(f"{NAME}[]", "")],
        [(f"{NAME}[0]", "[]")],
    ],
)
def test_a_refusal_names_the_list_and_not_a_place_in_it(
    client: TestClient, fields: list[tuple[str, str]]
) -> None:
    """
    Not "0", nor brackets that the client may never have written.
    """
    answer = ask(client, *fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == NAME
    assert error["message"].startswith(f"{NAME}: Input should be 'word' or 'segment'")


def test_words_need_an_answer_that_can_hold_them(client: TestClient) -> None:
    """
    The field is named in the same way.
    """
    answer = ask(client, (f"{NAME}[0]", "word"), response_format="json")
    assert answer.json()["error"]["param"] == NAME


def test_other_fields_are_named_as_they_were_sent(client: TestClient) -> None:
    """
    Those of forms, and of addresses.
    """
    for field, value in (
        ("temperature", "warm"),
        ("response_format", "pdf"),
        ("stream", "perhaps"),
    ):
        error = ask(client, **{field: value}).json()["error"]
        assert error["param"] == field
        assert error["message"].startswith(f"{field}: ")
    error = client.post("/api/models/m/load?keep_alive=soon").json()["error"]
    assert error["param"] == "keep_alive"


def test_openais_client_gets_words(cache: ModelCache) -> None:
    """
    The real one, by its own spelling and by what programs put in by hand.
    """
    asked: Any = {"model": "m", "response_format": "verbose_json"}
    with (
        serving(cache, models=options_of().models, decoders=1) as http,
        openai.OpenAI(base_url=str(http.base_url.join("/v1")), api_key="any") as client,
    ):
        for more in (
            {"timestamp_granularities": ["word", "segment"]},
            {"extra_body": {NAME: '["word"]'}},
            {"extra_body": {f"{NAME}[0]": "word"}},
        ):
            heard = client.audio.transcriptions.create(
                **asked, **more, file=("a.flac", CLIP.read_bytes())
            )
            assert [each.word for each in heard.words] == ["micro", "says", "hello"]


def with_heads(directory: Path, heads: object) -> ModelSpec:
    """
    A micro model whose config.json names these alignment heads; none if None.
    """
    place = micro_copy(directory) / "config.json"
    config = json.loads(place.read_text(encoding="utf-8"))
    config.pop("alignment_heads")
    if heads is not None:
        config["alignment_heads"] = heads
    place.write_text(json.dumps(config), encoding="utf-8")
    return ModelSpec("m", str(directory))


@pytest.mark.parametrize("heads", [None, []], ids=["absent", "empty"])
def test_words_of_a_model_without_alignment_heads(
    tmp_path: Path, cache: ModelCache, heads: object
) -> None:
    """
    The field is refused before the model is loaded; all else works.
    """
    app = create_app(options_of(models=(with_heads(tmp_path / "m", heads),)), cache)
    with TestClient(app) as client:
        before = cache.stats().requests
        answer = ask(client, (NAME, "word"))
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == (NAME, "invalid_value")
        assert "alignment_heads" in error["message"]
        assert str(tmp_path) not in answer.text
        assert cache.stats().requests == before
        answer = ask(client, (NAME, "segment"))
        assert answer.status_code == 200
        assert answer.json()["text"] == "micro says hello"


def test_words_by_heads_that_are_not_there_are_refused_before_a_load(
    tmp_path: Path, cache: ModelCache
) -> None:
    """
    As by none: the model is not touched.
    """
    spec = with_heads(tmp_path / "m", [[2, 0]])  # of two layers, counted from 0
    before = cache.stats().requests
    with TestClient(create_app(options_of(models=(spec,)), cache)) as client:
        answer = ask(client, (NAME, "word"))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == NAME
    assert cache.stats().requests == before


def test_words_of_a_model_that_is_not_there_yet(
    tmp_path: Path, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Where it takes a download to find out, it is found out later.
    """
    locate = FasterWhisperLoader.locate

    def hide(
        loader: FasterWhisperLoader, model: str, options: Any, *, download: bool
    ) -> Any:
        return locate(loader, model, options, download=True) if download else None

    app = create_app(options_of(models=(with_heads(tmp_path / "m", None),)), cache)
    with TestClient(app) as client:
        monkeypatch.setattr(FasterWhisperLoader, "locate", hide)
        answer = ask(client, (NAME, "word"))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == NAME


@pytest.mark.parametrize(
    ("named", "more"),
    [
        ('name="file"', ""),
        ("name=file", ""),
        ('name="file"', "Content-Type: audio/flac\r\n"),
        ('name="file"; filename=""', ""),
        ('name="file"; filename="a.flac"', ""),
        ('filename="a.flac"', ""),
        ("name=\"file\"; filename*=UTF-8''a.flac", ""),
        ('name="file"; filename="a.flac"; filename*=utf-8\'\'a.flac', ""),
    ],
)
def test_a_file_needs_no_name(client: TestClient, named: str, more: str) -> None:
    """
    Some clients send none; larger than a field may be, it is a file all the same.
    """
    audio = CLIP.read_bytes() + b"\0" * 80_000
    form = multipart(('name="model"', "", b"m"), (named, more, audio))
    answer = client.post(URL, **form)
    assert answer.status_code == 200, answer.text
    assert answer.json()["text"] == "micro says hello"


def test_headers_of_a_part_come_in_any_order_and_case(client: TestClient) -> None:
    """
    And in pieces of any length, as a network cuts them.
    """
    form = multipart(('name="model"', "", b"m"))
    audio = (
        f"--{BOUNDARY}\r\nContent-Type: audio/flac\r\n"
        'content-disposition: FORM-DATA; NAME="file"\r\n\r\n'
    ).encode() + CLIP.read_bytes()
    body = audio + b"\r\n" + form["content"]
    pieces = (body[start : start + 7] for start in range(0, len(body), 7))
    answer = client.post(URL, content=pieces, headers=form["headers"])
    assert answer.status_code == 200, answer.text


def test_what_was_meant_for_a_file_is_told(client: TestClient) -> None:
    """
    The name of a file, in place of what is in it: curl's @ is missing.
    """
    parts = (('name="model"', "", b"m"), ('name="file"', "", b"talk.wav"))
    answer = client.post(URL, **multipart(*parts))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("file", "invalid_audio")
    assert "-F file=@talk.wav" in error["message"]
    answer = client.post(URL, data={"model": "m", "file": "talk.wav"})
    assert answer.json()["error"]["param"] == "file"
    named = ('name="file"; filename="a"', "", b"no audio")
    answer = client.post(URL, **multipart(('name="model"', "", b"m"), named))
    assert "@" not in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("named", "parts"),
    [
        ("file", [('name="file"', "", b"a"), ('name="file"', "", b"b")]),
        (
            "file",
            [('name="file"; filename="a"', "", b"a"), ('name="file"', "", b"b")],
        ),
        (
            "voice",
            [('name="file"', "", b"a"), ('name="voice"; filename="b"', "", b"b")],
        ),
        ("prompt", [('name="file"', "", b"a"), ('name="prompt"', "", b"x" * 70_000)]),
        ("data", [('name="file"', "", b"a"), ('name="data"', "", b"x" * 70_000)]),
        ("x", [('name="file"', "", b"a"), *[('name="x"', "", b"x")] * 60]),
        ("file", [('name="file"', "", b"a"), ('filename="a"', "", b"a")]),
        (None, [('name="file"', "", b"a"), ("x=y", "", b"a")]),
    ],
)
def test_a_form_without_file_names_has_the_same_limits(
    client: TestClient, named: str | None, parts: list[tuple[str, str, bytes]]
) -> None:
    """
    One file, and a few short fields; the refusal names the one that is too much.
    """
    answer = client.post(URL, **multipart(('name="model"', "", b"m"), *parts))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_request", named)
    assert error["message"].startswith(f"{named}: " if named else "The ")


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        ("multipart/form-data", b"", "Missing boundary"),
        (f"multipart/form-data; boundary={BOUNDARY}", b"nonsense", "Invalid multipart"),
    ],
)
def test_a_form_that_is_broken_before_its_first_field_names_none(
    client: TestClient, kind: str, body: bytes, said: str
) -> None:
    """
    As of clients that set the content type by hand.
    """
    answer = client.post(URL, content=body, headers={"Content-Type": kind})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (None, "invalid_request")
    assert said in error["message"]


@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "audio/flac", "application/json"]
)
def test_audio_that_is_no_form_is_told_how_to_come(
    client: TestClient, kind: str
) -> None:
    """
    As by ``curl --data-binary @talk.wav``, which calls it a form of another kind.
    """
    body, headers = CLIP.read_bytes(), {"Content-Type": kind}
    answer = client.post(URL, content=body, headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "file"
    assert "multipart form" in error["message"]
