"""
A cluster in virtual time, by how requests are routed.

    python benchmarks/simulate/routed.py [--write]

Half a minute; `python benchmarks/simulate`, of which it is a part, takes longer.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).parents[1]))

from cluster_models import CALLS_S, CARD_BYTES, UNLIKE_CALLS_S
from fleet import ROUTES, RULE, FleetReport, busy_trace, serve_all
from report import Table, machine, parsed, write

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["cluster_tables"]

REPLICAS = 3
TRACES = 50
REQUESTS = 300


def cluster_tables() -> Iterator[Table]:
    """
    Three replicas with one card each, with calls that take about as long, or not.
    """
    for calls_s in (CALLS_S, UNLIKE_CALLS_S):
        traces = [
            list(busy_trace(random.Random(seed), REQUESTS, REPLICAS, calls_s))
            for seed in range(TRACES)
        ]
        table = Table(
            f"A cluster: {REPLICAS} cards of {CARD_BYTES / 2**30:.1f} GiB, models of "
            f"13.3 GiB, calls of {min(calls_s.values()):g} to "
            f"{max(calls_s.values()):g} s, busy by 58 % without loads; means of "
            f"{TRACES} traces of {REQUESTS} requests, and of the ratios to the first "
            "row the median, and what nine of ten traces do not exceed",
            ["", "routers", "loads/100", "÷", "p50, s", "p95, s", "÷", "most, GiB"],
        )
        ways = [(name, 1) for name in ROUTES]
        ways += [(RULE, 2), (RULE, 3)]
        usual: list[FleetReport] = []
        for name, routers in ways:
            start = ROUTES[name]
            reports = [serve_all(start(), each, REPLICAS, routers) for each in traces]
            usual = usual or reports
            table.add(name, f"{routers}", *_cells(reports, usual))
        yield table


def _cells(reports: list[FleetReport], usual: list[FleetReport]) -> Iterator[str]:
    pairs = list(zip(reports, usual, strict=True))
    mean = statistics.mean
    yield f"{mean(100 * each.loads / REQUESTS for each in reports):.1f}"
    yield _median_and_most([one.loads / other.loads for one, other in pairs])
    yield f"{mean(each.share_s(0.5) for each in reports):.2f}"
    yield f"{mean(each.share_s(0.95) for each in reports):.2f}"
    yield _median_and_most([a.share_s(0.95) / b.share_s(0.95) for a, b in pairs])
    yield f"{max(each.peak_bytes for each in reports) / 2**30:.1f}"


def _median_and_most(values: list[float]) -> str:
    nine_of_ten = sorted(values)[math.ceil(0.9 * len(values)) - 1]
    return f"{statistics.median(values):.2f}, {nine_of_ten:.2f}"


if __name__ == "__main__":
    options = parsed(__doc__)
    write("routed", [machine(), *cluster_tables()], to_file=options.write)
