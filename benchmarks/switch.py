"""
What it costs to switch between two models under a limit that holds one: A, B, A, B, …

    python benchmarks/switch.py [--switches 18] [--rounds 3] [--before DIR] [--write]

On the CPU, tiny.en and base, in float32 and int8. Each contender runs in a process of
its own, and tells how long each switch took, from the request until the model can be
used, and how much memory it held at the worst moment:

construct     ``WhisperModel(...)`` each time, the old one dropped first
lru_cache     ``@lru_cache(maxsize=1)`` around it, the usual recipe: the old model goes
              only once the new one is there
no variants   ``ModelCache(ram=LIMIT, variants=False)``, with a limit that holds either
              model, not both
whispercache  ``ModelCache(ram=LIMIT)``; its variants were built before
huge pages    the same after ``use_huge_pages()``, as the commands do it
before        with ``--before``: the same as "whispercache", in the build whose checkout
              is DIR; that needs a benchmarks/switch.py of the same kind

The contenders take turns, several rounds each; medians. Right before a switch the files
that it will read are read to the end ("warm"), or put out of the page cache by fsync
and POSIX_FADV_DONTNEED ("cold"; under a virtual machine that is as cold as the host's
cache). Both take turns, too, two switches each.

Memory is the kernel's own peak of the resident set, VmHWM, which /proc/self/clear_refs
resets, above the resident set before the first load, with all libraries imported. So
nothing is missed between two looks. Linux only.

The models are copies in a temporary directory, and so is the user's cache directory.

The last tables say where the time of a switch to base goes, from its variant, warm:
what CTranslate2's own load and unload take, what is left for whispercache and the
kernel, and the floor, which is ``readinto`` of model.bin into memory that was used
before, and one copy from there. "Into fresh memory" is the same into memory that the
kernel has to find and clear first, which a load that cannot reuse any has to do.
"""

from __future__ import annotations

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
import timeit
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from chart import Panel, draw
from page_cache import make_cold, read
from report import Table, machine, parsed, write

from examples.weights import packaged_model
from whispercache import ModelCache, Workload, use_huge_pages
from whispercache.devices.heap import huge_pages_problem
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
CONSTRUCT, LRU_CACHE, PLAIN, WHISPERCACHE, HUGE = CONTENDERS = (
    "construct",
    "lru_cache",
    "no variants",
    "whispercache",
    "huge pages",
)
BEFORE = "before"
WORK = Workload(beam_size=1, fallback=False)


class Turn(NamedTuple):
    contender: str
    compute_type: str
    home: str  # directory with the models
    limit_bytes: int
    switches: int = 0  # the first to each model does not count
    alone: str = ""  # load only this model, once, for the memory that it takes


class Taken(NamedTuple):
    seconds: list[float]  # of each switch
    peak_bytes: int  # growth of the resident set at the worst moment
    left_bytes: int  # its growth at the end
    engine_s: list[tuple[float, float]]  # of each switch: CTranslate2's load and unload


# Models and variants -----------------------------------------------------------------


@contextmanager
def prepared() -> Iterator[Path]:
    """
    Makes a directory with copies of the models, and a variant of each in each type.

    The user's cache directory, of this process and its children, is in it as well.
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
    engine = f"CTranslate2 {versions()['CTranslate2']}"
    return Variants(engine, DEFAULT_VARIANTS_BYTES)


def origin(model: Path) -> Origin:
    return Origin(model.name, read_header(str(model)))


def files_of(contender: str, model: Path, compute_type: str) -> list[Path]:
    """
    Returns the files that a contender reads to load *model*.
    """
    directory: Path | None = model
    if contender not in (CONSTRUCT, LRU_CACHE, PLAIN):
        directory = user_variants().find(origin(model), compute_type)
    if directory is None:
        message = f"no {compute_type} variant of {model}"
        raise LookupError(message)
    return [file for file in directory.iterdir() if file.is_file()]


def limit_bytes(home: Path, compute_type: str) -> int:
    """
    Returns a limit that holds either model and one greedy call, with 5 % to spare.
    """
    with ModelCache(variants=False) as cache:
        asked = [
            cache.explain(home / name, "cpu", compute_type, workload=WORK)
            for name in MODELS
        ]
    return int(1.05 * max(each.needed_bytes for each in asked))


# One process -------------------------------------------------------------------------


def switcher(turn: Turn) -> Callable[[str], object]:
    if turn.contender == HUGE and not use_huge_pages():
        raise RuntimeError(huge_pages_problem())
    versions()  # imports CTranslate2 the cache's way, before memory is looked at
    compute_type = turn.compute_type
    if turn.contender in (PLAIN, WHISPERCACHE, HUGE):
        cache = ModelCache(
            ram=turn.limit_bytes, max_models=1, variants=turn.contender != PLAIN
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
    Reads the resident set of this process: now (``"VmRSS"``), or at most (``"VmHWM"``).
    """
    found = re.search(rf"^{line}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


_STATUS = Path("/proc/self/status")


def child(turn: Turn) -> Taken:
    models = [Path(turn.home, name) for name in MODELS if turn.alone in ("", name)]
    files = [files_of(turn.contender, each, turn.compute_type) for each in models]
    use = switcher(turn)
    engine = {name: timed(name) for name in ("load_model", "unload_model")}
    seconds, engine_s = [], []
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
        load_s, unload_s = (sum(each) for each in engine.values())
        engine_s.append((load_s, unload_s))
        for each in engine.values():
            each.clear()
    peak_bytes = resident_bytes("VmHWM")
    return_free_memory()
    after_bytes = resident_bytes("VmRSS")
    grown = peak_bytes - before_bytes, after_bytes - before_bytes
    return Taken(seconds, *grown, engine_s)


def timed(name: str) -> list[float]:
    """
    Returns a list to which each call of a method of CTranslate2's adds its seconds.
    """
    from ctranslate2.models import Whisper

    plain, seconds = getattr(Whisper, name), list[float]()

    @functools.wraps(plain)
    def measured(*arguments: object, **named: object) -> object:
        started_s = time.perf_counter()
        try:
            return plain(*arguments, **named)
        finally:
            seconds.append(time.perf_counter() - started_s)

    setattr(Whisper, name, measured)
    return seconds


def take(turn: Turn, before: str = "") -> Taken:
    script = Path(__file__)
    if turn.contender == BEFORE:
        # Its own, which finds its own whispercache.
        script = Path(before).resolve() / "benchmarks" / script.name
        turn = turn._replace(contender=WHISPERCACHE)
    done = subprocess.run(
        [sys.executable, script, "--child", json.dumps(turn)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Taken(*json.loads(done.stdout))


# All of them -------------------------------------------------------------------------


class Results:
    def __init__(self, contenders: Sequence[str]) -> None:
        self.contenders = contenders
        self._seconds: dict[tuple[str, str, str, str], list[float]] = {}
        self.peaks: dict[tuple[str, str], int] = {}
        # Of warm switches to base from variants: whole, load, unload; by type.
        self.pieces: dict[str, list[tuple[float, float, float]]] = {}

    def add(self, turn: Turn, taken: Taken) -> None:
        """
        Adds those of a turn, but for the first switch to each model.
        """
        whose = (turn.contender, turn.compute_type)
        for number, second in enumerate(taken.seconds[2:], 2):
            place = (*whose, STATES[number // 2 % 2], MODELS[number % 2])
            self._seconds.setdefault(place, []).append(second)
            if (turn.contender, *place[2:]) == (WHISPERCACHE, "warm", "base"):
                pieces = (second, *taken.engine_s[number])
                self.pieces.setdefault(turn.compute_type, []).append(pieces)
        self.peaks[whose] = max(taken.peak_bytes, self.peaks.get(whose, 0))

    def seconds(self, contender: str, kind: str, state: str) -> list[float]:
        return [
            statistics.median(self._seconds[contender, kind, state, name])
            for name in MODELS
        ]


def switch_table(results: Results, kind: str, state: str) -> Table:
    heads = [head for name in MODELS for head in (f"to {name}, s", "× construct")]
    table = Table(f"{kind}, {state} files", ["", *heads, "mean, × construct"])
    plain = results.seconds(CONSTRUCT, kind, state)
    if BEFORE in results.contenders:
        table.head.append("mean, × before")
    for contender in results.contenders:
        own = results.seconds(contender, kind, state)
        cells = []
        for second, other in zip(own, plain, strict=True):
            cells += [f"{second:.3f}", f"{second / other:.2f}"]
        cells.append(f"{sum(own) / sum(plain):.2f}")
        if BEFORE in results.contenders:
            before = results.seconds(BEFORE, kind, state)
            cells.append(f"{sum(own) / sum(before):.2f}")
        table.add(contender, *cells)
    return table


def peak_table(results: Results, limits: dict[str, int]) -> Table:
    table = Table("Peak of memory while switching", ["", *TYPES])
    for contender in results.contenders:
        peaks = (results.peaks[contender, kind] for kind in TYPES)
        table.add(contender, *map(format_bytes, peaks))
    table.add("the limit", *(format_bytes(limits[kind]) for kind in TYPES))
    return table


def floor(file: Path) -> dict[str, float]:
    """
    Returns the seconds to read and to copy the bytes of a file in the page cache.
    """
    n_bytes = file.stat().st_size
    first, second = bytearray(n_bytes), bytearray(n_bytes)

    def fill(target: bytearray) -> None:
        with file.open("rb", buffering=0) as opened:
            opened.readinto(target)

    def copy() -> None:
        memoryview(second)[:] = first

    def median_s(work: Callable[[], object]) -> float:
        times_s = timeit.repeat(work, number=1, repeat=16)
        return statistics.median(times_s[1:])

    read_s, copy_s = median_s(lambda: fill(first)), median_s(copy)
    return {
        "floor: reads model.bin": read_s,
        "floor: copies it": copy_s,
        "floor": read_s + copy_s,
        "(reads it into fresh memory)": median_s(lambda: fill(bytearray(n_bytes))),
    }


def floor_table(results: Results, home: Path, kind: str) -> Table:
    found = results.pieces[kind]
    whole_s, load_s, unload_s = map(statistics.median, zip(*found, strict=True))
    own_s = statistics.median(whole - load - unload for whole, load, unload in found)
    files = files_of(WHISPERCACHE, home / "base", kind)
    pieces = {
        "the whole": whole_s,
        "CTranslate2: load_model": load_s,
        "CTranslate2: unload_model": unload_s,
        "all but CTranslate2": own_s,
        **floor(next(file for file in files if file.suffix == ".bin")),
    }
    title = f"Where a switch to base goes, {kind}, from its variant, warm"
    table = Table(title, ["", "ms", "share"])
    for label, seconds in pieces.items():
        table.add(label, f"{seconds * 1e3:.2f}", f"{seconds / whole_s:.0%}")
    return table


def load_table(loads: dict[tuple[str, str, str], Taken]) -> Table:
    heads = ["", "left", "peak", "peak ÷ left"]
    table = Table("Memory of one load, in a fresh process", heads)
    for (kind, name, contender), taken in loads.items():
        ratio = taken.peak_bytes / taken.left_bytes
        sizes = map(format_bytes, (taken.left_bytes, taken.peak_bytes))
        table.add(f"{name} {kind}, {contender}", *sizes, f"{ratio:.2f}")
    return table


def chart(results: Results) -> list[Path]:
    names = ("construct each time", "lru_cache(maxsize=1)", "whispercache, no variants")
    labels = dict(
        zip(CONTENDERS, (*names, "whispercache", "with huge pages"), strict=True)
    )
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
    home: Path, limits: dict[str, int], rounds: int, switches: int, before: str
) -> tuple[Results, dict[tuple[str, str, str], Taken]]:
    results = Results((*CONTENDERS, BEFORE) if before else CONTENDERS)
    for _ in range(rounds):
        for kind in TYPES:
            for contender in results.contenders:
                turn = Turn(contender, kind, str(home), limits[kind], switches)
                results.add(turn, take(turn, before))
    loads = {
        (kind, name, contender): take(
            Turn(contender, kind, str(home), limits[kind], alone=name)
        )
        for kind in TYPES
        for name in MODELS
        for contender in (CONSTRUCT, PLAIN, WHISPERCACHE, HUGE)
    }
    return results, loads


def main() -> None:
    options = parsed(__doc__, switches=18, rounds=3, before="")
    if options.child:
        print(json.dumps(child(Turn(*json.loads(options.child)))))
        return
    with prepared() as home:
        limits = {kind: limit_bytes(home, kind) for kind in TYPES}
        results, loads = measure(
            home, limits, options.rounds, options.switches, options.before
        )
        floors = [floor_table(results, home, kind) for kind in TYPES]
    tables = [switch_table(results, kind, each) for each in STATES for kind in TYPES]
    tables += [peak_table(results, limits), load_table(loads), *floors]
    write("switch", [machine(), *tables], to_file=options.write)
    if options.write:
        print("drawn to", *chart(results))


if __name__ == "__main__":
    main()
