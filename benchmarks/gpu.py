"""
What whispercache does on a GPU, measured there: one command, less than 8 minutes.

    python benchmarks/gpu.py [--write] [--out DIRECTORY] [--only PART ...]
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

CUDA's kernels are compiled into the directory of CUDA_CACHE_PATH where that is empty,
so that later programs have them, else into one of their own. The models are of random
weights in the sizes of the real ones, written to a temporary directory (7 GB;
``--models`` keeps them, or has real ones), so no network is needed. It takes numpy,
CTranslate2, faster-whisper and whispercache; docs/gpu.md tells how to bring these to a
machine that has no network, or only CUDA 13.

Without a card it says why in one line and ends with 2. ``--pretend`` runs every part
over the tests' fake drivers and micro models instead: that shows that the program
works, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpu_parts
import gpu_tiers
import gpu_trials
import gpu_turns
from gpu_records import Look, dump
from gpu_run import SIZES, Outcome, Setup, spawn
from report import RESULTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gpu_records import Record

    Role = Callable[[Setup, str], Iterator[Record]]

__all__ = ["PARTS", "ROLES", "main"]

BUDGET_S = 450.0
LEAST_S = 5.0
"""
Seconds, of all parts together, and those below which none is begun.
"""

NOBODY = 65534
"""
The user without privileges, by custom.
"""


class Part(NamedTuple):
    """
    One part.

    Attributes:
        name: Of it.
        role: What its process does; its argument is the seconds that this may take.
        most_s: How long that may take.
    """

    name: str
    role: Role
    most_s: float


def _warm_ups(setup: Setup, argument: str) -> Iterator[Record]:
    del argument
    for process in ("first", "second"):
        outcome = spawn("warm", setup, process)
        yield from outcome.records
        if outcome.error:
            raise RuntimeError(f"the {process} process: {outcome.error}")


PARTS = tuple(
    Part(*each)
    for each in (
        ("machine", gpu_parts.machine, 40.0),
        ("warm-up", _warm_ups, 160.0),
        ("sizes", gpu_parts.sizes, 100.0),
        ("cycles", gpu_parts.cycles, 60.0),
        ("tiers", gpu_tiers.tiers, 150.0),
        ("exit", gpu_turns.exits, 60.0),
        ("switch", gpu_turns.switch, 120.0),
        ("out of memory", gpu_trials.out_of_memory, 60.0),
        ("checkpoint", gpu_trials.checkpoint, 80.0),
        ("two cards", gpu_trials.two_cards, 40.0),
    )
)

ROLES: dict[str, Role] = {
    **{part.name: part.role for part in PARTS},
    "look": gpu_parts.look,
    "warm": gpu_parts.warm_up,
    "switcher": gpu_turns.switcher,
    "exit program": gpu_turns.exit_program,
    "holder": gpu_trials.holder,
    "parker": gpu_trials.parker,
}


def play(role: str, setup: Setup, argument: str) -> None:
    """
    What a child process does: print the records of a role as they are made.
    """
    if setup.pretends:
        import gpu_pretend

        gpu_pretend.install(role)
    for record in ROLES[role](setup, argument):
        print(dump(record), flush=True)


# Before the parts ---------------------------------------------------------------------


@contextmanager
def prepared(options: argparse.Namespace) -> Iterator[Setup]:
    """
    A directory with caches that nobody has used; this process's children use them.
    """
    with tempfile.TemporaryDirectory(prefix="whispercache-gpu-") as temporary:
        home = Path(temporary)
        home.chmod(0o755)  # another user reads the models
        kernels = _kernels(home, is_measured="warm-up" in options.only)
        os.environ |= {
            "XDG_CACHE_HOME": str(home / "cache"),
            "CUDA_CACHE_PATH": str(kernels),
            "HF_HUB_OFFLINE": "1",
        }
        is_root = os.geteuid() == 0
        setup = Setup(
            home=temporary,
            models=str(options.models or home / "models"),
            kernels=str(kernels),
            sizes=tuple(size for size in SIZES if size in options.sizes),
            nobody=NOBODY if is_root else None,
        )
        if options.pretend:
            import gpu_pretend

            gpu_pretend.prepare(home)
            setup = gpu_pretend.smaller(setup)
        yield setup


def _kernels(home: Path, *, is_measured: bool) -> Path:
    """
    Where CUDA keeps the kernels that it compiles: an empty place if that is measured.
    """
    given = os.environ.get("CUDA_CACHE_PATH")
    if not given:
        return home / "kernels"
    folder = Path(given).resolve()
    is_used = folder.is_dir() and any(folder.iterdir())
    return home / "kernels" if is_used and is_measured else folder


def write_models(setup: Setup) -> str:
    """
    Write the models that are not there; why that cannot be, in one line, or nothing.
    """
    missing = [size for size in setup.sizes if not setup.model(size).is_dir()]
    directory = Path(setup.models)
    directory.mkdir(parents=True, exist_ok=True)
    if setup.pretends:
        import gpu_pretend

        gpu_pretend.write_models(directory, missing)
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
        part.rename(directory / size)  # what is there is whole
    return ""


def card_of(setup: Setup) -> Look:
    """
    The card, or why there is none.
    """
    outcome = spawn("look", setup, timeout_s=60)
    found = [record for record in outcome.records if isinstance(record, Look)]
    return found[0] if found else Look("", 0, outcome.error or "nothing was found")


# The parts ----------------------------------------------------------------------------


def measure(
    setup: Setup, names: Sequence[str], end_s: float
) -> Iterator[tuple[str, Outcome]]:
    """
    What came of each part of those *names*, in the order of `PARTS`, as they end.
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
    """
    Measure, print, and write if asked to; the exit code.
    """
    options = _options(arguments)
    if options.role:
        role, text, argument = options.role
        play(role, Setup.of(text), argument)
        return 0
    # Who is asked to end takes the processes along that measure.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    from gpu_report import keep, report

    end_s = time.monotonic() + options.budget
    folder: Path | None = options.out or (RESULTS if options.write else None)
    with prepared(options) as setup:
        look = card_of(setup)
        problem = look.problem or _not_writable(folder) or write_models(setup)
        if problem:
            print(f"gpu.py cannot run here: {problem}", file=sys.stderr)
            return 2
        outcomes: dict[str, Outcome] = {}
        text, paths = "", list[Path]()
        for name, outcome in measure(setup, options.only, end_s):
            outcomes[name] = outcome
            text = report(look.card, setup, outcomes, options.only)
            if folder:
                paths = keep(folder, text, look.card, setup, outcomes)
        print(text, *(f"written to {path}" for path in paths), sep="\n")
    return 0


def _not_writable(folder: Path | None) -> str:
    """
    Why results cannot be written there, in one line, or nothing.
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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
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


if __name__ == "__main__":
    sys.exit(main())
