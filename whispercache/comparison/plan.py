"""
The models and files that take part, settled before the first model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from whispercache.console import distinct
from whispercache.engine.calls.languages import check_language
from whispercache.errors import LoadFailed, WhisperCacheError

from .store import fingerprint, hash_of_file
from .values import Failure, ModelFailure

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from whispercache.cache import ModelCache
    from whispercache.engine.naming import ModelSpec
    from whispercache.engine.sizes.footprint import Workload
    from whispercache.keys import ModelKey


@dataclass(frozen=True, slots=True)
class Entrant:
    """
    A model that takes part, with a fingerprint of the model, its files, its device and
    the libraries. *cost* is the bytes of memory that it takes; its work is taken to go
    with them.
    """

    name: str
    spec: ModelSpec
    key: ModelKey
    identity: str
    cost: int


@dataclass(frozen=True, slots=True)
class Input:
    """
    A file, with the hash of its content and its size.
    """

    file: str
    content: str
    size_bytes: int


def enter(
    cache: ModelCache,
    specs: Sequence[ModelSpec],
    device: str,
    workload: Workload,
    load_options: Mapping[str, object],
) -> tuple[list[Entrant], list[str], list[ModelFailure]]:
    """
    Returns the models, each of them once; notes on that for readers; and the models
    whose files are broken or cannot be downloaded. Raises a WhisperCacheError if one
    does not exist, or has no room, or if none can be had.

    Blocks: for downloads, which begin when it is clear that there is room for all.
    """
    planned: dict[ModelKey, tuple[ModelSpec, int]] = {}
    notes: list[str] = []
    failed: list[tuple[str, LoadFailed]] = []
    for spec in specs:
        try:
            key, cost = _plan(cache, spec, device, workload, load_options)
        except LoadFailed as error:
            # The others are compared all the same.
            failed.append((spec.name, error))
            continue
        if key in planned:
            other = planned[key][0].name
            notes.append(f"{spec.name} is the same model as {other}: {key}.")
        else:
            planned[key] = spec, cost
    # After equal models were merged, so that none is numbered in vain.
    names = distinct([spec.name for spec, _ in planned.values()], same=str)
    entrants: list[Entrant] = []
    for name, (key, (spec, cost)) in zip(names, planned.items(), strict=True):
        try:
            identity = _identity(cache, key, load_options)
        except LoadFailed as error:
            failed.append((name, error))
        else:
            entrants.append(Entrant(name, spec, key, identity, cost))
    failures = [ModelFailure(name, one_line(error)) for name, error in failed]
    # One error keeps its type; several become one that names them.
    if failed and not entrants:
        if len(failed) > 1:
            raise WhisperCacheError(none_left(failures))
        raise failed[0][1]
    return entrants, notes, failures


def none_left(failures: Sequence[ModelFailure]) -> str:
    """
    Returns an error's text: the models that failed, by reason.
    """
    models: dict[str, list[str]] = {}
    for failure in failures:
        models.setdefault(failure.reason, []).append(failure.model)
    told = "; ".join(f"{', '.join(names)}: {why}" for why, names in models.items())
    return f"no model is left to compare: {told}"


def one_line(error: BaseException) -> str:
    """
    Returns an error as one line.
    """
    return " ".join(str(error).split()) or type(error).__name__


def _plan(
    cache: ModelCache,
    spec: ModelSpec,
    device: str,
    workload: Workload,
    load_options: Mapping[str, object],
) -> tuple[ModelKey, int]:
    place = (spec.model, device, spec.compute_type)
    key = cache.get_model(*place, **load_options).key  # type: ignore[arg-type]
    plan = cache.explain(
        *place,
        workload=workload,
        **load_options,  # type: ignore[arg-type]
    )
    # Told now, and not after hours of the other models' work.
    if plan.outcome == "never":
        raise WhisperCacheError(plan.reason)
    # Never 0, by which the progress is divided.
    return key, max(1, plan.needed_bytes)


def check_languages(
    cache: ModelCache,
    entrants: Iterable[Entrant],
    language: str | None,
    load_options: Mapping[str, object],
) -> None:
    """
    Refuses a language that one of the models does not know, by a ValueError.
    """
    for entrant in entrants:
        key = entrant.key
        known = cache.knowledge(key.model, key.device, key.compute_type, **load_options)
        check_language(entrant.name, language, known)


def _identity(
    cache: ModelCache, key: ModelKey, load_options: Mapping[str, object]
) -> str:
    from whispercache.engine.process import versions

    files = cache.loader.locate(key.model, load_options, download=True)  # type: ignore[arg-type]
    # A model whose files change is another model.
    stamp = None if files is None else files.stamp
    return fingerprint(str(key), stamp, cache.probe.device_name(key.device), versions())


def read_inputs(files: Iterable[str]) -> tuple[list[Input], list[Failure]]:
    """
    Returns the files, and those that cannot be read.
    """
    inputs, failures = [], []
    for file in files:
        try:
            size_bytes = Path(file).stat().st_size
            # By content, so that a renamed file need not be heard again.
            inputs.append(Input(file, hash_of_file(file), size_bytes))
        except OSError as error:
            failures.append(Failure(file, error.strerror or str(error)))
    return inputs, failures
