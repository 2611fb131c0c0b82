"""
The page: in a real browser, over a small server with a real cache on the fakes.

The server is a stand-in where a test must control what goes wrong, and when; the last
tests use the real one.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

import whispercache
from whispercache.errors import WhisperCacheError
from whispercache.testing import Gate, wait_until
from whispercache.watch.live import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import MakeCache
    from playwright.sync_api import (
        Browser,
        ConsoleMessage,
        FilePayload,
        Locator,
        Page,
    )

    from whispercache import ModelCache, ModelKey
    from whispercache.testing import FakeClock, FakeLoader

pytestmark = pytest.mark.browser

PAGE = Path(whispercache.__file__).parent / "server" / "page"
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
PATIENCE_MS = 60_000
expect.set_options(timeout=PATIENCE_MS)
# The page asks ten times as often, so that tests wait less.
HURRY = (b"POLL_MS = 1000", b"POLL_MS = 100")

# Two texts, and what only the first, and only the second of them has.
DIFFERENCES: list[tuple[str, str, list[str], list[str]]] = [
    ("", "", [], []),
    ("a b c", "a b c", [], []),
    ("A b, c!", "a B c", [], []),
    ("a b c d", "a x c", ["b", "d"], ["x"]),
    ("a b c d", "a d", ["b c"], []),
    ("a", "", ["a"], []),
    ("x y z", "a b c", ["x y z"], ["a b c"]),
    ("one two three", "two three four", ["one"], ["four"]),
    ("the cat sat", "oh the cat sat", [], ["oh"]),
    ("東京に行く", "京都に行く", ["東京"], ["京都"]),
]


class Stub:
    """
    A server that answers as the real one does, and errs on demand.

    Attributes:
        cache: What it serves.
        places: The models on its list: name, device and compute type, by id.
        key: Asked for, unless empty.
        texts: What each model hears, in pieces; an `Exception` is raised in its place.
        gates: By model, what its transcription waits for before the last piece.
        trouble: Answers ``/api/ps`` in place of the snapshot: status and body.
        asked: The requests that came, as ``"GET /path"``.
    """

    def __init__(self, cache: ModelCache, places: dict[str, tuple[str, str]]) -> None:
        self.cache = cache
        self.places = places
        self.key = ""
        self.texts: dict[str, list[str]] = {}
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
        found = re.search(rb'name="model"\r\n\r\n([^\r]*)', body)
        model = found[1].decode() if found else ""
        if model not in self.stub.texts:
            self._error(400, f"{model} cannot read this")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        pieces = self.stub.texts[model]
        for place, piece in enumerate(pieces):
            if place == len(pieces) - 1 and model in self.stub.gates:
                self.stub.gates[model].pass_through()
            self._event({"type": "transcript.text.delta", "delta": piece})
        text = "".join(pieces)
        self._event({"type": "transcript.text.done", "text": text, "duration": 12})

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

    def _error(self, status: int, message: str) -> None:
        error = {"message": message, "type": "error", "param": None, "code": None}
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
            executable_path=chromium, args=["--no-sandbox"]
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
                None if asked.url.startswith(url) else complaints.append(asked.url)
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


def choose_recording(page: Page) -> None:
    """
    Choose a file, as the button for it does.
    """
    expect(page.locator("#model-a option")).not_to_have_count(0)
    recording: FilePayload = {
        "name": "talk.wav",
        "mimeType": "audio/wav",
        "buffer": b"RIFF" * 99,
    }
    page.set_input_files("#audio", recording)


def test_the_page_shows_what_the_cache_does(
    stub: Stub, visit: Visit, clock: FakeClock
) -> None:
    """
    Devices and their models, by bytes, state and time left; who waits; what happened.
    """
    with stub.cache.lease("small", "cuda:0"), stub.cache.lease("small", "cuda:0"):
        stub.cache.preload("base", "cuda:1")
        stub.cache.pin("medium", "cuda:0")
        clock.tick(83)
        with waiting_for(stub.cache, "large-v3", "cuda:0"):
            page = visit(stub.url)
            card = page.locator(".device").filter(has_text="cuda:0")
            expect(card.locator(".figures")).to_have_text("5.0 GiB of 10.0 GiB")
            expect(card.get_by_role("img")).to_have_accessible_name(
                re.compile(
                    "cuda:0: 5.0 GiB of 10.0 GiB used; .*(medium 3.0|small 2.0) GiB"
                )
            )
            small = card.get_by_role("row").filter(has_text="small")
            expect(small).to_contain_text("in use by 2")
            expect(small).to_contain_text("after use")
            expect(card.get_by_role("row").filter(has_text="medium")).to_contain_text(
                "pinned"
            )
            base = page.get_by_role("row").filter(has_text="base")
            expect(base).to_contain_text(re.compile("idle 1:2[3-9]"))
            expect(base).to_contain_text(re.compile("in 3:3[0-7]"))
            expect(page.locator("#queue > li")).to_contain_text("org/name:v1 #2")
            expect(page.locator("#queue-count")).to_have_text("1")
            stub.cache.evict("medium", "cuda:0")
            expect(page.locator("#events > li")).not_to_have_count(0)
    expect(page.locator("#no-queue")).to_be_visible()
    left = page.locator("#events > li.evicted").first
    expect(left).to_contain_text("medium left on request: 3.0 GiB free")


def test_segments_are_as_wide_as_models_are_large(stub: Stub, visit: Visit) -> None:
    """
    A bar tells the truth: 3 of 10 GiB fill three tenths of it.
    """
    stub.cache.preload("medium", "cuda:0")
    page = visit(stub.url)
    expect(page.locator(".segment")).to_have_count(1)
    share = page.evaluate(
        "() => document.querySelector('.segment').getBoundingClientRect().width"
        " / document.querySelector('.segments').getBoundingClientRect().width"
    )
    assert share == pytest.approx(0.3, abs=0.01)


def test_clocks_go_on_between_two_answers(
    stub: Stub, visit: Visit, clock: FakeClock
) -> None:
    """
    The server's clock stands still here; the page's does not, until the next answer.
    """
    stub.cache.preload("base", "cuda:1")
    clock.tick(60)
    page = visit(stub.url)
    page.wait_for_selector(".leaves")
    page.evaluate(
        """() => {
            window.seen = new Set();
            new MutationObserver(() => window.seen.add(
                document.querySelector(".ring .left").style.strokeDasharray,
            )).observe(document.querySelector(".devices"),
                {subtree: true, attributes: true, childList: true});
        }"""
    )
    page.wait_for_function("() => window.seen.size >= 5")
    expect(page.locator(".leaves")).to_have_text(re.compile("in (4:00|3:59)"))


def test_a_server_that_is_gone_is_said_to_be_and_comes_back(
    stub: Stub, visit: Visit
) -> None:
    """
    What was seen last stays, with its time; nothing has to be reloaded.
    """
    stub.cache.preload("base", "cuda:1")
    page = visit(stub.url)
    expect(page.locator("#pulse")).to_have_text("live")
    stub.stop()
    trouble = page.get_by_role("alert").filter(has_text="does not answer")
    expect(trouble).to_contain_text("What you see is of")
    expect(page.locator("#pulse")).to_contain_text("no answer 0:0")
    expect(page.get_by_role("row").filter(has_text="base")).to_be_visible()
    stub.cache.evict("base")
    stub.start()
    expect(trouble).to_have_count(0)
    expect(page.locator("#announcer")).to_have_text("The server answers again.")
    expect(row_of(page, "base")).to_contain_text("not in memory")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, b'{"error": {"message": "out of order"}}'), "out of order"),
        ((502, b"<h1>Bad gateway</h1>"), "The server answered 502"),
        ((200, b"<h1>Hello</h1>"), "is not whispercache's"),
        ((200, b"{}"), "Something else than whispercache answers."),
    ],
)
def test_an_answer_that_is_none_is_said_to_be(
    stub: Stub, visit: Visit, answer: tuple[int, bytes], said: str
) -> None:
    """
    Whatever a proxy or another program answers, the page says so and asks again.
    """
    stub.trouble = answer
    page = visit(stub.url)
    expect(page.locator("#trouble-place")).to_contain_text(said)
    stub.trouble = None
    expect(page.locator("#pulse")).to_have_text("live")


def test_a_hidden_page_asks_nothing(stub: Stub, visit: Visit) -> None:
    """
    It goes on when somebody looks again.
    """
    page = visit(stub.url)
    expect(page.locator("#offers > li")).to_have_count(4)
    look = """(state) => {
        Object.defineProperty(document, "hidden", {value: state, configurable: true});
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.evaluate(look, arg=True)
    page.wait_for_timeout(200)  # for a request that was on its way
    n_asked = len(stub.asked)
    page.wait_for_timeout(500)
    assert len(stub.asked) == n_asked
    page.evaluate(look, arg=False)
    wait_until(lambda: len(stub.asked) > n_asked + 1)


def test_the_keyboard_alone_loads_pins_and_evicts(stub: Stub, visit: Visit) -> None:
    """
    Tab reaches every button, in order; the result is announced; focus stays.
    """
    page = visit(stub.url)
    expect(page.locator("#offers > li")).to_have_count(4)
    page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_text("Skip to the models")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_accessible_name("Load base")
    page.keyboard.press("Enter")
    announcer = page.get_by_role("status")
    expect(announcer).to_have_text("base is in memory.")
    expect(page.locator(":focus")).to_have_accessible_name("Load base")
    expect(page.locator(":focus")).to_have_attribute("aria-disabled", "true")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(announcer).to_have_text("base is in memory and stays.")
    expect(page.locator(":focus")).to_have_accessible_name("Unpin base")
    page.keyboard.press("Space")
    expect(announcer).to_have_text("base may leave again.")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(announcer).to_have_text("base has left memory.")
    expect(page.locator(":focus")).to_have_accessible_name("Evict base")
    assert not stub.cache.models()


def test_focus_stays_while_the_page_changes(stub: Stub, visit: Visit) -> None:
    """
    Models come and go, others are listed first; the very same button keeps focus.
    """
    page = visit(stub.url)
    button = page.get_by_role("button", name="Load medium")
    button.focus()
    page.evaluate("() => { window.focused = document.activeElement; }")
    stub.cache.preload("small", "cuda:0")
    expect(row_of(page, "small")).to_contain_text("idle")
    stub.cache.preload("medium", "cuda:0")
    expect(row_of(page, "medium")).to_contain_text("idle")
    stub.cache.evict("medium", "cuda:0")
    expect(row_of(page, "medium")).to_contain_text("not in memory")
    assert page.evaluate("() => window.focused === document.activeElement")


def test_an_error_is_shown_beside_what_caused_it(
    stub: Stub, visit: Visit, loader: FakeLoader, clock: FakeClock
) -> None:
    """
    In the server's words, as an alert; the other models' lines stay as they are.
    """
    loader.fail_loads["small"].append(RuntimeError("model.bin is truncated"))
    page = visit(stub.url)
    page.get_by_role("button", name="Load small").click()
    expect(row_of(page, "small").get_by_role("alert")).to_contain_text(
        "model.bin is truncated"
    )
    expect(row_of(page, "base").get_by_role("alert")).to_be_empty()
    clock.tick(60)  # a load that failed is not tried again at once
    page.get_by_role("button", name="Load small").click()
    expect(row_of(page, "small").get_by_role("alert")).to_be_empty()


def test_a_name_with_slashes_and_marks_reaches_the_server(
    stub: Stub, visit: Visit
) -> None:
    """
    Slashes stay, all else is quoted.
    """
    page = visit(stub.url)
    page.get_by_role("button", name="Load org/name:v1 #2").click()
    expect(page.get_by_role("status")).to_have_text("org/name:v1 #2 is in memory.")
    assert "POST /api/models/org/name%3Av1%20%232/load" in stub.asked


def test_a_load_that_waits_can_be_stopped(
    stub: Stub, visit: Visit, loader: FakeLoader
) -> None:
    """
    The button that began it ends it, but not by the second half of a double click.
    """
    page = visit(stub.url)
    with loader.holding_loads("small") as gate:
        page.get_by_role("button", name="Load small").dblclick()
        gate.wait_reached()
        expect(row_of(page, "small")).to_contain_text("loading 0:01")
        page.get_by_role("button", name="Cancel small").click()
        expect(page.get_by_role("status")).to_have_text("Stopped loading small.")


def test_loads_that_wait_leave_the_page_connections(
    stub: Stub, visit: Visit, loader: FakeLoader
) -> None:
    """
    A browser opens six; three actions may take long at a time, and the page stays live.
    """
    page = visit(stub.url)
    with loader.holding_loads("small") as gate:
        page.get_by_role("button", name="Load small").click()
        # Before small's load is under way, the next could be done and leave its place.
        gate.wait_reached()
        for name in ("Pin medium", "Load org/name:v1 #2", "Load base"):
            page.get_by_role("button", name=name).click()
        expect(row_of(page, "base").get_by_role("alert")).to_contain_text("Wait until")
        stub.cache.preload("base", "cuda:1")
        expect(row_of(page, "base")).to_contain_text("idle 0:0")
    expect(page.get_by_role("button", name="Cancel small")).to_have_count(0)
    page.get_by_role("button", name="Evict base").click()
    expect(page.get_by_role("status")).to_have_text("base has left memory.")
    expect(row_of(page, "base").get_by_role("alert")).to_be_empty()


def test_a_server_with_keys_is_given_one(stub: Stub, visit: Visit) -> None:
    """
    The page asks for it, says if it is wrong, and keeps it for the tab alone.
    """
    stub.key = "open-sesame"
    page = visit(stub.url)
    field = page.get_by_label("This server answers those who")
    expect(field).to_be_focused()
    page.keyboard.type("sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#key-error")).to_contain_text("That key does not fit")
    field.fill("schlüssel")
    page.keyboard.press("Enter")
    expect(page.locator("#key-error")).to_contain_text("ASCII")
    field.fill("open-sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#offers > li")).to_have_count(4)
    expect(page.locator("#key")).to_be_hidden()
    page.get_by_role("button", name="Load base").click()
    expect(page.get_by_role("status")).to_have_text("base is in memory.")
    assert page.evaluate("() => localStorage.length") == 0
    assert "sesame" not in page.content()
    page.get_by_role("button", name="Forget the key").click()
    expect(field).to_be_visible()


def test_names_and_texts_are_never_markup(make_cache: MakeCache, visit: Visit) -> None:
    """
    Names and transcripts with tags in them are shown as they are.
    """
    evil = '<img src=x onerror="window.hurt=1">'
    stub = Stub(make_cache(), {evil: ("base", "cuda:0"), "small": ("small", "cuda:0")})
    stub.texts = {evil: [f"{evil} one"], "small": [f"{evil} two"]}
    stub.start()
    try:
        stub.cache.preload("base", "cuda:0")
        page = visit(stub.url)
        expect(page.locator("#offers > li").first).to_contain_text(evil)
        expect(page.locator(".device .name").last).to_have_text(evil)
        choose_recording(page)
        page.get_by_role("button", name="Transcribe").click()
        expect(page.locator("#verdict")).to_be_visible()
        expect(page.locator(".transcript").first).to_have_text(f"{evil} one")
        assert page.locator("img[src=x]").count() == 0
        assert page.evaluate("() => window.hurt") is None
    finally:
        stub.stop()
        stub.watch.close()


def test_two_models_read_a_recording_side_by_side(stub: Stub, visit: Visit) -> None:
    """
    Words as they come, the time that it took, and what only one of them heard.
    """
    stub.texts = {
        "base": ["The quick", " brown fox", " jumps over it."],
        "small": ["the quick", " brown dog", " jumps."],
    }
    gate = stub.gates["base"] = Gate()
    page = visit(stub.url)
    choose_recording(page)
    page.get_by_role("button", name="Transcribe").click()
    first, second = page.locator(".reading").all()
    expect(first.locator(".transcript")).to_have_text("The quick brown fox")
    expect(second).to_contain_text("waits for its turn")
    gate.open()
    expect(page.locator("#verdict")).to_contain_text("67 % of the words agree")
    assert first.locator("del").all_text_contents() == ["fox", "over it"]
    assert second.locator("ins").all_text_contents() == ["dog"]
    expect(first.locator(".detail")).to_have_text(
        re.compile(r"\d+\.\d s · first words after .* × real time")
    )
    sent = [asked for asked in stub.asked if "transcriptions" in asked]
    assert sent == ["POST /v1/audio/transcriptions"] * 2


def test_a_dropped_file_is_chosen(stub: Stub, visit: Visit) -> None:
    """
    Dropping is one way; the button is the other, for keyboards.
    """
    stub.texts = {"base": ["Hello."], "small": ["Hello."]}
    page = visit(stub.url)
    expect(page.locator("#model-a option")).not_to_have_count(0)
    page.evaluate(
        """() => {
            const files = new DataTransfer();
            files.items.add(new File(["RIFF"], "dropped.wav"));
            document.querySelector("#listen").dispatchEvent(new DragEvent(
                "drop", {dataTransfer: files, bubbles: true, cancelable: true}));
        }"""
    )
    expect(page.locator("#listen-hint")).to_have_text("Chosen: dropped.wav, 4 B.")
    page.get_by_role("button", name="Transcribe").click()
    expect(page.locator("#verdict")).to_have_text("Both read the same word.")


def test_a_transcription_can_be_cancelled(stub: Stub, visit: Visit) -> None:
    """
    The server hears of it; the second model does not begin; another try is free.
    """
    stub.texts = {"base": ["One", " two."], "small": ["One."]}
    gate = stub.gates["base"] = Gate()
    page = visit(stub.url)
    choose_recording(page)
    page.get_by_role("button", name="Transcribe").click()
    first, second = page.locator(".reading").all()
    expect(first.locator(".transcript")).to_have_text("One")
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(first.get_by_role("alert")).to_have_text("Cancelled.")
    expect(second.get_by_role("alert")).to_have_text("Cancelled.")
    expect(second).to_contain_text("not begun")
    assert sum("transcriptions" in asked for asked in stub.asked) == 1
    gate.open()
    page.get_by_role("button", name="Transcribe").click()
    expect(page.locator("#verdict")).to_be_visible()


def test_a_model_that_fails_says_so_beside_the_other(stub: Stub, visit: Visit) -> None:
    """
    One error does not take the other's text away.
    """
    stub.texts = {"small": ["Hello."]}
    page = visit(stub.url)
    expect(page.locator("#model-a option")).not_to_have_count(0)
    page.get_by_role("button", name="Transcribe").click()
    expect(page.locator("#listen-error")).to_have_text("Choose a recording first.")
    choose_recording(page)
    page.get_by_role("button", name="Transcribe").click()
    first, second = page.locator(".reading").all()
    expect(second.locator(".transcript")).to_have_text("Hello.")
    expect(first.get_by_role("alert")).to_have_text("base cannot read this")


def test_words_that_differ_are_found(stub: Stub, visit: Visit) -> None:
    """
    The fewest that do; case and punctuation make no difference, and no text is lost.
    """
    page = visit(stub.url)
    for first, second, left, right in DIFFERENCES:
        found = page.evaluate(
            """async (texts) => {
                const {compare} = await import("./page/diff.js");
                const {first, second} = compare(...texts);
                return [first, second];
            }""",
            [first, second],
        )
        for runs, text, marked in zip(
            found, (first, second), (left, right), strict=True
        ):
            assert "".join(run["text"] for run in runs) == text
            assert [run["text"] for run in runs if run["differs"]] == marked


def test_an_hour_of_speech_is_compared_in_no_time(stub: Stub, visit: Visit) -> None:
    """
    Texts with little in common are not compared to the bitter end.
    """
    page = visit(stub.url)
    shares = page.evaluate(
        """async () => {
            const {compare} = await import("./page/diff.js");
            const words = Array.from({length: 9000}, (_, i) => `w${i * 7919 % 6007}`);
            const other = words.map((word, i) => (i % 10 ? word : `x${i}`));
            const share = compare(words.join(" "), other.join(" ")).share;
            const none = compare(words.join(" "), words.toReversed().join(" "));
            return [share, none];
        }"""
    )
    assert shares == [pytest.approx(0.9), None]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_wrong(stub: Stub, visit: Visit, scheme: str) -> None:
    """
    Contrast, names, roles and structure, in every state that the page has.
    """
    stub.texts = {"base": ["A quick fox."], "small": ["A slow fox."]}
    stub.cache.pin("medium", "cuda:0")
    stub.cache.preload("base", "cuda:1")
    with (
        stub.cache.lease("small", "cuda:0"),
        waiting_for(stub.cache, "large-v3", "cuda:0"),
    ):
        page = visit(stub.url, color_scheme=scheme)
        choose_recording(page)
        page.get_by_role("button", name="Transcribe").click()
        expect(page.locator("#verdict")).to_be_visible()
        assert violations_on(page) == []
        stub.cache.evict("medium", "cuda:0")
    stub.stop()
    expect(page.locator("#trouble-place")).to_contain_text("does not answer")
    assert violations_on(page) == []
    stub.start()
    stub.key = "sesame"
    expect(page.locator("#key")).to_be_visible()
    assert violations_on(page) == []


def test_a_narrow_screen_needs_no_sideways_scrolling(stub: Stub, visit: Visit) -> None:
    """
    320 pixels are a phone, or a desktop at 400 %.
    """
    stub.texts = {"base": ["Hello. " * 20], "small": ["x" * 200]}
    stub.cache.preload("large-v3", "cuda:0")
    stub.cache.preload("base", "cuda:1")
    page = visit(stub.url, viewport={"width": 320, "height": 640})
    choose_recording(page)
    page.get_by_role("button", name="Transcribe").click()
    expect(page.locator("#verdict")).to_be_visible()
    assert page.evaluate("() => document.documentElement.scrollWidth") == 320


def test_all_addresses_are_relative(stub: Stub) -> None:
    """
    So that the page works below any path of a reverse proxy, and without a network.
    """
    assert HURRY[0] in (PAGE / "app.js").read_bytes()
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/", "")
        assert not re.search(r"https?://|[\"'(]/(?!/)\w", text), file.name
    assert stub.port


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


def test_the_real_server_serves_the_page(visit: Visit) -> None:
    """
    With real models: load, listen to a real recording with two, evict.
    """
    from real import clip, micro
    from served import serving

    from whispercache import ModelCache
    from whispercache.engine.naming import ModelSpec

    models = (
        ModelSpec("hello", str(micro("micro says hello"))),
        ModelSpec("bye", str(micro("micro says goodbye"))),
    )
    with ModelCache() as cache, serving(cache, models=models, decoders=1) as client:
        page = visit(f"{client.base_url}/")
        page.get_by_role("button", name="Load hello").click()
        expect(page.get_by_role("status")).to_have_text("hello is in memory.")
        expect(page.get_by_role("row").filter(has_text="hello")).to_contain_text("idle")
        page.set_input_files("#audio", clip("en-bread"))
        page.get_by_role("button", name="Transcribe").click()
        expect(page.locator("#verdict")).to_contain_text("% of the words agree")
        expect(page.locator(".transcript del").first).to_have_text("hello")
        expect(page.locator(".transcript ins").first).to_have_text("goodbye")
        page.get_by_role("button", name="Evict hello").click()
        expect(page.get_by_role("status")).to_have_text("hello has left memory.")
        expect(row_of(page, "hello")).to_contain_text("not in memory")


def test_the_real_server_gets_its_key_from_the_page(visit: Visit) -> None:
    """
    The page itself needs none, and with one everything works, uploads included.
    """
    from real import micro
    from served import serving

    from whispercache import ModelCache
    from whispercache.engine.naming import ModelSpec

    models = (ModelSpec("hello", str(micro())),)
    keys = ("open-sesame",)
    with (
        ModelCache() as cache,
        serving(cache, models=models, keys=keys, decoders=1) as client,
    ):
        page = visit(f"{client.base_url}/")
        page.get_by_label("This server answers those who").fill("open-sesame")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Pin hello").click()
        expect(page.get_by_role("status")).to_have_text("hello is in memory and stays.")
        choose_recording(page)
        page.get_by_role("button", name="Transcribe").click()
        refused = page.locator(".reading").get_by_role("alert")
        expect(refused).to_contain_text("audio")
