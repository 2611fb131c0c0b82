"""
The server as clients and programs use it: spellings, forms, keys, origins, mounts.

In one process, with micro models, whose calls take milliseconds.
"""

from __future__ import annotations

import json
import threading
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from fastapi import FastAPI
from real import clip, micro, micro_copy
from served import serving
from starlette.testclient import TestClient

from whispercache import ModelCache
from whispercache.cli.main import main
from whispercache.console import WRONG_USE
from whispercache.engine.loader import FasterWhisperLoader
from whispercache.engine.naming import ModelSpec
from whispercache.server import ServerOptions, command, create_app
from whispercache.server.forms import _in_one_spelling

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.process

NAME = "timestamp_granularities"
URL = "/v1/audio/transcriptions"
CLIP = Path(clip("en-bread"))
# What nobody sends by chance.
BOUNDARY = "------------------------d74496d66958873e"


def options_of(**options: Any) -> ServerOptions:
    """
    A server of one micro model, "m".
    """
    options.setdefault("models", (ModelSpec("m", str(micro("micro says hello"))),))
    return ServerOptions(device="cpu", decoders=1, **options)


@pytest.fixture(scope="module")
def cache() -> Iterator[ModelCache]:
    """
    A cache for all servers of this file.
    """
    with ModelCache(ram="2GiB", variants=False) as made:
        yield made


@pytest.fixture(scope="module")
def client(cache: ModelCache) -> Iterator[TestClient]:
    """
    A client of that server, without a socket between.
    """
    with TestClient(create_app(options_of(), cache)) as made:
        yield made


def multipart(*parts: tuple[str, str, bytes]) -> dict[str, Any]:
    """
    A form of parts: the parameters of each one's Content-Disposition, more headers, and
    what is in it. Clients differ in just these.
    """
    start = f"--{BOUNDARY}\r\nContent-Disposition: form-data; "
    body = b"".join(
        f"{start}{named}\r\n{more}\r\n".encode() + content + b"\r\n"
        for named, more, content in parts
    )
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    return {
        "content": body + f"--{BOUNDARY}--\r\n".encode(),
        "headers": {"content-type": kind},
    }


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


# Lists --------------------------------------------------------------------------------


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


# Words of models that cannot tell them ------------------------------------------------


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


# Files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "more"),
    [
        ('name="file"', ""),
        ("name=file", ""),
        ('name="file"', "Content-Type: audio/flac\r\n"),
        ('name="file"; filename=""', ""),
        ('name="file"; filename="a.flac"', ""),
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
        (None, [('name="file"', "", b"a"), ('filename="a"', "", b"a")]),
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


# Keys and origins ---------------------------------------------------------------------


def test_a_key_file_has_comments(tmp_path: Path) -> None:
    """
    Lines that begin with #, what follows one after a space, and lines without anything.
    """
    file = tmp_path / "keys"
    file.write_text(
        "\ufeff# who may use it\n\n  alice-1  \n\t# bob left\nbob#2\n"
        "carol\t# of sales\n   \n#dave\n",
        encoding="utf-8",
    )
    assert command.read_keys(file) == ["alice-1", "bob#2", "carol"]
    other = tmp_path / "more"
    other.write_text("erin\r\nalice-1\r\n", encoding="utf-8")
    assert command._keys([file, other]) == ("alice-1", "bob#2", "carol", "erin")
    file.write_text("# nobody\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="keys holds no key"):
        command._keys([file, other])
    file.write_bytes(CLIP.read_bytes())
    with pytest.raises(ValueError, match="keys is no key file: it is not UTF-8"):
        command._keys([other, file])


def test_a_comment_is_no_key(tmp_path: Path, cache: ModelCache) -> None:
    """
    Nor is the line that it stands in.
    """
    file = tmp_path / "keys"
    file.write_text("# staff\nsecret\n", encoding="utf-8")
    app = create_app(options_of(keys=command._keys([file])), cache)
    with TestClient(app) as client:
        for key, status in (("secret", 200), ("# staff", 401), ("#", 401), ("", 401)):
            headers = {"authorization": f"Bearer {key}"}
            assert client.get("/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("https://app.example/", "https://app.example"),
        ("https://app.example/page", "https://app.example"),
        ("https://App.Example", "https://app.example"),
        ("HTTPS://app.example", "https://app.example"),
        ("https://app.example:443", "https://app.example"),
        ("http://app.example:80/", "http://app.example"),
        ("http://app.example:443/x?y#z", "http://app.example:443"),
        ("https://me:pass@app.example", "https://app.example"),
        ("app.example", "https://app.example"),
        ("app.example:8443/", "https://app.example:8443"),
        ("localhost:3000", "http://localhost:3000"),
        ("127.0.0.1:3000", "http://127.0.0.1:3000"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("http://[0:0:0:0:0:0:0:1]:8000", "http://[::1]:8000"),
        (" https://app.example ", "https://app.example"),
        ("https://app.example:0443", "https://app.example"),
        ("NULL", "null"),
        ("file:///home/me/page.html", "null"),
    ],
)
def test_an_origin_that_cannot_match_is_told_the_right_one(
    given: str, sent: str
) -> None:
    """
    As browsers send it; which is accepted.
    """
    with pytest.raises(ValueError, match="is no origin; browsers send") as caught:
        options_of(origins=(given,))
    assert str(caught.value).endswith(f"browsers send {sent}")
    assert options_of(origins=(sent,)).origins == (sent,)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "https://",
        "https://*.app.example",
        "https://app.example:port",
        "https://app.example:70000",
        "https://[::1",
        "https://a b.example",
        "**",
        "https://app.example, https://other.example",
    ],
)
def test_what_is_no_origin_at_all_is_refused(given: str) -> None:
    """
    With what there is to say instead.
    """
    with pytest.raises(
        ValueError, match=r"name each site as in https://app\.example, "
    ):
        options_of(origins=(given,))


@pytest.mark.parametrize(
    "given",
    [
        "https://app.example",
        "http://localhost:3000",
        "http://[::1]:8000",
        "http://192.168.0.7",
        "chrome-extension://abcdefghijklmnop",
        "tauri://localhost",
        "https://xn--bcher-kva.example:8443",
    ],
)
def test_what_browsers_send_is_an_origin(given: str) -> None:
    """
    Of sites, extensions and applications.
    """
    assert options_of(origins=(given,)).origins == (given,)


ORIGINS = ("https://app.example", "https://evil.example", "null")


@pytest.mark.parametrize(
    ("allowed", "may"),
    [
        ((), set()),
        (("https://app.example",), {"https://app.example"}),
        (("null",), {"null"}),
        (("*",), set(ORIGINS)),
        (("*", "null"), set(ORIGINS)),
    ],
)
def test_pages_without_an_origin_and_pages_of_any(
    cache: ModelCache, allowed: tuple[str, ...], may: set[str]
) -> None:
    """
    They may ask, and read the answer; so says the browser's question before, too.
    """
    app = create_app(options_of(origins=allowed, keys=("secret",)), cache)
    with TestClient(app) as client:
        for origin in ORIGINS:
            page = {"origin": origin, "sec-fetch-site": "cross-site"}
            before = client.options(
                URL,
                headers={
                    **page,
                    "access-control-request-method": "POST",
                    "access-control-request-headers": "authorization",
                },
            )
            key = {"authorization": "Bearer secret"}
            answer = client.post("/api/models/m/load", headers={**page, **key})
            reads = answer.headers.get("access-control-allow-origin")
            is_allowed = origin in may
            assert (answer.status_code == 200) is is_allowed
            assert (reads in (origin, "*")) is is_allowed
            may_ask = before.headers.get("access-control-allow-headers", "")
            if is_allowed:
                assert before.status_code == 200
                assert "authorization" in may_ask
            else:
                assert before.headers.get("access-control-allow-origin") is None
            # Without the key it takes more than a page.
            answer = client.post("/api/models/m/load", headers=page)
            assert answer.status_code == (401 if is_allowed else 403)


# Mounted ------------------------------------------------------------------------------


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


# Downloads ----------------------------------------------------------------------------


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


@pytest.mark.parametrize("port", ["65536", "-1", "http", ""])
def test_a_port_that_is_none_is_told_in_one_line(
    port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Before anything is served.
    """
    with pytest.raises(SystemExit) as end:
        main(["serve", "m", f"--port={port}"])
    assert end.value.code == WRONG_USE
    told = capsys.readouterr().err
    assert f"{port!r} is no port" in told
    assert told.count("\n") == 1
