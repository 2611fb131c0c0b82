"""
What a call on the CPU costs with the heap of `use_huge_pages`, and what stays of it.

    python benchmarks/calls.py [--calls 7] [--rounds 3] [--at-once 2] [--before DIR]
                               [--write]

Each contender transcribes a clip in a process of its own, tiny.en and base, float32 and
int8, one thread a call: alone, and *at_once* calls beside each other. They tell the
CPU time and page faults of a call, the peak of memory, and what the process holds more
after the calls than after the load: idle memory that no limit counts.

without      the allocator as glibc has it
huge pages   after ``use_huge_pages()``, as in `whispercache serve`
kept         after ``use_huge_pages(keep=True)``, as in `whispercache transcribe`
before       with ``--before``: as "huge pages", in the checkout DIR, if it has them,
             else as "without"
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from report import Table, machine, parsed, write

ROOT = Path(__file__).resolve().parent.parent
CLIP = ROOT / "examples" / "clips" / "en-library.flac"
WITHOUT, HUGE, KEPT, BEFORE = "without", "huge pages", "kept", "before"
MIB = 1024**2


class Turn(NamedTuple):
    contender: str
    model: str
    compute_type: str
    n_calls: int
    at_once: int


class Taken(NamedTuple):
    cpu_s: float
    faults: float
    peak_bytes: int
    left_bytes: int


def child(turn: Turn) -> Taken:
    import whispercache
    from examples.weights import packaged_model
    from whispercache.devices.host import anonymous_bytes, return_free_memory

    use_huge_pages = getattr(whispercache, "use_huge_pages", None)
    if turn.contender != WITHOUT and use_huge_pages is not None:
        use_huge_pages(keep=turn.contender == KEPT)
    path = str(packaged_model(turn.model))
    with whispercache.ModelCache(variants=False) as cache:
        model = cache.get_model(
            path, device="cpu", compute_type=turn.compute_type, cpu_threads=1
        )

        def call(_: int = 0) -> None:
            list(model.transcribe(str(CLIP), language="en", beam_size=1)[0])

        # Imports, buffers: what comes once.
        call()
        return_free_memory()
        start_bytes = anonymous_bytes() or 0
        before = resource.getrusage(resource.RUSAGE_SELF)
        with ThreadPoolExecutor(turn.at_once) as pool:
            list(pool.map(call, range(turn.n_calls * turn.at_once)))
        after = resource.getrusage(resource.RUSAGE_SELF)
        left_bytes = (anonymous_bytes() or 0) - start_bytes
    n_calls = turn.n_calls * turn.at_once
    cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    faults = (after.ru_minflt - before.ru_minflt) / n_calls
    return Taken(cpu_s / n_calls, faults, after.ru_maxrss * 1024, left_bytes)


def take(turn: Turn, before: str) -> Taken:
    checkout = Path(before).resolve() if turn.contender == BEFORE else ROOT
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(turn)],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Taken(*json.loads(done.stdout))


def table(title: str, taken: dict[str, list[Taken]]) -> Table:
    head = ["", "s of CPU", "ratio", "page faults", "peak, MiB", "left, MiB"]
    made = Table(title, head)
    yardstick_s = statistics.median(each.cpu_s for each in taken[WITHOUT])
    for name, several in taken.items():
        cpu_s, faults, peak, left = map(statistics.median, zip(*several, strict=True))
        cells = f"{cpu_s:.3f}", f"{cpu_s / yardstick_s:.2f}", f"{faults:.0f}"
        made.add(name, *cells, f"{peak / MIB:.0f}", f"{left / MIB:.0f}")
    return made


def main() -> None:
    options = parsed(__doc__, calls=7, rounds=3, at_once=2, before="")
    if options.child:
        print(json.dumps(child(Turn(*json.loads(options.child)))))
        return
    contenders = [WITHOUT, HUGE, KEPT, *([BEFORE] if options.before else [])]
    parts: list[object] = [machine()]
    for model, kind, at_once in (
        ("tiny.en", "float32", 1),
        ("tiny.en", "int8", 1),
        ("base", "float32", 1),
        ("base", "int8", 1),
        ("base", "int8", options.at_once),
    ):
        taken = defaultdict(list)
        for _ in range(options.rounds):
            for name in contenders:
                turn = Turn(name, model, kind, options.calls, at_once)
                taken[name].append(take(turn, options.before))
        title = f"{model}, {kind}, {at_once} at once: each call"
        parts.append(table(title, taken))
    write("calls", parts, to_file=options.write)


if __name__ == "__main__":
    main()
