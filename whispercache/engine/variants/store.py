"""
The store of variants: copies of models in another weight type, in the user's cache.

A load whose file has another type converts it each time, which takes several times as
long as reading it. A variant was converted once: a directory with a model.bin, the
small files beside it, and a manifest. It appears whole, by a rename, or not at all; one
that somebody has written to is removed.

Its name is a digest of the source, the version of the library that loads it, and the
type. So a variant of a changed source is not found, and removed when its room is
needed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from whispercache.devices.host import user_cache
from whispercache.engine.sizes.header import SMALL_FILES, ModelHeader, read_header
from whispercache.errors import WhisperCacheError, format_bytes

from .convert import Origin, converted_bytes, write_converted
from .manifest import MANIFEST, Manifest, Stamp, remove, writing

_log = logging.getLogger("whispercache")

# Size of a model.bin below which converting it costs too little to matter.
MIN_SOURCE_BYTES = 16 * 1024**2
# Bytes that a new variant leaves free on its disk.
KEPT_FREE_BYTES = 2 * 1024**3
# Seconds after its last use in which a variant is not removed for another one: two that
# take turns would be written again and again.
IN_USE_S = 3600.0
# Most seconds that a build waits for others that build.
LOCK_S = 1800.0

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
        directory: The directory of its files.
        n_bytes: Bytes of its files.
        used_s: Time of its last use, in seconds since 1970.
        state: ``"ready"``; ``"stale"``, if its source has changed or gone, or was
            converted for another version of the library; or ``"broken"``, if its files
            are not as they were written.
        model: Name of its source.
        source: Directory of the source.
        kind: Type of its weights: ``"int8"``, ``"float32"`` or ``"float16"``.
        engine: Name and version of the library that it was converted for.
    """

    directory: Path
    n_bytes: int
    used_s: float
    state: Literal["ready", "stale", "broken"]
    model: str = "?"
    source: str = "?"
    kind: str = "?"
    engine: str = "?"


class Variants:
    """
    The variants of a user, for an *engine*: name and version of the library that loads
    them. All of them may take *limit_bytes*. Without a *directory* they are in the
    user's cache directory.

    Thread-safe, and safe between processes.
    """

    def __init__(
        self, engine: str, limit_bytes: int, directory: Path | None = None
    ) -> None:
        self.engine: str = engine
        self.limit_bytes: int = limit_bytes
        self._directory = directory
        self._rejected: set[str] = set()

    @functools.cached_property
    def directory(self) -> Path:
        """
        The directory of the variants. Raises an OSError if the user has none.
        """
        return self._directory or user_cache() / "variants"

    # Use -----------------------------------------------------------------------------

    def find(self, source: Origin, kind: str) -> Path | None:
        """
        Returns the directory of a variant that can be trusted, if any. Blocks briefly.
        """
        try:
            directory = self.directory / self._name(source, kind)
            if directory.name in self._rejected or not self._is_good(directory):
                return None
        except OSError as error:
            _log.debug("no %s variant of %s: %s", kind, source.model, error)
            return None
        # Nothing is removed from a directory that cannot be written to either.
        with suppress(OSError):
            # The time of the last use; the manifest itself has no stamp.
            os.utime(directory / MANIFEST)
        return directory

    def reject(self, source: Origin, kind: str) -> None:
        """
        Finds this variant no more: it is there, but could not be loaded.
        """
        directory = self.find(source, kind)
        if directory is None:
            return
        _log.warning("the %s variant of %s cannot be loaded", kind, source.model)
        self._rejected.add(directory.name)

    def is_rejected(self, source: Origin, kind: str) -> bool:
        """
        Tells whether it was rejected.
        """
        return self._name(source, kind) in self._rejected

    def _is_good(self, directory: Path) -> bool:
        """
        Tells whether the variant is there as it was written; removes it if not.
        """
        manifest = Manifest.read(directory)
        if manifest is not None and manifest.is_intact(directory):
            return True
        if directory.exists():
            _log.warning("removing a variant that is not as it was: %s", directory)
            remove(directory)
        return False

    # Build ---------------------------------------------------------------------------

    def build(self, source: Origin, kind: str) -> Path:
        """
        Writes a variant of *source*, unless it is there; returns its directory.

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
        # Left by processes that were killed: this one holds the lock.
        for pattern in (".new-*", ".gone-*"):
            for left in self.directory.glob(pattern):
                shutil.rmtree(left, ignore_errors=True)
        # Read at once, so that all are of one moment.
        small = _small_files(source.directory)
        for missing in sorted(_NEEDED - small.keys()):
            raise VariantRefused(f"its source has no {missing}")
        small_bytes = sum(map(len, small.values()))
        self._make_room(converted_bytes(source.header, kind) + small_bytes)
        # Beside the others, so that it can be renamed; hidden, so that none finds it.
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=self.directory))
        try:
            files = _write(source.header, kind, small, new)
            home = str(source.directory)
            manifest = Manifest(name, source.model, home, kind, self.engine, files)
            manifest.write(new)
            self._check_unchanged(source, kind, name)
            new.rename(target)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        self._remove_stale(source, kind)
        return target

    def _check_unchanged(self, source: Origin, kind: str, name: str) -> None:
        if self._name(source._replace(stamp=()), kind) != name:
            raise VariantRefused("the files of its source changed meanwhile")

    def _remove_stale(self, source: Origin, kind: str) -> None:
        for other in self.list():
            # Those of another version may be in use by another environment.
            place = (other.state, other.source, other.kind, other.engine)
            if place == ("stale", str(source.directory), kind, self.engine):
                self._remove_if_possible(other)

    def _make_room(self, n_bytes: int) -> None:
        limit = format_bytes(self.limit_bytes)
        wanted = f"it takes {format_bytes(n_bytes)}"
        if n_bytes > self.limit_bytes:
            raise VariantRefused(f"{wanted}, and all variants may take {limit}")
        # Those that no load would find are removed first.
        others = sorted(
            self.list(), key=lambda each: (self._is_of_use(each), each.used_s)
        )
        over_bytes = sum(each.n_bytes for each in others) + n_bytes - self.limit_bytes
        victims: list[Variant] = []
        now_s = time.time()
        for other in others:
            if over_bytes <= 0:
                break
            # A time in the future is a clock's fault, and protects nothing.
            if self._is_of_use(other) and 0 <= now_s - other.used_s < IN_USE_S:
                reason = f"{wanted}, and those in use leave too little of {limit}"
                raise VariantRefused(reason)
            victims.append(other)
            over_bytes -= other.n_bytes
        free_bytes = shutil.disk_usage(self.directory).free
        kept_bytes = free_bytes + sum(each.n_bytes for each in victims) - n_bytes
        if kept_bytes < KEPT_FREE_BYTES:
            free = format_bytes(free_bytes)
            raise VariantRefused(f"{wanted}, and its disk has {free} left")
        for victim in victims:
            self._remove_if_possible(victim)

    def _is_of_use(self, variant: Variant) -> bool:
        """
        Tells whether a load may find it, here or with another library.
        """
        return variant.state == "ready" or variant.engine not in ("?", self.engine)

    def _remove_if_possible(self, variant: Variant) -> None:
        try:
            remove(variant.directory)
        except OSError as error:
            _log.warning("a variant cannot be removed: %s", error)

    # Look after ----------------------------------------------------------------------

    def list(self) -> list[Variant]:
        """
        Returns all variants on the disk, of whatever source. Blocks for system calls.
        """
        if not self.directory.is_dir():
            return []
        found = (self._look_at(each) for each in sorted(self.directory.iterdir()))
        return [variant for variant in found if variant is not None]

    def remove(self, variant: Variant) -> None:
        """
        Deletes one. A load from it goes on, where the system keeps open files.

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
            is_intact = manifest.is_intact(directory)
        except FileNotFoundError:
            # Another process is removing it.
            return None
        except OSError as error:
            _log.warning("a variant cannot be read: %s", error)
            return Variant(directory, 0, 0.0, "broken")
        state: Literal["ready", "stale", "broken"] = "broken"
        if is_intact:
            state = "ready" if self._is_current(directory, manifest) else "stale"
        told = (manifest.model, manifest.source, manifest.kind, manifest.engine)
        return Variant(directory, n_bytes, used_s, state, *told)

    def _is_current(self, directory: Path, manifest: Manifest) -> bool:
        try:
            source = Origin(manifest.model, read_header(manifest.source))
            return self._name(source, manifest.kind) == directory.name
        except (WhisperCacheError, OSError):
            return False

    # Names ---------------------------------------------------------------------------

    def _name(self, source: Origin, kind: str) -> str:
        changed_ns = source.header.path.stat().st_ctime_ns
        # Without a stamp nothing tells whether the small files are as they were.
        identify = _known_identity if source.stamp else _identity
        identity = identify(source.header, self.engine, source.stamp, changed_ns)
        return f"{identity}-{kind}"


def _write(
    header: ModelHeader, kind: str, small: dict[str, bytes], directory: Path
) -> dict[str, Stamp]:
    files: dict[str, Stamp] = {}
    with writing(directory / "model.bin", files) as target:
        write_converted(header, kind, target)
    for name, content in small.items():
        with writing(directory / name, files) as target:
            target.write(content)
    return files


def _small_files(directory: Path) -> dict[str, bytes]:
    paths = (directory / name for name in SMALL_FILES)
    found = {path.name: path.read_bytes() for path in paths if path.is_file()}
    # CTranslate2 takes twice as long to read a vocabulary in JSON: a third of a load of
    # base as int8, 52 ms against 37 (4.8.5).
    lines = _as_lines(found.get("vocabulary.json", b""))
    if lines is not None:
        del found["vocabulary.json"]
        found["vocabulary.txt"] = lines
    return found


def _as_lines(vocabulary: bytes) -> bytes | None:
    try:
        tokens = json.loads(vocabulary)
    except ValueError:
        # A load fails with it in any form.
        return None
    # A line ends at its first line break, and may lose a carriage return.
    if not isinstance(tokens, list) or not all(
        isinstance(each, str) and "\n" not in each and not each.endswith("\r")
        for each in tokens
    ):
        return None
    return "".join(f"{each}\n" for each in tokens).encode()


def _identity(
    header: ModelHeader, engine: str, _stamp: tuple[int, ...], _changed_ns: int
) -> str:
    """
    Returns a digest of a source: its place and times, header and samples of its
    weights, and the small files whole.

    The time of the last change cannot be set as that of the last writing can: files of
    one size, with a time that was set, may differ where there is no sample.
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


# A switch between models looks for their variants each time.
_known_identity = functools.lru_cache(maxsize=64)(_identity)
