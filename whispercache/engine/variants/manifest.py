"""
Seals: directories of files that show whether somebody has written to them since.

A manifest beside the files has a digest of each, and its seal: size, times and inode. A
seal takes one system call to check. A broken one proves nothing, for a copy breaks it,
too; then the digests tell.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["MANIFEST", "Manifest", "Sealed", "Writing", "remove", "writing"]

_log = logging.getLogger("whispercache")

MANIFEST = "variant.json"

_FORMAT = 1
_DIGEST_BYTES = 16
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Sealed:
    """
    What one file was when it was written.

    Attributes:
        digest: BLAKE2b of its content, in hexadecimal digits.
        seal: Its size in bytes, its two times in nanoseconds, and its inode.
    """

    digest: str
    seal: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """
    What a directory says of its files.

    Attributes:
        name: What the directory is called.
        model: What their source is called.
        source: Directory of the source.
        kind: Type of the weights.
        engine: Name and version of the library that loads them.
        files: The files, by name.
    """

    name: str
    model: str
    source: str
    kind: str
    engine: str
    files: dict[str, Sealed]

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """
        The manifest of *directory*; None if it has none, or one that cannot be read.
        """
        path = directory / MANIFEST
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.pop("format") != _FORMAT:
                return None
            files = {
                str(name): Sealed(str(told["digest"]), tuple(map(int, told["seal"])))
                for name, told in found.pop("files").items()
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
        Put the manifest into *directory*, whole or not at all.
        """
        new = directory / f".{MANIFEST}-{os.getpid()}-{threading.get_ident()}"
        with new.open("w", encoding="utf-8") as file:
            json.dump({"format": _FORMAT, **asdict(self)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.replace(directory / MANIFEST)

    def is_sealed(self, directory: Path) -> bool:
        """
        Whether nobody has written to the files.
        """
        try:
            return self._is_of(directory) and all(
                _seal(directory / name) == sealed.seal
                for name, sealed in self.files.items()
            )
        except FileNotFoundError:
            return False

    def is_whole(self, directory: Path) -> bool:
        """
        Whether the files have the content that was written. Reads those that are not
        sealed.
        """
        try:
            return self._is_of(directory) and all(
                _seal(directory / name) == sealed.seal
                or _digest(directory / name) == sealed.digest
                for name, sealed in self.files.items()
            )
        except OSError:
            return False

    def _is_of(self, directory: Path) -> bool:
        """
        Whether it was written for this directory, which has no other files: a loader
        might read them, too.
        """
        there = {each.name for each in directory.iterdir()}
        others = there - {MANIFEST, *self.files}
        return directory.name == self.name and all(map(_is_hidden, others))

    def sealed_again(self, directory: Path) -> Manifest | None:
        """
        The same with the seals that the files have now; None if some are missing.
        """
        try:
            files = {
                name: replace(sealed, seal=_seal(directory / name))
                for name, sealed in self.files.items()
            }
        except FileNotFoundError:
            return None
        return replace(self, files=files)


class Writing:
    """
    A file that is being written, and its digest so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)

    def write(self, data: bytes) -> int:
        """
        Write all of *data*.
        """
        self._digest.update(data)
        return self._file.write(data)

    @property
    def digest(self) -> str:
        """
        Of all that was written.
        """
        return self._digest.hexdigest()


@contextmanager
def writing(path: Path, files: dict[str, Sealed]) -> Iterator[Writing]:
    """
    A new file. After the block it is on the disk, and noted in *files*.
    """
    with path.open("xb") as file:
        new = Writing(file)
        yield new
        file.flush()
        os.fsync(file.fileno())
    files[path.name] = Sealed(new.digest, _seal(path))


def remove(directory: Path) -> None:
    """
    Delete a directory, which is out of reach before its first file goes; or whatever
    has its name.
    """
    if directory.is_symlink() or directory.is_file():
        directory.unlink(missing_ok=True)
        return
    gone = directory.with_name(f".gone-{directory.name}-{os.getpid()}")
    try:
        directory.rename(gone)
    except FileNotFoundError:
        return
    with suppress(FileNotFoundError):  # a build that clears up deletes it, too
        shutil.rmtree(gone)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _seal(path: Path) -> tuple[int, ...]:
    status = path.stat()
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return (status.st_size, *times, status.st_ino)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    with path.open("rb") as file:
        for block in iter(partial(file.read, _BLOCK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()
