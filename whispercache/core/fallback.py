"""
Fallback: what a request gets instead of a model that cannot be had.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from whispercache.errors import (
    CorruptModel,
    DeviceUnavailable,
    LoadFailed,
    ModelTooLarge,
    NotDownloaded,
    UnsupportedComputeType,
    WhisperCacheError,
)
from whispercache.keys import COMPUTE_TYPES, canonical_device
from whispercache.planning.priority import INTERACTIVE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from whispercache.keys import ModelKey

    from .core import Core
    from .resolver import Request

_log = logging.getLogger("whispercache")

WORTH_A_FALLBACK = (
    DeviceUnavailable,
    LoadFailed,
    ModelTooLarge,
    UnsupportedComputeType,
)
NOT_WORTH_IT = (CorruptModel, NotDownloaded)
"""
Errors after which no fallback is tried: files that are broken or missing are so on
every device and in every type. Nor is one tried after a time-out: a busy model is not
one that cannot be had.
"""


@dataclass(frozen=True, slots=True)
class Rung:
    """
    A step of a ladder: another device, another compute type, or both.
    """

    device: str | None
    compute_type: str | None

    def of(self, request: Request) -> Request:
        """
        Returns *request* with what this step changes.
        """
        model, device, compute_type, *options = request
        if self.device is not None:
            # What follows the device in the request is for that one.
            options = [each for each in options if each[0] != "device_index"]
        return (
            model,
            self.device or device,
            self.compute_type or compute_type,
            *options,
        )


@dataclass(frozen=True, slots=True)
class Terms:
    """
    The terms on which a caller wants a model.

    Attributes:
        timeout_s: Most seconds to wait.
        keep_alive_s: Seconds that it stays once the lease ends; None for the cache's.
        ladder: The fallbacks, best first.
        priority: The level of its turn.
        parallel: Most leases on the model with it; None for any number.
        resumes: It goes on with a call that gave its lease back.
    """

    timeout_s: float | None = None
    keep_alive_s: float | None = None
    ladder: tuple[Rung, ...] = ()
    priority: float = INTERACTIVE
    parallel: int | None = None
    resumes: bool = False


_TYPES = (*COMPUTE_TYPES, "int8")


def as_ladder(fallback: Sequence[str]) -> tuple[Rung, ...]:
    """
    Returns the steps that *fallback* names.

    Raises:
        TypeError, ValueError: it names no such thing.
    """
    if isinstance(fallback, str):
        raise TypeError(f"fallback must be a list, for example [{fallback!r}]")
    for each in fallback:
        if not isinstance(each, str):
            raise TypeError(f"fallback must be texts such as 'cpu', not {each!r}")
    return tuple(map(_rung, fallback))


def _rung(text: str) -> Rung:
    first, _, second = text.partition("/")
    if not second and first in _TYPES:
        return Rung(None, first)
    if second and second not in (*_TYPES, "default"):
        raise ValueError(f"fallback {text!r}: {second!r} is no compute type")
    try:
        return Rung(canonical_device(first), second or None)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"fallback {text!r} is neither a compute type ({', '.join(_TYPES)}) "
            "nor a device ('cpu', 'cuda:1'), nor both ('cuda:1/int8')"
        ) from error


class Attempts:
    """
    A request and its fallbacks, one after the other, until one succeeds.

    Iterating gives each request with the terms that are left for it.
    """

    def __init__(self, core: Core, request: Request, terms: Terms) -> None:
        self._core = core
        self._terms = terms
        self._started_s = core.clock.now()
        self._wanted = request
        self._requests = [request]
        for rung in terms.ladder:
            self._requests.append(rung.of(request))
            if rung.device is not None and rung.compute_type is None:
                # Another device may not compute in the type that was asked for.
                plain = replace(rung, compute_type="default").of(request)
                self._requests.append(plain)
        self._failure: WhisperCacheError | None = None

    def __iter__(self) -> Iterator[tuple[Request, Terms]]:
        for place, request in enumerate(self._requests):
            # Two steps may come to the same, for example on a host without cards.
            if request in self._requests[:place]:
                continue
            timeout_s = self._terms.timeout_s
            # One deadline for all attempts together.
            if timeout_s is not None and place:
                waited_s = self._core.clock.now() - self._started_s
                timeout_s = max(0.0, timeout_s - waited_s)
            yield request, replace(self._terms, timeout_s=timeout_s)

    @contextmanager
    def judging(self) -> Iterator[None]:
        """
        Swallows the errors after which a fallback is worth a try; the first is kept.
        """
        try:
            yield
        except WORTH_A_FALLBACK as error:
            if isinstance(error, NOT_WORTH_IT) or not self._terms.ladder:
                raise
            # Its frames hold this object and the lease: a cycle that would keep it.
            self._failure = self._failure or error.with_traceback(None)

    def failure(self) -> WhisperCacheError:
        """
        Returns why the request itself failed, once all fallbacks have too.
        """
        failure, self._failure = self._failure, None
        assert failure is not None
        return failure

    def succeed(self, key: ModelKey) -> None:
        """
        Tells what was got, if it is not what was wanted.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            from whispercache.events import FellBack

            from .refusals import one_line

            model, device, compute_type, *_ = self._wanted
            wanted = f"{model}/{device}/{compute_type}"
            reason = one_line(failure)
            _log.warning("%s in place of %s: %s", key, wanted, reason)
            with self._core.changing():
                self._core.state.counts["fallbacks"] += 1
                self._core.outbox.append(FellBack(key, wanted, reason))
