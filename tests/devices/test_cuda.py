"""
CUDA's own calls: the real ctypes code in child processes, over the fake driver.

A driver aborts a child that would have it create a context.
"""

from __future__ import annotations

import ctypes
import os
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest
from fakes import (
    CARD_A,
    CARD_B,
    GIB,
    MIB,
    ONE_CARD,
    SLOT_A,
    TWO_CARDS_SWAPPED,
    UUID_A,
    UUID_B,
    FakeGpus,
    build_library,
    needs_linux,
    run_child,
)

from whispercache.devices import cublas, cuda

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.process

_DRIVER = """
from whispercache.devices import cuda

driver = cuda.open_driver()

def numbers(ordinal):
    pool = driver.pool(ordinal)
    return pool and [pool.used_bytes, pool.reserved_bytes, pool.peak_bytes]
"""

CONTEXT_CALLS = {
    "cuDevicePrimaryCtxRetain": "retain",
    "cuCtxPushCurrent_v2": "push",
    "cuCtxPopCurrent_v2": "pop",
    "cuDevicePrimaryCtxRelease_v2": "release",
}

# More than 32 bits hold, so that a number that was cut would show.
HELD = {
    "context": 300 * MIB,
    "used": 5 * GIB,
    "reserved": 6 * GIB,
    "peak": 5 * GIB + 512 * MIB,
}


def ask(gpus: FakeGpus, code: str, *, without: tuple[str, ...] = ()) -> object:
    """
    What *code* left in ``answer``; it finds ``driver`` and ``numbers(ordinal)`` too.
    """
    return gpus.answer(_DRIVER + textwrap.dedent(code), without=without)


def context_calls(gpus: FakeGpus) -> list[str]:
    """
    What the children did with contexts, in order.
    """
    return [CONTEXT_CALLS[call] for call in gpus.calls() if call in CONTEXT_CALLS]


@needs_linux
class TestContexts:
    """
    What only a context can tell is told only where there is one, and it stays.
    """

    def test_without_a_context_nothing_is_done_and_none_is_created(
        self, gpus: FakeGpus
    ) -> None:
        """
        Every question has an answer for that, and calls nothing that needs a context.
        """
        gpus.set_state(ONE_CARD)
        answer = ask(
            gpus,
            """
            answer = [
                driver.is_active(0), driver.synchronize(0), driver.trim(0),
                driver.pool(0), driver.forget_peak(0), driver.free_bytes(0),
            ]
            """,
        )
        assert answer == [False, False, False, None, None, None]
        assert set(gpus.calls()) == {
            "cuInit",
            "cuDeviceGetCount",
            "cuDeviceGet",
            "cuDevicePrimaryCtxGetState",
        }

    def test_contexts_are_left_as_they_were_found(self, gpus: FakeGpus) -> None:
        """
        Whatever is asked retains and releases, pushes and pops the context once.
        """
        gpus.set_state(ONE_CARD)
        gpus.hold(0, **HELD)
        answer = ask(
            gpus,
            """
            driver.synchronize(0), driver.pool(0), driver.forget_peak(0)
            driver.free_bytes(0), driver.trim(0)
            answer = driver.is_active(0)
            """,
        )
        assert answer is True
        assert context_calls(gpus) == ["retain", "push", "pop", "release"] * 5

    def test_contexts_are_left_as_they_were_found_by_what_fails_too(
        self, gpus: FakeGpus
    ) -> None:
        """
        Whichever call of a trim fails, all that was done before is undone.
        """
        gpus.set_state(ONE_CARD)
        gpus.hold(0, **HELD)
        answer = ask(
            gpus,
            """
            import os, pathlib
            state = pathlib.Path(os.environ["FAKE_GPU_STATE"])
            healthy, answer = state.read_text(), []
            for function in (
                "cuMemPoolTrimTo", "cuCtxSynchronize", "cuDeviceGetMemPool",
                "cuCtxPopCurrent_v2", "cuCtxPushCurrent_v2",
            ):
                state.write_text(f"{healthy}\\nfail {function} 999")
                try:
                    driver.trim(0)
                except cuda.CudaError as error:
                    answer.append(f"{function}: unknown error" in str(error))
            """,
        )
        assert answer == [True] * 5
        whole = ["retain", "push", "pop", "release"]
        assert context_calls(gpus) == [*whole * 4, "retain", "push", "release"]

    def test_an_illegal_access_shows_at_the_next_synchronise(
        self, gpus: FakeGpus
    ) -> None:
        """
        It is a RuntimeError with the driver's text, which is told as a broken context.
        """
        gpus.set_state(f"{ONE_CARD}\nfail cuCtxSynchronize 700")
        gpus.hold(0, context=300 * MIB)
        answer = ask(
            gpus,
            """
            from whispercache.devices.faults import classify
            try:
                driver.synchronize(0)
            except RuntimeError as error:
                answer = [type(error).__name__, classify(error).name, str(error)]
            """,
        )
        assert isinstance(answer, list)
        assert answer[:2] == ["CudaError", "STICKY"]
        assert "an illegal memory access was encountered (700)" in answer[2]

    def test_a_full_card_is_told_as_that(self, gpus: FakeGpus) -> None:
        """
        The driver's own lack of memory is one that less in memory may mend.
        """
        gpus.set_state(f"{ONE_CARD}\nfail cuDevicePrimaryCtxRetain 2")
        gpus.hold(0, context=300 * MIB)
        answer = ask(
            gpus,
            """
            from whispercache.devices.faults import classify
            try:
                driver.synchronize(0)
            except RuntimeError as error:
                answer = classify(error).name
            """,
        )
        assert answer == "OUT_OF_MEMORY"

    def test_what_this_process_holds_is_not_free(self, gpus: FakeGpus) -> None:
        """
        Context and pool are taken of the card, for CUDA as for NVML.
        """
        gpus.set_state(ONE_CARD)
        gpus.hold(0, **HELD)
        free_bytes = 7 * GIB - HELD["context"] - HELD["reserved"]
        answer = ask(gpus, "answer = [driver.free_bytes(0), reading('cuda:0')]")
        assert answer == [free_bytes, [8 * GIB, free_bytes, "nvml"]]

    def test_the_compute_capability_is_told_without_a_context(
        self, gpus: FakeGpus
    ) -> None:
        """
        Each card has its own; CUDA's order counts.
        """
        gpus.set_state(f"{TWO_CARDS_SWAPPED}\ncapability 1 12 0")
        answer = ask(gpus, "answer = [driver.compute_capability(n) for n in range(2)]")
        assert answer == [[12, 0], [8, 6]]
        assert context_calls(gpus) == []


@needs_linux
class TestPool:
    """
    The memory pool that CTranslate2 allocates from.
    """

    def test_its_numbers_are_those_of_this_process(self, gpus: FakeGpus) -> None:
        """
        Used, reserved and the peak, each as the driver counts it.
        """
        gpus.set_state(ONE_CARD)
        gpus.hold(0, **HELD)
        answer = ask(gpus, "answer = [*numbers(0), driver.pool(0).idle_bytes]")
        names = ("used", "reserved", "peak")
        assert answer == [*(HELD[name] for name in names), 1 * GIB]

    def test_a_peak_that_is_forgotten_counts_from_now(self, gpus: FakeGpus) -> None:
        """
        It becomes what is used, and nothing else changes.
        """
        gpus.set_state(ONE_CARD)
        gpus.hold(0, **HELD)
        ask(gpus, "answer = driver.forget_peak(0)")
        assert gpus.held(0) == {**HELD, "peak": HELD["used"], "threshold": 0}

    def test_a_trim_gives_idle_memory_back_to_the_card(self, gpus: FakeGpus) -> None:
        """
        NVML sees it free; what is used stays. Frees that are pending were waited for.
        """
        gpus.set_state(ONE_CARD)
        gpus.hold(0, **HELD)
        answer = ask(
            gpus,
            """
            before = probe.read("cuda:0").free_bytes
            trimmed = driver.trim(0)
            answer = [trimmed, probe.read("cuda:0").free_bytes - before, numbers(0)]
            """,
        )
        assert answer == [True, 1 * GIB, [HELD["used"], HELD["used"], HELD["peak"]]]
        calls = gpus.calls()
        assert calls.index("cuCtxSynchronize") < calls.index("cuMemPoolTrimTo")

    def test_what_another_library_keeps_is_trimmed_and_its_setting_stays(
        self, gpus: FakeGpus
    ) -> None:
        """
        A raised release threshold keeps freed memory at a synchronise, not at a trim.
        """
        gpus.set_state(ONE_CARD)
        gpus.hold(0, **HELD, threshold=2**64 - 1)
        answer = ask(
            gpus,
            """
            driver.synchronize(0)
            kept_bytes = driver.pool(0).idle_bytes
            driver.trim(0)
            answer = [kept_bytes, driver.pool(0).idle_bytes]
            """,
        )
        assert answer == [1 * GIB, 0]
        assert gpus.held(0)["threshold"] == 2**64 - 1

    def test_a_card_without_pools_has_none(self, gpus: FakeGpus) -> None:
        """
        There is nothing to read or to trim, and work can be waited for all the same.
        """
        gpus.set_state(f"{ONE_CARD}\nnopools 0")
        gpus.hold(0, context=300 * MIB)
        answer = ask(
            gpus,
            """
            answer = [driver.pool(0), driver.trim(0), driver.forget_peak(0)]
            answer.append(driver.synchronize(0))
            """,
        )
        assert answer == [None, False, None, True]
        assert not any("Pool" in call for call in gpus.calls())

    def test_each_card_has_its_own(self, gpus: FakeGpus) -> None:
        """
        CUDA's first card may be the second one: its pool is read and trimmed, alone.
        """
        gpus.set_state(TWO_CARDS_SWAPPED)
        gpus.hold(0, context=1, used=10, reserved=30, peak=20)
        gpus.hold(1, context=1, used=1 * GIB, reserved=3 * GIB, peak=2 * GIB)
        answer = ask(
            gpus,
            """
            answer = [numbers(0), numbers(1)]
            driver.trim(0)
            answer += [numbers(0)[1], numbers(1)[1]]
            """,
        )
        first, second = [GIB, 3 * GIB, 2 * GIB], [10, 30, 20]
        assert answer == [first, second, 1 * GIB, 30]

    def test_a_slice_of_a_card_has_its_own(self, gpus: FakeGpus) -> None:
        """
        On a MIG slice the pool is the slice's, and the bytes are of the slice.
        """
        gpus.set_state(
            f"""
            card {UUID_A} {SLOT_A} {80 * GIB} {1 * GIB} Whole
            card {UUID_B.replace("GPU-", "MIG-")} {SLOT_A} {10 * GIB} {2 * GIB} Slice
            visible 1
            """
        )
        gpus.hold(1, context=1 * GIB, used=2 * GIB, reserved=3 * GIB)
        answer = ask(
            gpus, "answer = [numbers(0), driver.trim(0), reading('cuda:0')[1]]"
        )
        assert answer == [[2 * GIB, 3 * GIB, 2 * GIB], True, 5 * GIB]

    def test_cards_can_be_asked_from_many_threads(self, gpus: FakeGpus) -> None:
        """
        What one thread makes current is not what the other reads.
        """
        gpus.set_state(f"{CARD_A}\n{CARD_B}\nvisible 0 1")
        gpus.hold(0, context=1, used=1, reserved=10)
        gpus.hold(1, context=1, used=2, reserved=20)
        answer = ask(
            gpus,
            """
            from concurrent.futures import ThreadPoolExecutor

            def read_often(ordinal):
                return {tuple(numbers(ordinal)) for _ in range(50)}

            with ThreadPoolExecutor(4) as threads:
                answer = list(map(sorted, threads.map(read_often, [0, 1, 0, 1])))
            """,
        )
        assert answer == [[[1, 10, 1]], [[2, 20, 2]]] * 2

    def test_a_reading_between_two_frees_has_nothing_idle(self) -> None:
        """
        The numbers of one reading may not match; less than nothing is never idle.
        """
        assert cuda.Pool(used_bytes=2, reserved_bytes=1, peak_bytes=2).idle_bytes == 0


def test_a_driver_too_old_for_a_call_is_a_cuda_error() -> None:
    """
    A library without the function that is needed asks for an update.
    """
    with pytest.raises(cuda.CudaError, match=r"too old: it has no cuInit; update"):
        cuda.Driver(ctypes.CDLL(None))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A folder of packages with a tiny cuBLAS, which needs the other half of itself.
    """
    folder = tmp_path_factory.mktemp("site")
    inside = folder / "nvidia" / "cublas" / "lib"
    light, whole = folder / "light.c", folder / "whole.c"
    light.write_text("int light(void) { return 41; }\n")
    whole.write_text("int light(void);\nint whole(void) { return light() + 1; }\n")
    build_library(inside / "libcublasLt.so.12", light)
    build_library(inside / "libcublas.so.12", whole, inside / "libcublasLt.so.12")
    return folder


@needs_linux
class TestCublasOfItsPackage:
    """
    The real loader in a child process, with a tiny cuBLAS installed as pip does it.
    """

    def test_once_loaded_it_is_found_by_its_bare_name(self, site: Path) -> None:
        """
        As CTranslate2 looks for it; before, nobody finds it. Its other half comes too.
        """
        child = run_child(
            f"""
            import ctypes, sys
            from whispercache.devices.cublas import cublas_problem, load_cublas

            sys.path.append({str(site)!r})
            try:
                ctypes.CDLL("libcublas.so.12")
            except OSError:
                print("missing")
            load_cublas()
            print(ctypes.CDLL("libcublas.so.12").whole(), cublas_problem())
            """,
            LD_LIBRARY_PATH="",
        )
        assert (child.stdout, child.stderr) == ("missing\n42 None\n", "")

    def test_one_that_the_loader_finds_is_taken_before_the_package(
        self, site: Path, tmp_path: Path
    ) -> None:
        """
        Whoever put another on the path gets that one, and only that.
        """
        source = tmp_path / "other.c"
        source.write_text("int whole(void) { return 7; }\n")
        build_library(tmp_path / "libcublas.so.12", source)
        child = run_child(
            f"""
            import ctypes, sys
            from pathlib import Path
            from whispercache.devices.cublas import load_cublas

            sys.path.append({str(site)!r})
            load_cublas()
            print(ctypes.CDLL("libcublas.so.12").whole())
            print("nvidia/cublas" in Path("/proc/self/maps").read_text())
            """,
            LD_LIBRARY_PATH=str(tmp_path),
        )
        assert (child.stdout, child.stderr) == ("7\nFalse\n", "")


class TestCublas:
    """
    What is said of the library, and when it is looked for; no real one is loaded.
    """

    @pytest.fixture(autouse=True)
    def _forgotten(self) -> Iterator[None]:
        """
        No test knows what another found.
        """
        cublas._load.cache_clear()
        yield
        cublas._load.cache_clear()

    @pytest.fixture
    def package(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        """
        The only folder that packages are in, with that of cuBLAS, the library an empty
        file.
        """
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        folder = tmp_path / cublas._INSIDE
        folder.mkdir(parents=True)
        (folder / cublas._LIBRARY).touch()
        return folder

    def test_a_library_that_the_loader_finds_is_no_problem(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Nothing is said where it can be loaded, and it is looked for once.
        """
        loaded: list[str] = []
        monkeypatch.setattr(ctypes, "CDLL", loaded.append)
        assert cublas.cublas_problem() is None
        cublas.load_cublas()
        assert loaded == [cublas._LIBRARY]

    def test_a_missing_library_is_to_be_installed(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """
        The package to install is named, and the file that the loader missed.
        """
        monkeypatch.setattr(ctypes, "CDLL", without())
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        problem = str(cublas.cublas_problem())
        assert "was not found: pip install nvidia-cublas-cu12" in problem
        assert f"({cublas._LIBRARY}: cannot open" in problem

    def test_a_missing_library_is_no_error_of_whoever_wants_it_loaded(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """
        CTranslate2 says it when it matters; installed meanwhile, the library is found.
        """
        monkeypatch.setattr(ctypes, "CDLL", without())
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        cublas.load_cublas()
        monkeypatch.undo()
        monkeypatch.setattr(ctypes, "CDLL", without(""))
        assert cublas.cublas_problem() is None

    def test_an_installed_library_that_cannot_be_loaded_is_to_be_installed_again(
        self, monkeypatch: pytest.MonkeyPatch, package: Path
    ) -> None:
        """
        Its folder is named, and what the loader had to say of it.
        """
        monkeypatch.setattr(ctypes, "CDLL", without())
        problem = str(cublas.cublas_problem())
        assert f"is in {package} but cannot be loaded: pip install --force" in problem
        assert f"{package / cublas._PACKAGED[0]}: cannot open" in problem

    def test_on_windows_its_folder_is_made_known(
        self, monkeypatch: pytest.MonkeyPatch, package: Path
    ) -> None:
        """
        There a library finds what it needs in none but such folders.
        """
        known: list[str] = []
        monkeypatch.setattr(ctypes, "CDLL", without(cublas._LIBRARY))
        monkeypatch.setattr(os, "add_dll_directory", known.append, raising=False)
        monkeypatch.setattr(sys, "platform", "win32")
        cublas.load_cublas()
        monkeypatch.undo()
        assert known == [str(package)]


def without(*missing: str) -> Callable[..., object]:
    """
    A loader of libraries that finds all but the *missing* names; none, without names.
    """

    def load(name: str, mode: int = 0) -> object:
        if not missing or name in missing:
            message = f"{name}: cannot open shared object file"
            raise OSError(message)
        return mode

    return load
