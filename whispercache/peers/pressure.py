"""
Memory pressure: a cache looks regularly at what others need on its devices.

Other programs allocate and free memory without notice, so the cache reads the gauges.
Other caches publish in a ledger what they wait for, and this one evicts idle models for
them.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from typing import TYPE_CHECKING

from whispercache.errors import WhisperCacheError

from .ledger import Ledger, bytes_to_free
from .places import default_directory, given_directory

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from whispercache.core.core import Core
    from whispercache.core.device import Device
    from whispercache.devices.memory import MemoryProbe

    from .ledger import Account

_log = logging.getLogger("whispercache")

# Seconds between readings of the gauges; one takes microseconds.
WATCH_S = 1.0

# Seconds between readings of the ledgers, and the longest that a request goes unseen.
LEDGER_S = 0.25

# Most seconds to wait for another process that loads.
#
# The turn of a process ends with it, but one that is stuck would stop all others. A
# first load that compiles kernels takes 30 seconds.
TURN_S = 120.0


# Errors that keep a ledger from being used: of its files, or a device without UUID.
NO_LEDGER = (OSError, WhisperCacheError)


class LedgerPeers:
    """
    The other processes of this machine that coordinate through one directory's ledgers,
    by default those of this user.

    Where the ledger cannot be read or written, the cache logs that and goes on without.
    The methods are those of `core.gauges.Peers`.
    """

    def __init__(
        self, probe: MemoryProbe, directory: str | os.PathLike[str] | None = None
    ) -> None:
        self._probe = probe
        self._directory = (
            default_directory() if directory is None else given_directory(directory)
        )
        self._ledgers: dict[str, Ledger] = {}
        self._told: set[str] = set()

    def promised_bytes(self, device: str) -> int:
        return sum(account.promised_bytes for account in self._others(device))

    def held_bytes(self, device: str) -> int:
        return sum(account.held_bytes for account in self._others(device))

    @contextlib.contextmanager
    def turn(self, device: str) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            # Turns avoid two loads that both count on the same free bytes. A load
            # without one may fail for lack of memory, and is then tried once more.
            try:
                has_turn = stack.enter_context(self._ledger(device).turn(TURN_S))
            except NO_LEDGER as error:
                _log.warning("loading to %s out of turn: %s", device, error)
            else:
                if not has_turn:
                    _log.warning(
                        "loading to %s out of turn: another process has been loading "
                        "for more than %.0f s",
                        *(device, TURN_S),
                    )
            yield

    def publish(self, device: str, numbers: dict[str, int]) -> Account | None:
        with self._telling(f"the ledger of {device} cannot be written"):
            return self._ledger(device).publish(**numbers)
        return None

    def bytes_to_free(self, device: str, own: Account, free_bytes: int) -> int:
        """
        Returns how many idle bytes should be evicted for the others.
        """
        return bytes_to_free(own, self._others(device), free_bytes)

    def close(self) -> None:
        for ledger in list(self._ledgers.values()):
            try:
                ledger.close()
            except OSError as error:
                _log.warning("an account was not removed: %s", error)

    def _ledger(self, device: str) -> Ledger:
        ledger = self._ledgers.get(device)
        if ledger is None:
            # Processes may number their cards differently.
            device_id = self._probe.device_id(device)
            ledger = self._ledgers.setdefault(
                device, Ledger(self._directory, device_id)
            )
        return ledger

    def _others(self, device: str) -> tuple[Account, ...]:
        with self._telling(f"the ledger of {device} cannot be read"):
            return self._ledger(device).others()
        return ()

    @contextlib.contextmanager
    def _telling(self, problem: str) -> Iterator[None]:
        """
        Logs a problem with the ledger when it begins, not at each look.
        """
        try:
            yield
        except NO_LEDGER as error:
            if problem not in self._told:
                self._told.add(problem)
                _log.warning("%s: %s", problem, error)
        else:
            self._told.discard(problem)


def look_after(core: Core, *, watches: bool, peers: LedgerPeers | None) -> None:
    """
    Looks at the devices of *core* regularly, until it is closed or collected.
    """
    period_s = WATCH_S if peers is None else LEDGER_S
    # A strong reference would keep a cache alive that its program has dropped.
    forgotten = weakref.ref(core)

    def look() -> None:
        core = forgotten()
        if core is None:
            return
        # A closed cache may still hold leased models, which others wait for.
        if core.is_closed and not any(core.uses(each) for each in core.all_devices()):
            return
        try:
            for device in core.all_devices():
                _look(core, device, watches=watches, peers=peers)
        finally:
            core.clock.call_at(core.clock.now() + period_s, look)

    core.clock.call_at(core.clock.now() + period_s, look)


def _look(
    core: Core, device: Device, *, watches: bool, peers: LedgerPeers | None
) -> None:
    if not core.uses(device):
        # Published all the same, or a wish that was given up would stay.
        if peers is not None:
            peers.publish(device.name, core.account(device))
        return
    try:
        reading = core.probe.read(device.name)
    # A gauge that fails for a moment stops nothing, whatever it raises.
    except Exception as error:
        _log.warning("free memory of %s is unknown: %s", device.name, error)
        return
    core.gauges.take_in(device, reading)
    spare_bytes = device.budget.usable_bytes(reading)
    wanted_bytes = max(0, -spare_bytes) if watches else 0
    if peers is not None:
        account = peers.publish(device.name, core.account(device))
        if account is not None:
            # One eviction may serve both, hence the larger number and not the sum.
            asked_bytes = peers.bytes_to_free(device.name, account, spare_bytes)
            wanted_bytes = max(wanted_bytes, asked_bytes)
    core.make_room_for_others(device, wanted_bytes)
    # Host copies yield to other programs without ``pressure="watch"``, too.
    if not watches and device.name == "cpu":
        core.drop_copies(-spare_bytes)
