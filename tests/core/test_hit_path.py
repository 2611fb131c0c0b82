"""
The hit path: what a lease on a model in memory costs, in system calls, memory and time.
"""

from __future__ import annotations

import builtins
import gc
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from real import child, micro

from whispercache.core import threads
from whispercache.core.threads import take_turn

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeCache

    from whispercache import Lease, ModelCache

HITS = 10_000

# The kernel kills the program at its first system call; memory shared with the parent
# tells how far it came: 1 armed, 2 the clock can be read, 3 the hits were made.
NO_SYSTEM_CALLS = f"""
import ctypes, mmap, os, sys, time
from whispercache import ModelCache

class Filter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte),
                ("no", ctypes.c_ubyte), ("value", ctypes.c_uint)]

class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filters", ctypes.POINTER(Filter))]

def hit(cache, model):
    with cache.lease(model, "cpu", cpu_threads=1):
        pass

directory, shared, then = sys.argv[1:]
with open(shared, "r+b") as file:
    came = mmap.mmap(file.fileno(), 0)
library = ctypes.PyDLL(None)
kill = Filter(0x06, 0, 0, 0x80000000)  # return: kill the process
program = Program(1, ctypes.pointer(kill))
cache = ModelCache(ram="1GiB")
for _ in range({HITS}):
    hit(cache, directory)
if library.prctl(38, 1, 0, 0, 0) or library.prctl(22, 2, ctypes.byref(program)):
    os._exit(77)  # no new privileges, then the filter: not on this kernel
came[0] = 1
time.monotonic()
came[0] = 2
if then == "look":
    os.path.isfile(directory)
for _ in range({HITS}):
    hit(cache, directory)
came[0] = 3
"""


def came_with_no_system_calls(tmp_path: Path, then: str) -> int:
    """
    How far the program above comes, that looks at the disk if told to.
    """
    if sys.platform != "linux":
        pytest.skip("only Linux has seccomp")
    shared = tmp_path / "came"
    shared.write_bytes(b"\0" * 4096)
    done = subprocess.run(
        [sys.executable, "-c", NO_SYSTEM_CALLS, str(micro()), str(shared), then],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("this kernel has no seccomp filters")
    came = shared.read_bytes()[0]
    assert done.returncode == -signal.SIGSYS, done.stderr
    if came == 1:
        pytest.skip("to read the clock is a system call on this machine")
    return came


@pytest.mark.process
def test_a_hit_makes_no_system_call(tmp_path: Path) -> None:
    """
    Ten thousand leases on a directory's model, by a program that may make none.
    """
    # Another thread that still starts makes this one ask for the interpreter, which is
    # a system call; a lease that makes one does so each time.
    assert any(came_with_no_system_calls(tmp_path, "hit") == 3 for _ in range(3))


@pytest.mark.process
def test_a_program_that_may_make_no_system_call_dies_of_one(tmp_path: Path) -> None:
    """
    The test above can fail: one look at the disk is noticed.
    """
    assert came_with_no_system_calls(tmp_path, "look") == 2


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """
    The names of the functions that looked at the disk, call by call.
    """
    called: list[str] = []
    places = [(builtins, "open"), *((os, name) for name in ("stat", "lstat"))]
    places += [(os, name) for name in ("open", "readlink", "scandir", "listdir")]
    for module, name in places:
        real = getattr(module, name)

        def look(
            *args: object, name: str = name, real: object = real, **options: object
        ) -> object:
            called.append(name)
            return real(*args, **options)  # type: ignore[operator]

        monkeypatch.setattr(module, name, look)
    return called


def test_a_hit_does_not_look_at_the_disk(
    make_cache: MakeCache, looks: list[str]
) -> None:
    """
    Where a name points is read when a model is not in memory, and by `get_model`.
    """
    cache = make_cache()
    cache.preload("base", "cpu")
    looks.clear()
    for _ in range(10):
        hit(cache)
    assert looks == []
    cache.get_model("base", "cpu")
    assert looks


def hit(cache: ModelCache) -> None:
    """
    One lease, begun and ended.
    """
    cache.lease("base", "cpu").release()


def growth(cache: ModelCache, hits: int) -> tuple[int, int]:
    """
    By how many blocks memory has grown after *hits*, and what was left as garbage.
    """
    for _ in range(100):
        hit(cache)
    gc.collect()
    gc.disable()
    try:
        before = sys.getallocatedblocks()
        for _ in range(hits):
            hit(cache)
        return sys.getallocatedblocks() - before, gc.collect()
    finally:
        gc.enable()


@pytest.mark.slow
def test_hits_keep_no_memory(make_cache: MakeCache) -> None:
    """
    Ten thousand of them leave nothing behind, not even for the garbage collector.
    """
    cache = make_cache()
    cache.preload("base", "cpu")
    # Other threads of the process may come and go meanwhile: the best of three.
    blocks, garbage = min(growth(cache, HITS) for _ in range(3))
    assert blocks < HITS / 100
    assert garbage == 0


def test_a_lease_that_is_held_is_two_objects(make_cache: MakeCache) -> None:
    """
    Itself and its number; the tables that have them grow by fractions of an object.
    """
    cache = make_cache()
    cache.preload("base", "cpu")
    n_leases = 1000
    leases: list[Lease | None] = [None] * n_leases
    gc.collect()
    before = sys.getallocatedblocks()
    for place in range(n_leases):
        leases[place] = cache.lease("base", "cpu")
    blocks = sys.getallocatedblocks() - before
    for lease in leases:
        assert lease is not None
        lease.release()
    assert blocks / n_leases < 2.1


def test_the_usual_terms_are_one_object(make_cache: MakeCache) -> None:
    """
    They are made for those alone who ask for others.
    """
    cache = make_cache(fallback=["int8"])
    usual = cache._terms(None, None, None)
    assert cache._terms(None, None, None) is usual
    assert cache._terms(1.0, None, None).ladder == usual.ladder
    assert cache._terms(None, None, ()).ladder == ()


# The lock -----------------------------------------------------------------------------


def test_a_hit_waits_for_a_lock_that_stays_taken(make_cache: MakeCache) -> None:
    """
    However long that takes; and so does the end of a lease.
    """
    cache = make_cache()
    cache.preload("base", "cpu")
    done: list[str] = []

    def use() -> None:
        lease = cache.lease("base", "cpu")
        done.append("lease")
        with cache._core.lock.mutex:
            ending = threading.Thread(target=lease.release)
            ending.start()
            assert not lease.is_released
        ending.join()
        done.append("release")

    with cache._core.lock.mutex:
        thread = threading.Thread(target=use)
        thread.start()
        thread.join(0.05)
        assert done == []
    thread.join(10)
    assert done == ["lease", "release"]
    assert cache.stats().leases == 0


def test_a_lock_is_waited_for_by_letting_others_go_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Its holder gets on with what it does; nobody goes to sleep on it.
    """
    lock = threading.Lock()
    lock.acquire()
    turns: list[float] = []

    def another_runs(seconds: float) -> None:
        turns.append(seconds)
        if len(turns) == 3:
            lock.release()

    monkeypatch.setattr(threads, "time", SimpleNamespace(sleep=another_runs))
    take_turn(lock)
    assert turns == [0, 0, 0]
    assert not lock.locked()


def test_a_lock_that_stays_taken_is_slept_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    After some turns, so that a thread that waits does not keep a core busy.
    """
    lock = threading.Lock()
    lock.acquire()
    turns: list[float] = []
    monkeypatch.setattr(threads, "time", SimpleNamespace(sleep=turns.append))
    take_turn(lock)
    assert len(turns) == threads._TURNS
    assert lock.locked()


INTERRUPTED_HITS = """
import contextlib, os, signal, sys, threading, time
from whispercache import ModelCache
from whispercache.testing import FakeLoader, FakeMachine

def interrupt(*_):
    raise KeyboardInterrupt

machine = FakeMachine({"cpu": "8GiB"})
loader = FakeLoader(machine, sizes={"base": "4GiB", "medium": "6GiB"})
loader.workspace_bytes = 1 << 20
cache = ModelCache(loader=loader, probe=machine, ram="8GiB", patience_s=1e6)
lock = cache._core.lock
cache.preload("tiny", "cpu")
if sys.argv[1] == "beside":
    held = cache.lease("base", "cpu")
    threading.Thread(target=cache.lease, args=("medium", "cpu"), daemon=True).start()
    while not cache.stats().waiting:
        time.sleep(0.01)
signal.signal(signal.SIGALRM, interrupt)
for _ in range(300):
    with contextlib.suppress(KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.0003)
        for _ in range(1000):  # in a destructor it would be swallowed
            cache.lease("tiny", "cpu").release()
        signal.setitimer(signal.ITIMER_REAL, 0)
    while lock.put_off:
        lock.catch_up()
    cache._core.check()
    assert cache.stats().leases == (sys.argv[1] == "beside")
print("right", flush=True)
os._exit(0)  # the thread waits on
"""


@pytest.mark.process
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no timers")
@pytest.mark.parametrize("where", ["alone", "beside"])
def test_what_a_signal_handler_raises_leaves_the_books_right(where: str) -> None:
    """
    Ctrl-C may come at any moment of a lease or its release: it leaves no lock taken,
    and no lease or byte counted that is not there.
    """
    result = child(INTERRUPTED_HITS, where, covered=False)
    assert result.stdout == "right\n", result.stderr[-2000:]
