"""
The heap in huge pages: what it asks of the C library, and what the kernel then gives.

What is asked is seen by a C library that writes down its calls; what is given, in page
faults and bytes, in processes that load real weights. Nothing here looks at a clock.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from fakes import MIB
from real import child, clip, packaged

from whispercache.devices import heap
from whispercache.devices.heap import Heap, huge_page_bytes, huge_pages

if TYPE_CHECKING:
    from pathlib import Path

HUGE = 2 * MIB
ARENA_MAX, MMAP_MAX, TRIM = -8, -4, -1
HUGEPAGE, NOHUGEPAGE = 14, 15


class Function:
    """
    A function of the C library: its calls are noted, its answer is given.
    """

    def __init__(self, calls: list[tuple[Any, ...]], name: str, answer: Any) -> None:
        self._calls, self._name, self.answer = calls, name, answer

    def __call__(self, *arguments: Any) -> Any:
        """
        Note the call.
        """
        self._calls.append((self._name, *arguments))
        return self.answer


class Library:
    """
    A C library that only takes notes.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.mallopt = Function(self.calls, "mallopt", 1)
        self.malloc = Function(self.calls, "malloc", 0x10010)
        self.free = Function(self.calls, "free", None)
        self.madvise = Function(self.calls, "madvise", 0)
        self.gnu_get_libc_version = Function(self.calls, "version", b"2.36")

    def asked(self, name: str) -> list[tuple[Any, ...]]:
        """
        The arguments of the calls of one function.
        """
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def library() -> Library:
    """
    A C library that only takes notes.
    """
    return Library()


def heap_in(library: Library, huge_bytes: int = HUGE) -> Heap:
    """
    The heap of that library.
    """
    found: Any = library
    return Heap(found, huge_bytes)


def kernel(root: Path, **settings: str) -> Path:
    """
    A file system with these settings of the kernel.
    """
    folder = root / "sys/kernel/mm/transparent_hugepage"
    folder.mkdir(parents=True)
    for name, text in settings.items():
        (folder / name).write_text(f"{text}\n")
    return root


class TestAdvice:
    """
    What the kernel is told around a load.
    """

    def test_a_load_is_advised_before_it_and_not_after(self, library: Library) -> None:
        """
        The whole pages of what malloc returned, which is free again for the load.
        """
        with heap_in(library).loading(64 * MIB):
            ((start, length, advice),) = library.asked("madvise")
            assert library.calls[-1] == ("free", 0x10010)
        assert (start % mmap.PAGESIZE, length % mmap.PAGESIZE) == (0, 0)
        assert start - 0x10010 < mmap.PAGESIZE
        assert 0 <= 0x10010 + 64 * MIB - (start + length) < mmap.PAGESIZE
        assert advice == HUGEPAGE
        assert library.asked("madvise")[1:] == [(start, length, NOHUGEPAGE)]

    def test_a_failed_load_is_not_advised_after_it_either(
        self, library: Library
    ) -> None:
        """
        Nor does the heap go on keeping what is freed.
        """

        def fail() -> None:
            with heap_in(library).loading(64 * MIB):
                raise MemoryError

        with pytest.raises(MemoryError):
            fail()
        assert library.asked("madvise")[-1][-1] == NOHUGEPAGE
        assert library.asked("mallopt")[-2:] == [(MMAP_MAX, 65536), (TRIM, 64 * MIB)]

    @pytest.mark.parametrize(
        ("n_bytes", "huge_bytes"),
        [
            pytest.param(8 * MIB, HUGE, id="few pages"),
            pytest.param(0, HUGE, id="unknown size"),
            pytest.param(64 * MIB, 512 * MIB, id="huge pages of ARM"),
            pytest.param(64 * MIB, 0, id="no advice needed"),
        ],
    )
    def test_other_loads_are_not(
        self, library: Library, n_bytes: int, huge_bytes: int
    ) -> None:
        """
        A page that is filled in part would count, or all memory is in huge pages.
        """
        with heap_in(library, huge_bytes).loading(n_bytes):
            pass
        assert library.asked("madvise") == library.asked("malloc") == []

    def test_a_heap_that_always_keeps_never_settles(self, library: Library) -> None:
        """
        All blocks come from it, and freed ones stay.
        """
        found: Any = library
        heap = Heap(found, HUGE, always_keeps=True)
        heap.share()
        with heap.loading(64 * MIB):
            heap.settle()
        told = library.asked("mallopt")
        assert {value for name, value in told if name == MMAP_MAX} == {0}
        assert {value for name, value in told if name == TRIM} == {-1}

    @pytest.mark.parametrize(
        ("function", "answer"), [("malloc", None), ("madvise", -1)]
    )
    def test_a_refusal_stops_no_load(
        self, library: Library, function: str, answer: int | None
    ) -> None:
        """
        Without room the load itself fails; without huge pages it is as slow as ever.
        """
        getattr(library, function).answer = answer
        loaded = False
        with heap_in(library).loading(64 * MIB):
            loaded = True
        assert loaded
        assert NOHUGEPAGE not in [each[-1] for each in library.asked("madvise")]


class TestCalls:
    """
    What calls keep, and for how long.
    """

    @pytest.fixture
    def returned(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """
        One item for each time that free memory went back to the system.
        """
        noted: list[str] = []
        monkeypatch.setattr(heap, "return_free_memory", lambda: noted.append("all"))
        return noted

    @staticmethod
    def keeps(library: Library) -> bool:
        """
        Tests if freed blocks stay in the heap now.
        """
        told = dict(library.asked("mallopt"))
        assert (told[MMAP_MAX] == 0) == (told[TRIM] == -1)
        return bool(told[MMAP_MAX] == 0)

    def test_the_last_call_to_end_ends_the_keeping(
        self, library: Library, returned: list[str]
    ) -> None:
        """
        Each of them returns at its end what is free.
        """
        one = heap_in(library)
        with one.calling(keeps=True):
            with one.calling(keeps=True):
                assert self.keeps(library)
            assert self.keeps(library)
            assert len(returned) == 1
        assert not self.keeps(library)
        assert len(returned) == 2

    def test_a_call_that_fails_keeps_nothing(
        self, library: Library, returned: list[str]
    ) -> None:
        """
        What it freed goes back all the same.
        """

        def fail() -> None:
            with one.calling(keeps=True):
                raise MemoryError

        one = heap_in(library)
        with pytest.raises(MemoryError):
            fail()
        assert not self.keeps(library)
        assert len(returned) == 1

    def test_a_call_that_keeps_nothing_returns_memory(
        self, library: Library, returned: list[str]
    ) -> None:
        """
        As those in batches.
        """
        one = heap_in(library)
        one.share()
        with one.calling(keeps=False):
            assert not self.keeps(library)
        assert len(returned) == 1

    def test_a_load_beside_a_call_leaves_the_call_what_it_keeps(
        self, library: Library, returned: list[str]
    ) -> None:
        """
        Whichever of them ends first.
        """
        one = heap_in(library)
        with one.calling(keeps=True):
            with one.loading(64 * MIB):
                pass
            assert self.keeps(library)
        with one.loading(64 * MIB):
            with one.calling(keeps=True):
                pass
            assert self.keeps(library)
        assert not self.keeps(library)
        # The second call took nothing away from the load.
        assert len(returned) == 1

    def test_what_was_freed_for_a_load_stays(
        self, library: Library, returned: list[str]
    ) -> None:
        """
        A call that ends before the load begins does not return it.
        """
        one = heap_in(library)
        one.keep()
        with one.calling(keeps=True):
            pass
        assert self.keeps(library)
        assert not returned
        one.settle()
        assert not self.keeps(library)

    def test_a_heap_that_always_keeps_returns_nothing_after_calls(
        self, library: Library, returned: list[str]
    ) -> None:
        """
        The next call finds it.
        """
        found: Any = library
        one = Heap(found, HUGE, always_keeps=True)
        with one.calling(keeps=True):
            pass
        assert self.keeps(library)
        assert not returned


class TestKernel:
    """
    What the kernel's settings say, and what follows from them.
    """

    @pytest.mark.parametrize(
        ("text", "mode"),
        [
            ("always [madvise] never", "madvise"),
            ("[always] madvise never", "always"),
            ("always madvise [never]", "never"),
            ("always inherit [strange]", ""),
            ("", ""),
        ],
    )
    def test_the_setting_in_brackets_is_in_force(
        self, tmp_path: Path, text: str, mode: str
    ) -> None:
        """
        One that nobody knows counts as none.
        """
        root = kernel(tmp_path, enabled=text, hpage_pmd_size="2097152")
        assert (huge_pages(root), huge_page_bytes(root)) == (mode, HUGE)

    def test_a_kernel_without_huge_pages_has_no_settings(self, tmp_path: Path) -> None:
        """
        As on macOS, and in some containers.
        """
        assert (huge_pages(tmp_path), huge_page_bytes(tmp_path)) == ("", 0)

    @pytest.fixture
    def fresh(self, monkeypatch: pytest.MonkeyPatch, library: Library) -> Library:
        """
        A process that has not asked yet, with a C library that only takes notes.
        """
        monkeypatch.setattr(heap, "_heap", [])
        monkeypatch.setattr(heap, "huge_page_bytes", lambda: HUGE)
        monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
        return library

    @pytest.mark.parametrize(("mode", "advised"), [("madvise", 2), ("always", 0)])
    def test_one_heap_serves_all_threads(
        self, monkeypatch: pytest.MonkeyPatch, fresh: Library, mode: str, advised: int
    ) -> None:
        """
        It is asked for once; loads are advised only where the kernel wants that.
        """
        monkeypatch.setattr(heap, "huge_pages", lambda: mode)
        assert heap.use_huge_pages()
        assert heap.use_huge_pages()
        assert fresh.asked("mallopt").count((ARENA_MAX, 1)) == 1
        with heap.loading(lambda: 64 * MIB):
            pass
        assert len(fresh.asked("madvise")) == advised

    @pytest.mark.parametrize("mode", ["never", ""])
    def test_where_there_are_none_nothing_changes(
        self, monkeypatch: pytest.MonkeyPatch, fresh: Library, mode: str
    ) -> None:
        """
        Nor where no heap was asked for.
        """
        monkeypatch.setattr(heap, "huge_pages", lambda: mode)
        assert not heap.use_huge_pages()
        with heap.loading(lambda: 64 * MIB), heap.calling(keeps=True):
            heap.keep()
            heap.settle()
        assert fresh.calls == []

    @pytest.mark.parametrize("mode", ["never", ""])
    def test_without_huge_pages_freed_memory_can_still_be_kept(
        self, monkeypatch: pytest.MonkeyPatch, fresh: Library, mode: str
    ) -> None:
        """
        For good, and nothing is advised.
        """
        monkeypatch.setattr(heap, "huge_pages", lambda: mode)
        assert not heap.use_huge_pages(keep=True)
        with heap.loading(lambda: 64 * MIB):
            pass
        heap.settle()
        told = fresh.asked("mallopt")
        assert (ARENA_MAX, 1) in told
        assert {value for name, value in told if name == MMAP_MAX} == {0}
        assert {value for name, value in told if name == TRIM} == {-1}
        assert fresh.asked("madvise") == []

    def test_the_problem_says_what_helps(
        self, monkeypatch: pytest.MonkeyPatch, fresh: Library
    ) -> None:
        """
        It names the file to write to.
        """
        del fresh
        monkeypatch.setattr(heap, "huge_pages", lambda: "never")
        path = "/sys/kernel/mm/transparent_hugepage/enabled"
        assert heap.huge_pages_problem().endswith(f"write madvise to {path}")

    @pytest.mark.parametrize("missing", ["gnu_get_libc_version", "mallopt", "library"])
    def test_without_glibc_nothing_changes(
        self, monkeypatch: pytest.MonkeyPatch, fresh: Library, missing: str
    ) -> None:
        """
        Those of macOS and musl have no such functions, Windows has no library,
        and Android another mallopt.
        """

        def refuse(_: object) -> object:
            raise TypeError

        if missing == "library":
            monkeypatch.setattr(ctypes, "CDLL", refuse)
        else:
            delattr(fresh, missing)
        assert not heap.use_huge_pages(keep=True)
        assert heap.huge_pages_problem() == "they need Linux with glibc"
        assert fresh.calls == []


KEEPING = """
import ctypes, json, resource, sys, threading

from whispercache.devices import heap, host

if sys.argv[1] == "never":
    heap.huge_pages = lambda: "never"
keeps = sys.argv[1] != "call"
assert heap.use_huge_pages(keep=keeps) == (sys.argv[1] != "never")
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
size = 64 * 1024 * 1024

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = library.malloc(ctypes.c_size_t(size))
    ctypes.memset(block, 1, size)
    library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def blocks():
    counts.extend([faults(), faults()])
    thread = threading.Thread(target=lambda: counts.append(faults()))
    thread.start()
    thread.join()
    return host.anonymous_bytes() - start

counts = []
start = host.anonymous_bytes()
if sys.argv[1] == "call":
    with heap.calling(keeps=True):
        kept = blocks()
else:
    kept = blocks()
    host.return_free_memory()
print(json.dumps([counts, kept, host.anonymous_bytes() - start]))
"""


@pytest.mark.process
@pytest.mark.parametrize("mode", ["always", "never", "call"])
def test_kept_memory_stays_until_it_is_returned(mode: str) -> None:
    """
    By a process that always keeps it, with huge pages or without, or by a call. A block
    of 64 MiB, such as is mapped and unmapped otherwise, costs page faults once; also on
    a thread, which would have a heap of its own.
    """
    problem = heap.huge_pages_problem()
    if problem and (mode != "never" or "glibc" in problem):
        pytest.skip(problem)
    told = child(KEEPING, mode)
    assert (told.returncode, told.stderr) == (0, "")
    (first, second, third), kept, left = json.loads(told.stdout)
    assert kept > 60 * MIB
    assert left < 8 * MIB
    # How many there are first is up to the size of the system's pages.
    assert second < first / 4
    assert third < first / 4


LOADING = """
import json, re, resource, sys
from pathlib import Path

from whispercache import ModelCache, use_huge_pages
from whispercache.devices.host import anonymous_bytes, return_free_memory

clip, *models = sys.argv[3:]
if sys.argv[1] == "huge pages":
    assert use_huge_pages()
if sys.argv[2] == "forbidden":
    import ctypes

    PR_SET_THP_DISABLE = 41
    assert not ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)

def huge_bytes():
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"AnonHugePages:\\s*(\\d+)", text)[1]) * 1024

def refused():
    text = Path("/proc/vmstat").read_text()
    return int(re.search(r"thp_fault_fallback (\\d+)", text)[1])

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def load(model):
    before = faults()
    cache.lease(model, "cpu", "float32", cpu_threads=1).release()
    return faults() - before

cache = ModelCache(max_models=1, variants=False)
refused_before = refused()
load(models[0])
in_huge_pages, refused_now = huge_bytes(), refused()
# Whatever comes once in a process.
cache.get_model(models[0], "cpu", "float32", cpu_threads=1).transcribe(clip)
cache.evict(models[0])
return_free_memory()
before = anonymous_bytes()
load(models[1])
grown = anonymous_bytes() - before
switches = [load(models[n % 2]) for n in range(8)]
segments, _ = cache.get_model(
    models[1], "cpu", "float32", cpu_threads=1
).transcribe(clip)
text = "".join(segment.text for segment in segments)
cache.evict(models[1])
return_free_memory()
print(json.dumps({
    "grown": grown,
    "huge": in_huge_pages,
    "refused": refused_now - refused_before,
    "switches": switches[2:],
    "left": anonymous_bytes() - before,
    "text": text,
}))
"""
WEIGHTS = 144 * MIB
"""
Those of tiny.en in float32.
"""


@pytest.mark.process
@pytest.mark.slow
class TestRealLoads:
    """
    Two models of tiny.en's weights in turn, in a process each.
    """

    @staticmethod
    def seen(tmp_path: Path, kind: str, kernel: str = "") -> Any:
        """
        What a process saw, with this kind of heap and this kernel.
        """
        if problem := heap.huge_pages_problem():
            pytest.skip(problem)
        first = packaged("tiny.en")
        second = tmp_path / "second"
        # No link: the same files would be the same model.
        shutil.copytree(first, second, dirs_exist_ok=True)
        told = child(LOADING, kind, kernel, clip("en-bread"), first, second)
        assert (told.returncode, told.stderr) == (0, "")
        return json.loads(told.stdout)

    def test_weights_are_in_huge_pages_and_come_back(self, tmp_path: Path) -> None:
        """
        They take no more than they do elsewhere, and a switch costs hardly a fault.
        """
        plain, huge = (self.seen(tmp_path, each) for each in ("plain", "huge pages"))
        if huge["refused"]:
            pytest.skip(f"the kernel had no room for {huge['refused']} huge pages")
        # All but where something small was put before.
        assert huge["huge"] > WEIGHTS / 2
        assert huge["grown"] < plain["grown"] + 4 * MIB
        assert huge["left"] < WEIGHTS / 8
        # Each page of the largest block, at least, which is half of the weights.
        assert min(plain["switches"]) > WEIGHTS / 3 / mmap.PAGESIZE
        assert max(huge["switches"]) < min(plain["switches"]) / 4
        assert huge["text"] == plain["text"] != ""

    def test_a_process_that_may_have_none_works_as_well(self, tmp_path: Path) -> None:
        """
        The kernel then gives small pages, whatever it was advised.
        """
        seen = self.seen(tmp_path, "huge pages", "forbidden")
        assert seen["huge"] == 0
        assert seen["left"] < WEIGHTS / 8
        assert "bread" in seen["text"]
