"""
Hits: the usual case of a lease and its end, which decides as the scheduler does.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import astuple
from typing import TYPE_CHECKING, ClassVar

import pytest

from whispercache import CacheClosed, ModelCache, WhisperCacheError, Workload
from whispercache.core import core as core_module
from whispercache.core.waiters import Wanted
from whispercache.engine.sizes.footprint import DEFAULT_WORKLOAD
from whispercache.testing import FakeClock, FakeLoader, FakeMachine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from whispercache import Lease
    from whispercache.core.core import Core
    from whispercache.core.entries import Entry
    from whispercache.core.waiters import Waiter

GIB = 1 << 30
SIZES = {"tiny": GIB, "base": GIB, "small": 2 * GIB, "medium": 3 * GIB}
DEVICES = ("cuda:0", "cpu")
OWNERS = ("one", "two", "three", None)
STEPS = 250


class Turns:
    """
    A device's thread whose calls are made by the test.
    """

    all: ClassVar[deque[Callable[[], None]]] = deque()

    def __init__(self, device: str) -> None:
        self.device = device

    def submit(self, call: Callable[[], None]) -> None:
        """
        Notes a call.
        """
        self.all.append(call)

    def is_current(self) -> bool:
        """
        All is done on one thread.
        """
        return True

    def stop(self) -> None:
        """
        Nothing is left to do.
        """

    def join(self, timeout_s: float | None) -> None:
        """
        Nothing is left to wait for.
        """


class Play:
    """
    A cache, and what a history has left there so far.

    Args:
        policy: Of the cache.
        is_quick: It has hits; else the scheduler decides on each.
    """

    def __init__(self, policy: str, *, is_quick: bool) -> None:
        machine = FakeMachine(dict.fromkeys(DEVICES, 64 * GIB))
        loader = FakeLoader(machine, sizes=SIZES, workspace_bytes=GIB // 8)
        self.clock = FakeClock()
        self.cache = ModelCache(
            vram="5GiB",
            ram="5GiB",
            keep_alive=20,
            patience_s=5,
            policy=policy,  # type: ignore[arg-type]
            loader=loader,
            probe=machine,
            clock=self.clock,
        )
        self.core = self.cache._core
        self.leases: list[Lease] = []
        self.waiters: list[Waiter] = []
        self.spares: list[Callable[[], None]] = []
        # Leases that the scheduler was not asked for, alone and beside others.
        self.quick = [0, 0]
        self._asked = 0
        decide = self.core.scheduler.hit

        def count(*args: object) -> Lease | None:
            self._asked += 1
            return decide(*args)  # type: ignore[arg-type]

        self.core.scheduler.hit = count  # type: ignore[method-assign,assignment]
        if not is_quick:
            _leave_to_the_scheduler(self.core)

    def entry(self, name: str, device: str, workers: int, work: Workload) -> Entry:
        """
        Returns a model, located.
        """
        options = [("num_workers", workers)] if workers > 1 else []
        request = (name, device, "default", *options)
        target = self.cache._resolver.resolve(request)
        self.cache._resolver.locate(target, work)
        self.core.requests["it"] = target.entry  # type: ignore[index]
        return target.entry

    def lease(
        self,
        model: tuple[str, str, int],
        work: Workload,
        keep_alive_s: float | None,
        owner: str | None,
    ) -> None:
        """
        Asks for a lease, and queues if it is not to be had at once.
        """
        try:
            entry = self.entry(*model, work)
        except CacheClosed:
            return
        before, waiting = self._asked, len(self.core.queue)
        lease = self.core.hit("it", work, keep_alive_s, owner)  # type: ignore[arg-type]
        if lease is not None:
            self.leases.append(lease)
            self.quick[waiting > 0] += self._asked == before
            return
        try:
            waiter = self.core.request([Wanted(entry, work)], keep_alive_s, 30, owner)
        except WhisperCacheError:
            return
        self.waiters.append(waiter)

    def do(self, name: str, dice: random.Random) -> None:
        """
        Makes one step.
        """
        lease = dice.choice(self.leases) if self.leases else None
        if lease is not None:
            self._do_with(lease, name, dice)
        match name:
            case "end spare" if self.spares:
                self.spares.pop()()
            case "lease":
                model = dice.choice(list(SIZES)), dice.choice(DEVICES)
                works = (*[DEFAULT_WORKLOAD] * 4, Workload(batch_size=4))
                self.lease(
                    (*model, dice.choice((1, 1, 2))),
                    dice.choice(works),
                    dice.choice((None, None, None, 0.0, 3.0)),
                    dice.choice(OWNERS),
                )
            case "unpin":
                self.cache.unpin()
            case "evict":
                model_name = dice.choice(list(SIZES))
                self.core.evict(lambda key: key.model == model_name)
            case "abandon" if self.waiters:
                waiter = dice.choice(self.waiters)
                self.waiters.remove(waiter)
                self.core.abandon(waiter)
            case "tick":
                self.clock.tick(dice.choice((0.01, 0.1, 1.0, 6.0, 21.0)))
            case "resize":
                vram, most = dice.choice(("3GiB", "5GiB", "7GiB")), (None, None, 2)
                self.cache.resize(vram=vram, max_models=dice.choice(most))
            case "close":
                self.core.close()
        self.rest()

    def _do_with(self, lease: Lease, name: str, dice: random.Random) -> None:
        match name:
            case "release":
                self.leases.remove(lease)
                lease.release()
                lease.release()
            case "hand over":
                lease.hand_over(dice.choice(OWNERS))
            case "pin":
                lease.pin()
            case "spare":
                self.spares.append(lease.spare())

    def rest(self) -> None:
        """
        Does what the devices' threads have to do, and takes the leases granted.
        """
        while Turns.all:
            Turns.all.popleft()()
        for waiter in [each for each in self.waiters if each.future.done()]:
            self.waiters.remove(waiter)
            if not waiter.future.cancelled() and waiter.future.exception() is None:
                self.leases.extend(waiter.future.result())

    def books(self) -> dict[str, object]:
        """
        Returns all that is known of models, devices and requests.
        """
        state = self.core.state
        return {
            **{str(entry.key): _of_model(entry) for entry in state.entries.values()},
            **{name: _of_device(self.core, name) for name in state.devices},
            "leases": [(str(e.key), e._serial) for e in self.leases],
            "waiting": [str(waiter) for waiter in state.queue],
            "held": state.queue.held,
            "suspects": state.queue.suspects,
            "timers": state.timers_s,
            "stats": self.cache.stats(),
        }

    def end(self) -> None:
        """
        Ends all leases.
        """
        for waiter in self.waiters:
            self.core.abandon(waiter)
        for lease in self.leases:
            lease.release()
        self.rest()


def _of_model(entry: Entry) -> tuple[object, ...]:
    used = entry.last_used_s, entry.expires_at_s, entry.reminder_s, entry.gap_s
    work = [entry.workspace_of_lease(serial) for serial in entry.leases]
    return entry.state, entry.leases, work, entry.workspace_bytes, entry.pinned, used


def _of_device(core: Core, name: str) -> tuple[object, ...]:
    device = core.devices[name]
    budget = device.budget
    racks = device.shelf, device.pinned, device.spared
    order = [[str(entry.key) for entry in rack] for rack in racks]
    charged = budget.charged_bytes, budget.work_bytes
    peaks = budget.peak_bytes, budget.work_peak_bytes
    looks = device.is_stale, device.look_at_s, device.looked_s
    idle = order, device.idle_bytes
    return idle, charged, peaks, looks, astuple(device.outlook)


def _leave_to_the_scheduler(core: Core) -> None:
    def hit(
        request: object, work: Workload, keep_alive_s: float | None, owner: object
    ) -> Lease | None:
        entry = core.requests[request]  # type: ignore[index]
        with core.changing():
            return core.scheduler.hit(entry, work, keep_alive_s, owner)

    def release(entry: Entry, serial: int, keep_alive_s: float | None) -> None:
        with core.changing():
            core.scheduler.release(entry, serial, keep_alive_s)

    core.hit = hit
    core.release = release


@pytest.fixture
def plays(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[tuple[Play, Play]]:
    """
    Two that are alike but for the way in which they hit.
    """
    monkeypatch.setattr(core_module, "DeviceThread", Turns)
    made = [Play(request.param, is_quick=each) for each in (True, False)]
    yield made[0], made[1]
    for play in made:
        play.end()
        play.core.check()
        assert not play.core.state.leases


@pytest.mark.parametrize("plays", ["lru", "gap"], indirect=True)
@pytest.mark.parametrize("seed", range(12))
def test_hits_decide_as_the_scheduler_does(plays: tuple[Play, Play], seed: int) -> None:
    """
    Random histories leave the same leases and books with and without them.
    """
    dice = random.Random(seed)  # noqa: S311 - luck, not a secret
    usual = ["lease"] * 10 + ["release"] * 8 + ["tick"] * 3
    rare = [
        "hand over",
        "pin",
        "spare",
        "end spare",
        "unpin",
        "evict",
        "abandon",
        "resize",
    ]
    for step in range(STEPS):
        is_last = step == STEPS - 20
        name, luck = dice.choice(usual + rare), dice.random()
        name = "close" if is_last else name
        for play in plays:
            play.do(name, random.Random(luck))  # noqa: S311
        assert plays[0].books() == plays[1].books(), name
    plays[0].core.check()
    # The scheduler was not asked for many, alone or beside others.
    assert min(plays[0].quick) > 0
    assert plays[1].quick == [0, 0]
