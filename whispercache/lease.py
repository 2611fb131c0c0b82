"""
Lease: the holder's handle on a model in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, overload

from .devices.faults import is_from_ctranslate2

if TYPE_CHECKING:
    from types import TracebackType

    from faster_whisper import WhisperModel

    from .core.entries import Entry
    from .engine.api import LoadedModel
    from .keys import ModelKey
    from .planning.deadlock import Owner

__all__ = ["Holder", "Lease", "Leases"]


class Holder(Protocol):
    """
    Something of ours that holds a lease for a caller, and can end it in his stead.
    """

    @property
    def has_moved(self) -> bool:
        """
        True if it has had several owners, so that one who is over tells little.
        """

    def end(self, why: str, owner: Owner) -> bool:
        """
        End the lease early, once a step in flight is over, unless somebody took it over
        from *owner*; whether that needs nothing more of the calling thread.
        """


class _Lessor(Protocol):
    def release(self, entry: Entry, serial: int, keep_alive_s: float | None) -> None:
        """
        End a lease.
        """

    def drop(self, entry: Entry, serial: int, keep_alive_s: float | None) -> None:
        """
        End a lease from the garbage collector.
        """

    def hand_over(self, entry: Entry, serial: int, owner: Owner) -> None:
        """
        Note that somebody else will end a lease.
        """

    def entrust(self, serial: int, holder: Holder) -> None:
        """
        Note what holds a lease, without keeping it alive.
        """

    def pin(self, entry: Entry) -> None:
        """
        Keeps a model in memory, idle or not.
        """

    def blame(self, entry: Entry, error: BaseException) -> None:
        """
        See whether an error means that the device is of no more use.
        """

    def recover(self, entry: Entry, error: BaseException) -> bool:
        """
        Make room after an error, if that may help; whether it was done.
        """


class Lease:
    """
    A model, held in memory until `release`.

    A context manager whose value is the `faster_whisper.WhisperModel`. Do not keep that
    model beyond the lease: to touch it once it was unloaded is memory-unsafe.

    A lease that is dropped without `release` is released when it is collected, with a
    `ResourceWarning` that names, while tracemalloc traces, where it was taken.

    Attributes:
        owned: Held by one of our own iterators, which may just be dropped.
        taken_at: File and line of the caller that took it, while tracemalloc traces.
    """

    __slots__ = (
        *("_entry", "_keep_alive_s", "_lessor", "_serial", "_view"),
        *("owned", "taken_at"),
    )

    def __init__(
        self, lessor: _Lessor, entry: Entry, serial: int, keep_alive_s: float | None
    ) -> None:
        self._lessor = lessor
        self._entry = entry
        self._serial = serial
        self._keep_alive_s = keep_alive_s
        self._view: WhisperModel | None = None
        self.owned: bool = False
        self.taken_at: str = ""

    @property
    def key(self) -> ModelKey:
        """
        The model that is held.
        """
        return self._entry.key

    @property
    def is_released(self) -> bool:
        """
        Whether the model may leave again, as far as this lease goes.
        """
        return self._serial not in self._entry.leases

    @property
    def loaded(self) -> LoadedModel:
        """
        The model with the facts that were read right after its load.

        Raises:
            RuntimeError: the lease was released.
        """
        loaded = self._entry.loaded
        if self.is_released or loaded is None:
            raise RuntimeError(f"the lease on {self.key} was released")
        return loaded

    @property
    def whisper(self) -> WhisperModel:
        """
        The model itself, as the holder of this lease may use it: what is set on it, or
        asked for in a call, is seen by nobody else.

        Raises:
            RuntimeError: the lease was released.
        """
        loaded = self.loaded
        if self._view is None:
            self._view = loaded.lend(loaded.whisper)
        return self._view

    def release(self) -> None:
        """
        Let the model go. A second call does nothing.
        """
        self._view = None
        self._lessor.release(self._entry, self._serial, self._keep_alive_s)

    def pin(self) -> None:
        """
        Keeps the model in memory beyond this lease, until `ModelCache.unpin`.

        Raises:
            RuntimeError: the lease was released.
        """
        if self.is_released:
            raise RuntimeError(f"the lease on {self.key} was released")
        self._lessor.pin(self._entry)

    def hand_over(self, owner: Owner = None) -> None:
        """
        Say that another thread or task will end this lease.

        One that waits for memory while it holds leases may get a `LeaseDeadlock`; a
        lease that was handed over no longer counts as its own.

        Args:
            owner: Who it is, as `threads.current_owner` tells; None for anybody.
        """
        self._lessor.hand_over(self._entry, self._serial, owner)

    @property
    def owner(self) -> Owner:
        """
        The thread or task that is to end it; None if that is not known, or it ended.
        """
        return self._entry.owners.get(self._serial)

    def entrust(self, holder: Holder) -> None:
        """
        Hands this lease to *holder*: it may just be dropped, and ends with the cache
        where its owner closes that, or has ended.
        """
        self.owned = True
        self._lessor.entrust(self._serial, holder)

    def recover(self, error: BaseException) -> bool:
        """
        Make room after a call on the model ran out of memory. Blocks until it is made.

        Returns:
            Whether there is more room now, so that the call may be tried again.
        """
        return self._lessor.recover(self._entry, error)

    def __enter__(self) -> WhisperModel:
        return self.whisper

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
        if error is not None and is_from_ctranslate2(error):
            self._lessor.blame(self._entry, error)

    def __repr__(self) -> str:
        state = "released" if self.is_released else "held"
        return f"<Lease {self.key} {state}>"

    def __del__(self) -> None:
        if self._serial in self._entry.leases:
            self._view = None  # or it is seen to refer to the model as that leaves
            self._lessor.drop(self._entry, self._serial, self._keep_alive_s)
            if not self.owned:
                place = f" (taken at {self.taken_at})" if self.taken_at else ""
                warnings.warn(
                    f"a lease on {self.key} was never released{place}; "
                    "use it in a with block",
                    ResourceWarning,
                    stacklevel=2,
                    source=self,
                )


class Leases(Sequence[Lease]):
    """
    Leases on several models, granted together, in the order in which they were asked
    for.

    A context manager whose value are the models themselves.
    """

    __slots__ = ("_leases",)

    def __init__(self, leases: tuple[Lease, ...]) -> None:
        self._leases = leases

    @overload
    def __getitem__(self, place: int) -> Lease: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[Lease, ...]: ...

    def __getitem__(self, place: int | slice) -> Lease | tuple[Lease, ...]:
        return self._leases[place]

    def __len__(self) -> int:
        return len(self._leases)

    def release(self) -> None:
        """
        Let all models go. A second call does nothing.
        """
        for lease in self._leases:
            lease.release()

    def __enter__(self) -> tuple[WhisperModel, ...]:
        return tuple(lease.whisper for lease in self._leases)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Which of them an error comes from cannot be told.
        self.release()

    def __repr__(self) -> str:
        return f"<Leases {', '.join(map(repr, self._leases))}>"
