"""
Scores of texts, and what of a difference is luck.
"""

from __future__ import annotations

import numpy as np
import pytest
from compared import files_of_noise
from hypothesis import given
from hypothesis import strategies as st

from whispercache.comparison import (
    Edit,
    Tally,
)
from whispercache.comparison.intervals import FEW_FILES, Count, bootstrap, tell_apart
from whispercache.comparison.score import normalise, score

files = files_of_noise()


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
