"""
What loads do to a transcription that runs beside them, and the other way round.

    python benchmarks/overlap.py [--rounds 3] [--switches 26] [--write]

On the CPU, in one process: tiny.en in float32 transcribes a minute of speech, on one
thread and on two, alone and while another thread, again and again,

loads, variants     loads base and evicts it, in int8 and in float32 in turn
loads, no variants  the same with ``variants=False``
builds              has an int8 variant of base built, as after a first load, and
                    removes it

All take turns, several rounds; medians. "Cores" is how many cores the work beside uses
when it is alone: CPU seconds per second. Beside a transcription on n threads, n + cores
want to run, and "fair" is that over the cores that there are, or 1 if all find one: by
so much either may be slower. A build runs with the lowest priority, so that a fair
share is next to nothing. All this holds where nobody else wants the cores; how many
others used is told, too.

The second part is about files that are not in the page cache. A switch between tiny.en
and base, under a limit that holds one, asks the kernel for the new file while the old
model leaves; the control does not.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import threading
import time
from collections import defaultdict
from contextlib import ExitStack, nullcontext
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
from page import make_cold
from report import Table, machine, write
from switch import (
    MODELS,
    PLAIN,
    TYPES,
    WHISPERCACHE,
    Turn,
    files_of,
    limit_bytes,
    origin,
    prepared,
    switcher,
)

from whispercache import ModelCache
from whispercache.engine.loader import FasterWhisperLoader
from whispercache.engine.process import versions
from whispercache.engine.variants.build import Builder
from whispercache.engine.variants.store import Variants
from whispercache.options import DEFAULT_VARIANTS_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from faster_whisper import WhisperModel
    from numpy.typing import NDArray
    from typing_extensions import Self

THREADS = (1, 2)
CLIP_S, RATE = 60, 16_000
ALONE_S = 2.0
"""
Seconds for which the work beside is measured alone, in each round.
"""

BUILDER = "whispercache-variants"
"""
Name of the thread that waits for the process that builds.
"""

LOWEST_WEIGHT = 15 / 1024
"""
Share of a core that a thread of the lowest priority has beside one of the usual.

Source: Linux kernel/sched/core.c, sched_prio_to_weight.
"""

ALONE, LOADS, PLAIN_LOADS, BUILDS = CASES = (
    "alone",
    "loads, variants",
    "loads, no variants",
    "builds",
)


# Work --------------------------------------------------------------------------------


def minute() -> NDArray[np.float32]:
    """
    A minute of English from the examples' clips: float32 (samples,), mono, 16 kHz.
    """
    import numpy as np
    from faster_whisper.audio import decode_audio

    clips = Path(__file__).parent.parent / "examples" / "clips"
    parts = [decode_audio(str(each)) for each in sorted(clips.glob("en-*.flac"))]
    return np.concatenate(parts)[: CLIP_S * RATE]


def transcribe(whisper: WhisperModel, audio: NDArray[np.float32]) -> float:
    """
    Seconds of a greedy transcription.
    """
    started_s = time.perf_counter()
    segments, _ = whisper.transcribe(
        audio, beam_size=1, temperature=0, condition_on_previous_text=False
    )
    for _ in segments:
        pass
    return time.perf_counter() - started_s


def loads(cache: ModelCache, model: Path) -> Iterator[tuple[str, float]]:
    """
    Load and evict a model for ever: what, and the seconds of the load.
    """
    for kind in cycle(TYPES):
        started_s = time.perf_counter()
        cache.lease(model, "cpu", kind).release()
        yield kind, time.perf_counter() - started_s
        cache.evict(model)


def builds(model: Path, directory: Path) -> Iterator[tuple[str, float]]:
    """
    Have a variant built and remove it, for ever: what, and the seconds of the build.
    """
    engine = f"CTranslate2 {versions()['CTranslate2']}"
    variants = Variants(engine, DEFAULT_VARIANTS_BYTES, directory)
    builder = Builder(variants)
    source, kind = origin(model), "int8"
    while True:
        started_s = time.perf_counter()
        builder.build_soon(source, kind)
        for thread in threading.enumerate():
            if thread.name == BUILDER:
                thread.join()
        yield kind, time.perf_counter() - started_s
        assert variants.find(source, kind)
        for variant in variants.list():
            variants.remove(variant)


class Beside:
    """
    Work that goes on within a block, on a thread of its own.

    Attributes:
        seconds: What each step took, by what it was.
        cores: How many cores this process and its children used in the block.
    """

    def __init__(self, steps: Iterator[tuple[str, float]]) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.cores: float = 0.0
        self._steps = steps
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._go_on)

    def _go_on(self) -> None:
        for what, seconds in self._steps:
            self.seconds[what].append(seconds)
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
    """
    CPU seconds of all other processes.
    """
    times = psutil.cpu_times()
    busy_s = times.user + times.nice + times.system + times.irq + times.softirq
    return busy_s - cpu_seconds()


def cpu_seconds() -> float:
    """
    CPU seconds of this process and of those of its children that have ended.
    """
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usages = map(resource.getrusage, who)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# Side by side ------------------------------------------------------------------------


class Results:
    """
    Seconds of transcriptions, and of the work beside.

    Attributes:
        others: How many cores other processes used during each transcription alone.
    """

    def __init__(self) -> None:
        self.others: list[float] = []
        self._transcriptions: defaultdict[tuple[str, int], list[float]]
        self._transcriptions = defaultdict(list)
        self._steps: defaultdict[tuple[str, str, int], list[float]] = defaultdict(list)
        self._cores: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, case: str, threads: int, seconds: float) -> None:
        """
        Add a transcription.
        """
        self._transcriptions[case, threads].append(seconds)

    def add_steps(self, case: str, threads: int, work: Beside) -> None:
        """
        Add work beside a transcription on so many threads; alone if 0.
        """
        for what, seconds in work.seconds.items():
            self._steps[case, what, threads] += seconds
        if not threads:
            self._cores[case].append(work.cores)

    def transcription_s(self, case: str, threads: int) -> float:
        """
        Median seconds of a transcription.
        """
        return statistics.median(self._transcriptions[case, threads])

    def step_s(self, case: str, what: str, threads: int) -> float:
        """
        Median seconds of a load or a build.
        """
        return statistics.median(self._steps[case, what, threads])

    def kinds(self, case: str) -> list[str]:
        """
        The types that were loaded or built.
        """
        found = (what for one, what, _ in self._steps if one == case)
        return list(dict.fromkeys(found))

    def cores(self, case: str) -> float:
        """
        How many cores the work uses alone.
        """
        return statistics.median(self._cores[case])

    def fair(self, case: str, threads: int) -> float:
        """
        The factor by which a transcription may be slower beside that work.
        """
        weight = LOWEST_WEIGHT if case == BUILDS else 1.0
        wanted = threads + weight * self.cores(case)
        return max(1.0, wanted / (os.cpu_count() or 1))


def side_by_side(home: Path, rounds: int) -> Results:
    """
    All cases in turns.
    """
    results = Results()
    audio = minute()
    base = home / "base"
    with ExitStack() as stack:
        cache = stack.enter_context(ModelCache())
        plain = stack.enter_context(ModelCache(variants=False))
        models = {
            threads: stack.enter_context(
                cache.lease(home / "tiny.en", "cpu", "float32", cpu_threads=threads)
            )
            for threads in THREADS
        }
        works: dict[str, Callable[[], Iterator[tuple[str, float]]]] = {
            LOADS: lambda: loads(cache, base),
            PLAIN_LOADS: lambda: loads(plain, base),
            BUILDS: lambda: builds(base, home / "built"),
        }
        for whisper in models.values():  # the first makes threads and buffers
            transcribe(whisper, audio)
        for _ in range(rounds):
            for case, work in works.items():
                with Beside(work()) as beside:
                    time.sleep(ALONE_S)
                results.add_steps(case, 0, beside)
            for threads, whisper in models.items():
                others_s = -others_seconds()
                seconds = transcribe(whisper, audio)
                results.add(ALONE, threads, seconds)
                results.others.append((others_s + others_seconds()) / seconds)
                for case, work in works.items():
                    with Beside(work()) as beside:
                        results.add(case, threads, transcribe(whisper, audio))
                    results.add_steps(case, threads, beside)
    return results


def transcription_table(results: Results) -> Table:
    """
    How much slower a transcription is.
    """
    heads = [
        head
        for threads in THREADS
        for head in (f"{threads} thread{'s' * (threads > 1)}, s", "× alone", "fair")
    ]
    table = Table("A minute of speech, transcribed beside", ["", *heads])
    for case in CASES:
        cells = []
        for threads in THREADS:
            seconds = results.transcription_s(case, threads)
            ratio = seconds / results.transcription_s(ALONE, threads)
            fair = 1.0 if case == ALONE else results.fair(case, threads)
            cells += [f"{seconds:.2f}", f"{ratio:.2f}", f"{fair:.2f}"]
        table.add(case, *cells)
    return table


def step_table(results: Results) -> Table:
    """
    How much slower a load is, or a build.
    """
    heads = [
        head
        for threads in THREADS
        for head in (f"beside {threads}, s", "× alone", "fair")
    ]
    table = Table(
        "Base, loaded or built beside 1 or 2 threads", ["", "cores", "alone, s", *heads]
    )
    for case in CASES[1:]:
        for kind in results.kinds(case):
            alone_s = results.step_s(case, kind, 0)
            cells = []
            for threads in THREADS:
                seconds = results.step_s(case, kind, threads)
                fair = f"{results.fair(case, threads):.2f}" if case != BUILDS else ""
                cells += [f"{seconds:.3f}", f"{seconds / alone_s:.2f}", fair]
            cores = f"{results.cores(case):.2f}"
            table.add(f"{case}, {kind}", cores, f"{alone_s:.3f}", *cells)
    return table


# Reading while a victim leaves -------------------------------------------------------


READ_AHEAD = FasterWhisperLoader, "read_ahead"


def cold_switches(turn: Turn) -> dict[tuple[str, bool], float]:
    """
    Median seconds of a switch to a model whose files are cold, by its name and by
    whether they are asked for while the other model leaves.
    """
    use = switcher(turn)
    models = [Path(turn.home, name) for name in MODELS]
    read_by = [files_of(turn.contender, each, turn.compute_type) for each in models]
    taken: defaultdict[tuple[str, bool], list[float]] = defaultdict(list)
    for number in range(turn.switches):
        place = number % len(models)
        asks = bool(number // 2 % 2)
        make_cold(read_by[place])
        with nullcontext() if asks else mock.patch.object(*READ_AHEAD):
            started_s = time.perf_counter()
            use(str(models[place]))
            seconds = time.perf_counter() - started_s
        if number >= len(models):
            taken[MODELS[place], asks].append(seconds)
    return {place: statistics.median(seconds) for place, seconds in taken.items()}


def cold_table(home: Path, switches: int) -> Table:
    """
    What it brings to ask for the files while a victim leaves.
    """
    heads = [
        head
        for name in MODELS
        for head in (f"to {name}, s", "not asked, s", "asked ÷ not")
    ]
    table = Table("A switch with cold files, asked for meanwhile or not", ["", *heads])
    for kind in TYPES:
        limit = limit_bytes(home, kind)
        for contender in (WHISPERCACHE, PLAIN):
            turn = Turn(contender, kind, str(home), limit, switches)
            found = cold_switches(turn)
            cells = []
            for name in MODELS:
                asked_s, plain_s = found[name, True], found[name, False]
                ratio = asked_s / plain_s
                cells += [f"{asked_s:.3f}", f"{plain_s:.3f}", f"{ratio:.2f}"]
            table.add(f"{kind}, {contender}", *cells)
    return table


def main() -> None:
    """
    Measure, print, and write if asked to.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--switches", type=int, default=26, help="with cold files")
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    options = parser.parse_args()
    versions()  # imports CTranslate2 the cache's way
    with prepared() as home:
        results = side_by_side(home, options.rounds)
        cold = cold_table(home, options.switches)
    others = f"Other processes used {statistics.median(results.others):.2f} cores."
    tables = [transcription_table(results), step_table(results), cold]
    write("overlap", [machine(), others, *tables], to_file=options.write)


if __name__ == "__main__":
    main()
