"""
Effects: the consequences of decisions, as values.

The scheduler notes them while the lock is held, and `core.Core` performs them once it
was let go. So no loader, gauge, caller or log handler ever runs under the lock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from concurrent.futures import Future

    from whispercache.engine.api import LoadedModel
    from whispercache.lease import Lease

    from .device import Device
    from .entries import Entry


@dataclass(frozen=True, slots=True)
class StartLoad:
    """
    Loads *entry* on its device's thread; its memory is reserved.
    """

    entry: Entry


@dataclass(frozen=True, slots=True)
class StartUnload:
    """
    Unloads *entry* on its device's thread.
    """

    entry: Entry


@dataclass(frozen=True, slots=True)
class Settle:
    """
    Ends a request, with its leases or with an error. Made once for each.
    """

    future: Future[tuple[Lease, ...]]
    leases: tuple[Lease, ...] = ()
    error: BaseException | None = None

    def settle(self) -> None:
        """
        Ends the request.
        """
        if self.error is None:
            self.future.set_result(self.leases)
        else:
            self.future.set_exception(self.error)


@dataclass(frozen=True, slots=True)
class AskBack:
    """
    Asks the holders of leases to give them back for a while, between two segments.

    Attributes:
        serials: The leases.
    """

    serials: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Gone:
    """
    Tells the caller of an eviction that the unload was confirmed.
    """

    future: Future[None]


@dataclass(frozen=True, slots=True)
class LookAgain:
    """
    Reads the gauge of *device* for those who wait.
    """

    device: Device


@dataclass(frozen=True, slots=True)
class DropCopy:
    """
    Drops the host copy of *entry*, which is not in memory, on its device's thread.
    """

    entry: Entry


@dataclass(frozen=True, slots=True)
class ShrinkKept:
    """
    Drops kept tokenizers and host copies on the host's thread.

    Attributes:
        host: The host.
        most_bytes: What may stay; None for what nothing is charged for by then.
    """

    host: Device
    most_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class KeepLost:
    """
    Keeps the host copies of a device that was lost: they cannot be freed either.
    """

    device: Device
    host: Device


@dataclass(frozen=True, slots=True)
class WriteOff:
    """
    Leaves a model of a lost device alone, which keeps its bytes until the process ends.
    """

    entry: Entry
    loaded: LoadedModel | None
    lost_bytes: int


@dataclass(frozen=True, slots=True)
class WakeAt:
    """
    Calls `Scheduler.tick` at that time.
    """

    at_s: float


@dataclass(frozen=True, slots=True)
class Stop:
    """
    Ends the threads: the cache is closed and holds nothing.
    """


Effect: TypeAlias = (
    StartLoad
    | StartUnload
    | Settle
    | AskBack
    | Gone
    | LookAgain
    | DropCopy
    | ShrinkKept
    | KeepLost
    | WriteOff
    | WakeAt
    | Stop
)
