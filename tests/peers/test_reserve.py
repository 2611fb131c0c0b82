"""
Reservations: room that caches make, and leave, for programs that know none of them.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from whispercache import DeviceUnavailable, EvictionCause, LeaseTimeout, ModelEvicted
from whispercache.devices.memory import (
    CUDA_HEADROOM_BYTES,
    CUDA_HEADROOM_MIN_BYTES,
    TOTAL_ONLY,
    MemoryReading,
)
from whispercache.peers import reserve as module
from whispercache.peers.ledger import Ledger
from whispercache.peers.places import default_directory
from whispercache.peers.reserve import NoRoomMade, Reservation
from whispercache.testing import FakeMachine, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tenants import Tenants

    from whispercache import Event, ModelCache

GIB = 1024**3
CARD = "cuda:0"
TOTAL = 10 * GIB + CUDA_HEADROOM_BYTES


class Program:
    """
    Another program, and what it holds of a card.
    """

    def __init__(self, machine: FakeMachine, n_bytes: int, pid: int) -> None:
        self.machine = machine
        self.held_bytes = 0
        place = default_directory()
        self.ledger = Ledger(place, machine.device_id(CARD), pid=pid)
        self.room = Reservation(
            n_bytes,
            CARD,
            ledger=self.ledger,
            probe=machine,
            held_bytes=lambda: self.held_bytes,
        )

    def hold(self, n_bytes: int) -> None:
        """
        Take memory of the card, or give some back.
        """
        self.machine.others(CARD, n_bytes)
        self.held_bytes = n_bytes

    def account(self) -> tuple[int, int]:
        """
        What it has told last: promised and wanted bytes.
        """
        account = self.ledger._own().last
        assert account is not None
        return account.promised_bytes, account.wanted_bytes


@pytest.fixture
def program(tenants: Tenants, machine: FakeMachine) -> Iterator[Program]:
    """
    A program that wants 4 GiB of a card.
    """
    assert tenants.caches
    assert machine.total_bytes[CARD] == TOTAL
    # Not of this process, whose own caches may take what is reserved for it.
    program = Program(machine, 4 * GIB, os.getppid())
    yield program
    program.ledger.close()


def names(cache: ModelCache) -> set[str]:
    """
    What is in memory.
    """
    return {info.key.model for info in cache.models() if info.state == "resident"}


def test_caches_make_the_room_that_is_missing_and_no_more(
    tenants: Tenants, program: Program
) -> None:
    """
    Idle models leave, for others; those that are not needed for it stay.
    """
    ours, theirs = tenants.caches
    theirs.preload("large-v3", CARD)
    theirs.preload("small", CARD)
    told: list[Event] = []
    for cache in tenants.caches:
        cache.subscribe(told.append)
    tenants.tick()
    room = program.room.look()
    assert not room.is_made
    free_bytes = TOTAL - 8 * GIB - CUDA_HEADROOM_MIN_BYTES
    assert program.account() == (free_bytes, 4 * GIB - free_bytes)
    assert "1 process holds 8.0 GiB that can leave, 8.0 GiB of it idle" in (
        room.in_words(CARD)
    )
    tenants.tick()
    assert program.room.look().is_made
    assert program.account() == (4 * GIB, 0)
    tenants.tick()
    assert (names(ours), names(theirs)) == (set(), {"small"})
    [evicted] = [each for each in told if isinstance(each, ModelEvicted)]
    assert evicted.cause is EvictionCause.PRESSURE


def test_caches_leave_the_room_until_the_program_holds_it(
    tenants: Tenants, program: Program
) -> None:
    """
    What it holds is not counted twice, and what it gives back is kept for it.
    """
    ours, _ = tenants.caches
    program.room.n_bytes = 5 * GIB
    assert program.room.look().is_made
    tenants.tick()
    with pytest.raises(LeaseTimeout):
        ours.lease("large-v3", CARD, timeout_s=0)
    program.hold(3 * GIB)
    program.room.look()
    assert program.account() == (2 * GIB, 0)
    tenants.tick()
    [device] = [each for each in ours.devices() if each.device == CARD]
    assert device.capacity_bytes == 5 * GIB
    program.hold(6 * GIB)
    program.room.look()
    assert program.account() == (0, 0)
    program.hold(0)
    program.room.look()
    assert program.account() == (5 * GIB, 0)


def test_what_others_took_of_the_room_is_asked_for_again(
    tenants: Tenants, program: Program, machine: FakeMachine
) -> None:
    """
    The promise is never more than there is.
    """
    assert program.room.look().is_made
    machine.others(CARD, 8 * GIB)
    assert not program.room.look().is_made
    free_bytes = TOTAL - 8 * GIB - CUDA_HEADROOM_MIN_BYTES
    assert program.account() == (free_bytes, 4 * GIB - free_bytes)
    assert tenants.caches


def test_it_says_what_it_waits_for_and_gives_up_in_time(
    tenants: Tenants, program: Program
) -> None:
    """
    With the numbers; nothing is asked for any more.
    """
    ours, _ = tenants.caches
    said: list[str] = []
    with ours.lease("large-v3", CARD), ours.lease("small", CARD):
        tenants.tick()
        with pytest.raises(
            NoRoomMade, match=r"no room for 4.0 GiB in time: 2.4 GiB can"
        ):
            program.room.make(0, said.append)
    assert len(said) == 1
    assert said[0].startswith("waiting for 4.0 GiB: 2.4 GiB can be had on cuda:0; 1 ")
    assert program.ledger._own().last is None


def test_it_says_that_nobody_is_there_who_could_make_room(
    machine: FakeMachine, tenants: Tenants
) -> None:
    """
    Whether there is room or not.
    """
    for cache in tenants.caches:
        cache.close()
    said: list[str] = []
    Program(machine, GIB, os.getppid()).room.make(0, said.append)
    assert "no process of whispercache's shares it" in said[0]
    machine.others(CARD, 9 * GIB)
    with pytest.raises(NoRoomMade, match="no process of whispercache's shares it"):
        Program(machine, 2 * GIB, os.getppid()).room.make(0, said.append)


def test_what_can_never_be_had_or_told_is_refused_at_once(
    machine: FakeMachine, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Nobody unloads anything for it.
    """
    large = Program(machine, 11 * GIB, os.getppid())
    with pytest.raises(NoRoomMade, match=r"can never be had on cuda:0, which has 10.4"):
        large.room.make(60, pytest.fail)
    assert large.ledger._own().last is None
    blind = MemoryReading(TOTAL, TOTAL, TOTAL_ONLY)
    monkeypatch.setattr(machine, "read", lambda _device: blind)
    with pytest.raises(DeviceUnavailable, match="is not known"):
        program.room.make(60, pytest.fail)


def test_two_reservations_are_made_one_after_the_other(
    tenants: Tenants, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Rather than each with half of what it needs.
    """
    for name in ("MAKE_S", "TURN_S"):
        monkeypatch.setattr(module, name, 0.01)
    machine.others(CARD, 6 * GIB)
    assert tenants.caches
    programs = [Program(machine, 5 * GIB, pid) for pid in (os.getppid(), 1)]
    made: list[Program] = []

    def make(program: Program) -> None:
        program.room.make(30, lambda _: None)
        made.append(program)

    threads = [threading.Thread(target=make, args=(each,)) for each in programs]
    for thread in threads:
        thread.start()
    wait_until(lambda: any(each.ledger._own().last for each in programs), "one waits")
    [waits] = [each for each in programs if each.ledger._own().last]
    machine.others(CARD, 0)
    wait_until(lambda: made == [waits], "it has its room")
    waits.ledger.close()
    for thread in threads:
        thread.join(30)
    assert len(made) == 2


def test_a_cache_may_take_what_is_reserved_for_its_own_process(
    tenants: Tenants, machine: FakeMachine
) -> None:
    """
    As when the program is one of whispercache's.
    """
    program = Program(machine, 6 * GIB, os.getpid())
    program.room.make(0, lambda _: None)
    ours, _ = tenants.caches
    tenants.tick()
    ours.preload("large-v3", CARD)
    program.ledger.close()


def test_it_ends_with_the_process_that_it_is_for(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, tenants: Tenants
) -> None:
    """
    A look that fails meanwhile ends nothing.
    """
    monkeypatch.setattr(module, "KEEP_S", 0.01)
    assert tenants.caches
    program = Program(machine, GIB, os.getppid())
    program.room.make(0, lambda _: None)
    is_alive = threading.Event()
    is_alive.set()
    monkeypatch.setattr(program.ledger, "is_owner_alive", is_alive.is_set)
    machine.reading_fails = OSError("for a moment")
    keeping: dict[str, Any] = {"target": program.room.keep}
    thread = threading.Thread(**keeping)
    thread.start()
    machine.reading_fails = None
    program.hold(GIB)
    wait_until(lambda: program.account() == (0, 0), "it looks again")
    is_alive.clear()
    thread.join(30)
    assert program.ledger._own().last is None
