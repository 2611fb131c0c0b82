"""
The store of model files: located, downloaded, read ahead, and replaced by variants.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from whispercache.errors import LoadFailed, WhisperCacheError
from whispercache.keys import is_directory

from .files import downloaded, files_in, is_whole, local_files, variant_in
from .process import ctranslate2
from .sizes.header import ModelHeader
from .variants.convert import Origin, kind_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from whispercache.keys import ModelKey, OptionValue

    from .api import LoadedModel
    from .files import ModelFiles
    from .variants.build import Builder
    from .variants.store import Variants

_log = logging.getLogger("whispercache")

# Files that are read ahead at once; more would push each other out of the page cache.
_MOST_READERS = 2


@dataclass(slots=True)
class ModelStore:
    """
    The files of models, and their variants on at most *variants_bytes* of disk; on None
    none are used. Thread-safe.
    """

    variants_bytes: int | None = None
    _builder: Builder | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    # Both are guarded by _lock.
    _downloading: dict[str, threading.Lock] = field(default_factory=dict)
    _reading: set[Path] = field(default_factory=set)

    def locate(
        self, model: str, options: Mapping[str, OptionValue], *, download: bool
    ) -> ModelFiles | None:
        if is_directory(model):
            return files_in(model)
        if not download or is_whole(model, options):
            return local_files(model, options)
        # One download of a repository at a time; others may go on beside it.
        with self._lock:
            downloading = self._downloading.setdefault(model, threading.Lock())
        with downloading:
            return downloaded(model, options)

    # Variants ------------------------------------------------------------------------

    @property
    def variants(self) -> Variants | None:
        builder = self._get_builder()
        return None if builder is None else builder.variants

    def choose(self, key: ModelKey, files: ModelFiles) -> ModelFiles:
        original = files.original or files
        variants, wanted = self.variants, _wanted_variant(key, original)
        if variants is None or wanted is None:
            return original
        directory = variants.find(*wanted)
        if directory is None:
            return original
        try:
            return variant_in(str(directory), original)
        except WhisperCacheError as error:
            # Another process has just removed it.
            _log.debug("no variant of %s: %s", key, error)
            return original

    def follow_up(self, loaded: LoadedModel) -> None:
        builder = self._get_builder()
        wanted = _wanted_variant(loaded.key, loaded.files)
        if builder is not None and wanted is not None:
            builder.build_soon(*wanted)

    def reject(self, key: ModelKey, original: ModelFiles) -> None:
        variants, wanted = self.variants, _wanted_variant(key, original)
        if variants is not None and wanted is not None:
            variants.reject(*wanted)

    def _get_builder(self) -> Builder | None:
        if self.variants_bytes is None:
            return None
        if self._builder is None:
            # Imported late: a cache that converts nothing needs none of it.
            from .variants.build import Builder
            from .variants.store import Variants

            engine = f"CTranslate2 {ctranslate2().__version__}"
            builder = Builder(Variants(engine, self.variants_bytes))
            with self._lock:
                self._builder = self._builder or builder
        return self._builder

    # The page cache ------------------------------------------------------------------

    def read_ahead(self, files: ModelFiles) -> None:
        """
        Starts to read model.bin into the kernel's page cache. Returns at once.

        A thread reads it: advice to the kernel (posix_fadvise) returns no sooner, and
        reads no more at once than the kernel's own read-ahead (benchmarks/page.py).
        """
        # It is to be downloaded.
        if not files.directory:
            return
        path = Path(files.directory, "model.bin")
        with self._lock:
            if path in self._reading or len(self._reading) >= _MOST_READERS:
                return
            self._reading.add(path)
        thread = threading.Thread(
            target=self._read_ahead,
            args=(path,),
            name="whispercache-pages",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError as error:
            # There are too many threads, or the interpreter ends.
            _log.debug("%s is not read ahead: %s", path, error)
            with self._lock:
                self._reading.discard(path)

    def _read_ahead(self, path: Path) -> None:
        try:
            read_through(path)
        except OSError as error:
            # The load will raise it.
            _log.debug("%s is not read ahead: %s", path, error)
        finally:
            with self._lock:
                self._reading.discard(path)

    def read(self, files: ModelFiles) -> None:
        try:
            read_through(Path(files.directory, "model.bin"))
        except OSError as error:
            raise LoadFailed(files.directory, f"it cannot be read: {error}") from error

    def forked(self) -> None:
        self._lock = threading.Lock()
        self._downloading.clear()
        self._reading = set()
        if self._builder is not None:
            self._builder.forked()


def read_through(path: Path) -> None:
    """
    Reads a file, so that its pages are in memory as far as there is room. Blocks.
    """
    # By sendfile() on Linux, which copies nothing and so takes a quarter of the CPU
    # time: 70 ms, 4 of them of CPU, against 118 and 18, for the cold file of base.
    shutil.copyfile(path, os.devnull)


def _wanted_variant(key: ModelKey, files: ModelFiles) -> tuple[Origin, str] | None:
    if files.original is not None or not isinstance(files.source, ModelHeader):
        return None
    kind = kind_for(files.source, key.compute_type)
    if kind is None:
        return None
    return Origin(key.model, files.source, files.stamp), kind
