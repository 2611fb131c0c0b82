"""
What it costs to switch between two models under a limit that holds one: A, B, A, B, …

    python benchmarks/switch.py [--switches 12] [--write]

On the CPU, tiny.en and base, in float32 and int8. Each contender runs in a process of
its own, and tells how long each switch took, from the request until the model can be
used, and how much memory it held at the worst moment:

construct     ``WhisperModel(...)`` each time, the old one dropped first
lru_cache     ``@lru_cache(maxsize=1)`` around it, the usual recipe: the old model goes
              only once the new one is there
whispercache  ``ModelCache(ram=LIMIT)``, with a limit that holds either model, not both

The contenders take turns, several rounds each; medians. Files are read before each
switch, so that all find them in the page cache. Memory is the growth of the process's
anonymous memory, looked at every 2 ms.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

from report import Table, machine, write

from examples.weights import packaged_model
from whispercache import ModelCache, Workload
from whispercache.errors import format_bytes
from whispercache.host import anonymous_bytes
from whispercache.loader import versions

if TYPE_CHECKING:
    from collections.abc import Callable

MODELS = ("tiny.en", "base")
TYPES = ("float32", "int8")
CONTENDERS = ("construct", "lru_cache", "whispercache")
ROUNDS = 3
WORK = Workload(beam_size=1, fallback=False)


@functools.cache
def limit_bytes(compute_type: str) -> int:
    """
    A limit that holds either model and the work of one greedy call, with 5 % to spare.
    """
    with ModelCache() as cache:
        asked = [
            cache.explain(packaged_model(name), "cpu", compute_type, workload=WORK)
            for name in MODELS
        ]
    return int(1.05 * max(each.needed_bytes for each in asked))


def switcher(contender: str, compute_type: str) -> Callable[[str], object]:
    """
    A function that makes a model usable.
    """
    if contender == "whispercache":
        versions()  # imports CTranslate2 the cache's way, before memory is looked at
        cache = ModelCache(ram=limit_bytes(compute_type), max_models=1)

        def lease(path: str) -> None:
            cache.lease(path, "cpu", compute_type, workload=WORK).release()

        return lease

    from faster_whisper import WhisperModel

    def load(path: str) -> WhisperModel:
        return WhisperModel(path, device="cpu", compute_type=compute_type)

    if contender == "lru_cache":
        return functools.lru_cache(maxsize=1)(load)
    held: list[WhisperModel] = []

    def construct(path: str) -> None:
        held.clear()
        held.append(load(path))

    return construct


def child(contender: str, compute_type: str, switches: int) -> None:
    """
    Switch, and print the seconds of each and the peak of the memory.
    """
    paths = [str(packaged_model(name)) for name in MODELS]
    use = switcher(contender, compute_type)
    before = anonymous_bytes() or 0
    peak = before
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, anonymous_bytes() or 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    times = []
    for i in range(switches):
        for path in paths:
            with Path(path, "model.bin").open("rb") as file:
                while file.read(1 << 20):
                    pass
        started_s = time.perf_counter()
        use(paths[i % 2])
        times.append(time.perf_counter() - started_s)
    stop.set()
    watcher.join()
    print(json.dumps({"times": times, "peak_bytes": peak - before}))


def measure(
    contender: str, compute_type: str, switches: int
) -> tuple[list[float], int]:
    """
    Seconds of each switch but the first of each model, and the peak.
    """
    command = [sys.executable, __file__, "--child", contender, compute_type]
    done = subprocess.run(
        [*command, "--switches", str(switches)],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    return result["times"][2:], result["peak_bytes"]


def main() -> None:
    """
    Measure, print, and write if asked to.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--switches", type=int, default=12)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        contender, compute_type = options.child
        child(contender, compute_type, options.switches)
        return
    times: dict[tuple[str, str], list[float]] = {}
    peaks: dict[tuple[str, str], int] = {}
    for _ in range(ROUNDS):
        for compute_type in TYPES:
            for contender in CONTENDERS:
                took, peak = measure(contender, compute_type, options.switches)
                times.setdefault((contender, compute_type), []).extend(took)
                place = (contender, compute_type)
                peaks[place] = max(peak, peaks.get(place, 0))
    heads = ["", "to tiny.en, ms", "to base, ms", "× construct", "peak", "limit"]
    tables = []
    for compute_type in TYPES:
        table = Table(compute_type, heads)
        base = statistics.mean(halves(times["construct", compute_type]))
        for contender in CONTENDERS:
            tiny_s, base_s = halves(times[contender, compute_type])
            ratio = statistics.mean((tiny_s, base_s)) / base
            table.add(
                contender,
                f"{tiny_s * 1e3:.0f}",
                f"{base_s * 1e3:.0f}",
                f"{ratio:.2f}",
                format_bytes(peaks[contender, compute_type]),
                format_bytes(limit_bytes(compute_type)),
            )
        tables.append(table)
    write("switch", [machine(), *tables], to_file=options.write)


def halves(times: list[float]) -> tuple[float, float]:
    """
    Median seconds of a switch to the first model, and to the second.
    """
    return statistics.median(times[::2]), statistics.median(times[1::2])


if __name__ == "__main__":
    main()
