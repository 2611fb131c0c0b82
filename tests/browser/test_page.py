"""
The page: in a real browser, over a small server with a real cache on the fakes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import browsing
import pytest
from browsing import (
    UNDER_WAY,
    Stub,
    choose_recording,
    listed,
    row_of,
    waiting_for,
)
from playwright.sync_api import expect

from whispercache.testing import wait_until

if TYPE_CHECKING:
    from browsing import Visit
    from conftest import MakeCache

    from whispercache.testing import FakeClock, FakeLoader

pytestmark = pytest.mark.browser
# Fixtures.
browser, stub, visit = browsing.browser, browsing.stub, browsing.visit


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


def test_requests_are_listed(stub: Stub, visit: Visit) -> None:
    """
    Those under way with the time of their phase, then those that are over: who asked,
    how long it waited, loaded and worked. A client that hung up is no error.
    """
    left = {**UNDER_WAY, "id": "2", "phase": "over", "outcome": "left", "who": None}
    stub.requests = {**listed(left), "under_way": [UNDER_WAY]}
    page = visit(stub.url)
    first, second = (page.locator("#requests-list > li").nth(n) for n in range(2))
    expect(first).to_contain_text("working")
    expect(first).to_contain_text(
        re.compile(
            r"base transcript.*anna · waited 0\.5 s · loaded 1\.5 s · working 0:0\d"
            r" · 0:13 of audio"
        )
    )
    expect(second.locator(".chip")).to_have_text("cancelled")
    expect(page.locator("#requests-count")).to_have_text("1")
    stub.requests = listed(left)
    expect(page.locator("#requests-list > li")).to_have_count(1)
    expect(page.locator("#requests-count")).to_be_empty()


def test_a_server_without_a_list_of_requests_has_no_such_part(
    stub: Stub, visit: Visit
) -> None:
    """
    It is not asked again and again.
    """
    page = visit(stub.url)
    expect(page.locator("#pulse")).to_have_text("live")
    expect(page.locator("#requests")).to_be_hidden()
    wait_until(lambda: stub.asked.count("GET /api/ps") > 3)
    assert stub.asked.count("GET /api/requests") == 1


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
    page.locator("footer").scroll_into_view_if_needed()
    stub.stop()
    trouble = page.get_by_role("alert").filter(has_text="does not answer")
    expect(trouble).to_contain_text("What you see is of")
    # Wherever one has scrolled.
    expect(trouble).to_be_in_viewport()
    expect(page.locator("#transcribe-title")).not_to_be_in_viewport()
    expect(page.locator("#pulse")).to_contain_text("no answer 0:")
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
    n_asked = -1
    # Until what was on its way has come: it asks every 100 ms while it is seen.
    while n_asked < len(stub.asked):
        n_asked = len(stub.asked)
        page.wait_for_timeout(500)
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
        expect(row_of(page, "small")).to_contain_text(re.compile("loading 0:0[1-9]"))
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
        choose_recording(page, evil, "small")
        page.get_by_role("button", name="Transcribe").click()
        expect(page.locator("#verdict")).to_be_visible()
        expect(page.locator(".said").first).to_have_text(f"{evil} one")
        assert page.locator("img[src=x]").count() == 0
        assert page.evaluate("() => window.hurt") is None
    finally:
        stub.stop()
        stub.watch.close()
