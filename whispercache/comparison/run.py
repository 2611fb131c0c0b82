"""
The library call, from names of files and models to a `Comparison`.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from whispercache.cache import ModelCache
from whispercache.engine.calls.languages import language_code
from whispercache.engine.calls.parameters import checked
from whispercache.engine.calls.prepare import workload_of
from whispercache.engine.calls.signatures import bound
from whispercache.engine.naming import ModelSpec, parse_spec
from whispercache.errors import WhisperCacheError

from .plan import check_languages, enter, none_left, read_inputs
from .references import match_references, read_references
from .store import Store
from .turns import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .values import Comparison, ModelFailure, Progress, Reference

    Path_: TypeAlias = str | os.PathLike[str]
    References: TypeAlias = Path_ | Mapping[str, Reference | str]

# File in the output directory that keeps what was found, for the next run.
EXTRA = "pip install 'whispercache[compare]'"
RESULTS = "results.jsonl"

_NEEDED = ("jinja2", "jiwer", "scipy", "whisper_normalizer")
_LEAST_RESAMPLES = 100


def compare(
    audio: Path_ | Sequence[Path_],
    *,
    models: Sequence[str | ModelSpec],
    references: References | None = None,
    device: str = "auto",
    language: str | None = None,
    out: Path_ | None = None,
    cache: ModelCache | None = None,
    beam_size: int = 5,
    temperature: float | Sequence[float] = 0.0,
    load_options: Mapping[str, object] | None = None,
    resamples: int = 9999,
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
    **options: object,
) -> Comparison:
    """
    Compares models on the same files, and tells errors, speed, memory, and luck.

    Temperature 0 alone is the default. faster-whisper's own ladder rolls dice where a
    model is unsure, and then part of a difference would be luck; what it mends, loops
    above all, shows here as errors.

    Args:
        audio: Files that FFmpeg reads, or one of them.
        models: ``"base"``, ``"base:int8"``, ``"mine=/models/mine:int8"``, or specs.
        references: What is said in the files: a table (see `read_references`), or texts
            by file. Without, the models are compared with each other alone.
        device: The device for all models; as for `ModelCache.get_model`.
        language: Of all files, by code, name or locale; None to let each model detect
            it.
        out: Directory for the reports, and for what a rerun resumes from.
        cache: The cache of the models. They are unloaded there before and after.
            None for a cache of its own.
        beam_size: As for ``WhisperModel.transcribe``, like the following.
        temperature: See above.
        load_options: ``cpu_threads`` and the like, for all models.
        resamples: The number of draws of the bootstrap.
        resume: Do not do again what *out* has: the same audio, model files, options,
            device and versions of faster-whisper and CTranslate2.
        progress: Called at each step, on this thread.
        options: Further options of ``WhisperModel.transcribe``.

    Raises:
        TypeError, ValueError: a parameter, a spec or the references are nonsense.
        OSError: the references cannot be read, or the reports not be written.
        ModuleNotFoundError: the extra is not installed.
        WhisperCacheError: a model does not exist, or has no room, which is told before
            anything was loaded; or no model is left. One of several that is broken, or
            fails at a file, is left out, and named in ``model_failures``.

    Blocks: until all is done. An interrupted run has kept what was done in *out*; while
    a model computes, Ctrl-C waits.
    """
    _check(resamples)
    code = language_code(language)
    asked = {"language": code, "beam_size": beam_size, "temperature": temperature}
    files, specs = _files(audio), _specs(models)
    known = match_references(files, _references(references))
    folder = None if out is None else Path(out)
    given = dict(load_options or {})
    with ModelCache() if cache is None else nullcontext(cache) as used:
        call = _call(used, {**asked, **options})
        workload = workload_of(call, None)
        entrants, notes, broken = enter(used, specs, device, workload, given)
        check_languages(used, entrants, code, given)
        inputs, failures = read_inputs(files)
        # Not before: it may forget what was kept.
        store = Store(None if folder is None else folder / RESULTS, resume=resume)
        run = Run(used, call, given, entrants, inputs, failures, store, progress)
        run.run()
    comparison = _outcome(run, known, resamples, notes, broken)
    if folder is not None:
        from .report import write_reports

        write_reports(comparison, folder)
    return comparison


def _outcome(
    run: Run,
    references: Mapping[str, Reference],
    resamples: int,
    notes: Sequence[str],
    broken: Sequence[ModelFailure],
) -> Comparison:
    failed = (*broken, *run.failed)
    if len(run.failed) == len(run.entrants):
        raise WhisperCacheError(none_left(failed))
    # Brings scipy and jiwer, which are not needed until now.
    from .assess import assess

    comparison = assess(run.findings(), references, run.call, resamples)
    return replace(comparison, notes=(*notes, *comparison.notes), model_failures=failed)


def _check(resamples: int) -> None:
    # All at the start: a run of hours must not end for want of a library.
    for name in _NEEDED:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"comparing needs {name}; {EXTRA}", name=name)
    if resamples < _LEAST_RESAMPLES:
        raise ValueError(f"resamples must be at least {_LEAST_RESAMPLES}")


def _call(cache: ModelCache, asked: dict[str, object]) -> dict[str, object]:
    """
    Returns all options of ``transcribe``, on which a result depends.
    """
    signature = cache.loader.signatures()["transcribe"]
    return checked(bound(signature, (), asked))


def _files(audio: Path_ | Sequence[Path_]) -> list[str]:
    paths = [audio] if isinstance(audio, (str, os.PathLike)) else audio
    files = list(dict.fromkeys(os.fspath(path) for path in paths))
    if not files:
        raise ValueError("there is no audio to compare on")
    return files


def _specs(models: Sequence[str | ModelSpec]) -> list[ModelSpec]:
    if isinstance(models, (str, ModelSpec)):
        raise TypeError(f"models must be a list of models, not {models!r}")
    specs = [parse_spec(each) if isinstance(each, str) else each for each in models]
    if not specs:
        raise ValueError("there are no models to compare")
    return specs


def _references(references: References | None) -> Mapping[str, Reference | str]:
    if references is None:
        return {}
    if isinstance(references, (str, os.PathLike)):
        return dict(read_references(references))
    return references
