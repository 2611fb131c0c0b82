"""
What whispercache does on a GPU, measured there: one command, less than 8 minutes.

    python benchmarks/gpu [--write] [--out DIRECTORY] [--only PART ...]
                          [--sizes SIZE ...] [--models DIRECTORY]
                          [--budget SECONDS] [--pretend]

The parts, in this order; each has a process of its own, and what one cannot do is told
in the results while the others go on:

machine        card, driver, versions; copies to the card and back, pageable and pinned
warm-up        the first load of a process, and of a second with CUDA's kernel cache
sizes          bytes predicted, measured and returned for each size; the peak of work
cycles         100 loads and unloads: does anything grow?
tiers          loads from cold files, warm files and the host's copy; evictions
exit           seconds from a program's last line to its end
switch         A, B, A, B … with memory for one, beside lru_cache and constructing
out of memory  a card that is filled on purpose, and what becomes of the cache
checkpoint     a process with large-v3, moved off the card by the driver and back
two cards      both load and work at the same time, where there are two

``--write`` puts a report and all that was measured (JSON) into ``benchmarks/results/``,
``--out`` into another directory; both are there from the first part on, and grow with
each. What comes last is what a card can most easily be judged without.

The models are of random weights in the sizes of the real ones, written to a temporary
directory (7 GB; ``--models`` keeps them, or has real ones), so no network is needed.
docs/gpu.md tells what a machine must have.

Without a card it says why in one line and ends with 2. ``--pretend`` runs every part
over the tests' fake drivers and micro models instead: that shows that the program
works, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from report import RESULTS

from gpu import parts, trials, ways
from gpu.run import ASIDE, SIZES, Outcome, Setup, cells_of, spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gpu.run import Rows

    Role = Callable[[Setup, str], Rows]

# Seconds, of all parts together, and those below which none is begun.
BUDGET_S = 450.0
LEAST_S = 5.0

# The user without privileges, by custom.
NOBODY = 65534


class Part(NamedTuple):
    """
    One part. The argument of its role is the seconds that it may take.
    """

    name: str
    role: Role
    most_s: float


PARTS = (
    Part("machine", parts.machine, 40.0),
    Part("warm-up", parts.warm_ups, 160.0),
    Part("sizes", parts.sizes, 100.0),
    Part("cycles", parts.cycles, 60.0),
    Part("tiers", ways.tiers, 150.0),
    Part("exit", ways.exits, 60.0),
    Part("switch", ways.switch, 120.0),
    Part("out of memory", trials.out_of_memory, 60.0),
    Part("checkpoint", trials.checkpoint, 80.0),
    Part("two cards", trials.two_cards, 40.0),
)

ROLES: dict[str, Role] = {
    **{part.name: part.role for part in PARTS},
    "look": parts.look,
    "warm": parts.warm_up,
    "switcher": ways.switcher,
    "exit program": ways.exit_program,
    "holder": trials.holder,
    "parker": trials.parker,
}


def play(role: str, setup: Setup, argument: str) -> None:
    """
    Prints the rows of a role as they are made: the whole life of a child process.
    """
    if setup.pretends:
        from gpu import pretend

        pretend.install(role)
    for row in ROLES[role](setup, argument):
        print(json.dumps(row), flush=True)


# Before the parts ---------------------------------------------------------------------


@contextmanager
def prepared(options: argparse.Namespace) -> Iterator[Setup]:
    """
    Makes a directory with empty caches, which this process's children use.
    """
    with tempfile.TemporaryDirectory(prefix="whispercache-gpu-") as temporary:
        home = Path(temporary)
        home.chmod(0o755)  # another user reads the models
        kernels = kernel_folder(home, is_measured="warm-up" in options.only)
        os.environ |= {
            "XDG_CACHE_HOME": str(home / "cache"),
            "CUDA_CACHE_PATH": str(kernels),
            "HF_HUB_OFFLINE": "1",
        }
        setup = Setup(
            home=temporary,
            models=str(options.models or home / "models"),
            kernels=str(kernels),
            sizes=tuple(size for size in SIZES if size in options.sizes),
            nobody=NOBODY if os.geteuid() == 0 else None,
        )
        if options.pretend:
            from gpu import pretend

            pretend.prepare(home)
            setup = pretend.smaller(setup)
        yield setup


def kernel_folder(home: Path, *, is_measured: bool) -> Path:
    """
    Returns where CUDA keeps compiled kernels: an empty place if that is measured.
    """
    given = os.environ.get("CUDA_CACHE_PATH")
    if not given:
        return home / "kernels"
    folder = Path(given).resolve()
    is_used = folder.is_dir() and any(folder.iterdir())
    return home / "kernels" if is_used and is_measured else folder


def write_models(setup: Setup) -> str:
    """
    Writes the models that are not there; returns why it cannot, or nothing.
    """
    missing = [size for size in setup.sizes if not setup.model(size).is_dir()]
    directory = Path(setup.models)
    directory.mkdir(parents=True, exist_ok=True)
    if setup.pretends:
        from gpu import pretend

        pretend.write_models(directory, missing)
        return ""
    import synthetic

    needed_bytes = sum(map(synthetic.model_bytes, missing))
    free_bytes = shutil.disk_usage(directory).free
    if needed_bytes > free_bytes:
        return (
            f"the models take {needed_bytes / 1e9:.1f} GB, {directory} has "
            f"{free_bytes / 1e9:.1f} free: name another with --models, or fewer --sizes"
        )
    for size in missing:
        part = synthetic.write(size, directory / f"{size}.part")
        part.rename(directory / size)  # a directory of that name is whole
    return ""


def card_of(setup: Setup) -> tuple[str, str]:
    outcome = spawn("look", setup, timeout_s=60)
    for found in cells_of(outcome.rows, ASIDE):
        return found["card"], found["problem"]
    return "", outcome.error or "nothing was found"


# The parts ----------------------------------------------------------------------------


def measure(
    setup: Setup, names: Sequence[str], end_s: float
) -> Iterator[tuple[str, Outcome]]:
    """
    Runs the parts of those *names*, in the order of `PARTS`, until *end_s*.
    """
    for part in PARTS:
        if part.name not in names:
            continue
        now_s = time.monotonic()
        left_s = end_s - now_s
        if left_s < LEAST_S:
            told = "left out: the time for all parts was over; see --budget and --only"
            yield part.name, Outcome((), told, now_s, now_s, 0)
            continue
        print(f"{part.name} …", file=sys.stderr, flush=True)
        most_s = min(part.most_s, left_s)
        argument = f"{most_s:.1f}"
        yield part.name, spawn(part.name, setup, argument, timeout_s=most_s, leads=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.role:
        role, text, argument = options.role
        play(role, Setup.of(text), argument)
        return 0
    # An exception, so that the processes that measure are ended, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    from gpu.report import keep, report

    end_s = time.monotonic() + options.budget
    folder: Path | None = options.out or (RESULTS if options.write else None)
    with prepared(options) as setup:
        card, problem = card_of(setup)
        problem = problem or _not_writable(folder) or write_models(setup)
        if problem:
            print(f"the GPU benchmark cannot run here: {problem}", file=sys.stderr)
            return 2
        outcomes: dict[str, Outcome] = {}
        text, paths = "", list[Path]()
        for name, outcome in measure(setup, options.only, end_s):
            outcomes[name] = outcome
            text = report(card, setup, outcomes, options.only)
            if folder:
                paths = keep(folder, text, card, setup, outcomes)
        print(text, *(f"written to {path}" for path in paths), sep="\n")
    return 0


def _not_writable(folder: Path | None) -> str:
    """
    Returns why results cannot be written to *folder*, in one line, or nothing.
    """
    if folder is None:
        return ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"no results can be written: {error}; name a directory with --out"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu", description=__doc__.partition("\n\n")[0]
    )
    names = [part.name for part in PARTS]
    add = parser.add_argument
    add("--write", action="store_true", help="to benchmarks/results/")
    add("--out", type=Path, metavar="DIRECTORY", help="write there instead")
    add("--only", nargs="+", choices=names, default=names, metavar="PART")
    add("--sizes", nargs="+", choices=SIZES, default=SIZES, metavar="SIZE")
    add("--models", type=Path, help="directory with a model, or room for one, by size")
    add("--budget", type=float, default=BUDGET_S, help="seconds of all parts")
    add("--pretend", action="store_true", help="make everything up, to try the program")
    add("--role", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.pretend and options.write:
        parser.error("what is pretended is not written to benchmarks/results/")
    return options
