"""
Platforms where NVML, memory pools or the CUDA driver itself cannot tell all: the whole
cache, in children, over fake drivers and CTranslate2's stand-in.

On each, a model is loaded, transcribes, leaves, and its leaving is verified by whatever
there is to verify it by.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes import (
    CARD_A,
    GIB,
    MIB,
    ONE_CARD,
    SLOT_A,
    UUID_A,
    UUID_B,
    FakeGpus,
    build_library,
    needs_linux,
)
from micro import build_micro
from real import TEXT, micro
from standin import OUT_OF_MEMORY, run_on_cards

from whispercache.engine.sizes.footprint import estimate
from whispercache.engine.sizes.header import read_header

pytestmark = [needs_linux, pytest.mark.process]

_NOT_SUPPORTED, _DRIVER_NOT_LOADED, _NOT_FOUND = 3, 9, 6  # of NVML
_FLOOR_BYTES = (200 + 64) * MIB  # the stand-in's context and kernels
_TOTAL_ONLY = "cuda driver (total only)"
# Of which a desktop holds so little that it could be taken for a CUDA context.
_DESKTOP = f"card {UUID_A} {SLOT_A} {8 * GIB} {300 * MIB} Alpha\nvisible 0"

_PROLOGUE = """
from standin.child import *
from whispercache import events
from whispercache.core import loads
from whispercache.devices import release
from whispercache.errors import LoadFailed
MODEL = os.environ["MODEL"]
release.RETURN_WAIT_S = 0.02
loads.SLOW_WARM_UP_S = 60.0  # a busy machine gives no warning here
answer = {}
"""

_LIFE = """
with open_cache() as cache:
    answer["before"] = reading("cuda:0")
    answer["text"] = say(cache)
    answer["loaded"] = reading("cuda:0")
    answer["charged"] = info(cache).charged_bytes
    cache.evict(MODEL)
    settle(cache), check(cache)
    answer["after"] = reading("cuda:0")
    came, went = last(events.ModelLoaded), last(events.ModelEvicted)
    answer["measured"] = came.measured_bytes
    answer["returned"] = [went.returned_bytes, went.unreturned_bytes]
    answer["floor"] = info(cache).floor_bytes
    answer["left"] = info(cache).charged_bytes
    answer["again"] = say(cache)
answer["warned"] = WARNED
answer["used"] = standin.books().used
"""


def _run(gpus: FakeGpus, code: str = _LIFE, **options: Any) -> dict[str, Any]:
    """
    What *code* put into ``answer``, run in a child: by default a model's whole life.
    """
    options = {"MODEL": str(micro()), **options}
    answer = run_on_cards(gpus, _PROLOGUE + code, **options)
    assert isinstance(answer, dict)
    return answer


def _predicted_bytes() -> int:
    return estimate(read_header(micro()), "float16", "cuda:0").weights_bytes


def _assert_lived(answer: dict[str, Any]) -> None:
    """
    It answered, was charged what was predicted, and all of it was given up.
    """
    assert (answer["text"], answer["again"]) == (TEXT, TEXT)
    assert answer["charged"] == _predicted_bytes()
    assert answer["left"] == 0
    assert answer["used"] == 0


def _assert_verified(answer: dict[str, Any]) -> None:
    """
    It lived, and the pool told every byte of its coming and going.
    """
    _assert_lived(answer)
    assert answer["measured"] == _predicted_bytes()
    assert answer["returned"] == [_predicted_bytes(), 0]
    assert answer["warned"] == []


@pytest.mark.parametrize("without", [(), ("nvml",)])
def test_wsl2_where_nvml_does_not_start(
    gpus: FakeGpus, without: tuple[str, ...]
) -> None:
    """
    WSL2: CUDA works, and NVML fails to start or is not there at all. Before the first
    model only the card's total is known, so what others hold is not taken for the
    floor; after it, CUDA itself is the gauge, and the pool verifies.
    """
    gpus.set_state(f"{_DESKTOP}\nfail nvmlInitWithFlags {_DRIVER_NOT_LOADED}")
    answer = _run(gpus, without=without)
    _assert_verified(answer)
    assert answer["before"] == [8 * GIB, 8 * GIB, _TOTAL_ONLY]
    free_bytes = 8 * GIB - 300 * MIB - _FLOOR_BYTES
    assert answer["after"] == [8 * GIB, free_bytes, "cuda driver"]
    assert answer["floor"] is None


def test_wsl2_where_nvml_knows_no_uuid(gpus: FakeGpus) -> None:
    """
    WSL2: NVML runs, but does not find a card by its UUID. Its slot leads to it.
    """
    gpus.set_state(f"{_DESKTOP}\nfail nvmlDeviceGetHandleByUUID {_NOT_FOUND}")
    answer = _run(gpus)
    _assert_verified(answer)
    assert answer["after"] == [8 * GIB, 8 * GIB - 300 * MIB - _FLOOR_BYTES, "nvml"]
    assert answer["floor"] == _FLOOR_BYTES


def test_wsl2_where_nvml_knows_no_card(gpus: FakeGpus) -> None:
    """
    WSL2: NVML runs, and finds the card neither by its UUID nor by its slot.
    """
    gpus.set_state(
        f"{_DESKTOP}\n"
        f"fail nvmlDeviceGetHandleByUUID {_NOT_FOUND}\n"
        f"fail nvmlDeviceGetHandleByPciBusId_v2 {_NOT_FOUND}"
    )
    answer = _run(gpus)
    _assert_verified(answer)
    assert answer["before"][2] == _TOTAL_ONLY
    assert answer["after"][2] == "cuda driver"


def test_an_integrated_gpu(gpus: FakeGpus) -> None:
    """
    Jetson, GB10: the GPU shares the host's memory, and NVML does not support the
    question for it. The host is the gauge, the pool verifies.
    """
    gpus.set_state(
        f"{ONE_CARD}\nintegrated 0\nfail nvmlDeviceGetMemoryInfo {_NOT_SUPPORTED}"
    )
    answer = _run(
        gpus,
        f"""
import psutil, types

def host():
    books = standin.books()
    taken = books.context + books.reserved
    return types.SimpleNamespace(total={16 * GIB}, available={5 * GIB} - taken)

psutil.virtual_memory = host
{_LIFE}
""",
    )
    _assert_verified(answer)
    assert answer["before"] == [8 * GIB, 5 * GIB, "psutil"]
    assert answer["after"] == [8 * GIB, 5 * GIB - _FLOOR_BYTES, "psutil"]
    assert answer["floor"] == _FLOOR_BYTES


def test_a_card_whose_memory_nvml_does_not_tell(gpus: FakeGpus) -> None:
    """
    A card of its own memory for which NVML says "not supported", as some drivers for
    embedded boards do: CUDA is the gauge.
    """
    gpus.set_state(f"{_DESKTOP}\nfail nvmlDeviceGetMemoryInfo {_NOT_SUPPORTED}")
    answer = _run(gpus)
    _assert_verified(answer)
    assert answer["before"][2] == _TOTAL_ONLY
    assert answer["after"][2] == "cuda driver"
    assert answer["floor"] is None


def test_a_mig_slice(gpus: FakeGpus) -> None:
    """
    MIG: the process sees a slice of an 80 GiB card, which has a UUID of its own. Its
    memory, not the card's, is what models may take.
    """
    slice_uuid = UUID_B.replace("GPU-", "MIG-")
    gpus.set_state(
        f"""
        card {UUID_A} {SLOT_A} {80 * GIB} {60 * GIB} Whole
        card {slice_uuid} {SLOT_A} {10 * GIB} {2 * GIB} Slice
        visible 1
        """
    )
    answer = _run(gpus)
    _assert_verified(answer)
    assert answer["before"] == [10 * GIB, 8 * GIB, "nvml"]
    assert answer["after"] == [10 * GIB, 8 * GIB - _FLOOR_BYTES, "nvml"]
    assert answer["floor"] == _FLOOR_BYTES


def test_a_container_with_other_pids(gpus: FakeGpus) -> None:
    """
    A container: NVML's list of processes has the host's pids, or none. Nobody asks for
    it, whatever is loaded, measured or shown.
    """
    gpus.set_state(ONE_CARD)
    answer = _run(gpus, f"{_LIFE}\nrepr(cache), cache.stats(), cache.models()")
    _assert_verified(answer)
    assert "nvmlDeviceGetMemoryInfo" in gpus.calls()
    assert not [call for call in gpus.calls() if "Process" in call]


def test_a_machine_without_the_binding_of_nvml(gpus: FakeGpus) -> None:
    """
    nvidia-ml-py is not installed: all goes on by the CUDA driver alone.
    """
    gpus.set_state(_DESKTOP)
    answer = _run(gpus, f"import sys\nsys.modules['pynvml'] = None\n{_LIFE}")
    _assert_verified(answer)
    assert answer["before"][2] == _TOTAL_ONLY
    assert answer["after"][2] == "cuda driver"
    assert not [call for call in gpus.calls() if call.startswith("nvml")]


def _assert_waited(gpus: FakeGpus) -> None:
    """
    The card was waited for after the first model that left had been dropped.
    """
    calls = gpus.calls()
    leaving = calls[calls.index("told:ModelLoaded") : calls.index("told:ModelEvicted")]
    assert "cuCtxSynchronize" in leaving[leaving.index("model:drop") :]


_WITHOUT_POOLS = {"allocator": "cub_caching", "handles_bytes": 0}


def test_a_card_without_memory_pools(gpus: FakeGpus, tmp_path: Path) -> None:
    """
    VGPU and some virtual machines: no memory pools, so CTranslate2 caches freed memory
    itself. The gauge shows what the first load took, and that nothing came back: after
    a bounded wait that stays charged, and the next load does not add to it.
    """
    gpus.set_state(f"{ONE_CARD}\nnopools 0")
    model = build_micro(tmp_path / "wide", d_model=160)
    answer = _run(
        gpus,
        """
with open_cache() as cache:
    answer["charged"] = []
    for _ in "123":
        cache.preload(MODEL, "cuda", "float16")
        cache.evict(MODEL)
        settle(cache), check(cache)
        answer["charged"].append(info(cache).charged_bytes)
    went = all_of(events.ModelEvicted)
    answer["told"] = [[each.returned_bytes, each.unreturned_bytes] for each in went]
    answer["measured"] = [each.measured_bytes for each in all_of(events.ModelLoaded)]
    answer["slowest_s"] = max(each.unload_s for each in went)
    answer["text"] = say(cache)
""",
        conduct={**_WITHOUT_POOLS, "work_bytes": 0},
        MODEL=str(model),
    )
    measured_bytes = answer["measured"][0]
    assert measured_bytes > 0
    assert answer["told"][0] == [0, measured_bytes]
    assert max(answer["charged"]) == measured_bytes
    assert answer["slowest_s"] < 1
    assert answer["text"] == " hello world"
    assert "cuMemPoolTrimTo" not in gpus.calls()
    _assert_waited(gpus)


@pytest.mark.parametrize("is_missing", [False, True])
def test_a_driver_from_before_memory_pools(
    gpus: FakeGpus, tmp_path: Path, *, is_missing: bool
) -> None:
    """
    A driver older than CUDA 11.2: it refuses the calls for pools as not supported, or
    does not even have them. The card is still waited for, and the gauge is believed.
    """
    gpus.set_state(f"{ONE_CARD}\nfail cuDeviceGetMemPool 801")
    if is_missing:
        gpus = _with_old_driver(gpus, tmp_path)
    answer = _run(gpus, conduct=_WITHOUT_POOLS)
    _assert_lived(answer)
    assert answer["floor"] is not None
    _assert_waited(gpus)


def _with_old_driver(gpus: FakeGpus, folder: Path) -> FakeGpus:
    """
    The same machine, with a CUDA driver that lacks the functions for pools.
    """
    source = folder / "old_cuda.c"
    here = gpus.drivers / "nvml" / "libnvidia-ml.so.1"
    fakes = Path(__file__).parents[1] / "support" / "fakes" / "fake_cuda.c"
    names = ("cuDeviceGetMemPool", "cuMemPoolTrimTo")
    hidden = "".join(f"#define {name} old_{name}\n" for name in names)
    source.write_text(f'{hidden}#include "{fakes}"\n')
    drivers = folder / "old"
    build_library(drivers / "cuda" / "libcuda.so.1", source)
    (drivers / "nvml").mkdir()
    (drivers / "nvml" / here.name).symlink_to(here)
    return FakeGpus(gpus.folder, drivers)


def test_a_full_card_of_which_only_the_total_is_known(gpus: FakeGpus) -> None:
    """
    No NVML and no context yet, on a card that others have filled: everything is taken
    for free, so CUDA's own refusal is what tells, in a few words. Once the others have
    left, the same process loads, and from then on knows what is free.
    """
    full = CARD_A.replace(f" {1 * GIB} ", f" {8 * GIB - 100 * MIB} ")
    gpus.set_state(f"{full}\nvisible 0")
    answer = _run(
        gpus,
        """
with open_cache() as cache:
    try:
        say(cache)
    except LoadFailed as error:
        answer["error"] = str(error)
    settle(cache), check(cache)
    answer["left"] = info(cache).charged_bytes
    answer["before"] = reading("cuda:0")
    others_take(0)
    answer["text"] = say(cache)
    answer["after"] = reading("cuda:0")
""",
        without=("nvml",),
    )
    assert OUT_OF_MEMORY in answer["error"]
    assert answer["left"] == 0
    assert answer["before"][2] == _TOTAL_ONLY
    assert answer["text"] == TEXT
    assert answer["after"][2] == "cuda driver"


def test_a_card_without_any_driver_of_nvidia(gpus: FakeGpus) -> None:
    """
    ROCm: CTranslate2 sees a card that neither NVIDIA's driver nor NVML knows. Its
    memory is unknown, so that a limit has to be given; then models work there. Nothing
    is measured, and no call to any library of NVIDIA is made.
    """
    gpus.set_state(ONE_CARD)
    answer = _run(
        gpus,
        """
with open_cache(vram="4GiB") as cache:
    answer["before"] = reading("cuda:0")
    answer["text"] = say(cache)
    answer["charged"] = info(cache).charged_bytes
    cache.evict(MODEL)
    settle(cache), check(cache)
    came, went = last(events.ModelLoaded), last(events.ModelEvicted)
    answer["seen"] = [came.measured_bytes, went.returned_bytes, info(cache).floor_bytes]
    answer["unreturned"] = went.unreturned_bytes
    answer["left"] = info(cache).charged_bytes
    answer["again"] = say(cache)
answer["used"] = standin.books().used
""",
        without=("cuda", "nvml"),
    )
    _assert_lived(answer)
    assert "no NVIDIA driver" in answer["before"]
    assert answer["seen"] == [None, None, None]
    assert answer["unreturned"] == 0
    assert all(call.startswith(("model:", "told:")) for call in gpus.calls())


def test_a_card_of_unknown_memory_needs_a_limit(gpus: FakeGpus) -> None:
    """
    ROCm without a limit: the request fails at once, with the reason, and hangs nowhere;
    the CPU goes on.
    """
    gpus.set_state(ONE_CARD)
    answer = _run(
        gpus,
        """
from whispercache.errors import DeviceUnavailable
with open_cache() as cache:
    try:
        say(cache)
    except DeviceUnavailable as error:
        answer["error"] = str(error)
    answer["text"] = say(cache, device="cpu", compute_type="float32")
    settle(cache), check(cache)
""",
        without=("cuda", "nvml"),
    )
    assert "'cuda:0' cannot be used: no NVIDIA driver" in answer["error"]
    assert answer["text"] == TEXT
