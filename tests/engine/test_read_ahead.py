"""
Files read ahead of a load, on request or while a request waits for memory.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from driver import wait_waiting
from real import micro_copy, model_of

from whispercache import (
    AsyncModelCache,
    CacheClosed,
    LeaseTimeout,
    LoadFailed,
    ModelCache,
    ModelTooLarge,
)
from whispercache.devices.probe import SystemProbe
from whispercache.engine import store as store_module
from whispercache.engine.files import ModelFiles
from whispercache.engine.loader import FasterWhisperLoader
from whispercache.engine.store import ModelStore, read_through
from whispercache.testing import FakeLoader, Gate, settle, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import MakeCache

PATIENCE_S = 20
COLD_TRIES = 100
N_BYTES = 9 * 1024**2 + 1000
"""
Of a file that is read in some blocks; its last page is not whole.
"""


# The page cache, seen from outside --------------------------------------------------


def share_there(path: Path) -> float:
    """
    The share of a file's pages that are in memory, as mincore(2) tells it.
    """
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    n_bytes = path.stat().st_size
    flags = (ctypes.c_ubyte * -(-n_bytes // mmap.PAGESIZE))()
    # Private: ctypes takes the address of writable memory only. Nothing is written.
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_COPY) as mapping,
    ):
        start = ctypes.c_char.from_buffer(mapping)
        address = ctypes.c_void_p(ctypes.addressof(start))
        error = mincore(address, ctypes.c_size_t(n_bytes), flags)
        del start  # or the mapping could not be closed
    assert error == 0, os.strerror(ctypes.get_errno())
    return sum(flag & 1 for flag in flags) / len(flags)


def cooled(path: Path) -> Path:
    """
    *path*, with none of it in memory; skips the test where that cannot be had.
    """
    if not hasattr(os, "posix_fadvise") or not hasattr(ctypes.CDLL(None), "mincore"):
        pytest.skip("this system neither lets pages go nor tells which are there")
    for _ in range(COLD_TRIES):  # some may be on their way to the disk
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if share_there(path) == 0:
            return path
        threading.Event().wait(0.01)
    pytest.skip("this file system does not let pages go")


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """
    A file that is on the disk only.
    """
    path = tmp_path / "model.bin"
    path.write_bytes(os.urandom(N_BYTES))
    return cooled(path)


@pytest.fixture
def real() -> Iterator[ModelCache]:
    """
    A cache with real models.
    """
    with ModelCache(variants=False) as made:
        yield made
        made._core.check()


def held_bytes(cache: ModelCache) -> dict[str, int]:
    """
    What is counted, by device.
    """
    return {each.device: each.charged_bytes for each in cache.devices()}


def readers() -> list[threading.Thread]:
    """
    Threads that read ahead just now.
    """
    return [each for each in threading.enumerate() if each.name == "whispercache-pages"]


def wait_for_readers() -> None:
    """
    Until none is left.
    """
    wait_until(lambda: not readers(), "the end of reading ahead")


# preload(tier="page") -----------------------------------------------------------------


class TestPreload:
    """
    Files are read on request, and nothing else happens.
    """

    def test_only_the_files_are_read(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        Nothing is loaded, and nothing is charged.
        """
        cache = make_cache()
        cache.preload("small", "cuda:0", tier="page")
        assert loader.read_files == {"fake/small": 1}
        assert not loader.loads
        assert cache.models() == ()
        assert not any(held_bytes(cache).values())
        assert cache.stats().requests == 0

    def test_pages_become_resident(self, tmp_path: Path, real: ModelCache) -> None:
        """
        Those of model.bin, all of them, and before it returns.
        """
        directory = micro_copy(tmp_path / "model")
        cooled(directory / "model.bin")
        real.preload(directory, "cpu", tier="page", cpu_threads=1)
        assert share_there(directory / "model.bin") == 1
        assert real.models() == ()
        assert not any(held_bytes(real).values())

    def test_an_awaited_cache_does_the_same(
        self, tmp_path: Path, real: ModelCache
    ) -> None:
        """
        And its loop goes on meanwhile.
        """
        directory = micro_copy(tmp_path / "model")
        cooled(directory / "model.bin")
        cache = AsyncModelCache(real)
        asyncio.run(cache.preload(directory, "cpu", tier="page", cpu_threads=1))
        assert share_there(directory / "model.bin") == 1
        assert real.models() == ()

    def test_the_file_that_will_be_loaded_is_read(
        self,
        make_cache: MakeCache,
        loader: FakeLoader,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """
        That of the variant, where there is one.
        """

        def choose(_self: FakeLoader, _key: object, files: ModelFiles) -> ModelFiles:
            original = files.original or files
            return ModelFiles("fake/variant", "int8", original=original)

        monkeypatch.setattr(FakeLoader, "choose", choose)
        make_cache().preload("small", "cuda:0", tier="page")
        assert loader.read_files == {"fake/variant": 1}

    @pytest.mark.parametrize("tier", ["disk", "", "Page", None])
    def test_there_are_two_tiers(
        self, make_cache: MakeCache, loader: FakeLoader, tier: Any
    ) -> None:
        """
        Any other is refused, blocking or awaited, before anything is looked up.
        """
        cache = make_cache()
        with pytest.raises(ValueError, match="tier must be one of device, page"):
            cache.preload("small", "cuda:0", tier=tier)
        with pytest.raises(ValueError, match="tier must be one of device, page"):
            asyncio.run(AsyncModelCache(cache).preload("small", "cuda:0", tier=tier))
        assert not loader.read_files
        assert cache.devices() == ()

    def test_a_model_in_memory_is_not_read(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        Nor is one that is just being loaded.
        """
        cache = make_cache()
        with loader.holding_loads("small") as gate, ThreadPoolExecutor() as pool:
            loading = pool.submit(cache.preload, "small", "cuda:0")
            gate.wait_reached()
            cache.preload("small", "cuda:0", tier="page")
            gate.open()
            loading.result(PATIENCE_S)
        cache.preload("small", "cuda:0", tier="page")
        assert not loader.read_files
        cache.evict("small")
        cache.preload("small", "cuda:0", tier="page")
        assert loader.read_files == {"fake/small": 1}

    def test_it_waits_for_no_memory(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        It takes none, so it needs none, and nobody leaves for it.
        """
        cache = make_cache(vram="3GiB")
        with cache.lease("medium", "cuda:0"):
            cache.preload("small", "cuda:0", tier="page")
        assert loader.read_files == {"fake/small": 1}
        assert [info.key.model for info in cache.models()] == ["medium"]

    def test_what_is_not_here_is_downloaded(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        As for a load.
        """
        loader.missing.add("small")
        make_cache().preload("small", "cuda:0", tier="page")
        assert loader.downloads == {"small": 1}
        assert loader.read_files == {"fake/small": 1}

    @pytest.mark.parametrize("missing", ["all", "model.bin"])
    def test_a_model_that_cannot_be_found_is_told_as_by_a_load(
        self, tmp_path: Path, real: ModelCache, missing: str
    ) -> None:
        """
        With the same error.
        """
        directory = tmp_path / "none"
        if missing == "model.bin":
            (micro_copy(directory) / "model.bin").unlink()
        told = []
        for tier in ("device", "page"):
            with pytest.raises(LookupError) as caught:
                real.preload(directory, "cpu", tier=tier)
            told.append((type(caught.value), str(caught.value)))
        assert told[0] == told[1]

    def test_a_file_that_cannot_be_read_is_told(self, tmp_path: Path) -> None:
        """
        By an error of this package.
        """
        with pytest.raises(LoadFailed, match="it cannot be read: "):
            FasterWhisperLoader(SystemProbe()).read(ModelFiles(str(tmp_path), ""))

    def test_a_closed_cache_reads_nothing(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        Even if it knew the model.
        """
        cache = make_cache()
        cache.preload("small", "cuda:0", tier="page")
        cache.close()
        with pytest.raises(CacheClosed):
            cache.preload("small", "cuda:0", tier="page")
        assert loader.read_files == {"fake/small": 1}


# Read ahead ---------------------------------------------------------------------------


@contextmanager
def reading_held(patch: pytest.MonkeyPatch) -> Iterator[tuple[Gate, list[Path]]]:
    """
    Hold each file that is read before a gate; which they were.
    """
    gate = Gate()
    files: list[Path] = []

    def read(path: Path) -> None:
        files.append(path)
        gate.pass_through()

    with patch.context() as within:
        within.setattr(store_module, "read_through", read)
        yield gate, files
        gate.open()
        wait_for_readers()


def ahead(store: ModelStore, directory: Path) -> None:
    """
    Have a model's weights read.
    """
    store.read_ahead(ModelFiles(str(directory), "float16"))


class TestReadAhead:
    """
    Files are read while something else goes on.
    """

    def test_all_of_a_file_becomes_resident(self, cold: Path) -> None:
        """
        To its last page.
        """
        ahead(ModelStore(), cold.parent)
        wait_until(lambda: share_there(cold) == 1, "the whole file in memory")
        wait_for_readers()

    def test_it_returns_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        And a file that is being read is not read a second time meanwhile.
        """
        one, two = tmp_path / "one", tmp_path / "two"
        store = ModelStore()
        with reading_held(monkeypatch) as (gate, files):
            for path in (one, one, two, one):
                ahead(store, path)
            wait_until(lambda: len(files) == 2)
            assert len(readers()) == 2
            gate.open()
            wait_for_readers()
            ahead(store, one)  # what was dropped since may be wanted again
            wait_for_readers()
        assert sorted(each.parent for each in files) == [one, one, two]

    @pytest.mark.parametrize("what", ["nothing", "an empty file", "a directory"])
    def test_what_cannot_be_read_is_no_error(self, tmp_path: Path, what: str) -> None:
        """
        Whoever loads it will tell. No thread is left, and it may be tried again.
        """
        path = tmp_path / "model.bin"
        if what == "an empty file":
            path.touch()
        elif what == "a directory":
            path.mkdir()
        store = ModelStore()
        for _ in range(2):
            ahead(store, tmp_path)
            wait_for_readers()
        assert not store._reading

    def test_without_a_thread_nothing_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Nor does the request fail that it was for; the next time it may be possible.
        """

        def refuse(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        store = ModelStore()
        with reading_held(monkeypatch) as (gate, files):
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", refuse)
                ahead(store, tmp_path)
            assert not files
            ahead(store, tmp_path)
            gate.wait_reached()
        assert files == [tmp_path / "model.bin"]

    @pytest.mark.parametrize("can_send", [True, False])
    def test_to_read_through_is_to_have_it_all(
        self, cold: Path, monkeypatch: pytest.MonkeyPatch, *, can_send: bool
    ) -> None:
        """
        When it returns, in whichever way it is read.
        """

        def refuse(*_arguments: object) -> int:
            raise OSError(errno.ENOTSOCK, "not on this file system")

        if not can_send:
            monkeypatch.setattr(os, "sendfile", refuse, raising=False)
        read_through(cold)
        assert share_there(cold) == 1


# While others leave -------------------------------------------------------------------


class TestOverlap:
    """
    Who waits for memory has his files read meanwhile.
    """

    def test_files_are_read_while_a_victim_leaves(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        Once for each request that waits, and before the victim has gone.
        """
        cache = make_cache(max_models=1)
        cache.preload("small", "cuda:0")
        with loader.holding_unloads("small") as gate, ThreadPoolExecutor() as pool:
            waiting = [pool.submit(cache.preload, "medium", "cuda:0")]
            gate.wait_reached()
            wait_until(lambda: loader.read_ahead_files == {"fake/medium": 1})
            waiting.append(pool.submit(cache.preload, "medium", "cuda:0"))
            wait_until(lambda: loader.read_ahead_files == {"fake/medium": 2})
            gate.open()
            for each in waiting:
                each.result(PATIENCE_S)
        assert loader.read_ahead_files == {"fake/medium": 2}
        assert loader.loads == {"small": 1, "medium": 1}

    def test_files_are_read_while_a_lease_lasts(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        Also for a task that waits.
        """
        cache = make_cache(max_models=1)

        async def main() -> None:
            with cache.lease("small", "cuda:0"):
                asks = AsyncModelCache(cache).preload("medium", "cuda:0")
                waiting = asyncio.create_task(asks)
                await asyncio.to_thread(wait_waiting, cache, 1)
            await asyncio.wait_for(waiting, PATIENCE_S)

        asyncio.run(main())
        assert loader.read_ahead_files == {"fake/medium": 1}

    def test_of_several_models_those_that_are_absent_are_read(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        Each once, however often it is wanted.
        """
        cache = make_cache(max_models=3)
        cache.preload("base", "cuda:0")
        wanted = [(name, "cuda:0") for name in ("base", "tiny", "tiny", "medium")]
        with ThreadPoolExecutor() as pool:
            with cache.lease("small", "cuda:0"), cache.lease("tiny.en", "cuda:0"):
                group = pool.submit(cache.lease_many, wanted)
                wait_waiting(cache, 1)
                wait_until(lambda: len(loader.read_ahead_files) == 2)
            for lease in group.result(PATIENCE_S):
                lease.release()
        assert loader.read_ahead_files == {"fake/tiny": 1, "fake/medium": 1}

    def test_who_does_not_wait_for_memory_reads_nothing_ahead(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        Not for a hit, nor for a load that begins at once or has begun.
        """
        cache = make_cache()
        with loader.holding_loads("small") as gate, ThreadPoolExecutor() as pool:
            loads = [pool.submit(cache.preload, "small", "cuda:0") for _ in "12"]
            gate.wait_reached()
            wait_waiting(cache, 2)
            gate.open()
            for each in loads:
                each.result(PATIENCE_S)
        with cache.lease("small", "cuda:0"):
            cache.preload("small", "cuda:0")
        assert not loader.read_ahead_files

    def test_who_never_waits_reads_nothing_ahead(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        Nobody is there to use it.
        """
        cache = make_cache(max_models=1)
        with cache.lease("small", "cuda:0"), pytest.raises(LeaseTimeout):
            cache.lease("medium", "cuda:0", timeout_s=0)
        assert not loader.read_ahead_files

    def test_for_a_model_that_can_never_fit_nothing_is_read_ahead(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        It is refused at once.
        """
        cache = make_cache(vram="2GiB")
        with pytest.raises(ModelTooLarge):
            cache.preload("large-v3", "cuda:0")
        assert not loader.read_ahead_files

    def test_a_request_that_fails_there_does_not_wait_on(
        self,
        make_cache: MakeCache,
        loader: FakeLoader,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """
        Or somebody's Ctrl-C would leave a lease that nobody ends.
        """

        def interrupt(_self: FakeLoader, _files: ModelFiles) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(FakeLoader, "read_ahead", interrupt)
        cache = make_cache(max_models=1)
        with cache.lease("small", "cuda:0"):
            with pytest.raises(KeyboardInterrupt):
                cache.preload("medium", "cuda:0")
            assert cache.waiting() == ()
        settle(cache)
        assert not loader.loads["medium"]

    def test_it_is_model_bin_that_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        The largest file by far, and the only one that is not parsed.
        """
        started = list[str]()
        monkeypatch.setattr(
            ModelStore, "_read_ahead", lambda _self, path: started.append(str(path))
        )
        one, two = (micro_copy(tmp_path / name) for name in ("one", "two"))
        with (
            ModelCache(variants=False, max_models=1) as cache,
            ThreadPoolExecutor() as pool,
        ):
            with model_of(cache, one).lease():
                waiting = pool.submit(lambda: model_of(cache, two).lease().release())
                wait_waiting(cache, 1)
                wait_until(lambda: started, "a file that is read ahead")
            waiting.result(PATIENCE_S)
            settle(cache)
        assert started == [str((two / "model.bin").resolve())]
