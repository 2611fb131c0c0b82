"""
Model: `CachedModel`, a WhisperModel that takes a lease for each call.

It knows the cache only as a source of leases, and the same code serves the awaited
model.
"""

from __future__ import annotations

import functools
import threading
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar, cast

from .core.threads import here
from .engine.calls.prepare import (
    prepared,
    prepared_detection,
)
from .engine.sizes.footprint import DEFAULT_WORKLOAD, Workload
from .errors import CacheForked, LoadFailed

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeGuard

    from faster_whisper.transcribe import Segment, TranscriptionInfo
    from typing_extensions import Self

    from .base import ModelSource
    from .engine.api import AudioInput
    from .keys import ModelKey
    from .lease import Lease
    from .planning.deadlock import Owner

T = TypeVar("T")

# The other attributes and methods of a WhisperModel; a test compares with the real one.
ATTRIBUTES = (
    "feat_kwargs",
    "feature_extractor",
    "frames_per_second",
    "hf_tokenizer",
    "input_stride",
    "logger",
    "max_length",
    "num_samples_per_token",
    "time_precision",
    "tokens_per_second",
)
_METHODS = (
    "add_word_timestamps",
    "encode",
    "find_alignment",
    "generate_segments",
    "generate_with_fallback",
    "get_prompt",
)


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
    """

    level: float
    seat: Seat
    renew: Callable[[ModelKey], Lease]


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
                self._lease.release()
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


class Handle:
    """
    A name for a model of a cache, without anything of its own that could be changed.
    """

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._served_by: ModelKey | None = None

    @property
    def key(self) -> ModelKey:
        """
        The model: canonical name, device, effective compute type.
        """
        return self._source.key

    @property
    def served_by(self) -> ModelKey | None:
        """
        The model that the last call got; not `key` after a fallback. None before the
        first call.

        With several threads, ask the ``segments`` of a call for their ``key`` instead.
        """
        return self._served_by

    def breaks(self, lease: Lease, workload: Workload | None = None) -> Breaks | None:
        """
        Returns how a call of this model with *lease* gives it back between two
        segments, for those of a higher priority; None if this one has the usual one.
        """
        return self._source.breaks(lease, workload or DEFAULT_WORKLOAD)

    def __setattr__(self, name: str, value: object) -> None:
        # Set on the handle, an attribute would never reach the model that computes.
        if name not in ("_cache", "_served_by", "_source"):
            raise self._refusal(name)
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise self._refusal(name)

    def _refusal(self, name: str) -> AttributeError:
        return AttributeError(
            f"{name!r} of a {type(self).__name__} cannot be changed: others use the "
            "same model, and it is unloaded and reloaded. Pass it to each call, as in "
            "transcribe(audio, beam_size=1), or set it on the model of a lease ('with "
            "model.lease() as whisper'), which no other call sees"
        )

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _memo: object) -> Self:
        return self  # like a function: it is a name, and not the model

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled: it belongs to a cache of this "
            "process. Send its name, and call get_model() in the other process"
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._source}>"


class CachedModel(Handle):
    """
    A WhisperModel that is in memory when it is used.

    Each call takes a lease, and loads the model if it is not there. A lazy ``segments``
    holds the lease until it is exhausted, closed or collected. Between calls the model
    may be evicted, and the next call reloads it: hold as many of these as you like.

    Made by `ModelCache.get_model`; safe to share between threads. It is an instance of
    `faster_whisper.WhisperModel` too, whose ``model`` is a view that takes a lease for
    each call. Only where a cache has a loader of a user's own it is not: calls are
    passed to the models of that, nothing can be set, and ``model`` is missing.
    """

    def lease(self) -> Lease:
        """
        Returns the real model, held for a ``with`` block. Blocks until it is granted.
        """
        return self._lease(DEFAULT_WORKLOAD)

    def _lease(self, workload: Workload) -> Lease:
        lease = self._source.lease(workload)
        # Not under a lock: with several threads it is any of their last ones. Mostly it
        # is what it was, and to set it costs more than all else here.
        key: ModelKey = lease._entry.key  # what the property `key` returns, sooner
        if self._served_by is not key:
            self._served_by = key
        return lease

    def transcribe(
        self,
        audio: AudioInput,
        *args: object,
        batch_size: int | None = None,
        **options: object,
    ) -> tuple[LeasedIterator[Segment], TranscriptionInfo]:
        """
        Transcribes, as `faster_whisper.WhisperModel.transcribe` does.

        Args:
            audio: A path, a binary stream, or float32 samples (samples,), mono, 16 kHz.
            args: Further positional parameters of ``transcribe``, ``language`` first:
                a code, a name or a locale (``"de"``, ``"german"``, ``"de-AT"``); None
                or ``"auto"`` to detect it.
            batch_size: Number of windows at once. If given, the batched pipeline does
                the work, with its own defaults (``vad_filter=True``,
                ``without_timestamps=True``).
            options: All other parameters of ``transcribe``. With ``multilingual=True``
                each window's language is detected, whatever *language* says.

        Returns:
            The segments, computed while they are iterated over, and the info.

        Raises:
            TypeError, ValueError: a parameter is nonsense, or the model does not know
                the language; no model was loaded for it.
            AudioError: the audio cannot be decoded; likewise.
            WhisperCacheError: the model cannot be had; see `ModelCache.lease`.

        Blocks: for decoding, the lease, and the language detection if none is given.
        """
        ready = prepared(self._source, audio, args, options, batch_size)
        # All that can be refused was refused before this: no model is loaded for it.
        lease = self._lease(ready.workload)
        call = self._source.transcriber(lease, ready.batch_size)
        return cast(
            "tuple[LeasedIterator[Segment], TranscriptionInfo]",
            call_in_parts(
                self._source.breaks(lease, ready.workload),
                lease,
                call,
                ready.samples,
                **ready.options,
            ),
        )

    def detect_language(
        self, audio: AudioInput | None = None, *args: object, **options: object
    ) -> tuple[str, float, list[tuple[str, float]]]:
        """
        Detects the language, as `faster_whisper.WhisperModel.detect_language` does.

        Args:
            audio: As for `transcribe`, paths and streams included.
            args: Further positional parameters, ``features`` first.
            options: Further parameters.

        Returns:
            The language code, its probability, and those of all languages.
        """
        ready = prepared_detection(self._source, audio, args, options)
        lease = self._lease(ready.workload)
        call = lease.whisper.detect_language
        return cast(
            "tuple[str, float, list[tuple[str, float]]]",
            call_leased(lease, call, ready.samples, **ready.options),
        )

    @property
    def supported_languages(self) -> list[str]:
        """
        The codes of the languages that the model knows. Loads it if need be.
        """
        lease = self.lease()
        with lease:
            return list(lease.loaded.supported_languages)

    @property
    def is_multilingual(self) -> bool:
        """
        True if the model knows other languages than English. Loads it if need be.
        """
        lease = self.lease()
        with lease:
            return lease.loaded.is_multilingual

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - as of a WhisperModel
        # Called only for names that are not here, so those of the model.
        if name in ATTRIBUTES:
            with self.lease() as whisper:
                return getattr(whisper, name)
        # Not methods of the class: faster-whisper's own signatures stay the truth.
        if name in _METHODS:
            return functools.partial(self._call, name)
        if name == "model":
            raise AttributeError(
                "the CTranslate2 model may be unloaded at any time; hold it with "
                "'with cached_model.lease() as whisper: whisper.model'"
            )
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def _call(self, name: str, *args: object, **options: object) -> object:
        lease = self.lease()
        return call_leased(lease, getattr(lease.whisper, name), *args, **options)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *ATTRIBUTES, *_METHODS]
