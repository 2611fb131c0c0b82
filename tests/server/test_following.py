"""
Requests followed from the first byte to the last: their ids, the list, and the log.
"""

from __future__ import annotations

import json
import logging
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from caches import cache_of
from real import clip, micro
from served import URL, A, B, asking, command, micros, serving, transcribe

from whispercache.engine.construct import genuine
from whispercache.server import logs
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

    from whispercache import ModelCache

pytestmark = pytest.mark.process

KEY = "s3cret"
LOGGERS = ("whispercache", "uvicorn.access")

cache = cache_of("module", max_models=1)


@pytest.fixture(scope="module")
def client(cache: ModelCache) -> Iterator[httpx.Client]:
    """
    A server whose one key has a name, and a client that has it.
    """
    keys = {"keys": (KEY,), "key_names": {KEY: "anna"}}
    with serving(cache, models=micros(), max_upload_bytes=3_000_000, **keys) as client:
        client.headers["Authorization"] = f"Bearer {KEY}"
        yield client


def listed(client: httpx.Client) -> dict[str, Any]:
    """
    The requests that are under way, and the last ones.
    """
    found: dict[str, Any] = client.get("/api/requests").json()
    return found


def last(client: httpx.Client) -> dict[str, Any]:
    """
    The last request that is over, once no other is under way.
    """
    wait_until(lambda: not listed(client)["under_way"], "the end of all requests")
    found: dict[str, Any] = listed(client)["lately"][0]
    return found


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models", 200),
        ("GET", "/healthz", 200),
        ("HEAD", "/", 200),
        ("GET", "/nowhere", 404),
        ("PATCH", "/v1/models", 405),
        ("POST", f"/api/models/{A}/load", 200),
        ("POST", URL, 400),
    ],
)
def test_each_answer_has_an_id(
    client: httpx.Client, method: str, path: str, status: int
) -> None:
    """
    The client's own, where that is short and plain; else a new one.
    """
    own = "5f0c:2f6c/1f0b+4d8f=9f6c@a.b_c-d"
    found = set()
    for given in (
        own,
        "",
        "two words",
        "x" * 129,
        'a"b',
        "a\tb",
        "é".encode(),
        "y" * 99,
    ):
        headers: Any = {} if given == "" else {"X-Request-ID": given}
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == status
        found.add(answer.headers["x-request-id"])
    assert {own, "y" * 99} < found
    assert len(found) == 8
    assert all(each.startswith("req_") for each in found - {own, "y" * 99})


def test_refusals_at_the_door_have_an_id(client: httpx.Client) -> None:
    """
    Without a key, with too much, and from pages of others.
    """
    for headers, content, status in (
        ({"Authorization": "Bearer wrong"}, b"", 401),
        ({"Origin": "https://evil.example"}, b"", 403),
        ({}, bytes(3_000_001), 413),
    ):
        asked = {"X-Request-ID": f"door-{status}", **headers}
        answer = client.post(URL, headers=asked, content=content)
        assert answer.status_code == status
        assert answer.headers["x-request-id"] == f"door-{status}"
    assert last(client)["error"] == "upload_too_large"
    names = [each["id"] for each in listed(client)["lately"]]
    assert names[0] == "door-413"
    # Who was not let in did not ask for work.
    assert not {"door-401", "door-403"} & set(names)


def test_requests_are_listed_with_the_time_of_each_phase(
    cache: ModelCache, client: httpx.Client
) -> None:
    """
    The first waits for room and a load; the second finds the model in memory.
    """
    cache.evict()
    holding = cache.lease(micro("micro b"), "cpu")
    with holding, asking_as_anna(client, A):
        wait_until(lambda: bool(cache.waiting()), "the request in the cache")
        (info,) = listed(client)["under_way"]
        assert info["phase"] == "waiting"
        assert info["who"] == "anna"
        assert info["model"] == A
        assert info["route"] == f"POST {URL}"
        assert info["status"] is info["outcome"] is info["priority"] is None
        assert info["audio_s"] == pytest.approx(5, abs=4)
        assert info["seconds"]["decoding"] > 0
        before_s = info["seconds"]["waiting"]
        (info,) = listed(client)["under_way"]
        assert info["seconds"]["waiting"] > before_s
        holding.release()
        info = last(client)
    assert info["phase"] == "over"
    assert (info["status"], info["outcome"], info["error"]) == (200, "answered", None)
    spent = info["seconds"]
    assert spent["loading"] > 0
    assert spent["working"] > 0
    assert spent["downloading"] == 0
    assert spent["total"] == pytest.approx(
        sum(each for name, each in spent.items() if name != "total")
    )
    transcribe(client, A)
    assert last(client)["seconds"]["loading"] == 0
    client.delete(f"/api/models/{A}")
    assert last(client)["route"] == "DELETE /api/models/{name}"
    client.post(f"/api/models/{A}/load")
    info = last(client)
    assert info["route"] == "POST /api/models/{name}/load"
    assert (info["model"], info["audio_s"]) == (A, None)
    assert info["seconds"]["loading"] > 0


def asking_as_anna(client: httpx.Client, model: str, **options: Any) -> Any:
    """
    Somebody who asks with the key, and hangs up at the end.
    """
    return asking(client, model, key=KEY, **options)


def test_those_who_share_a_load_see_it(cache: ModelCache, client: httpx.Client) -> None:
    """
    Also who comes while it goes on.
    """
    kind: Any = type(cache.loader)
    goes_on, may_end = threading.Event(), threading.Event()
    load = kind.load

    def slow(*args: Any) -> Any:
        goes_on.set()
        assert may_end.wait(30)
        return load(*args)

    cache.evict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "load", slow)
        with asking_as_anna(client, A), asking_as_anna(client, A):
            assert goes_on.wait(30)
            wait_until(
                lambda: (
                    [each["phase"] for each in listed(client)["under_way"]]
                    == ["loading"] * 2
                ),
                "both to see the load",
            )
            may_end.set()
            last(client)
    first, second = listed(client)["lately"][:2]
    assert first["seconds"]["loading"] > 0
    assert second["seconds"]["loading"] > 0


def test_what_went_wrong_is_told(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    By the code that the client got; a client that hung up got none.
    """
    assert transcribe(client, A, temperature="7").status_code == 400
    info = last(client)
    assert (info["outcome"], info["error"]) == ("refused", "invalid_value")
    assert transcribe(client, "micro-z").status_code == 404
    info = last(client)
    assert (info["error"], info["model"]) == ("model_not_found", None)
    with asking_as_anna(client, A, clip_name="en-harbour-long"):
        wait_until(lambda: bool(listed(client)["under_way"]), "the request")
    assert last(client)["outcome"] in ("left", "answered")

    def fail(*_args: object, **_options: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(genuine().model, "encode", fail)
    # uvicorn ends the connection after a bug.
    client.headers["Connection"] = "close"
    with written(logs.TextLines()) as log:
        answer = transcribe(client, A, language="en")
    (told,) = (line for line in log if "Traceback" in line)
    assert f"a request failed [{answer.headers['x-request-id']}]" in told
    del client.headers["Connection"]
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == last(client)["id"]
    assert last(client)["outcome"] == "failed"
    assert last(client)["error"] == "ValueError"
    answer = transcribe(client, A, language="en", stream="true")
    assert answer.status_code == 200
    assert last(client)["outcome"] == "failed"
    assert last(client)["error"] == "ValueError"


@contextmanager
def written(lines: logging.Formatter) -> Iterator[list[str]]:
    """
    The server's log, as *lines* write it.
    """
    found: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(lines.format(record))

    handler, loggers = Kept(), [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel("INFO")
    try:
        yield found
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


@pytest.mark.parametrize("lines", [logs.TextLines, logs.JsonLines])
def test_no_text_is_told_to_anybody(
    client: httpx.Client, lines: type[logging.Formatter]
) -> None:
    """
    Neither what was said or prompted, nor the file's name, nor a key, nor a query.
    """
    with written(lines()) as log:
        for stream in ("false", "true"):
            with Path(clip("en-bread")).open("rb") as file:
                answer = client.post(
                    URL,
                    params={"q": "querysecret"},
                    data={"model": A, "prompt": "promptsecret", "stream": stream},
                    files={"file": ("namesecret.flac", file)},
                    headers={"X-Request-ID": "told"},
                )
            assert "micro a" in answer.text
        last(client)
    assert len([line for line in log if "told" in line]) == 4
    for text in ("\n".join(log), client.get("/api/requests").text):
        assert URL in text
        assert "secret" not in text
        assert KEY not in text
        assert "micro a" not in text
        assert str(micro("micro a")) not in text


def test_a_line_of_json_is_one_in_each_encoding() -> None:
    """
    Of stderr, and for readers that take other characters for ends of lines.
    """
    text = "Grüße\u2028\udcff"
    record = logging.LogRecord("a", logging.INFO, "", 0, text, (), None)
    line = logs.JsonLines().format(record)
    assert line.isascii()
    assert json.loads(line)["message"] == text


def test_a_log_of_json_is_json_in_each_line(tmp_path: Path) -> None:
    """
    From the first line to the last, with the id of the request in all that belong to
    it; uvicorn's are told likewise.
    """
    keys = tmp_path / "keys"
    keys.write_text(f"anna: {KEY}\n", encoding="utf-8")
    place = f"m={micro('micro says hello')}"
    options = ("--device", "cpu", "--log-format", "json", "--key-file", str(keys))
    with command(place, *options) as (process, client):
        client.headers["Authorization"] = f"Bearer {KEY}"
        client.headers["X-Request-ID"] = "mine"
        assert transcribe(client, "m").status_code == 200
        assert client.delete("/api/models/m").status_code == 200
        assert client.get("/nowhere", params={"a": "secret"}).status_code == 404
        process.terminate()
        _, log = process.communicate(timeout=30)
    found = [json.loads(line) for line in log.splitlines()]
    assert "secret" not in log
    assert all(each["time"].endswith("+00:00") for each in found)
    assert {"level", "logger", "message"} < set(found[0])
    (heard,) = (each for each in found if each.get("route") == f"POST {URL}"[5:])
    assert (heard["event"], heard["request_id"]) == ("request", "mine")
    assert (heard["who"], heard["model"], heard["status"]) == ("anna", "m", 200)
    assert heard["seconds"]["working"] > 0
    access = [each for each in found if each["logger"] == "uvicorn.access"]
    mine = [each for each in access if each["request_id"] == "mine"]
    assert [(each["method"], each["status"]) for each in mine] == [
        ("POST", 200),
        ("DELETE", 200),
        ("GET", 404),
    ]
    events = [each["event"] for each in found if "event" in each]
    assert {"loaded", "evicted"} <= set(events)


def test_lines_for_people_end_with_the_id(client: httpx.Client) -> None:
    """
    And say in a sentence how a request went.
    """
    with written(logs.TextLines()) as log:
        client.headers["X-Request-ID"] = "mine"
        assert transcribe(client, B, language="de").status_code == 200
        del client.headers["X-Request-ID"]
        last(client)
    (told,) = (line for line in log if "answered (200)" in line)
    assert f"POST {URL} answered (200): anna, {B}, arriving 0." in told
    assert told.endswith(" s [mine]")
    (access,) = (line for line in log if f'"POST {URL} HTTP/1.1" 200 [mine]' in line)
    assert " INFO uvicorn.access: 127.0.0.1:" in access
