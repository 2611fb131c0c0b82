"""
The reports of a comparison: JSON, table and page, the page in a real browser.

The comparisons are made up; no model runs.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from whispercache.comparison import Comparison, Failure, Reference, Result
from whispercache.comparison.assess import assess
from whispercache.comparison.plan import Entrant
from whispercache.comparison.plots import plots_of
from whispercache.comparison.report import (
    REPORTS,
    as_csv,
    as_html,
    as_json,
    as_lines,
    write_reports,
)
from whispercache.comparison.store import LoadRecord
from whispercache.comparison.turns import Findings
from whispercache.engine.naming import ModelSpec
from whispercache.keys import ModelKey
from whispercache.transcripts import Cue

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from playwright.sync_api import Page

MIB = 1024**2
EVIL = "<script>document.title = 'taken'</script>"
SAID = (
    "Please return the three books to the library before Friday.",
    "We planted tomatoes, beans and a small apple tree in the garden.",
    "Tomorrow will be cold and windy with a little rain in the evening.",
    "My brother repairs the nets while I carry the boxes to the market.",
)
# Name, share of words that go wrong, seconds of work per second, MiB.
MODELS = (
    ("tiny.en", 0.16, 0.06, 180),
    ("base", 0.09, 0.11, 310),
    ("base:int8", 0.10, 0.09, 130),
    ("small", 0.05, 0.4, 1100),
    ("large-v3:int8", 0.02, 2.1, 2900),
)


def spoiled(text: str, share: float, dice: random.Random) -> str:
    """
    *text* as a model may hear it.
    """
    heard: list[str] = []
    for word in text.split():
        roll = dice.random()
        if roll > share:
            heard.append(word)
        elif roll > share / 2:
            heard.append(dice.choice(("read", "broad", "whether", "tree")))
        elif roll > share / 4:
            heard += word, "and"
    return " ".join(heard)


def findings(
    texts: Mapping[str, Sequence[str]], figures: Sequence[tuple[float, int]] = ()
) -> Findings:
    """
    What a run would find if models heard these texts, one for each file.
    """
    figures = figures or [(0.5, 100)] * len(texts)
    entrants = tuple(
        Entrant(name, ModelSpec(name, name), ModelKey(name, "cpu", "float32"), name, 1)
        for name in texts
    )
    results = tuple(
        Result(
            model=name,
            file=f"clips/{number:02}.wav",
            language="en",
            certainty=None,
            text=text,
            cues=(Cue(0, 4, text),),
            duration_s=4.0,
            work_s=4 * factor,
            latency_s=3 * factor,
            peak_bytes=mib * MIB,
        )
        for (name, heard), (factor, mib) in zip(texts.items(), figures, strict=True)
        for number, text in enumerate(heard)
    )
    loads = {
        name: LoadRecord(factor, factor, mib * MIB, mib * MIB)
        for name, (factor, mib) in zip(texts, figures, strict=True)
    }
    return Findings(entrants, loads, results, (), frozenset(texts))


def made_up(files: int = 16, *, is_known: bool = True) -> Comparison:
    """
    Five models on some files, as it could be.
    """
    dice = random.Random(4)  # noqa: S311 - for pictures, not for secrets
    said = [SAID[number % len(SAID)] for number in range(files)]
    texts = {
        name: [spoiled(text, share, dice) for text in said]
        for name, share, *_ in MODELS
    }
    figures = [(factor, mib) for *_, factor, mib in MODELS]
    references = {
        f"clips/{number:02}.wav": Reference(text, "en")
        for number, text in enumerate(said)
    }
    found = findings(texts, figures)
    return assess(found, references if is_known else {}, {"beam_size": 5}, 999)


def nasty() -> Comparison:
    """
    Two models with texts and names that are no good company for pages and tables.
    """
    found = assess(
        findings({EVIL: [f"=1+1 {EVIL}", "'>\"&amp;"], "@b": ["+1 2", "-x"]}),
        {"clips/00.wav": Reference(f"{EVIL} =1")},
        {"prompt": EVIL},
        200,
    )
    return replace(
        found, failures=(Failure(EVIL, EVIL),), notes=(EVIL, "bad name \udce9")
    )


class TestData:
    """
    JSON, CSV and plain lines.
    """

    @pytest.mark.slow
    def test_json_has_all_figures(self) -> None:
        """
        With the rates that follow from them.
        """
        document = json.loads(as_json(made_up()))
        assert [each["name"] for each in document["models"]] == [m[0] for m in MODELS]
        small = document["models"][3]
        words = small["words"]
        wrong = words["substitutions"] + words["deletions"] + words["insertions"]
        said = 4 * sum(len(text.split()) for text in SAID)
        assert small["wer"] == pytest.approx(wrong / said)
        assert small["real_time_factor"] == pytest.approx(0.4)
        assert len(document["results"]) == 80
        assert len(document["differences"]) == 10
        assert document["results"][0]["cues"][0]["end_s"] == 4

    def test_the_table_has_a_row_for_each_model_and_file(self) -> None:
        """
        Figures are figures, and empty where nothing is known.
        """
        rows = list(csv.DictReader(io.StringIO(as_csv(made_up(is_known=False)))))
        assert len(rows) == 80
        assert rows[0]["model"] == "tiny.en"
        assert float(rows[0]["work_s"]) == pytest.approx(0.24)
        assert rows[0]["wer"] == ""

    def test_no_cell_is_a_formula(self) -> None:
        """
        What begins like one begins with an apostrophe instead.
        """
        rows = list(csv.DictReader(io.StringIO(as_csv(nasty()))))
        assert [row["text"][:3] for row in rows] == ["'=1", "'>\"", "'+1", "'-x"]
        assert rows[2]["model"] == "'@b"
        for row in rows:
            assert not any(re.match(r"[=+@\t\r]|-\D", cell) for cell in row.values())

    def test_lines_for_a_terminal_say_the_same(self) -> None:
        """
        A table, the verdicts, and the loads.
        """
        lines = list(as_lines(made_up()))
        assert lines[0].split() == [
            *("model", "word", "errors", "characters", "speed", "load"),
            *("peak", "memory"),
        ]
        assert lines[5].startswith("large-v3:int8 ")
        assert "0.48×" in lines[5]
        assert sum("word errors" in line for line in lines[6:]) == 10
        assert lines[-1] == "5 loads; 75 saved by taking models in turns."
        one = list(as_lines(replace(made_up(), loads=1, loads_saved=0)))
        assert one[-1] == "1 load; 0 saved by taking models in turns."
        unknown = list(as_lines(made_up(is_known=False)))
        assert re.match(
            r"tiny\.en and base agree on \d\d\.\d % of their words", unknown[7]
        )

    def test_reports_are_written_whole_or_not_at_all(self, tmp_path: Path) -> None:
        """
        Names that are no text do no harm, and nothing else is left behind.
        """
        write_reports(nasty(), tmp_path / "deep" / "out")
        names = {path.name for path in (tmp_path / "deep" / "out").iterdir()}
        assert names == {*REPORTS}
        page = (tmp_path / "deep" / "out" / "report.html").read_text(encoding="utf-8")
        assert "bad name \\udce9" in page


class TestPlots:
    """
    Where things go in the pictures.
    """

    def test_better_is_down_and_to_the_right(self) -> None:
        """
        And a bubble's area is its bytes.
        """
        scatter, _ = plots_of(made_up())
        assert scatter is not None
        by_name = {each.name: each for each in scatter.marks}
        tiny, small = by_name["tiny.en"], by_name["small"]
        assert tiny.x > small.x
        assert tiny.y < small.y
        ratio = (small.radius / by_name["base"].radius) ** 2
        assert ratio == pytest.approx(1100 / 310)

    def test_everything_is_inside_and_no_name_hides_another(self) -> None:
        """
        However close the models are.
        """
        same = {name: ["so it is"] for name in ("one", "two", "three", "four", "five")}
        said = {"clips/00.wav": Reference("so it was")}
        scatter, whiskers = plots_of(assess(findings(same), said, {}, 200))
        assert scatter is not None
        assert whiskers is not None
        names = [(each.label_x, each.label_y) for each in scatter.marks]
        for number, (x, y) in enumerate(names):
            assert 0 <= x <= scatter.width
            assert 12 <= y <= scatter.height
            assert not any(
                abs(x - other_x) < 20 and abs(y - other_y) < 14
                for other_x, other_y in names[:number]
            )
        assert [row.low for row in whiskers.marks] == [None] * 5

    def test_without_errors_there_is_nothing_to_draw(self) -> None:
        """
        Neither picture.
        """
        assert plots_of(made_up(is_known=False)) == (None, None)


class _Tags(HTMLParser):
    """
    All tags of a page, and what they fetch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.fetched: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """
        Note a tag.
        """
        self.tags.add(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.fetched += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset")
        ]


class TestPage:
    """
    The page as text.
    """

    def test_it_runs_nothing_and_fetches_nothing(self) -> None:
        """
        Whatever the transcripts say.
        """
        page = as_html(nasty())
        tags = _Tags()
        tags.feed(page)
        assert not tags.tags & {"script", "img", "iframe", "object", "embed", "base"}
        assert not tags.handlers
        assert {*tags.fetched} == {"data:,", "#models"}
        assert "&lt;script&gt;" in page
        assert "url(" not in page
        assert "@import" not in page

    def test_tables_have_captions_and_headings(self) -> None:
        """
        For those who hear the page.
        """
        page = as_html(made_up())
        assert page.count("<table>") == page.count("<caption>") == 3
        assert all("scope=" in each for each in re.findall(r"<th\b[^>]*>", page))
        assert page.count('role="img"') == page.count("<svg viewBox") == 2

    def test_the_headline_claims_no_more_than_the_files_can_tell(self) -> None:
        """
        A lead that may be chance is called that.
        """
        sure = "large-v3:int8 has the fewest word errors: 1.6 %. tiny.en is the fastest"
        assert sure in as_html(made_up())
        page = as_html(made_up(3))
        assert re.search(r"the fewest word errors: [\d.]+ %, which may be chance", page)

    def test_the_same_comparison_makes_the_same_page(self) -> None:
        """
        So that two reports can be compared themselves.
        """
        assert as_html(made_up()) == as_html(made_up())


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    """
    A page in a real browser that cannot reach anything.
    """
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"]
        )
        context = browser.new_context(offline=True)
        yield context.new_page()
        browser.close()


@pytest.mark.browser
class TestInABrowser:
    """
    The page in a real Chromium.
    """

    @pytest.mark.parametrize(
        ("kind", "width", "scheme"),
        [
            ("usual", 1200, "light"),
            ("usual", 1200, "dark"),
            ("usual", 360, "light"),
            ("unknown", 1200, "dark"),
            ("unknown", 360, "light"),
            ("nasty", 360, "dark"),
        ],
    )
    def test_it_is_whole_and_accessible(
        self, kind: str, width: int, scheme: str, chromium: Page, tmp_path: Path
    ) -> None:
        """
        No error, no request, nothing wider than the window, nothing that axe finds.
        """
        axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
        comparison = {
            "usual": made_up,
            "unknown": lambda: made_up(is_known=False),
            "nasty": nasty,
        }[kind]()
        write_reports(comparison, tmp_path)
        said: list[str] = []
        fetched: list[str] = []
        chromium.on("console", lambda message: said.append(message.text))
        chromium.on("pageerror", lambda error: said.append(str(error)))
        chromium.on("request", lambda request: fetched.append(request.url))
        chromium.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        chromium.set_viewport_size({"width": width, "height": 800})
        address = (tmp_path / "report.html").as_uri()
        chromium.goto(address)
        title = "Comparison of <script>" if kind == "nasty" else "Comparison of tiny.en"
        assert chromium.title().startswith(title)
        assert chromium.evaluate("document.documentElement.scrollWidth") <= width
        chromium.evaluate(
            "document.querySelectorAll('details').forEach(d => d.open = 1)"
        )
        found = axe.run(chromium)
        assert found.violations_count == 0, found.generate_report()
        assert (said, fetched) == ([], [address])

    def test_it_can_be_used_with_the_keyboard_alone(
        self, chromium: Page, tmp_path: Path
    ) -> None:
        """
        From the first key on: to the tables, and into a file's words.
        """
        write_reports(made_up(), tmp_path)
        chromium.goto((tmp_path / "report.html").as_uri())
        chromium.keyboard.press("Tab")
        focused = "document.activeElement.textContent.trim()"
        assert chromium.evaluate(focused) == "Skip to the table of models"
        for _ in range(20):
            chromium.keyboard.press("Tab")
            if chromium.evaluate("document.activeElement.tagName") == "SUMMARY":
                break
        state = "document.activeElement.parentElement.open"
        before = chromium.evaluate(state)
        chromium.keyboard.press("Enter")
        assert chromium.evaluate(state) is not before
