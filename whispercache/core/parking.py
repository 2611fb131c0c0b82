"""
Parking: what models that have left keep on the host, so that they come back faster.

Shells, such as tokenizers, and copies of weights that were on a card. All of it gives
way to whatever else wants the memory; a copy of weights that are on a card as well is
charged, since CTranslate2 cannot drop the one without the other.
"""

from __future__ import annotations

import itertools
import logging
from functools import partial
from typing import TYPE_CHECKING

from whispercache.events import EvictionCause

from .books import Books
from .budget import Use
from .entries import State

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from whispercache.keys import ModelKey
    from whispercache.units import Limit

    from .entries import Device, Entry

__all__ = ["Parking"]

_log = logging.getLogger("whispercache")


class Parking(Books):
    """
    Keeps what gives way within what is left for it. Used by `moves.Moves`.
    """

    park_limit: Limit | None = None  # of copies on the host; None for no copies
    _parked: frozenset[Entry] = frozenset()
    _looks = itertools.count()
    _last_look = -1

    def _shells(self) -> tuple[int, int, Mapping[ModelKey, int]]:
        """
        What models left behind, and how much of it is whose weights; with a number
        that tells which of two looks is the newer one.
        """
        serial = next(self._looks)
        return serial, self.loader.shell_bytes(), self.loader.parked()

    def _note_shells_locked(
        self,
        host: Device,
        serial: int,
        shell_bytes: int,
        parked: Mapping[ModelKey, int],
    ) -> None:
        if serial < self._last_look:
            return  # another device's thread knows better
        self._last_look = serial
        for entry in self._parked:
            entry.parked_bytes = 0
        known = (self.entries.get(key) for key in parked)
        self._parked = frozenset(entry for entry in known if entry is not None)
        for entry in self._parked:
            if entry.state is not State.RESIDENT:
                entry.parked_bytes = parked[entry.key]
            if entry.state is State.LOADING and entry.restores:
                shell_bytes -= entry.parked_bytes  # charged as a copy
        host.shell_bytes = shell_bytes

    def _shrink_shells(
        self, host: Device, most_bytes: int | None = None, but: ModelKey | None = None
    ) -> None:
        """
        Let shells leave the host, down to *most_bytes* or to what is left for them; on
        the thread of a device. That of *but* is about to be used.
        """
        with self.changing():
            host.is_shedding = False
            left_bytes = host.budget.left_bytes if most_bytes is None else most_bytes
            spared = set() if but is None else {but}
            # Copies that loads will use are charged, so they are in nobody's way.
            spared |= {
                each.key
                for each in self._parked
                if each.state is State.LOADING and each.restores
            }
        self.loader.shrink_shells(max(0, left_bytes), spared)
        shells = self._shells()
        with self.changing():
            self._note_shells_locked(host, *shells)
            self._admit_locked()

    def _shed_locked(self, host: Device) -> None:
        """
        Have shells go that are more than what is left for them. A load sees to it
        itself, and spares its own.
        """
        if host.is_shedding or not host.has_too_many_shells:
            return
        present = (e for each in self.devices.values() for e in each.entries.values())
        if not any(entry.state is State.LOADING for entry in present):
            host.is_shedding = True
            host.thread.submit(partial(self._shrink_shells, host))

    def _may_park(self, entry: Entry) -> bool:
        """
        Whether a copy of the weights of a leaving model is to stay on the host, which
        is charged for it from now on. Older copies make way.
        """
        host = entry.host
        asked_for = entry.cause in (EvictionCause.EXPLICIT, EvictionCause.CLOSED)
        # CTranslate2 would copy them once for each worker.
        is_one = entry.num_workers == 1 and entry.device is not host
        if self.park_limit is None or not is_one or asked_for or entry.drops_copy:
            return False
        if entry.copy_bytes or entry.host_bytes:  # it has one, or was asked to make it
            return True
        n_bytes = entry.weights_bytes
        with self.changing():
            left_bytes = host.budget.left_bytes
            limit_bytes = self.park_limit.of(host.budget.total_bytes or 0)
            if limit_bytes is None:
                limit_bytes = left_bytes
        if n_bytes > min(left_bytes, limit_bytes):
            return False
        self._shrink_copies(host, limit_bytes - n_bytes)
        self._shrink_shells(host, left_bytes - n_bytes)
        try:
            reading = self.probe.read(host.name)
        except Exception as error:  # without a gauge, nothing that one can do without
            _log.warning("free memory of %s is unknown: %s", host.name, error)
            return False
        with self.changing():
            # Another card's thread may have been faster.
            left_bytes = min(host.budget.left_bytes, host.budget.usable_bytes(reading))
            limit_bytes -= self._copies_bytes_locked(host)
            if n_bytes > min(left_bytes, limit_bytes):
                return False
            host.budget.set(entry, Use.STAGING, n_bytes)
        return True

    def _copies_bytes_locked(self, host: Device) -> int:
        """
        All copies of weights: beside those on cards, of models that have left, and in
        the making.
        """
        present = (e for each in self.devices.values() for e in each.entries.values())
        making = (e.host_bytes for e in present if e.state is State.UNLOADING)
        parked = (e.parked_bytes for e in self._parked if not e.copy_bytes)
        return host.budget.sum_of(Use.COPY) + sum(making) + sum(parked)

    def _shrink_copies(self, host: Device, most_bytes: int) -> None:
        """
        Let copies of models that have left go, the oldest first, until there are no
        more than *most_bytes* of copies.
        """
        parked = self.loader.parked()
        with self.changing():
            excess_bytes = self._copies_bytes_locked(host) - most_bytes
            gone: list[ModelKey] = []
            for key, n_bytes in parked.items():
                if excess_bytes > 0 and self.entries[key].state is State.ABSENT:
                    gone.append(key)
                    excess_bytes -= n_bytes
        for key in gone:
            self.loader.forget(key)
        if gone:
            shells = self._shells()
            with self.changing():
                self._note_shells_locked(host, *shells)

    def _forget(self, entry: Entry) -> None:
        """
        Drop the copy on the host of a model that has left; on its device's thread.
        """
        with self.changing():
            if entry.state is not State.ABSENT:  # it is about to be used
                return
        self.loader.forget(entry.key)
        shells = self._shells()
        with self.changing():
            self._note_shells_locked(entry.host, *shells)
            self._admit_locked()

    def _copied_locked(self, device: str) -> list[Entry]:
        """
        The models of cards that have copies on *device*, the host.
        """
        held = self.devices.get(device)
        if held is None or not held.budget.sum_of(Use.COPY):
            return []
        return [entry for entry in self.entries.values() if entry.copy_bytes]

    def _forget_locked(self, matches: Callable[[ModelKey], bool]) -> None:
        """
        Drop copies on the host of models that have left.
        """
        for entry in self._parked:
            if entry.state is State.ABSENT and matches(entry.key):
                entry.parked_bytes = 0  # nor may a request use it from now on
                self._on_thread_locked(entry, partial(self._forget, entry))

    def _shed_shells_locked(self, host: Device, n_bytes: int) -> int:
        """
        Have shells go that take *n_bytes* or more; what is left to find elsewhere.
        """
        if n_bytes > 0 and host.shell_bytes:
            left_bytes = max(0, host.shell_bytes - n_bytes)
            shrink = partial(self._shrink_shells, host, left_bytes)
            self._work.append(partial(host.thread.submit, shrink))
        return n_bytes - host.shell_bytes
