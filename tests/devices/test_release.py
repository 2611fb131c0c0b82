"""
What is held of a card: what drivers and gauges say, and what is made of it.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from whispercache.devices import release
from whispercache.devices.cuda import CudaError, Pool
from whispercache.devices.memory import MemoryReading
from whispercache.devices.release import Holdings, Return
from whispercache.testing import FakeMachine

if TYPE_CHECKING:
    from collections.abc import Callable

CARD = "cuda:0"
GIB = 1024**3
STICKY = "an illegal memory access was encountered"


@dataclass(slots=True)
class FakeDriver:
    """
    A driver of one card that does as the test says.

    Attributes:
        errors: What calls fail with, by name.
        memory: The pool.
        capability: The card's.
        calls: What was called, in order.
    """

    errors: dict[str, str] = field(default_factory=dict)
    memory: Pool | None = None
    capability: tuple[int, int] = (8, 6)
    calls: list[str] = field(default_factory=list)

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call in self.errors:
            raise CudaError(self.errors[call])

    def name(self, ordinal: int) -> str:
        """
        Any.
        """
        return f"Card {ordinal}"

    def compute_capability(self, ordinal: int) -> tuple[int, int]:
        """
        As it was given.
        """
        del ordinal
        return self.capability

    def is_integrated(self, ordinal: int) -> bool:
        """
        It is not.
        """
        del ordinal
        return False

    def synchronize(self, ordinal: int) -> bool:
        """
        There is nothing to wait for.
        """
        del ordinal
        self._note("synchronize")
        return True

    def trim(self, ordinal: int) -> bool:
        """
        Keep nothing that is not in use.
        """
        del ordinal
        self._note("trim")
        if self.memory is not None:
            used_bytes, peak_bytes = self.memory.used_bytes, self.memory.peak_bytes
            self.memory = Pool(used_bytes, used_bytes, peak_bytes)
        return True

    def pool(self, ordinal: int) -> Pool | None:
        """
        As it was given.
        """
        del ordinal
        self._note("pool")
        return self.memory

    def forget_peak(self, ordinal: int) -> None:
        """
        Note it.
        """
        del ordinal
        self._note("forget_peak")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """
    The driver that is found.
    """
    found = FakeDriver()
    monkeypatch.setattr(release, "open_driver", lambda: found)
    return found


class Gauge(FakeMachine):
    """
    A gauge of a card of 8 GiB that shows one use of it after another; the last for
    ever.
    """

    def __init__(self, *used_gib: float, source: str = "nvml") -> None:
        super().__init__({CARD: "8GiB"})
        self.used_gib = list(used_gib)
        self.source = source

    def read(self, device: str) -> MemoryReading:
        """
        The next.
        """
        used_gib = self.used_gib[0] if len(self.used_gib) == 1 else self.used_gib.pop(0)
        total_bytes = self.total_bytes[device]
        return MemoryReading(
            total_bytes, total_bytes - int(used_gib * GIB), self.source
        )


# Drivers that refuse ------------------------------------------------------------------


def test_a_pool_that_cannot_be_trimmed_is_told_and_left(
    driver: FakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    """
    The next one may succeed; what was freed is waited for all the same.
    """
    driver.errors["trim"] = "cuMemPoolTrimTo failed: unknown error"
    with caplog.at_level(logging.WARNING):
        release.settle(CARD)
    assert driver.calls == ["synchronize", "trim"]
    assert [record.message for record in caplog.records] == [
        "idle memory of cuda:0 was not trimmed: cuMemPoolTrimTo failed: unknown error"
    ]


@pytest.mark.parametrize(
    ("call", "asks"),
    [
        pytest.param("trim", release.settle, id="trim"),
        pytest.param("synchronize", release.settle, id="settle"),
        pytest.param("synchronize", release.synchronize, id="synchronise"),
        pytest.param("pool", lambda name: release.holdings(name, Gauge(1)), id="pool"),
    ],
)
def test_a_broken_context_is_for_the_caller_to_see(
    driver: FakeDriver, call: str, asks: Callable[[str], object]
) -> None:
    """
    Whoever asks gives the device up; nothing of it is swallowed.
    """
    driver.errors[call] = STICKY
    with pytest.raises(CudaError, match=STICKY):
        asks(CARD)


def test_a_pool_that_cannot_be_read_leaves_the_gauge(driver: FakeDriver) -> None:
    """
    What is held is then what all programs hold.
    """
    driver.errors["pool"] = "cuDeviceGetMemPool failed: unknown error"
    assert release.holdings(CARD, Gauge(3)) == Holdings(None, 3 * GIB)


def test_a_peak_that_goes_on_stops_nothing(driver: FakeDriver) -> None:
    """
    It only teaches what calls take.
    """
    driver.errors["forget_peak"] = "cuMemPoolSetAttribute failed: unknown error"
    release.forget_peak(CARD)
    assert driver.calls == ["forget_peak"]


def test_without_a_driver_the_gauge_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    As with ROCm: there is nothing to wait for, to trim or to compile.
    """

    def open_none() -> FakeDriver:
        raise CudaError("no libcuda.so.1")

    monkeypatch.setattr(release, "open_driver", open_none)
    release.settle(CARD)
    release.synchronize(CARD)
    release.forget_peak(CARD)
    assert release.holdings(CARD, Gauge(2)) == Holdings(None, 2 * GIB)
    assert release.compile_reason(CARD) == ""
    assert not release.is_integrated(CARD)


# What is held -------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["nvml", "cuda driver (total only)"])
def test_a_gauge_that_shows_nothing_is_no_measurement(
    driver: FakeDriver, source: str
) -> None:
    """
    One that fails, and one that knows only how large the card is.
    """
    driver.memory = Pool(GIB, 2 * GIB, GIB)
    machine = FakeMachine({CARD: "8GiB"})
    machine.reading_fails = OSError("the gauge is out of order")
    probe = machine if source == "nvml" else Gauge(0, source=source)
    assert release.holdings(CARD, probe) == Holdings(driver.memory, None)


@pytest.mark.parametrize(
    ("before", "after", "grown_bytes"),
    [
        pytest.param(Holdings(None, 0), Holdings(Pool(5, 9, 5), 9), 5, id="first"),
        pytest.param(
            Holdings(Pool(2, 9, 2), 7), Holdings(Pool(5, 9, 5), 99), 3, id="pool"
        ),
        pytest.param(
            Holdings(Pool(2, 9, 2), 7), Holdings(Pool(2, 9, 2), 99), 92, id="elsewhere"
        ),
        pytest.param(Holdings(None, 7), Holdings(None, 6), -1, id="gauge"),
        pytest.param(Holdings(None, None), Holdings(None, 6), None, id="unknown"),
        pytest.param(Holdings(None, 6), Holdings(None, None), None, id="lost"),
    ],
)
def test_growth_is_the_pool_s_or_else_the_gauge_s(
    before: Holdings, after: Holdings, grown_bytes: int | None
) -> None:
    """
    Other programs move the gauge, so it counts only where the pool does not grow.
    """
    assert after.growth_since(before) == grown_bytes


@pytest.mark.parametrize(
    ("before_gib", "after_gib", "floor_bytes"),
    [
        pytest.param(1, 1.25, GIB // 4, id="floor"),
        pytest.param(1, 3, None, id="others came"),
        pytest.param(2, 1, None, id="others left"),
        pytest.param(None, 1, None, id="unknown"),
    ],
)
def test_a_floor_is_told_only_if_it_can_be_one(
    driver: FakeDriver,
    before_gib: float | None,
    after_gib: float,
    floor_bytes: int | None,
) -> None:
    """
    A context takes some hundred MiB; more, or less than nothing, is others' doing.
    """
    used_bytes = None if before_gib is None else int(before_gib * GIB)
    before = Holdings(driver.memory, used_bytes)
    assert release.floor_bytes(CARD, Gauge(after_gib), before) == floor_bytes


def test_what_a_pool_keeps_is_no_floor(driver: FakeDriver) -> None:
    """
    Bytes in use may be those of a model that was there already.
    """
    driver.memory = Pool(GIB, GIB, GIB)
    assert release.floor_bytes(CARD, Gauge(2.5), Holdings(None, GIB)) == GIB // 2


# What comes back ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_quiet", "left_bytes"),
    [pytest.param(True, GIB, id="quiet"), pytest.param(False, 0, id="calls")],
)
def test_what_a_pool_has_in_use_may_be_others(
    driver: FakeDriver, *, is_quiet: bool, left_bytes: int
) -> None:
    """
    A call began meanwhile: what it takes was not left behind by who went.
    """
    before = Holdings(Pool(GIB, GIB, GIB), None)
    driver.memory = Pool(GIB, GIB, GIB)
    found = release.returned(CARD, Gauge(1), before, GIB, is_quiet=is_quiet)
    assert found == Return(0, left_bytes, GIB)


def test_what_a_pool_cannot_give_back_stays_counted(driver: FakeDriver) -> None:
    """
    It holds more than is in use, since the trim failed.
    """
    driver.errors["trim"] = "cuMemPoolTrimTo failed: unknown error"
    driver.memory = Pool(0, GIB, GIB)
    before = Holdings(Pool(GIB, GIB, GIB), None)
    assert release.returned(CARD, Gauge(1), before, GIB) == Return(0, GIB, GIB)


def test_most_of_what_was_expected_is_enough(driver: FakeDriver) -> None:
    """
    A pool that has given back three quarters held others' work, too.
    """
    driver.memory = Pool(GIB // 4, GIB // 4, GIB)
    before = Holdings(Pool(GIB, GIB, GIB), None)
    found = release.returned(CARD, Gauge(1), before, GIB, is_quiet=True)
    assert found == Return(3 * GIB // 4, 0, GIB)


def test_a_gauge_that_lags_is_waited_for(driver: FakeDriver) -> None:
    """
    Without a pool: until it shows enough.
    """
    assert driver.memory is None
    before = Holdings(None, 3 * GIB)
    found = release.returned(CARD, Gauge(3, 3, 2.25), before, GIB)
    assert found == Return(3 * GIB // 4, 0, int(2.25 * GIB))


def test_a_gauge_that_never_shows_it_is_waited_for_only_so_long(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The least that was shown counts, whoever came meanwhile; the rest is missing.
    """
    assert driver.memory is None
    monkeypatch.setattr(release, "RETURN_WAIT_S", 0)
    before = Holdings(None, 3 * GIB)
    found = release.returned(CARD, Gauge(2.5, 4), before, GIB)
    assert found == Return(GIB // 2, GIB // 2, int(2.5 * GIB))


def test_where_nothing_can_be_seen_nothing_is_missed(driver: FakeDriver) -> None:
    """
    Neither pool nor gauge: a model that was unloaded is taken for gone.
    """
    assert driver.memory is None
    probe = Gauge(0, source="cuda driver (total only)")
    assert release.returned(CARD, probe, Holdings(None, None), GIB) == Return(None, 0)


# What is compiled ---------------------------------------------------------------------


@pytest.fixture
def hopper(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """
    A card for which CTranslate2's wheels hold no code; nothing is set about it.
    """
    for name in ("CUDA_CACHE_PATH", "CUDA_CACHE_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    driver.capability = (9, 0)
    return driver


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("platform", "kept_in"),
    [("linux", "/.nv/ComputeCache"), ("win32", r"%APPDATA%\NVIDIA\ComputeCache")],
)
def test_what_is_compiled_is_kept_where_cuda_keeps_it(
    monkeypatch: pytest.MonkeyPatch, platform: str, kept_in: str
) -> None:
    """
    Whoever makes an image of a machine wants to keep it.
    """
    monkeypatch.setattr(sys, "platform", platform)
    reason = release.compile_reason(CARD)
    assert "Card 0 (sm_90)" in reason
    assert reason.endswith(kept_in)


@pytest.mark.usefixtures("hopper")
def test_what_is_compiled_is_kept_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    By CUDA's own variable.
    """
    monkeypatch.setenv("CUDA_CACHE_PATH", "/kernels/are/here")
    assert release.compile_reason(CARD).endswith("in /kernels/are/here")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("value", "is_off"), [("1", True), ("0", False), ("", False)])
def test_a_cache_of_kernels_that_is_off_is_told(
    monkeypatch: pytest.MonkeyPatch, value: str, *, is_off: bool
) -> None:
    """
    Then each process takes half a minute.
    """
    monkeypatch.setenv("CUDA_CACHE_DISABLE", value)
    assert ("each process does it anew" in release.compile_reason(CARD)) is is_off


def test_a_card_that_has_code_compiles_nothing(driver: FakeDriver) -> None:
    """
    Its first model waits for CUDA and cuBLAS only.
    """
    assert driver.capability == (8, 6)
    assert release.compile_reason(CARD) == ""
    assert "CUDA and cuBLAS start" in release.warm_up_reason(CARD)
