"""
The score of a transcript: its differences from the words that were said.

Texts are normalised before: case, punctuation and the spelling of numbers are no errors
of hearing. The rules are those of Whisper's authors.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .values import Edit, Tally

if TYPE_CHECKING:
    from collections.abc import Callable

UNSPACED = frozenset({"ja", "lo", "my", "th", "yue", "zh"})
"""
Languages without spaces between words: each character counts as a word.

Source: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision,
2022, appendix C; Cantonese is ours.
"""


_SIGNS = ".%$¢€£"


@dataclass(frozen=True, slots=True)
class Score:
    """
    The differences of one text from another; see `Result`.
    """

    words: Tally
    characters: Tally
    edits: tuple[Edit, ...]


@functools.lru_cache(maxsize=4096)
def normalise(text: str, language: str) -> str:
    """
    Returns *text* in the form that is scored: words in lower case, one space between
    them.

    In English, numbers, contractions and spellings are made alike too. What is in
    brackets is taken out: it tells what happens, not what is said.
    """
    words = _normaliser(language)(text).split()
    # Signs that stay for the sake of numbers are no words by themselves.
    return " ".join(word for word in words if word.strip(_SIGNS))


@functools.cache
def _normaliser(language: str) -> Callable[[str], str]:
    # Compiled for the first time, it warns of escapes in its own comments.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from whisper_normalizer.basic import BasicTextNormalizer
        from whisper_normalizer.english import EnglishTextNormalizer
    normaliser: Callable[[str], str] = (
        EnglishTextNormalizer()
        if language == "en"
        else BasicTextNormalizer(split_letters=language in UNSPACED)
    )
    return normaliser


def score(said: str, heard: str, language: str) -> Score:
    """
    Returns the differences of a transcript from what was said. Where nothing was said
    each word heard is an insertion.
    """
    said, heard = normalise(said, language), normalise(heard, language)
    # jiwer's versions differ on empty texts.
    if not said or not heard:
        return _one_sided(said, heard)
    import jiwer

    words = jiwer.process_words(said, heard)
    characters = jiwer.process_characters(said, heard)
    before, after = words.references[0], words.hypotheses[0]
    edits = tuple(
        Edit(
            chunk.type,
            " ".join(before[chunk.ref_start_idx : chunk.ref_end_idx]),
            " ".join(after[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in words.alignments[0]
    )
    return Score(_tally(words), _tally(characters), edits)


def _one_sided(said: str, heard: str) -> Score:
    edits = [Edit("delete", said, "")] if said else []
    edits += [Edit("insert", "", heard)] if heard else []
    return Score(
        Tally(deletions=len(said.split()), insertions=len(heard.split())),
        Tally(deletions=len(said), insertions=len(heard)),
        tuple(edits),
    )


def _tally(output: object) -> Tally:
    names = ("hits", "substitutions", "deletions", "insertions")
    return Tally(*(int(getattr(output, name)) for name in names))
