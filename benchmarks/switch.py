"""
What it costs to switch between two models under a limit that holds one: A, B, A, B, …

    python benchmarks/switch.py [--switches 18] [--rounds 3] [--write]

On the CPU, tiny.en and base, in float32 and int8. Each contender runs in a process of
its own, and tells how long each switch took, from the request until the model can be
used, and how much memory it held at the worst moment:

construct     ``WhisperModel(...)`` each time, the old one dropped first
lru_cache     ``@lru_cache(maxsize=1)`` around it, the usual recipe: the old model goes
              only once the new one is there
no variants   ``ModelCache(ram=LIMIT, variants=False)``, with a limit that holds either
              model, not both
whispercache  ``ModelCache(ram=LIMIT)``; its variants were built before

The contenders take turns, several rounds each; medians. Right before a switch the files
that it will read are read to the end ("warm"), or put out of the page cache by fsync
and POSIX_FADV_DONTNEED ("cold"; under a virtual machine that is as cold as the host's
cache). Both take turns, too, two switches each.

Memory is the kernel's own peak of the resident set, VmHWM, which /proc/self/clear_refs
resets, above the resident set before the first load, with all libraries imported. So
nothing is missed between two looks. Linux only.

The models are copies in a temporary directory, and so is the user's cache directory.
``benchmarks/floor.py`` tells where the time goes that is left.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from chart import Panel, draw
from page import make_cold, read
from report import Table, machine, write

from examples.weights import packaged_model
from whispercache import ModelCache, Workload
from whispercache.devices.host import return_free_memory
from whispercache.engine.process import versions
from whispercache.engine.sizes.header import read_header
from whispercache.engine.variants.convert import Origin
from whispercache.engine.variants.store import Variants
from whispercache.errors import format_bytes
from whispercache.options import DEFAULT_VARIANTS_BYTES, VARIANTS_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MODELS = ("tiny.en", "base")
TYPES = ("float32", "int8")
STATES = ("warm", "cold")
CONSTRUCT, LRU_CACHE, PLAIN, WHISPERCACHE = CONTENDERS = (
    "construct",
    "lru_cache",
    "no variants",
    "whispercache",
)
WORK = Workload(beam_size=1, fallback=False)

MOST_INT8, MOST_FLOAT32, MOST_PEAK = 0.25, 0.7, 1.15
"""
What was promised: a switch to base as a share of constructing it, and the peak of a
load to int8 as a multiple of what it leaves.
"""


class Turn(NamedTuple):
    """
    What one process measures.

    Attributes:
        contender: One of `CONTENDERS`.
        compute_type: One of `TYPES`.
        home: Directory with the models.
        limit_bytes: What the cache may take.
        switches: How many; the first to each model does not count.
        alone: Load only this model, once, for the memory that it takes.
    """

    contender: str
    compute_type: str
    home: str
    limit_bytes: int
    switches: int = 0
    alone: str = ""


class Taken(NamedTuple):
    """
    What it found.

    Attributes:
        seconds: Of each switch.
        peak_bytes: Growth of the resident set, at the worst moment.
        left_bytes: Its growth at the end.
    """

    seconds: list[float]
    peak_bytes: int
    left_bytes: int


# Models and variants -----------------------------------------------------------------


@contextmanager
def prepared() -> Iterator[Path]:
    """
    A directory with copies of the models. The user's cache directory, of this process
    and its children, is a new one in it, with a variant of each model and type.
    """
    sources = {name: packaged_model(name) for name in MODELS}
    with tempfile.TemporaryDirectory(prefix="whispercache-switch-") as temporary:
        home = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(home / "cache")
        os.environ.pop(VARIANTS_VARIABLE, None)
        for name, source in sources.items():
            shutil.copytree(source, home / name)
            for kind in TYPES:
                user_variants().build(origin(home / name), kind)
        yield home


def user_variants() -> Variants:
    """
    The variants that a cache uses.
    """
    engine = f"CTranslate2 {versions()['CTranslate2']}"
    return Variants(engine, DEFAULT_VARIANTS_BYTES)


def origin(model: Path) -> Origin:
    """
    What a variant of *model* is made of.
    """
    return Origin(model.name, read_header(str(model)))


def files_of(contender: str, model: Path, compute_type: str) -> list[Path]:
    """
    The files that a contender reads to load *model*.

    Raises:
        LookupError: its variant is not there.
    """
    directory: Path | None = model
    if contender == WHISPERCACHE:
        directory = user_variants().find(origin(model), compute_type)
    if directory is None:
        message = f"no {compute_type} variant of {model}"
        raise LookupError(message)
    return [file for file in directory.iterdir() if file.is_file()]


def limit_bytes(home: Path, compute_type: str) -> int:
    """
    A limit that holds either model and the work of one greedy call, with 5 % to spare.
    """
    with ModelCache(variants=False) as cache:
        asked = [
            cache.explain(home / name, "cpu", compute_type, workload=WORK)
            for name in MODELS
        ]
    return int(1.05 * max(each.needed_bytes for each in asked))


# One process -------------------------------------------------------------------------


def switcher(turn: Turn) -> Callable[[str], object]:
    """
    A function that makes a model usable.
    """
    versions()  # imports CTranslate2 the cache's way, before memory is looked at
    compute_type = turn.compute_type
    if turn.contender in (PLAIN, WHISPERCACHE):
        cache = ModelCache(
            ram=turn.limit_bytes, max_models=1, variants=turn.contender == WHISPERCACHE
        )

        def lease(path: str) -> None:
            cache.lease(path, "cpu", compute_type, workload=WORK).release()

        return lease

    from faster_whisper import WhisperModel

    def load(path: str) -> WhisperModel:
        return WhisperModel(path, device="cpu", compute_type=compute_type)

    if turn.contender == LRU_CACHE:
        return functools.lru_cache(maxsize=1)(load)
    held: list[WhisperModel] = []

    def construct(path: str) -> None:
        held.clear()
        held.append(load(path))

    return construct


def resident_bytes(line: str) -> int:
    """
    The resident set of this process: now (``"VmRSS"``), or at most (``"VmHWM"``).
    """
    found = re.search(rf"^{line}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


_STATUS = Path("/proc/self/status")


def child(turn: Turn) -> Taken:
    """
    Take a turn.
    """
    models = [Path(turn.home, name) for name in MODELS if turn.alone in ("", name)]
    files = [files_of(turn.contender, each, turn.compute_type) for each in models]
    use = switcher(turn)
    seconds = []
    Path("/proc/self/clear_refs").write_text("5")
    before_bytes = resident_bytes("VmRSS")
    for number in range(turn.switches or 1):
        place = number % len(models)
        if STATES[number // 2 % 2] == "cold":
            make_cold(files[place])
        else:
            for file in files[place]:
                read(file)
        started_s = time.perf_counter()
        use(str(models[place]))
        seconds.append(time.perf_counter() - started_s)
    peak_bytes = resident_bytes("VmHWM")
    return_free_memory()
    after_bytes = resident_bytes("VmRSS")
    return Taken(seconds, peak_bytes - before_bytes, after_bytes - before_bytes)


def take(turn: Turn) -> Taken:
    """
    Have a fresh process take a turn.
    """
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(turn)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Taken(*json.loads(done.stdout))


# All of them -------------------------------------------------------------------------


class Results:
    """
    What the turns found, by contender and compute type.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str, str, str], list[float]] = {}
        self._peaks: dict[tuple[str, str], int] = {}

    def add(self, turn: Turn, taken: Taken) -> None:
        """
        Add those of a turn, but for the first switch to each model.
        """
        whose = (turn.contender, turn.compute_type)
        for number, second in enumerate(taken.seconds[2:], 2):
            place = (*whose, STATES[number // 2 % 2], MODELS[number % 2])
            self._seconds.setdefault(place, []).append(second)
        self._peaks[whose] = max(taken.peak_bytes, self._peaks.get(whose, 0))

    def seconds(self, contender: str, kind: str, state: str) -> list[float]:
        """
        Median seconds of a switch to each of the models.
        """
        return [
            statistics.median(self._seconds[contender, kind, state, name])
            for name in MODELS
        ]

    def ratios(self, contender: str, kind: str, state: str) -> list[float]:
        """
        The same as shares of constructing, and the mean switch as a share of it.
        """
        own = self.seconds(contender, kind, state)
        plain = self.seconds(CONSTRUCT, kind, state)
        each = [one / other for one, other in zip(own, plain, strict=True)]
        return [*each, sum(own) / sum(plain)]

    def peak_bytes(self, contender: str, kind: str) -> int:
        """
        The highest peak.
        """
        return self._peaks[contender, kind]


def switch_table(results: Results, kind: str, state: str) -> Table:
    """
    Seconds of each contender, beside constructing.
    """
    heads = [head for name in MODELS for head in (f"to {name}, s", "× construct")]
    table = Table(f"{kind}, {state} files", ["", *heads, "mean, × construct"])
    for contender in CONTENDERS:
        seconds = results.seconds(contender, kind, state)
        *each, mean = results.ratios(contender, kind, state)
        cells = [
            cell
            for second, ratio in zip(seconds, each, strict=True)
            for cell in (f"{second:.3f}", f"{ratio:.2f}")
        ]
        table.add(contender, *cells, f"{mean:.2f}")
    return table


def peak_table(results: Results, limits: dict[str, int]) -> Table:
    """
    The most memory that each contender held.
    """
    table = Table("Peak of memory while switching", ["", *TYPES])
    for contender in CONTENDERS:
        peaks = (results.peak_bytes(contender, kind) for kind in TYPES)
        table.add(contender, *map(format_bytes, peaks))
    table.add("the limit", *(format_bytes(limits[kind]) for kind in TYPES))
    return table


def load_table(loads: dict[tuple[str, str, str], Taken]) -> Table:
    """
    What one load holds at most, and leaves, in a fresh process.
    """
    heads = ["", "left", "peak", "peak ÷ left"]
    table = Table("Memory of one load, in a fresh process", heads)
    for (kind, name, contender), taken in loads.items():
        ratio = taken.peak_bytes / taken.left_bytes
        sizes = map(format_bytes, (taken.left_bytes, taken.peak_bytes))
        table.add(f"{name} {kind}, {contender}", *sizes, f"{ratio:.2f}")
    return table


def promises(results: Results, loads: dict[tuple[str, str, str], Taken]) -> Table:
    """
    What was promised, and what came of it, with warm files.
    """
    table = Table("Promised and found, warm files", ["", "at most", "found"])
    for kind, most in (("int8", MOST_INT8), ("float32", MOST_FLOAT32)):
        _, base, mean = results.ratios(WHISPERCACHE, kind, "warm")
        table.add(f"switch to base, {kind}, × construct", f"{most}", f"{base:.2f}")
        table.add(f"mean switch, {kind}, × construct", f"{most}", f"{mean:.2f}")
    for name in MODELS:
        taken = loads["int8", name, WHISPERCACHE]
        ratio = taken.peak_bytes / taken.left_bytes
        table.add(
            f"peak of a load, {name} int8, × left", f"{MOST_PEAK}", f"{ratio:.2f}"
        )
    return table


def chart(results: Results) -> Path:
    """
    Seconds of all switches as bars.
    """
    names = ("construct each time", "lru_cache(maxsize=1)", "whispercache, no variants")
    labels = dict(zip(CONTENDERS, (*names, "whispercache"), strict=True))
    groups = [f"to {name}" for name in MODELS]
    rows = [
        [
            Panel(
                f"{kind}, page cache {state}",
                groups,
                {
                    label: results.seconds(contender, kind, state)
                    for contender, label in labels.items()
                },
            )
            for kind in TYPES
        ]
        for state in STATES
    ]
    return draw(
        "switch", "Seconds per switch between two models, memory for one (CPU)", rows
    )


def measure(
    home: Path, limits: dict[str, int], rounds: int, switches: int
) -> tuple[Results, dict[tuple[str, str, str], Taken]]:
    """
    All turns; and single loads by type, model and contender.
    """
    results = Results()
    for _ in range(rounds):
        for kind in TYPES:
            for contender in CONTENDERS:
                turn = Turn(contender, kind, str(home), limits[kind], switches)
                results.add(turn, take(turn))
    loads = {
        (kind, name, contender): take(
            Turn(contender, kind, str(home), limits[kind], alone=name)
        )
        for kind in TYPES
        for name in MODELS
        for contender in (CONSTRUCT, PLAIN, WHISPERCACHE)
    }
    return results, loads


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Measure, print, and write if asked to.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--switches", type=int, default=18, help="in one process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(child(Turn(*json.loads(options.child)))))
        return
    with prepared() as home:
        limits = {kind: limit_bytes(home, kind) for kind in TYPES}
        results, loads = measure(home, limits, options.rounds, options.switches)
    tables = [switch_table(results, kind, each) for each in STATES for kind in TYPES]
    more = [peak_table(results, limits), load_table(loads), promises(results, loads)]
    write("switch", [machine(), *tables, *more], to_file=options.write)
    if options.write:
        print(f"drawn to {chart(results)}")


if __name__ == "__main__":
    main()
