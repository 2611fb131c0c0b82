"""
Variants: copies of models in another weight type, kept in the user's cache directory.

A load whose file has another type converts it each time, which takes several times as
long as reading it. A variant is the same model converted once: a directory with a
model.bin in its type, copies of the small files beside it, and a sealed manifest. It
appears whole, by a rename, or not at all; one whose seal is broken is used again only
if its content is proven, or else removed.

Its name is a digest of the source, the version of the library that loads it, and the
type. So what has changed is not found, and leaves when its room is needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cachetools import LRUCache

from whispercache.devices.host import user_cache
from whispercache.engine.sizes.header import SMALL_FILES, ModelHeader, read_header
from whispercache.errors import WhisperCacheError, format_bytes

from .convert import Origin, converted_bytes, write_converted
from .manifest import MANIFEST, Manifest, Sealed, remove, writing

__all__ = [
    "MIN_SOURCE_BYTES",
    "Variant",
    "VariantRefused",
    "Variants",
]

_log = logging.getLogger("whispercache")

MIN_SOURCE_BYTES = 16 * 1024**2
"""
Size of a model.bin below which converting it costs too little to matter.
"""

KEPT_FREE_BYTES = 2 * 1024**3
"""
What a new variant leaves free on its disk.
"""

IN_USE_S = 3600.0
"""
Seconds after its last use in which a variant does not leave for another one: two that
take turns would be written again and again.
"""

LOCK_S = 1800.0
"""
Most seconds that a build waits for others that build.
"""

_NEEDED = frozenset({"config.json", "tokenizer.json"})
_SAMPLES = 16
_SAMPLE_BYTES = 4096


class VariantRefused(WhisperCacheError):
    """
    A variant cannot be written, or there is no room for it.
    """


@dataclass(frozen=True, slots=True)
class Variant:
    """
    One variant on the disk.

    Attributes:
        directory: Where it is.
        n_bytes: Bytes of its files.
        used_s: When it was last used, in seconds since 1970.
        state: ``"ready"``; ``"stale"``, if its source has changed or gone, or was
            converted for another version of the library; or ``"broken"``, if its files
            are not what was written.
        model: What its source was called.
        source: Directory of the source.
        kind: Type of its weights: ``"int8"``, ``"float32"`` or ``"float16"``.
        engine: Name and version of the library that it was converted for.
    """

    directory: Path
    n_bytes: int
    used_s: float
    state: str
    model: str = "?"
    source: str = "?"
    kind: str = "?"
    engine: str = "?"


class Variants:
    """
    The variants of a user.

    Thread-safe, and safe between processes.

    Args:
        engine: Name and version of the library that loads them.
        limit_bytes: Most bytes that all of them may take.
        directory: Where they are; ``variants`` in the user's cache directory if None.
    """

    def __init__(
        self,
        engine: str,
        limit_bytes: int,
        directory: Path | None = None,
    ) -> None:
        self.engine: str = engine
        self.limit_bytes: int = limit_bytes
        self._directory = directory
        self._lock = threading.Lock()
        # All that follows is guarded by _lock.
        self._identities: LRUCache[object, str] = LRUCache(64)
        self._rejected: set[str] = set()

    @property
    def directory(self) -> Path:
        """
        Where the variants are.
        """
        if self._directory is None:
            self._directory = user_cache() / "variants"
        return self._directory

    def forked(self) -> None:
        """
        Forget who held the lock, in a child that was forked.
        """
        self._lock = threading.Lock()

    # Use -----------------------------------------------------------------------------

    def find(self, source: Origin, kind: str) -> Path | None:
        """
        The directory of a variant, if there is one that can be trusted.

        Blocks: for some system calls; where a seal is broken, to read the variant.
        """
        try:
            directory = self.directory / self._name(source, kind)
            if directory.name in self._rejected or not self._is_good(directory):
                return None
        except OSError as error:
            _log.debug("no %s variant of %s: %s", kind, source.model, error)
            return None
        with suppress(OSError):  # where nobody can write, none has to leave, either
            os.utime(directory / MANIFEST)
        return directory

    def reject(self, source: Origin, kind: str) -> None:
        """
        Find this variant no more: it is there, but could not be loaded.
        """
        directory = self.find(source, kind)
        if directory is None:
            return
        _log.warning("the %s variant of %s cannot be loaded", kind, source.model)
        with self._lock:
            self._rejected.add(directory.name)

    def is_rejected(self, source: Origin, kind: str) -> bool:
        """
        Whether it was rejected.
        """
        return self._name(source, kind) in self._rejected

    def _is_good(self, directory: Path) -> bool:
        """
        Whether the variant is there as it was written; if it is not, it goes.
        """
        manifest = Manifest.read(directory)
        if manifest is not None:
            if manifest.is_sealed(directory):
                return True
            # Before it is read, or what is written meanwhile would be sealed, too.
            again = manifest.sealed_again(directory)
            if again is not None and manifest.is_whole(directory):
                with suppress(OSError):  # else it is read whole the next time, too
                    again.write(directory)
                return True
        elif not directory.exists():
            return False
        _log.warning("a variant is not as it was written, and goes: %s", directory)
        remove(directory)
        return False

    # Build ---------------------------------------------------------------------------

    def build(self, source: Origin, kind: str) -> Path:
        """
        Write a variant of *source*, unless it is there; its directory.

        Blocks: reads and writes the model, base for about a second; first, for others
        that build.

        Raises:
            VariantRefused: there is no room for it, or the source cannot have one.
            CorruptModel: the source is broken.
            OSError: it cannot be written.
        """
        from filelock import FileLock, Timeout

        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.directory / ".lock", timeout=LOCK_S):
                return self._build_in_turn(source, kind)
        except (Timeout, NotImplementedError) as error:
            raise VariantRefused(f"others build variants there: {error}") from error

    def _build_in_turn(self, source: Origin, kind: str) -> Path:
        name = self._name(source, kind)
        target = self.directory / name
        if self._is_good(target):
            return target
        for pattern in (".new-*", ".gone-*"):  # of processes that were killed
            for left in self.directory.glob(pattern):
                shutil.rmtree(left, ignore_errors=True)
        small = _small_files(source.directory)
        for missing in sorted(_NEEDED - small.keys()):
            raise VariantRefused(f"its source has no {missing}")
        small_bytes = sum(map(len, small.values()))
        self._make_room(converted_bytes(source.header, kind) + small_bytes)
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=self.directory))
        try:
            files = _write(source.header, kind, small, new)
            home = str(source.directory)
            manifest = Manifest(name, source.model, home, kind, self.engine, files)
            manifest.write(new)
            new.rename(self._still(source, kind, target))
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        for other in self.list():
            # Those of another version may be in use by another environment.
            place = (other.source, other.kind, other.engine)
            taken = (str(source.directory), kind, self.engine)
            if other.state == "stale" and place == taken:
                self._remove_if_possible(other)
        return target

    def _still(self, source: Origin, kind: str, target: Path) -> Path:
        """
        *target*, if the source is still what its name says.
        """
        if self._name(source._replace(stamp=()), kind) != target.name:
            raise VariantRefused("the files of its source changed meanwhile")
        return target

    def _make_room(self, n_bytes: int) -> None:
        """
        Remove what was least recently used until *n_bytes* more are within the limit.

        Raises:
            VariantRefused: there is too little room, even so.
        """
        limit = format_bytes(self.limit_bytes)
        wanted = f"it takes {format_bytes(n_bytes)}"
        if n_bytes > self.limit_bytes:
            raise VariantRefused(f"{wanted}, and all variants may take {limit}")
        # What no load would find goes first.
        others = sorted(
            self.list(), key=lambda each: (self._is_of_use(each), each.used_s)
        )
        over_bytes = sum(each.n_bytes for each in others) + n_bytes - self.limit_bytes
        leaving: list[Variant] = []
        now_s = time.time()
        for other in others:
            if over_bytes <= 0:
                break
            if self._is_of_use(other) and 0 <= now_s - other.used_s < IN_USE_S:
                reason = f"{wanted}, and those in use leave too little of {limit}"
                raise VariantRefused(reason)
            leaving.append(other)
            over_bytes -= other.n_bytes
        free_bytes = shutil.disk_usage(self.directory).free
        kept_bytes = free_bytes + sum(each.n_bytes for each in leaving) - n_bytes
        if kept_bytes < KEPT_FREE_BYTES:
            free = format_bytes(free_bytes)
            raise VariantRefused(f"{wanted}, and its disk has {free} left")
        for other in leaving:
            self._remove_if_possible(other)

    def _is_of_use(self, variant: Variant) -> bool:
        """
        Whether a load may find it: here, or in an environment with another library.
        """
        return variant.state == "ready" or variant.engine not in ("?", self.engine)

    def _remove_if_possible(self, variant: Variant) -> None:
        """
        Delete one that is only in the way.
        """
        try:
            remove(variant.directory)
        except OSError as error:
            _log.warning("a variant that should leave stays: %s", error)

    # Look after ----------------------------------------------------------------------

    def list(self) -> list[Variant]:
        """
        All variants on the disk, of whatever source.

        Blocks: for system calls; where a seal is broken, to read the variant.
        """
        if not self.directory.is_dir():
            return []
        found = (self._look_at(each) for each in sorted(self.directory.iterdir()))
        return [variant for variant in found if variant is not None]

    def remove(self, variant: Variant) -> None:
        """
        Delete one. A load from it goes on, where the system lets open files go.

        Raises:
            OSError: it cannot be deleted.
        """
        remove(variant.directory)

    def _look_at(self, directory: Path) -> Variant | None:
        if directory.name.startswith(".") or not directory.is_dir():
            return None
        try:
            n_bytes = sum(each.stat().st_size for each in directory.iterdir())
            manifest = Manifest.read(directory)
            if manifest is None:
                return Variant(directory, n_bytes, 0.0, "broken")
            used_s = (directory / MANIFEST).stat().st_mtime
        except FileNotFoundError:  # it is leaving just now
            return None
        except OSError as error:
            _log.warning("a variant cannot be read: %s", error)
            return Variant(directory, 0, 0.0, "broken")
        if not manifest.is_whole(directory):
            state = "broken"
        else:
            state = "ready" if self._is_current(directory, manifest) else "stale"
        told = (manifest.model, manifest.source, manifest.kind, manifest.engine)
        return Variant(directory, n_bytes, used_s, state, *told)

    def _is_current(self, directory: Path, manifest: Manifest) -> bool:
        """
        Whether a load of its source would find it.
        """
        try:
            source = Origin(manifest.model, read_header(manifest.source))
            return self._name(source, manifest.kind) == directory.name
        except (WhisperCacheError, OSError):
            return False

    # Names ---------------------------------------------------------------------------

    def _name(self, source: Origin, kind: str) -> str:
        """
        What the directory of a variant is called.
        """
        changed_ns = source.header.path.stat().st_ctime_ns
        place = (source.header.path, source.stamp, changed_ns)
        with self._lock:
            identity = self._identities.get(place) if source.stamp else None
        if identity is None:
            identity = _identity(source.header, self.engine)
            if source.stamp:
                with self._lock:
                    self._identities[place] = identity
        return f"{identity}-{kind}"


def _write(
    header: ModelHeader, kind: str, small: dict[str, bytes], directory: Path
) -> dict[str, Sealed]:
    """
    Write the files of a variant; what each of them is.
    """
    files: dict[str, Sealed] = {}
    with writing(directory / "model.bin", files) as target:
        write_converted(header, kind, target)
    for name, content in small.items():
        with writing(directory / name, files) as target:
            target.write(content)
    return files


def _small_files(directory: Path) -> dict[str, bytes]:
    """
    What a variant has beside its weights: the files of its source, but for a vocabulary
    in JSON, which CTranslate2 takes twice as long to read as lines.

    Source: a third of a load of base as int8, 52 ms against 37 (CTranslate2 4.8.5).
    """
    paths = (directory / name for name in SMALL_FILES)
    found = {path.name: path.read_bytes() for path in paths if path.is_file()}
    lines = _as_lines(found.get("vocabulary.json", b""))
    if lines is not None:
        del found["vocabulary.json"]
        found["vocabulary.txt"] = lines
    return found


def _as_lines(vocabulary: bytes) -> bytes | None:
    """
    A vocabulary in JSON with a line for each token; None if that would be another one.
    """
    try:
        tokens = json.loads(vocabulary)
    except ValueError:  # nor would it be loaded as it is
        return None
    # A line ends at its first line break, and may lose a carriage return.
    if not isinstance(tokens, list) or not all(
        isinstance(each, str) and "\n" not in each and not each.endswith("\r")
        for each in tokens
    ):
        return None
    return "".join(f"{each}\n" for each in tokens).encode()


def _identity(header: ModelHeader, engine: str) -> str:
    """
    A digest of what a source is: its place and times, header and samples of its
    weights, and the small files whole.

    Nobody can set the time of the last change, as one can that of the last writing:
    files of one size, with a time that was set, may differ where there is no sample.
    """
    digest = hashlib.blake2b(digest_size=16)
    with header.path.open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        file_is = (os.path.realpath(header.path), status.st_ino, status.st_ctime_ns)
        written = (status.st_size, status.st_mtime_ns)
        told = (engine, file_is, written, header.variables, header.aliases)
        digest.update(repr(told).encode())
        for place in range(_SAMPLES):
            file.seek(status.st_size * place // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    for name in SMALL_FILES:
        path = header.path.parent / name
        if path.is_file():
            digest.update(name.encode() + hashlib.blake2b(path.read_bytes()).digest())
    return digest.hexdigest()
