"""
The heap of the C library that models are loaded into, in huge pages.

A load takes fresh memory, in which the processor stops at each page of 4 KiB for the
kernel to find and clear one: in float32 that is half of a load. Pages of 2 MiB are 512
times fewer, but the kernel gives them only where it was advised to, and glibc maps the
largest blocks anew each time, at addresses that nobody knows before.

In a process that has called `use_huge_pages` all threads share one heap, the only one
that can grow as far as a model needs. Before a load a part of it is advised, all blocks
come from there while the load lasts, and the advice is withdrawn at its end: else the
kernel would in time fill what was freed up with huge pages again. What an unload frees
for a load that follows stays in the heap, where that finds it; so does what a call
frees, until it ends, since CTranslate2 takes its largest blocks anew in each layer.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from .host import return_free_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Mode = Literal["always", "madvise", "never", ""]

# Source: malloc.h of glibc.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
# Source: mman-common.h of Linux.
_HUGEPAGE, _NOHUGEPAGE = 14, 15

# What glibc itself comes to once it has freed large blocks: the size from which it maps
# one apart, how many it so maps, and the bytes at the heap's end that it keeps. Source:
# DEFAULT_MMAP_THRESHOLD_MAX and DEFAULT_MMAP_MAX in malloc.c of glibc 2.36.
_MAPPED_FROM_BYTES = 32 * 1024**2
_MOST_MAPPED = 65536
_KEPT_BYTES = 64 * 1024**2

_SETTINGS = "sys/kernel/mm/transparent_hugepage/"

_ENOUGH_PAGES = 8
"""
Huge pages in a load for which it is advised; with fewer, the one that is filled in part
would count. Where a huge page is 512 MiB (ARM, kernels with pages of 64 KiB), few
models have them.
"""


class Heap:
    """
    The heap of this process, in glibc's hands.

    Args:
        library: glibc, or what stands for it.
        huge_page_bytes: The size of a huge page; 0 where they need no advice.
        always_keeps: It does what `keep` does, for good.
    """

    def __init__(
        self, library: ctypes.CDLL, huge_page_bytes: int, *, always_keeps: bool = False
    ) -> None:
        self._mallopt = library.mallopt
        self._malloc, self._free = library.malloc, library.free
        self._madvise = library.madvise
        self._malloc.restype = ctypes.c_void_p
        self._malloc.argtypes = [ctypes.c_size_t]
        self._free.argtypes = [ctypes.c_void_p]
        self._madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._huge_page_bytes = huge_page_bytes
        self._always_keeps = always_keeps
        # The garbage collector may end a call that was given up, at any moment.
        self._lock = threading.RLock()
        self._load_follows = False
        # Those under way that keep what they free.
        self._calls = 0

    def share(self) -> None:
        """
        Has all threads that start from now on use one heap.
        """
        self._mallopt(_ARENA_MAX, 1)
        self._mallopt(_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
        self.keep()
        self.settle()

    def keep(self) -> None:
        """
        Has all blocks come from the heap from now on, and freed ones stay in it.
        """
        with self._lock:
            self._load_follows = True
            self._keep()

    def settle(self) -> None:
        """
        Ends what `keep` began, once no call is under way. Frees nothing.
        """
        with self._lock:
            self._load_follows = False
            self._settle()

    @contextmanager
    def calling(self, *, keeps: bool) -> Iterator[None]:
        """
        Returns to the system what a call has freed, when it ends. Others that are under
        way get anew what they still need: once, where each layer of theirs would.

        Args:
            keeps: Until then, freed blocks stay in the heap.
        """
        with self._lock:
            self._calls += keeps
            if keeps:
                self._keep()
        try:
            yield
        finally:
            with self._lock:
                self._calls -= keeps
                self._settle()
                # What was freed for a load is not this call's.
                returns = not self._load_follows and not self._always_keeps
            if returns:
                return_free_memory()

    def _keep(self) -> None:
        self._mallopt(_MMAP_MAX, 0)
        # That is: never.
        self._mallopt(_TRIM_THRESHOLD, -1)

    def _settle(self) -> None:
        if self._always_keeps or self._load_follows or self._calls:
            return
        self._mallopt(_MMAP_MAX, _MOST_MAPPED)
        self._mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)

    @contextmanager
    def loading(self, n_bytes: int) -> Iterator[None]:
        """
        Has the blocks of a load come in huge pages from the heap.

        Two loads at once, to several devices, settle the heap when the first one ends;
        the rest of the other one is as slow as elsewhere.

        Args:
            n_bytes: Memory that the load takes at its peak.
        """
        self.keep()
        advised = None
        if 0 < _ENOUGH_PAGES * self._huge_page_bytes <= n_bytes:
            advised = self._advise(n_bytes)
        try:
            yield
        finally:
            if advised is not None:
                # The pages that the load has filled stay as they are.
                self._madvise(*advised, _NOHUGEPAGE)
            self.settle()

    def _advise(self, n_bytes: int) -> tuple[int, int] | None:
        """
        Finds room in the heap, which grows if need be. Returns its address and length.
        """
        address: int | None = self._malloc(n_bytes)
        # The load will say that there is not enough.
        if address is None:
            return None
        page_bytes = mmap.PAGESIZE
        start = -(-address // page_bytes) * page_bytes
        length = (address + n_bytes - start) // page_bytes * page_bytes
        # A kernel without huge pages refuses.
        refused = self._madvise(start, length, _HUGEPAGE)
        self._free(address)
        return None if refused else (start, length)


# The heap that all threads share, in a process that has asked for that.
_heap: list[Heap] = []


def use_huge_pages(*, keep: bool = False) -> bool:
    """
    Has models loaded into huge pages from now on, in this process.

    Where models take turns on the CPU, a load in float32 then takes half the time. A
    call keeps what it frees until it ends, which spares it a fifth of its CPU time.
    The commands do this by themselves; a program calls it first, before threads start.
    From then on all threads share one heap of the C library, as with
    ``MALLOC_ARENA_MAX=1``, which slows programs down whose threads allocate much at the
    same time.

    Args:
        keep: What calls free stays in the process until a model is unloaded, so that
            later ones on the CPU need not ask the kernel for it again; with glibc also
            where there are no huge pages. For programs that end with their work, and
            transcribe without batches. Only the first call that works can say so.
            Source: a transcription of 3 s by tiny.en as int8, CTranslate2 4.8.5:
            82,000 page faults and 0.50 s of CPU time; with it 200 and 0.29 s.

    Returns:
        True if it worked. False where there are none: ``whispercache doctor`` tells
        why. Nothing has then changed, except for what *keep* says.
    """
    problem = huge_pages_problem()
    library = _glibc()
    if library is None or (problem and not keep):
        return False
    if not _heap:
        # Where all memory comes in huge pages, or none, there is nothing to advise.
        needs_advice = huge_pages() == "madvise"
        page_bytes = huge_page_bytes() if needs_advice else 0
        heap = Heap(library, page_bytes, always_keeps=keep)
        heap.share()
        _heap.append(heap)
    return not problem


def huge_pages_problem() -> str:
    """
    Returns why models cannot be loaded into huge pages; empty if they can. What helps
    comes after a colon.
    """
    if _glibc() is None:
        return "they need Linux with glibc"
    mode = huge_pages()
    if mode == "never":
        return (
            "the kernel's setting is never: as root, write madvise to "
            f"/{_SETTINGS}enabled"
        )
    return "" if mode else "the kernel has none"


def huge_pages(root: Path = Path("/")) -> Mode:
    """
    Returns to whom the kernel gives transparent huge pages: ``"always"`` to all,
    ``"madvise"`` where they are asked for, ``"never"``; empty if it has none.

    Source: https://docs.kernel.org/admin-guide/mm/transhuge.html
    """
    # The brackets mark what is in force.
    mode = _setting(root, "enabled").partition("[")[2].partition("]")[0]
    return cast("Mode", mode) if mode in ("always", "madvise", "never") else ""


def huge_page_bytes(root: Path = Path("/")) -> int:
    """
    Returns the size of a huge page; 0 if unknown.
    """
    text = _setting(root, "hpage_pmd_size").strip()
    return int(text) if text.isdecimal() else 0


def is_shared() -> bool:
    """
    Tests if all threads of this process use one heap, by `use_huge_pages`.
    """
    return bool(_heap)


@contextmanager
def loading(peak_bytes: Callable[[], int]) -> Iterator[None]:
    """
    Has the memory of a load, which tells its peak, come from the shared heap, in huge
    pages, if this process has one.
    """
    if not _heap:
        yield
        return
    with _heap[0].loading(peak_bytes()):
        yield


@contextmanager
def calling(*, keeps: bool) -> Iterator[None]:
    """
    Returns what a call on the CPU has freed at its end, if this process has a shared
    heap, in which it would stay. If it *keeps*, it stays until then.
    """
    if not _heap:
        yield
        return
    with _heap[0].calling(keeps=keeps):
        yield


def keep() -> None:
    """
    Keeps memory that is freed from now on for the load that follows.
    """
    for heap in _heap:
        heap.keep()


def settle() -> None:
    """
    Ends what `keep` began.
    """
    for heap in _heap:
        heap.settle()


def _setting(root: Path, name: str) -> str:
    try:
        path = root / _SETTINGS / name
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        # Others have a mallopt, too, with parameters of their own.
        _ = library.gnu_get_libc_version, library.mallopt
    # Another C library (musl, macOS), or none (Windows: TypeError).
    except (AttributeError, OSError, TypeError):
        return None
    return library
