"""
What ``import whispercache`` costs, beside ``import faster_whisper``.

    python benchmarks/imports.py [--rounds 25] [--write]

Each program is a fresh interpreter, in turns with the others; an empty one is taken
off. The last rows show what the import leaves for later, when a first cache is made,
and what all of it adds to a program that imports faster-whisper in any case.

Byte code is kept, as it is wherever packages are installed, in a directory of its own:
without it most of the time goes to compiling. ``python -X importtime`` shows which
modules take the time.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from report import Table, machine, parsed, write

ROOT = Path(__file__).parent.parent

NAMES = "from whispercache import get_model, ModelCache"
YARDSTICK = "import faster_whisper"
BESIDE = "the same, on top of faster_whisper"
PROGRAMS = {
    YARDSTICK: YARDSTICK,
    "import whispercache": "import whispercache",
    NAMES: NAMES,
    "that, and ModelCache()": f"{NAMES}; ModelCache()",
    BESIDE: f"{YARDSTICK}; {NAMES}; ModelCache()",
}


def environment(directory: str) -> dict[str, str]:
    """
    Returns an environment that keeps byte code in *directory*, with this checkout.
    """
    kept = {**os.environ, "PYTHONPYCACHEPREFIX": directory, "PYTHONPATH": str(ROOT)}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    return kept


def seconds(program: str, env: dict[str, str]) -> float:
    started_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], env=env, check=True)
    return time.perf_counter() - started_s


def medians(rounds: int, env: dict[str, str]) -> dict[str, float]:
    """
    Returns median seconds of each program, without those of what it comes on top of.
    """
    programs = {"": "", **PROGRAMS}
    for program in programs.values():
        seconds(program, env)  # writes the byte code
    taken: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, program in programs.items():
            taken[name].append(seconds(program, env))
    median = {name: statistics.median(all_) for name, all_ in taken.items()}
    net = {name: median[name] - median[""] for name in PROGRAMS}
    net[BESIDE] -= net[YARDSTICK]
    return net


def main() -> None:
    options = parsed(__doc__, rounds=25)
    with tempfile.TemporaryDirectory() as directory:
        env = environment(directory)
        median = medians(options.rounds, env)
    table = Table("Median of fresh interpreters", ["", "ms", "ratio"])
    whole_s = median[YARDSTICK]
    for name, taken_s in median.items():
        table.add(name, f"{taken_s * 1e3:.1f}", f"{taken_s / whole_s:.2f}")
    write("imports", [machine(), table], to_file=options.write)


if __name__ == "__main__":
    main()
