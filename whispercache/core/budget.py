"""
The budget of a device: what may be charged on it, and who is charged how much for what.

This is the only place where a byte is charged or credited. `Budget.clear` credits all
that one model was charged, and has three callers: a load that failed, a load that was
taken back before it began, and an unload that was confirmed.
"""

from __future__ import annotations

from dataclasses import replace
from enum import IntEnum
from typing import TYPE_CHECKING

from whispercache.devices.memory import headroom_bytes
from whispercache.devices.release import ENOUGH_RETURNED

if TYPE_CHECKING:
    from collections.abc import Collection

    from whispercache.devices.memory import MemoryReading
    from whispercache.units import Limit


class Use(IntEnum):
    """
    A reason for which bytes are charged.
    """

    RESERVED = 0
    """
    For a load in flight: weights, workspace, and what the load takes at its peak.
    """
    WEIGHTS = 1
    """
    For weights in memory, until their unload is confirmed.
    """
    WORK = 2
    """
    For the workspace of leases.
    """
    STAGING = 3
    """
    On the host, while weights go to a card or come from it.
    """
    COPY = 4
    """
    On the host, for a copy of weights that are on a card as well, or will be.
    """
    UNRETURNED = 5
    """
    For what an unload freed, while the gauge does not show it as free.
    """
    LOST = 6
    """
    For models on a device that an error left unusable, until the process ends.
    """


_IN_USE = (Use.WEIGHTS, Use.COPY, Use.UNRETURNED, Use.LOST)


class Budget:
    """
    The bytes of one device: a table of holders and uses, with its sums.

    Holders are only told apart, so anything that can be hashed is one.

    Attributes:
        total_bytes: All that the device has; None before its first reading.
        limit_bytes: Most that may be charged by the limit; None if there is none, or
            if it is a share of a total that is not known yet.
        capacity_bytes: Most that may be charged now, by the limit and by the gauge.
        ceiling_bytes: Most that might be charged if all leases ended.
        most_bytes: Most by the gauge if other processes give up what they hold.
        floor_bytes: What the process keeps of the device for its life; None before
            that was measured.
        charged_bytes: The sum of the table.
        work_bytes: What of it is charged for work.
        peak_bytes: The most that sum has been.
        work_peak_bytes: The most that was charged for work since `restart_work`.
    """

    def __init__(self, name: str, limit: Limit) -> None:
        self._name = name
        # By use, then by holder.
        self._table: tuple[dict[object, int], ...] = tuple({} for _ in Use)
        self._sums: list[int] = [0] * len(Use)  # but for work, which has its own:
        self._work = self._table[Use.WORK]
        self.work_bytes: int = 0
        self.charged_bytes: int = 0
        self.peak_bytes: int = 0
        self.work_peak_bytes: int = 0
        self.total_bytes: int | None = None
        self.floor_bytes: int | None = None
        self.most_bytes: int | None = None
        self.limit_bytes: int | None = None
        self.capacity_bytes: int = 0
        self.ceiling_bytes: int = 0
        self._gauge_capacity_bytes: int | None = None
        self._gauge_ceiling_bytes: int | None = None
        # In use besides our models when something was last not seen to return.
        self._excess_bytes: int | None = None
        self.set_limit(limit)

    # Charge and credit ----------------------------------------------------------------

    def set(self, holder: object, use: Use, n_bytes: int) -> None:
        """
        Charges *holder* exactly *n_bytes* for *use*.
        """
        if use is Use.WORK:
            self.work(holder, n_bytes)
            return
        column = self._table[use]
        more_bytes = n_bytes - column.get(holder, 0)
        # No row of zeros, or the table would grow with every model ever used.
        if n_bytes:
            column[holder] = n_bytes
        else:
            column.pop(holder, None)
        self._sums[use] += more_bytes
        self.charged_bytes += more_bytes
        self.peak_bytes = max(self.peak_bytes, self.charged_bytes)

    def work(self, holder: object, n_bytes: int) -> None:
        """
        Charges *holder* exactly *n_bytes* for work. Each hit does so twice.
        """
        column = self._work
        more_bytes = n_bytes - column.get(holder, 0)
        # A row of zero stays here until `clear`: that is faster than to remove it.
        column[holder] = n_bytes
        work_bytes = self.work_bytes = self.work_bytes + more_bytes
        charged_bytes = self.charged_bytes = self.charged_bytes + more_bytes
        # A hit seldom makes a peak, and two calls of max() would cost it 0.1 µs.
        if charged_bytes > self.peak_bytes or work_bytes > self.work_peak_bytes:
            self.peak_bytes = max(self.peak_bytes, charged_bytes)
            self.work_peak_bytes = max(self.work_peak_bytes, work_bytes)

    def move(self, holder: object, use: Use, to: Use) -> None:
        """
        Charges *holder* for *to* what it was charged for *use*.
        """
        n_bytes = self.of(holder, use)
        self.set(holder, use, 0)
        self.set(holder, to, self.of(holder, to) + n_bytes)

    def clear(self, holder: object) -> None:
        """
        Credits all that *holder* was charged.
        """
        for use in Use:
            self.set(holder, use, 0)
        self._work.pop(holder, None)

    def keep(self, unreturned_bytes: int, used_bytes: int | None) -> None:
        """
        Charges what an unload freed but the gauge did not show as free, until it does.

        Args:
            unreturned_bytes: How much that is.
            used_bytes: What the gauge showed in use right after; None if unknown.
        """
        if not unreturned_bytes:
            return
        weights_bytes = self.on_gauge_bytes - self.sum_of(Use.UNRETURNED)
        left_bytes = self.sum_of(Use.UNRETURNED) + unreturned_bytes
        self.set(self, Use.UNRETURNED, left_bytes)
        # Without a reading, the next one tells where to begin.
        self._excess_bytes = None
        if used_bytes is not None:
            self._excess_bytes = max(0, used_bytes - weights_bytes)

    def _credit_late(self, reading: MemoryReading) -> None:
        """
        Credits bytes that arrived after the unload was confirmed.

        What is still missing cannot exceed what the device uses beyond its models.
        """
        unreturned_bytes = self.sum_of(Use.UNRETURNED)
        if not unreturned_bytes:
            return
        weights_bytes = self.on_gauge_bytes - unreturned_bytes
        used_bytes = reading.total_bytes - reading.free_bytes
        excess_bytes = max(0, used_bytes - weights_bytes)
        if self._excess_bytes is None:
            self._excess_bytes = excess_bytes
        # Other programs may take memory too, so not all that is in use is missing.
        left_bytes = min(unreturned_bytes, excess_bytes)
        fallen_bytes = self._excess_bytes - excess_bytes
        if fallen_bytes >= ENOUGH_RETURNED * unreturned_bytes:
            left_bytes = 0
        self.set(self, Use.UNRETURNED, left_bytes)

    # Sums -----------------------------------------------------------------------------

    def of(self, holder: object, use: Use) -> int:
        """
        Returns what *holder* is charged for *use*.
        """
        return self._table[use].get(holder, 0)

    def holders(self, use: Use) -> Collection[object]:
        """
        Returns those that are charged for *use*; for work, those that were as well.
        """
        return self._table[use].keys()

    def sum_of(self, use: Use) -> int:
        """
        Returns what all holders are charged for *use*.
        """
        return self.work_bytes if use is Use.WORK else self._sums[use]

    @property
    def left_bytes(self) -> int:
        """
        Bytes that nothing is charged for; negative after a limit was lowered.

        Kept tokenizers and host copies may have it as long as nothing else does.
        """
        return self.capacity_bytes - self.charged_bytes

    @property
    def on_gauge_bytes(self) -> int:
        """
        Charged bytes that the gauge counts as in use.
        """
        return sum(self._sums[use] for use in _IN_USE)

    @property
    def to_come_bytes(self) -> int:
        """
        Charged bytes that the gauge may still count as free.
        """
        return self.charged_bytes - self.on_gauge_bytes

    @property
    def bounds(self) -> tuple[int | None, ...]:
        """
        All that decisions depend on besides what is charged.
        """
        return self.capacity_bytes, self.ceiling_bytes, self.most_bytes

    @property
    def may_gain(self) -> bool:
        """
        True if a new reading may allow more: the gauge does not show yet what was
        freed, or it binds, not the limit.
        """
        gauge_bytes = self._gauge_capacity_bytes
        if gauge_bytes is None or self.limit_bytes is None:
            return True
        return gauge_bytes < self.limit_bytes or self.sum_of(Use.UNRETURNED) > 0

    def restart_work(self) -> int:
        """
        Measures the peak of work anew, and returns the one so far.
        """
        peak_bytes = self.work_peak_bytes
        self.work_peak_bytes = self.work_bytes
        return peak_bytes

    # Limits and gauges ----------------------------------------------------------------

    def set_limit(self, limit: Limit) -> None:
        """
        Sets the most that may be charged. The gauge may allow less.
        """
        self._limit = limit
        # A share of a device that was never read is not known yet.
        known = self.total_bytes is not None or limit.fraction is None
        self.limit_bytes = limit.of(self.total_bytes or 0) if known else None
        self.capacity_bytes = self._least(self._gauge_capacity_bytes)
        self.ceiling_bytes = self._least(self._gauge_ceiling_bytes)

    def _least(self, gauge_bytes: int | None) -> int:
        known = [n for n in (self.limit_bytes, gauge_bytes) if n is not None]
        return min(known, default=0)

    def observe(
        self,
        reading: MemoryReading,
        kept_bytes: int,
        promised_bytes: int = 0,
        peers_bytes: int = 0,
    ) -> None:
        """
        Takes in a reading from a time when nothing was being loaded or unloaded.

        Args:
            reading: What the gauge shows.
            kept_bytes: Kept tokenizers and host copies, which give way to anything.
            promised_bytes: What other processes will take that it does not show yet.
            peers_bytes: What other processes hold, and would give up if asked.
        """
        self.total_bytes = reading.total_bytes
        self._credit_late(reading)
        usable_bytes = self.usable_bytes(reading) - promised_bytes + kept_bytes
        # The gauge cannot see workspace that is reserved but not yet used. Capacity is
        # therefore usable memory plus resident weights, without workspace.
        self._gauge_capacity_bytes = max(0, usable_bytes + self.on_gauge_bytes)
        # A load that has not begun takes nothing yet. One of another process may be on
        # the gauge and promised, too: the ceiling errs upwards.
        taken_bytes = self.charged_bytes - self.sum_of(Use.RESERVED)
        shared_bytes = 2 * promised_bytes + peers_bytes
        whole = replace(reading, free_bytes=reading.total_bytes)
        whole_bytes = self.usable_bytes(whole) - (self.floor_bytes or 0)
        self._gauge_ceiling_bytes = max(
            0, min(whole_bytes, usable_bytes + taken_bytes + shared_bytes)
        )
        self.most_bytes = self._gauge_capacity_bytes + shared_bytes
        self.set_limit(self._limit)

    def usable_bytes(self, reading: MemoryReading) -> int:
        """
        Returns what models may take by *reading*; negative if others took too much.
        """
        floor_bytes = self.floor_bytes or 0
        return reading.free_bytes - headroom_bytes(
            self._name, reading.total_bytes, floor_bytes
        )

    # Proof ----------------------------------------------------------------------------

    def check(self) -> None:
        """
        Asserts that the sums are those of the table, and that nothing is negative.
        """
        for use in Use:
            column = self._table[use]
            assert sum(column.values()) == self.sum_of(use), f"{self._name}: {use.name}"
            assert min(column.values(), default=0) >= 0, f"{self._name}: {column}"
        total_bytes = sum(map(self.sum_of, Use))
        assert total_bytes == self.charged_bytes, f"{self._name}: the sum"
