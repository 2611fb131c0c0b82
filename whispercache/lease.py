"""
Lease: the holder's handle on a model in memory.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from types import TracebackType

    from faster_whisper import WhisperModel

    from .entries import Entry
    from .keys import ModelKey
    from .loader import LoadedModel

__all__ = ["Lease"]


class _Lessor(Protocol):
    def release(self, entry: Entry, serial: int, keep_alive_s: float | None) -> None:
        """
        End a lease.
        """

    def drop(self, entry: Entry, serial: int, keep_alive_s: float | None) -> None:
        """
        End a lease from the garbage collector.
        """


class Lease:
    """
    A model, held in memory until `release`.

    A context manager whose value is the `faster_whisper.WhisperModel`. Do not keep that
    model beyond the lease: to touch it once it was unloaded is memory-unsafe.

    A lease that is dropped without `release` is released when it is collected, with a
    `ResourceWarning`.
    """

    __slots__ = ("_entry", "_keep_alive_s", "_lessor", "_serial", "owned")

    def __init__(
        self, lessor: _Lessor, entry: Entry, serial: int, keep_alive_s: float | None
    ) -> None:
        self._lessor = lessor
        self._entry = entry
        self._serial = serial
        self._keep_alive_s = keep_alive_s
        self.owned: bool = (
            False  # by one of our own iterators, which may just be dropped
        )

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
        The model itself.

        Raises:
            RuntimeError: the lease was released.
        """
        return self.loaded.whisper

    def release(self) -> None:
        """
        Let the model go. A second call does nothing.
        """
        self._lessor.release(self._entry, self._serial, self._keep_alive_s)

    def __enter__(self) -> WhisperModel:
        return self.whisper

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "released" if self.is_released else "held"
        return f"<Lease {self.key} {state}>"

    def __del__(self) -> None:
        if self._serial in self._entry.leases:
            self._lessor.drop(self._entry, self._serial, self._keep_alive_s)
            if not self.owned:
                warnings.warn(
                    f"a lease on {self.key} was never released; use it in a with block",
                    ResourceWarning,
                    stacklevel=2,
                    source=self,
                )
