"""
A reservation: room on a device for a program that knows nothing of whispercache.

It is an account in the ledger, in the name of the process that it is for, and so it
ends with that process at the latest. Other caches see it as one of their own kind: what
is promised there they do not take, and for what is wanted they evict idle models.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from whispercache.devices.memory import (
    CUDA_HEADROOM_BYTES,
    TOTAL_ONLY,
    headroom_bytes,
)
from whispercache.errors import DeviceUnavailable, WhisperCacheError, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from whispercache.devices.memory import MemoryProbe

    from .ledger import Account, Ledger

_log = logging.getLogger("whispercache")

# Seconds between two looks while room is made, and then.
MAKE_S: Final = 0.25
KEEP_S: Final = 1.0
# Most seconds to wait for another process that loads, or reserves, before a look.
TURN_S: Final = 1.0


class NoRoomMade(WhisperCacheError):
    """
    A reservation that cannot be had, or could not in time.
    """


@dataclass(frozen=True, slots=True)
class Room:
    """
    The room that a reservation has at one moment, and who else is there.
    """

    wanted_bytes: int
    had_bytes: int
    others: tuple[Account, ...]

    @property
    def is_made(self) -> bool:
        """
        True if all of it is there.
        """
        return self.had_bytes >= self.wanted_bytes

    def in_words(self, device: str) -> str:
        """
        Returns what there is, and who could make more.
        """
        text = f"{format_bytes(self.had_bytes)} can be had on {device}; "
        if not self.others:
            return f"{text}no process of whispercache's shares it (--coordinate)"
        held_bytes = sum(each.held_bytes for each in self.others)
        idle_bytes = sum(each.idle_bytes for each in self.others)
        processes = "process holds" if len(self.others) == 1 else "processes hold"
        return (
            f"{text}{len(self.others)} {processes} {format_bytes(held_bytes)} that can "
            f"leave, {format_bytes(idle_bytes)} of it idle"
        )


class Reservation:
    """
    Room of *n_bytes* on a device, for one process and its children.

    Args:
        ledger: That process's, as the others see it.
        probe: Reads the memory of *device*.
        held_bytes: Tells what of it the process holds by now.
    """

    def __init__(
        self,
        n_bytes: int,
        device: str,
        *,
        ledger: Ledger,
        probe: MemoryProbe,
        held_bytes: Callable[[], int],
    ) -> None:
        self.n_bytes = n_bytes
        self.device = device
        self.ledger = ledger
        self._probe = probe
        self._held_bytes = held_bytes

    def make(self, timeout_s: float, tell: Callable[[str], None]) -> None:
        """
        Makes the room, and has others keep it free. *tell* is called with a line on
        what is waited for, if anything is.

        Raises:
            NoRoomMade: It is more than the device has, or was not there in time.
            DeviceUnavailable: The memory of the device cannot be read.

        Blocks: for up to *timeout_s*, while others evict models and programs end.
        """
        end_s = time.monotonic() + timeout_s
        try:
            # In turns: of two that have a part each, none would get the rest.
            with contextlib.ExitStack() as stack:
                while not stack.enter_context(self.ledger.turn(TURN_S, "reserve")):
                    self._wait(end_s, "another reservation comes first")
                self._make(end_s, tell)
        except BaseException:
            self.ledger.close()
            raise

    def _make(self, end_s: float, tell: Callable[[str], None]) -> None:
        room = self._claim()
        if not room.is_made:
            wanted = format_bytes(self.n_bytes)
            tell(f"waiting for {wanted}: {room.in_words(self.device)}")
        elif not room.others:
            tell(f"{room.in_words(self.device)}, so none has to leave room")
        while not room.is_made:
            self._wait(end_s, room.in_words(self.device))
            room = self._claim()

    def _wait(self, end_s: float, seen: str) -> None:
        left_s = end_s - time.monotonic()
        if left_s <= 0 or not self.ledger.is_owner_alive():
            wanted = format_bytes(self.n_bytes)
            raise NoRoomMade(f"there was no room for {wanted} in time: {seen}")
        time.sleep(min(MAKE_S, left_s))

    def _claim(self) -> Room:
        # Of two that look at once, both would count on the same bytes. A process that
        # takes long to load has told what it will take.
        with self.ledger.turn(TURN_S):
            return self.look()

    def look(self) -> Room:
        """
        Takes what is free for what the process does not hold yet, and asks the others
        for the rest. Returns the room that there is.
        """
        reading = self._probe.read(self.device)
        if reading.source == TOTAL_ONLY:
            reason = "how much of it is free is not known"
            raise DeviceUnavailable(self.device, reason)
        # The least that other processes leave: of more, they would think that it is
        # there already.
        kept_bytes = headroom_bytes(
            self.device, reading.total_bytes, floor_bytes=CUDA_HEADROOM_BYTES
        )
        others = self.ledger.others()
        free_bytes = reading.free_bytes - kept_bytes
        free_bytes -= sum(each.promised_bytes for each in others)
        if self.n_bytes > reading.total_bytes - kept_bytes:
            most = format_bytes(reading.total_bytes - kept_bytes)
            raise NoRoomMade(
                f"{format_bytes(self.n_bytes)} can never be had on {self.device}, "
                f"which has {most} for programs"
            )
        missing_bytes = max(0, self.n_bytes - self._held_bytes())
        had_bytes = max(0, min(missing_bytes, free_bytes))
        self.ledger.publish(
            promised_bytes=had_bytes, wanted_bytes=missing_bytes - had_bytes
        )
        return Room(missing_bytes, max(0, free_bytes), others)

    def keep(self) -> None:
        """
        Keeps the room for as long as the process lives: what it frees meanwhile stays
        free for it. Blocks until then.
        """
        while self.ledger.is_owner_alive():
            try:
                self.look()
            except (OSError, WhisperCacheError) as error:
                # The others go on seeing what was last told; the next look may work.
                _log.debug("a reservation was not looked after: %s", error)
            time.sleep(KEEP_S)
        self.ledger.close()
