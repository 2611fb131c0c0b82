"""
The report of `gpu.py`: tables from records, and the file with all of them.
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

from gpu_records import (
    Crossing,
    Cycle,
    Exit,
    Machine,
    Pair,
    Peak,
    Size,
    Step,
    Survival,
    Switch,
    Tier,
    WarmUp,
    Work,
    of_type,
)
from gpu_targets import judge, seconds_of
from gpu_tiers import COPY, LEAVE, RESTORE, WARM
from report import Table, _today, machine

from whispercache.errors import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from gpu_records import Record
    from gpu_run import Outcome, Setup

__all__ = ["keep", "report", "tables"]

PRETENDED = "PRETENDED: no card was used, and every figure here is made up."


class Shown(NamedTuple):
    """
    How records of one type are shown.

    Attributes:
        title: Above the table.
        head: Of its columns.
        kind: The records' type.
        row: The cells of a record.
    """

    title: str
    head: list[str]
    kind: type[Record]
    row: Callable[..., Sequence[str]]


def _bytes(n_bytes: int | None) -> str:
    if n_bytes is None:
        return "unknown"
    return f"-{format_bytes(-n_bytes)}" if n_bytes < 0 else format_bytes(n_bytes)


def _share(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


def _yes(is_so: bool | None) -> str:  # noqa: FBT001 - what is shown
    return {True: "yes", False: "NO", None: "not measured"}[is_so]


def _median_s(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.3f}" if seconds else "-"


def _size_row(each: Size) -> list[str]:
    if each.error:
        return [f"{each.size}: {each.error}", *[""] * 7]
    return [
        each.size,
        *map(_bytes, (each.weights_bytes, each.predicted_bytes, each.measured_bytes)),
        *map(_bytes, (each.returned_bytes, each.pool_left_bytes)),
        _bytes(each.gauge_left_bytes),
        _share(each.returned_share),
    ]


def _work_row(each: Work) -> list[str]:
    ratio = each.measured_bytes / each.predicted_bytes
    sizes = map(_bytes, (each.predicted_bytes, each.measured_bytes))
    return [f"{each.size}, {each.work}", *sizes, f"{ratio:.2f}", f"{each.seconds:.2f}"]


_SHOWN = (
    Shown("Machine", ["", ""], Machine, lambda e: [e.name, e.value]),
    Shown(
        "Copies between host and card, by the driver alone",
        ["", "bytes", "s", "GB/s"],
        Crossing,
        lambda e: [
            f"{e.way}, {e.memory} memory",
            *(_bytes(e.n_bytes), f"{e.seconds:.4f}", f"{e.rate / 1e9:.2f}"),
        ],
    ),
    Shown(
        "The first load of a process (tiny, float16)",
        ["", "warm-up, s", "load, s", "first answer, s", "floor", "kernel cache"],
        WarmUp,
        lambda e: [
            f"{e.process} process",
            *(f"{s:.2f}" for s in (e.warm_up_s, e.load_s, e.answer_s)),
            *map(_bytes, (e.floor_bytes, e.kernels_bytes)),
        ],
    ),
    Shown(
        "Bytes of models (float16): predicted, measured, returned, left behind",
        [
            *("", "weights", "predicted", "measured", "returned"),
            *("left, pool", "left, gauge", "share returned"),
        ],
        Size,
        _size_row,
    ),
    Shown(
        "Bytes of work (float16), texts as long as can be",
        ["", "predicted", "measured peak", "ratio", "s"],
        Work,
        _work_row,
    ),
    Shown(
        "Into the card and out of it",
        ["", "median s", "times", "bytes"],
        Tier,
        lambda e: [
            f"{e.size} {e.compute_type}: {e.step}{e.error and f' - {e.error}'}",
            *(_median_s(e.seconds), str(len(e.seconds)), _bytes(e.n_bytes)),
        ],
    ),
    Shown(
        "Ends of programs that used tiny",
        ["", "last line to end, s", "start to end, s", "exit code"],
        Exit,
        lambda e: [
            f"{e.device}: {e.program}",
            *(f"{e.exit_s:.2f}", f"{e.whole_s:.2f}", str(e.code)),
        ],
    ),
    Shown(
        "A card that another tenant fills",
        ["", "evicted", "got it", "works after", "idle in the pool", "raised"],
        Survival,
        lambda e: [
            *(e.case, str(e.evicted), _yes(e.worked), _yes(e.works_after)),
            *(_bytes(e.idle_bytes), e.raised or "nothing"),
        ],
    ),
    Shown(
        "A process with large-v3, parked by the driver from outside",
        ["", "s", "state after", "on the card", "on the host", "problem"],
        Step,
        lambda e: [
            f"user {e.user}: {e.step}",
            *(f"{e.seconds:.3f}", e.state),
            *(_bytes(e.gauge_bytes), _bytes(e.host_bytes), e.error or "none"),
        ],
    ),
    Shown(
        "Two cards at the same time",
        ["", "load, s", "load alone, s", "answers", "differing"],
        Pair,
        lambda e: [
            e.device,
            *(f"{e.load_s:.2f}", f"{e.alone_s:.2f}"),
            *(str(e.answers), str(e.differing)),
        ],
    ),
)


def tables(records: Sequence[Record]) -> list[Table]:
    """
    A table for each kind of record that there is.
    """
    found = []
    for shown in _SHOWN:
        table = Table(shown.title, shown.head)
        for record in of_type(records, shown.kind):
            table.add(*shown.row(record))
        if table.rows:
            found.append(table)
    if cycles := of_type(records, Cycle):
        found.append(_cycle_table(cycles))
    if switches := of_type(records, Switch):
        found.append(_switch_table(switches, of_type(records, Peak)))
    if tiers := of_type(records, Tier):
        found.append(_decision_table(tiers))
    return found


def _cycle_table(cycles: Sequence[Cycle]) -> Table:
    head = ["cycle", "pool, loaded", "pool, left", "gauge, loaded", "gauge, left"]
    table = Table("Loads and unloads of tiny, float16", [*head, "host"])
    for cycle in cycles[:: max(1, len(cycles) // 10)]:
        pools = cycle.loaded.reserved_bytes, cycle.left.reserved_bytes
        gauges = cycle.loaded.gauge_bytes, cycle.left.gauge_bytes
        table.add(str(cycle.number), *map(_bytes, (*pools, *gauges, cycle.host_bytes)))
    return table


def _switch_table(switches: Sequence[Switch], peaks: Sequence[Peak]) -> Table:
    """
    Without the first switch to each model.
    """
    names = list(dict.fromkeys(each.to for each in switches))
    heads = [h for name in names for h in (f"to {name}, s", "with an answer, s")]
    title = "Switches between two models, memory for one (float16, files in memory)"
    table = Table(title, ["", *heads, "peak, pool", "peak, gauge", "limit"])
    for contender in dict.fromkeys(each.contender for each in switches):
        own = [each for each in switches if each.contender == contender]
        cells = []
        for name in names:
            to = [each for each in own if each.to == name]
            counted = [each for each in to if each.number >= len(names)]
            cells.append(_median_s([each.ready_s for each in counted]))
            cells.append(_median_s([each.answer_s for each in counted]))
        held = [each for each in peaks if each.contender == contender]
        pools = [each.pool_bytes for each in held if each.pool_bytes is not None]
        gauges = [each.gauge_bytes for each in held]
        limits = [each.limit_bytes for each in held if each.limit_bytes]
        most = (max(numbers, default=None) for numbers in (pools, gauges))
        limit = _bytes(limits[0]) if limits else "none"
        table.add(contender, *cells, *map(_bytes, most), limit)
    return table


def _decision_table(tiers: Sequence[Tier]) -> Table:
    """
    What the copies on the host gain, and what they cost.
    """
    head = ["", "load, s", "restore, s", "ratio", "the copy costs, s", "host bytes"]
    table = Table("Copies on the host by default? What they gain and cost", head)
    models = {(tier.size, tier.compute_type): tier.n_bytes for tier in tiers}
    for (size, kind), n_bytes in models.items():
        load_s, restore_s, copy_s, leave_s = (
            seconds_of(tiers, size, kind, step) for step in (WARM, RESTORE, COPY, LEAVE)
        )
        if not load_s or not restore_s or copy_s is None or leave_s is None:
            continue
        table.add(
            f"{size} {kind}",
            *(f"{load_s:.3f}", f"{restore_s:.3f}", f"{load_s / restore_s:.1f} ×"),
            *(f"{copy_s - leave_s:.3f}", _bytes(n_bytes)),
        )
    return table


def report(
    card: str, setup: Setup, outcomes: Mapping[str, Outcome], names: Sequence[str]
) -> str:
    """
    The report in Markdown of what was measured so far, of parts of those *names*.
    """
    records = [record for each in outcomes.values() for record in each.records]
    targets = Table("Asked of it, and seen", ["", "seen", "reached"])
    for target in judge(records):
        targets.add(target.asked, target.seen, _yes(target.reached))
    course = Table("Parts", ["", "s", "problem"])
    for name, outcome in outcomes.items():
        took_s = outcome.ended_s - outcome.started_s
        course.add(name, f"{took_s:.1f}", outcome.error or "none")
    for name in names:
        if name not in outcomes:
            course.add(name, "-", "not begun when this was written")
    reasons = dict.fromkeys(each.reason for each in of_type(records, WarmUp))
    warm_up = [f"What the warm-up does here: {reason}." for reason in reasons]
    opening = [PRETENDED] if setup.pretends else []
    parts = [f"{card}; {machine()}", targets, course, *warm_up, *tables(records)]
    return "\n\n".join(map(str, [*opening, *parts])) + "\n"


def keep(
    folder: Path, text: str, card: str, setup: Setup, outcomes: Mapping[str, Outcome]
) -> list[Path]:
    """
    Write a report and all records to *folder*, over those of today, and return both.
    """
    name = f"gpu-{_slug(card)}-{_today()}"
    if setup.pretends:
        name = f"pretended-{name}"
    contents = {
        folder / f"{name}.md": f"# {name}\n\n{text}",
        folder / f"{name}.json": _everything(card, setup, outcomes),
    }
    for path, content in contents.items():
        part = path.with_name(f"{path.name}.part")
        part.write_text(content, encoding="utf-8")
        part.replace(path)  # whoever ends this leaves a whole one
    return list(contents)


def _slug(card: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def _everything(card: str, setup: Setup, outcomes: Mapping[str, Outcome]) -> str:
    parts = {
        name: {
            "seconds": outcome.ended_s - outcome.started_s,
            "error": outcome.error,
            "records": [
                {"record": type(record).__name__, **asdict(record)}
                for record in outcome.records
            ],
        }
        for name, outcome in outcomes.items()
    }
    whole = {"card": card, "pretended": setup.pretends, "parts": parts}
    return json.dumps(whole, indent=1) + "\n"
