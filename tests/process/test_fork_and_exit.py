"""
Life: closing, signals, forks, the end of the interpreter, leases that are forgotten.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
from children import in_child
from real import child_environment, micro, packaged

from whispercache import (
    CacheClosed,
    CacheForked,
    LeaseTimeout,
    ModelCache,
    ModelStillReferenced,
)
from whispercache.core import core as core_module
from whispercache.testing import FakeLoader, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeCache

    from whispercache import Event

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="Windows neither forks nor knows these signals"
)

AUDIO: Any = "audio"


def run(program: str, *arguments: object, timeout_s: float = 60) -> str:
    """
    What a program writes, which must end well, and in time.
    """
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "dev",
            "-c",
            textwrap.dedent(program),
            *map(str, arguments),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=child_environment(),
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


# Closing ------------------------------------------------------------------------------


def test_closing_from_a_signal_handler_that_interrupted_the_cache(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The handler's own thread holds the lock beneath it: the close is done by another
    one, soon after.
    """
    monkeypatch.setattr(core_module, "SIGNAL_S", 0.05)
    cache = make_cache()
    cache.preload("base", "cuda:0")
    handled: list[object] = []

    def handle(*_: object) -> None:
        cache.close(timeout_s=10)
        handled.append(cache._core.is_closed)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with cache._core.changing():
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: handled, "the end of the handler")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert handled == [False]
    wait_until(lambda: cache._core.is_closed and not cache.models())


def test_closing_from_a_signal_handler_elsewhere(make_cache: MakeCache) -> None:
    """
    As from any other place: when it returns, all is gone.
    """
    cache = make_cache()
    cache.preload("base", "cuda:0")
    before = signal.signal(signal.SIGUSR1, lambda *_: cache.close(timeout_s=10))
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: cache._core.is_closed)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not cache.models()


def test_closing_twice_at_once(make_cache: MakeCache, loader: FakeLoader) -> None:
    """
    Both wait until all is gone.
    """
    cache = make_cache()
    cache.preload("base", "cuda:0")
    with loader.holding_unloads("base") as gate:
        threads = [threading.Thread(target=cache.close) for _ in "12"]
        for thread in threads:
            thread.start()
        gate.wait_reached()
        assert all(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join(10)
    assert not cache.models()


def test_closing_names_what_is_still_held(make_cache: MakeCache) -> None:
    """
    With the number of seconds it waited; the rest has left.
    """
    cache = make_cache(clock=None)
    cache.preload("tiny", "cuda:0")
    lease = cache.lease("base", "cuda:0")
    with pytest.raises(
        LeaseTimeout, match=r"base/cuda:0/float16 was not unloaded"
    ) as e:
        cache.close(timeout_s=0.05)
    assert e.value.waited_s >= 0.05
    assert [info.key.model for info in cache.models()] == ["base"]
    lease.release()
    wait_until(lambda: not cache.models())


# Forgotten leases ---------------------------------------------------------------------


@pytest.mark.parametrize("is_hit", [False, True])
def test_a_forgotten_lease_is_told_where_it_was_taken(
    make_cache: MakeCache, *, is_hit: bool
) -> None:
    """
    While tracemalloc traces, of a hit as of a load; and the memory comes back.
    """
    cache = make_cache(keep_alive=0)
    if is_hit:
        cache.pin("base", "cuda:0")
    tracemalloc.start()
    try:
        lease = cache.lease("base", "cuda:0")
        line = sys._getframe().f_lineno - 1
    finally:
        tracemalloc.stop()
    place = rf"taken at \S*test_fork_and_exit\.py:{line}\)"
    with pytest.warns(ResourceWarning, match=place):
        del lease
    cache.unpin()
    wait_until(lambda: not cache.models())


def test_a_forgotten_lease_is_told_without_tracemalloc(make_cache: MakeCache) -> None:
    """
    It costs nothing, and says what to do.
    """
    cache = make_cache()
    lease = cache.lease("base", "cuda:0")
    with pytest.warns(ResourceWarning, match=r"never released; use it in a with"):
        del lease


def test_a_model_that_outlives_its_lease_is_noticed(tmp_path: Path) -> None:
    """
    When it is unloaded, by an event; one that was let go is not.
    """
    del tmp_path
    events: list[Event] = []
    with ModelCache(ram="1GiB") as cache:
        cache.subscribe(events.append)

        def use() -> None:
            with cache.lease(micro(), "cpu", cpu_threads=1) as whisper:
                assert whisper.model.is_multilingual is not None

        use()
        cache.evict()
        assert not [e for e in events if isinstance(e, ModelStillReferenced)]
        with cache.lease(micro(), "cpu", cpu_threads=1) as whisper:
            kept = whisper.model
        cache.evict()
        (noticed,) = (e for e in events if isinstance(e, ModelStillReferenced))
        assert noticed.references == 1
        del kept


# Forks --------------------------------------------------------------------------------


@pytest.mark.process
def test_a_used_cache_says_in_a_child_that_it_cannot_be_used(
    make_cache: MakeCache,
) -> None:
    """
    At every word; the parent goes on as if nothing had happened.
    """
    cache = make_cache()
    model = cache.get_model("base", "cuda:0")
    segments, _ = model.transcribe(AUDIO)
    assert next(segments).start == 0

    def check() -> str:
        told = []
        for word in (
            lambda: cache.lease("base", "cuda:0"),
            lambda: cache.lease("tiny", "cuda:0"),
            lambda: cache.get_model("base", "cuda:0"),
            lambda: cache.lease_many(["base", "tiny"], "cuda:0"),
            lambda: model.transcribe(AUDIO),
            lambda: next(segments),
        ):
            try:
                word()
            except CacheForked as error:
                told.append("forked" in str(error))
        cache.stats()
        cache.close(timeout_s=1)
        segments.close()
        return str(told)

    assert in_child(check) == str([True] * 6)
    assert [segment.start for segment in segments] == [1, 2]
    assert cache.stats().leases == 0
    cache.lease("tiny", "cuda:0").release()


@pytest.mark.process
def test_no_lock_is_inherited_in_a_locked_state(make_cache: MakeCache) -> None:
    """
    Whatever another thread of the parent was doing at that moment.
    """
    cache = make_cache()
    cache.preload("base", "cuda:0")
    locked, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with cache._core.lock.mutex, cache._core.outbox._delivering:
            locked.set()
            go_on.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert locked.wait(10)

    def check() -> str:
        cache.stats()
        cache.close(timeout_s=1)
        try:
            cache.lease("base", "cuda:0")
        except CacheClosed as error:
            return type(error).__name__
        return "served"

    try:
        assert in_child(check) == "CacheForked"
    finally:
        go_on.set()
        thread.join(10)


@pytest.mark.process
def test_a_cache_that_was_not_used_yet_works_in_children(
    make_cache: MakeCache,
) -> None:
    """
    As for servers that import the application before they fork their workers.
    """
    cache = make_cache()
    model = cache.get_model("base", "cuda:0")

    def check() -> str:
        segments, _ = model.transcribe(AUDIO)
        count = len(list(segments))
        cache.close(timeout_s=5)
        return str(count)

    assert in_child(check) == "3"
    assert in_child(check) == "3"
    assert not cache.models()


@pytest.mark.process
def test_a_real_child_neither_hangs_nor_harms_its_parent() -> None:
    """
    Models of the parent would wait for their threads when the child ends, and new ones
    for OpenMP's.
    """
    told = run(
        """
        import os, sys
        import numpy as np
        from whispercache import CacheForked, ModelCache, default_cache, get_model

        model = get_model(sys.argv[1], "cpu", "int8")
        audio = np.zeros(16000, np.float32)
        kept = ModelCache()
        kept.preload(sys.argv[1], "cpu", "float32")
        list(model.transcribe(audio, language="en")[0])
        pid = os.fork()
        if pid == 0:
            for source in (kept, default_cache(), ModelCache()):
                try:
                    source.lease(sys.argv[1], "cpu", "int8")
                except CacheForked as error:
                    print("child:", type(error).__name__, flush=True)
            sys.exit(0)  # through all of the interpreter's end
        assert os.waitpid(pid, 0)[1] == 0
        list(model.transcribe(audio, language="en")[0])
        print("parent: well")
        """,
        packaged("tiny.en"),
    )
    assert told.splitlines() == ["child: CacheForked"] * 3 + ["parent: well"]


@pytest.mark.process
def test_a_pool_of_forked_processes_loads_its_own() -> None:
    """
    If nothing was loaded before the fork.
    """
    told = run(
        """
        import multiprocessing, sys, warnings
        import numpy as np
        from whispercache import ModelCache

        warnings.simplefilter("ignore", DeprecationWarning)
        cache = ModelCache(ram="1GiB")
        model = cache.get_model(sys.argv[1], "cpu", "float32", cpu_threads=1)

        def work(number):
            with model.lease() as whisper:
                return number, whisper.model.is_multilingual

        if __name__ == "__main__":
            with multiprocessing.get_context("fork").Pool(2) as pool:
                print(sorted(pool.map(work, range(4)))[-1][0], cache.stats().loads)
        """,
        micro(),
    )
    assert told.split() == ["3", "0"]


# The end of the interpreter -----------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("kind", ["generator", "thread", "lease"])
def test_the_interpreter_ends_well_in_mid_transcription(kind: str) -> None:
    """
    With a live generator, with a daemon thread at work, and with one that has the model
    itself: no crash, no hang, nothing on stderr.
    """
    told = run(
        """
        import atexit, sys, threading, time
        atexit.register(time.sleep, 0.5)  # runs after ours: time enough to go on
        import numpy as np
        from whispercache import ModelCache

        kind, path = sys.argv[1:]
        cache = ModelCache()
        model = cache.get_model(path, "cpu", "int8")
        rng = np.random.default_rng(0)
        audio = rng.normal(0, 0.1, 16000 * 120).astype(np.float32)
        begun = threading.Event()

        def go_on():
            if kind == "lease":
                with model.lease() as whisper:
                    begun.set()
                    for _ in range(1000):
                        whisper.detect_language(audio)
            while True:
                segments, _ = model.transcribe(audio, language="en", beam_size=1)
                begun.set()
                for segment in segments:
                    pass

        if kind == "generator":
            segments, _ = model.transcribe(audio, language="en", beam_size=1)
            next(segments, None)
        else:
            threading.Thread(target=go_on, daemon=True).start()
            begun.wait(30)
        print("ends")
        """,
        kind,
        packaged("tiny.en"),
    )
    assert told == "ends\n"
