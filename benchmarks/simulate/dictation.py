"""
Priority in virtual time: dictation beside a night's subtitles.

    python benchmarks/simulate/dictation.py [--write]

One card holds the model of the dictation or that of the subtitles. A worker, or
several, subtitles one film after the other, each for minutes, with large models;
somebody dictates a sentence now and then, and waits for it. The same requests, at the
same times, are served as if all were alike, and with the subtitles as batches, which
give their model back between two segments. The decisions are those of the real
scheduler.

Everything is seeded: two runs print the same.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).parents[1]))

from contenders import MODELS
from pieces import NOTHING, Host, Strategy
from report import Table, machine, write
from simulation import Simulation
from traces import Request

from whispercache.planning import priority

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pieces import Model, Report

NIGHT_S = 8 * 3600.0
SEGMENT_S = 2.0
"""
Work on one window of half a minute, at the most: large-v3 on a middling card.
"""

SEEDS = 3
PAUSES_S = (60.0, 180.0, 600.0)
HOSTS = {
    "disk": NOTHING,
    "page cache": Host(page_bytes=20_000_000_000, preloaded=(0, 1, 2)),
    "host copies": Host(ram_bytes=20_000_000_000),
}
LEVELS_S = (5.0, 15.0, 60.0, 300.0)


def _find(name: str, compute_type: str) -> Model:
    return next(
        model
        for model in MODELS
        if model.key.model == name and model.key.compute_type == compute_type
    )


def _films(
    dice: random.Random, models: Sequence[int], *, are_batches: bool
) -> Iterator[Request]:
    """
    A worker's films, as many as make a night of work, by one of *models* each.
    """
    done_s = 0.0
    while done_s < NIGHT_S:
        work_s = dice.uniform(120.0, 600.0)
        done_s += work_s
        model = dice.choice(models)
        if are_batches:
            batch = priority.LEVELS["batch"]
            yield Request(0.0, model, work_s, batch, SEGMENT_S)
        else:
            yield Request(0.0, model, work_s)


def _sentences(dice: random.Random, pause_s: float) -> Iterator[Request]:
    """
    Sentences that somebody dictates by the small model, all night.
    """
    at_s = dice.expovariate(1 / pause_s)
    while at_s < NIGHT_S:
        yield Request(at_s, 0, dice.uniform(0.3, 1.5))
        at_s += dice.expovariate(1 / pause_s)


def night(
    seed: int, pause_s: float, *, workers: int, host: Host, are_batches: bool
) -> Report:
    """
    Returns how one night went.
    """
    dictation, films = _find("medium", "float16"), _find("large-v3", "float16")
    draft = _find("large-v3", "int8_float16")
    models = [dictation, films, draft]
    capacity_bytes = films.weights_bytes + films.workspace_bytes
    simulation = Simulation(models, capacity_bytes, Strategy(), host)
    kinds = (1,) if workers == 1 else (1, 2)
    callers = [
        _films(random.Random(seed * 100 + n), kinds, are_batches=are_batches)
        for n in range(workers)
    ]
    sentences = _sentences(random.Random(seed), pause_s)
    return simulation.run(sentences, callers)


def p95_s(report: Report) -> float:
    """
    Returns the wait that 95 % of the sentences did not exceed.
    """
    waits_s = sorted(report.waits_by_model[0])
    return waits_s[math.ceil(0.95 * len(waits_s)) - 1]


def films_end_s(report: Report) -> float:
    """
    Returns when the last film was done.
    """
    return max(report.ends_by_model[1:])


def longest_film_wait_s(report: Report) -> float:
    """
    Returns the longest that a film waited for its beginning.
    """
    return max(wait_s for waits_s in report.waits_by_model[1:] for wait_s in waits_s)


def beside_table() -> Table:
    """
    Dictation beside subtitles, by how often somebody dictates.
    """
    table = Table(
        "Dictation (medium) beside a night's subtitles (large-v3) on a card that holds "
        f"one of them; medians of {SEEDS} nights, and the worst ratio of these",
        [
            "workers, pause between sentences, loads from",
            *("p95 today, s", "p95, s", "÷", "worst ÷", "longest, s"),
            *("throughput ÷ today's", "worst ÷", "stops", "loads' share of time"),
        ],
    )
    for workers, pause_s, where in itertools.product((1, 3), PAUSES_S, HOSTS):
        pairs = [
            [
                night(
                    seed,
                    pause_s,
                    workers=workers,
                    host=HOSTS[where],
                    are_batches=each,
                )
                for each in (False, True)
            ]
            for seed in range(SEEDS)
        ]
        waits = [(p95_s(before), p95_s(after)) for before, after in pairs]
        shares = [after_s / before_s for before_s, after_s in waits]
        rates = [films_end_s(before) / films_end_s(after) for before, after in pairs]
        loads = [after.load_s / films_end_s(after) for _, after in pairs]
        table.add(
            f"{workers}, {pause_s:g} s, {where}",
            *(f"{statistics.median(each):.1f}" for each in zip(*waits, strict=True)),
            f"{statistics.median(shares):.3f}",
            f"{max(shares):.3f}",
            f"{max(max(after.waits_by_model[0]) for _, after in pairs):.1f}",
            f"{statistics.median(rates):.3f}",
            f"{min(rates):.3f}",
            f"{statistics.median(after.stops for _, after in pairs):.0f}",
            f"{statistics.median(loads):.3f}",
        )
    return table


def levels_table() -> Table:
    """
    How much later than others a batch has its turn.
    """
    table = Table(
        "Seconds by which a batch goes as if it had come later: 3 workers, a sentence "
        f"a minute, loads from the disk; medians of {SEEDS} nights",
        [
            "",
            "p95 of sentences, s",
            "longest, s",
            "longest wait of a film, s",
            "end, h",
        ],
    )
    usual_s = priority.LEVEL_S
    for level_s in LEVELS_S:
        priority.LEVEL_S = level_s
        nights = [
            night(seed, 60.0, workers=3, host=NOTHING, are_batches=True)
            for seed in range(SEEDS)
        ]
        table.add(
            f"{level_s:g}",
            f"{statistics.median(map(p95_s, nights)):.1f}",
            f"{max(max(each.waits_by_model[0]) for each in nights):.1f}",
            f"{max(map(longest_film_wait_s, nights)):.0f}",
            f"{statistics.median(map(films_end_s, nights)) / 3600:.2f}",
        )
    priority.LEVEL_S = usual_s
    return table


def main() -> None:
    """
    Simulate, print, and write if asked to.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    options = parser.parse_args()
    parts = [machine(), beside_table(), levels_table()]
    write("priority", parts, to_file=options.write)


if __name__ == "__main__":
    main()
