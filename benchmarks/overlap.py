"""
What loads do to a transcription that runs beside them.

    python benchmarks/overlap.py [--rounds 3] [--write]

On the CPU, in one process: tiny.en in float32 transcribes a minute of speech, on one
thread and on two, alone and while another thread, again and again,

loads, variants     loads base and evicts it, in int8 and in float32 in turn
loads, no variants  the same with ``variants=False``

All take turns, several rounds; medians. "Cores" is how many cores the work beside uses
when it is alone: CPU seconds per second. Beside a transcription on n threads, n + cores
want to run, and "fair" is that over the cores that there are, or 1 if all find one: by
so much it may be slower. All this holds where no other program wants the cores; how
many others used is shown, too.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import threading
import time
from collections import defaultdict
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
from report import Table, machine, parsed, write
from switch import TYPES, prepared

from whispercache import ModelCache, read_audio
from whispercache.engine.process import versions

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from faster_whisper import WhisperModel
    from numpy.typing import NDArray
    from typing_extensions import Self

THREADS = (1, 2)
CLIP_S, RATE = 60, 16_000
# Seconds for which the work beside is measured alone, in each round.
ALONE_S = 2.0

CASES = ALONE, LOADS, PLAIN_LOADS = ("alone", "loads, variants", "loads, no variants")


# Work --------------------------------------------------------------------------------


def minute() -> NDArray[np.float32]:
    """
    Reads a minute of English from the clips: float32 (samples,), mono, 16 kHz.
    """
    import numpy as np

    clips = Path(__file__).parent.parent / "examples" / "clips"
    parts = [read_audio(each).samples for each in sorted(clips.glob("en-*.flac"))]
    return np.concatenate(parts)[: CLIP_S * RATE]


def transcribe(whisper: WhisperModel, audio: NDArray[np.float32]) -> float:
    """
    Returns the seconds of a greedy transcription.
    """
    started_s = time.perf_counter()
    segments, _ = whisper.transcribe(
        audio, beam_size=1, temperature=0, condition_on_previous_text=False
    )
    for _ in segments:
        pass
    return time.perf_counter() - started_s


def loads(cache: ModelCache, model: Path) -> Iterator[None]:
    """
    Loads and evicts a model forever, one load at each step.
    """
    for kind in cycle(TYPES):
        cache.lease(model, "cpu", kind).release()
        yield
        cache.evict(model)


class Beside:
    """
    Work on a thread of its own while a block runs, and the cores that both used.
    """

    def __init__(self, steps: Iterator[None]) -> None:
        self.cores: float = 0.0
        self._steps = steps
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._go_on)

    def _go_on(self) -> None:
        for _ in self._steps:
            if self._is_over.is_set():
                return

    def __enter__(self) -> Self:
        self._started = time.perf_counter(), cpu_seconds()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        started_s, used_s = self._started
        self.cores = (cpu_seconds() - used_s) / (time.perf_counter() - started_s)


def others_seconds() -> float:
    times = psutil.cpu_times()
    busy_s = times.user + times.nice + times.system + times.irq + times.softirq
    return busy_s - cpu_seconds()


def cpu_seconds() -> float:
    """
    Returns the CPU seconds of this process and of its children that have ended.
    """
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usages = map(resource.getrusage, who)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# Side by side ------------------------------------------------------------------------


class Results:
    def __init__(self) -> None:
        self.others: list[float] = []  # cores of other programs meanwhile
        self.cores: defaultdict[str, list[float]] = defaultdict(list)
        self.seconds: defaultdict[tuple[str, int], list[float]] = defaultdict(list)

    def fair(self, case: str, threads: int) -> float:
        """
        Returns the factor by which a transcription may be slower beside that work.
        """
        if case == ALONE:
            return 1.0
        wanted = threads + statistics.median(self.cores[case])
        return max(1.0, wanted / (os.cpu_count() or 1))


def side_by_side(home: Path, rounds: int) -> Results:
    results = Results()
    audio, base = minute(), home / "base"
    with ExitStack() as stack:
        cache = stack.enter_context(ModelCache())
        plain = stack.enter_context(ModelCache(variants=False))
        models = {
            threads: stack.enter_context(
                cache.lease(home / "tiny.en", "cpu", "float32", cpu_threads=threads)
            )
            for threads in THREADS
        }
        caches = {LOADS: cache, PLAIN_LOADS: plain}
        for whisper in models.values():  # the first makes threads and buffers
            transcribe(whisper, audio)
        for _ in range(rounds):
            for case, each in caches.items():
                with Beside(loads(each, base)) as beside:
                    time.sleep(ALONE_S)
                results.cores[case].append(beside.cores)
            for threads, whisper in models.items():
                others_s = -others_seconds()
                seconds = transcribe(whisper, audio)
                results.seconds[ALONE, threads].append(seconds)
                results.others.append((others_s + others_seconds()) / seconds)
                for case, each in caches.items():
                    with Beside(loads(each, base)):
                        seconds = transcribe(whisper, audio)
                    results.seconds[case, threads].append(seconds)
    return results


def transcription_table(results: Results) -> Table:
    names = {1: "1 thread, s", 2: "2 threads, s"}
    heads = [h for n in THREADS for h in (names[n], "× alone", "fair")]
    table = Table("A minute of speech, transcribed beside", ["", *heads])
    median = {k: statistics.median(v) for k, v in results.seconds.items()}
    for case in CASES:
        cells = []
        for threads in THREADS:
            ratio = median[case, threads] / median[ALONE, threads]
            cells += [f"{median[case, threads]:.2f}", f"{ratio:.2f}"]
            cells.append(f"{results.fair(case, threads):.2f}")
        table.add(case, *cells)
    return table


def main() -> None:
    options = parsed(__doc__, rounds=3)
    versions()  # imports CTranslate2 the cache's way
    with prepared() as home:
        results = side_by_side(home, options.rounds)
    others = f"Other processes used {statistics.median(results.others):.2f} cores."
    table = transcription_table(results)
    write("overlap", [machine(), others, table], to_file=options.write)


if __name__ == "__main__":
    main()
