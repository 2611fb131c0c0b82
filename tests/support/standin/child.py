"""
A whole cache over the imaginary cards: what a child process of a test finds.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from whispercache import ModelCache
from whispercache.testing import check, settle, wait_until

from .card import change_machine
from .conduct import CALLS

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from whispercache import Event
    from whispercache.events import DeviceInfo
    from whispercache.options import CacheOptions

__all__ = [
    "SILENCE",
    "TOLD",
    "WARNED",
    "all_of",
    "check",
    "done",
    "info",
    "last",
    "log",
    "make_way",
    "open_cache",
    "others_take",
    "say",
    "settle",
    "wait_until",
]

E = TypeVar("E", bound="Event")

SILENCE = np.zeros(16_000, np.float32)

TOLD: list[Event] = []
"""
The events of all caches.
"""

WARNED: list[str] = []
"""
What was logged as a warning or worse; nothing of it is printed.
"""


class _Note(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        WARNED.append(record.getMessage())


logging.getLogger("whispercache").addHandler(_Note(logging.WARNING))
logging.getLogger("whispercache").propagate = False


def log(what: str) -> None:
    """
    Add a word to the calls of the drivers.
    """
    with Path(os.environ["FAKE_GPU_CALLS"]).open("a") as calls:
        calls.write(f"{what}\n")


def open_cache(**options: Unpack[CacheOptions]) -> ModelCache:
    """
    A cache with the usual loader and probe. Its events are in `TOLD`, and in the log.
    """
    given: CacheOptions = {"variants": False}
    given.update(options)
    cache = ModelCache(**given)

    def listen(event: Event) -> None:
        # First in the log: whoever waits for it in TOLD goes on, and logs, at once.
        log(f"told:{type(event).__name__}")
        TOLD.append(event)

    cache.subscribe(listen)
    return cache


def say(
    cache: ModelCache,
    model: str | None = None,
    device: str = "cuda",
    compute_type: str = "float16",
) -> str:
    """
    What *model* answers to silence; that of the variable ``MODEL`` if None.
    """
    found = cache.get_model(model or os.environ["MODEL"], device, compute_type)
    segments, _ = found.transcribe(SILENCE)
    return "".join(each.text for each in segments)


def make_way(cache: ModelCache, device: str = "cuda:0") -> None:
    """
    Have one idle model leave *device*, as if another program needed the room.
    """
    core = cache._core
    core.make_room_for_others(core.devices[device], 1)
    settle(cache)
    check(cache)


def info(cache: ModelCache, device: str = "cuda:0") -> DeviceInfo:
    """
    What the cache says of *device*.
    """
    return next(each for each in cache.devices() if each.device == device)


def all_of(kind: type[E]) -> list[E]:
    """
    The events of that kind, in order.
    """
    return [event for event in TOLD if isinstance(event, kind)]


def last(kind: type[E]) -> E:
    """
    The last event of that kind.
    """
    return all_of(kind)[-1]


def done(*names: str) -> list[str]:
    """
    What was done to models on cards, in order; only *names* if there are any.
    """
    return [name for name, _ in CALLS if not names or name in names]


def others_take(n_bytes: int, card: int = 0) -> None:
    """
    Have other processes hold that much of *card* from now on.
    """

    def change(lines: list[str]) -> None:
        places = [i for i, line in enumerate(lines) if line.startswith("card ")]
        words = lines[places[card]].split()
        words[4] = str(n_bytes)
        lines[places[card]] = " ".join(words)

    change_machine(change)
