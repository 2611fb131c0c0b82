"""
The page's design, measured in a real browser: colours, contrast, names and widths.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import browsing
import pytest
from browsing import (
    HURRY,
    PAGE,
    UNDER_WAY,
    choose_recording,
    listed,
    row_of,
    silence,
    violations_on,
    waiting_for,
)
from playwright.sync_api import expect

if TYPE_CHECKING:
    from browsing import Stub, Visit

pytestmark = pytest.mark.browser

# The colours of names; they never change.
HUES = {
    "tiny": 10,
    "tiny.en": 3,
    "base": 9,
    "small": 11,
    "medium": 7,
    "large-v3": 1,
    "turbo": 8,
    "base:int8": 6,
    "large-v2": 2,
    "distil-large-v3": 5,
    "日本語": 0,
}

# For each hue, the contrast of the text on it, and of its rim on a panel. A canvas
# tells the red, green and blue of a colour.
CONTRASTS = """() => {
    const canvas = document.createElement("canvas").getContext(
        "2d", {willReadFrequently: true});
    const light = (colour) => {
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((n) => {
            const part = n / 255;
            return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const contrast = (a, b) => {
        const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
        return (high + 0.05) / (low + 0.05);
    };
    const panel = getComputedStyle(document.querySelector(".panel")).backgroundColor;
    const look = (name, hue, busy) => {
        const made = document.createElement("div");
        made.className = `${name} hue-${hue}`;
        made.dataset.look = busy ? "busy" : "idle";
        document.querySelector(".panel").append(made);
        return getComputedStyle(made);
    };
    return Array.from({length: 12}, (_, hue) => {
        const texts = [false, true].map((busy) => {
            const segment = look("segment", hue, busy);
            const fill = getComputedStyle(
                document.querySelector(".panel").lastElementChild, "::before");
            return contrast(segment.color, fill.backgroundColor);
        });
        const rim = look("swatch", hue).borderTopColor;
        return [Math.min(...texts), contrast(rim, panel)];
    });
}"""

# Fixtures.
browser, stub, visit = browsing.browser, browsing.stub, browsing.visit


def test_a_model_has_the_colour_of_its_name(stub: Stub, visit: Visit) -> None:
    """
    Wherever it appears, on every page and in every version: the numbers are for ever.
    The usual models of a server have one each.
    """
    stub.cache.preload("small", "cuda:0")
    page = visit(stub.url)
    expect(page.locator(".segment")).to_have_class(f"segment hue-{HUES['small']}")
    expect(row_of(page, "small").locator(".swatch")).to_have_class(
        f"swatch hue-{HUES['small']}"
    )
    found = page.evaluate(
        """async (names) => {
            const {hueOf} = await import("./page/dom.js");
            return names.map(hueOf);
        }""",
        list(HUES),
    )
    assert found == [f"hue-{number}" for number in HUES.values()]
    usual = [HUES[name] for name in HUES if name != "日本語"]
    assert len(set(usual)) == len(usual)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_can_be_read(stub: Stub, visit: Visit, scheme: str) -> None:
    """
    WCAG's 4.5 for text on a model's colour, and 3 for its mark on a panel.
    """
    page = visit(stub.url, color_scheme=scheme)
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) == 12
    for text, rim in contrasts:
        assert text >= 4.5
        assert rim >= 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_wrong(stub: Stub, visit: Visit, scheme: str) -> None:
    """
    Contrast, names, roles and structure, in every state that the page has.
    """
    stub.texts = {"base": ["A quick fox."], "small": ["A slow fox."]}
    over = [
        {**UNDER_WAY, "id": outcome, "phase": "over", "outcome": outcome}
        for outcome in ("answered", "refused", "failed")
    ]
    stub.requests = {**listed(*over), "under_way": [UNDER_WAY]}
    stub.cache.pin("medium", "cuda:0")
    stub.cache.preload("base", "cuda:1")
    with (
        stub.cache.lease("small", "cuda:0"),
        waiting_for(stub.cache, "large-v3", "cuda:0"),
    ):
        page = visit(stub.url, color_scheme=scheme, permissions=["microphone"])
        expect(page.locator("#requests-list > li")).to_have_count(4)
        assert violations_on(page) == []
        page.get_by_role("button", name="Record").click()
        stop = page.get_by_role("button", name="Stop,")
        expect(stop).to_be_visible()
        assert violations_on(page) == []
        stop.click()
        choose_recording(page, "base", "small", content=silence(9))
        page.get_by_role("button", name="Transcribe").click()
        expect(page.locator("#verdict")).to_be_visible()
        page.evaluate("() => { document.querySelector('#player').currentTime = 1; }")
        expect(page.locator("[data-now]")).to_have_count(2)
        assert violations_on(page) == []
        stub.cache.evict("medium", "cuda:0")
    stub.stop()
    expect(page.locator("#trouble-place")).to_contain_text("does not answer")
    assert violations_on(page) == []
    stub.start()
    stub.key = "sesame"
    expect(page.locator("#key")).to_be_visible()
    expect(page.locator("#pulse")).to_have_text("needs a key")
    assert violations_on(page) == []


def test_a_narrow_screen_needs_no_sideways_scrolling(stub: Stub, visit: Visit) -> None:
    """
    320 pixels are a phone, or a desktop at 400 %.
    """
    stub.texts = {"base": ["Hello. " * 20], "small": ["x" * 200]}
    stub.cache.preload("large-v3", "cuda:0")
    stub.cache.preload("base", "cuda:1")
    page = visit(stub.url, viewport={"width": 320, "height": 640})
    choose_recording(page, "base", "small")
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
