"""
What the page does with a transcript, in a real browser: it is heard, read, compared,
copied and downloaded; and how other programs get one.
"""

from __future__ import annotations

import ast
import runpy
import shlex
import shutil
from typing import TYPE_CHECKING

import browsing
import pytest
from browsing import PIECE_S, choose_recording, silence, transcribe
from playwright.sync_api import expect

from whispercache.transcripts import FORMATS, Cue, Transcript

if TYPE_CHECKING:
    from pathlib import Path

    from browsing import Stub, Visit


pytestmark = pytest.mark.browser
# Fixtures.
browser, stub, visit = browsing.browser, browsing.stub, browsing.visit

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


def test_the_words_follow_the_player_and_lead_it(stub: Stub, visit: Visit) -> None:
    """
    The word that is heard is marked; a click on one plays the recording from there.
    """
    stub.texts = {"base": [" one two", " three four"], "small": [" one two three four"]}
    page = visit(stub.url)
    choose_recording(page, "base", "small", content=silence(60))
    transcribe(page)
    expect(page.locator("#verdict")).to_be_visible()
    page.evaluate("() => { document.querySelector('#player').currentTime = 3.1; }")
    first, second = (page.locator(".reading").nth(n) for n in range(2))
    expect(first.locator("[data-now]")).to_have_text("four")
    expect(second.locator("[data-now]")).to_have_text("four")
    page.evaluate("() => { document.querySelector('#player').currentTime = 1.1; }")
    expect(first.locator("[data-now]")).to_have_text("two")
    first.get_by_text("three").click()
    page.wait_for_function("() => document.querySelector('#player').currentTime > 2.2")
    assert not page.evaluate("() => document.querySelector('#player').paused")
    page.evaluate("() => { document.querySelector('#player').currentTime = 50; }")
    page.get_by_role("button", name="Play from 0:00").first.click()
    page.wait_for_function("() => document.querySelector('#player').currentTime < 40")


def test_the_keyboard_goes_through_a_transcript(stub: Stub, visit: Visit) -> None:
    """
    One stop of Tab for all its lines; arrows for the next line, and the next word.
    """
    stub.texts = {"base": [" one two", " three four", " five"]}
    page = visit(stub.url)
    choose_recording(page, content=silence(60))
    transcribe(page)
    page.get_by_role("link", name="Download talk.txt of base").focus()
    focused = page.locator(":focus")
    page.keyboard.press("Tab")
    expect(focused).to_have_accessible_name("Play from 0:00")
    page.keyboard.press("ArrowDown")
    expect(focused).to_have_accessible_name("Play from 0:02")
    page.keyboard.press("End")
    expect(focused).to_have_accessible_name("Play from 0:04")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    expect(focused).to_have_accessible_name("Play from 0:02")
    page.keyboard.press("ArrowRight")
    expect(page.locator("[data-now]")).to_have_text("two")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("[data-now]")).to_have_text("four")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("[data-now]")).to_have_text("three")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    expect(focused).to_have_accessible_name("Play from 0:02")


def test_a_model_without_times_of_words_is_asked_for_lines(
    stub: Stub, visit: Visit
) -> None:
    """
    Once per model; a click anywhere in a line plays it from its beginning.
    """
    stub.texts = {"base": [" one two", " three four"]}
    stub.wordless = {"base"}
    page = visit(stub.url)
    choose_recording(page, content=silence(60))
    transcribe(page)
    page.evaluate("() => { document.querySelector('#player').currentTime = 3; }")
    expect(page.locator("[data-now]")).to_have_text("three four")
    transcribe(page)
    expect(page.locator(".said")).to_have_text(["one two", "three four"])
    assert len(stub.forms) == 3


def test_what_cannot_be_played_is_transcribed(stub: Stub, visit: Visit) -> None:
    """
    Browsers know fewer formats than FFmpeg does.
    """
    stub.texts = {"base": [" one two"]}
    page = visit(stub.url)
    choose_recording(page)
    transcribe(page)
    expect(page.locator("#player-hint")).to_contain_text("cannot play the recording")
    expect(page.locator("#player")).to_be_hidden()
    page.get_by_text("two", exact=True).click()
    expect(page.locator(".said")).to_have_text("one two")


@pytest.mark.parametrize("kind", ["srt", "vtt", "txt"])
def test_a_transcript_can_be_downloaded(stub: Stub, visit: Visit, kind: str) -> None:
    """
    To the letter as the library writes it.
    """
    texts = [" a --> b", " <i>x</i> & y\n\n z ", "  ", " last"]
    stub.texts = {"base": texts}
    page = visit(stub.url)
    choose_recording(page)
    transcribe(page)
    with page.expect_download() as download:
        page.get_by_role("link", name=f"Download talk.{kind} of base").click()
    cues = [
        Cue(number * PIECE_S, (number + 1) * PIECE_S, text)
        for number, text in enumerate(texts)
    ]
    expected = "".join(FORMATS[kind](Transcript("", "", "en", 8, cues)))
    assert download.value.suggested_filename == f"talk.{kind}"
    assert download.value.path().read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("is_secure", [True, False], ids=["https", "http"])
def test_a_transcript_can_be_copied(
    stub: Stub, visit: Visit, *, is_secure: bool
) -> None:
    """
    Also where the page came in the clear, and the browser has no clipboard for it.
    """
    stub.texts = {"base": [" One,", " two."]}
    page = visit(stub.url, permissions=["clipboard-read", "clipboard-write"])
    choose_recording(page)
    transcribe(page)
    page.evaluate(
        """(isSecure) => {
            window.clipboard = navigator.clipboard;
            if (isSecure) return;
            Object.defineProperty(navigator, "clipboard", {value: undefined});
        }""",
        is_secure,
    )
    button = page.get_by_role("button", name="Copy what base heard")
    button.click()
    expect(page.get_by_role("status")).to_have_text("Copied what base heard.")
    assert page.evaluate("() => window.clipboard.readText()") == "One, two."
    expect(page.locator(":focus")).to_contain_text("what base heard")


def test_silence_is_no_empty_box(stub: Stub, visit: Visit) -> None:
    """
    A model that hears nothing says so, and offers no empty files.
    """
    stub.texts = {"base": []}
    page = visit(stub.url)
    choose_recording(page)
    transcribe(page)
    expect(page.locator(".reading")).to_contain_text("No word was heard.")
    expect(page.get_by_role("link", name="Download")).to_have_count(0)


def test_other_programs_are_told_how(stub: Stub, visit: Visit) -> None:
    """
    The address, curl and Python, for the model that is chosen, each with a button to
    copy it; what the shell does with it is what was meant. Keys stay out of it.
    """
    stub.key = "sesame"
    page = visit(stub.url, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_label("This server answers those who").fill("sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#use-base")).to_have_text(f"{stub.url}v1")
    expect(page.locator("#model-a option")).not_to_have_count(0)
    page.select_option("#model-a", "org/name:v1 #2")
    expect(page.locator("#use-curl")).to_contain_text("'model=org/name:v1 #2'")
    page.get_by_role("button", name="Copy curl").click()
    expect(page.get_by_role("status")).to_have_text("Copied curl.")
    command = page.evaluate("() => navigator.clipboard.readText()")
    assert shlex.split(command.replace("\\\n", "")) == [
        *("curl", f"{stub.url}v1/audio/transcriptions"),
        *("-H", "Authorization: Bearer YOUR-KEY"),
        *("-F", "file=@talk.wav", "-F", "model=org/name:v1 #2"),
    ]
    program = page.locator("#use-python").text_content() or ""
    ast.parse(program)
    assert f'base_url="{stub.url}v1"' in program


def test_the_program_for_python_works(
    visit: Visit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """
    As it is copied from the page of a real server.
    """
    from real import clip, micro
    from served import serving

    from whispercache import ModelCache
    from whispercache.engine.naming import ModelSpec

    models = (ModelSpec("hello", str(micro("micro says hello"))),)
    with ModelCache() as cache, serving(cache, models=models, decoders=1) as client:
        page = visit(f"{client.base_url}/")
        expect(page.locator("#use-python")).to_contain_text('model="hello"')
        program = tmp_path / "program.py"
        program.write_text(page.locator("#use-python").text_content() or "")
        shutil.copy(clip("en-bread"), tmp_path / "talk.wav")
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(program))
    assert "micro says hello" in capsys.readouterr().out


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
