"""
The step from transcripts to rates, differences and sentences. No model is involved.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING

from .intervals import FEW_FILES, Count, bootstrap, tell_apart
from .score import normalise, score
from .values import (
    Agreement,
    Comparison,
    Difference,
    FileInfo,
    ModelSummary,
    Result,
    Tally,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .plan import Entrant
    from .turns import Findings
    from .values import Reference

_ROUGH_FILES = 20


def assess(
    findings: Findings,
    references: Mapping[str, Reference],
    options: Mapping[str, object],
    resamples: int,
) -> Comparison:
    """
    Returns the findings of a run, scored.
    """
    files = _files(findings.results, references, options.get("language"))
    results = tuple(_scored(each, files[each.file]) for each in findings.results)
    # Without those that failed, which are compared with nothing.
    names = [entrant.name for entrant in findings.entrants]
    by_model = {
        name: {each.file: each for each in results if each.model == name}
        for name in names
    }
    pairs = list(combinations(names, 2))
    heard_now = sum(not each.is_kept for each in results)
    loads = len(findings.loaded)
    # No reference, no differences: then agreements are all there is.
    is_scored = any(each.words for each in results)
    return Comparison(
        models=tuple(
            _summary(each, findings, tuple(by_model[each.name].values()), resamples)
            for each in findings.entrants
        ),
        files=tuple(files.values()),
        results=results,
        differences=tuple(
            _difference(a, b, by_model, resamples) for a, b in pairs if is_scored
        ),
        agreements=tuple(_agreement(a, b, by_model, files) for a, b in pairs),
        failures=findings.failures,
        loads=loads,
        # File by file, a single model would stay in memory too.
        loads_saved=heard_now - loads if loads > 1 else 0,
        options=dict(options),
        notes=tuple(_notes(files.values(), results)),
    )


def _files(
    results: Sequence[Result], references: Mapping[str, Reference], asked: object
) -> dict[str, FileInfo]:
    found = {}
    for file in dict.fromkeys(each.file for each in results):
        heard = [each for each in results if each.file == file]
        # The models may have detected different languages.
        surest = max(heard, key=lambda each: each.certainty or 0.0)
        reference = references.get(file)
        told = (reference.language if reference else None) or asked
        found[file] = FileInfo(
            file=file,
            language=str(told or surest.language),
            duration_s=surest.duration_s,
            reference=reference.text if reference else None,
        )
    return found


def _scored(result: Result, file: FileInfo) -> Result:
    if file.reference is None:
        return result
    found = score(file.reference, result.text, file.language)
    return replace(
        result, words=found.words, characters=found.characters, edits=found.edits
    )


def _summary(
    entrant: Entrant, findings: Findings, results: Sequence[Result], resamples: int
) -> ModelSummary:
    load = findings.loads[entrant.name]
    words = [each.words for each in results if each.words]
    characters = [each.characters for each in results if each.characters]
    peaks = [load.peak_bytes, *(each.peak_bytes for each in results)]
    latencies = [each.latency_s for each in results if each.latency_s is not None]
    # Pooled: a long file counts for more than a short one.
    counts = [Count(tally.said, tally.errors) for tally in words]
    return ModelSummary(
        name=entrant.name,
        key=str(entrant.key),
        model=entrant.key.model,
        device=entrant.key.device,
        compute_type=entrant.key.compute_type,
        files=len(results),
        load_s=load.load_s,
        warm_up_s=load.warm_up_s,
        loads=int(entrant.name in findings.loaded),
        weights_bytes=load.weights_bytes,
        peak_bytes=max((each for each in peaks if each is not None), default=None),
        duration_s=sum(each.duration_s for each in results),
        work_s=sum(each.work_s for each in results),
        # The median, since a single stall of the machine would move a mean.
        latency_s=statistics.median(latencies) if latencies else None,
        words=sum(words, Tally()) if words else None,
        characters=sum(characters, Tally()) if characters else None,
        wer_interval=bootstrap(counts, resamples),
    )


def _difference(
    first: str,
    second: str,
    by_model: Mapping[str, Mapping[str, Result]],
    resamples: int,
) -> Difference:
    counts = []
    for file, result in by_model[first].items():
        other = by_model[second].get(file)
        # Only files that both have heard are a fair comparison.
        if other and result.words and other.words:
            errors = result.words.errors, other.words.errors
            counts.append(Count(result.words.said, *errors))
    return tell_apart(first, second, counts, resamples)


def _agreement(
    first: str,
    second: str,
    by_model: Mapping[str, Mapping[str, Result]],
    files: Mapping[str, FileInfo],
) -> Agreement:
    errors = longer = n_files = 0
    for file, result in by_model[first].items():
        other = by_model[second].get(file)
        if other is None:
            continue
        n_files += 1
        language = files[file].language
        errors += score(result.text, other.text, language).words.errors
        # The longer text, so that the share is the same whichever comes first.
        texts = (normalise(each.text, language) for each in (result, other))
        longer += max(len(text.split()) for text in texts)
    share = 1 - errors / longer if longer else None
    return Agreement(first, second, n_files, share)


def _notes(files: Iterable[FileInfo], results: Sequence[Result]) -> Iterable[str]:
    known = [file for file in files if file.reference is not None]
    missing = [file.file for file in files if file.reference is None]
    if known and missing:
        yield f"No reference, so no error rate, for {', '.join(missing)}."
    n_spoken = len({each.file for each in results if each.words and each.words.said})
    if known and n_spoken < FEW_FILES:
        yield (
            f"It takes {FEW_FILES} files with words in their references to tell a "
            f"difference from chance; here are {n_spoken}."
        )
    # The rule for few files makes intervals honest, not narrow.
    elif known and n_spoken < _ROUGH_FILES:
        yield f"With {n_spoken} files, take the intervals as rough ones."
    damages = {each.file: each.damage for each in results if each.damage}
    for file, damage in damages.items():
        yield f"{file} is damaged: {damage}. All models heard what is left."
    if any(each.is_kept for each in results):
        n_kept = sum(each.is_kept for each in results)
        yield (
            f"{n_kept} of {len(results)} results, with their times, are those of an "
            "earlier run."
        )
