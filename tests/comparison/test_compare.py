"""
Comparison: what is run, kept and scored, and what is told of chance.

Micro models answer their own text to any audio, so their errors are known in advance.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import wave
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from real import (
    child,
    child_environment,
    clip,
    micro,
    micro_copy,
    packaged,
    reference,
)

from whispercache import ModelCache, UnknownModel
from whispercache.cli.main import main
from whispercache.comparison import (
    Comparison,
    Edit,
    Progress,
    Reference,
    Tally,
    compare,
    run,
)
from whispercache.comparison.intervals import FEW_FILES, Count, bootstrap, tell_apart
from whispercache.comparison.references import match_references, read_references
from whispercache.comparison.report import REPORTS
from whispercache.comparison.score import normalise, score
from whispercache.comparison.store import Store
from whispercache.engine.naming import ModelSpec
from whispercache.events import Event, ModelLoaded, ModelStillReferenced

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ONE_THREAD = {"cpu_threads": 1}
COMMAND = """
import argparse, sys
from whispercache.comparison.command import add_options, run
parser = argparse.ArgumentParser()
add_options(parser)
sys.exit(run(parser.parse_args()))
"""


def noise(path: Path, seed: int, seconds: float = 0.5) -> str:
    """
    Write a file that nobody else has.
    """
    samples = np.random.default_rng(seed).integers(-99, 99, int(16_000 * seconds))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.astype("<i2").tobytes())
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """
    Three files of noise.
    """
    return [noise(tmp_path / f"{seed}.wav", seed) for seed in range(3)]


@pytest.fixture
def specs() -> list[ModelSpec]:
    """
    Two models, which say different things.
    """
    return [
        ModelSpec("alpha", str(micro("alpha speaks english"))),
        ModelSpec("beta", str(micro("beta speaks"))),
    ]


def compared(
    files: Sequence[str],
    models: Sequence[str | ModelSpec],
    *,
    references: dict[str, Reference | str] | None = None,
    out: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    cache: ModelCache | None = None,
    beam_size: int = 1,
    resume: bool = True,
) -> Comparison:
    """
    A comparison as quick as it gets.
    """
    return compare(
        files,
        models=models,
        references=references,
        device="cpu",
        out=out,
        progress=progress,
        cache=cache,
        beam_size=beam_size,
        resume=resume,
        load_options=ONE_THREAD,
        resamples=200,
    )


class TestReferences:
    """
    What is really said, from a table.
    """

    def test_columns_go_by_their_names(self, tmp_path: Path) -> None:
        """
        In any order; a byte order mark and empty lines mean nothing.
        """
        table = tmp_path / "refs.tsv"
        text = "\ufeffText\tfile\tlanguage\n\nHola.\tes.wav\tes\r\nHi.\ten.wav\t\n"
        table.write_text(text, encoding="utf-8", newline="")
        assert read_references(table) == {
            "es.wav": Reference("Hola.", "es"),
            "en.wav": Reference("Hi."),
        }

    @pytest.mark.parametrize("language", ["German", "de-AT", "de_DE.UTF-8", "DE"])
    def test_a_language_goes_by_name_and_locale_too(
        self, tmp_path: Path, language: str
    ) -> None:
        """
        As everywhere else; a reference that a program makes is no exception.
        """
        table = tmp_path / "refs.tsv"
        table.write_text(f"file\ttext\tlanguage\na.wav\tHallo.\t{language}\n")
        assert read_references(table) == {"a.wav": Reference("Hallo.", "de")}
        given = {"a.wav": Reference("Hallo.", language)}
        assert match_references(["a.wav"], given)["a.wav"].language == "de"

    def test_a_language_that_there_is_not_is_refused(self, tmp_path: Path) -> None:
        """
        With its line.
        """
        table = tmp_path / "refs.tsv"
        table.write_text("file\ttext\tlanguage\na.wav\tHallo.\tGermann\n")
        with pytest.raises(ValueError, match="line 2: language 'Germann' is none"):
            read_references(table)

    def test_without_names_it_is_file_and_text(self, tmp_path: Path) -> None:
        """
        Quotes belong to the text, and so does a line separator of Unicode.
        """
        table = tmp_path / "refs.tsv"
        table.write_text('a.wav\t"Go," she\u2028said.\nb.wav\n', encoding="utf-8")
        assert read_references(table) == {
            "a.wav": Reference('"Go," she\u2028said.'),
            "b.wav": Reference(""),
        }

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("a.wav\tone\na.wav\ttwo\n", "line 2: 'a.wav' is there twice"),
            ("a.wav\tone\ttwo\n", "line 1: 3 columns, not 2"),
            ("file\ttext\n\tone\n", "line 2: no file is named"),
            ("file\ttext\n", "no references in it"),
            ("", "no references in it"),
        ],
    )
    def test_a_wrong_table_is_refused_and_the_line_named(
        self, text: str, complaint: str, tmp_path: Path
    ) -> None:
        """
        In words that lead to the place.
        """
        table = tmp_path / "refs.tsv"
        table.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=complaint):
            read_references(table)

    def test_a_table_that_is_no_text_is_refused(self, tmp_path: Path) -> None:
        """
        Rather than read as something else.
        """
        (tmp_path / "refs.tsv").write_bytes(b"a.wav\t\xff\xfe\n")
        with pytest.raises(ValueError, match="not UTF-8"):
            read_references(tmp_path / "refs.tsv")

    def test_a_path_goes_before_a_name(self) -> None:
        """
        Two files of one name each get their own.
        """
        found = match_references(
            ["x/a.wav", "y/a.wav", "z/b.wav"],
            {"x/a.wav": "one", "y/./a.wav": "two", "b.wav": "three"},
        )
        assert {file: each.text for file, each in found.items()} == {
            "x/a.wav": "one",
            "y/a.wav": "two",
            "z/b.wav": "three",
        }

    @pytest.mark.parametrize(
        ("files", "references", "complaint"),
        [
            (["x/a.wav", "y/a.wav"], {"a.wav": "one"}, "give its path"),
            (["a.wav"], {"x/a.wav": "one", "y/a.wav": "two"}, "two references"),
            (["a.wav"], {"b.wav": "one"}, "none of the 1 references"),
        ],
    )
    def test_what_could_be_meant_otherwise_is_refused(
        self, files: list[str], references: dict[str, str], complaint: str
    ) -> None:
        """
        A wrong guess would look like errors of a model.
        """
        with pytest.raises(ValueError, match=complaint):
            match_references(files, references)


class TestScore:
    """
    How a transcript differs from what was said.
    """

    def test_words_and_characters_are_counted_apart(self) -> None:
        """
        One word of six is another, and one was not said: three edits, side by side.
        """
        found = score("The cat sat on my mat.", "the cat sad on my old mat", "en")
        assert found.words == Tally(hits=5, substitutions=1, insertions=1)
        assert found.words.rate == pytest.approx(2 / 6)
        assert found.characters.errors == 5
        assert found.edits == (
            Edit("equal", "the cat", "the cat"),
            Edit("substitute", "sat", "sad"),
            Edit("equal", "on my", "on my"),
            Edit("insert", "", "old"),
            Edit("equal", "mat", "mat"),
        )

    @pytest.mark.parametrize(
        ("said", "heard", "language"),
        [
            ("Twenty-one colours, Mr. Smith!", "21 colors mister smith", "en"),
            ("¿Dónde está el niño?", "dónde está el niño", "es"),
            ("[music] Guten Tag", "guten tag", "de"),
        ],
    )
    def test_spelling_is_no_error_of_hearing(
        self, said: str, heard: str, language: str
    ) -> None:
        """
        Case and punctuation in all languages, numbers in English.
        """
        assert score(said, heard, language).words.errors == 0

    def test_without_spaces_characters_are_words(self) -> None:
        """
        Else one wrong character would make a whole sentence wrong.
        """
        assert score("你好世界", "你好世纪", "zh").words == Tally(3, 1)

    @pytest.mark.parametrize(
        ("said", "heard", "words", "rate"),
        [
            ("", "", Tally(), None),
            ("", "thank you", Tally(insertions=2), None),
            ("[laughs]", "thank you", Tally(insertions=2), None),
            ("hello there", "", Tally(deletions=2), 1.0),
            ("hello there", "...", Tally(deletions=2), 1.0),
        ],
    )
    def test_silence_has_no_rate_but_what_is_made_up_counts(
        self, said: str, heard: str, words: Tally, rate: float | None
    ) -> None:
        """
        On either side.
        """
        found = score(said, heard, "en")
        assert (found.words, found.words.rate) == (words, rate)
        assert found.characters.insertions == len(heard.strip(".")) * (not rate)

    @given(st.text(max_size=40), st.text(max_size=40), st.sampled_from(["en", "xx"]))
    def test_any_texts_can_be_scored(
        self, said: str, heard: str, language: str
    ) -> None:
        """
        The counts add up to the words on both sides.
        """
        words = score(said, heard, language).words
        assert words.said == len(normalise(said, language).split())
        heard_words = words.hits + words.substitutions + words.insertions
        assert heard_words == len(normalise(heard, language).split())


def experiment(
    files: int, rng: np.random.Generator, effect: float = 0.3
) -> list[Count]:
    """
    Errors of two models on files of which some are harder than others, for both.

    The second has *effect* times the mean difficulty (1/6) fewer.
    """
    words = rng.integers(5, 60, files)
    hard = rng.beta(2, 10, files)
    first = rng.binomial(words, np.clip(hard * (0.9 + effect), 0, 1))
    second = rng.binomial(words, hard * 0.9)
    rows = zip(words.tolist(), first.tolist(), second.tolist(), strict=True)
    return [Count(*row) for row in rows]


class TestIntervals:
    """
    What may be chance.
    """

    @pytest.mark.parametrize("files", [6, 10, 30])
    def test_the_true_difference_is_inside_about_as_often_as_it_says(
        self, files: int
    ) -> None:
        """
        In 200 experiments at 95 %: never far below, and with many files near it.
        """
        rng = np.random.default_rng(files)
        inside = 0
        for _ in range(200):
            interval = bootstrap(experiment(files, rng), 499)
            assert interval is not None
            inside += interval.low <= 0.3 / 6 <= interval.high
        assert inside >= (180 if files == 30 else 170)

    @pytest.mark.parametrize("files", [FEW_FILES, 10])
    def test_equal_models_are_seldom_told_apart(self, files: int) -> None:
        """
        In one of ten experiments at the most, however few files there are.
        """
        rng = np.random.default_rng(files)
        told = (
            tell_apart("a", "b", experiment(files, rng, effect=0), 499)
            for _ in range(150)
        )
        assert sum(each.better is not None for each in told) <= 15

    def test_the_same_files_are_drawn_for_both(self) -> None:
        """
        Two models that differ by one word in each file differ by that for certain,
        though their rates vary widely from file to file.
        """
        counts = [Count(10, errors + 1, errors) for errors in range(9)]
        interval = bootstrap(counts, 999)
        alone = bootstrap([Count(10, count.second) for count in counts], 999)
        assert interval is not None
        assert alone is not None
        assert (interval.low, interval.high) == pytest.approx((0.1, 0.1))
        assert alone.high - alone.low > 0.3

    def test_the_same_counts_have_the_same_interval(self) -> None:
        """
        The dice are loaded, for reports that do not change by themselves.
        """
        counts = experiment(8, np.random.default_rng(0))
        assert bootstrap(counts, 200) == bootstrap(counts, 200)

    def test_draws_without_a_word_do_no_harm(self) -> None:
        """
        With two silent files of four, they are many.
        """
        counts = [Count(0, 3), Count(0, 0), Count(9, 3), Count(9, 6)]
        interval = bootstrap(counts, 500)
        assert interval is not None
        assert 0 < interval.low <= 12 / 18 <= interval.high < 2

    @pytest.mark.parametrize(
        ("counts", "verdict"),
        [
            (
                [Count(20, 4, 2), Count(20, 3, 2), Count(20, 5, 3)] * 4,
                "b is better than a: 8.3 points fewer word errors, 95 % interval ",
            ),
            (
                [Count(20, 2, 4)] * FEW_FILES,
                "a is better than b: 10.0 points fewer word errors.",
            ),
            (
                [Count(20, 4, 0), Count(20, 0, 3)] * 4,
                "No clear difference: b made 2.5 points fewer word errors than a, 95 ",
            ),
            (
                [Count(20, 4, 2)] * 3,
                "No clear difference: b made 10.0 points fewer word errors than a; 3 ",
            ),
            (
                [Count(20, 4, 2)],
                "b made 10.0 points fewer word errors than a; one file tells nothing ",
            ),
            (
                [Count(20, 4, 4)] * 9,
                "a and b made equally many word errors in each file.",
            ),
            (
                [Count(20, 4, 2), Count(20, 2, 4)] * 4,
                "a and b made equally many word errors in all, 95 % interval from ",
            ),
            ([Count(0, 4, 2)], "a and b: nothing was said in these files."),
        ],
    )
    def test_the_verdict_says_it_in_words(
        self, counts: list[Count], verdict: str
    ) -> None:
        """
        Which is better, by how much, and whether the files are enough to tell.
        """
        found = tell_apart("a", "b", counts, 499)
        assert found.verdict.startswith(verdict)
        assert (found.better is not None) == ("is better" in verdict)


class TestRun:
    """
    Models on files, with micro models.
    """

    def test_each_model_is_loaded_once_and_leaves(
        self, files: list[str], specs: list[ModelSpec]
    ) -> None:
        """
        Model by model: two loads where file by file would have taken six.
        """
        events: list[Event] = []
        with ModelCache() as cache:
            cache.subscribe(events.append)
            found = compared(files, specs, cache=cache)
            assert not cache.models()
        loaded = [event for event in events if isinstance(event, ModelLoaded)]
        assert len(loaded) == found.loads == 2
        assert not any(isinstance(event, ModelStillReferenced) for event in events)
        assert found.loads_saved == 4
        assert [each.loads for each in found.models] == [1, 1]
        names = [(each.model, Path(each.file).stem) for each in found.results]
        assert names == [(m, f) for m in ("alpha", "beta") for f in ("0", "1", "2")]
        assert {each.text for each in found.results if each.model == "beta"} == {
            "beta speaks"
        }

    @pytest.mark.slow
    def test_the_figures_are_those_of_the_work(
        self, files: list[str], specs: list[ModelSpec]
    ) -> None:
        """
        Times go into each other, and rates are the quotients that they claim to be.
        """
        found = compared(files, specs)
        for each in found.results:
            assert each.latency_s is not None
            assert 0 < each.latency_s <= each.work_s
            assert each.duration_s == pytest.approx(0.5)
            assert each.real_time_factor == pytest.approx(each.work_s / 0.5)
            assert not each.is_kept
        for model in found.models:
            mine = [each for each in found.results if each.model == model.name]
            assert model.work_s == pytest.approx(sum(each.work_s for each in mine))
            assert model.load_s > 0
            assert model.warm_up_s > 0
            assert model.weights_bytes > 0
            assert model.files == 3
            assert model.peak_bytes is not None
            assert model.peak_bytes >= max(each.peak_bytes or 0 for each in mine)

    def test_errors_are_pooled_over_the_files(
        self, files: list[str], specs: list[ModelSpec]
    ) -> None:
        """
        As a share of all words said; what is heard in silence counts too.
        """
        said: dict[str, Reference | str] = {
            files[0]: "Alpha speaks English!",
            files[1]: "alpha",
            files[2]: Reference("", "en"),
        }
        alpha, beta = compared(files, specs, references=said).models
        assert alpha.words == Tally(hits=4, insertions=5)
        assert alpha.wer == pytest.approx(5 / 4)
        assert beta.words == Tally(1, 2, 1, 3)

    @pytest.mark.slow
    def test_models_agree_as_far_as_they_share_words(
        self, files: list[str], specs: list[ModelSpec]
    ) -> None:
        """
        "alpha speaks english" and "beta speaks" share one word of three; no reference
        is needed, and without one there is no rate.
        """
        found = compared(files, [*specs, ModelSpec("again", specs[1].model, "float32")])
        assert [round(each.share or 0, 3) for each in found.agreements] == [0.333]
        back = compared(files, specs[::-1]).agreements
        assert [each.share for each in back] == [
            each.share for each in found.agreements
        ]
        assert not found.differences
        assert {each.wer for each in found.results} == {None}
        assert found.models[0].wer_interval is None

    def test_a_model_named_twice_is_run_once(
        self, files: list[str], specs: list[ModelSpec]
    ) -> None:
        """
        And the reader is told.
        """
        found = compared(files[:1], [specs[0], ModelSpec("twin", specs[0].model)])
        assert [each.name for each in found.models] == ["alpha"]
        assert found.notes[0].startswith("twin is the same model as alpha")

    def test_models_of_one_name_are_told_apart(
        self, files: list[str], specs: list[ModelSpec]
    ) -> None:
        """
        By a number.
        """
        found = compared(files[:1], [ModelSpec("m", each.model) for each in specs])
        assert [each.model for each in found.results] == ["m", "m-2"]

    def test_a_file_that_cannot_be_decoded_is_passed_over(
        self, files: list[str], specs: list[ModelSpec], tmp_path: Path
    ) -> None:
        """
        It is named once, and the others are compared.
        """
        bad = tmp_path / "bad.wav"
        bad.write_text("no audio")
        asked = [str(bad), str(tmp_path / "none.wav"), files[0]]
        found = compared(asked, specs, out=tmp_path / "out")
        assert sorted(each.file for each in found.failures) == sorted(asked[:2])
        assert [each.file for each in found.results] == [files[0]] * 2
        assert (tmp_path / "out" / "report.html").exists()

    def test_with_no_file_left_there_is_still_a_report(
        self, specs: list[ModelSpec], tmp_path: Path
    ) -> None:
        """
        That says why, without a load.
        """
        found = compared([str(tmp_path / "none.wav")], specs, out=tmp_path)
        assert (found.loads, found.results) == (0, ())
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert "Nothing was heard." in page
        assert "none.wav was passed over: No such file or directory" in page

    def test_a_model_that_cannot_be_had_stops_it_before_the_first_load(
        self, files: list[str], specs: list[ModelSpec]
    ) -> None:
        """
        Not after an hour with the others.
        """
        seen: list[Progress] = []
        with pytest.raises(UnknownModel):
            compared(files, [*specs, "tiny.xx"], progress=seen.append)
        assert not seen

    @pytest.mark.parametrize(
        ("files", "models", "error"),
        [
            ([], ["base"], ValueError),
            (["a.wav"], [], ValueError),
            (["a.wav"], "base", TypeError),
            (["a.wav"], ["base:int99"], ValueError),
        ],
    )
    def test_nonsense_is_refused(
        self, files: list[str], models: list[str], error: type[Exception]
    ) -> None:
        """
        At once.
        """
        with pytest.raises(error):
            compare(files, models=models)

    def test_a_missing_extra_is_named(
        self, files: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        With how to install it, before anything is run.
        """
        monkeypatch.setattr(run, "find_spec", lambda _name: None)
        with pytest.raises(ModuleNotFoundError, match=r"whispercache\[compare\]"):
            compare(files, models=["base"])

    @pytest.mark.process
    def test_importing_it_brings_none_of_its_libraries(self) -> None:
        """
        Neither what scores nor what draws nor what runs models.
        """
        heavy = "jiwer scipy numpy jinja2 whisper_normalizer rich faster_whisper"
        code = "import sys, whispercache.comparison.command\nprint(*sys.modules)"
        result = child(code)
        assert result.stderr == ""
        assert not {*heavy.split()} & {*result.stdout.split()}


class TestResume:
    """
    What an earlier run has kept.
    """

    def test_an_interrupted_run_goes_on_where_it_stopped(
        self, files: list[str], specs: list[ModelSpec], tmp_path: Path
    ) -> None:
        """
        Only what is missing is run, and only models that miss something are loaded.
        """

        def stop(progress: Progress) -> None:
            if progress.done == 4 and progress.stage == "done":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compared(files, specs, out=tmp_path, progress=stop)
        assert not (tmp_path / "report.html").exists()
        steps: list[Progress] = []
        found = compared(files, specs, out=tmp_path, progress=steps.append)
        assert [each.is_kept for each in found.results] == [True] * 4 + [False] * 2
        assert [each.loads for each in found.models] == [0, 1]
        assert (found.loads, found.loads_saved) == (1, 0)
        assert found.models[0].load_s > 0
        assert [each.done for each in steps if each.stage == "done"] == [5, 6]
        assert steps[-1].fraction == 1
        assert "4 of 6 results" in found.notes[-1]

    def test_nothing_is_run_again_without_need(
        self, files: list[str], specs: list[ModelSpec], tmp_path: Path
    ) -> None:
        """
        A file under another name is the same file; new references are scored at once.
        """
        before = compared(files, specs, out=tmp_path)
        moved = Path(files[0]).rename(tmp_path / "moved.wav")
        said: dict[str, Reference | str] = {"moved.wav": "beta speaks"}
        after = compared([str(moved)], specs, references=said, out=tmp_path)
        assert after.loads == 0
        assert [each.wer for each in after.results] == [1.0, 0.0]
        assert [each.text for each in after.results] == [
            each.text for each in before.results if each.file == files[0]
        ]

    @pytest.mark.slow
    def test_what_has_changed_is_run_again(
        self, files: list[str], tmp_path: Path
    ) -> None:
        """
        Other audio, other options, other weights, or because it was asked for.
        """
        model = micro_copy(tmp_path / "model", "old words")
        chosen = [ModelSpec("mine", str(model))]

        def again(*, beam_size: int = 1, resume: bool = True) -> list[bool]:
            found = compared(
                files, chosen, out=tmp_path, beam_size=beam_size, resume=resume
            )
            return [not each.is_kept for each in found.results]

        assert again() == [True, True, True]
        assert again() == [False, False, False]
        noise(Path(files[1]), 99)
        assert again() == [False, True, False]
        assert again(beam_size=2) == [True, True, True]
        micro_copy(model, "new words")
        assert again() == [True, True, True]
        assert again() == [False, False, False]
        assert again(resume=False) == [True, True, True]

    def test_a_torn_line_costs_one_result(
        self, files: list[str], specs: list[ModelSpec], tmp_path: Path
    ) -> None:
        """
        The next one begins a line of its own.
        """
        compared(files, specs[:1], out=tmp_path)
        kept = tmp_path / run.RESULTS
        whole = kept.read_bytes()
        kept.write_bytes(whole[:-20])
        second = compared(files, specs[:1], out=tmp_path)
        assert [each.is_kept for each in second.results] == [True, True, False]
        third = compared(files, specs[:1], out=tmp_path)
        assert all(each.is_kept for each in third.results)
        assert third.models[0].load_s == second.models[0].load_s

    @given(
        st.binary(max_size=60)
        | st.from_regex(r'\{"(result|load)": .*\}').map(str.encode)
    )
    def test_a_file_of_anything_does_not_stop_it(self, rubbish: bytes) -> None:
        """
        It counts as not there.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "results.jsonl")
            path.write_bytes(rubbish)
            assert Store(path, resume=True).result("x") is None


def started(
    specs: Sequence[ModelSpec], files: Sequence[str], out: Path, **streams: int
) -> subprocess.Popen[str]:
    """
    The command, begun in a process of its own.
    """
    models = ",".join(f"{each.name}={each.model}" for each in specs)
    options = ("--device", "cpu", "--models", models, "--out", str(out))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    # What a shell starts in the background inherits that Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *files, *options],
            env=child_environment({"OMP_NUM_THREADS": "1", "COLUMNS": "100"}),
            stdout=pipes["stdout"],
            stderr=pipes["stderr"],
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.process
class TestCommand:
    """
    ``whispercache compare``.
    """

    def test_it_prints_the_outcome_and_writes_the_reports(
        self, files: list[str], specs: list[ModelSpec], tmp_path: Path
    ) -> None:
        """
        The outcome goes to stdout, a line for each file and model to stderr; a file
        that is none is an error of its own, and the rest is done.
        """
        out = tmp_path / "out"
        process = started(specs, [*files, str(tmp_path / "none.wav")], out)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 2
        lines = stdout.splitlines()
        assert [line.split()[0] for line in lines[:3]] == ["model", "alpha", "beta"]
        assert lines[4:] == [
            "alpha and beta agree on 33.3 % of their words.",
            "2 loads; 4 saved by taking models in turns.",
            str(out / "report.html"),
        ]
        told = stderr.splitlines()
        assert [line[:3] for line in told[:6]] == [f"{n}/6" for n in range(1, 7)]
        missing = f"{tmp_path / 'none.wav'}: No such file or directory"
        assert told[6:] == [f"whispercache: error: {missing}"]
        assert {*REPORTS} < {each.name for each in out.iterdir()}

    def test_a_terminal_shows_bars_and_the_time_to_go(
        self, files: list[str], specs: list[ModelSpec], tmp_path: Path
    ) -> None:
        """
        They are gone in the end.
        """
        terminal, theirs = pty.openpty()
        process = started(specs, files, tmp_path / "out", stderr=theirs)
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # Linux says so when nobody writes any more
            while piece := os.read(terminal, 4096):
                shown += piece
        os.close(terminal)
        assert process.wait(60) == 0
        process.communicate()
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
        assert re.search(r"all files and models .* of 6 · \d:\d\d left", text)
        assert re.search(r"beta · [012]\.wav", text)
        assert shown.rstrip().endswith(b"\x1b[2K")

    def test_a_missing_extra_is_one_line(
        self,
        files: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:
        """
        That says what to install; the exit code is 2.
        """
        monkeypatch.setattr(run, "find_spec", lambda _name: None)
        asked = [*files, "--models", "base", "--out", str(tmp_path / "out")]
        assert main(["compare", *asked]) == 2
        assert capsys.readouterr() == (
            "",
            f"whispercache: error: comparing needs jinja2; {run.EXTRA}\n",
        )
        assert not (tmp_path / "out").exists()

    def test_ctrl_c_ends_it_at_once_and_keeps_what_is_done(
        self, specs: list[ModelSpec], tmp_path: Path
    ) -> None:
        """
        In the middle of work; it says how to go on, and that works.
        """
        many = [noise(tmp_path / f"{seed}.wav", seed) for seed in range(300)]
        out = tmp_path / "out"
        process = started(specs[:1], many, out)
        assert process.stderr is not None
        assert process.stderr.readline().startswith("1/300 alpha · ")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (130, "")
        assert "the same command goes on from there" in stderr.splitlines()[-1]
        lines = (out / run.RESULTS).read_text().splitlines()
        done = sum("result" in json.loads(line) for line in lines)
        assert 1 <= done < 300
        assert not (out / "report.html").exists()
        again = started(specs[:1], many[: done + 1], out)
        stdout, stderr = again.communicate(timeout=60)
        assert stderr.count("s of audio\n") == 1
        assert stderr.startswith(f"{done + 1}/{done + 1} alpha")
        assert stdout.splitlines()[-1] == str(out / "report.html")


@pytest.mark.process
class TestReal:
    """
    Real models on real speech.
    """

    def test_two_models_on_two_clips(self, tmp_path: Path) -> None:
        """
        Both understand the bread; on two voices tiny.en takes bread for red.
        """
        clips = [clip("en-bread"), clip("en-two-voices")]
        found = compare(
            clips,
            models=[
                f"tiny.en={packaged('tiny.en')}",
                f"base={packaged('base')}:int8",
            ],
            references=Path(clips[0]).parent / "references.tsv",
            device="cpu",
            load_options=ONE_THREAD,
            out=tmp_path,
            resamples=200,
        )
        assert [each.wer for each in found.results] == [0, pytest.approx(1 / 19), 0, 0]
        assert found.results[0].text == reference("en-bread")
        assert Edit("substitute", "bread", "red") in found.results[1].edits
        tiny, base = found.models
        assert (tiny.compute_type, base.compute_type) == ("float32", "int8_float32")
        assert base.cer == 0
        assert tiny.real_time_factor is not None
        # What the kernel says that the process grew by is near what the cache counts.
        for model in found.models:
            assert model.peak_bytes is not None
            assert model.peak_bytes > 0.5 * model.weights_bytes
        (difference,) = found.differences
        assert difference.better is None
        assert difference.wer == pytest.approx(1 / 26)
        assert "2 files are too few" in difference.verdict
        (agreement,) = found.agreements
        assert agreement.share == pytest.approx(25 / 26)
        assert [each.language for each in found.files] == ["en", "en"]
        assert {*map(str, REPORTS)} < {each.name for each in tmp_path.iterdir()}
