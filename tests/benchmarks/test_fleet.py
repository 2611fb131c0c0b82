"""
A cluster in virtual time: the routing rule over the real scheduler.
"""

from __future__ import annotations

import random
import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "simulate"))

from cluster_models import CARD_BYTES, UNLIKE_CALLS_S
from fleet import (
    CLUSTER_MODELS,
    ROUTES,
    RULE,
    FleetReport,
    busy_trace,
    serve_all,
)


def served(way: str, seed: int, routers: int = 1) -> FleetReport:
    """
    How one of the ways served a trace.
    """
    dice = random.Random(seed)  # noqa: S311 - a trace, and no secret
    requests = list(busy_trace(dice, 400, cards=3))
    return serve_all(ROUTES[way](), requests, 3, routers)


@pytest.mark.parametrize("seed", range(3))
def test_the_rule_makes_few_loads_and_short_waits(seed: int) -> None:
    """
    Beside what Ray does by default, on the same trace; and a card is never too small.
    """
    rule, default = served(RULE, seed), served("shorter of two queues", seed)
    assert len(rule.took_s) == len(default.took_s) == 400
    # Each model is loaded once at least, if it was asked for.
    assert len(CLUSTER_MODELS) - 2 <= rule.loads <= 0.15 * default.loads
    assert rule.share_s(0.5) < 0.65 * default.share_s(0.5)
    assert max(rule.peak_bytes, default.peak_bytes) <= CARD_BYTES


def test_long_calls_are_not_taken_for_short_ones() -> None:
    """
    With models whose calls differ thirtyfold, the longest waits are shorter than by
    Ray's default, too.
    """
    shares = []
    for seed in range(4):
        dice = random.Random(seed)  # noqa: S311 - a trace, and no secret
        requests = list(busy_trace(dice, 300, 3, UNLIKE_CALLS_S))
        rule, default = (
            serve_all(ROUTES[way](), requests, 3)
            for way in (RULE, "shorter of two queues")
        )
        shares.append(rule.share_s(0.95) / default.share_s(0.95))
    assert statistics.mean(shares) < 1


def test_routers_that_do_not_talk_agree() -> None:
    """
    Each sees its own requests alone, and the models that are there.
    """
    loads = [served(RULE, seed=1, routers=routers).loads for routers in (1, 2, 3)]
    assert max(loads) <= 0.3 * served("shorter of two queues", seed=1).loads
