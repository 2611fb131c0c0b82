"""
What it costs to load a model whose files are not in the kernel's page cache, and what
reading them ahead gains.

    python benchmarks/page.py [--rounds 9] [--model DIRECTORY ...] [--write]

CTranslate2 loads tiny.en and base (or the models in the directories given) on the CPU,
in float32 and int8, from files that were treated so:

warm              read to the end just before
cold              fsync, POSIX_FADV_DONTNEED; mincore then finds no page in memory
read, then load   cold, then read to the end; that is "warm", and what it costs
read meanwhile    cold, then a thread reads to the end, and the load begins 0, 20 or
                  50 ms after that began
advised           cold, then POSIX_FADV_WILLNEED in pieces of 128 KiB, and the load 0,
                  20 or 50 ms after that returned
advised at once   cold, one POSIX_FADV_WILLNEED for the whole file, the load 50 ms later

The ways take turns in random order, several rounds; medians. The files are copies in a
temporary directory (TMPDIR says where; a tmpfs cannot be cold), so that nobody else
keeps them warm. Under a virtual machine "cold" is as cold as the host's own cache.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from report import Table, machine, write

from examples.weights import PACKAGED, packaged_model
from whispercache.engine.process import versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

TYPES = ("float32", "int8")
READ_BYTES = 1 << 20
PATIENCE_S = 2.0
PIECE_BYTES = 128 * 1024
"""
How much one WILLNEED asks for.

The kernel cuts a longer one to the device's read-ahead window, without a word.

Source: Linux, mm/readahead.c, force_page_cache_ra(); 128 KiB is the usual
/sys/block/*/queue/read_ahead_kb. With 8192 of them, 8 MiB of 72 and of 138 were read.
"""


class Way(NamedTuple):
    """
    What happens to cold files before the load.

    Attributes:
        ahead: Reads a file, or asks the kernel to.
        wait_s: From then until the load.
        is_beside: A thread does that, and the load does not wait for its end.
    """

    ahead: Callable[[Path], None]
    wait_s: float = 0.0
    is_beside: bool = False


class Taken(NamedTuple):
    """
    One load.

    Attributes:
        ahead_s: Seconds that reading ahead, or asking for it, took.
        share: The share of the files' pages that were in memory when the load began.
        load_s: Seconds of the load.
    """

    ahead_s: float
    share: float
    load_s: float


# Files and the page cache ------------------------------------------------------------


def pages(file: Path) -> tuple[int, int]:
    """
    How many of a file's pages are in memory, and how many it has.
    """
    with file.open("rb") as opened:
        n_bytes = os.fstat(opened.fileno()).st_size
        # A private mapping: ctypes wants it writable, nothing is written.
        with mmap.mmap(opened.fileno(), n_bytes, access=mmap.ACCESS_COPY) as mapping:
            flags = (ctypes.c_ubyte * -(-n_bytes // mmap.PAGESIZE))()
            first = ctypes.c_char.from_buffer(mapping)
            address = ctypes.c_void_p(ctypes.addressof(first))
            failed = _mincore(address, ctypes.c_size_t(n_bytes), flags)
            del first  # the mapping cannot be closed before
    if failed:
        raise OSError(ctypes.get_errno(), "mincore", str(file))
    return sum(flag & 1 for flag in flags), len(flags)


_mincore = ctypes.CDLL(None, use_errno=True).mincore


def share_in_memory(files: Iterable[Path]) -> float:
    """
    The share of all pages of *files* that are in memory.
    """
    inside, total = map(sum, zip(*map(pages, files), strict=True))
    return inside / total


def make_cold(files: Sequence[Path]) -> None:
    """
    Put *files* out of the page cache.

    Blocks: until pages that are still being read can leave.

    Raises:
        RuntimeError: they stayed, as on a tmpfs.
    """
    until_s = time.perf_counter() + PATIENCE_S
    while True:
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        share = share_in_memory(files)
        if not share:
            return
        if time.perf_counter() > until_s:
            message = f"{share:.0%} of {files[0].parent} stayed in memory: set TMPDIR"
            raise RuntimeError(message)


def read(file: Path) -> None:
    """
    Read a file to its end.
    """
    buffer = bytearray(READ_BYTES)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


def advise(file: Path) -> None:
    """
    Ask the kernel to read a file, piece by piece.

    Blocks: while the disk's queue is full, which is for about half of the reading.
    """
    with file.open("rb") as opened:
        number = opened.fileno()
        for start in range(0, os.fstat(number).st_size, PIECE_BYTES):
            os.posix_fadvise(number, start, PIECE_BYTES, os.POSIX_FADV_WILLNEED)


def advise_at_once(file: Path) -> None:
    """
    Ask the kernel to read a file, all of it in one call.
    """
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def leave(file: Path) -> None:
    """
    Do nothing.
    """
    del file


WAYS: Mapping[str, Way] = {
    "warm": Way(read),
    "cold": Way(leave),
    "read, then load": Way(read),
    **{
        f"read meanwhile, from {wait_ms} ms before": Way(
            read, wait_ms / 1e3, is_beside=True
        )
        for wait_ms in (0, 20, 50)
    },
    "advised, 0 ms before": Way(advise),
    "advised, 20 ms before": Way(advise, 0.02),
    "advised, 50 ms before": Way(advise, 0.05),
    "advised at once, 50 ms before": Way(advise_at_once, 0.05),
}


# Measuring ---------------------------------------------------------------------------


def load(directory: Path, compute_type: str) -> float:
    """
    Seconds that CTranslate2 takes to load a model, all of it.
    """
    from ctranslate2.models import Whisper

    started_s = time.perf_counter()
    model = Whisper(str(directory), "cpu", compute_type=compute_type, intra_threads=1)
    load_s = time.perf_counter() - started_s
    model.unload_model()
    return load_s


def take(way: str, directory: Path, compute_type: str) -> Taken:
    """
    Treat the files of a model in one of the `WAYS`, and load it.
    """
    ahead, wait_s, is_beside = WAYS[way]
    files = [file for file in directory.iterdir() if file.is_file()]
    if way == "warm":
        for file in files:
            read(file)
    else:
        make_cold(files)
    ahead_s = 0.0

    def read_ahead() -> None:
        nonlocal ahead_s
        started_s = time.perf_counter()
        for file in files:
            ahead(file)
        ahead_s = time.perf_counter() - started_s

    thread = threading.Thread(target=read_ahead)
    thread.start()
    if not is_beside:
        thread.join()
    time.sleep(wait_s)
    share = share_in_memory(files)
    load_s = load(directory, compute_type)
    thread.join()
    return Taken(ahead_s, share, load_s)


def measure(
    directories: Sequence[Path], rounds: int
) -> dict[tuple[Path, str], dict[str, list[Taken]]]:
    """
    All ways with all models in all types, again and again.
    """
    turns = [
        (directory, compute_type, way)
        for directory in directories
        for compute_type in TYPES
        for way in WAYS
    ]
    taken: dict[tuple[Path, str], dict[str, list[Taken]]] = defaultdict(
        lambda: defaultdict(list)
    )
    dice = random.Random(0)
    for number in range(-1, rounds):
        for turn in dice.sample(turns, len(turns)):
            directory, compute_type, way = turn
            found = take(way, directory, compute_type)
            if number >= 0:  # the first round warms up what is not the file
                taken[directory, compute_type][way].append(found)
    return taken


# Tables ------------------------------------------------------------------------------


def load_table(
    directories: Sequence[Path],
    taken: Mapping[tuple[Path, str], Mapping[str, list[Taken]]],
) -> Table:
    """
    Milliseconds of a load, and as a ratio to a cold one.
    """
    places = [(each, kind) for each in directories for kind in TYPES]
    heads = [
        head for each, kind in places for head in (f"{each.name} {kind}", "÷ cold")
    ]
    table = Table("Load, ms, by what happened to the files before", ["", *heads])
    for way in WAYS:
        row = []
        for place in places:
            load_s, cold_s = (
                statistics.median(each.load_s for each in taken[place][name])
                for name in (way, "cold")
            )
            row += [f"{load_s * 1e3:.0f}", f"{load_s / cold_s:.2f}"]
        table.add(way, *row)
    return table


def ahead_table(
    directories: Sequence[Path],
    taken: Mapping[tuple[Path, str], Mapping[str, list[Taken]]],
) -> Table:
    """
    How long reading ahead takes, and how much of it is there when the load begins.
    """
    heads = [
        head for each in directories for head in (f"{each.name}, ms", "GB/s", "in")
    ]
    table = Table(
        "Reading ahead, and the files' share in memory when the load began",
        ["", *heads],
    )
    for way in WAYS:
        row = []
        for directory in directories:
            found = [each for kind in TYPES for each in taken[directory, kind][way]]
            n_bytes = sum(file.stat().st_size for file in directory.iterdir())
            ahead_s = statistics.median(each.ahead_s for each in found)
            rate = (
                f"{n_bytes / ahead_s / 1e9:.1f}"
                if WAYS[way].ahead is read and not WAYS[way].is_beside
                else ""
            )
            share = statistics.median(each.share for each in found)
            row += [f"{ahead_s * 1e3:.0f}", rate, f"{share:.0%}"]
        table.add(way, *row)
    return table


def main() -> None:
    """
    Measure, print, and write if asked to.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", type=Path, nargs="+", help="directories of models")
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    options = parser.parse_args()
    versions()  # imports CTranslate2 before anything is timed
    sources = options.model or [packaged_model(name) for name in PACKAGED]
    names = [each.name for each in options.model] if options.model else PACKAGED
    with tempfile.TemporaryDirectory(prefix="whispercache-page-") as temporary:
        directories = [Path(temporary, name) for name in names]
        for source, directory in zip(sources, directories, strict=True):
            shutil.copytree(source, directory)
        taken = measure(directories, options.rounds)
        tables = [make(directories, taken) for make in (load_table, ahead_table)]
    write("page", [machine(), *tables], to_file=options.write)


if __name__ == "__main__":
    main()
