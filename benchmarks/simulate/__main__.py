"""
The cache's rules in virtual time, beside the optimum and beside what others do.

    python benchmarks/simulate [--trace FILE] [--write]

Sixteen or twenty-four real models, with the bytes that `whispercache.footprint` gives,
on one card with one loader. The workloads are described in traces.py; --trace adds one
from a CSV file with the columns t_seconds, key_id (24 keys, 0 the most popular) and
service_seconds. The decisions are those of `whispercache.core.scheduler`, by the same
code; simulation.py carries them out in virtual time, without threads or models.

A load reads the disk, but in the section on the page cache: there a file stays in host
RAM once it was read, by a load or ahead of one (measured: results/page-2026-11-23.md).

Everything is seeded: two runs print the same, but for the speed of the simulator.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).parents[1]))

from cells import SHARES, Cell, cells
from contenders import (
    CONTENDERS,
    MODELS,
    OWN_DISK_BYTES_PER_S,
    on_disk,
    overtaking,
    slots,
    with_bar,
    without_drain,
)
from contention import CALLERS, LOAD_S, LONGEST_LEASE_S, alternate, starve
from optimum import MAX_MODELS, least_load_s
from pieces import NOTHING, Host, Strategy
from report import Table, machine, write
from routed import cluster_tables
from simulation import Simulation, StrictFifo
from traces import WORKLOADS, read_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pieces import Report

EARLIER = {
    "LRU + keep": 1.58,
    "gap": 1.36,
    "LRU, no keep": 1.67,
    "LRU + keep, TTL 300": 1.97,
    "Ollama's order": 2.24,
    "smallest first": 2.56,
}
"""
What an earlier study found, with generators and sizes of its own.

Source: an earlier study of 105 cells, before this program.
"""

CITATION = (
    "azure: Azure Functions Trace 2019 (Azure/AzurePublicDataset, CC-BY 4.0), Shahrad "
    'et al., "Serverless in the Wild", USENIX ATC 2020; 24 functions of one day stand '
    "for models, times inside a minute and single durations are synthetic. Its seeds "
    "differ in which function is which model."
)


# Against the optimum -----------------------------------------------------------------


def ratios(
    all_cells: Sequence[Cell], contenders: Mapping[str, Strategy]
) -> dict[str, list[float]]:
    """
    Load seconds of a single caller as a ratio to the least possible, cell by cell.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for cell in all_cells:
        order = [request.model for request in cell.requests]
        least_s = least_load_s(cell.models, order, cell.capacity_bytes)
        for name, strategy in contenders.items():
            found[name].append(cell.alone(strategy).load_s / least_s)
    return found


def optimum_tables(all_cells: Sequence[Cell]) -> list[object]:
    """
    The mean ratio to the optimum: over all cells, by capacity, by workload.
    """
    found = ratios(all_cells, CONTENDERS)
    workloads = list(dict.fromkeys(cell.workload for cell in all_cells))
    shares = [f"{share:.0%}" for share in SHARES]
    table = Table(
        f"Load seconds of a single caller ÷ optimum, means of {len(all_cells)} cells",
        ["", "all", "earlier study", "worst", *shares, *workloads],
    )
    for name, values in found.items():
        by_place: dict[str, list[float]] = defaultdict(list)
        for cell, value in zip(all_cells, values, strict=True):
            by_place[f"{cell.share:.0%}"].append(value)
            by_place[cell.workload].append(value)
        places = [statistics.mean(by_place[place]) for place in (*shares, *workloads)]
        mean, *others = (
            f"{value:.2f}" for value in (statistics.mean(values), max(values), *places)
        )
        earlier = f"{EARLIER[name]:.2f}" if name in EARLIER else ""
        table.add(name, mean, earlier, *others)
    keep, plain = found["LRU + keep"], found["LRU, no keep"]
    worse = sum(a > b + 1e-9 for a, b in zip(keep, plain, strict=True))
    line = f"The keep pass made {worse} of {len(all_cells)} cells worse."
    return [table, line]


def slots_table(all_cells: Sequence[Cell]) -> Table:
    """
    Two slots, and bytes with the memory that two slots take at their peak.
    """
    table = Table(
        "Two slots, and bytes with as much memory as these hold at their peak; single "
        "caller, means over seeds",
        ["", "peak, GB", "slots, s/1,000", "bytes, s/1,000", "÷"],
    )
    rows: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for cell in all_cells:
        two = slots(cell.models, cell.requests, 2)
        same = Simulation(cell.models, two.peak_bytes, Strategy())
        ours = same.run(callers=[cell.requests])
        per_1000 = 1000 / len(cell.requests)
        rows[cell.workload].append(
            (two.peak_bytes / 1e9, two.load_s * per_1000, ours.load_s * per_1000)
        )
    for workload, values in rows.items():
        peak, slots_s, ours_s = map(statistics.mean, zip(*values, strict=True))
        row = (f"{peak:.1f}", f"{slots_s:.0f}", f"{ours_s:.0f}")
        table.add(workload, *row, f"{slots_s / ours_s:.2f}")
    return table


# Many callers ------------------------------------------------------------------------


def _measures(report: Report) -> list[str]:
    return [
        f"{report.stall_s_per_1000:.0f}",
        f"{report.hit_ratio:.1%}",
        f"{report.wait_s(0.5):.2f}",
        f"{report.wait_s(0.99):.2f}",
        f"{report.swaps_per_1000:.0f}",
        f"{report.peak_bytes / 1e9:.1f}",
    ]


MEASURES = ["stall s/1,000", "hits", "p50 s", "p99 s", "swaps/1,000", "peak GB"]


def together_tables(all_cells: Sequence[Cell]) -> list[object]:
    """
    Requests that come when they come, by workload and rules.
    """
    tables: list[object] = []
    for cell in all_cells:
        table = Table(
            f"{cell.workload}, {len(cell.models)} models, {len(cell.requests):,} "
            f"requests as they come, card {cell.share:.0%} of the weights",
            ["", *MEASURES],
        )
        for name, strategy in CONTENDERS.items():
            table.add(name, *_measures(cell.together(strategy)))
        fifo = StrictFifo(cell.models, cell.capacity_bytes, Strategy())
        table.add("LRU + keep, strict FIFO", *_measures(fifo.run(cell.requests)))
        weights_bytes = sum(model.weights_bytes for model in cell.models)
        for share in (0.5, 1.0):
            ram_bytes = int(share * weights_bytes)
            report = cell.together(Strategy(), Host(ram_bytes))
            table.add(f"LRU + keep, {share:.0%} in host RAM", *_measures(report))
        tables.append(table)
    return tables


def tier_table(all_cells: Sequence[Cell]) -> Table:
    """
    What host copies of everything are worth.
    """
    table = Table(
        "Stall without ÷ with host copies of everything; all seconds together, and the "
        "geometric mean of the cells",
        ["card", "single caller", "mean", "as they come", "mean"],
    )
    for share in SHARES:
        row = []
        chosen = [cell for cell in all_cells if cell.share == share]
        for way in (Cell.alone, Cell.together):
            pairs = [_with_and_without_s(way, cell) for cell in chosen]
            with_s, without_s = map(sum, zip(*pairs, strict=True))
            gains = [without_s / with_s for with_s, without_s in pairs]
            row += [without_s / with_s, statistics.geometric_mean(gains)]
        table.add(f"{share:.0%}", *(f"{value:.1f}" for value in row))
    return table


def _with_and_without_s(way: Callable[..., Report], cell: Cell) -> tuple[float, float]:
    ram_bytes = sum(model.weights_bytes for model in cell.models)
    with_copies = way(cell, Strategy(), Host(ram_bytes))
    return with_copies.stall_s_per_1000, way(cell, Strategy()).stall_s_per_1000


RULES: Mapping[str, Strategy] = {
    "as it is": Strategy(),
    **{
        f"overtakes ≤ {most}": Strategy(plan=overtaking(most))
        for most in (0, 4, math.inf)
    },
    "no load passes the impatient": Strategy(plan=with_bar),
    "nothing drained": Strategy(plan=without_drain),
    **{
        f"patience {patience_s} s": Strategy(patience_s=patience_s)
        for patience_s in (0, 15, 30, 60, math.inf)
    },
}


def rules_table(all_cells: Sequence[Cell], share: float) -> Table:
    """
    The rules for those who wait, and others in their place.
    """
    table = Table(
        f"Rules for those who wait, card {share:.0%} of the weights, requests as they "
        "come; means over all workloads",
        ["", "stall s/1,000", "÷ as it is", "p99 s", "longest s", "swaps/1,000"],
    )
    chosen = [cell for cell in all_cells if cell.share == share]
    first_s = 0.0
    for name, strategy in RULES.items():
        reports = [cell.together(strategy) for cell in chosen]
        stall_s = statistics.mean(report.stall_s_per_1000 for report in reports)
        first_s = first_s or stall_s
        row = (
            f"{stall_s:.0f}",
            f"{stall_s / first_s:.2f}",
            f"{statistics.mean(report.wait_s(0.99) for report in reports):.1f}",
            f"{max(max(report.longest_s) for report in reports):.0f}",
            f"{statistics.mean(report.swaps_per_1000 for report in reports):.0f}",
        )
        table.add(name, *row)
    return table


# The page cache ----------------------------------------------------------------------

PAGE_SHARES = (0.1, 0.25, 0.5, 1.0)
DISKS_BYTES_PER_S = (0.6e9, OWN_DISK_BYTES_PER_S)
STARTING = 100


def _page_stalls_s(
    cell: Cell, way: Callable[[Cell, Strategy, Host], Report], page_share: float
) -> list[float]:
    """
    Stall with no page cache, with one, with one that is filled at the start, and with
    one into which what somebody waits for is read.
    """
    page_bytes = int(page_share * cell.file_bytes)
    with_pages = Host(page_bytes=page_bytes)
    filled = Host(page_bytes=page_bytes, preloaded=cell.by_popularity)
    reading = Strategy(reads_ahead=True)
    reports = [
        way(cell, Strategy(), NOTHING),
        way(cell, Strategy(), with_pages),
        way(cell, Strategy(), filled),
        way(cell, reading, with_pages),
    ]
    return [report.stall_s_per_1000 for report in reports]


def page_table(all_cells: Sequence[Cell], disk_bytes_per_s: float, asked: str) -> Table:
    """
    What the kernel's page cache is worth, and what reading ahead adds to it.

    What is preloaded is there before the first request: who cannot wait for that gains
    less.
    """
    table = Table(
        f"Stall with files on a disk of {disk_bytes_per_s / 1e9:g} GB/s, {asked}; "
        f"medians of {len(all_cells)} cells: files that stayed in the page cache ÷ no "
        "page cache, then reading ahead ÷ that",
        [
            "page cache, of all files",
            *("single caller: no more", "÷ preloaded", "÷ read for who waits"),
            *("as they come: no more", "÷ preloaded", "÷ read for who waits"),
        ],
    )
    models = tuple(on_disk(model, disk_bytes_per_s) for model in MODELS)
    by_key = {model.key: model for model in models}
    chosen = [
        replace(cell, models=[by_key[model.key] for model in cell.models])
        for cell in all_cells
    ]
    for share in PAGE_SHARES:
        row = []
        for way in (Cell.alone, Cell.together):
            found = [_page_stalls_s(cell, way, share) for cell in chosen]
            for column, base in ((1, 0), (2, 1), (3, 1)):
                ratios_s = [stalls_s[column] / stalls_s[base] for stalls_s in found]
                row.append(f"{statistics.median(ratios_s):.2f}")
        table.add(f"{share:.0%}", *row)
    return table


def page_tables(all_cells: Sequence[Cell]) -> list[object]:
    """
    Slow disks and fast ones; the start, and all of it.
    """
    starts = [replace(each, requests=each.requests[:STARTING]) for each in all_cells]
    return [
        page_table(chosen, disk_bytes_per_s, asked)
        for disk_bytes_per_s in DISKS_BYTES_PER_S
        for chosen, asked in (
            (starts, f"the first {STARTING} requests"),
            (all_cells, "all requests"),
        )
    ]


# Contention --------------------------------------------------------------------------


def contention_tables() -> list[object]:
    """
    Starvation and throughput.
    """
    leases = f"leases of 1 to {LONGEST_LEASE_S:g} s, load {LOAD_S:g} s"
    starved = Table(
        f"How long one caller waits for a model: {CALLERS} others hammer two that fill "
        f"the card, 8 more come for a dozen that fit beside; {leases}",
        ["", "by the sixteen, s", "by all, s", "bound, s"],
    )
    patiences = {
        f"patience {patience_s:g} s": Strategy(patience_s=patience_s)
        for patience_s in (0.0, 5.0, 30.0, math.inf)
    }
    barred = Strategy(plan=with_bar, patience_s=5.0)
    rules = {**patiences, "patience 5 s, no load passes the impatient": barred}
    for name, strategy in rules.items():
        waits_s = [starve(strategy, crowd=crowd).longest_s[2] for crowd in (0, 8)]
        bound_s = strategy.patience_s + LONGEST_LEASE_S + LOAD_S
        starved.add(name, *(f"{wait_s:.2f}" for wait_s in waits_s), f"{bound_s:g}")
    turns = Table(
        "Sixteen callers of two models that do not fit together; leases of 0.5 to "
        f"1.5 s, load {LOAD_S:g} s",
        ["", *MEASURES[:-1], "requests/s"],
    )
    for randomly in (False, True):
        how = "by chance" if randomly else "in turn"
        rows = {"strict FIFO": alternate(Strategy(), strict=True, randomly=randomly)}
        for patience_s in (5.0, 15.0, 60.0):
            strategy = Strategy(patience_s=patience_s)
            rows[f"patience {patience_s:g} s"] = alternate(strategy, randomly=randomly)
        for name, report in rows.items():
            rate = f"{report.requests / report.end_s:.1f}"
            turns.add(f"{how}, {name}", *_measures(report)[:-1], rate)
    return [starved, turns]


# Speed -------------------------------------------------------------------------------


def speed_table(n: int) -> Table:
    """
    How long the simulator takes.
    """
    table = Table(
        "Speed of the simulator: zipf, 24 models, card 50% of the weights",
        ["", "requests", "elapsed s", "µs/request", "hits", "swaps/1,000"],
    )
    capacity_bytes = Cell("zipf", 0.5, MODELS, ()).capacity_bytes
    for name, times, part in (
        ("single caller", 1, 1),
        ("as they come, 0.4/s", 1, 1),
        ("as they come, 0.8/s", 2, 1),
        ("as they come, 1.6/s, too much for it", 4, 10),
    ):
        stream = islice(WORKLOADS["zipf"](random.Random(0), len(MODELS)), n // part)
        requests = (each._replace(at_s=each.at_s / times) for each in stream)
        simulation = Simulation(MODELS, capacity_bytes, Strategy())
        started_s = time.perf_counter()
        if name == "single caller":
            report = simulation.run(callers=[requests])
        else:
            report = simulation.run(requests)
        elapsed_s = time.perf_counter() - started_s
        table.add(
            name,
            f"{report.requests:,}",
            f"{elapsed_s:.0f}",
            f"{elapsed_s / report.requests * 1e6:.0f}",
            f"{report.hit_ratio:.1%}",
            f"{report.swaps_per_1000:.0f}",
        )
    return table


def main() -> None:
    """
    Simulate, print, and write if asked to.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--trace", type=Path, help="a CSV file; see above")
    parser.add_argument("--seeds", type=int, default=5, help="for each workload")
    parser.add_argument("--requests", type=int, default=2000, help="in each workload")
    parser.add_argument("--speed", type=int, default=50_000, help="requests of it")
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    options = parser.parse_args()
    started_s = time.perf_counter()
    trace = read_trace(options.trace) if options.trace else []

    sizes = {"n_requests": options.requests, "seeds": options.seeds}
    small = list(cells(trace, n_models=MAX_MODELS, **sizes))
    large = list(cells(trace, n_models=len(MODELS), **sizes))
    one_seed = {"n_requests": options.requests, "seeds": 1}
    firsts = list(cells(trace, n_models=len(MODELS), **one_seed))
    shown = [cell for cell in firsts if cell.share < SHARES[-1]]
    parts: list[object] = [
        *([CITATION] if trace else []),
        *optimum_tables(small),
        slots_table([cell for cell in small if cell.share == SHARES[0]]),
        tier_table(large),
        *page_tables(firsts),
        *contention_tables(),
        rules_table(large, SHARES[0]),
        *together_tables(shown),
        *cluster_tables(),
        speed_table(options.speed),
    ]
    parts.append(f"All of this took {time.perf_counter() - started_s:.0f} s.")
    write("simulate", [machine(), *parts], to_file=options.write)


if __name__ == "__main__":
    main()
