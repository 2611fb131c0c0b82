"""
The findings of a comparison, as plain frozen values.

Rates are fractions of what was really said: 0.05 are 5 errors in 100 words. A rate is
None where nothing was said, since errors cannot be a share of nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from whispercache.transcripts import Cue


@dataclass(frozen=True, slots=True)
class Reference:
    """
    The words that are said in a file, by a human's account; empty for a file without
    speech. *language* is a code, name or locale; None to go by what the models detect.
    """

    text: str
    language: str | None = None


@dataclass(frozen=True, slots=True)
class Tally:
    """
    Words, or characters, that were heard right (hits), as something else, not at all
    (deletions), or though they were not said (insertions).
    """

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def errors(self) -> int:
        """
        All but the hits.
        """
        return self.substitutions + self.deletions + self.insertions

    @property
    def said(self) -> int:
        """
        The number of words, or characters, in the reference.
        """
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float | None:
        """
        The errors as a share of what was said, above 1 if much was made up; None if
        nothing was said.
        """
        return self.errors / self.said if self.said else None

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )


@dataclass(frozen=True, slots=True)
class Edit:
    """
    A stretch of words on which reference and transcript agree, or do not: of the *kind*
    ``"equal"``, ``"substitute"``, ``"delete"`` or ``"insert"``. The words are
    normalised; empty on one side for an insertion or a deletion.
    """

    kind: str
    said: str
    heard: str


@dataclass(frozen=True, slots=True)
class FileInfo:
    """
    One of the files, as it was named.

    Attributes:
        language: Code of the language that its texts are normalised in: of the
            reference, else the one asked for, else the one that was detected with the
            greatest certainty.
        duration_s: Length of the audio in seconds.
        reference: The words that are said in it; None if not known.
    """

    file: str
    language: str
    duration_s: float
    reference: str | None


class _Rated:
    """
    The rates of what has words, characters and times.
    """

    __slots__ = ()
    if TYPE_CHECKING:
        words: Tally | None
        characters: Tally | None
        work_s: float
        duration_s: float

    @property
    def wer(self) -> float | None:
        """
        The word error rate; None without a reference, and where nothing was said.
        """
        return self.words.rate if self.words else None

    @property
    def cer(self) -> float | None:
        """
        The character error rate, likewise.
        """
        return self.characters.rate if self.characters else None

    @property
    def real_time_factor(self) -> float | None:
        """
        The seconds of work for each second of audio: below 1 it keeps up with speech.
        """
        return self.work_s / self.duration_s if self.duration_s else None


@dataclass(frozen=True, slots=True)
class Result(_Rated):
    """
    One model's transcript of one file.

    Attributes:
        language: Code of the language, asked for or detected.
        certainty: The model's confidence in the language, 0 to 1; None where it was
            told, and where it knows no other than English.
        cues: The transcript in pieces, with their times.
        duration_s: Length of the audio in seconds.
        work_s: Seconds from the call to the last segment, the model being in memory and
            the audio decoded. Language detection is in it where no language was given.
        latency_s: Seconds from the call to the first segment; None if there was none.
        peak_bytes: Largest growth of memory seen during the call, counted from before
            the model was loaded; None where nothing is measured. On the host it is this
            process's own memory, on a card that of all programs. A look every 10 ms, so
            a shorter peak may be missed; model, audio and working memory are all in it.
        words: Words right and wrong; None without a reference.
        characters: Characters likewise, spaces between words included.
        edits: Reference and transcript side by side, in pieces; empty without a
            reference.
        is_kept: Found by an earlier run, with that run's figures.
        damage: The part of the file that was lost, in words; empty if none.
    """

    model: str
    file: str
    language: str
    certainty: float | None
    text: str
    cues: tuple[Cue, ...]
    duration_s: float
    work_s: float
    latency_s: float | None
    peak_bytes: int | None
    words: Tally | None = None
    characters: Tally | None = None
    edits: tuple[Edit, ...] = ()
    is_kept: bool = False
    damage: str = ""


@dataclass(frozen=True, slots=True)
class Interval:
    """
    The bounds of a value with 95 % confidence, as far as these files can tell.
    """

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ModelSummary(_Rated):
    """
    One model over all files that it was tried on.

    Attributes:
        key: The text of its `ModelKey`.
        files: The number of files that it heard.
        load_s: Seconds of the load itself, without a download or a wait for room.
        warm_up_s: Seconds of the first call after the load, on a second of silence,
            for a few words at most. It takes what only a first call costs out of the
            other figures, and is in none of them.
        loads: The number of loads in this run: one, or none if an earlier run had
            found everything already.
        weights_bytes: The bytes that the cache counts for the model itself.
        peak_bytes: Largest of the results' ``peak_bytes`` and of the load's own.
        duration_s: Length of all the audio in seconds.
        work_s: Sum of the results' ``work_s``.
        latency_s: Median of the results' ``latency_s``.
        words: Words of all files with a reference, pooled; None if there is none.
        characters: Characters likewise.
        wer_interval: Confidence interval of `wer`; None with too few files.
    """

    name: str
    key: str
    model: str
    device: str
    compute_type: str
    files: int
    load_s: float
    warm_up_s: float
    loads: int
    weights_bytes: int
    peak_bytes: int | None
    duration_s: float
    work_s: float
    latency_s: float | None
    words: Tally | None
    characters: Tally | None
    wer_interval: Interval | None


@dataclass(frozen=True, slots=True)
class Difference:
    """
    The difference of two models on the same files, and whether it is more than luck.

    Attributes:
        files: The number of files with a reference that both have heard.
        wer: Word error rate of *first* less that of *second*, pooled over those
            files; positive if the second is better. None if nothing was said in them.
        interval: Confidence interval of *wer*; None with too few files.
        better: Name of the better one, if the files are enough to tell; else None.
        verdict: All this in a sentence.
    """

    first: str
    second: str
    files: int
    wer: float | None
    interval: Interval | None
    better: str | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Agreement:
    """
    The likeness of two models' transcripts, whatever was really said.

    Attributes:
        files: The number of files that both have heard.
        share: 1 less the word errors of one text against the other as a share of
            the longer text, pooled over the files: from 0 (nothing in common) to 1
            (equal words), and the same whichever comes first. None if neither heard a
            word.
    """

    first: str
    second: str
    files: int
    share: float | None


@dataclass(frozen=True, slots=True)
class Failure:
    """
    A file that could not be decoded; it was passed over.
    """

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class ModelFailure:
    """
    A *model* that could not be loaded, or failed at a file, and is left out; *reason*
    is one line.
    """

    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """
    The findings on some models and some files.

    Attributes:
        models: The models, in the order in which they were named; without those that
            failed.
        results: Each model on each file, model by model.
        differences: Each pair of models; empty without references.
        loads: The number of loads in this run.
        loads_saved: The further loads that it would have taken file by file, in a
            memory that holds one model.
        notes: Notes for readers, a sentence each.
    """

    models: tuple[ModelSummary, ...]
    files: tuple[FileInfo, ...]
    results: tuple[Result, ...]
    differences: tuple[Difference, ...]
    agreements: tuple[Agreement, ...]
    failures: tuple[Failure, ...]
    loads: int
    loads_saved: int
    options: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    model_failures: tuple[ModelFailure, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """
    The progress of a comparison.

    Attributes:
        stage: ``"loading"``, ``"warming up"``, ``"listening"`` or ``"done"``.
        file: The file, or empty while the model is loaded.
        done: Pairs of a model and a file that are done, those of earlier runs too.
        fraction: Share of this run's work that is done, 0 to 1: an estimate, for which
            the work goes with the bytes of the file and those of the model.
        share: Share of the file that is done, 0 to 1.
        result: The result, without its score, at the stage ``"done"``.
    """

    stage: str
    model: str
    file: str
    done: int
    total: int
    fraction: float
    share: float = 0.0
    result: Result | None = None
