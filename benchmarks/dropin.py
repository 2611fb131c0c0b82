"""
What a transcription through a cached model costs more than one by a plain WhisperModel.

    python benchmarks/dropin.py [--rounds 300] [--write]

A micro model hears a second of silence, so that little else is done: by a plain model,
by another plain one, which shows what chance does, by the model of a lease, and by the
object that `get_model` returns, whose call takes a lease and checks its parameters. In
each round each makes one call, in an order that is drawn anew: what one call leaves in
the processor's caches is there for any of the others. Medians of the differences and of
the ratios within a round.

The calling thread's CPU time tells what Python does; CTranslate2 computes on another
thread. The clock is disturbed by other programs. NumPy's matrix products are kept to
the thread that asks for them, which would else spin until the others are done.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

import numpy as np
from faster_whisper import WhisperModel
from micro import build_micro
from report import Table, machine, parsed, write

from whispercache import ModelCache

if TYPE_CHECKING:
    from collections.abc import Mapping

SILENCE = np.zeros(16_000, np.float32)
CALLS: dict[str, dict[str, Any]] = {
    "Greedy, in English": {"language": "en", "beam_size": 1, "temperature": 0},
    "As faster-whisper has it, in English": {"language": "en"},
}
WARM_UPS = 5


def taken(model: Any, options: Mapping[str, Any]) -> tuple[float, float]:  # noqa: ANN401 - a model
    """
    Returns the milliseconds of one transcription: of this thread, and of the clock.
    """
    thread_s, clock_s = time.thread_time(), time.perf_counter()
    for _ in model.transcribe(SILENCE, **options)[0]:
        pass
    own_s, all_s = time.thread_time() - thread_s, time.perf_counter() - clock_s
    return own_s * 1e3, all_s * 1e3


def turns(
    models: Mapping[str, Any], options: Mapping[str, Any], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """
    Has each transcribe once in each round.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    names = list(models)
    for number in range(-WARM_UPS, rounds):
        random.shuffle(names)
        for name in names:
            one = taken(models[name], options)
            if number >= 0:
                found[name].append(one)
    return found


def table_of(title: str, found: Mapping[str, list[tuple[float, float]]]) -> Table:
    columns = ["", "its thread, ms", "more than plain, ms", "clock, ms", "ratio"]
    table = Table(f"{title}: one transcription, medians", columns)
    for name, each in found.items():
        pairs = list(zip(each, found["plain"], strict=True))
        more = statistics.median(a[0] - b[0] for a, b in pairs)
        ratio = statistics.median(a[1] / b[1] for a, b in pairs)
        own, clock = (statistics.median(part) for part in zip(*each, strict=True))
        table.add(name, f"{own:.2f}", f"{more:.3f}", f"{clock:.2f}", f"{ratio:.3f}")
    return table


def main() -> None:
    options = parsed(__doc__, rounds=300)
    with tempfile.TemporaryDirectory() as folder, ModelCache(variants=False) as cache:
        path = str(build_micro(Path(folder, "micro")))
        place: dict[str, Any] = {"device": "cpu", "compute_type": "int8"}
        place["cpu_threads"] = 1
        with cache.lease(path, **place) as leased:
            models = {
                "plain": WhisperModel(path, **place),
                "plain, another": WhisperModel(path, **place),
                "leased": leased,
                "get_model": cache.get_model(path, **place),
            }
            tables = [
                table_of(title, turns(models, call, options.rounds))
                for title, call in CALLS.items()
            ]
    write("dropin", [machine(), *tables], to_file=options.write)


if __name__ == "__main__":
    main()
