"""
What this process holds of an imaginary card: a file that the fake drivers read.

Both sides may change the file, on several threads: each first locks another, the
machine's state with ".lock" added to its name.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "OUT_OF_MEMORY",
    "CardBooks",
    "CardMemory",
    "change_machine",
    "visible_cards",
]

OUT_OF_MEMORY = "CUDA failed with error out of memory"


@dataclass(slots=True)
class CardBooks:
    """
    The lines of the file, in bytes.

    Attributes:
        context: Of the CUDA context: kernels, handles, whatever is outside the pool.
        used: Of the default memory pool, by those who allocated from it.
        reserved: Of the card, by the pool.
        peak: The most that was used.
        threshold: What the pool keeps when it gives back.
    """

    context: int = 0
    used: int = 0
    reserved: int = 0
    peak: int = 0
    threshold: int = 0


class CardMemory:
    """
    The file of one card, changed as CUDA's memory pool would change.

    Args:
        card: Place of its ``card`` line in the machine's state, from 0.
        has_pool: Whether allocations come from the pool. Else they make the context
            grow for ever: what is freed is kept for the next one.
    """

    def __init__(self, card: int, *, has_pool: bool = True) -> None:
        self._card = card
        self._path = Path(f"{os.environ['FAKE_GPU_STATE']}.{card}")
        self._has_pool = has_pool
        self._kept_bytes = 0

    def books(self) -> CardBooks:
        """
        What the file says; zeros where there is none.
        """
        known = {each.name for each in fields(CardBooks)}
        books = CardBooks()
        try:
            lines = self._path.read_text().splitlines()
        except FileNotFoundError:
            return books
        for line in lines:
            name, _, n_bytes = line.partition(" ")
            if name in known:
                setattr(books, name, int(n_bytes))
        return books

    def start_context(self, n_bytes: int) -> None:
        """
        Create the CUDA context, unless there is one.
        """
        with self._change() as books:
            if not books.context:
                self._must_be_free(books, n_bytes)
                books.context = n_bytes

    def grow_context(self, n_bytes: int) -> None:
        """
        Take bytes of the card outside the pool; negative ones are given back.

        Raises:
            RuntimeError: the card has too little.
        """
        with self._change() as books:
            self._must_be_free(books, n_bytes)
            books.context += n_bytes

    def take(self, n_bytes: int) -> None:
        """
        Allocate. The pool's idle bytes are used before it takes more of the card.

        Raises:
            RuntimeError: the card has too little.
        """
        with self._change() as books:
            if not self._has_pool:
                more_bytes = max(0, n_bytes - self._kept_bytes)
                self._must_be_free(books, more_bytes)
                books.context += more_bytes
                self._kept_bytes -= n_bytes - more_bytes
                return
            reserved = max(books.reserved, books.used + n_bytes)
            self._must_be_free(books, reserved - books.reserved)
            books.reserved = reserved
            books.used += n_bytes
            books.peak = max(books.peak, books.used)

    def give_back(self, n_bytes: int) -> None:
        """
        Free. The pool keeps the bytes until the next `synchronize`.
        """
        with self._change() as books:
            if not self._has_pool:
                self._kept_bytes += n_bytes
                return
            assert n_bytes <= books.used, f"{n_bytes} freed of {books.used}"
            books.used -= n_bytes

    def synchronize(self) -> None:
        """
        Wait for the card: the pool gives back what is idle above its threshold.
        """
        with self._change() as books:
            books.reserved = max(books.used, min(books.reserved, books.threshold))

    def _must_be_free(self, books: CardBooks, n_bytes: int) -> None:
        total_bytes, taken_bytes = _cards()[self._card]
        free_bytes = total_bytes - taken_bytes - books.context - books.reserved
        if n_bytes > free_bytes:
            raise RuntimeError(OUT_OF_MEMORY)

    @contextmanager
    def _change(self) -> Iterator[CardBooks]:
        with Path(f"{os.environ['FAKE_GPU_STATE']}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            books = self.books()
            yield books
            new = Path(f"{self._path}.python")
            new.write_text(
                "".join(f"{name} {value}\n" for name, value in asdict(books).items())
            )
            new.replace(self._path)


def visible_cards() -> list[int]:
    """
    The cards that CUDA sees, in its order.
    """
    lines = [line.split() for line in _state().splitlines()]
    visible = [line[1:] for line in lines if line[:1] == ["visible"]]
    return [int(card) for line in visible for card in line]


def change_machine(change: Callable[[list[str]], None]) -> None:
    """
    Let *change* edit the lines of the machine's state.
    """
    lines = _state().splitlines()
    change(lines)
    path = Path(os.environ["FAKE_GPU_STATE"])
    new = path.with_name(f"{path.name}.changed")
    new.write_text("\n".join(lines))
    new.replace(path)


def _cards() -> list[tuple[int, int]]:
    """
    Total and taken bytes of each card, those of other tenants.
    """
    lines = [line.split() for line in _state().splitlines()]
    return [(int(line[3]), int(line[4])) for line in lines if line[:1] == ["card"]]


def _state() -> str:
    return Path(os.environ["FAKE_GPU_STATE"]).read_text()
