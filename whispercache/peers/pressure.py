"""
Pressure: what a cache does for others on its devices, a look at a time.

Other programs take memory and give it back without a word, so it reads the gauges now
and then; other processes that keep models tell what they want in a ledger, and get it
from what is idle here.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from typing import TYPE_CHECKING

from whispercache.errors import WhisperCacheError

from .ledger import Ledger, bytes_to_free, default_directory

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from whispercache.core.core import Core
    from whispercache.core.entries import Device
    from whispercache.devices.memory import MemoryProbe

    from .ledger import Account

__all__ = ["LedgerPeers", "look_after"]

_log = logging.getLogger("whispercache")

WATCH_S = 1.0
"""
Seconds between looks at the gauges; a look takes microseconds.
"""

LEDGER_S = 0.25
"""
Seconds between looks at the ledgers, and most that a peer's request waits to be seen.
"""

TURN_S = 120.0
"""
Most seconds to wait for another process that loads.

A dead process's turn ends with it. One that lives and is stuck would stop all others;
a first load that compiles kernels takes 30 seconds.
"""


NO_LEDGER = (OSError, WhisperCacheError)
"""
What may keep a ledger from being used: its files, or a device that has no UUID.
"""


class LedgerPeers:
    """
    The other caches of this machine and user that coordinate, by way of `Ledger`.

    Where the ledger cannot be read or written, the cache goes on without it, and says
    so.
    """

    def __init__(
        self, probe: MemoryProbe, directory: str | os.PathLike[str] | None = None
    ) -> None:
        self._probe = probe
        self._directory = directory or default_directory()
        self._ledgers: dict[str, Ledger] = {}
        self._told: set[str] = set()

    def promised_bytes(self, device: str) -> int:
        """
        What the others will take that the gauge does not show yet.
        """
        return sum(account.promised_bytes for account in self._others(device))

    def held_bytes(self, device: str) -> int:
        """
        What the others hold, and would give up if asked.
        """
        return sum(account.held_bytes for account in self._others(device))

    @contextlib.contextmanager
    def turn(self, device: str) -> Iterator[None]:
        """
        Load while no other loads. Blocks for `TURN_S` at most.
        """
        with contextlib.ExitStack() as stack:
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
        """
        Tell the others of our own; None if that fails.
        """
        try:
            account = self._ledger(device).publish(**numbers)
        except NO_LEDGER as error:
            self._tell_once(f"the ledger of {device} cannot be written", error)
            return None
        self._told.discard(f"the ledger of {device} cannot be written")
        return account

    def bytes_to_free(self, device: str, own: Account, free_bytes: int) -> int:
        """
        How much of what is idle here should leave for the others.
        """
        return bytes_to_free(own, self._others(device), free_bytes)

    def close(self) -> None:
        """
        Take our accounts back.
        """
        for ledger in list(self._ledgers.values()):
            try:
                ledger.close()
            except OSError as error:
                _log.warning("an account was not removed: %s", error)

    def _ledger(self, device: str) -> Ledger:
        ledger = self._ledgers.get(device)
        if ledger is None:
            device_id = self._probe.device_id(device)
            ledger = self._ledgers.setdefault(
                device, Ledger(self._directory, device_id)
            )
        return ledger

    def _others(self, device: str) -> tuple[Account, ...]:
        try:
            others = self._ledger(device).others()
        except NO_LEDGER as error:
            self._tell_once(f"the ledger of {device} cannot be read", error)
            return ()
        self._told.discard(f"the ledger of {device} cannot be read")
        return others

    def _tell_once(self, what: str, error: Exception) -> None:
        """
        Log a trouble when it begins, not at every look.
        """
        if what not in self._told:
            self._told.add(what)
            _log.warning("%s: %s", what, error)


def look_after(core: Core, *, watches: bool, peers: LedgerPeers | None) -> None:
    """
    Look at the devices of *core* now and then, until it is closed or forgotten.
    """
    period_s = WATCH_S if peers is None else LEDGER_S
    forgotten = weakref.ref(core)

    def look() -> None:
        core = forgotten()
        if core is None:
            return
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
        if peers is not None:  # or a wish that was given up would stay
            peers.publish(device.name, core.account(device))
        return
    try:
        reading = core.probe.read(device.name)
    except Exception as error:  # a gauge that fails for a moment stops nothing
        _log.warning("free memory of %s is unknown: %s", device.name, error)
        return
    core.take_reading(device, reading)
    spare_bytes = device.usable_bytes(reading)
    wanted_bytes = max(0, -spare_bytes) if watches else 0
    if peers is not None:
        account = peers.publish(device.name, core.account(device))
        if account is not None:
            asked_bytes = peers.bytes_to_free(device.name, account, spare_bytes)
            wanted_bytes = max(wanted_bytes, asked_bytes)
    core.make_room_for_others(device, wanted_bytes)
    if not watches and device.name == "cpu":
        core.drop_copies(-spare_bytes)
