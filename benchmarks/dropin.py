"""
What a transcription through a cached model costs more than one by a plain WhisperModel.

    python benchmarks/dropin.py [--rounds 100] [--write]

A micro model hears a second of silence, so that little else is done: by a plain model,
by the model of a lease, and by the object that `get_model` returns, whose call takes a
lease and checks its parameters. The calling thread's CPU time tells what Python does;
CTranslate2 computes on another thread. The clock is disturbed by other programs. All in
one run, in turns, medians of differences and ratios.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

import numpy as np
from faster_whisper import WhisperModel
from micro import build_micro
from report import Table, machine, parsed, write

from whispercache import ModelCache

if TYPE_CHECKING:
    from collections.abc import Mapping

SILENCE = np.zeros(16_000, np.float32)
OPTIONS: dict[str, Any] = {"language": "en", "beam_size": 1, "temperature": 0}
CALLS = 4


def taken(model: Any) -> tuple[float, float]:  # noqa: ANN401 - a model
    """
    Returns the milliseconds of one transcription: of this thread, and of the clock.
    """
    thread_s, clock_s = time.thread_time(), time.perf_counter()
    for _ in range(CALLS):
        list(model.transcribe(SILENCE, **OPTIONS)[0])
    own_s, all_s = time.thread_time() - thread_s, time.perf_counter() - clock_s
    return own_s * 1e3 / CALLS, all_s * 1e3 / CALLS


def turns(
    models: Mapping[str, Any], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """
    Has each transcribe in each round, in an order that changes.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    names = list(models)
    for number in range(rounds + 1):
        names.append(names.pop(0))
        for name in names:
            one = taken(models[name])
            # The first is a warm-up.
            if number:
                found[name].append(one)
    return found


def main() -> None:
    options = parsed(__doc__, rounds=100)
    with tempfile.TemporaryDirectory() as folder, ModelCache(variants=False) as cache:
        path = str(build_micro(Path(folder, "micro")))
        place: dict[str, Any] = {"device": "cpu", "compute_type": "int8"}
        plain = WhisperModel(path, cpu_threads=1, **place)
        with cache.lease(path, cpu_threads=1, **place) as leased:
            models = {
                "plain": plain,
                "leased": leased,
                "get_model": cache.get_model(path, cpu_threads=1, **place),
            }
            found = turns(models, options.rounds)
    columns = ["", "its thread, ms", "more than plain, ms", "clock, ms", "ratio"]
    table = Table("One transcription, medians", columns)
    for name, each in found.items():
        more = [a[0] - b[0] for a, b in zip(each, found["plain"], strict=True)]
        ratio = [a[1] / b[1] for a, b in zip(each, found["plain"], strict=True)]
        own, clock = (statistics.median(part) for part in zip(*each, strict=True))
        row = own, statistics.median(more), clock
        table.add(name, *(f"{n:.2f}" for n in row), f"{statistics.median(ratio):.3f}")
    write("dropin", [machine(), table], to_file=options.write)


if __name__ == "__main__":
    main()
