"""
What the events of a busy cache cost while others wait: CPU time, by how many wait.

    python benchmarks/queueing.py [--base DIR] [--budget 1] [--rounds 1] [--write]

``--base`` names a checkout of an older build, which is measured side by side: each
build in processes of its own, one at work at a time, cell by cell in turns.

On one fake card, models in a dozen sizes of real ones. Many are in memory and idle; one
large model is leased, and those who wait want so much that it has to go first. So they
wait on, whatever happens, and every event has to find that out:

hit        a lease on a model in memory, begun and ended
release    the end of a lease that was begun before they came
admission  one more request that has to wait, and gives up; where the queue is full, one
           that is refused
check      a look for deadlocks; one in ten who wait holds a lease, 100 at most
expiry     all time out at once, for each
drain      here all models in memory are leased. The large one is released, and those
           who wait are served one after the other in its room, for each: with the loads
           and unloads of the fakes

Those who wait want models of their own, or share a dozen. They wait patiently, or
longer than the cache's patience, beside models that are pinned, since new leases on
others would be held back for them; or ``max_waiting`` is set, and the queue is full.

The time is that of all threads of the process, ``time.process_time()``: other programs
do not count. Medians of as many repetitions as fit into the budget, in CPU seconds, 200
at most and 1 at least; the drain ends after ten budgets, and is over those who were
served until then.

An old build takes half an hour to queue thousands, so there they join the queue without
its decisions, which are then made once. It takes minutes for one event where keys times
waiting are ten million, and for one check beside a thousand: those are left out.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import itertools
import json
import math
import os
import queue
import random
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from report import Table, machine, write

from whispercache import ModelCache, TooManyWaiters
from whispercache.engine.sizes.footprint import DEFAULT_WORKLOAD
from whispercache.keys import ModelKey
from whispercache.testing import FakeClock, FakeLoader, FakeMachine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from whispercache import Lease
    from whispercache.core.waiters import Waiter

try:
    from whispercache.core.waiters import Wanted
except ImportError:  # an older build
    from whispercache.core.entries import Wanted  # type: ignore[attr-defined,no-redef]

ROOT = Path(__file__).parent.parent
WAITING = (0, 10, 100, 1_000, 5_000)
KEYS = (10, 200, 10_000)
CARD, TYPE = "cuda:0", "float16"

# Of models of Whisper and their distilled kin, in int8 and float16.
SIZES_MIB = (39, 74, 78, 145, 148, 244, 388, 488, 756, 769, 1_533, 3_094)
SIZES = tuple(size << 20 for size in SIZES_MIB)
LARGE = 2 * SIZES[-1]
# Of each lease, and what is free for the work of leases beside models that are idle.
WORK = 64 << 20
SLACK = 256 * WORK
# Most leases of those who wait, repetitions, and leases to release.
HOLDERS, MOST = 100, 200
PATIENCE_S, TIMEOUT_S = 5.0, 60.0
# What an old build is spared: more keys times waiting than that, and such checks.
OLD_MOST, OLD_MOST_CHECKED = 1_000_000, 100
# By then a possible deadlock was looked for.
CHECK_S = 0.1
HUNG_S = 3_600


EVENTS = ("hit", "release", "admission", "check", "expiry", "drain")
BASE, NEW = "base", "new"


class Cell(NamedTuple):
    """
    What is measured together: *mood* is patient, impatient, full, or drain.
    """

    keys: int
    waiting: int
    alike: bool
    mood: str


Measured = dict[str, "tuple[float, int]"]
"""
Microseconds by event, and the number of repetitions.
"""


def cells() -> Iterator[Cell]:
    for keys in KEYS:
        for waiting in WAITING:
            yield Cell(keys, waiting, alike=False, mood="patient")
            if waiting in (100, 1_000) and keys < KEYS[-1]:
                yield Cell(keys, waiting, alike=True, mood="patient")
                yield Cell(keys, waiting, alike=False, mood="impatient")
                yield Cell(keys, waiting, alike=False, mood="full")
        for waiting in WAITING[1:]:
            yield Cell(keys, waiting, alike=False, mood="drain")
            if waiting in (100, 1_000) and keys < KEYS[-1]:
                yield Cell(keys, waiting, alike=True, mood="drain")


# In the process of a build ------------------------------------------------------------


class Scene:
    """
    A cache with models in memory, beside room for a large one.

    Args:
        keys: The number of models.
        mood: They are leased in a drain. They are pinned where the impatient wait, who
            else would hold all leases on them back. Otherwise they are idle.
        max_waiting: Of the cache.
        skips: Those who wait join the queue without its decisions.
    """

    def __init__(
        self, keys: int, mood: str, *, max_waiting: int | None, skips: bool
    ) -> None:
        self.names = [f"bench/resident-{n}" for n in range(keys)]
        sizes = dict(zip(self.names, itertools.cycle(SIZES), strict=False))
        is_busy, own_bytes = mood == "drain", sum(sizes.values())
        work_bytes = keys * WORK if is_busy else SLACK
        # What those who wait want beside the room of the large one, so that they wait.
        self._more_bytes = {"drain": 0, "impatient": work_bytes}.get(
            mood, own_bytes + work_bytes
        )
        self._sizes = {**sizes, "bench/large": LARGE}
        self._skips = skips
        all_bytes = own_bytes + work_bytes + LARGE + WORK
        host = FakeMachine({"cpu": "64GiB", CARD: 2 * all_bytes})
        self.clock = FakeClock()
        self.cache = ModelCache(
            loader=FakeLoader(host, sizes=self._sizes, workspace_bytes=WORK),
            probe=host,
            clock=self.clock,
            vram=all_bytes,
            keep_alive=-1,
            patience_s=PATIENCE_S,
            max_waiting=max_waiting,
            coordinate=False,
        )
        self.core = self.cache._core
        self._held = []
        for name in self.names:
            lease = self.lease(name)
            if mood == "impatient":
                lease.pin()
            self._held.append(lease) if is_busy else lease.release()
        self._wanted: dict[str, Wanted] = {}

    def lease(self, name: str) -> Lease:
        return self.cache.lease(name, CARD, TYPE)

    def close(self) -> None:
        for lease in self._held:
            lease.release()
        self.cache.close()

    def ask(
        self, place: int, *, alike: bool = False, owner: object | None = None
    ) -> Waiter:
        """
        Makes a request that has to wait.
        """
        wanted = self.wanted(place, alike=alike)
        return self.core.request([wanted], None, TIMEOUT_S, owner or object())

    def wanted(self, place: int, *, alike: bool = False) -> Wanted:
        if alike:
            place %= len(SIZES)
        name = f"bench/wanted-{place}"
        if name not in self._wanted:
            self._sizes[name] = SIZES[place % len(SIZES)] + self._more_bytes
            self.cache.preload(name, CARD, TYPE, tier="page")  # it is located
            entry = self.core.entry(ModelKey(name, CARD, TYPE))
            self._wanted[name] = Wanted(entry, DEFAULT_WORKLOAD)
        return self._wanted[name]

    def queue(
        self, waiting: int, *, alike: bool = False, owners: list[object] | None = None
    ) -> list[Waiter]:
        """
        Has so many wait.
        """
        for place in range(waiting + 1):
            self.wanted(place, alike=alike)
        scheduler = self.core.scheduler
        if self._skips:
            scheduler.admit = lambda **_: None  # type: ignore[method-assign]
        given = dict(enumerate(owners or ()))
        waiters = [
            self.ask(place, alike=alike, owner=given.get(place))
            for place in range(waiting)
        ]
        if self._skips:
            del scheduler.admit
            with self.core.changing():
                scheduler.admit()
        assert len(self.core.queue) == waiting
        return waiters

    def time_out(self) -> None:
        self.clock.tick(TIMEOUT_S + 1)
        assert not self.core.queue


class Build:
    """
    What a process of one build measures.
    """

    def __init__(self, budget_s: float, *, skips: bool) -> None:
        self._budget_s, self._skips = budget_s, skips
        # One at a time: ten thousand models take memory here, too.
        self._scene: Scene | None = None
        self._scene_of: tuple[int, str, int | None] | None = None
        self._dice = random.Random(1)

    def _set(self, cell: Cell) -> Scene:
        most = cell.waiting if cell.mood == "full" else None
        kind = "" if cell.mood in ("patient", "full") else cell.mood
        scene_of = cell.keys, kind, most
        if self._scene is None or scene_of != self._scene_of:
            self.close()
            self._scene_of = scene_of
            self._scene = Scene(
                cell.keys, cell.mood, max_waiting=most, skips=self._skips
            )
        return self._scene

    def close(self) -> None:
        if self._scene is not None:
            self._scene.close()
            self._scene = None

    def measure(self, cell: Cell) -> Measured:
        scene = self._set(cell)
        large = scene.lease("bench/large")
        try:
            if cell.mood == "drain":
                return {"drain": self._drain(scene, cell, large)}
            return self._measure(scene, cell)
        finally:
            large.release()

    def _measure(self, scene: Scene, cell: Cell) -> Measured:
        dice = self._dice
        taken = [scene.lease(dice.choice(scene.names)) for _ in range(MOST)]
        scene.queue(cell.waiting, alike=cell.alike)
        if cell.mood == "impatient":
            scene.clock.tick(PATIENCE_S + 1)

        def hit() -> None:
            scene.lease(dice.choice(scene.names)).release()

        def admission() -> None:
            with suppress(TooManyWaiters):
                scene.core.abandon(scene.ask(cell.waiting, alike=cell.alike))

        hit()  # the first holds the leases back
        found = {"hit": self._timed(hit)}
        found["release"] = self._timed(lambda: taken.pop().release(), len(taken))
        found["admission"] = self._timed(admission)
        if cell.waiting:
            us, _ = self._timed(scene.time_out, 1)
            found["expiry"] = us / cell.waiting, 1
        for lease in taken:
            lease.release()
        most = OLD_MOST_CHECKED if self._skips else WAITING[-1]
        if 0 < cell.waiting <= most:
            found["check"] = self._check(scene, cell)
        return found

    def _check(self, scene: Scene, cell: Cell) -> tuple[float, int]:
        owners: list[object] = [
            object() for _ in range(min(HOLDERS, cell.waiting // 10))
        ]
        held = [scene.lease(self._dice.choice(scene.names)) for _ in owners]
        for lease, owner in zip(held, owners, strict=True):
            lease.hand_over(owner)
        scene.queue(cell.waiting, alike=cell.alike, owners=owners)

        def begin() -> None:
            # After each event there may be a deadlock.
            scene.lease(scene.names[0]).release()
            assert scene.core.state.deadlocks_at_s < math.inf

        found = self._timed(partial(scene.clock.tick, CHECK_S), 10, begin)
        scene.time_out()
        for lease in held:
            lease.release()
        return found

    def _drain(self, scene: Scene, cell: Cell, large: Lease) -> tuple[float, int]:
        granted: queue.SimpleQueue[Future[tuple[Lease, ...]]] = queue.SimpleQueue()
        for waiter in scene.queue(cell.waiting, alike=cell.alike):
            waiter.future.add_done_callback(granted.put)
        served, is_late = 0, False
        started_s = time.process_time()
        large.release()
        while served < cell.waiting and not is_late:
            for lease in granted.get(timeout=600).result():
                lease.release()
            served += 1
            is_late = time.process_time() - started_s > 10 * self._budget_s
        spent_s = time.process_time() - started_s
        if is_late:
            scene.time_out()
            while served + granted.qsize() < cell.waiting:
                time.sleep(0.01)
            while not granted.empty():
                with suppress(Exception):
                    granted.get().result()[0].release()
        return spent_s / served * 1e6, served

    def _timed(
        self,
        event: Callable[[], None],
        most: int = MOST,
        begin: Callable[[], None] = lambda: None,
    ) -> tuple[float, int]:
        gc.collect()
        times_s: list[float] = []
        while len(times_s) < most and sum(times_s) < self._budget_s:
            begin()
            started_s = time.process_time()
            event()
            times_s.append(time.process_time() - started_s)
        return statistics.median(times_s) * 1e6, len(times_s)


def serve(build: Build) -> None:
    for line in sys.stdin:
        # What waits in vain is told, and ends.
        faulthandler.dump_traceback_later(HUNG_S, exit=True)
        print(json.dumps(build.measure(Cell(**json.loads(line)))), flush=True)
    os._exit(0)  # without an end for each of ten thousand models


# Side by side -------------------------------------------------------------------------


def start(place: Path, budget_s: float, *, skips: bool) -> subprocess.Popen[str]:
    given = json.dumps({"budget_s": budget_s, "skips": skips})
    return subprocess.Popen(
        [sys.executable, __file__, "--child", given],
        env={**os.environ, "PYTHONPATH": str(place)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(build: subprocess.Popen[str], cell: Cell) -> Measured:
    assert build.stdin is not None
    assert build.stdout is not None
    build.stdin.write(json.dumps(cell._asdict()) + "\n")
    build.stdin.flush()
    answer = build.stdout.readline()
    assert answer, f"the build's process ended at {cell}"
    return {event: (us, count) for event, (us, count) in json.loads(answer).items()}


def side_by_side(
    builds: dict[str, Path], budget_s: float, rounds: int
) -> dict[str, dict[tuple[str, Cell], float]]:
    """
    Returns the median microseconds of each build, by event and cell.
    """
    found: dict[str, dict[tuple[str, Cell], list[float]]] = {}
    children = {
        name: start(place, budget_s, skips=name == BASE)
        for name, place in builds.items()
    }
    for _ in range(rounds):
        for cell, (name, child) in itertools.product(cells(), children.items()):
            if name != BASE or cell.keys * cell.waiting <= OLD_MOST:
                for event, (us, count) in ask(child, cell).items():
                    place = event, cell
                    found.setdefault(name, {}).setdefault(place, []).append(us)
                    told = f"{us:12,.1f} µs, {count} times"
                    print(f"{name:5} {event:10} {told} {cell}", file=sys.stderr)
    for child in children.values():
        child.communicate()
    return {
        name: {place: statistics.median(all_) for place, all_ in measured.items()}
        for name, measured in found.items()
    }


def tables(medians: dict[str, dict[tuple[str, Cell], float]]) -> Iterator[Table]:
    kinds = dict.fromkeys((c.keys, c.mood, c.alike) for c in cells())
    for event in EVENTS:
        head = ["keys", "those who wait", "build", *(f"{n:,}" for n in WAITING)]
        table = Table(f"{event}, µs of CPU, by how many wait", head)
        for keys, mood, alike in kinds:
            row = [Cell(keys, waiting, alike, mood) for waiting in WAITING]
            if not any((event, cell) in medians[NEW] for cell in row):
                continue
            who = "patient" if mood == "drain" else mood
            who += ", a dozen models" if alike else ", own models"
            for name, measured in medians.items():
                cells_ = [number(measured.get((event, cell))) for cell in row]
                table.add(f"{keys:,}", who, name, *cells_)
            if BASE in medians:
                ratios = [ratio(medians, (event, cell)) for cell in row]
                table.add(f"{keys:,}", who, "ratio", *ratios)
        yield table


def number(us: float | None) -> str:
    return "" if us is None else f"{us:,.1f}"


def ratio(
    medians: dict[str, dict[tuple[str, Cell], float]], place: tuple[str, Cell]
) -> str:
    old, new = medians[BASE].get(place), medians[NEW].get(place)
    return "" if old is None or new is None else f"{new / old:.4f}"


def targets(measured: dict[tuple[str, Cell], float]) -> Iterator[str]:
    """
    Yields the ratios that are to stay small, each with its bound.
    """
    alone = measured["hit", Cell(10, 0, alike=False, mood="patient")]
    for mood in ("patient", "impatient", "full"):
        beside = measured["hit", Cell(10, 1_000, alike=False, mood=mood)]
        told = f"a hit beside 1,000 waiting, {mood}, to a hit alone"
        yield f"{told}: × {beside / alone:.2f} (at most 2)"
    few, many = (
        measured["hit", Cell(keys, 100, alike=False, mood="patient")]
        for keys in (KEYS[0], KEYS[-1])
    )
    yield f"10,000 keys to 10, 100 waiting: × {many / few:.2f} (at most 3)"
    for event, mood in (("drain", "drain"), ("expiry", "patient"), ("expiry", "full")):
        us = measured[event, Cell(10, 1_000, alike=False, mood=mood)]
        yield f"{event} of 1,000, {mood}, each: {us:.0f} µs (at most 150)"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--base", type=Path, help="a checkout of an older build")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds an event")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # this is a process of it
    options = parser.parse_args()
    if options.child:
        serve(Build(**json.loads(options.child)))
    builds = {NEW: ROOT}
    if options.base is not None:
        builds = {BASE: options.base.resolve(), NEW: ROOT}
    medians = side_by_side(builds, options.budget, options.rounds)
    lines = list(targets(medians[NEW]))
    write("queueing", [machine(), *tables(medians), *lines], to_file=options.write)


if __name__ == "__main__":
    main()
