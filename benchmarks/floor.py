"""
Where the time of a switch goes, against the floor: reading the bytes and copying them
once.

    python benchmarks/floor.py [--switches 40] [--write]

Switches between tiny.en and base on the CPU from variants, warm, as in
``benchmarks/switch.py``; what is told is those to base, medians. While they run, the
functions that they go through are timed, each without those that it calls; "all else"
is what none of them accounts for. What runs beside the switch, on another thread, is
not in the sum.

The floor is ``readinto`` of model.bin into memory that was used before, and one copy
from there to other such memory. "Into fresh memory" is the same into memory that the
kernel has to find and clear first, which a load that cannot reuse any has to do.

What CTranslate2 takes to read the vocabulary cannot be timed from outside. So a micro
model is loaded with the vocabulary of base, as it is and as plain text, and once more
with a vocabulary of its own that is small; the difference is shown.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from page import read
from report import Table, machine, write
from switch import (
    MODELS,
    TYPES,
    WHISPERCACHE,
    Turn,
    files_of,
    limit_bytes,
    prepared,
    switcher,
)

from whispercache.core.core import Core
from whispercache.devices import host
from whispercache.devices.probe import SystemProbe
from whispercache.engine import construct, files, loader
from whispercache.engine.loader import FasterWhisperLoader
from whispercache.engine.process import versions

if TYPE_CHECKING:
    from collections.abc import Callable

BASE = "base"
LOAD, UNLOAD = "CTranslate2: load_model", "CTranslate2: unload_model"
REST = "all else: hand-over between threads, locks, events"
FAULTS = "page faults"
BESIDE = "beside it: asks for the file to be read ahead"


class Timed(NamedTuple):
    """
    A function that is timed.

    Attributes:
        label: What its time counts as.
        owner: The class or module in which it is looked up.
        name: Its name there.
    """

    label: str
    owner: object
    name: str


def timed() -> list[Timed]:
    """
    The functions that a switch goes through.
    """
    from ctranslate2.models import Whisper

    mine = FasterWhisperLoader
    return [
        Timed(LOAD, Whisper, "load_model"),
        Timed(UNLOAD, Whisper, "unload_model"),
        Timed("builds a WhisperModel", construct, "build"),
        Timed("load: the rest", mine, "load"),
        Timed("unload: the rest", mine, "unload"),
        Timed("returns memory: malloc_trim", host, "return_free_memory"),
        Timed("reads its own memory: /proc/self/status", host, "anonymous_bytes"),
        Timed("reads the machine's memory", SystemProbe, "read"),
        Timed("looks for the model", mine, "locate"),
        Timed("looks for the variant", mine, "choose"),
        Timed("looks whether files changed", files, "stamp_of"),
        Timed("looks whether files changed", loader, "stamp_of"),
        Timed("predicts bytes", mine, "footprint"),
        Timed("notes measured bytes", mine, "remember"),
        Timed("counts and drops shells", mine, "shell_bytes"),
        Timed("counts and drops shells", mine, "shrink_shells"),
        Timed("has a variant built, if there is none", mine, "follow_up"),
        Timed("plans", Core, "plan_locked"),
        Timed(BESIDE, mine, "read_ahead"),
    ]


class Stopwatch:
    """
    Times functions, each without those that it calls.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = threading.local()

    def lap(self) -> dict[str, float]:
        """
        Seconds by label since the last call.
        """
        seconds, self._seconds = self._seconds, defaultdict(float)
        return seconds

    def time(self, each: Timed) -> None:
        """
        Time a function from now on.
        """
        plain: Callable[..., object] = getattr(each.owner, each.name)

        @functools.wraps(plain)
        def measured(*arguments: object, **named: object) -> object:
            outer_s = getattr(self._inner, "seconds", 0.0)
            self._inner.seconds = 0.0
            started_s = time.perf_counter()
            try:
                return plain(*arguments, **named)
            finally:
                taken_s = time.perf_counter() - started_s
                self._seconds[each.label] += taken_s - self._inner.seconds
                self._inner.seconds = outer_s + taken_s

        setattr(each.owner, each.name, measured)


def child(turn: Turn) -> dict[str, list[float]]:
    """
    Seconds of each piece, in each switch to base, those of the whole, and page faults.
    """
    paths = [Path(turn.home, name) for name in MODELS]
    read_by = [files_of(turn.contender, path, turn.compute_type) for path in paths]
    use = switcher(turn)
    watch = Stopwatch()
    for each in timed():
        watch.time(each)
    laps = []
    for number in range(turn.switches):
        place = number % len(paths)
        for file in read_by[place]:
            read(file)
        faults = -page_faults()
        watch.lap()
        started_s = time.perf_counter()
        use(str(paths[place]))
        whole_s = time.perf_counter() - started_s
        faults += page_faults()
        lap = watch.lap()
        beside_s = lap.pop(BESIDE, 0.0)
        rest_s = whole_s - sum(lap.values())
        # The first switch to each builds the whole model.
        if MODELS[place] == BASE and number >= len(paths):
            told = {REST: rest_s, BESIDE: beside_s, "": whole_s, FAULTS: faults}
            laps.append(lap | told)
    labels = dict.fromkeys(label for lap in laps for label in lap)
    return {label: [lap.get(label, 0.0) for lap in laps] for label in labels}


def page_faults() -> int:
    """
    Pages that the kernel had to find for this process so far, without the disk.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def median_s(work: Callable[[], object], rounds: int = 15) -> float:
    """
    Median seconds of *work*; the first call does not count.
    """
    taken = []
    for _ in range(rounds + 1):
        started_s = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started_s)
    return statistics.median(taken[1:])


def floor(model_bin: Path) -> dict[str, float]:
    """
    Seconds to read and to copy as many bytes as a model has.
    """
    n_bytes = model_bin.stat().st_size
    first, second = bytearray(n_bytes), bytearray(n_bytes)

    def fill(target: bytearray) -> None:
        with model_bin.open("rb", buffering=0) as file:
            file.readinto(target)

    def copy() -> None:
        memoryview(second)[:] = first

    read_s = median_s(lambda: fill(first))
    copy_s = median_s(copy)
    fresh_s = median_s(lambda: fill(bytearray(n_bytes)))
    return {
        "floor: reads model.bin": read_s,
        "floor: copies it": copy_s,
        "floor": read_s + copy_s,
        "(reads it into fresh memory)": fresh_s,
    }


def vocabulary(home: Path) -> dict[str, float]:
    """
    Seconds that reading the vocabulary of base adds to a load.
    """
    import micro  # imports CTranslate2 its own way, so not before the cache did
    from ctranslate2.models import Whisper

    text = (home / BASE / "vocabulary.json").read_text(encoding="utf-8")
    tokens: list[str] = json.loads(text)
    with tempfile.TemporaryDirectory() as temporary:
        small, as_json, as_text = (Path(temporary, name) for name in ("s", "j", "t"))
        micro.build_micro(small, "hello", d_model=16, quantization="float32")
        with mock.patch.object(micro, "_vocabulary", return_value=(tokens, [])):
            for directory in (as_json, as_text):
                micro.build_micro(
                    directory, "hello", d_model=16, quantization="float32"
                )
        (as_json / "vocabulary.json").write_text(text, encoding="utf-8")
        (as_text / "vocabulary.json").unlink()
        lines = "".join(f"{token}\n" for token in tokens)
        (as_text / "vocabulary.txt").write_text(lines, encoding="utf-8")
        taken = {}
        for directory in (small, as_json, as_text):
            model = Whisper(str(directory), "cpu", compute_type="float32")

            def again(model: Whisper = model) -> None:
                model.unload_model()
                model.load_model()

            taken[directory] = median_s(again, 25)
    return {
        "of load_model: the vocabulary, about": taken[as_text] - taken[small],
        "(the same as JSON, as it was)": taken[as_json] - taken[small],
    }


def profile(home: Path, kind: str, switches: int) -> Table:
    """
    The pieces of a switch to base in one compute type.
    """
    turn = Turn(WHISPERCACHE, kind, str(home), limit_bytes(home, kind), switches)
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(turn)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, list[float]] = json.loads(done.stdout)
    pieces = {label: statistics.median(each) for label, each in found.items()}
    whole_s, beside_s = pieces.pop(""), pieces.pop(BESIDE)
    faults = pieces.pop(FAULTS)
    model_bin = next(
        file
        for file in files_of(WHISPERCACHE, home / BASE, kind)
        if file.suffix == ".bin"
    )
    own_s = statistics.median(
        whole - load - unload
        for whole, load, unload in zip(
            found[""], found[LOAD], found[UNLOAD], strict=True
        )
    )
    title = f"A switch to base, {kind}, from its variant; {faults:.0f} page faults"
    table = Table(title, ["", "ms", "share"])

    def add(label: str, seconds: float) -> None:
        table.add(label, f"{seconds * 1e3:.2f}", f"{seconds / whole_s:.0%}")

    add("the whole", whole_s)
    for label, seconds in sorted(pieces.items(), key=lambda each: -each[1]):
        add(label, seconds)
    add("all but CTranslate2", own_s)
    add(BESIDE, beside_s)
    for label, seconds in (floor(model_bin) | vocabulary(home)).items():
        add(label, seconds)
    return table


def main() -> None:
    """
    Measure, print, and write if asked to.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--switches", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(Turn(*json.loads(options.child)))))
        return
    versions()
    with prepared() as home:
        tables = [profile(home, kind, options.switches) for kind in TYPES]
    write("floor", [machine(), *tables], to_file=options.write)


if __name__ == "__main__":
    main()
