"""
The manifest of a variant: its origin, and a stamp of each file.

A stamp is size, times and inode, and takes one system call to compare. The time of the
last change cannot be set, so a file that was written to is noticed even if its size and
time are as before. A copied variant is not trusted either, and built anew.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_log = logging.getLogger("whispercache")

# Size of a file in bytes, its two times in nanoseconds, and its inode.
Stamp = tuple[int, ...]

MANIFEST = "variant.json"

_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Manifest:
    """
    The description of a directory by a file in it.

    Attributes:
        name: Name of the directory.
        model: Name of the model that it was made of.
        source: Directory of that model.
        kind: Type of the weights.
        engine: Name and version of the library that loads them.
        files: Stamps of all other files, by name.
    """

    name: str
    model: str
    source: str
    kind: str
    engine: str
    files: dict[str, Stamp]

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """
        Reads the manifest of *directory*; None if it has none, or a broken one.
        """
        path = directory / MANIFEST
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            # Of an earlier version, whose variants are built anew.
            if found.pop("format") != _FORMAT:
                return None
            files = {
                str(name): tuple(map(int, stamp))
                for name, stamp in found.pop("files").items()
            }
            texts = {str(name): str(text) for name, text in found.items()}
            manifest = cls(**texts, files=files)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
        ):
            _log.warning("%s is broken", path)
            return None
        return manifest if files else None

    def write(self, directory: Path) -> None:
        """
        Writes the manifest into *directory*, which no other process looks at yet.
        """
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)
        with writing(directory / MANIFEST, {}) as file:
            file.write(text.encode())

    def is_intact(self, directory: Path) -> bool:
        """
        Tells whether the directory has the files as they were, and no others.
        """
        known = {MANIFEST, *self.files}
        try:
            there = {each.name for each in directory.iterdir()}
            stamps = {name: _stamp(directory / name) for name in self.files}
        except FileNotFoundError:
            return False
        # Hidden ones are the file system's own, or those of backups.
        has_others = any(not name.startswith(".") for name in there - known)
        return directory.name == self.name and stamps == self.files and not has_others


@contextmanager
def writing(path: Path, files: dict[str, Stamp]) -> Iterator[BinaryIO]:
    """
    Opens a new file. After the block it is on the disk, and its stamp in *files*.
    """
    with path.open("xb") as file:
        yield file
        file.flush()
        # Before the rename of the directory, which may reach the disk earlier.
        os.fsync(file.fileno())
    files[path.name] = _stamp(path)


def remove(directory: Path) -> None:
    """
    Deletes a directory, renamed first so that no load finds half of it.
    """
    if directory.is_symlink() or directory.is_file():
        directory.unlink(missing_ok=True)
        return
    renamed = directory.with_name(f".gone-{directory.name}-{os.getpid()}")
    try:
        directory.rename(renamed)
    except FileNotFoundError:
        return
    # A build that clears up may delete it at the same time.
    with suppress(FileNotFoundError):
        shutil.rmtree(renamed)


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return (status.st_size, *times, status.st_ino)
