"""
The page's part that transcribes, in a real browser.

Most tests have a stand-in for the server; the last ones use the real one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import browsing
import pytest
from browsing import UNDER_WAY, choose_recording, listed, row_of, transcribe
from playwright.sync_api import expect

from whispercache.engine.calls.languages import LANGUAGES
from whispercache.testing import Gate

if TYPE_CHECKING:
    from browsing import Stub, Visit
    from playwright.sync_api import FilePayload


pytestmark = pytest.mark.browser
SOME_SECONDS = re.compile(r"Stop, 0:0[1-9]")

# Fixtures.
browser, stub, visit = browsing.browser, browsing.stub, browsing.visit


def test_a_recording_is_transcribed_with_its_times(stub: Stub, visit: Visit) -> None:
    """
    Lines as they come, each with its time; the language is told where it was found.
    """
    stub.texts = {"base": [" The quick", " brown fox", " jumps over it."]}
    gate = stub.gates["base"] = Gate()
    page = visit(stub.url)
    choose_recording(page)
    page.get_by_role("button", name="Transcribe").click()
    said = page.locator(".said")
    expect(said).to_have_text("The quick brown fox")
    expect(page.locator(".reading .detail")).to_have_text(re.compile(r"at work, \d"))
    gate.open()
    expect(said).to_have_text(["The quick", "brown fox", "jumps over it."])
    expect(page.locator(".at")).to_have_text(["0:00", "0:02", "0:04"])
    told = re.compile(r"took \d+\.\d s · [\d.]+ × real time · English")
    expect(page.locator(".reading .detail")).to_have_text(told)
    (sent,) = stub.forms
    assert b'name="language"' not in sent
    assert page.locator(".reading").count() == 1


def test_loading_is_told_apart_from_working(stub: Stub, visit: Visit) -> None:
    """
    As the server's list of requests has it, by the id of the answer.
    """
    stub.texts = {"base": ["Hello."], "small": ["Hello."]}
    seconds = {
        "loading": 1.5,
        "downloading": 0,
        "waiting": 0.5,
        "working": 3,
        "total": 5,
    }
    stub.requests = listed(
        {"id": "of base", "seconds": seconds},
        {"id": "of small", "seconds": {**seconds, "loading": 0, "waiting": 0}},
    )
    page = visit(stub.url)
    choose_recording(page, "base", "small")
    transcribe(page)
    expect(page.locator(".reading .detail")).to_have_text(
        [
            "worked 3.0 s · 4.0 × real time · loaded in 1.5 s · waited 0.5 s · English",
            "worked 3.0 s · 4.0 × real time · was in memory · English",
        ]
    )


def test_what_is_done_meanwhile_is_told(stub: Stub, visit: Visit) -> None:
    """
    Who waits for others, or for a model to be loaded, reads that.
    """
    stub.texts = {"base": ["Hello."]}
    gate = stub.gates["base"] = Gate()
    stub.requests = listed({**UNDER_WAY, "id": "of base", "phase": "loading"})
    page = visit(stub.url)
    choose_recording(page)
    page.get_by_role("button", name="Transcribe").click()
    told = page.locator(".reading .detail")
    expect(told).to_contain_text("the model is loaded, ")
    stub.requests = listed({**UNDER_WAY, "id": "of base", "phase": "working"})
    expect(told).to_contain_text("at work, ")
    gate.open()


def test_two_models_are_compared(stub: Stub, visit: Visit) -> None:
    """
    Side by side, with what only one of them heard; words keep their times.
    """
    stub.texts = {
        "base": [" The quick", " brown fox jumps over it."],
        "small": [" the quick brown dog", " jumps."],
    }
    gate = stub.gates["base"] = Gate()
    page = visit(stub.url)
    choose_recording(page, "base", "small")
    expect(page.get_by_label("Compare two models")).to_have_value("small")
    page.get_by_role("button", name="Transcribe").click()
    first, second = (page.locator(".reading").nth(n) for n in range(2))
    expect(second).to_contain_text("waits for its turn")
    gate.open()
    expect(page.locator("#verdict")).to_contain_text("67 % of the words agree")
    assert first.locator("del").all_text_contents() == ["fox", "over it"]
    assert second.locator("ins").all_text_contents() == ["dog"]
    assert first.locator("[data-start]").all_text_contents() == [
        *("The", "quick", "brown", "fox", "jumps", "over", "it", ".")
    ]
    assert second.locator(".said").all_text_contents() == [
        "the quick brown dog",
        "jumps.",
    ]
    sent = [asked for asked in stub.asked if "transcriptions" in asked]
    assert sent == ["POST /v1/audio/transcriptions"] * 2


def test_a_file_is_chosen_wherever_it_is_dropped(stub: Stub, visit: Visit) -> None:
    """
    Dropping is one way; the button is the other, for keyboards. Nothing on the page
    says that no file is chosen when one is.
    """
    stub.texts = {"base": ["Hello."]}
    page = visit(stub.url)
    expect(page.locator("#model-a option")).not_to_have_count(0)
    page.evaluate(
        """() => {
            const files = new DataTransfer();
            files.items.add(new File(["RIFF"], "dropped.wav"));
            const how = {dataTransfer: files, bubbles: true, cancelable: true};
            const place = document.querySelector("footer");
            const drag = (kind) => place.dispatchEvent(new DragEvent(kind, how));
            drag("dragenter");
            window.isMarked = document.body.hasAttribute("data-over");
            drag("drop");
        }"""
    )
    assert page.evaluate("() => window.isMarked")
    expect(page.locator("body")).not_to_have_attribute("data-over", "")
    expect(page.locator("#source .what")).to_have_text(
        re.compile(r"dropped\.wav\s+4 B")
    )
    # The browser's own words for it stand in a box of one pixel.
    expect(page.locator("#audio")).to_have_css("width", "1px")
    transcribe(page)
    expect(page.locator("#result-title")).to_have_text("dropped.wav")
    assert b'filename="dropped.wav"' in stub.forms[0]


def test_the_keyboard_alone_chooses_a_file(stub: Stub, visit: Visit) -> None:
    """
    The button for it is a field of the browser's, with its focus ring.
    """
    page = visit(stub.url)
    talk: FilePayload = {
        "name": "talk.wav",
        "mimeType": "audio/wav",
        "buffer": b"RIFF",
    }
    page.on("filechooser", lambda chooser: chooser.set_files(talk))
    expect(page.locator("#model-a option")).not_to_have_count(0)
    field = page.get_by_label("Choose a file")
    field.focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    expect(field).to_be_focused()
    expect(page.locator("label[for=audio]")).to_have_css("outline-style", "solid")
    page.keyboard.press("Enter")
    expect(page.locator("#chosen")).to_have_text("talk.wav")
    page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_text("Record")


def test_the_language_is_one_of_the_server_s(stub: Stub, visit: Visit) -> None:
    """
    All that Whisper knows, those of the reader first.
    """
    stub.texts = {"base": ["Hallo."]}
    page = visit(stub.url, locale="cy-GB")
    choose_recording(page)
    options = page.locator("#language option")
    expect(options).to_have_count(1 + len(LANGUAGES))
    assert options.all_text_contents()[:3] == ["Detect it", "Welsh", "Afrikaans"]
    assert "Haitian Creole" in options.all_text_contents()
    page.get_by_label("Language").select_option("German")
    transcribe(page)
    assert b'name="language"\r\n\r\nde\r\n' in stub.forms[0]


def test_the_microphone_records(stub: Stub, visit: Visit) -> None:
    """
    A second press ends it, and the recording is chosen.
    """
    stub.texts = {"base": ["Hello."]}
    page = visit(stub.url, permissions=["microphone"])
    page.get_by_role("button", name="Record").click()
    page.get_by_role("button", name=SOME_SECONDS).click()
    expect(page.locator("#chosen")).to_have_text(re.compile(r"recording [\d.]+\.webm"))
    expect(page.get_by_role("button", name="Record")).to_be_visible()
    transcribe(page)
    assert b"audio/webm" in stub.forms[0]
    # A browser writes no length into it; the player finds it.
    page.wait_for_function("() => document.querySelector('#player').duration < 60")


def test_what_is_said_until_now_is_transcribed(stub: Stub, visit: Visit) -> None:
    """
    Who presses Transcribe in the middle of a recording has said enough.
    """
    stub.texts = {"base": ["Hello."]}
    page = visit(stub.url, permissions=["microphone"])
    expect(page.locator("#model-a option")).not_to_have_count(0)
    page.get_by_role("button", name="Record").click()
    expect(page.get_by_role("button", name=SOME_SECONDS)).to_be_visible()
    transcribe(page)
    expect(page.locator(".said")).to_have_text("Hello.")
    expect(page.get_by_role("button", name="Record")).to_have_text("Record")
    assert b"audio/webm" in stub.forms[0]


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("", "The browser did not allow the microphone."),
        ("mediaDevices", "to pages of https and localhost only"),
    ],
)
def test_a_microphone_that_is_none_is_said_to_be(
    stub: Stub, visit: Visit, gone: str, said: str
) -> None:
    """
    Its user may refuse, and pages that come in the clear have none.
    """
    page = visit(stub.url)
    page.evaluate(
        "(name) => name && Object.defineProperty(navigator, name, {value: undefined})",
        gone,
    )
    page.get_by_role("button", name="Record").click()
    expect(page.locator("#transcribe-error")).to_contain_text(said)
    expect(page.get_by_role("button", name="Record")).to_be_visible()


def test_a_transcription_can_be_cancelled(stub: Stub, visit: Visit) -> None:
    """
    That is no error. The server hears of it; the second model does not begin; another
    try is free.
    """
    stub.texts = {"base": ["One", " two."], "small": ["One."]}
    gate = stub.gates["base"] = Gate()
    page = visit(stub.url)
    choose_recording(page, "base", "small")
    page.get_by_role("button", name="Transcribe").click()
    first, second = (page.locator(".reading").nth(n) for n in range(2))
    expect(first.locator(".said")).to_have_text("One")
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(first.locator(".detail")).to_have_text(re.compile(r"cancelled after \d"))
    expect(second.locator(".detail")).to_have_text("cancelled before it began")
    expect(page.locator(".error:not(:empty)")).to_have_count(0)
    expect(page.locator(":focus")).to_have_text("Transcribe")
    assert sum("transcriptions" in asked for asked in stub.asked) == 1
    gate.open()
    transcribe(page)
    expect(page.locator("#verdict")).to_be_visible()


def test_a_model_that_fails_says_so_beside_the_other(stub: Stub, visit: Visit) -> None:
    """
    One error does not take the other's text away.
    """
    stub.texts = {"small": ["Hello."]}
    page = visit(stub.url)
    expect(page.locator("#model-a option")).not_to_have_count(0)
    page.get_by_role("button", name="Transcribe").click()
    expect(page.locator("#transcribe-error")).to_have_text("Choose a recording first.")
    choose_recording(page, "base", "small")
    expect(page.locator("#transcribe-error")).to_be_empty()
    page.get_by_role("button", name="Transcribe").click()
    first, second = (page.locator(".reading").nth(n) for n in range(2))
    expect(second.locator(".said")).to_have_text("Hello.")
    expect(first.get_by_role("alert")).to_have_text("base cannot read this")


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
        expect(page.locator("#language option")).to_have_count(1 + len(LANGUAGES))
        page.get_by_role("button", name="Load hello").click()
        expect(page.get_by_role("status")).to_have_text("hello is in memory.")
        expect(page.get_by_role("row").filter(has_text="hello")).to_contain_text("idle")
        page.select_option("#model-b", "bye")
        page.set_input_files("#audio", clip("en-bread"))
        transcribe(page)
        expect(page.locator("#verdict")).to_contain_text("% of the words agree")
        expect(page.locator(".transcript del").first).to_have_text("hello")
        expect(page.locator(".transcript ins").first).to_have_text("goodbye")
        page.get_by_role("button", name="Evict hello").click()
        expect(page.get_by_role("status")).to_have_text("hello has left memory.")
        expect(row_of(page, "hello")).to_contain_text("not in memory")


def test_the_real_server_hears_the_microphone(visit: Visit) -> None:
    """
    What a browser records is decoded, with its length.
    """
    from real import micro
    from served import serving

    from whispercache import ModelCache
    from whispercache.engine.naming import ModelSpec

    models = (ModelSpec("hello", str(micro("micro says hello"))),)
    with ModelCache() as cache, serving(cache, models=models, decoders=1) as client:
        page = visit(f"{client.base_url}/", permissions=["microphone"])
        expect(page.locator("#model-a option")).not_to_have_count(0)
        page.get_by_role("button", name="Record").click()
        page.get_by_role("button", name=SOME_SECONDS).click()
        expect(page.locator("#chosen")).to_contain_text("recording")
        transcribe(page)
        # A tone; there may be no word in it.
        told = page.locator(".reading .detail")
        expect(told).to_have_text(re.compile("s · .* × real time"))
        expect(page.locator(".error:not(:empty)")).to_have_count(0)


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
