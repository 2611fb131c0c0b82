"""
The budget of a device: charges and credits, without a cache around it.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import whispercache
from whispercache.core.budget import Budget, Use
from whispercache.devices.memory import MemoryReading, headroom_bytes
from whispercache.units import Limit

GIB = 1024**3
MODEL, OTHER = "a model", "another one"
HEADROOM = headroom_bytes("cuda:0", 24 * GIB)


def reading(free_gib: int) -> MemoryReading:
    """
    Returns what the gauge of a card shows, with so much to use.
    """
    return MemoryReading(24 * GIB, free_gib * GIB + HEADROOM, "a test")


@pytest.fixture
def budget() -> Budget:
    """
    Ten GiB by the limit, on a card that has more.
    """
    made = Budget("cuda:0", Limit(n_bytes=10 * GIB))
    made.observe(reading(20), kept_bytes=0)
    return made


def test_a_model_s_life_is_charged_step_by_step(budget: Budget) -> None:
    """
    It is reserved, then in memory, then leased; and credited when it is gone.
    """
    budget.set(MODEL, Use.RESERVED, 5 * GIB)
    assert (budget.to_come_bytes, budget.on_gauge_bytes) == (5 * GIB, 0)
    budget.move(MODEL, Use.RESERVED, Use.WEIGHTS)
    budget.set(MODEL, Use.WEIGHTS, 4 * GIB)
    assert (budget.to_come_bytes, budget.on_gauge_bytes) == (0, 4 * GIB)
    budget.work(GIB)
    assert (budget.charged_bytes, budget.left_bytes) == (5 * GIB, 5 * GIB)
    budget.work(-GIB)
    budget.clear(MODEL)
    budget.check()
    assert (budget.charged_bytes, budget.peak_bytes) == (0, 5 * GIB)


def test_holders_do_not_share_what_they_are_charged(budget: Budget) -> None:
    """
    To clear one leaves the other as it was.
    """
    for holder, n_bytes in ((MODEL, 1), (OTHER, 2)):
        budget.set(holder, Use.WEIGHTS, n_bytes)
    budget.clear(MODEL)
    assert budget.of(MODEL, Use.WEIGHTS) == 0
    assert budget.of(OTHER, Use.WEIGHTS) == budget.charged_bytes == 2


def test_what_is_lost_stays_charged(budget: Budget) -> None:
    """
    A model of a lost device moves to another use, and nothing is credited.
    """
    budget.set(MODEL, Use.WEIGHTS, GIB)
    budget.move(MODEL, Use.WEIGHTS, Use.LOST)
    assert budget.sum_of(Use.LOST) == budget.charged_bytes == GIB


def test_unreturned_bytes_are_credited_when_the_gauge_shows_them(
    budget: Budget,
) -> None:
    """
    Three quarters of them are enough; before that, they count as in use.
    """
    budget.keep(4 * GIB, used_bytes=4 * GIB)
    assert budget.charged_bytes == 4 * GIB
    used = MemoryReading(24 * GIB, 20 * GIB, "a test")
    budget.observe(used, kept_bytes=0)
    assert budget.sum_of(Use.UNRETURNED) == 4 * GIB
    budget.observe(MemoryReading(24 * GIB, 23 * GIB, "a test"), kept_bytes=0)
    assert budget.charged_bytes == 0


def test_the_gauge_may_allow_less_than_the_limit(budget: Budget) -> None:
    """
    The smaller of both counts, with what is resident already.
    """
    budget.set(MODEL, Use.WEIGHTS, 2 * GIB)
    budget.observe(reading(3), kept_bytes=0)
    assert budget.capacity_bytes == 5 * GIB
    budget.observe(reading(3), kept_bytes=GIB)
    assert budget.capacity_bytes == 6 * GIB
    budget.observe(reading(3), kept_bytes=0, promised_bytes=GIB)
    assert budget.capacity_bytes == 4 * GIB


def test_work_has_a_peak_of_its_own(budget: Budget) -> None:
    """
    Measured anew from what is charged at that time.
    """
    budget.work(3)
    budget.work(-2)
    assert budget.restart_work() == 3
    assert budget.restart_work() == 1


uses = st.sampled_from([use for use in Use if use is not Use.WORK])
holders = st.sampled_from([MODEL, OTHER])
steps = st.one_of(
    st.tuples(st.just("set"), holders, uses, st.integers(0, 9)),
    st.tuples(st.just("move"), holders, uses, uses),
    st.tuples(st.just("clear"), holders),
)


@given(st.lists(steps))
def test_the_sums_are_those_of_the_table(
    steps: list[tuple[object, ...]],
) -> None:
    """
    After any history.
    """
    budget = Budget("cpu", Limit())
    for name, *arguments in steps:
        getattr(budget, str(name))(*arguments)
        budget.check()


def test_three_places_credit_what_a_model_was_charged() -> None:
    """
    All of them know that the model is not in memory.
    """
    core = Path(whispercache.__file__).parent / "core"
    found = {
        function.name
        for path in core.glob("*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "budget.clear"
    }
    assert found == {"unloaded", "load_failed", "taken_back"}
