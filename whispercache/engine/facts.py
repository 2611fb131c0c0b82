"""
The facts that CTranslate2 tells of a loaded model, read from its files instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .calls.languages import knowledge_of
from .files import claims_of
from .sizes.architecture import CANTONESE_TOKENS, Architecture

if TYPE_CHECKING:
    from .files import ModelFiles


@dataclass(frozen=True, slots=True)
class Facts:
    """
    The facts of a model, by CTranslate2's names.

    Attributes:
        is_multilingual: It knows other languages than English.
        n_mels: Mel bands that it takes.
        num_languages: Languages that there are tokens for, of whatever model.
    """

    is_multilingual: bool
    n_mels: int
    num_languages: int


def facts_of(files: ModelFiles) -> Facts:
    """
    Returns the facts of the model of *files*, or of a known size whose files are not
    here.

    Raises:
        CorruptModel, LoadFailed: they have changed for the worse since they were found.
    """
    known, source = knowledge_of(files), (files.original or files).source
    assert known is not None and source is not None
    if isinstance(source, Architecture):
        num_languages = 99 + (source.vocabulary >= CANTONESE_TOKENS)
        return Facts(known.is_multilingual, source.mels, num_languages)
    # As CTranslate2 counts them, which English-only models have tokens for, too.
    # Source: CTranslate2 4.8.5, ran with vocabularies of 2, 99 and 100.
    ids = claims_of(files.original or files).vocabulary.special
    first, end = ids["<|startoftranscript|>"] + 1, ids.get("<|translate|>")
    num_languages = 99 if end is None else end - first
    return Facts(known.is_multilingual, source.architecture.mels, num_languages)
