"""
The kernel's page cache: files that were read are loaded without the disk.

Nobody is charged for those pages; the kernel drops them when it needs the room.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path
from typing import BinaryIO

__all__ = ["ReadAhead", "read_through"]

_log = logging.getLogger("whispercache")

_BLOCK_BYTES = 4 << 20
_MOST_AT_ONCE = 2


class ReadAhead:
    """
    Reads files that will soon be loaded, while something else goes on.

    On threads of its own: to advise the kernel (posix_fadvise) returns no sooner, and
    only reads as much at once as the kernel's own read-ahead would; a load right after
    it was slower than one of a cold file (benchmarks/page.py).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reading: set[Path] = set()  # guarded by _lock

    def start(self, path: Path) -> None:
        """
        Have *path* read.

        Returns at once. What cannot be read will be told by who loads it. Nothing is
        read while two others are: those whose turn is later would push them out.
        """
        with self._lock:
            if path in self._reading or len(self._reading) >= _MOST_AT_ONCE:
                return
            self._reading.add(path)
        thread = threading.Thread(
            target=self._read, args=(path,), name="whispercache-pages", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # there are too many, or this is the end
            _log.debug("%s is not read ahead: %s", path, error)
            self._is_over(path)

    def _read(self, path: Path) -> None:
        try:
            read_through(path)
        except OSError as error:
            _log.debug("%s is not read ahead: %s", path, error)
        finally:
            self._is_over(path)

    def _is_over(self, path: Path) -> None:
        with self._lock:
            self._reading.discard(path)


def read_through(path: Path) -> None:
    """
    Read a file, so that its pages are in memory as far as there is room.

    Blocks: until it is read.

    Raises:
        OSError: it cannot be.
    """
    with path.open("rb", buffering=0) as file:
        if sys.platform == "linux":
            try:
                _send_away(file)
            except OSError as error:  # some file systems cannot
                _log.debug("%s is read with a copy: %s", path, error)
            else:
                return
        block = bytearray(_BLOCK_BYTES)
        while file.readinto(block):
            pass


def _send_away(file: BinaryIO) -> None:
    """
    Read without copying, which takes a quarter of the processor's time.

    Source: 70 ms, 4 of them of a processor, against 118 and 18, for the cold file of
    base.
    """
    with Path(os.devnull).open("wb", buffering=0) as nowhere:
        at = 0
        while sent := os.sendfile(nowhere.fileno(), file.fileno(), at, _BLOCK_BYTES):
            at += sent
