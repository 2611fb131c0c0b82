"""
Faults: memory that runs out, models that never load, devices that are lost.
"""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from driver import Driver, wait_waiting

from whispercache import (
    CacheClosed,
    DeviceLost,
    DeviceUnavailable,
    Event,
    EvictionCause,
    FellBack,
    LeaseTimeout,
    LoadFailed,
    ModelEvicted,
    ModelTooLarge,
    UnsupportedComputeType,
)
from whispercache.core.fallback import Rung, as_ladder
from whispercache.devices.faults import Fault, classify, is_from_ctranslate2
from whispercache.errors import CorruptModel
from whispercache.testing import FakeLoader, FakeWhisper, settle, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import MakeCache

    from whispercache import ModelCache
    from whispercache.testing import FakeClock, FakeMachine

GIB = 1024**3
AUDIO: Any = "audio"

OUT_OF_MEMORY = "CUDA failed with error out of memory"
AMBIGUOUS = (
    "parallel_for failed: cudaErrorInvalidDevice: invalid device ordinal",
    "cudaErrorInvalidDevice",
)
CUBLAS = "cuBLAS failed with status CUBLAS_STATUS_NOT_INITIALIZED"
NOT_SUPPORTED = "cuBLAS failed with status CUBLAS_STATUS_NOT_SUPPORTED"
ILLEGAL = "CUDA failed with error an illegal memory access was encountered"


def record(cache: ModelCache) -> list[Event]:
    """
    The events of a cache, from now on.
    """
    events: list[Event] = []
    cache.subscribe(events.append)
    return events


# What an error means ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (RuntimeError(OUT_OF_MEMORY), Fault.OUT_OF_MEMORY),
        (RuntimeError("std::bad_alloc"), Fault.OUT_OF_MEMORY),
        (MemoryError(), Fault.OUT_OF_MEMORY),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), Fault.OUT_OF_MEMORY),
        (RuntimeError(AMBIGUOUS[0]), Fault.PERHAPS_OUT_OF_MEMORY),
        (RuntimeError(CUBLAS), Fault.PERHAPS_OUT_OF_MEMORY),
        (RuntimeError(ILLEGAL), Fault.STICKY),
        (RuntimeError("unspecified launch failure"), Fault.STICKY),
        (RuntimeError(NOT_SUPPORTED), Fault.UNSUPPORTED),
        (RuntimeError("CUBLAS_STATUS_ARCH_MISMATCH"), Fault.UNSUPPORTED),
        (RuntimeError("Library libcublas.so.12 is not found"), Fault.OTHER),
        (ValueError("out of memory"), Fault.OTHER),
    ],
)
def test_wordings_are_known(error: BaseException, fault: Fault) -> None:
    """
    Only RuntimeErrors are CTranslate2's; a sticky wording wins over the rest.
    """
    assert classify(error) is fault


def test_cublas_speaks_for_ctranslate2() -> None:
    """
    Its errors are known in a caller's block, too; those of other libraries are not.
    """
    assert is_from_ctranslate2(RuntimeError(CUBLAS))
    assert not is_from_ctranslate2(RuntimeError("cuda is out of memory"))
    assert not is_from_ctranslate2(ValueError(CUBLAS))


# Out of memory while loading ----------------------------------------------------------


def test_a_load_that_runs_out_of_memory_is_tried_again(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Once, when all that was idle has left.
    """
    cache = make_cache()
    for model in ("tiny", "base"):
        driver.call(cache, "preload", model, "cuda:0")
    events = record(cache)
    loader.fail_loads["small"] = [RuntimeError(OUT_OF_MEMORY)]
    driver.lease(cache, "small", "cuda:0").release()
    assert {info.key.model for info in cache.models()} == {"small"}
    causes = [e.cause for e in events if isinstance(e, ModelEvicted)]
    assert causes == [EvictionCause.OUT_OF_MEMORY] * 2
    assert cache.stats().load_failures == 0


def test_leased_and_pinned_models_stay_when_memory_runs_out(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Only what is idle leaves.
    """
    cache = make_cache()
    driver.call(cache, "pin", "tiny", "cuda:0")
    held = driver.lease(cache, "base", "cuda:0")
    driver.call(cache, "preload", "tiny.en", "cuda:0")
    loader.fail_loads["small"] = [RuntimeError(OUT_OF_MEMORY)]
    driver.lease(cache, "small", "cuda:0").release()
    names = {info.key.model for info in cache.models()}
    assert names == {"tiny", "base", "small"}
    held.release()
    cache.unpin()


def test_a_load_that_runs_out_twice_says_what_was_tried(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    And all who waited for it are told; the books are as if nothing had been loaded.
    """
    cache = make_cache()
    driver.call(cache, "preload", "tiny", "cuda:0")
    loader.fail_loads["small"] = [RuntimeError(OUT_OF_MEMORY)] * 2
    with loader.holding_loads("small"):
        waiting = [driver.start(cache, "lease", "small", "cuda:0") for _ in "12"]
        wait_waiting(cache, 2)
    for each in waiting:
        error = each.exception(10)
        assert isinstance(error, LoadFailed)
        assert OUT_OF_MEMORY in str(error)
        assert "tried twice, and evicted in between: tiny/cuda:0/float16" in str(error)
    assert not cache.models()
    (device,) = (each for each in cache.devices() if each.device == "cuda:0")
    assert device.charged_bytes == 0


@pytest.mark.parametrize("wording", AMBIGUOUS)
@pytest.mark.parametrize("is_short", [True, False])
def test_free_memory_settles_what_a_wording_leaves_open(
    make_cache: MakeCache,
    machine: FakeMachine,
    loader: FakeLoader,
    monkeypatch: pytest.MonkeyPatch,
    wording: str,
    *,
    is_short: bool,
) -> None:
    """
    With too little of it the load is tried again; with enough it means something else.
    """
    cache = make_cache()
    cache.preload("tiny", "cuda:0")
    plain = FakeLoader.load

    def load(self: FakeLoader, key: Any, files: Any) -> Any:
        machine.others("cuda:0", 9 * GIB if is_short and not failed else 0)
        if not failed:
            failed.append(key)
            raise RuntimeError(wording)
        return plain(self, key, files)

    failed: list[Any] = []
    monkeypatch.setattr(FakeLoader, "load", load)
    if is_short:
        cache.lease("small", "cuda:0").release()
    else:
        with pytest.raises(LoadFailed, match=r"cudaErrorInvalidDevice"):
            cache.lease("small", "cuda:0")
    assert loader.unloads["tiny"] == is_short


def test_the_half_built_model_is_gone_before_the_second_try(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The traceback of the first would keep it, and its memory, alive.
    """

    class HalfBuilt:
        """
        Something large.
        """

    built: list[weakref.ref[HalfBuilt]] = []
    seen: list[object] = []
    plain = FakeLoader.load

    def load(self: FakeLoader, key: Any, files: Any) -> Any:
        if built:
            seen.append(built[0]())
            return plain(self, key, files)
        half = HalfBuilt()
        built.append(weakref.ref(half))
        raise RuntimeError(OUT_OF_MEMORY)

    gc.disable()
    try:
        monkeypatch.setattr(FakeLoader, "load", load)
        make_cache().lease("small", "cuda:0").release()
    finally:
        gc.enable()
    assert seen == [None]


# Out of memory during a call ----------------------------------------------------------


def test_a_call_that_runs_out_of_memory_is_made_again(
    make_cache: MakeCache, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    After what is idle has left; the caller sees nothing of it.
    """
    cache = make_cache()
    driver.call(cache, "preload", "tiny", "cuda:0")
    failing(monkeypatch, "detect_language", OUT_OF_MEMORY)
    model = driver.call(cache, "get_model", "base", "cuda:0")
    assert driver.call_on(model, "detect_language")[0] == "en"
    assert {info.key.model for info in cache.models()} == {"base"}


def test_a_call_is_not_made_again_where_nothing_could_leave(
    make_cache: MakeCache, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    It would fail in the same way; its own error is told, and the lease has ended.
    """
    cache = make_cache()
    failing(monkeypatch, "detect_language", OUT_OF_MEMORY)
    model = driver.call(cache, "get_model", "base", "cuda:0")
    with pytest.raises(RuntimeError, match="out of memory"):
        driver.call_on(model, "detect_language")
    assert cache.stats().leases == 0


def test_segments_begin_again_if_none_was_yielded(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The first may run out of memory; all of them come, each once.
    """
    cache = make_cache()
    cache.preload("tiny", "cuda:0")
    failing(monkeypatch, "_speak", OUT_OF_MEMORY, after=0)
    segments, _ = cache.get_model("base", "cuda:0").transcribe(AUDIO)
    assert [segment.start for segment in segments] == [0, 1, 2]
    assert {info.key.model for info in cache.models()} == {"base"}


def test_segments_do_not_begin_again_once_one_was_yielded(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The caller would see it twice.
    """
    cache = make_cache()
    cache.preload("tiny", "cuda:0")
    failing(monkeypatch, "_speak", OUT_OF_MEMORY, after=1)
    segments, _ = cache.get_model("base", "cuda:0").transcribe(AUDIO)
    assert next(segments).start == 0
    with pytest.raises(RuntimeError, match="out of memory"):
        next(segments)
    assert cache.stats().leases == 0


def failing(
    patch: pytest.MonkeyPatch, method: str, text: str, after: int | None = None
) -> None:
    """
    Let the first call of a method fail; a generator, *after* so many items.
    """
    plain = getattr(FakeWhisper, method)
    calls: list[object] = []

    def fail(self: FakeWhisper, *args: Any, **options: Any) -> Any:
        calls.append(self)
        if len(calls) == 1:
            raise RuntimeError(text)
        return plain(self, *args, **options)

    def fail_late(self: FakeWhisper) -> Iterator[Any]:
        calls.append(self)
        for place, item in enumerate(plain(self)):
            if len(calls) == 1 and place == after:
                raise RuntimeError(text)
            yield item

    patch.setattr(FakeWhisper, method, fail if after is None else fail_late)


# Models that never load ---------------------------------------------------------------


def test_a_model_that_fails_again_and_again_cools_down(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, driver: Driver
) -> None:
    """
    In a minute of a hundred requests it is tried seven times; the others fail at once,
    with the time to retry.
    """
    cache = make_cache()
    loader.fail_loads["base"] = [RuntimeError("broken") for _ in range(100)]
    refused = 0
    for _ in range(100):
        error = driver.start(cache, "lease", "base", "cuda:0").exception(10)
        assert isinstance(error, LoadFailed)
        assert "broken" in str(error)
        if error.retry_in_s is not None:
            refused += 1
            assert 0 < error.retry_in_s <= 60
            assert f"again in {error.retry_in_s:.1f} s" in str(error)
        clock.tick(0.6)
    assert cache.stats().load_failures == 7
    assert refused == 100 - 7


def test_the_first_failure_costs_no_time(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Many are over at the next try; and a load that succeeds forgets those before it.
    """
    cache = make_cache(keep_alive=0)
    for _ in range(3):
        loader.fail_loads["base"] = [RuntimeError("broken")]
        with pytest.raises(LoadFailed) as caught:
            driver.lease(cache, "base", "cuda:0")
        assert caught.value.retry_in_s is None
        driver.lease(cache, "base", "cuda:0").release()
        settle(cache)


def test_a_model_that_was_mended_is_tried_at_once(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    Other files are another model.
    """
    cache = make_cache()
    loader.fail_loads["base"] = [RuntimeError("broken")] * 2
    for _ in range(2):
        with pytest.raises(LoadFailed):
            cache.lease("base", "cuda:0")
    with pytest.raises(LoadFailed, match="2 loads in a row failed: broken"):
        cache.lease("base", "cuda:0")
    loader.saved_compute_type = "float32"
    cache.lease("base", "cuda:0").release()


def test_explain_knows_of_the_cool_down(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock
) -> None:
    """
    Until it is over.
    """
    cache = make_cache()
    loader.fail_loads["base"] = [RuntimeError("broken")] * 2
    for _ in range(2):
        with pytest.raises(LoadFailed):
            cache.lease("base", "cuda:0")
    explained = cache.explain("base", "cuda:0")
    assert explained.outcome == "never"
    assert "2 loads in a row failed: broken" in explained.reason
    clock.tick(1.1)
    assert cache.explain("base", "cuda:0").outcome == "load"


def test_the_error_with_its_time_pickles() -> None:
    """
    As all do.
    """
    error = pickle.loads(pickle.dumps(LoadFailed("base", "broken", 2.5)))
    assert (error.model, error.reason, error.retry_in_s) == ("base", "broken", 2.5)
    assert "again in 2.5 s" in str(error)
    corrupt = pickle.loads(pickle.dumps(CorruptModel("base", "torn")))
    assert corrupt.retry_in_s is None
    assert "again" in str(corrupt)
    assert " s " not in str(corrupt)


# Lost devices -------------------------------------------------------------------------


def test_a_sticky_error_loses_the_device_and_no_other(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Whoever waits for it is told, later requests fail at once, other devices go on.
    """
    cache = make_cache(vram="7GiB")
    events = record(cache)
    loader.fail_loads["large-v3"] = [RuntimeError(ILLEGAL)]
    with loader.holding_loads("large-v3"):
        failing = driver.waiting(cache, "large-v3", "cuda:0")
        behind = driver.waiting(cache, "medium", "cuda:0")
        elsewhere = driver.lease(cache, "small", "cuda:1")
    assert isinstance(failing.exception(10), LoadFailed)
    error = behind.exception(10)
    assert isinstance(error, DeviceUnavailable)
    assert "illegal memory access" in str(error)
    assert "restart the process" in str(error)
    with pytest.raises(DeviceUnavailable, match="illegal memory access"):
        driver.lease(cache, "tiny", "cuda:0")
    assert cache.explain("tiny", "cuda:0").outcome == "never"
    elsewhere.release()
    driver.lease(cache, "tiny", "cuda:1").release()
    driver.lease(cache, "tiny", "cpu").release()
    (lost,) = (event for event in events if isinstance(event, DeviceLost))
    assert (lost.device, lost.key.model) == ("cuda:0", "large-v3")
    assert loader.loads["tiny"] == 2


def test_a_sticky_error_in_a_call_loses_the_device(
    make_cache: MakeCache, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Hits fail too from then on: the model is there, but cannot be used.
    """
    cache = make_cache()
    failing(monkeypatch, "detect_language", ILLEGAL)
    model = driver.call(cache, "get_model", "base", "cuda:0")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        driver.call_on(model, "detect_language")
    with pytest.raises(DeviceUnavailable, match="illegal memory access"):
        driver.call_on(model, "detect_language")


def test_a_sticky_error_in_a_block_loses_the_device(make_cache: MakeCache) -> None:
    """
    The real model is in the caller's hands there, but the error passes by.
    """
    cache = make_cache()
    with pytest.raises(RuntimeError, match="misaligned"), cache.lease("base", "cuda:0"):
        raise RuntimeError("CUDA failed with error misaligned address")
    with pytest.raises(DeviceUnavailable, match="misaligned address"):
        cache.lease("base", "cuda:0")


def test_auto_passes_over_a_lost_device(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    It finds another card, and the CPU if there is none.
    """
    cache = make_cache()
    for expected in ("cuda:0", "cuda:1"):
        failing(monkeypatch, "detect_language", ILLEGAL)
        assert cache.get_model("base").key.device == expected
        with pytest.raises(RuntimeError, match="illegal"):
            cache.get_model("base", expected).detect_language()
        monkeypatch.undo()
        cache._resolver.forget()
    assert cache.get_model("base").key.device == "cpu"


def test_models_on_a_lost_device_stay_charged_and_close_does_not_wait(
    make_cache: MakeCache, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    What it does not give back is counted for good; nothing is tried for ever.
    """
    cache = make_cache()
    cache.preload("tiny", "cuda:0")
    unloads: list[object] = []

    def unload(_loader: FakeLoader, loaded: Any, **_: object) -> Any:
        unloads.append(loaded)
        raise RuntimeError(ILLEGAL)

    with monkeypatch.context() as patch:
        patch.setattr(FakeLoader, "unload", unload)
        assert cache.evict("tiny", timeout_s=10) == 1
        (device,) = (each for each in cache.devices() if each.device == "cuda:0")
        assert device.charged_bytes == GIB
        cache.close(timeout_s=10)
    assert len(unloads) == 1
    machine.give_back("cuda:0", GIB)  # as the end of the process does


# Fallbacks ----------------------------------------------------------------------------


def test_a_ladder_is_climbed_until_something_fits(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Another type, another card, then the host; the lease says what it got.
    """
    cache = make_cache(vram={"cuda:0": "2GiB", "cuda:1": "4GiB"})
    ladder = ["int8_float16", "cuda:1", "cpu"]
    events = record(cache)
    on_card = driver.lease(cache, "medium", "cuda:0", "float16", fallback=ladder)
    assert str(on_card.key) == "medium/cuda:1/float16"
    on_host = driver.lease(cache, "large-v3", "cuda:0", "float16", fallback=ladder)
    assert on_host.key.device == "cpu"
    on_card.release()
    on_host.release()
    assert cache.stats().fallbacks == 2
    assert loader.loads == {"medium": 1, "large-v3": 1}
    told = [event for event in events if isinstance(event, FellBack)]
    assert [str(event.key.device) for event in told] == ["cuda:1", "cpu"]
    assert told[0].wanted == "medium/cuda:0/float16"
    assert "limit" in told[0].reason


def test_a_cache_may_have_a_ladder_and_a_request_another(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    An empty one is none.
    """
    cache = make_cache(vram="2GiB", fallback=["cpu"])
    lease = driver.lease(cache, "medium", "cuda:0")
    assert lease.key.device == "cpu"
    lease.release()
    with pytest.raises(ModelTooLarge):
        driver.lease(cache, "medium", "cuda:0", fallback=[])


def test_a_cached_model_says_what_served_it(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    Its key stays what was asked for; the segments, too, know who made them.
    """
    cache = make_cache(vram="2GiB")
    model = driver.call(cache, "get_model", "medium", "cuda:0", fallback=["cpu"])
    assert model.served_by is None
    segments, _ = driver.call_on(model, "transcribe", AUDIO)
    assert segments.key.device == "cpu"
    assert model.served_by == segments.key
    assert model.key.device == "cuda:0"
    driver.call_on(segments, "aclose" if hasattr(segments, "aclose") else "close")


@pytest.mark.parametrize(
    ("request_", "fallback", "got"),
    [
        (("base", "cuda:7"), ["cpu"], "cpu/float32"),
        (("base", "cpu", "bfloat16"), ["int8"], "cpu/int8_float32"),
        (("base", "cuda:0", "float16"), ["cpu"], "cuda:0/float16"),
    ],
)
def test_what_cannot_be_had_at_all_falls_back_too(
    make_cache: MakeCache,
    driver: Driver,
    request_: tuple[str, ...],
    fallback: list[str],
    got: str,
) -> None:
    """
    A card that is not there, a type that it does not know; what can be had is had.
    """
    cache = make_cache()
    lease = driver.lease(cache, *request_, fallback=fallback)
    assert str(lease.key) == f"base/{got}"
    lease.release()
    # So does a model that is asked for first, and called afterwards.
    model = driver.call(cache, "get_model", *request_, fallback=fallback)
    assert str(model.key) == f"base/{got}"
    with pytest.raises(DeviceUnavailable, match="cuda:7"):
        driver.call(cache, "get_model", "base", "cuda:7", fallback=["cuda:8"])


def test_a_broken_card_falls_back(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    A load that fails, as without cuBLAS, is tried elsewhere; and while it cools down,
    at once.
    """
    cache = make_cache(fallback=["cpu"])
    missing = RuntimeError("Library libcublas.so.12 is not found or cannot be loaded")
    loader.fail_loads["base"] = [missing]
    for _ in range(4):
        lease = driver.lease(cache, "base", "cuda:0")
        assert lease.key.device == "cpu"
        lease.release()
        loader.fail_loads["base"] = [] if cache.stats().load_failures > 1 else [missing]


def test_broken_files_and_waiting_are_no_reason_to_fall_back(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    They are as broken elsewhere; and a busy model is not one that cannot be had.
    """
    cache = make_cache(vram="3GiB", fallback=["cpu"])
    loader.fail_loads["base"] = [CorruptModel("base", "torn")]
    with pytest.raises(CorruptModel):
        driver.lease(cache, "base", "cuda:0")
    held = driver.lease(cache, "medium", "cuda:0")
    with pytest.raises(LeaseTimeout):
        driver.lease(cache, "small", "cuda:0", timeout_s=0)
    held.release()


def test_if_all_fails_the_first_error_is_told(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    It is about what was asked for.
    """
    cache = make_cache(vram="2GiB", ram="1GiB")
    with pytest.raises(ModelTooLarge) as caught:
        driver.lease(cache, "medium", "cuda:1", fallback=["cuda:0", "cpu"])
    assert caught.value.device == "cuda:1"


def test_the_time_limit_is_for_the_whole_ladder(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, driver: Driver
) -> None:
    """
    What the first step used up is gone for the others.
    """
    cache = make_cache(ram="3GiB")
    held = driver.lease(cache, "medium", "cpu")
    loader.fail_loads["small"] = [RuntimeError("broken")]
    with loader.holding_loads("small") as gate:
        waiting = driver.waiting(
            cache, "small", "cuda:0", timeout_s=10, fallback=["cpu/int8"]
        )
        gate.wait_reached()
        clock.tick(6)
    wait_until(lambda: cache.stats().load_failures == 1)
    wait_waiting(cache, 1)
    clock.tick(3)
    assert not waiting.done()
    clock.tick(2)
    assert isinstance(waiting.exception(10), LeaseTimeout)
    held.release()


def test_ladders_are_parsed() -> None:
    """
    Types, devices, or both; anything else is explained.
    """
    assert as_ladder(["int8_float16", "cuda:1", "cpu/int8", "cuda:0"]) == (
        Rung(None, "int8_float16"),
        Rung("cuda:1", None),
        Rung("cpu", "int8"),
        Rung("cuda:0", None),
    )
    with pytest.raises(TypeError, match=r"\['cpu'\]"):
        as_ladder("cpu")
    for nonsense in ("tpu", "cpu/int7", "cuda:x", ""):
        with pytest.raises(ValueError, match="fallback"):
            as_ladder([nonsense])
    with pytest.raises(TypeError, match="texts such as 'cpu', not None"):
        as_ladder([None])  # type: ignore[list-item]


def test_closing_ends_a_ladder(make_cache: MakeCache, driver: Driver) -> None:
    """
    A closed cache has nothing else to offer.
    """
    cache = make_cache(fallback=["cpu"])
    cache.close()
    with pytest.raises(CacheClosed):
        driver.lease(cache, "base", "cuda:0")


def test_an_unknown_type_is_no_fallback_by_itself(make_cache: MakeCache) -> None:
    """
    Without a ladder the error is what it was.
    """
    with pytest.raises(UnsupportedComputeType):
        make_cache().lease("base", "cpu", "bfloat16")
