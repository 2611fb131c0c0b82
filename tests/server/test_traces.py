"""
Traces, as OpenTelemetry's own SDK gets them. It is set up once per process, so each
test has one of its own.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest
from real import child, clip, micro

pytestmark = pytest.mark.process

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}

with_sdk = pytest.mark.skipif(
    find_spec("opentelemetry") is None or find_spec("opentelemetry.sdk") is None,
    reason="opentelemetry-sdk is not installed",
)

START = f"""
import json, sys
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
HEADERS = {HEADERS!r}

def tell():
    spans = exporter.get_finished_spans()
    print(json.dumps([json.loads(span.to_json()) for span in spans]))
"""

SERVER = """
from pathlib import Path
from starlette.testclient import TestClient
from whispercache import ModelCache
from whispercache.engine.naming import ModelSpec
from whispercache.server import ServerOptions, create_app

def main():
    options = ServerOptions(
        models=(ModelSpec("m", sys.argv[1]),), device="cpu", decoders=1,
        keys=("k",), key_names={"k": "anna"},
    )
    with ModelCache() as cache, TestClient(create_app(options, cache)) as client:
        sent = {**HEADERS, "authorization": "Bearer k"}
        with Path(sys.argv[2]).open("rb") as file:
            answer = client.post(
                "/v1/audio/transcriptions?initial_prompt=secret",
                data={"model": "m", "prompt": "secret"},
                files={"file": ("secret.flac", file)},
                headers=sent,
            )
        assert answer.json()["text"] == "micro says hello", answer.text
        client.post("/v1/audio/transcriptions", headers=sent)
    tell()

if __name__ == "__main__":
    main()
"""

# Without a framework that has begun a span.
ALONE = """
import asyncio
from whispercache.server import seen
from whispercache.server.answers import Answers
from whispercache.server.following import Following
from whispercache.server.logs import JsonLines

async def app(scope, receive, send):
    import logging
    record = logging.LogRecord("a", 20, "", 0, "told", (), None)
    line = json.loads(JsonLines().format(record))
    assert line["trace_id"] == HEADERS["traceparent"].split("-")[1], line
    seen.wants("m")
    seen.teller(3.0)("loading")
    seen.enter("working")
    seen.failed("model_busy")
    await send({"type": "http.response.start", "status": 503, "headers": []})
    await send({"type": "http.response.body", "body": b""})

async def send(message):
    pass

scope = {
    "type": "http", "method": "POST", "path": "/x", "scheme": "http",
    "http_version": "1.1", "client": ("127.0.0.9", 1), "server": ("localhost", 8000),
    "headers": [(name.encode(), value.encode()) for name, value in HEADERS.items()],
}
asyncio.run(Answers(Following(app, seen.RequestsSeen()))(scope, None, send))
tell()
"""


def spans(code: str) -> list[dict[str, Any]]:
    """
    The spans of a program, in the order of their ends.
    """
    done = child(START + code, micro("micro says hello"), clip("en-bread"))
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@with_sdk
def test_a_request_is_a_span_with_its_phases_for_children() -> None:
    """
    In the trace of the client, and with the one span of the framework where that has
    begun it.
    """
    found = spans(SERVER)
    servers = [each for each in found if each["kind"] == "SpanKind.SERVER"]
    heard, refused = servers
    assert heard["name"] == "POST /v1/audio/transcriptions"
    assert heard["parent_id"] == f"0x{PARENT}"
    assert {each["context"]["trace_id"] for each in found} == {f"0x{TRACE}"}
    told = heard["attributes"]
    assert told["http.request.method"] == "POST"
    assert told["http.route"] == "/v1/audio/transcriptions"
    assert told["http.response.status_code"] == 200
    assert told["gen_ai.request.model"] == "m"
    assert told["enduser.id"] == "anna"
    assert told["whispercache.request.id"] == "mine"
    assert told["whispercache.outcome"] == "answered"
    assert 2 < told["whispercache.audio.duration"] < 4
    assert "secret" not in json.dumps(found)
    phases = {
        each["name"]: each
        for each in found
        if each["parent_id"] == heard["context"]["span_id"]
        and not each["name"].startswith("fastapi.")
    }
    assert {"arriving", "decoding", "waiting", "loading", "working"} <= set(phases)
    ordered = sorted(phases.values(), key=lambda each: each["start_time"])
    assert ordered[0]["name"] == "arriving"
    assert ordered[-1]["name"] == "working"
    assert all(each["start_time"] <= each["end_time"] for each in ordered)
    assert refused["attributes"]["whispercache.outcome"] == "refused"
    assert refused["attributes"]["whispercache.error.code"] == "invalid_value"


@with_sdk
def test_where_nobody_begins_a_span_it_is_ours() -> None:
    """
    By the conventions for HTTP; the log has its ids.
    """
    found = spans(ALONE)
    (root,) = (each for each in found if each["kind"] == "SpanKind.SERVER")
    assert root["parent_id"] == f"0x{PARENT}"
    assert root["status"]["status_code"] == "ERROR"
    expected = {
        "http.request.method": "POST",
        "url.path": "/x",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "client.address": "127.0.0.9",
        "server.address": "localhost",
        "server.port": 8000,
        "http.response.status_code": 503,
        "error.type": "model_busy",
        "whispercache.audio.duration": 3.0,
    }
    assert expected.items() <= root["attributes"].items()
    children = [each["name"] for each in found if each is not root]
    assert children == ["arriving", "waiting", "loading", "working"]


def test_without_the_api_there_are_no_traces() -> None:
    """
    And no error.
    """
    done = child(
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "from whispercache.server import seen, telemetry\n"
        "request = seen.RequestsSeen().begin('r', 'POST')\n"
        "with telemetry.Trace(request, {'type': 'http'}) as trace:\n"
        "    trace.finish()\n"
        "assert telemetry.trace_ids() == {}\n"
    )
    assert done.returncode == 0, done.stderr
