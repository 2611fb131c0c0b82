"""
Files in the kernel's page cache: in it, out of it, and how much of them. Linux only.

Under a virtual machine a cold file is as cold as the host's own cache.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

READ_BYTES = 1 << 20
PATIENCE_S = 2.0

_mincore = ctypes.CDLL(None, use_errno=True).mincore


def read(file: Path) -> None:
    """
    Reads a file to its end, which puts it into the page cache.
    """
    buffer = bytearray(READ_BYTES)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


def make_cold(files: Sequence[Path]) -> None:
    """
    Puts *files* out of the page cache.

    Blocks: until pages that are still being read can be dropped.
    """
    until_s = time.perf_counter() + PATIENCE_S
    while True:
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        n_pages = sum(map(_pages_in_memory, files))
        if not n_pages:
            return
        if time.perf_counter() > until_s:
            where = files[0].parent
            raise RuntimeError(
                f"{n_pages} pages of {where} stayed in memory: set TMPDIR"
            )


def _pages_in_memory(file: Path) -> int:
    with file.open("rb") as opened:
        n_bytes = os.fstat(opened.fileno()).st_size
        # A private mapping: ctypes wants it writable, nothing is written.
        with mmap.mmap(opened.fileno(), n_bytes, access=mmap.ACCESS_COPY) as mapping:
            flags = (ctypes.c_ubyte * -(-n_bytes // mmap.PAGESIZE))()
            first = ctypes.c_char.from_buffer(mapping)
            address = ctypes.c_void_p(ctypes.addressof(first))
            failed = _mincore(address, ctypes.c_size_t(n_bytes), flags)
            del first  # the mapping cannot be closed before
    if failed:
        raise OSError(ctypes.get_errno(), "mincore", str(file))
    return sum(flag & 1 for flag in flags)
