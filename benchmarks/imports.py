"""
What ``import whispercache`` costs, beside ``import faster_whisper``.

    python benchmarks/imports.py [--rounds 25] [--write]

Each program is a fresh interpreter, in turns with the others; an empty one is taken
off. The last rows tell what the import leaves for later, when a first cache is made,
and what all of it adds to a program that imports faster-whisper in any case.

Byte code is kept, as it is wherever packages are installed, in a directory of its own:
without it most of the time goes to compiling. What takes the time is told by
``-X importtime``, which adds some of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from report import Table, machine, write

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
LARGEST = 10


def environment(directory: str) -> dict[str, str]:
    """
    One in which byte code is kept in *directory*, and this checkout comes first.
    """
    kept = {**os.environ, "PYTHONPYCACHEPREFIX": directory, "PYTHONPATH": str(ROOT)}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    return kept


def seconds(program: str, env: dict[str, str]) -> float:
    """
    Elapsed seconds of a fresh interpreter that runs *program*.
    """
    started_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], env=env, check=True)
    return time.perf_counter() - started_s


def medians(rounds: int, env: dict[str, str]) -> dict[str, float]:
    """
    Median seconds of each program, less those of what it comes on top of.
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


def own_ms(program: str, rounds: int, env: dict[str, str]) -> dict[str, float]:
    """
    Median milliseconds that each module takes, without those that it imports.
    """
    taken: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", program],
            env=env,
            check=True,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in done.stderr.splitlines():
            own, _, module = line.removeprefix("import time:").split("|")
            if own.strip().isdecimal():
                taken[module.strip()].append(int(own) / 1000)
    return {module: statistics.median(all_) for module, all_ in taken.items()}


def main() -> None:
    """
    Measure, print, and write if asked to.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        env = environment(directory)
        median = medians(options.rounds, env)
        modules = own_ms(NAMES, options.rounds, env)
        # What every interpreter imports is not of our making.
        empty = own_ms("", 1, env)
    largest = [each for each in modules.items() if each[0] not in empty]
    largest.sort(key=lambda each: -each[1])

    table = Table("Median of fresh interpreters", ["", "ms", "ratio"])
    whole_s = median[YARDSTICK]
    for name, taken_s in median.items():
        table.add(name, f"{taken_s * 1e3:.1f}", f"{taken_s / whole_s:.2f}")
    total_ms = sum(taken_ms for _, taken_ms in largest)
    title = f"{NAMES}: the {LARGEST} largest of {len(largest)} modules"
    parts = Table(title, ["", "ms"])
    for module, taken_ms in largest[:LARGEST]:
        parts.add(module, f"{taken_ms:.2f}")
    parts.add("all", f"{total_ms:.2f}")
    write("imports", [machine(), table, parts], to_file=options.write)


if __name__ == "__main__":
    main()
