"""
The whole way to a card and back: a cache, its usual loader, faster-whisper and the real
bindings, in children, over fake drivers and CTranslate2's stand-in.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from fakes import GIB, MIB, ONE_CARD, TWO_CARDS_SWAPPED, FakeGpus, needs_linux
from micro import build_micro
from real import TEXT, micro, micro_copy
from standin import ILLEGAL_ACCESS, OUT_OF_MEMORY, run_on_cards

from whispercache.engine.sizes.footprint import HEAP_SLACK, estimate
from whispercache.engine.sizes.header import read_header

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [needs_linux, pytest.mark.process]

_FLOOR_BYTES = (200 + 64) * MIB  # the stand-in's context and kernels

_PROLOGUE = """
from standin.child import *
import threading
from whispercache import events
from whispercache.devices import release
from whispercache.errors import DeviceUnavailable, LoadFailed
MODEL, OTHER = os.environ.get("MODEL"), os.environ.get("OTHER")
answer = {}
"""


def _run(gpus: FakeGpus, code: str, **options: Any) -> dict[str, Any]:
    """
    What *code* put into ``answer``, run in a child.
    """
    options = {"MODEL": str(micro()), "OTHER": str(micro("other words")), **options}
    answer = run_on_cards(gpus, _PROLOGUE + code, **options)
    assert isinstance(answer, dict)
    return answer


def _predicted_bytes(compute_type: str = "float16") -> int:
    return estimate(read_header(micro()), compute_type, "cuda:0").weights_bytes


_STEPS = {
    "cuCtxSynchronize": "synchronise",
    "cuMemPoolTrimTo": "trim",
    "cuMemPoolGetAttribute": "read",
    "nvmlDeviceGetMemoryInfo": "read",
}


def _steps(calls: list[str], first: str, after: str) -> list[str]:
    """
    What happened between two words of the log, equal neighbours as one.
    """
    between = calls[calls.index(first) + 1 : calls.index(after)]
    steps = [_STEPS.get(call, call) for call in between]
    wanted = [s for s in steps if ":" in s or s in _STEPS.values()]
    return [step for step, _ in itertools.groupby(wanted)]


class TestSteps:
    """
    A model comes to a card and leaves it, step by step.
    """

    def test_a_model_comes_and_goes_in_steps_on_the_devices_thread(
        self, gpus: FakeGpus
    ) -> None:
        """
        Load: build, warm up, synchronise, measure, publish. Leave: unload, drop,
        synchronise, trim, measure, credit. No other thread does any of it, and all
        bytes of the model are back, to the byte; the floor stays, and is told.
        """
        gpus.set_state(ONE_CARD)
        answer = _run(
            gpus,
            """
with open_cache() as cache:
    cache.preload(MODEL, "cuda", "float16")
    wait_until(lambda: all_of(events.ModelLoaded))
    loaded = standin.books()
    answer["loaded"] = [loaded.used, loaded.reserved]
    answer["text"] = say(cache)
    settle(cache)
    log("evict")
    cache.evict(MODEL)
    wait_until(lambda: all_of(events.ModelEvicted))
    settle(cache), check(cache)
    gone = standin.books()
    answer["gone"] = [gone.context, gone.used, gone.reserved]
    answer["shown"] = reading("cuda:0")
    answer["charged"] = info(cache).charged_bytes
    answer["floor"] = [info(cache).floor_bytes, last(events.DeviceWarmedUp).floor_bytes]
    came, went = last(events.ModelLoaded), last(events.ModelEvicted)
    answer["came"] = [came.measured_bytes, came.charged_bytes]
    answer["went"] = [
        went.predicted_bytes, went.returned_bytes, went.unreturned_bytes,
        went.credited_bytes,
    ]
own = ("build", "load", "unload", "drop")
answer["threads"] = sorted({thread for call, thread in standin.CALLS if call in own})
answer["warned"] = WARNED
""",
        )
        predicted_bytes = _predicted_bytes()
        assert answer["text"] == TEXT
        assert answer["loaded"][0] == predicted_bytes
        assert answer["came"] == [predicted_bytes, predicted_bytes]
        assert answer["went"] == [predicted_bytes, predicted_bytes, 0, predicted_bytes]
        assert answer["gone"] == [_FLOOR_BYTES, 0, 0]
        assert answer["floor"] == [_FLOOR_BYTES, _FLOOR_BYTES]
        assert answer["shown"] == [8 * GIB, 7 * GIB - _FLOOR_BYTES, "nvml"]
        assert answer["charged"] == 0
        assert answer["threads"] == ["whispercache-cuda:0"]
        assert answer["warned"] == []
        calls = gpus.calls()
        assert _steps(calls, "told:DeviceWarmedUp", "told:ModelLoaded") == [
            *("read", "model:build", "model:encode", "model:generate"),
            *("synchronise", "read"),
        ]
        assert _steps(calls, "evict", "told:ModelEvicted") == [
            *("synchronise", "trim", "read", "model:unload", "model:drop"),
            *("synchronise", "trim", "read"),
        ]

    def test_what_other_programs_do_meanwhile_misleads_nobody(
        self, gpus: FakeGpus
    ) -> None:
        """
        At the very moment of the load another process takes 2 GiB, or gives back what
        it had; likewise at that of the release. Measured and returned bytes stay those
        of the model, in both orders.
        """
        gpus.set_state(ONE_CARD)
        answer = _run(
            gpus,
            """
from standin.card import CardMemory

take, give_back = CardMemory.take, CardMemory.give_back
loading = unloading = None

def take_beside(self, n_bytes):
    if loading is not None:
        others_take(loading)
    take(self, n_bytes)

def give_back_beside(self, n_bytes):
    give_back(self, n_bytes)
    if unloading is not None:
        others_take(unloading)

CardMemory.take, CardMemory.give_back = take_beside, give_back_beside
with open_cache() as cache:
    say(cache)
    cache.evict(MODEL)
    for gib in ((1, 3, 5), (4, 1, 2), (1, 3, 0), (3, 0, 6)):
        before, during_load, during_unload = (each * 2**30 for each in gib)
        others_take(before)
        loading = during_load
        cache.preload(MODEL, "cuda", "float16")
        settle(cache)
        loading, unloading = None, during_unload
        cache.evict(MODEL)
        settle(cache), check(cache)
        unloading = None
    answer = {
        "came": [each.measured_bytes for each in all_of(events.ModelLoaded)],
        "went": [
            [each.returned_bytes, each.unreturned_bytes]
            for each in all_of(events.ModelEvicted)
        ],
        "left": info(cache).unreturned_bytes,
    }
""",
        )
        predicted_bytes = _predicted_bytes()
        assert answer["came"] == [predicted_bytes] * 5
        assert answer["went"] == [[predicted_bytes, 0]] * 5
        assert answer["left"] == 0

    def test_what_another_library_had_the_pool_keep_comes_back(
        self, gpus: FakeGpus
    ) -> None:
        """
        PyTorch or CuPy in the same process has raised the release threshold: freed
        bytes stay in the pool until it is trimmed. An unload that does nothing at first
        is asked for again; one of whose bytes nothing comes back, since the trim fails,
        stays charged and is told, and is credited when a later reading shows it.
        """
        gpus.set_state(ONE_CARD)
        answer = _run(
            gpus,
            """
import ctypes
from standin.card import change_machine
from whispercache.devices.cuda import open_driver

with open_cache() as cache:
    say(cache)
    keep = ctypes.c_uint64(2**30)
    pool = ctypes.c_void_p()
    driver = open_driver()._library
    driver.cuDeviceGetMemPool(ctypes.byref(pool), 0)
    driver.cuMemPoolSetAttribute(pool, 4, ctypes.byref(keep))
    standin.behave(stubborn=3)
    cache.evict(MODEL)
    settle(cache), check(cache)
    kept = standin.books()
    answer["books"] = [kept.used, kept.reserved, kept.threshold]
    answer["refused"] = done("unload refused")
    answer["unconfirmed"] = cache.stats().unconfirmed
    went = last(events.ModelEvicted)
    answer["went"] = [went.returned_bytes, went.unreturned_bytes]

    standin.behave(stubborn=0)
    say(cache)
    change_machine(lambda lines: lines.append("fail cuMemPoolTrimTo 999"))
    cache.evict(MODEL)
    settle(cache), check(cache)
    went = last(events.ModelEvicted)
    answer["kept"] = [went.predicted_bytes, went.returned_bytes, went.unreturned_bytes]
    answer["charged"] = [info(cache).charged_bytes, info(cache).unreturned_bytes]
    answer["warned"] = list(WARNED)
    change_machine(lambda lines: lines.pop())
    say(cache)
    cache.evict(MODEL)
    settle(cache), check(cache)
    say(cache)
    answer["later"] = info(cache).unreturned_bytes
""",
        )
        predicted_bytes = _predicted_bytes()
        assert answer["books"] == [0, 0, 2**30]
        # The call before it may keep the model for a moment longer.
        assert len(answer["refused"]) >= 3
        assert answer["unconfirmed"] == 0
        assert answer["went"][0] >= predicted_bytes
        assert answer["went"][1] == 0
        assert answer["kept"] == [predicted_bytes, 0, predicted_bytes]
        assert answer["charged"] == [predicted_bytes, predicted_bytes]
        assert any("was not trimmed" in each for each in answer["warned"])
        assert answer["later"] == 0

    def test_what_an_unload_leaks_stays_charged(self, gpus: FakeGpus) -> None:
        """
        The pool still uses half of the model's bytes after it has left, and nobody else
        in the process took any: they are told as unreturned, and counted.
        """
        gpus.set_state(ONE_CARD)
        leaks_bytes = _predicted_bytes() // 2
        answer = _run(
            gpus,
            """
with open_cache() as cache:
    say(cache)
    standin.behave(leaks_bytes=int(os.environ["LEAKS"]))
    cache.evict(MODEL)
    settle(cache), check(cache)
    went = last(events.ModelEvicted)
    answer["went"] = [went.returned_bytes, went.unreturned_bytes]
    answer["charged"] = [info(cache).charged_bytes, info(cache).unreturned_bytes]
""",
            LEAKS=str(leaks_bytes),
        )
        returned_bytes = _predicted_bytes() - leaks_bytes
        assert answer["went"] == [returned_bytes, leaks_bytes]
        assert answer["charged"] == [leaks_bytes, leaks_bytes]

    def test_a_gauge_that_fails_after_an_unload_keeps_nothing(
        self, gpus: FakeGpus
    ) -> None:
        """
        The model is gone: a reading that cannot be had does not make that unconfirmed.
        """
        gpus.set_state(ONE_CARD)
        answer = _run(
            gpus,
            """
from whispercache.devices.probe import SystemProbe

class Probe(SystemProbe):
    def read(self, device):
        if device != "cpu" and is_used and done()[-1] == "drop":
            failed.append(device)
            raise OSError("the gauge is out of order")
        return super().read(device)

is_used, failed = False, []
with open_cache(probe=Probe()) as cache:
    say(cache)
    is_used = True
    cache.evict(MODEL)
    settle(cache)
    answer["failed"] = len(failed) > 0
    answer["models"] = len(cache.models())
    answer["unconfirmed"] = cache.stats().unconfirmed
""",
        )
        assert answer == {"failed": True, "models": 0, "unconfirmed": 0}

    def test_an_allocator_without_pool_is_judged_by_the_gauge(
        self, gpus: FakeGpus, tmp_path: Path
    ) -> None:
        """
        CT2_CUDA_ALLOCATOR=cub_caching keeps freed bytes for itself, so that nothing is
        seen to come back: that is told after a bounded wait, and in 10 cycles charges
        do not creep up.
        """
        gpus.set_state(ONE_CARD)
        answer = _run(
            gpus,
            """
release.RETURN_WAIT_S = 0.02
with open_cache() as cache:
    answer["charged"] = []
    for _ in range(10):
        cache.preload(MODEL, "cuda", "float16")
        cache.evict(MODEL)
        settle(cache), check(cache)
        answer["charged"].append(info(cache).charged_bytes)
    answer["measured"] = [each.measured_bytes for each in all_of(events.ModelLoaded)]
    answer["went"] = [
        [each.returned_bytes, each.unreturned_bytes]
        for each in all_of(events.ModelEvicted)
    ]
    answer["slowest_s"] = max(each.unload_s for each in all_of(events.ModelEvicted))
""",
            conduct={"allocator": "cub_caching", "handles_bytes": 0, "work_bytes": 0},
            MODEL=str(build_micro(tmp_path / "wide", d_model=160)),
        )
        measured_bytes = answer["measured"][0]
        header = read_header(tmp_path / "wide")
        predicted_bytes = estimate(header, "float16", "cuda:0").weights_bytes
        # The rest fits into what the primer left.
        assert 0 < measured_bytes < predicted_bytes
        assert answer["measured"][1:] == [0] * 9
        assert answer["went"] == [[0, measured_bytes], *[[0, 0]] * 9]
        assert answer["charged"] == [measured_bytes] * 10
        assert answer["slowest_s"] < 0.5

    def test_30_cycles_leave_nothing_behind(self, gpus: FakeGpus) -> None:
        """
        Neither on the card nor on the host, after the first few.
        """
        gpus.set_state(ONE_CARD)
        answer = _run(
            gpus,
            """
from whispercache.devices.host import anonymous_bytes

with open_cache() as cache:
    answer["host"], answer["card"] = [], []
    for _ in range(30):
        cache.preload(MODEL, "cuda", "float16")
        cache.evict(MODEL)
        settle(cache)
        books = standin.books()
        answer["card"].append([books.context, books.used, books.reserved])
        answer["host"].append(anonymous_bytes())
""",
        )
        assert answer["card"] == [[_FLOOR_BYTES, 0, 0]] * 30
        # What is allocated once, a heap for one more thread say, may come at any time.
        early, late = (
            answer["host"][end] - answer["host"][start]
            for start, end in ((5, 17), (17, 29))
        )
        assert min(early, late) < MIB


class TestWarmUp:
    """
    What a device does once is told, counts for no model, and shows what is missing.
    """

    def test_missing_cublas_is_told_before_weights_are_read(
        self, gpus: FakeGpus
    ) -> None:
        """
        The error has the line that mends it. Once it is installed, the same process
        needs no restart.
        """
        gpus.set_state(ONE_CARD)
        answer = _run(
            gpus,
            """
from whispercache.devices import cublas
cublas._packaged_folder = lambda: None
with open_cache() as cache:
    try:
        say(cache)
    except LoadFailed as error:
        answer["error"] = str(error)
    answer["before"] = done("build", "encode", "load")
    answer["books"] = standin.books().used
    check(cache)
    standin.behave(cublas="there")
    answer["text"] = say(cache)
""",
            conduct={"cublas": "missing"},
            without=("cublas",),
        )
        assert "pip install nvidia-cublas-cu12" in answer["error"]
        assert "\n" not in answer["error"]
        assert answer["before"] == ["build", "encode"]  # the primer's
        assert answer["books"] == 0
        assert answer["text"] == TEXT

    def test_the_floor_counts_what_a_warm_up_that_failed_took(
        self, gpus: FakeGpus
    ) -> None:
        """
        The context stays although cuBLAS was missing; the warm-up that succeeds later
        tells all that the process keeps.
        """
        gpus.set_state(ONE_CARD)
        answer = _run(
            gpus,
            """
with open_cache() as cache:
    try:
        say(cache)
    except LoadFailed:
        answer["context"] = standin.books().context
    standin.behave(cublas="there")
    say(cache)
    answer["floor"] = info(cache).floor_bytes
""",
            conduct={"cublas": "missing"},
            without=("cublas",),
        )
        assert answer["context"] == 200 * MIB
        assert answer["floor"] == _FLOOR_BYTES

    def test_without_a_temporary_directory_a_model_loads_all_the_same(
        self, gpus: FakeGpus
    ) -> None:
        """
        A container may have none that can be written; a warm-up is no must.
        """
        gpus.set_state(ONE_CARD)
        answer = _run(
            gpus,
            """
import tempfile
tempfile.tempdir = "/nowhere"
with open_cache() as cache:
    answer["text"] = say(cache)
    answer["warned"] = WARNED
""",
        )
        assert answer["text"] == TEXT
        assert any("warm" in each for each in answer["warned"])

    @pytest.mark.parametrize("capability", ["9 0", "8 9"])
    def test_compiling_for_a_new_card_is_told_while_it_happens(
        self, gpus: FakeGpus, capability: str
    ) -> None:
        """
        On Hopper the reason names sm_90 and where CUDA keeps what it compiles, a
        warning comes before it is over, and the load's seconds are without it. Ada runs
        the code that there is, so nothing of the kind is said.
        """
        gpus.set_state(f"{ONE_CARD}\ncapability 0 {capability}")
        answer = _run(
            gpus,
            """
from whispercache.core import loads
loads.SLOW_WARM_UP_S = 0.05
with open_cache() as cache:
    say(cache)
    answer["reason"] = last(events.DeviceWarmingUp).reason
    answer["warm_up_s"] = last(events.DeviceWarmedUp).warm_up_s
    answer["load_s"] = last(events.ModelLoaded).load_s
    answer["stats_s"] = cache.stats().load_s
    answer["warned"] = list(WARNED)
    say(cache, OTHER)
    say(cache, compute_type="int8_float16")
    answer["times"] = len(all_of(events.DeviceWarmingUp))
""",
            conduct={"jit_s": 1.5},
            CUDA_CACHE_PATH="/kernels/are/here",
        )
        assert answer["warm_up_s"] >= 1.5
        assert answer["load_s"] == answer["stats_s"] < 1.4
        assert len(answer["warned"]) == 1
        assert answer["reason"] in answer["warned"][0]
        assert answer["times"] == 2  # once for each compute type
        is_new = capability == "9 0"
        for word in ("sm_90", "/kernels/are/here", "compiles", "Alpha"):
            assert (word in answer["reason"]) is is_new

    def test_a_load_that_is_interrupted_goes_on_and_serves_the_next(
        self, gpus: FakeGpus
    ) -> None:
        """
        Ctrl-C ends the wait of the main thread, not the load on the device's.
        """
        gpus.set_state(ONE_CARD)
        answer = _run(
            gpus,
            """
import signal
from standin.whisper import CardWhisper

inside, go_on = threading.Event(), threading.Event()
take_weights = CardWhisper._take_weights

def slowly(self, n_bytes):
    take_weights(self, n_bytes)
    if len(done("build")) == 2:  # the primer's was the first
        inside.set()
        go_on.wait(10)

CardWhisper._take_weights = slowly

def interrupt():
    inside.wait(10)
    os.kill(os.getpid(), signal.SIGINT)

with open_cache() as cache:
    threading.Thread(target=interrupt).start()
    try:
        say(cache)
    except KeyboardInterrupt:
        answer["interrupted"] = True
    answer["waiting"] = len(cache.waiting())
    go_on.set()
    answer["text"] = say(cache)
    settle(cache), check(cache)
    answer["builds"] = len(done("build"))
    answer["loads"] = cache.stats().loads
answer["used"] = standin.books().used
""",
        )
        assert answer == {
            "interrupted": True,
            "waiting": 0,
            "text": TEXT,
            "builds": 2,
            "loads": 1,
            "used": 0,
        }


class TestErrors:
    """
    What goes wrong on a card.
    """

    def test_a_load_without_memory_sends_idle_models_away_and_is_tried_again(
        self, gpus: FakeGpus
    ) -> None:
        """
        The gauge promised room and the card had none: what is idle leaves, and the
        second try succeeds. Where nothing is idle the error says so, and nothing of the
        half-built model stays.
        """
        gpus.set_state(ONE_CARD)
        answer = _run(
            gpus,
            """
with open_cache() as cache:
    say(cache)
    standin.starve_next_load()
    answer["text"] = say(cache, OTHER)
    settle(cache), check(cache)
    answer["cause"] = last(events.ModelEvicted).cause.value
    answer["models"] = len(cache.models())
    answer["failures"] = cache.stats().load_failures
    answer["used"] = standin.books().used
    cache.evict()
    standin.behave(out_of_memory_at=tuple(range(100)))
    try:
        say(cache)
    except LoadFailed as error:
        answer["error"] = str(error)
    settle(cache), check(cache)
    answer["after"] = standin.books().used, info(cache).charged_bytes
    standin.behave(out_of_memory_at=())
    answer["again"] = say(cache)
""",
        )
        assert answer["text"] == " other words"
        assert answer["cause"] == "out_of_memory"
        assert (answer["models"], answer["failures"]) == (1, 0)
        assert answer["used"] == _other_bytes()
        assert OUT_OF_MEMORY in answer["error"]
        assert "tried twice" in answer["error"]
        assert answer["after"] == [0, 0]
        assert answer["again"] == TEXT

    def test_a_broken_context_loses_one_card_and_no_other(self, gpus: FakeGpus) -> None:
        """
        An illegal access in a call: the device is given up, whoever asks for it is told
        why, and its models are neither unloaded nor dropped, which would fail. The
        other card goes on, and the process ends in peace.
        """
        gpus.set_state(TWO_CARDS_SWAPPED)
        answer = _run(
            gpus,
            """
with open_cache(park=True) as cache:
    for model, device in ((MODEL, "cuda:0"), (OTHER, "cuda:0"), (MODEL, "cuda:1")):
        say(cache, model, device)
    make_way(cache)  # the first is parked
    standin.break_next_call()
    errors = []
    for _ in "12":
        try:
            say(cache, OTHER, "cuda:0")
        except Exception as error:
            errors.append([type(error).__name__, str(error)])
    answer["errors"] = errors
    settle(cache)
    try:
        say(cache, MODEL, "cuda:0")
    except DeviceUnavailable as error:
        answer["parked"] = str(error)
    answer["lost"] = [each.device for each in all_of(events.DeviceLost)]
    answer["text"] = say(cache, MODEL, "cuda:1"), say(cache, OTHER, "cuda:1")
    answer["any"] = cache.explain(OTHER, "cuda", "float16").key.device
    answer["used"] = [standin.books(0).used > 0, standin.books(1).used > 0]
    broken = len(standin.CALLS)
    log("closing")
    answer["charged"] = info(cache, "cuda:0").charged_bytes > 0
answer["undone"] = [
    call for call in standin.CALLS[broken:] if call[1] == "whispercache-cuda:0"
]
answer["back"] = standin.books(1).used
""",
        )
        assert answer["errors"][0] == ["RuntimeError", ILLEGAL_ACCESS]
        assert answer["errors"][1][0] == "DeviceUnavailable"
        assert "illegal memory access" in answer["errors"][1][1]
        assert "cuda:0" in answer["parked"]
        assert answer["lost"] == ["cuda:0"]
        assert answer["text"] == [TEXT, " other words"]
        assert answer["any"] == "cuda:1"
        assert answer["used"] == [True, True]
        assert answer["undone"] == []
        assert answer["back"] == 0
        after = gpus.calls()[gpus.calls().index("closing") :]
        assert after.count("model:drop") == after.count("model:unload") == 2

    def test_a_micro_model_that_breaks_the_card_is_not_dropped(
        self, gpus: FakeGpus
    ) -> None:
        """
        Dropping it would free on a broken context, which ends the process.
        """
        gpus.set_state(ONE_CARD)
        answer = _run(
            gpus,
            """
with open_cache() as cache:
    standin.break_next_call()
    try:
        cache.preload(OTHER, "cuda", "float16")
    except (DeviceUnavailable, LoadFailed) as error:
        answer["error"] = str(error)
    settle(cache)
    answer["done"] = done()
""",
        )
        assert "illegal memory access" in answer["error"]
        assert answer["done"] == ["build", "encode"]

    def test_a_model_whose_first_window_breaks_the_card_is_not_dropped(
        self, gpus: FakeGpus
    ) -> None:
        """
        Likewise on a card that is warm.
        """
        gpus.set_state(ONE_CARD)
        answer = _run(
            gpus,
            """
with open_cache() as cache:
    say(cache)
    standin.break_next_call()
    before = len(done())
    try:
        cache.preload(OTHER, "cuda", "float16")
    except (DeviceUnavailable, LoadFailed) as error:
        answer["error"] = str(error)
    settle(cache)
    answer["done"] = done()[before:]
""",
        )
        assert "illegal memory access" in answer["error"]
        assert answer["done"] == ["build", "encode"]

    def test_a_card_that_breaks_as_a_model_leaves_is_told_once(
        self, gpus: FakeGpus
    ) -> None:
        """
        The model is gone already: nothing is left to abandon.
        """
        gpus.set_state(ONE_CARD)
        answer = _run(
            gpus,
            """
from whispercache.devices.cuda import CudaError

def broken(*args, **options):
    raise CudaError(f"cuCtxSynchronize failed: {standin.ILLEGAL_ACCESS}")

with open_cache() as cache:
    say(cache)
    release.returned = broken
    cache.evict(MODEL)
    settle(cache), check(cache)
    answer["models"] = len(cache.models())
    answer["lost"] = len(all_of(events.DeviceLost))
    answer["warned"] = WARNED
""",
        )
        assert answer["models"] == 0
        assert answer["lost"] == 1
        assert len(answer["warned"]) == 1


def _other_bytes() -> int:
    header = read_header(micro("other words"))
    return estimate(header, "float16", "cuda:0").weights_bytes


class TestLearning:
    """
    What was measured on a card corrects what is predicted for one of that name.
    """

    def test_calls_that_take_more_than_predicted_are_given_more(
        self, gpus: FakeGpus
    ) -> None:
        """
        Once three loads of the same model had calls that took a quarter more, so much
        is reserved for the next; calls that take less change nothing.
        """
        gpus.set_state(ONE_CARD)
        predicted_bytes = estimate(read_header(micro()), "float16", "cuda:0")
        work_bytes = predicted_bytes.workspace_bytes
        answer = _run(
            gpus,
            """
def reserved(cache):
    with cache.lease(MODEL, "cuda", "float16"):
        return cache.models()[0].workspace_bytes

predicted = int(os.environ["PREDICTED"])
with open_cache() as cache:
    answer["reserved"] = [reserved(cache)]
    for factor in (0.9, 1.25):
        standin.behave(work_bytes=int(predicted * factor))
        for _ in range(3):
            say(cache)
            cache.evict(MODEL)
        settle(cache)
        answer["reserved"].append(reserved(cache))
        cache.evict(MODEL)
""",
            PREDICTED=str(work_bytes),
        )
        first, after_less, after_more = answer["reserved"]
        assert first == after_less == work_bytes
        assert after_more == pytest.approx(1.25 * work_bytes, rel=0.01)


class TestHostTier:
    """
    Copies of weights that have left a card.
    """

    def test_a_parked_model_returns_from_its_copy(
        self, gpus: FakeGpus, tmp_path: Path
    ) -> None:
        """
        Its answer is the same, no file is opened for it, and all its bytes had left the
        card. A copy that the host refuses means only that files are read again.
        """
        gpus.set_state(ONE_CARD)
        answer = _run(
            gpus,
            """
with open_cache(park=True) as cache:
    answer["texts"] = [say(cache)]
    make_way(cache)
    gone = standin.books()
    answer["gone"] = [gone.context, gone.used, gone.reserved]
    went = last(events.ModelEvicted)
    answer["parked"] = went.parked, went.returned_bytes, went.unreturned_bytes
    start = len(standin.CALLS)
    answer["texts"].append(say(cache))
    answer["second"] = done()[start:start + 1]
    answer["restored"] = last(events.ModelLoaded).restored, cache.stats().restores
    make_way(cache)
    answer["third"] = done()[-1], done("drop copy")
    cache.evict(MODEL)  # also what is parked
    settle(cache)
    answer["dropped"] = done()[-1]
    answer["left"] = [standin.books().context, info(cache, "cpu").shell_bytes]
    standin.behave(copies_fail=True)
    answer["texts"].append(say(cache))
    make_way(cache)
    went = last(events.ModelEvicted)
    answer["refused"] = went.parked, went.returned_bytes, went.unreturned_bytes
    answer["texts"].append(say(cache))
    answer["again"] = last(events.ModelLoaded).restored
    settle(cache), check(cache)
    answer["copies"] = info(cache, "cpu").copies_bytes
answer["end"] = standin.books().context, standin.books().used
""",
            MODEL=str(micro_copy(tmp_path / "model")),
        )
        n_bytes = _predicted_bytes()
        assert answer["texts"] == [TEXT] * 4
        # Handles stay with the object in which the copy is.
        assert answer["gone"] == [_FLOOR_BYTES + 8 * MIB, 0, 0]
        assert answer["parked"] == [True, n_bytes, 0]
        assert answer["second"] == ["load copy"]
        assert answer["restored"] == [True, 1]
        assert answer["third"] == ["unload to_cpu", []]
        assert answer["dropped"] == "drop"
        assert answer["left"] == [_FLOOR_BYTES, 0]
        assert answer["refused"] == [False, n_bytes, 0]
        assert answer["again"] is False
        assert answer["copies"] == 0
        assert answer["end"] == [_FLOOR_BYTES, 0]

    def test_a_copy_is_never_larger_than_the_host_allows(
        self, gpus: FakeGpus, tmp_path: Path
    ) -> None:
        """
        Where the tier's own limit, that of the host beside a model on the CPU, or the
        container's control group leaves too little, a model leaves without a copy, and
        works when it comes back.
        """
        gpus.set_state(ONE_CARD)
        model = build_micro(tmp_path / "wide", d_model=96)
        found = {"cuda:0": estimate(read_header(model), "float16", "cuda:0")}
        found["cpu"] = estimate(read_header(model), "float32", "cpu")
        n_bytes = found["cuda:0"].weights_bytes
        ram_bytes = found["cpu"].weights_bytes + found["cpu"].workspace_bytes
        assert found["cuda:0"].host_loading_bytes < ram_bytes
        assert HEAP_SLACK * found["cpu"].loading_bytes < ram_bytes
        host = tmp_path / "host"
        (host / "proc/self").mkdir(parents=True)
        (host / "sys/fs/cgroup").mkdir(parents=True)
        (host / "proc/self/cgroup").write_text("0::/")
        (host / "sys/fs/cgroup/memory.max").write_text(f"{1 * GIB}")
        answer = _run(
            gpus,
            """
from pathlib import Path
from whispercache.devices.probe import SystemProbe

def lives(before_it_leaves=lambda cache: None, **options):
    start = len(standin.CALLS)
    with open_cache(**options) as cache:
        texts = [say(cache)]
        before_it_leaves(cache)
        make_way(cache)
        parked = last(events.ModelEvicted).parked
        while held:
            held.pop()()
        texts.append(say(cache))
        return [texts, parked, last(events.ModelLoaded).restored]

def on_cpu(cache):
    held.append(cache.lease(MODEL, "cpu", "float32", cpu_threads=1).release)

def neighbour(cache):
    current.write_text(str(2**30 - 256 * 2**20 - n_bytes + 1))
    held.append(lambda: current.write_text("0"))

held = []
n_bytes, ram_bytes = int(os.environ["N_BYTES"]), int(os.environ["RAM"])
probe = SystemProbe(Path(os.environ["HOST"]))
current = Path(os.environ["HOST"], "sys/fs/cgroup/memory.current")
answer["enough"] = lives(park=n_bytes)
answer["own"] = lives(park=n_bytes - 1)
answer["ram"] = lives(on_cpu, park=True, ram=ram_bytes)
current.write_text("0")
answer["alone"] = lives(park=True, probe=probe)
answer["cgroup"] = lives(neighbour, park=True, probe=probe)
""",
            MODEL=str(model),
            N_BYTES=str(n_bytes),
            RAM=str(ram_bytes),
            HOST=str(host),
        )
        texts = [" hello world"] * 2
        for limit in ("enough", "alone"):
            assert answer[limit] == [texts, True, True], limit
        for limit in ("own", "ram", "cgroup"):
            assert answer[limit] == [texts, False, False], limit

    def test_the_interpreter_ends_with_models_loaded_and_parked(
        self, gpus: FakeGpus
    ) -> None:
        """
        Nobody closes the cache: at exit what is on the card is unloaded and dropped,
        the copy is dropped, and the process ends without error.
        """
        gpus.set_state(ONE_CARD)
        answer = _run(
            gpus,
            """
cache = open_cache(park=True)
answer["texts"] = [say(cache)]
make_way(cache)
answer["texts"].append(say(cache, OTHER))
answer["parked"] = info(cache, "cpu").shell_bytes > 0
log("exit")
""",
        )
        assert answer["texts"] == [TEXT, " other words"]
        assert answer["parked"]
        calls = gpus.calls()
        end = calls[calls.index("exit") :]
        assert end.count("model:drop") == 2
        assert end.count("model:unload") == 1
        held = gpus.held(0)
        assert (held["context"], held["used"]) == (_FLOOR_BYTES, 0)


def test_two_cards_load_and_transcribe_at_the_same_time(gpus: FakeGpus) -> None:
    """
    Each on a thread of its own, neither waits for the other, and each answers its own
    text (SYSTRAN/faster-whisper#946). Afterwards ``"cuda"`` goes where a model is
    already, and else to the card with most room.
    """
    gpus.set_state(TWO_CARDS_SWAPPED)
    answer = _run(
        gpus,
        """
from concurrent.futures import ThreadPoolExecutor
from standin.whisper import CardWhisper

together = threading.Barrier(2)
take_weights = CardWhisper._take_weights

def at_once(self, n_bytes):
    together.wait(10)  # breaks if the other card waits for this one
    take_weights(self, n_bytes)

CardWhisper._take_weights = at_once
with open_cache() as cache, ThreadPoolExecutor(2) as pool:
    here = pool.submit(say, cache, MODEL, "cuda:0")
    there = pool.submit(say, cache, OTHER, "cuda:1")
    answer["texts"] = [here.result(), there.result()]
    CardWhisper._take_weights = take_weights
    own = ("build", "load", "unload", "drop")
    wanted = [(MODEL, "cuda:0"), (OTHER, "cuda:1")] * 3
    said = [pool.submit(say, cache, *each) for each in wanted]
    answer["again"] = [each.result() for each in said]
    answer["builds"] = [thread for call, thread in standin.CALLS if call == "build"]
    answer["used"] = [standin.books(0).used, standin.books(1).used]
    answer["held"] = cache.explain(OTHER, "cuda", "float16").key.device
    answer["free"] = cache.explain(OTHER, "cuda", "int8_float16").key.device
    builds = len(done("build"))
    answer["hit"] = [say(cache, OTHER, "cuda"), len(done("build")) - builds]
answer["end"] = [standin.books(0).used, standin.books(1).used]
answer["threads"] = {
    thread for call, thread in standin.CALLS if call in own
} == {"whispercache-cuda:0", "whispercache-cuda:1"}
""",
    )
    assert answer["texts"] == [TEXT, " other words"]
    assert answer["again"] == [TEXT, " other words"] * 3
    assert (
        sorted(answer["builds"])
        == ["whispercache-cuda:0"] * 2 + ["whispercache-cuda:1"] * 2
    )
    assert answer["used"] == [_predicted_bytes(), _other_bytes()]
    assert answer["held"] == "cuda:1"
    assert answer["free"] == "cuda:0"
    assert answer["hit"] == [" other words", 0]
    assert answer["end"] == [0, 0]
    assert answer["threads"]
