"""
Results: what a call on a leased model returns, and for how long that keeps the lease.

A lazy result takes the lease with it. One with `Breaks` gives it back between two items
for as long as requests of a higher priority need the memory.
"""

from __future__ import annotations

import threading
import time
import traceback
import types
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar, cast

from .core.threads import here
from .errors import CacheForked, LoadFailed

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeGuard

    from typing_extensions import Self

    from .keys import ModelKey
    from .lease import Lease
    from .planning.deadlock import Owner

T = TypeVar("T")

_LOOK_EVERY_S = 0.005
"""
Seconds between looks at a step that is about to wait; it finds out where its files are
before, within milliseconds.
"""


class Seat(Protocol):
    """
    The place where a lazy result finds its model. Between two items that may be taken
    away, and is put back after it was loaded again.
    """

    def empty(self, refill: Callable[[], None]) -> None:
        """
        Takes the model away: nothing refers to it any more. Whoever needs it calls
        *refill* first.
        """

    def put(self, lease: Lease) -> None:
        """
        Puts the model of another lease here, which is of the same kind.
        """


@dataclass(frozen=True, slots=True)
class Breaks:
    """
    How a lazy result gives its lease back between two items, for requests of a higher
    priority, and goes on afterwards.

    Attributes:
        level: Its own priority.
        seat: Where it finds its model.
        renew: Waits for another lease on that model.
        give_up: Ends that wait of an owner, by a `concurrent.futures.CancelledError`;
            False if it has not begun, or is over.
    """

    level: float
    seat: Seat
    renew: Callable[[ModelKey], Lease]
    give_up: Callable[[Owner], bool]


class LeasedIterator(Iterator[T]):
    """
    A lazy result that holds its model until it is exhausted, closed or collected.

    If memory runs out before the first item, idle models are evicted and the call is
    made again. With *breaks* it is a batch, which others may interrupt between items.

    Attributes:
        has_moved: True if others than the first owner have iterated, or were announced
            to.
    """

    def __init__(
        self,
        items: Iterator[T],
        lease: Lease,
        again: Callable[[], Iterator[T]] | None = None,
        breaks: Breaks | None = None,
    ) -> None:
        self._items: Iterator[T] | None = items
        self._lease = lease
        self._again = again
        self._owner = lease.owner
        self.has_moved: bool = False
        self._failure = ""
        self._ending = ""  # the reason to end once no step is in flight
        # One step at a time: a close from another thread waits for the step in flight,
        # since the model must not be unloaded under it.
        self._step = threading.Lock()
        self._stepper: int | None = None  # the thread of that step
        self._breaks = breaks
        self._is_stopped = False  # the lease was given back for a while
        self._is_claimed = False  # a step is about to begin, and needs it
        self._waits_as: Owner = None  # for another lease
        self._is_unwanted = False  # it will be closed once no step is in flight
        lease.entrust(self)
        if breaks is not None:
            lease.offer(breaks.level)

    @property
    def key(self) -> ModelKey:
        """
        The model that computes these items; after a fallback not the one asked for.
        """
        return self._lease.key

    def __next__(self) -> T:
        # Mostly nobody else has gone on, and there is nothing to note.
        owner = here.owner
        if owner is not self._owner:
            self.follow(owner)
        return self.step()

    def hand_over(self) -> None:
        """
        Notes that another thread will iterate and end the lease; see `Lease.hand_over`.

        A thread that does iterate is noticed in any case.
        """
        self.follow(None)

    def follow(self, owner: Owner) -> None:
        """
        Notes the thread or task that iterates now, and hence will end the lease.
        """
        if owner != self._owner:
            self._owner = owner
            self.has_moved = True
            # An end that was meant for the owner before does not concern this one.
            self._ending = ""
            self._lease.hand_over(owner)

    def step(self) -> T:
        """
        Returns the next item. Noting who iterates is up to the caller.
        """
        lease = self._lease
        # `_was_forked`, spelled out.
        is_gone = lease._serial not in lease._entry.leases
        if is_gone and self._items is not None and not self._is_stopped:
            raise CacheForked
        try:
            with self._step:
                self._stepper = threading.get_ident()
                try:
                    return self._next()
                finally:
                    self._stepper = None
                    self._is_claimed = False
        finally:
            # One that was asked for it during the step has left that to it.
            if self._breaks is not None:
                self.give_way()
            # A close of the cache that came during the step left the end to it.
            if self._ending:
                self._end_if_idle()

    def _next(self) -> T:
        if self._items is None:
            if self._failure:
                # A finished generator would just say that there is no more.
                raise RuntimeError(f"it ended early: {self._failure}")
            raise StopIteration
        try:
            item = next(self._items) if self._again is None else self._first()
        except StopIteration:
            # The lease ends with the last item, not when the iterator is collected.
            self._finish()
            raise
        except BaseException as error:
            # Ctrl-C, too: a generator that raised is finished, and so is this.
            self._failure = f"{type(error).__name__}: {error}"
            self._finish()
            raise
        self._again = None  # and with it the audio
        return item

    def _was_forked(self) -> bool:
        # In a child the lock may be held by a thread that does not exist there. Items
        # are forgotten before the lease is ended; only a fork ends that alone.
        # A lease that was given back is none of these.
        is_held = self._items is not None and not self._is_stopped
        return self._lease.is_released and is_held

    def _first(self) -> T:
        assert self._items is not None
        assert self._again is not None
        try:
            return next(self._items)
        except Exception as error:
            if isinstance(error, StopIteration) or not _has_room(self._lease, error):
                raise
        self._items = self._again()
        return next(self._items)

    # Breaks ---------------------------------------------------------------------------

    def give_way(self) -> None:
        """
        Gives the lease back for a while if a request of a higher priority asks for it,
        unless a step is in flight, at whose end it does.
        """
        breaks = self._breaks
        if breaks is None or self._is_stopped or not self._lease.is_asked(breaks.level):
            return
        # If it is taken, the thread with the step in flight calls this after the step.
        if not self._step.acquire(blocking=False):
            return
        try:
            is_over = self._items is None or self._is_stopped
            if not is_over and not self._is_claimed:
                # First: what is released looks as after a fork.
                self._is_stopped = True
                renew = partial(self._renew, self._lease.loaded.stamp)
                breaks.seat.empty(renew)
                self._lease.give_back()
        finally:
            self._step.release()

    def claim(self) -> bool:
        """
        Keeps the lease for the next step; False if that may have to wait for another.
        """
        with self._step:
            self._is_claimed = not self._is_stopped
            return self._is_claimed

    def _renew(self, stamp: tuple[int, ...]) -> None:
        """
        Waits for another lease, in a step that needs the model of the files with this
        *stamp*.

        Raises:
            LoadFailed: they were replaced meanwhile: the call holds the tokenizer and
                the features of those.
        """
        breaks = self._breaks
        assert breaks is not None
        # In this order: `close` sets the one, and then looks at the other.
        self._waits_as = here.owner
        if self._is_unwanted:
            raise CancelledError
        lease = breaks.renew(self.key)
        if lease.loaded.stamp != stamp:
            lease.release()
            reason = "its files were replaced in the middle of a batch; begin it anew"
            raise LoadFailed(str(self.key), reason)
        self._lease = lease
        self._is_stopped = False
        breaks.seat.put(lease)
        lease.entrust(self)
        lease.offer(breaks.level)

    # The end --------------------------------------------------------------------------

    def close(self) -> None:
        """
        Ends early and releases the model. Blocks while a step is in flight.
        """
        if self._was_forked():
            return
        # What the step in flight waits for, or is about to, is of no more use.
        self._is_unwanted = True
        breaks = self._breaks
        while (
            breaks is not None
            and self._is_stopped
            and self._step.locked()
            and not breaks.give_up(self._waits_as)
        ):
            time.sleep(_LOOK_EVERY_S)
        # A generator cannot be closed by one thread while another runs it.
        with self._step:
            self._finish()

    def end(self, why: str, owner: Owner) -> bool:
        """
        Ends early on behalf of *owner*, after the step in flight if there is one.

        Does nothing if another thread or task has gone on to iterate. Iterating
        afterwards raises an error that says *why*.

        Returns:
            False if this thread itself has yet to finish a step, which a signal handler
            interrupted and which ends after the handler.
        """
        if self._was_forked():
            return True
        # Set before the look at the owner, who may begin a step at this moment.
        self._ending = why
        if self._owner != owner:
            self._ending = ""
        self._end_if_idle()
        return self._stepper != threading.get_ident()

    def _end_if_idle(self) -> None:
        # If it is taken, the thread with the step in flight calls this after the step.
        if not self._step.acquire(blocking=False):
            return
        try:
            if self._ending and self._items is not None:
                self._failure = self._ending
                self._finish()
        finally:
            self._step.release()

    def _finish(self) -> None:
        # Forgotten before the lease ends: they refer to the model.
        items, self._items = self._items, None
        self._again = self._breaks = None
        self._is_stopped = False
        try:
            # Iterators of other loaders may have no close().
            if isinstance(items, types.GeneratorType):
                items.close()
        finally:
            self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError(
            "segments cannot be pickled or copied: they are made while they are "
            "iterated over. Send list(segments)"
        )


def is_lazy(result: object) -> TypeGuard[Iterator[object]]:
    """
    Returns True for an iterator.
    """
    # Mostly it is this, and to ask the abstract class takes a call.
    return type(result) is types.GeneratorType or isinstance(result, Iterator)


def call_leased(
    lease: Lease, call: Callable[..., object], *args: object, **options: object
) -> object:
    """
    Calls a method of a leased model; the lease is held as long as the result needs it.

    An iterator in the result, alone or first in a tuple, takes the lease with it. If
    memory runs out, idle models are evicted and the call is made once more.
    """
    return call_in_parts(None, lease, call, *args, **options)


def call_in_parts(
    breaks: Breaks | None,
    lease: Lease,
    call: Callable[..., object],
    /,
    *args: object,
    **options: object,
) -> object:
    """
    Does what `call_leased` does; with *breaks*, an iterator gives the lease back where
    it is asked to, between two items.
    """
    try:
        try:
            result = call(*args, **options)
        except Exception as error:
            if not _has_room(lease, error):
                raise
            result = call(*args, **options)
    except BaseException:
        # No result, so nothing else would release it.
        lease.release()
        raise

    # For a lazy result, the memory is needed by its first item, not by this call.
    def again() -> Iterator[object]:
        result = call(*args, **options)
        first = result[0] if isinstance(result, tuple) else result
        return cast("Iterator[object]", first)

    if isinstance(result, tuple):
        if result and is_lazy(result[0]):
            return (LeasedIterator(result[0], lease, again, breaks), *result[1:])
    elif is_lazy(result):
        return LeasedIterator(result, lease, again, breaks)
    lease.release()
    return result


def _has_room(lease: Lease, error: Exception) -> bool:
    has_room = lease.recover(error)
    if has_room:
        # The frames of the traceback hold what did not fit.
        traceback.clear_frames(error.__traceback__)
    return has_room
