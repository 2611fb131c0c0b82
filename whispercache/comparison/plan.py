"""
Plan: which models take part, and on which files, before the first of them is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from whispercache.errors import WhisperCacheError

from .store import fingerprint, hash_of_file
from .values import Failure

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from whispercache.cache import ModelCache
    from whispercache.footprint import Workload
    from whispercache.keys import ModelKey
    from whispercache.specs import ModelSpec

__all__ = ["Entrant", "Input", "enter", "read_inputs"]


@dataclass(frozen=True, slots=True)
class Entrant:
    """
    A model that takes part.

    Attributes:
        name: What it is called.
        spec: How it was asked for.
        key: What it is.
        identity: Fingerprint of the model, its files, its device and the libraries.
        cost: Bytes of memory that it takes; its work is taken to go with them.
    """

    name: str
    spec: ModelSpec
    key: ModelKey
    identity: str
    cost: int


@dataclass(frozen=True, slots=True)
class Input:
    """
    A file, what is in it, and how much.
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
) -> tuple[list[Entrant], list[str]]:
    """
    The models, each of them once, and what a reader should know of that.

    Blocks: for downloads, which begin when it is clear that all models can be had.

    Raises:
        WhisperCacheError: one of them cannot.
    """
    planned: dict[ModelKey, tuple[ModelSpec, int]] = {}
    notes = []
    for spec in specs:
        place = (spec.model, device, spec.compute_type)
        key = cache.get_model(*place, **load_options).key  # type: ignore[arg-type]
        plan = cache.explain(
            *place,
            workload=workload,
            **load_options,  # type: ignore[arg-type]
        )
        if plan.outcome == "never":
            raise WhisperCacheError(plan.reason)
        if key in planned:
            other = planned[key][0].name
            notes.append(f"{spec.name} is the same model as {other}: {key}.")
        else:
            planned[key] = spec, max(1, plan.needed_bytes)
    names = _distinct([spec.name for spec, _ in planned.values()])
    entrants = [
        Entrant(name, spec, key, _identity(cache, key, load_options), cost)
        for name, (key, (spec, cost)) in zip(names, planned.items(), strict=True)
    ]
    return entrants, notes


def _identity(
    cache: ModelCache, key: ModelKey, load_options: Mapping[str, object]
) -> str:
    from whispercache.loader import versions

    loader, probe = cache._core.loader, cache._core.probe
    files = loader.locate(key.model, load_options, download=True)  # type: ignore[arg-type]
    stamp = None if files is None else files.stamp
    return fingerprint(str(key), stamp, probe.device_name(key.device), versions())


def read_inputs(files: Iterable[str]) -> tuple[list[Input], list[Failure]]:
    """
    The files, and those that cannot be read.
    """
    inputs, failures = [], []
    for file in files:
        try:
            size_bytes = Path(file).stat().st_size
            inputs.append(Input(file, hash_of_file(file), size_bytes))
        except OSError as error:
            failures.append(Failure(file, error.strerror or str(error)))
    return inputs, failures


def _distinct(names: Sequence[str]) -> list[str]:
    """
    *names*, told apart by numbers where they are equal.
    """
    found: list[str] = []
    for name in names:
        other, number = name, 1
        while other in found:
            number += 1
            other = f"{name}-{number}"
        found.append(other)
    return found
