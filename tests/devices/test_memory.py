"""
What a device has: GPUs by the real bindings over fake drivers, the host by fake files.
"""

from __future__ import annotations

import ctypes
import mmap
from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil
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
    needs_linux,
    run_child,
)

from whispercache.devices import host, memory
from whispercache.devices.probe import SystemProbe
from whispercache.errors import DeviceUnavailable

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.process

NVML_NOT_SUPPORTED = 3
NVML_GPU_IS_LOST = 15
NVML_UNKNOWN = 999


@needs_linux
class TestGpus:
    """
    The real pynvml and ctypes code in a child process, over fake drivers.
    """

    def test_one_card_is_read_through_nvml(self, gpus: FakeGpus) -> None:
        """
        Total and free bytes of the only card come from NVML.
        """
        gpus.set_state(ONE_CARD)
        answer = gpus.answer("answer = [probe.cuda_devices(), reading('cuda:0')]")
        assert answer == [["cuda:0"], [8 * GIB, 7 * GIB, "nvml"]]

    def test_reading_a_card_creates_no_context(self, gpus: FakeGpus) -> None:
        """
        Not even asking for everything makes CUDA take memory of the card.
        """
        gpus.set_state(f"{ONE_CARD}\nfail nvmlInitWithFlags 9")
        gpus.answer("answer = [reading('cuda:0'), probe.device_name('cuda:0')]")
        assert "cuInit" in gpus.calls()
        assert "cuDevicePrimaryCtxRetain" not in gpus.calls()

    def test_cards_are_told_apart_where_cuda_and_nvml_count_differently(
        self, gpus: FakeGpus
    ) -> None:
        """
        cuda:0 may be NVML's second card; the UUID alone leads to it.
        """
        gpus.set_state(f"{TWO_CARDS_SWAPPED}\nfail nvmlDeviceGetHandleByPciBusId_v2 2")
        answer = gpus.answer(
            """
            names = [probe.device_name(device) for device in probe.cuda_devices()]
            answer = [names, reading("cuda:0"), reading("cuda:1")]
            """
        )
        assert answer == [
            ["Beta", "Alpha"],
            [24 * GIB, 20 * GIB, "nvml"],
            [8 * GIB, 7 * GIB, "nvml"],
        ]

    def test_cards_of_one_kind_have_a_common_name_without_cuda(
        self, gpus: FakeGpus
    ) -> None:
        """
        Others have none, nor has a machine whose driver does not tell.
        """
        more = f"card {UUID_B} 00000000:02:00.0 {24 * GIB} {4 * GIB}"
        for state, name in [
            (CARD_A, "Alpha"),
            (f"{CARD_A}\n{more} Alpha", "Alpha"),
            (f"{CARD_A}\n{more} Beta", None),
            ("", None),
            (f"{CARD_A}\nfail nvmlDeviceGetName 3", None),
            (f"{CARD_A}\nfail nvmlInitWithFlags 9", None),
        ]:
            gpus.set_state(state)
            assert gpus.answer("answer = nvml.common_name()") == name
        assert "cuInit" not in gpus.calls()

    def test_only_visible_cards_count(self, gpus: FakeGpus) -> None:
        """
        With the second card alone let through, that card is cuda:0.
        """
        gpus.set_state(f"{CARD_A}\n{CARD_B}\nvisible 1")
        answer = gpus.answer("answer = [probe.cuda_devices(), reading('cuda:0')]")
        assert answer == [["cuda:0"], [24 * GIB, 20 * GIB, "nvml"]]

    def test_a_mig_slice_is_read_as_the_slice(self, gpus: FakeGpus) -> None:
        """
        A slice goes by its own UUID, so its bytes and not the whole card's are read.
        """
        slice_uuid = UUID_B.replace("GPU-", "MIG-")
        gpus.set_state(
            f"""
            card {UUID_A} {SLOT_A} {80 * GIB} {1 * GIB} Whole
            card {slice_uuid} {SLOT_A} {10 * GIB} {2 * GIB} Slice
            visible 1
            """
        )
        assert gpus.answer("answer = reading('cuda:0')") == [
            10 * GIB,
            8 * GIB,
            "nvml",
        ]

    @pytest.mark.parametrize(
        "function", ["nvmlDeviceGetHandleByUUID", "cuDeviceGetUuid_v2"]
    )
    def test_a_card_without_a_usable_uuid_is_found_by_its_slot(
        self, gpus: FakeGpus, function: str
    ) -> None:
        """
        Where either side refuses UUIDs, the PCI slot leads to the same card.
        """
        gpus.set_state(f"{TWO_CARDS_SWAPPED}\nfail {function} {NVML_NOT_SUPPORTED}")
        assert gpus.answer("answer = reading('cuda:0')") == [
            24 * GIB,
            20 * GIB,
            "nvml",
        ]

    def test_a_card_found_by_its_slot_is_no_larger_than_cuda_says(
        self, gpus: FakeGpus
    ) -> None:
        """
        The slot leads to the whole card even where the process sees a slice of it.
        """
        gpus.set_state(
            f"{ONE_CARD}\nslice 0 {2 * GIB}\nfail nvmlDeviceGetHandleByUUID 2"
        )
        assert gpus.answer("answer = reading('cuda:0')") == [2 * GIB, 2 * GIB, "nvml"]

    def test_other_tenants_are_seen_at_the_next_reading(self, gpus: FakeGpus) -> None:
        """
        Free bytes are those of the moment, whoever took the rest.
        """
        gpus.set_state(ONE_CARD)
        answer = gpus.answer(
            """
            import os, pathlib
            state = pathlib.Path(os.environ["FAKE_GPU_STATE"])
            before = probe.read("cuda:0").free_bytes
            state.write_text(state.read_text().replace(str(2**30), str(3 * 2**30)))
            answer = before - probe.read("cuda:0").free_bytes
            """
        )
        assert answer == 2 * GIB

    def test_nvml_is_initialised_once_and_read_from_many_threads(
        self, gpus: FakeGpus
    ) -> None:
        """
        8 threads that begin together, 200 readings each: all right, one initialisation.
        """
        gpus.set_state(TWO_CARDS_SWAPPED)
        answer = gpus.answer(
            """
            import threading
            from concurrent.futures import ThreadPoolExecutor

            together = threading.Barrier(8)

            def read_often(number):
                together.wait(timeout=30)
                devices = [f"cuda:{(number + n) % 2}" for n in range(200)]
                return {(device, *reading(device)) for device in devices}

            with ThreadPoolExecutor(8) as pool:
                answer = sorted(set().union(*pool.map(read_often, range(8))))
            """
        )
        assert answer == [
            ["cuda:0", 24 * GIB, 20 * GIB, "nvml"],
            ["cuda:1", 8 * GIB, 7 * GIB, "nvml"],
        ]
        assert gpus.calls().count("nvmlInitWithFlags") == 1
        assert gpus.calls().count("nvmlDeviceGetMemoryInfo") == 1600

    def test_a_card_that_is_not_there_is_refused_with_a_list_of_those_that_are(
        self, gpus: FakeGpus
    ) -> None:
        """
        The error names the GPUs that CUDA sees.
        """
        gpus.set_state(TWO_CARDS_SWAPPED)
        answer = gpus.answer("answer = reading('cuda:7')")
        assert "'cuda:7' cannot be used" in str(answer)
        assert "CUDA sees cuda:0, cuda:1 " in str(answer)

    def test_a_lost_card_is_refused_rather_than_guessed_at(
        self, gpus: FakeGpus
    ) -> None:
        """
        When NVML says that the card is gone, no other source is believed.
        """
        gpus.set_state(f"{ONE_CARD}\nfail nvmlDeviceGetMemoryInfo {NVML_GPU_IS_LOST}")
        answer = gpus.answer("answer = reading('cuda:0')")
        assert "GPU is lost; reset the card" in str(answer)

    def test_a_driver_that_fails_is_quoted(self, gpus: FakeGpus) -> None:
        """
        The error says which call failed and what the driver had to say of it.
        """
        gpus.set_state(f"{ONE_CARD}\nfail cuInit 999")
        answer = gpus.answer("answer = [probe.cuda_devices(), reading('cuda:0')]")
        assert isinstance(answer, list)
        assert answer[0] == []
        assert "cuInit: unknown error (999); check with nvidia-smi" in answer[1]

    def test_a_name_that_the_driver_refuses_is_a_device_unavailable(
        self, gpus: FakeGpus
    ) -> None:
        """
        Asking for the name fails as asking for the memory does.
        """
        gpus.set_state(f"{ONE_CARD}\nfail cuDeviceGetName 999")
        answer = gpus.answer(
            """
            try:
                answer = probe.device_name("cuda:0")
            except DeviceUnavailable as error:
                answer = error.reason
            """
        )
        assert "cuDeviceGetName" in str(answer)

    def test_hidden_cards_are_explained(self, gpus: FakeGpus) -> None:
        """
        With every card hidden, the error shows the variable that hides them.
        """
        gpus.set_state(CARD_A)
        answer = gpus.answer(
            "answer = [probe.cuda_devices(), reading('cuda:0')]",
            CUDA_VISIBLE_DEVICES="-1",
        )
        assert isinstance(answer, list)
        assert answer[0] == []
        assert "CUDA sees no GPU (CUDA_VISIBLE_DEVICES is '-1')" in answer[1]

    def test_the_driver_version_is_told(self, gpus: FakeGpus) -> None:
        """
        The doctor can name the driver's version, and knows no problem with NVML.
        """
        gpus.set_state(ONE_CARD)
        answer = gpus.answer("answer = [nvml.driver_version(), nvml.nvml_problem()]")
        assert answer == ["580.00.01", None]

    def test_a_driver_without_a_version_is_no_error(self, gpus: FakeGpus) -> None:
        """
        Where NVML will not tell the version there is none.
        """
        gpus.set_state(f"fail nvmlSystemGetDriverVersion {NVML_UNKNOWN}")
        assert gpus.answer("answer = nvml.driver_version()") is None


@needs_linux
class TestGpusWithoutNvml:
    """
    Who answers where NVML is missing, fails, or does not support the question.
    """

    @pytest.mark.parametrize(
        "failure",
        ["nvmlInitWithFlags 9", f"nvmlDeviceGetMemoryInfo {NVML_NOT_SUPPORTED}"],
    )
    def test_an_active_context_answers(self, gpus: FakeGpus, failure: str) -> None:
        """
        Once CUDA runs in this process, it says what is free of the very card.
        """
        gpus.set_state(f"{TWO_CARDS_SWAPPED}\nactive 1\nfail {failure}")
        answer = gpus.answer("answer = reading('cuda:0')")
        assert answer == [24 * GIB, 20 * GIB, "cuda driver"]

    def test_a_context_is_left_as_it_was_found(self, gpus: FakeGpus) -> None:
        """
        Each reading retains and releases, pushes and pops, also when it fails.
        """
        gpus.set_state(f"{ONE_CARD}\nactive 0\nfail cuMemGetInfo_v2 999")
        gpus.answer("answer = reading('cuda:0')", without=("nvml",))
        calls = gpus.calls()
        assert calls[calls.index("cuDevicePrimaryCtxRetain") :] == [
            "cuDevicePrimaryCtxRetain",
            "cuCtxPushCurrent_v2",
            "cuMemGetInfo_v2",
            "cuCtxPopCurrent_v2",
            "cuDevicePrimaryCtxRelease_v2",
        ]

    def test_without_a_context_everything_is_taken_for_free(
        self, gpus: FakeGpus
    ) -> None:
        """
        Only the total is known then, and the source says so.
        """
        gpus.set_state(ONE_CARD)
        answer = gpus.answer("answer = reading('cuda:0')", without=("nvml",))
        assert answer == [8 * GIB, 8 * GIB, "cuda driver (total only)"]

    def test_a_card_that_nvml_does_not_know_is_read_by_the_driver(
        self, gpus: FakeGpus
    ) -> None:
        """
        Neither UUID nor slot leads to it: the CUDA driver answers.
        """
        gpus.set_state(
            f"""
            {ONE_CARD}
            fail nvmlDeviceGetHandleByUUID 6
            fail nvmlDeviceGetHandleByPciBusId_v2 6
            """
        )
        answer = gpus.answer("answer = reading('cuda:0')")
        assert answer == [8 * GIB, 8 * GIB, "cuda driver (total only)"]

    def test_a_missing_binding_is_no_error(self, gpus: FakeGpus) -> None:
        """
        Without nvidia-ml-py readings fall back, and the doctor is told what to install.
        """
        gpus.set_state(ONE_CARD)
        answer = gpus.answer(
            """
            import sys
            sys.modules["pynvml"] = None
            version = nvml.driver_version()
            answer = [reading("cuda:0")[2], nvml.nvml_problem(), version]
            """
        )
        assert answer == [
            "cuda driver (total only)",
            "nvidia-ml-py is missing: pip install nvidia-ml-py",
            None,
        ]

    def test_an_integrated_gpu_is_read_as_the_host(self, gpus: FakeGpus) -> None:
        """
        A GPU without memory of its own has what the host has, up to its own total.
        """
        gpus.set_state(f"{ONE_CARD}\nactive 0\nintegrated 0")
        answer = gpus.answer(
            f"""
            import psutil, types
            host = types.SimpleNamespace(total={16 * GIB}, available={5 * GIB})
            psutil.virtual_memory = lambda: host
            first = reading("cuda:0")
            host.available = {12 * GIB}
            answer = [first, reading("cuda:0")]
            """
        )
        assert answer == [
            [8 * GIB, 5 * GIB, "psutil"],
            [8 * GIB, 8 * GIB, "psutil"],
        ]


@needs_linux
class TestNoGpu:
    """
    A machine without NVIDIA driver is not bothered with that.
    """

    def test_nothing_fails_and_nothing_warns(self, gpus: FakeGpus) -> None:
        """
        No GPUs are found, silently, and the host is read as ever.
        """
        answer = gpus.answer(
            """
            import logging
            logging.basicConfig(level=logging.DEBUG)
            host = probe.read("cpu")
            devices = [probe.cuda_devices(), probe.cuda_devices()]
            answer = [*devices, host.free_bytes > 0, nvml.driver_version()]
            """,
            without=("cuda", "nvml"),
        )
        assert answer == [[], [], True, None]

    def test_asking_for_a_gpu_names_the_driver_that_is_missing(
        self, gpus: FakeGpus
    ) -> None:
        """
        The error says which library was looked for, and what to do.
        """
        answer = gpus.answer("answer = reading('cuda:0')", without=("cuda", "nvml"))
        assert "no NVIDIA driver: libcuda.so.1 cannot be loaded" in str(answer)
        assert "device='cpu'" in str(answer)
        assert "\n" not in str(answer)

    def test_whoever_asks_for_no_gpu_initialises_none(self, gpus: FakeGpus) -> None:
        """
        Reading the host on a machine with GPUs calls no driver and loads no binding.
        """
        gpus.set_state(ONE_CARD)
        answer = gpus.answer(
            """
            import sys
            from whispercache.devices import host
            probe.read("cpu"), probe.device_name("cpu"), host.anonymous_bytes()
            answer = "pynvml" in sys.modules
            """
        )
        assert answer is False
        assert gpus.calls() == []

    def test_an_unknown_kind_of_device_is_refused(self) -> None:
        """
        Neither the processor nor a GPU by number: the error says what could be.
        """
        probe = SystemProbe()
        with pytest.raises(
            DeviceUnavailable, match=r"use 'cpu' or for example 'cuda:0'"
        ):
            probe.read("mps")
        with pytest.raises(DeviceUnavailable, match=r"no such kind of device"):
            probe.device_name("cuda:-1")


def _no_library(name: str) -> object:
    message = f"{name}: cannot open shared object file"
    raise OSError(message)


class FakeHost:
    """
    A folder with the files of /proc and /sys that tell of control groups.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: object) -> None:
        """
        Put *text* into the file at *path*, which is as under ``/``.
        """
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def read(self) -> tuple[int, int, str]:
        """
        Total, free and source, as the probe reads them.
        """
        reading = SystemProbe(self.root).read("cpu")
        return reading.total_bytes, reading.free_bytes, reading.source


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    """
    A host with 16 GiB, 10 of them available, and no control groups yet.
    """
    found = SimpleNamespace(total=16 * GIB, available=10 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)
    return FakeHost(tmp_path)


class TestHost:
    """
    The host's memory, which in a container is its control group's.
    """

    def test_without_control_groups_the_machine_counts(self, machine: FakeHost) -> None:
        """
        No files at all, as on macOS and Windows: psutil's figures.
        """
        assert machine.read() == (16 * GIB, 10 * GIB, "psutil")

    def test_a_version_2_limit_counts_with_the_file_cache_left_out(
        self, machine: FakeHost
    ) -> None:
        """
        Free is the limit less what is held, and cached file pages are not held.
        """
        machine.write("proc/self/cgroup", "0::/")
        machine.write("sys/fs/cgroup/memory.max", 4 * GIB)
        machine.write("sys/fs/cgroup/memory.current", 3 * GIB)
        machine.write(
            "sys/fs/cgroup/memory.stat",
            f"anon 5\ninactive_file {2 * GIB}\nactive_file 7",
        )
        assert machine.read() == (4 * GIB, 3 * GIB, "cgroup")

    def test_the_tightest_of_nested_groups_counts(self, machine: FakeHost) -> None:
        """
        The pod has less left than the container in it, so the pod's is what is free.
        """
        machine.write("proc/self/cgroup", "0::/pod/container")
        machine.write("sys/fs/cgroup/pod/memory.max", 6 * GIB)
        machine.write("sys/fs/cgroup/pod/memory.current", 5 * GIB)
        machine.write("sys/fs/cgroup/pod/container/memory.max", 3 * GIB)
        machine.write("sys/fs/cgroup/pod/container/memory.current", 1 * GIB)
        assert machine.read() == (3 * GIB, 1 * GIB, "cgroup")

    def test_a_throttling_limit_counts_too(self, machine: FakeHost) -> None:
        """
        memory.high below memory.max is where the process would begin to crawl.
        """
        machine.write("proc/self/cgroup", "0::/")
        machine.write("sys/fs/cgroup/memory.max", 4 * GIB)
        machine.write("sys/fs/cgroup/memory.high", 2 * GIB)
        assert machine.read() == (2 * GIB, 2 * GIB, "cgroup")

    def test_max_is_no_limit(self, machine: FakeHost) -> None:
        """
        A group without a limit leaves the machine's figures.
        """
        machine.write("proc/self/cgroup", "0::/user")
        machine.write("sys/fs/cgroup/user/memory.max", "max")
        machine.write("sys/fs/cgroup/user/memory.current", 9 * GIB)
        assert machine.read() == (16 * GIB, 10 * GIB, "psutil")

    def test_the_machine_counts_where_it_has_less_than_the_limit_leaves(
        self, machine: FakeHost
    ) -> None:
        """
        The limit leaves 12 GiB, but other programs have left only 10.
        """
        machine.write("proc/self/cgroup", "0::/")
        machine.write("sys/fs/cgroup/memory.max", 12 * GIB)
        assert machine.read() == (12 * GIB, 10 * GIB, "psutil")

    def test_a_group_above_its_limit_has_nothing_free(self, machine: FakeHost) -> None:
        """
        Free bytes are never negative.
        """
        machine.write("proc/self/cgroup", "0::/")
        machine.write("sys/fs/cgroup/memory.max", 1 * GIB)
        machine.write("sys/fs/cgroup/memory.current", 2 * GIB)
        assert machine.read() == (1 * GIB, 0, "cgroup")

    def test_version_1_limits_count(self, machine: FakeHost) -> None:
        """
        The older files are found where mountinfo says, among unrelated mounts.
        """
        machine.write(
            "proc/self/mountinfo",
            "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
            "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
            "35 31 0:32 / /groups/ram rw shared:9 - cgroup cgroup rw,memory\n"
            "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
        )
        machine.write(
            "proc/self/cgroup", "9:name=systemd:/\n4:cpu:/x\n3:memory:/job\n0::/"
        )
        machine.write("groups/ram/job/memory.limit_in_bytes", 2 * GIB)
        machine.write("groups/ram/job/memory.usage_in_bytes", 1 * GIB)
        machine.write("groups/ram/job/memory.stat", f"total_inactive_file {512 * MIB}")
        machine.write("groups/ram/memory.limit_in_bytes", 2**63 - 4096)
        assert machine.read() == (2 * GIB, 1536 * MIB, "cgroup")

    def test_a_container_that_sees_only_its_own_group_is_bound_by_it(
        self, machine: FakeHost
    ) -> None:
        """
        The group's name is the host's, but it is mounted as if it were the root.
        """
        machine.write(
            "proc/self/mountinfo",
            "35 31 0:32 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup rw",
        )
        machine.write("proc/self/cgroup", "0::/docker/abc/inner")
        machine.write("sys/fs/cgroup/memory.max", 5 * GIB)
        machine.write("sys/fs/cgroup/inner/memory.max", 1 * GIB)
        assert machine.read() == (1 * GIB, 1 * GIB, "cgroup")

    def test_a_group_outside_of_the_mount_leaves_the_mount(
        self, machine: FakeHost
    ) -> None:
        """
        A path that cannot be followed still ends at the group that can be seen.
        """
        machine.write("proc/self/cgroup", "0::/../../elsewhere")
        machine.write("sys/fs/cgroup/memory.max", 3 * GIB)
        assert machine.read() == (3 * GIB, 3 * GIB, "cgroup")

    def test_the_real_machine_is_read(self) -> None:
        """
        Here and now there is some memory, and not more is free than there is.
        """
        reading = SystemProbe().read("cpu")
        assert 0 < reading.free_bytes <= reading.total_bytes
        assert reading.source in {"psutil", "cgroup"}

    def test_the_processor_has_a_name(self, machine: FakeHost) -> None:
        """
        The model where Linux tells it, else at least something.
        """
        assert SystemProbe(machine.root).device_name("cpu") != ""
        machine.write("proc/cpuinfo", "processor : 0\nmodel name\t: Zeta 9000 @ 3GHz")
        assert SystemProbe(machine.root).device_name("cpu") == "Zeta 9000 @ 3GHz"


class TestProcess:
    """
    What this process holds, and how it gives memory back.
    """

    def test_anonymous_bytes_grow_with_what_is_allocated(self) -> None:
        """
        64 MiB written to are 64 MiB more, give or take 16.
        """
        before = host.anonymous_bytes()
        # Not from the heap, which may have room left by other tests.
        with mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
            for start in range(0, len(block), MIB):
                block[start : start + MIB] = b"x" * MIB
            after = host.anonymous_bytes()
        assert before is not None
        assert after is not None
        assert abs(after - before - 64 * MIB) < 16 * MIB

    def test_the_resident_set_serves_where_the_kernel_does_not_tell(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Elsewhere than on Linux psutil answers, and None means that nobody can.
        """
        monkeypatch.setattr(host, "_text", lambda _: "")
        rss = psutil.Process().memory_info().rss
        found = host.anonymous_bytes()
        assert found is not None
        assert abs(found - rss) < 64 * MIB

        def refuse(_: object = None) -> object:
            raise psutil.AccessDenied

        monkeypatch.setattr(psutil, "Process", refuse)
        assert host.anonymous_bytes() is None

    @pytest.mark.skipif(
        host._malloc_trim() is None,
        reason="only glibc keeps freed memory that it can be asked for",
    )
    def test_freed_memory_returns_to_the_system(self) -> None:
        """
        64 MiB of freed small blocks stay with the process until they are asked back.
        """
        child = run_child(
            """
            from whispercache.devices.host import anonymous_bytes, return_free_memory

            start = anonymous_bytes()
            blocks = [bytes(1000) + bytes([n % 256]) for n in range(64_000)]
            full = anonymous_bytes()
            # The last block lies at the top of the heap and keeps it from shrinking.
            del blocks[:-1]
            freed = anonymous_bytes()
            return_free_memory()
            print(full - start, full - freed, full - anonymous_bytes())
            """
        )
        assert (child.returncode, child.stderr) == (0, "")
        taken, freed, returned = map(int, child.stdout.split())
        assert taken > 60 * MIB
        assert freed < taken / 4
        assert returned > taken * 3 / 4

    def test_without_glibc_nothing_happens(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Where there is no such function, or no such library, the call does nothing.
        """
        host._malloc_trim.cache_clear()
        monkeypatch.setattr(ctypes, "CDLL", _no_library)
        host.return_free_memory()
        monkeypatch.undo()
        host._malloc_trim.cache_clear()


@pytest.mark.parametrize(
    ("device", "total_bytes", "expected_bytes"),
    [
        ("cpu", 1 * GIB, 256 * MIB),
        ("cpu", 20 * GIB, 1 * GIB),
        ("cpu", 512 * GIB, 2 * GIB),
        ("cuda:0", 8 * GIB, 512 * MIB),
        ("cuda:1", 80 * GIB, 512 * MIB),
    ],
)
def test_headroom_is_a_bounded_share_of_the_host_and_a_fixed_part_of_a_card(
    device: str, total_bytes: int, expected_bytes: int
) -> None:
    """
    5 % of the host within 256 MiB and 2 GiB; 512 MiB of any GPU.
    """
    assert memory.headroom_bytes(device, total_bytes) == expected_bytes
