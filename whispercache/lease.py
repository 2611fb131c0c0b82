"""
Lease: the holder's handle on a model in memory.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from .devices.faults import is_from_ctranslate2

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from faster_whisper import WhisperModel

    from .engine.api import LoadedModel
    from .keys import ModelKey
    from .planning.deadlock import Owner


class Holder(Protocol):
    """
    An iterator of ours that holds a lease for a caller, and can end it early.
    """

    @property
    def has_moved(self) -> bool:
        """
        True if it has had several owners, so that the end of one tells little.
        """

    def end(self, why: str, owner: Owner) -> bool:
        """
        Ends the lease early on behalf of *owner*, after a step that is in flight.

        Does nothing if another thread or task took it over.

        Returns:
            False if the calling thread itself has yet to finish that step.
        """

    def give_way(self) -> None:
        """
        Gives the lease back for a while if it is asked to, unless a step is in flight,
        at whose end it does. Does not block for the step.
        """


class _Held(Protocol):
    """
    The core's entry of a model, as far as a lease on it looks.
    """

    @property
    def key(self) -> ModelKey: ...

    @property
    def loaded(self) -> LoadedModel | None: ...

    # Their owners, by their serial numbers.
    @property
    def leases(self) -> Mapping[int, Owner]: ...


_Entry_contra = TypeVar("_Entry_contra", bound=_Held, contravariant=True)


class _Lessor(Protocol[_Entry_contra]):
    """
    The core, as far as a lease talks to it.
    """

    def release(
        self, entry: _Entry_contra, serial: int, keep_alive_s: float | None
    ) -> None: ...

    def give_back(
        self, entry: _Entry_contra, serial: int, keep_alive_s: float | None
    ) -> None: ...

    def drop(
        self, entry: _Entry_contra, serial: int, keep_alive_s: float | None
    ) -> None: ...

    def offer(self, entry: _Entry_contra, serial: int, level: float) -> None: ...

    def is_asked(self, entry: _Entry_contra, serial: int, level: float) -> bool: ...

    def spare(self, entry: _Entry_contra, serial: int) -> Callable[[], None]: ...

    def hand_over(self, entry: _Entry_contra, serial: int, owner: Owner) -> None: ...

    def entrust(self, serial: int, holder: Holder) -> None: ...

    def pin(self, entry: _Entry_contra) -> None: ...

    def blame(self, entry: _Entry_contra, error: BaseException) -> None: ...

    def recover(self, entry: _Entry_contra, error: BaseException) -> bool: ...


class Lease:
    """
    A model, held in memory until `release`.

    A context manager whose value is the `faster_whisper.WhisperModel`. It is of no use
    beyond the lease: once the model was unloaded, what is looked up in it is a
    RuntimeError. Do not keep its ``model``, CTranslate2's own: to touch that after the
    unload is memory-unsafe.

    A lease that is dropped without `release` is released when it is collected, with a
    `ResourceWarning`. The warning names the place where it was taken, while tracemalloc
    traces.

    Attributes:
        owned: An iterator of ours holds it, which may just be dropped. Mostly unset, as
            are the next ones: each lease would pay for them.
        is_firm: It was waited for so long that it is given back only for those who have
            lost their patience.
        taken_at: File and line of the caller that took it, while tracemalloc traces.
    """

    __slots__ = (
        *("_entry", "_keep_alive_s", "_lessor", "_serial", "_view"),
        *("is_firm", "owned", "taken_at"),
    )
    owned: bool
    is_firm: bool
    taken_at: str

    def __init__(
        self,
        lessor: _Lessor[_Entry_contra],
        entry: _Entry_contra,
        serial: int,
        keep_alive_s: float | None,
    ) -> None:
        self._lessor: _Lessor[Any] = lessor
        self._entry: Any = entry  # a `_Held`; the core knows more of it
        self._serial = serial
        self._keep_alive_s = keep_alive_s
        self._view: WhisperModel | None = None

    @property
    def key(self) -> ModelKey:
        """
        The model that is held.
        """
        key: ModelKey = self._entry.key
        return key

    @property
    def is_released(self) -> bool:
        """
        True once this lease keeps the model in memory no longer.
        """
        return self._serial not in self._entry.leases

    @property
    def loaded(self) -> LoadedModel:
        """
        The model with the facts that were read right after its load.

        Raises:
            RuntimeError: the lease was released.
        """
        loaded: LoadedModel | None = self._entry.loaded
        if self.is_released or loaded is None:
            raise RuntimeError(f"the lease on {self.key} was released")
        return loaded

    @property
    def whisper(self) -> WhisperModel:
        """
        The model itself, as a view of this lease's own: attributes that are set on it,
        and parameters of calls, stay with this lease.

        Raises:
            RuntimeError: the lease was released.
        """
        loaded = self.loaded
        if self._view is None:
            self._view = loaded.lend(loaded.whisper)
        return self._view

    def release(self) -> None:
        """
        Ends the lease, so that the model may be evicted. A second call does nothing.
        """
        # And with it what was set on it.
        self._view = None
        release = self._lessor.release
        release(self._entry, self._serial, self._keep_alive_s)

    def give_back(self) -> None:
        """
        Ends the lease of a batch, which stops for others.
        """
        self._view = None
        self._lessor.give_back(self._entry, self._serial, self._keep_alive_s)

    def pin(self) -> None:
        """
        Keeps the model in memory beyond this lease, until `ModelCache.unpin`.

        Raises:
            RuntimeError: the lease was released.
        """
        if self.is_released:
            raise RuntimeError(f"the lease on {self.key} was released")
        self._lessor.pin(self._entry)

    def spare(self) -> Callable[[], None]:
        """
        Has the model be the last to leave for a short while after this lease, since a
        result is in use that it will be needed for. A preference, and no lease.

        Returns:
            A function that ends this early. Any thread may call it, anywhere.
        """
        return self._lessor.spare(self._entry, self._serial)

    def hand_over(self, owner: Owner = None) -> None:
        """
        Notes that another thread or task will end this lease.

        A thread that waits for memory while it holds leases may get a `LeaseDeadlock`;
        a lease that was handed over no longer counts as its own.

        Args:
            owner: The other one, as `threads.current_owner` returns it; None for any.
        """
        self._lessor.hand_over(self._entry, self._serial, owner)

    @property
    def owner(self) -> Owner:
        """
        The thread or task that is to end it; None if that is not known, or it ended.
        """
        return self._entry.leases.get(self._serial)

    def entrust(self, holder: Holder) -> None:
        """
        Hands this lease to *holder*, which may just be dropped.

        It ends with the cache, where its owner closes that or has ended.
        """
        self.owned = True
        self._lessor.entrust(self._serial, holder)

    def offer(self, level: float) -> None:
        """
        Notes that its holder gives it back early, if a request above *level* waits for
        its memory: `is_asked` tells.
        """
        # Those who have lost their patience ask everybody.
        asked_above = math.inf if getattr(self, "is_firm", False) else level
        self._lessor.offer(self._entry, self._serial, asked_above)

    def is_asked(self, level: float) -> bool:
        """
        Returns True if a request above *level* waits for its end. Costs nothing where
        nobody waits.
        """
        return self._lessor.is_asked(self._entry, self._serial, level)

    def recover(self, error: BaseException) -> bool:
        """
        Makes room after a call on the model ran out of memory. Blocks until it is made.

        Returns:
            True if there is more room now, so that the call may be tried again.
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
        # An error of the caller's own says nothing of the device.
        if error is not None and is_from_ctranslate2(error):
            self._lessor.blame(self._entry, error)

    def __repr__(self) -> str:
        state = "released" if self.is_released else "held"
        return f"<Lease {self.key} {state}>"

    def __del__(self) -> None:
        # May run inside any other code, the core's own critical sections included.
        try:
            is_held = self._serial in self._entry.leases
        except AttributeError:  # Ctrl-C in the moment of its making
            return
        if is_held:
            self._lessor.drop(self._entry, self._serial, self._keep_alive_s)
            if not getattr(self, "owned", False):
                taken_at = getattr(self, "taken_at", "")
                place = f" (taken at {taken_at})" if taken_at else ""
                warnings.warn(
                    f"a lease on {self.key} was never released{place}; "
                    "use it in a with block",
                    ResourceWarning,
                    stacklevel=2,
                    source=self,
                )


class Leases(Sequence[Lease]):
    """
    Leases on several models, granted together, in the order of the request.

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
        Ends all of them. A second call does nothing.
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
        # An error does not tell which of the models it comes from, so none is blamed.
        self.release()

    def __repr__(self) -> str:
        return f"<Leases {', '.join(map(repr, self._leases))}>"
