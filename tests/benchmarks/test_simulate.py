"""
The simulator: its optimum is one, its cache keeps the rules, and the rules keep theirs.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from effort import tries
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "simulate"))

from cells import Cell, cells
from contenders import (
    CONTENDERS,
    MODELS,
    on_disk,
    overtaking,
    slots,
    with_bar,
    without_drain,
    without_keep,
)
from contention import LOAD_S, LONGEST_LEASE_S, alternate, starve
from dictation import films_end_s, night, p95_s
from optimum import MAX_MODELS, least_load_s
from pieces import CARD, NOTHING, Disk, Host, Model, Report, Strategy
from simulation import Simulation, StrictFifo
from traces import WORKLOADS, Request, read_trace

from whispercache import ModelCache, ModelEvicted, ModelLoaded
from whispercache.planning import planner as admission
from whispercache.planning.planner import Decision, Need, Outcome, Pending
from whispercache.planning.policies import POLICIES, Resident
from whispercache.planning.room import Demand, Room
from whispercache.testing import FakeClock, FakeLoader, FakeMachine, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from simulation import Asked

    from whispercache import Event, Lease, ModelKey
    from whispercache.core.entries import Entry
    from whispercache.engine.api import LoadedModel
    from whispercache.engine.files import ModelFiles
    from whispercache.planning.planner import Planner

pytestmark = pytest.mark.soak

MANY = settings(max_examples=tries(200), deadline=None)
FEWER = settings(max_examples=tries(60), deadline=None)
VARIANTS = {
    **CONTENDERS,
    "no overtaking": Strategy(plan=overtaking(0)),
    "any overtaking": Strategy(plan=overtaking(math.inf)),
    "bar": Strategy(plan=with_bar),
    "no drain": Strategy(plan=without_drain),
    "no patience": Strategy(patience_s=0.0),
    "short keep-alive": Strategy(keep_alive_s=2.0),
}


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[Model], int]:
    """
    A few small models, and a capacity that holds each by itself.
    """
    models = [
        replace(
            model,
            weights_bytes=draw(st.integers(1, 6)),
            workspace_bytes=draw(st.integers(0, 3)),
            load_s=float(draw(st.integers(1, 5))),
            restore_s=draw(st.sampled_from([0.0, 0.25])),
        )
        for model in MODELS[: draw(st.integers(1, 4))]
    ]
    most = max(model.weights_bytes + model.workspace_bytes for model in models)
    total = sum(model.weights_bytes + model.workspace_bytes for model in models)
    return models, draw(st.integers(most, total))


def orders(most: int) -> st.SearchStrategy[list[int]]:
    """
    Which models are asked for; numbers are taken modulo how many there are.
    """
    return st.lists(st.integers(0, 11), min_size=1, max_size=most)


def timed(order: list[int], models: Sequence[Model]) -> list[Request]:
    """
    Requests in that order; times and services follow from the numbers.
    """
    return [
        Request(0.5 * place + number % 3, number % len(models), 0.25 + number % 5)
        for place, number in enumerate(order)
    ]


def all_subsets(n: int) -> Iterator[frozenset[int]]:
    """
    Every set of numbers below *n*.
    """
    for size in range(n + 1):
        yield from map(frozenset, itertools.combinations(range(n), size))


def by_brute_force(models: Sequence[Model], order: list[int], capacity: int) -> float:
    """
    The least load seconds when anything may be loaded or dropped before any request.
    """
    costs: dict[frozenset[int], float] = {frozenset(): 0.0}
    for wanted in order:
        following: dict[frozenset[int], float] = {}
        for after in all_subsets(len(models)):
            held = sum(models[place].weights_bytes for place in after)
            if wanted not in after or held + models[wanted].workspace_bytes > capacity:
                continue
            following[after] = min(
                cost + sum(models[place].load_s for place in after - before)
                for before, cost in costs.items()
            )
        costs = following
    return min(costs.values())


@MANY
@given(world=worlds(), order=orders(9))
def test_the_optimum_is_what_brute_force_finds(
    world: tuple[list[Model], int], order: list[int]
) -> None:
    """
    The program over sets agrees with a search that may do anything at any time.
    """
    models, capacity = world
    places = [number % len(models) for number in order]
    expected = by_brute_force(models, places, capacity)
    assert least_load_s(models, places, capacity) == pytest.approx(expected)


def test_the_optimum_refuses_what_it_cannot_hold() -> None:
    """
    Too many models for the program, or a model too large for the memory, is an error.
    """
    with pytest.raises(ValueError, match="17 models"):
        least_load_s(MODELS[: MAX_MODELS + 1], [0], 10**12)
    with pytest.raises(ValueError, match="larger than the memory"):
        least_load_s(MODELS[:1], [0], 1)
    with pytest.raises(ValueError, match="do not fit"):
        Simulation(MODELS[:1], 1, Strategy())


@FEWER
@given(world=worlds(), order=orders(40))
def test_no_rules_beat_the_optimum(
    world: tuple[list[Model], int], order: list[int]
) -> None:
    """
    Whatever decides, a single caller waits at least as long as the optimum says.
    """
    models, capacity = world
    requests = timed(order, models)
    least_s = least_load_s(models, [each.model for each in requests], capacity)
    for name, strategy in VARIANTS.items():
        report = Simulation(models, capacity, strategy).run(callers=[requests])
        assert report.load_s >= least_s - 1e-9, name
        assert sum(report.waits_s) == pytest.approx(report.load_s), name


class Recording(Simulation):
    """
    A simulation that remembers who was served.
    """

    served: list[tuple[float, int]]

    def _grant(self, asked: Asked, lease: Lease) -> None:
        self.served.append((asked.since_s, asked.spec.model))
        super()._grant(asked, lease)


class RecordingFifo(Recording, StrictFifo):
    """
    Likewise, where nobody passes anybody.
    """


@FEWER
@given(world=worlds(), order=orders(60), ram_bytes=st.integers(0, 12))
def test_each_request_is_served_once_and_within_the_memory(
    world: tuple[list[Model], int], order: list[int], ram_bytes: int
) -> None:
    """
    Under all rules, all at once: nobody is lost or served twice, and nothing overflows.
    """
    models, capacity = world
    requests = sorted(timed(order, models))
    expected = Counter((request.at_s, request.model) for request in requests)
    for name, strategy in VARIANTS.items():
        simulation = Recording(models, capacity, strategy, Host(ram_bytes))
        simulation.served = []
        report = simulation.run(requests)
        assert Counter(simulation.served) == expected, name
        assert report.peak_bytes <= capacity, name
        assert report.requests == len(requests), name


class Acting(Simulation):
    """
    A simulation that remembers all loads and unloads.
    """

    acts: list[tuple[float, str, ModelKey]]

    def _load(self, entry: Entry) -> None:
        self.acts.append((self._now_s, "load", entry.key))
        super()._load(entry)

    def _unload(self, entry: Entry) -> None:
        self.acts.append((self._now_s, "unload", entry.key))
        super()._unload(entry)


PLAIN = {
    "lru": Strategy(),
    "gap": Strategy(POLICIES["gap"]),
    "no patience": Strategy(patience_s=0.0),
    "short keep-alive": Strategy(keep_alive_s=2.0, patience_s=1.0),
}


@MANY
@given(world=worlds(), order=orders(80), name=st.sampled_from(sorted(PLAIN)))
def test_a_walk_past_some_decides_as_a_plan_of_the_whole_queue(
    world: tuple[list[Model], int], order: list[int], name: str
) -> None:
    """
    The scheduler looks at few of those that wait, and does the same at the same times.
    """
    models, capacity = world
    requests = sorted(timed(order, models))
    reports, acts = [], []
    for plan in (None, admission.plan):
        strategy = replace(PLAIN[name], plan=plan)
        simulation = Acting(models, capacity, strategy)
        simulation.acts = []
        reports.append(simulation.run(requests))
        acts.append(simulation.acts)
    assert acts[0] == acts[1]
    # Hits beside the queue are granted without a place in it, so waits are not listed.
    new, plain = (each._replace(waits_s=[]) for each in reports)
    assert new == plain


@FEWER
@given(world=worlds(), order=orders(40))
def test_strict_fifo_serves_in_the_order_of_arrival(
    world: tuple[list[Model], int], order: list[int]
) -> None:
    """
    The baseline is what its name says.
    """
    models, capacity = world
    simulation = RecordingFifo(models, capacity, Strategy())
    simulation.served = []
    simulation.run(sorted(timed(order, models)))
    since = [since_s for since_s, _ in simulation.served]
    assert since == sorted(since)
    assert len(since) == len(order)


MIB = 1024**2


class SlowLoader(FakeLoader):
    """
    Loads take as long as the model says.
    """

    load_s_of: Mapping[str, float]
    fake_clock: FakeClock

    def load(self, key: ModelKey, files: ModelFiles) -> LoadedModel:
        """
        Take the time, then the memory.
        """
        self.fake_clock.tick(self.load_s_of[key.model])
        return super().load(key, files)


def by_the_cache(
    models: Sequence[Model], requests: Sequence[Request], capacity: int, policy: str
) -> list[tuple[str, int]]:
    """
    What a real cache loads and evicts, in order, for one caller.
    """
    names = [f"fake/model-{place}" for place in range(len(models))]
    machine = FakeMachine({"cpu": "1TiB", "cuda:0": "1TiB"})
    weights = [model.weights_bytes for model in models]
    loader = SlowLoader(machine, sizes=dict(zip(names, weights, strict=True)))
    loader.workspace_bytes = models[0].workspace_bytes
    loader.fake_clock = clock = FakeClock(0.0)
    loads_s = [model.load_s for model in models]
    loader.load_s_of = dict(zip(names, loads_s, strict=True))
    done: list[tuple[str, int]] = []

    def note(event: Event) -> None:
        if isinstance(event, ModelLoaded | ModelEvicted):
            word = "load" if isinstance(event, ModelLoaded) else "unload"
            done.append((word, names.index(event.key.model)))

    with ModelCache(
        vram=capacity,
        keep_alive=60,
        policy=policy,  # type: ignore[arg-type]
        loader=loader,
        probe=machine,
        clock=clock,
    ) as cache:
        cache.subscribe(note)
        for request in requests:
            clock.tick(max(0.0, request.at_s - clock.now()))
            settle(cache)
            with cache.lease(names[request.model], device="cuda"):
                clock.tick(request.service_s)
        settle(cache)
        return done.copy()  # what closing evicts is another matter


class Noting(Simulation):
    """
    A simulation that notes what it loads and unloads.
    """

    done: list[tuple[str, int]]

    def _loaded(self, entry: Entry) -> None:
        self.done.append(("load", self._entries.index(entry)))
        super()._loaded(entry)

    def _unloaded(self, entry: Entry) -> None:
        self.done.append(("unload", self._entries.index(entry)))
        super()._unloaded(entry)


@pytest.mark.parametrize("policy", ["lru", "gap"])
@pytest.mark.parametrize("workload", ["zipf", "sweep", "jobs"])
def test_the_simulator_does_what_the_cache_does(workload: str, policy: str) -> None:
    """
    One caller, the same requests: the same loads and evictions in the same order.
    """
    [cell] = [
        cell
        for cell in cells([], n_models=8, n_requests=60, seeds=1)
        if cell.workload == workload and cell.share == 0.5
    ]
    models = [replace(model, workspace_bytes=300 * MIB) for model in cell.models]
    capacity, requests = cell.capacity_bytes, cell.requests
    strategy = Strategy(POLICIES[policy], keep_alive_s=60.0)
    simulation = Noting(models, capacity, strategy)
    simulation.done = []
    simulation.run(callers=[requests])
    found = by_the_cache(models, requests, capacity, policy)
    assert len(found) >= 30
    assert simulation.done[: len(found)] == found


def test_a_plan_that_ignores_the_room_is_caught() -> None:
    """
    Negative control: who loads without making room trips over the ledger.
    """

    def reckless(
        queue: Sequence[Pending],
        rooms: Mapping[str, Room],
        idle: Callable[[str], Iterable[Resident]],
        busy: Callable[[str], Iterable[Resident]],
    ) -> list[Decision]:
        del rooms, idle, busy
        return [Decision(Outcome.LOAD) for _ in queue]

    models = [replace(m, weights_bytes=3, workspace_bytes=0) for m in MODELS[:2]]
    requests = [Request(0.0, 0, 1.0), Request(20.0, 1, 1.0)]
    simulation = Simulation(models, 5, Strategy(plan=reckless))
    with pytest.raises(AssertionError):
        simulation.run(requests)


def test_a_plan_that_never_loads_is_caught() -> None:
    """
    Negative control: a request that is never served does not go unnoticed.
    """

    def idler(
        queue: Sequence[Pending],
        rooms: Mapping[str, Room],
        idle: Callable[[str], Iterable[Resident]],
        busy: Callable[[str], Iterable[Resident]],
    ) -> list[Decision]:
        del rooms, idle, busy
        return [Decision(Outcome.HELD) for _ in queue]

    simulation = Simulation(MODELS[:1], 10**10, Strategy(plan=idler))
    with pytest.raises(AssertionError, match="for ever"):
        simulation.run([Request(0.0, 0, 1.0)])


@pytest.mark.parametrize("patience_s", [0.0, 5.0, 30.0])
def test_nobody_starves(patience_s: float) -> None:
    """
    Against sixteen callers of two models that fill the card, the caller of a third is
    served within the patience, the longest lease and its own load.
    """
    report = starve(Strategy(patience_s=patience_s))
    assert report.longest_s[2] <= patience_s + LONGEST_LEASE_S + LOAD_S


@pytest.mark.parametrize("plan", [admission.plan, with_bar])
def test_nobody_starves_in_a_crowd(plan: Planner) -> None:
    """
    Nor do the loads of others, for which there is room, keep that caller waiting.
    """
    report = starve(Strategy(plan=plan, patience_s=5.0), crowd=8)
    assert report.longest_s[2] <= 5.0 + LONGEST_LEASE_S + LOAD_S


@pytest.mark.parametrize(
    "strategy",
    [Strategy(patience_s=math.inf), Strategy(plan=without_drain, patience_s=5.0)],
    ids=["patience without end", "nothing is drained"],
)
def test_without_draining_the_one_would_starve(strategy: Strategy) -> None:
    """
    Negative control: the hammering alone keeps the third waiting until it is over.
    """
    waited_s = starve(strategy, hammering_s=200.0).longest_s[2]
    assert waited_s > 100.0


@pytest.mark.parametrize("randomly", [False, True], ids=["in turn", "by chance"])
def test_two_models_that_do_not_fit_together_are_served_model_by_model(
    *, randomly: bool
) -> None:
    """
    Sixteen callers of two models cost a fifth of the swaps of strict FIFO, at most, and
    nobody waits for longer than the patience, a lease and two loads.
    """
    strategy = Strategy(patience_s=5.0)
    ours = alternate(strategy, randomly=randomly, n=200)
    strict = alternate(strategy, randomly=randomly, strict=True, n=200)
    assert ours.requests == strict.requests == 3200
    assert 5 * ours.swaps_per_1000 <= strict.swaps_per_1000
    assert ours.wait_s(0.99) <= 5.0 + 1.5 + 2 * LOAD_S
    assert ours.wait_s(0.99) < strict.wait_s(0.99)


def test_strict_fifo_swaps_for_almost_every_request_in_turn() -> None:
    """
    Negative control: it is the passing that saves the swaps.
    """
    assert alternate(Strategy(), strict=True, n=200).swaps_per_1000 > 800


def test_without_the_keep_pass_all_leave_up_to_the_last_that_is_needed() -> None:
    """
    The baseline takes victims in order, where the real plan spares the first.
    """
    idle = [
        Resident(model.key, CARD, n_bytes, 0.0, 0.0, 1.0)
        for model, n_bytes in zip(MODELS, (1, 5, 2), strict=False)
    ]
    queue = [Pending((MODELS[3].key,), Need.LOAD, (Demand(CARD, 5, 1),))]
    for plan, expected in ((admission.plan, idle[1:2]), (without_keep, idle[:2])):
        rooms = {CARD: Room(8, 8, charged_bytes=8, models=3)}
        [decision] = plan(queue, rooms, lambda _: idle, lambda _: ())
        assert decision.victims == tuple(expected)


def test_copies_in_host_ram_replace_loads() -> None:
    """
    A model that was evicted comes back from its copy, at the price of the copy.
    """
    models = [
        replace(m, weights_bytes=3, workspace_bytes=1, load_s=10.0, restore_s=1.0)
        for m in MODELS[:2]
    ]
    requests = [Request(0.0, place % 2, 1.0) for place in range(6)]
    without = Simulation(models, 5, Strategy()).run(callers=[requests])
    copies = Simulation(models, 5, Strategy(), Host(6)).run(callers=[requests])
    too_few = Simulation(models, 5, Strategy(), Host(2)).run(callers=[requests])
    assert without.load_s == too_few.load_s == 60.0
    # Two from their files, four restored, and each copied once.
    assert (copies.loads, copies.restores) == (6, 4)
    assert copies.load_s == 2 * 10.0 + 4 * 1.0 + 2 * 1.0


def test_under_pressure_duplicates_leave_host_ram_first() -> None:
    """
    A copy of what is on the card makes room for the copy of what leaves it.
    """
    models = [
        replace(m, weights_bytes=3, workspace_bytes=0, load_s=10.0, restore_s=1.0)
        for m in MODELS[:4]
    ]
    # When 3 comes and 2 leaves, there are copies of 1, which is nowhere else, and of 0,
    # which was restored. Then 1 is restored too.
    requests = [Request(0.0, place, 1.0) for place in (0, 1, 2, 0, 3, 1)]
    report = Simulation(models, 6, Strategy(), Host(6)).run(callers=[requests])
    assert report.restores == 2


def filed(models: Sequence[Model]) -> list[Model]:
    """
    The same models with files as large as they are: of a load's 10 s, 8 are reading.
    """
    return [
        replace(
            model,
            load_s=10.0,
            read_s=8.0,
            warm_load_s=3.0,
            file_bytes=model.weights_bytes,
        )
        for model in models
    ]


def three_files(page_bytes: int) -> tuple[Disk, list[Model]]:
    """
    A disk with three files of 3 B.
    """
    models = filed([replace(model, weights_bytes=3) for model in MODELS[:3]])
    return Disk(page_bytes), models


@FEWER
@given(world=worlds(), order=orders(60))
def test_without_a_page_cache_reading_ahead_changes_nothing(
    world: tuple[list[Model], int], order: list[int]
) -> None:
    """
    With no room for pages, each load reads the disk, whatever was asked for.
    """
    models, capacity = filed(world[0]), world[1]
    requests = timed(order, models)
    places = tuple(range(len(models)))
    plain = Simulation(models, capacity, Strategy()).run(requests)
    reading = Strategy(reads_ahead=True)
    host = Host(page_bytes=0, preloaded=places)
    assert Simulation(models, capacity, reading, host).run(requests) == plain
    assert plain.load_s == 10.0 * plain.loads


@FEWER
@given(world=worlds(), order=orders(60), is_preloaded=st.booleans())
def test_a_page_cache_for_everything_reads_each_file_once(
    world: tuple[list[Model], int], order: list[int], *, is_preloaded: bool
) -> None:
    """
    A file is cold for its first load at most, and for none if it was preloaded.
    """
    models, capacity = filed(world[0]), world[1]
    requests = timed(order, models)
    page_bytes = sum(model.file_bytes for model in models)
    places = tuple(range(len(models))) if is_preloaded else ()
    host = Host(page_bytes=page_bytes, preloaded=places)
    report = Simulation(models, capacity, Strategy(), host).run(callers=[requests])
    cold = 0 if is_preloaded else len({request.model for request in requests})
    assert report.load_s == 10.0 * cold + 3.0 * (report.loads - cold)


MOVES = st.lists(
    st.tuples(st.sampled_from(["ask", "load"]), st.integers(0, 2), st.integers(0, 12)),
    max_size=30,
)


def load_seconds(
    moves: list[tuple[str, int, int]], page_bytes: int, *, asks: bool
) -> list[float]:
    """
    How long each load takes; one begins when the one before has ended.
    """
    disk, entries = three_files(page_bytes)
    now_s, loads_s = 0.0, []
    for what, place, later_s in moves:
        now_s += later_s
        if what == "load":
            loads_s.append(disk.load_s(entries[place], now_s))
            now_s += 10.0
        elif asks:
            disk.ask(entries[place], now_s)
    return loads_s


@MANY
@given(moves=MOVES, page_bytes=st.integers(0, 10))
def test_reading_ahead_never_makes_a_load_slower(
    moves: list[tuple[str, int, int]], page_bytes: int
) -> None:
    """
    A load takes as long as a cold one at most and as a warm one at least; and where no
    file pushes out another, none takes longer than without reading ahead.
    """
    ahead_s = load_seconds(moves, page_bytes, asks=True)
    assert all(3.0 <= load_s <= 10.0 for load_s in ahead_s)
    if page_bytes >= 9:
        plain_s = load_seconds(moves, page_bytes, asks=False)
        assert all(a <= b for a, b in zip(ahead_s, plain_s, strict=True))


def test_a_load_gains_what_was_read_until_then() -> None:
    """
    Five of eight seconds of reading ahead are five seconds less of a load, however
    often the file was asked for.
    """
    disk, [first, second, _] = three_files(9)
    disk.ask(first, 1.0)
    disk.ask(first, 4.0)
    assert disk.load_s(first, 6.0) == 5.0
    disk.ask(second, 20.0)
    assert disk.load_s(second, 40.0) == 3.0


def test_a_disk_faster_than_the_page_cache_decides() -> None:
    """
    A load that is quicker from the disk is no slower for a file in the page cache.
    """
    [model] = filed([replace(MODELS[0], weights_bytes=3)])
    fast = replace(model, load_s=2.0, read_s=1.0)
    disk = Disk(3)
    assert [disk.load_s(fast, at_s) for at_s in (0.0, 10.0)] == [2.0, 2.0]


def test_a_load_reads_before_what_was_asked_for() -> None:
    """
    What is read ahead waits while the file of a load is read, and goes on after.
    """
    disk, [first, second, third] = three_files(9)
    disk.ask(first, 0.0)
    disk.ask(second, 0.0)
    assert disk.load_s(third, 4.0) == 10.0  # reads until 12
    # Until 16 the other half of the first is read, until 18 a quarter of the second.
    assert disk.load_s(second, 18.0) == 8.0
    assert disk.load_s(first, 18.0) == 3.0


def test_the_file_read_longest_ago_leaves_the_page_cache() -> None:
    """
    A load counts as reading, also if it finds its file in memory.
    """
    disk, [first, second, third] = three_files(6)
    order = (first, second, first, third, first, second)
    loads_s = [disk.load_s(entry, 10.0 * at) for at, entry in enumerate(order)]
    assert loads_s == [10.0, 10.0, 3.0, 10.0, 3.0, 10.0]


def test_what_is_wanted_most_is_preloaded_as_far_as_it_fits() -> None:
    """
    What finds no room is passed over, and what is wanted least leaves first.
    """
    sizes = (4, 5, 2, 3)
    models = filed([replace(MODELS[0], weights_bytes=size) for size in sizes])
    disk = Disk(7)
    disk.fill(models)  # 4 B and 2 B; nothing else fits beside these
    order = (3, 0, 2)  # the 3 B take the room of the 2 B
    loads_s = [disk.load_s(models[place], 10.0 * i) for i, place in enumerate(order)]
    assert loads_s == [10.0, 3.0, 10.0]


def test_a_file_is_read_while_its_model_waits_for_room() -> None:
    """
    A request that waits for the end of a lease finds its file in memory after that.
    """
    models = filed([replace(m, weights_bytes=3, workspace_bytes=0) for m in MODELS[:2]])
    requests = [Request(0.0, 0, 20.0), Request(11.0, 1, 1.0)]
    host = Host(page_bytes=6)
    for reads_ahead, load_s in ((False, 10.0), (True, 3.0)):
        strategy = Strategy(reads_ahead=reads_ahead)
        report = Simulation(models, 3, strategy, host).run(requests)
        assert report.waits_s == [10.0, 19.0 + load_s]


class Ordered(Simulation):
    """
    A simulation whose thread has two things to do, each for a second.
    """

    def ends(self) -> list[str]:
        """
        What ends in which order, with something else at the end of the second.
        """
        found: list[str] = []
        for name in ("first", "second"):
            self._on_thread(lambda: 1.0, partial(found.append, name))
        self._at(2.0, partial(found.append, "later"))
        self.run()
        return found


def test_of_what_happens_at_once_the_first_asked_for_comes_first() -> None:
    """
    What the thread was given before something else was planned ends before that.
    """
    ends = Ordered(MODELS[:1], 10**10, Strategy()).ends()
    assert ends == ["first", "second", "later"]


def test_what_is_popular_is_what_was_asked_for_most() -> None:
    """
    The order of preloading follows from the requests; all models are in it.
    """
    requests = [Request(0.0, place, 1.0) for place in (2, 1, 2, 0, 2, 1)]
    cell = Cell("example", 1.0, MODELS[:4], requests)
    assert cell.by_popularity == (2, 1, 0, 3)


def test_a_faster_disk_gains_by_its_reading_alone() -> None:
    """
    A load from it takes less by what reading takes less; a warm one takes as long.
    """
    for model in MODELS:
        fast = on_disk(model, 2 * model.file_bytes / model.read_s)
        assert fast.load_s == pytest.approx(model.load_s - model.read_s / 2)
        assert fast.warm_load_s == model.warm_load_s < fast.load_s


def test_slots_hold_one_more_than_their_name_says() -> None:
    """
    ``lru_cache(maxsize=2)`` has three models at its peak.
    """
    models = [replace(m, weights_bytes=3, workspace_bytes=1) for m in MODELS[:3]]
    requests = [Request(0.0, place, 1.0) for place in (0, 1, 0, 2, 0, 1)]
    result = slots(models, requests, 2)
    assert result.peak_bytes == 9
    loads_s = [models[place].load_s for place in (0, 1, 2, 1)]
    assert result.load_s == pytest.approx(sum(loads_s))


def test_a_wait_is_that_of_a_share_of_all_requests() -> None:
    """
    Those who did not wait count too.
    """
    waits_s = [1.0, 2.0, 3.0]
    report = Report(10, 7, 3, 0, 0, 6.0, waits_s, [3.0], 1, 9.0, [waits_s], [9.0], 0)
    assert [report.wait_s(share) for share in (0.5, 0.7, 0.8, 0.99)] == [0, 0, 1, 3]
    assert report.stall_s_per_1000 == 600.0
    assert report.hit_ratio == 0.7


def test_people_wait_for_a_segment_of_a_batch_and_not_for_a_film() -> None:
    """
    And the films hardly take longer: both in each of three nights.
    """
    for seed in range(3):
        before, after = (
            night(seed, 180.0, workers=1, host=NOTHING, are_batches=each)
            for each in (False, True)
        )
        assert len(before.waits_by_model[0]) == len(after.waits_by_model[0])
        assert p95_s(after) <= 0.25 * p95_s(before)
        assert films_end_s(before) >= 0.95 * films_end_s(after)
        assert after.stops


@pytest.mark.parametrize("workload", WORKLOADS)
def test_two_runs_of_a_workload_are_the_same(workload: str) -> None:
    """
    Seeds decide everything, and each workload asks for several of its models in time.
    """
    chosen = [
        [
            cell.together(Strategy())
            for cell in cells([], n_models=16, n_requests=400, seeds=1)
            if cell.workload == workload and cell.share == 0.5
        ]
        for _ in range(2)
    ]
    assert chosen[0] == chosen[1]
    assert chosen[0][0].requests == 400
    assert chosen[0][0].loads > 2


def test_a_trace_is_read_from_its_file(tmp_path: Path) -> None:
    """
    A CSV file becomes requests, and a workload of its own.
    """
    file = tmp_path / "trace.csv"
    file.write_text("t_seconds,key_id,service_seconds\n2.5,1,0.5\n1.0,0,3\n")
    trace = read_trace(file)
    assert trace == [Request(1.0, 0, 3.0), Request(2.5, 1, 0.5)]
    [first, *_] = cells(trace, n_models=16, n_requests=5, seeds=1)
    assert (first.workload, first.requests) == ("azure", trace)
