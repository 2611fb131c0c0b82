"""
The page in a real browser, over a stand-in for the server: fixtures, and what to do.

The stand-in has a real cache on the fakes, and errs where and when a test says so.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import threading
import wave
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

import whispercache
from whispercache.engine.calls.languages import LANGUAGES
from whispercache.errors import WhisperCacheError
from whispercache.testing import wait_until
from whispercache.watch.live import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from conftest import MakeCache
    from playwright.sync_api import (
        Browser,
        ConsoleMessage,
        FilePayload,
        Locator,
        Page,
    )

    from whispercache import ModelCache, ModelKey
    from whispercache.testing import Gate

PAGE = Path(whispercache.__file__).parent / "server" / "page"
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
# As the server has it; where they differ, tests with the real one fail.
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "media-src blob:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'; "
    "base-uri 'none'"
)
PATIENCE_MS = 60_000
expect.set_options(timeout=PATIENCE_MS)
# The page asks ten times as often, so that tests wait less.
HURRY = (b"POLL_MS = 1000", b"POLL_MS = 100")
# Seconds of each piece that a model hears.
PIECE_S = 2


# A request as `/api/requests` lists it.
UNDER_WAY: dict[str, object] = {
    "id": "1",
    "at_s": 1.7e9,
    "route": "POST /v1/audio/transcriptions",
    "who": "anna",
    "model": "base",
    "audio_s": 12.94,
    "priority": None,
    "phase": "working",
    "seconds": {"waiting": 0.5, "downloading": 0, "loading": 1.5, "working": 2},
    "status": 200,
    "outcome": None,
    "error": None,
}


class Stub:
    """
    A server that answers as the real one does, and errs on demand.

    Attributes:
        cache: What it serves.
        places: The models on its list: name, device and compute type, by id.
        key: Asked for, unless empty.
        texts: What each model hears, in pieces.
        wordless: Models that cannot tell when words were said.
        gates: By model, what its transcription waits for before the last piece.
        trouble: Answers ``/api/ps`` in place of the snapshot: status and body.
        requests: Answers ``/api/requests``; there is no such route if it is None. For
            those that transcribe, an id of ``"of base"`` is made the newest one's of
            that model.
        asked: The requests that came, as ``"GET /path"``.
        forms: The bodies of those that transcribe.
        ids: Of the last that transcribes, by model.
    """

    def __init__(self, cache: ModelCache, places: dict[str, tuple[str, str]]) -> None:
        self.cache = cache
        self.places = places
        self.key = ""
        self.texts: dict[str, list[str]] = {}
        self.wordless: set[str] = set()
        self.requests: dict[str, object] | None = None
        self.forms: list[bytes] = []
        self.ids: dict[str, str] = {}
        self.gates: dict[str, Gate] = {}
        self.trouble: tuple[int, bytes] | None = None
        self.asked: list[str] = []
        self.watch = Watch(cache, self.name_of)
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    def name_of(self, key: ModelKey) -> str:
        """
        The id of a model, as the list has it.
        """
        found = (
            name
            for name, (model, device) in self.places.items()
            if (model, device) == (key.model, key.device)
        )
        return next(found, key.model)

    @property
    def url(self) -> str:
        """
        Where it answers.
        """
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """
        Answer, at the same address as before if there was one.
        """
        stub = self

        class Handler(_Handler):
            pass

        Handler.stub = stub
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = False
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,)).start()

    def stop(self) -> None:
        """
        Answer no longer.
        """
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Handler(BaseHTTPRequestHandler):
    stub: Stub

    def log_message(self, *_details: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self._begin()
        if path == "/":
            self._send((PAGE / "index.html").read_bytes(), "text/html; charset=utf-8")
        elif path.startswith("/page/") and (PAGE / path[6:]).is_file():
            file = PAGE / path[6:]
            script = file.read_bytes().replace(*HURRY)
            self._send(script, TYPES[file.suffix])
        elif self._is_let_in():
            self._answer(path)

    def _answer(self, path: str) -> None:
        if path == "/api/ps":
            if self.stub.trouble is not None:
                status, body = self.stub.trouble
                self._send(body, "application/json", status)
                return
            extra = {"version": "1.2.3", "requires_key": bool(self.stub.key)}
            self._json({**extra, **self.stub.watch.snapshot().as_json()})
        elif path == "/v1/models":
            listed = [{"id": name, "object": "model"} for name in self.stub.places]
            self._json({"object": "list", "data": listed})
        elif path == "/api/languages":
            self._json(dict(LANGUAGES))
        elif path == "/api/requests" and self.stub.requests is not None:
            told = json.dumps(self.stub.requests)
            for model, id_ in self.stub.ids.items():
                told = told.replace(json.dumps(f"of {model}"), json.dumps(id_))
            self._send(told.encode(), "application/json")
        else:
            self._error(404, f"there is no {path}")

    def do_POST(self) -> None:
        path = self._begin()
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if not self._is_let_in():
            return
        if path == "/v1/audio/transcriptions":
            self._transcribe(body)
        elif path.endswith("/load"):
            self._act(path, lambda place: self.stub.cache.preload(*place), "loaded")
        elif path.endswith("/pin"):
            self._act(path, lambda place: self.stub.cache.pin(*place), "pinned")

    def do_DELETE(self) -> None:
        path = self._begin()
        if not self._is_let_in():
            return
        if path.endswith("/pin"):
            self._act(path, lambda place: self.stub.cache.unpin(*place), "unpinned")
        else:
            self._act(path, lambda place: self.stub.cache.evict(*place), "evicted")

    def _act(
        self, path: str, act: Callable[[tuple[str, str]], object], status: str
    ) -> None:
        model = path.removeprefix("/api/models/")
        model = model.removesuffix("/load").removesuffix("/pin")
        if model not in self.stub.places:
            self._error(404, f"{model!r} is not served")
            return
        try:
            act(self.stub.places[model])
        except WhisperCacheError as error:
            self._error(503, str(error))
        else:
            self._json({"model": model, "status": status})

    def _transcribe(self, body: bytes) -> None:
        self.stub.forms.append(body)
        found = re.search(rb'name="model"\r\n\r\n([^\r]*)', body)
        model = found[1].decode() if found else ""
        if model not in self.stub.texts:
            self._error(400, f"{model} cannot read this")
            return
        has_words = b"\r\n\r\nword\r\n" in body
        if has_words and model in self.stub.wordless:
            self._error(400, f"{model} knows no words", "timestamp_granularities")
            return
        self.stub.ids[model] = self.headers["X-Request-ID"]
        pieces = self.stub.texts[model]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for place, piece in enumerate(pieces):
            if place == len(pieces) - 1 and model in self.stub.gates:
                self.stub.gates[model].pass_through()
            self._event({"type": "transcript.text.delta", "delta": piece})
        done = verbose(pieces, has_words=has_words)
        self._event({"type": "transcript.text.done", **done})

    def _event(self, event: dict[str, object]) -> None:
        try:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        except ConnectionError:
            self.stub.asked.append("gone")

    def _begin(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.stub.asked.append(f"{self.command} {self.path}")
        return path

    def _is_let_in(self) -> bool:
        given = self.headers.get("Authorization", "")
        if self.stub.key and given != f"Bearer {self.stub.key}":
            self._error(401, "give one of this server's keys")
            return False
        return True

    def _error(self, status: int, message: str, param: str | None = None) -> None:
        error = {"message": message, "type": "error", "param": param, "code": None}
        self._json({"error": error}, status)

    def _json(self, document: object, status: int = 200) -> None:
        self._send(json.dumps(document).encode(), "application/json", status)

    def _send(self, body: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", CSP)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)


def verbose(pieces: Sequence[str], *, has_words: bool) -> dict[str, object]:
    """
    What was heard, as in ``verbose_json``. The words of a piece are of equal length.
    """
    segments, words = [], []
    for number, piece in enumerate(pieces):
        start_s = number * PIECE_S
        spoken = piece.split() if has_words else []
        each_s = PIECE_S / max(1, len(spoken))
        times = {"start": start_s, "end": start_s + PIECE_S}
        segments.append({"id": number, **times, "text": piece})
        words += [
            {
                "word": word,
                "start": start_s + i * each_s,
                "end": start_s + (i + 1) * each_s,
            }
            for i, word in enumerate(spoken)
        ]
    about = {"text": "".join(pieces).strip(), "duration": 12, "language": "english"}
    return {**about, "segments": segments, "words": words}


def listed(*lately: dict[str, object]) -> dict[str, object]:
    """
    What ``/api/requests`` answers: nothing under way, and these that are over.
    """
    usual = {
        **dict.fromkeys(("route", "who", "model", "audio_s", "priority", "error")),
        "id": "1",
        "at_s": 1.7e9,
        "phase": "over",
        "status": 200,
        "outcome": "answered",
    }
    over = [{**usual, **each} for each in lately]
    return {"under_way": [], "left_out": 0, "lately": over}


@pytest.fixture
def stub(make_cache: MakeCache) -> Iterator[Stub]:
    """
    A server over a cache on the fakes, with four models on its list.
    """
    places = {
        "base": ("base", "cuda:1"),
        "small": ("small", "cuda:0"),
        "medium": ("medium", "cuda:0"),
        "org/name:v1 #2": ("large-v3", "cuda:0"),
    }
    server = Stub(make_cache(keep_alive="5m"), places)
    server.start()
    yield server
    server.stop()
    server.watch.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """
    Chromium without a window.
    """
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("no chromium; apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--use-fake-device-for-media-stream"],
        )
        yield started
        started.close()


class Visit(Protocol):
    """
    Opens a page.
    """

    def __call__(self, url: str, **options: Any) -> Page:
        """
        Open *url* in a new context of these options.
        """


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """
    Opens pages. No page may complain, or ask another server for anything.
    """
    pages: list[Page] = []
    complaints: list[str] = []

    def note(message: ConsoleMessage) -> None:
        # Chromium itself notes each answer of 4xx and 5xx, and each that did not come.
        if not message.text.startswith("Failed to load resource"):
            complaints.append(message.text)

    def open_(url: str, **options: Any) -> Page:
        context = browser.new_context(reduced_motion="reduce", **options)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda asked: (
                None
                if asked.url.removeprefix("blob:").startswith(url)
                else complaints.append(asked.url)
            ),
        )
        page.goto(url)
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.context.close()
    assert not complaints


def row_of(page: Page, model: str) -> Locator:
    """
    A model's line in the list of models.
    """
    return page.locator("#offers > li").filter(has_text=model)


def violations_on(page: Page) -> list[str]:
    """
    What axe finds wrong with the page as it stands.
    """
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found]


def choose_recording(page: Page, *models: str, content: bytes = b"RIFF" * 99) -> None:
    """
    Choose a file, as the button for it does, and one model or two.
    """
    expect(page.locator("#model-a option")).not_to_have_count(0)
    for field, model in zip(("#model-a", "#model-b"), models, strict=False):
        page.select_option(field, model)
    recording: FilePayload = {
        "name": "talk.wav",
        "mimeType": "audio/wav",
        "buffer": content,
    }
    page.set_input_files("#audio", recording)


def transcribe(page: Page) -> None:
    """
    Press the button, and wait until the result is there.
    """
    page.get_by_role("button", name="Transcribe").click()
    expect(page.locator("#cancel")).to_be_hidden()
    expect(page.locator(".reading .detail").last).not_to_contain_text("at work")


def silence(seconds: int) -> bytes:
    """
    A WAV file that can be played.
    """
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(2 * 8000 * seconds))
    return written.getvalue()


@contextmanager
def waiting_for(cache: ModelCache, model: str, device: str) -> Iterator[None]:
    """
    Let a request wait for a model for which there is no room yet.
    """

    def ask() -> None:
        with cache.lease(model, device):
            pass

    asker = threading.Thread(target=ask)
    asker.start()
    wait_until(lambda: len(cache.waiting()) == 1)
    yield
    cache.evict("medium", device)
    asker.join(10)
