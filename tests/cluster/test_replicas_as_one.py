"""
Several replicas shown as one, what they measure, and how many there should be.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from prometheus_client.core import CounterMetricFamily

from whispercache.ray.meter import WINDOW_S, Meter
from whispercache.ray.scaling import LOST_SHARE, gpus_for, wanted_replicas
from whispercache.ray.seen import merged_metrics, merged_snapshot
from whispercache.testing import FakeClock, settle
from whispercache.watch.live import Snapshot, Watch

if TYPE_CHECKING:
    from conftest import MakeCache

    from whispercache import ModelCache


def snapshot_of(cache: ModelCache, model: str, at_s: float) -> Snapshot:
    """
    What is seen of a cache that has loaded a model.
    """
    with Watch(cache, clock=lambda: at_s) as watch:
        cache.lease(model, "cuda:0").release()
        settle(cache)
        return watch.snapshot()


def test_all_replicas_are_in_one_snapshot(make_cache: MakeCache) -> None:
    """
    Each device and model with its replica, and events in their order.
    """
    parts = {
        "b": snapshot_of(make_cache(), "base", at_s=20.0),
        "a": snapshot_of(make_cache(), "small", at_s=10.0),
    }
    merged = merged_snapshot(30.0, parts)
    assert [each.device for each in merged.models] == ["a/cuda:0", "b/cuda:0"]
    assert [each.key.model for each in merged.models] == [
        "small:float16",
        "base:float16",
    ]
    assert {each.device for each in merged.models} <= {
        each.device for each in merged.devices
    }
    assert (merged.stats.loads, merged.stats.requests) == (2, 2)
    numbers = [each.number for each in merged.events]
    assert numbers == sorted(numbers)
    assert merged.events[0].model == "small:float16"
    assert merged.events[0].text.endswith("(a)")
    # As a page and `whispercache top` get it.
    text = json.dumps(merged.as_json())
    assert json.dumps(Snapshot.from_json(json.loads(text)).as_json()) == text


def test_figures_have_the_label_of_their_replica() -> None:
    """
    One family of a name, however many tell it.
    """

    def told(value: float) -> list[CounterMetricFamily]:
        family = CounterMetricFamily("loads", "Loads.", labels=["cache"])
        family.add_metric(["default"], value)
        return [family]

    loads, affinity = merged_metrics({"a": told(1), "b": told(2)}, 0.25)
    found = {each.labels["replica"]: each.value for each in loads.samples}
    assert found == {"a": 1, "b": 2}
    assert {each.labels["cache"] for each in loads.samples} == {"default"}
    assert [each.value for each in affinity.samples] == [0.25]


def test_calls_that_share_a_card_are_not_counted_twice() -> None:
    """
    Two calls that take two seconds side by side cost the card one second each.
    """
    clock = FakeClock()
    meter = Meter(clock.now)
    for _ in range(200):
        with meter.working("small"), meter.working("small"):
            clock.tick(2)
    assert meter.call_s == pytest.approx(1.0, abs=0.1)
    assert meter.calls_s == {"small": pytest.approx(1.0)}


def test_each_model_has_seconds_of_its_own() -> None:
    """
    Those of a long call that it shared with a short one are halved.
    """
    clock = FakeClock()
    meter = Meter(clock.now)
    with meter.working("large"):
        clock.tick(2)
        with meter.working("small"):
            clock.tick(1)
        clock.tick(2)
    # Nobody worked meanwhile.
    clock.tick(100)
    assert meter.calls_s == {"large": 4.5, "small": 0.5}
    with meter.working("small"):
        clock.tick(1.5)
    # Of late, with a tenth of the new one.
    assert meter.calls_s["small"] == pytest.approx(0.6)


def test_what_was_lost_fades() -> None:
    """
    Within minutes nothing is left of it.
    """
    clock = FakeClock()
    meter = Meter(clock.now)
    assert meter.lost_share == meter.busy_share == 0
    meter.waited(3)
    with meter.working("small"):
        clock.tick(1)
    assert meter.lost_share == pytest.approx(0.75, abs=0.01)
    assert 0 < meter.busy_share < 1
    clock.tick(10 * WINDOW_S)
    assert meter.lost_share == pytest.approx(0, abs=0.001)


@pytest.mark.parametrize(
    ("lost", "busy", "fill", "wanted"),
    [
        ([], [], [], 3),  # nothing is known yet
        ([0.0] * 3, [0.6] * 3, [1.0] * 3, 3),  # a good cache is full
        ([LOST_SHARE * 2, 0.1, 0.1], [0.9] * 3, [1.0] * 3, 4),
        ([0.0] * 3, [0.1] * 3, [0.5] * 3, 2),
        ([0.0] * 3, [0.1] * 3, [0.9] * 3, 3),  # it would not fit into two
        ([0.1] * 3, [0.1] * 3, [0.5] * 3, 3),  # loads still cost something
    ],
)
def test_pressure_adds_a_replica_and_idleness_takes_one(
    lost: list[float], busy: list[float], fill: list[float], wanted: int
) -> None:
    """
    Of three.
    """
    assert wanted_replicas(3, lost, busy, fill) == wanted


def test_the_last_replica_stays() -> None:
    """
    Whatever it does.
    """
    assert wanted_replicas(1, [0.0], [0.0], [0.0]) == 1


def test_the_share_of_a_card_is_told_by_the_models() -> None:
    """
    A part of a card, or whole ones.
    """
    small, all_ = (
        gpus_for("tiny", card="24GiB"),
        gpus_for("large-v3", "medium", "small", card="24GiB"),
    )
    assert 0 < small < all_ < 1
    assert gpus_for("large-v3", "large-v2", card="4GiB") == 2
    with pytest.raises(ValueError, match="must be bytes"):
        gpus_for("tiny", card="50%")
