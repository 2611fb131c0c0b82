"""
How the imaginary cards of this process behave, and what was done on them.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .card import OUT_OF_MEMORY, CardMemory, visible_cards

__all__ = [
    "CALLS",
    "ILLEGAL_ACCESS",
    "NOT_SUPPORTED",
    "NO_CUBLAS",
    "Card",
    "Conduct",
    "behave",
    "behaviour",
    "break_next_call",
    "card_at",
    "note",
    "starve_next_load",
]

MIB = 1024**2
ILLEGAL_ACCESS = "CUDA failed with error an illegal memory access was encountered"
NOT_SUPPORTED = "cuBLAS failed with status CUBLAS_STATUS_NOT_SUPPORTED"
NO_CUBLAS = "Library libcublas.so.12 is not found or cannot be loaded"

CALLS: list[tuple[str, str]] = []
"""
What was done to models on cards, in order, each with the name of its thread.

``build``, ``load``, ``load copy``, ``unload``, ``unload to_cpu``, ``unload refused``,
``drop copy``, ``drop``, ``encode``, ``generate``, ``detect_language``, ``align``.
"""


@dataclass(frozen=True, slots=True)
class Conduct:
    """
    What to take of cards, when, and what is to go wrong.

    Attributes:
        cards: How many CTranslate2 sees; all that CUDA sees if None.
        context_bytes: What the first model on a card takes for the context.
        kernels_bytes: What the first encode on a card adds to that, for good.
        handles_bytes: What each model adds from its first encode until it is dropped.
        pad_bytes: What the first generate after a load takes until the unload; as
            whispercache predicts it if None.
        work_bytes: What each call takes while it runs; likewise.
        jit_s: How long the first encode on a card compiles.
        cublas: Whether encode finds cuBLAS: it does, does not, or tries to.
        compute_types: What cards compute in.
        refused_types: In which of them cuBLAS does not know the cards.
        allocator: As in ``CT2_CUDA_ALLOCATOR``.
        stubborn: How many unloads of each model do nothing.
        leaks_bytes: What each unload keeps of the pool for ever.
        copies_fail: Whether the host has no memory for a copy of the weights.
        out_of_memory_at: Which loads of the process find too little, from 1.
        illegal_access_at: Which calls of the process break the context, from 1.
    """

    cards: int | None = None
    context_bytes: int = 200 * MIB
    kernels_bytes: int = 64 * MIB
    handles_bytes: int = 8 * MIB
    pad_bytes: int | None = None
    work_bytes: int | None = None
    jit_s: float = 0.0
    cublas: Literal["there", "missing", "looked for"] = "there"
    compute_types: frozenset[str] = frozenset(
        {
            *("float32", "float16", "bfloat16", "int8"),
            *("int8_float32", "int8_float16", "int8_bfloat16"),
        }
    )
    refused_types: tuple[str, ...] = ()
    allocator: Literal["cuda_malloc_async", "cub_caching"] = "cuda_malloc_async"
    stubborn: int = 0
    leaks_bytes: int = 0
    copies_fail: bool = False
    out_of_memory_at: tuple[int, ...] = ()
    illegal_access_at: tuple[int, ...] = ()


class Card:
    """
    One card as this process knows it. An illegal access breaks it for good.
    """

    def __init__(self, card: int) -> None:
        has_pool = behaviour().allocator == "cuda_malloc_async"
        self.memory = CardMemory(card, has_pool=has_pool)
        self.is_broken = False
        self._is_compiled = False
        self._compiling = threading.Lock()

    def start(self) -> None:
        """
        What precedes each load.
        """
        with _state.lock:
            _state.loads += 1
            number = _state.loads
        self._must_be_whole()
        self.memory.start_context(behaviour().context_bytes)
        if number in behaviour().out_of_memory_at:
            raise RuntimeError(OUT_OF_MEMORY)

    def call(self) -> None:
        """
        What precedes each call.
        """
        with _state.lock:
            _state.calls += 1
            number = _state.calls
        self._must_be_whole()
        if number in behaviour().illegal_access_at:
            self.is_broken = True
            raise RuntimeError(ILLEGAL_ACCESS)

    def compile(self, compute_type: str) -> None:
        """
        What precedes each encode: the first finds cuBLAS and compiles the kernels.
        """
        conduct = behaviour()
        if compute_type in conduct.refused_types:
            raise RuntimeError(NOT_SUPPORTED)
        if conduct.cublas == "missing":
            raise RuntimeError(NO_CUBLAS)
        if conduct.cublas == "looked for":
            try:
                ctypes.CDLL("libcublas.so.12")
            except OSError as error:
                raise RuntimeError(NO_CUBLAS) from error
        with self._compiling:
            if not self._is_compiled:
                self.memory.grow_context(conduct.kernels_bytes)
                time.sleep(conduct.jit_s)
                self._is_compiled = True

    def free(self, n_bytes: int) -> None:
        """
        Free weights, and wait for the card, as CTranslate2 does. Not once it is broken:
        then only the end of the process frees them.
        """
        if not self.is_broken:
            self.memory.give_back(n_bytes)
            self.memory.synchronize()

    def _must_be_whole(self) -> None:
        if self.is_broken:
            raise RuntimeError(ILLEGAL_ACCESS)


@dataclass(slots=True)
class _State:
    conduct: Conduct = field(default_factory=Conduct)
    cards: dict[int, Card] = field(default_factory=dict)
    loads: int = 0
    calls: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


_state = _State()


def behaviour() -> Conduct:
    """
    How the cards behave now.
    """
    return _state.conduct


def behave(**changes: Any) -> None:
    """
    Let the cards behave otherwise from now on: fields of `Conduct`.
    """
    _state.conduct = replace(_state.conduct, **changes)


def break_next_call() -> None:
    """
    Let the next call of any model break its card's context.
    """
    with _state.lock:
        behave(illegal_access_at=(_state.calls + 1,))


def starve_next_load() -> None:
    """
    Let the next load find too little memory.
    """
    with _state.lock:
        behave(out_of_memory_at=(_state.loads + 1,))


def card_at(ordinal: int) -> Card:
    """
    The card that CUDA knows by this number.
    """
    with _state.lock:
        if ordinal not in _state.cards:
            _state.cards[ordinal] = Card(visible_cards()[ordinal])
        return _state.cards[ordinal]


def note(what: str) -> None:
    """
    Add to `CALLS`, and as one word to the calls of the drivers.
    """
    CALLS.append((what, threading.current_thread().name))
    if path := os.environ.get("FAKE_GPU_CALLS"):
        with Path(path).open("a") as calls:
            calls.write(f"model:{what.replace(' ', '-')}\n")
