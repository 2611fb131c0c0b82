"""
The report: what was asked of whispercache on a card, beside what was seen there.

Tables are for people, in Markdown; a JSON file beside them has every row.
"""

from __future__ import annotations

import json
import re
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

from report import Table, machine, today

from gpu import parts, ways
from gpu.run import ASIDE, SIZES, cells_of
from whispercache.errors import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from gpu.run import Outcome, Row, Setup

    Cells = dict[str, Any]

PRETENDED = "PRETENDED: no card was used, and every figure here is made up."

LEAST_RETURNED = 0.97
MOST_OF_CROSSING = 1.5
LEAST_FASTER = 5.0
MOST_GROWTH = 0.01
MOST_ASTRAY = 0.10
LEAST_CYCLES = 100

# Targets ------------------------------------------------------------------------------


class Target(NamedTuple):
    """
    Something that was asked for; not measured unless something else is said.
    """

    asked: str
    seen: str = "not measured"
    reached: bool | None = None


def judge(rows: Sequence[Row]) -> list[Target]:
    times_s = seconds_of(rows)
    large_s = {m: s for m, s in times_s.items() if m.startswith(f"{SIZES[-1]} ")}
    sizes = cells_of(rows, parts.BYTES)
    cycles = cells_of(rows, parts.CYCLES)
    return [
        _returned(sizes),
        _ratio(
            f"a restore takes at most {MOST_OF_CROSSING} × the card's own copy of its "
            "bytes from pageable memory",
            _ratios(times_s, ways.RESTORE, ways.PAGEABLE),
            lambda ratio: ratio <= MOST_OF_CROSSING,
        ),
        _ratio(
            f"a restore of large-v3 is at least {LEAST_FASTER:g} × as fast as "
            "constructing it from files in the page cache",
            _ratios(large_s, ways.CONSTRUCT, ways.RESTORE),
            lambda ratio: ratio >= LEAST_FASTER,
        ),
        *(_growth(what, column, cycles) for what, column in _GAUGES.items()),
        _astray("weights", sizes),
        _astray("work", cells_of(rows, parts.WORK)),
    ]


def _returned(sizes: Sequence[Cells]) -> Target:
    asked = f"at least {LEAST_RETURNED:.0%} of the weights' bytes return at each unload"
    known = {e[""]: e["share returned"] for e in sizes if "share returned" in e}
    if not known:
        return Target(asked)
    worst = min(known, key=known.__getitem__)
    failed = "".join(f"; not {e['']}" for e in sizes if e[""] not in known)
    seen = f"{known[worst]:.1%} at worst ({worst}), {len(known)} sizes{failed}"
    return Target(asked, seen, known[worst] >= LEAST_RETURNED)


def _ratio(
    asked: str, ratios: Mapping[str, float], is_enough: Callable[[float], bool]
) -> Target:
    if not ratios:
        return Target(asked)
    seen = "; ".join(f"{name}: {ratio:.2f} ×" for name, ratio in ratios.items())
    return Target(asked, seen, all(map(is_enough, ratios.values())))


def seconds_of(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for cells in cells_of(rows, ways.TIERS):
        model, _, step = cells[""].partition(": ")
        if cells["median, s"] is not None:
            found.setdefault(model, {})[step] = cells["median, s"]
    return found


def _ratios(
    times_s: Mapping[str, Mapping[str, float]], one: str, other: str
) -> dict[str, float]:
    return {
        model: steps[one] / steps[other]
        for model, steps in times_s.items()
        if one in steps and steps.get(other)
    }


_GAUGES = {
    "the process's memory pool, loaded": "pool, loaded",
    "the card by its gauge, loaded": "gauge, loaded",
    "the card by its gauge, unloaded": "gauge, left",
    "anonymous memory of the host, unloaded": "host",
}


def growth(numbers: Sequence[int]) -> float | None:
    """
    Returns how far the last tenth is above the second, as a share; None below 10.

    The first tenth does not count: buffers and the like are made there, once.
    """
    tenth = len(numbers) // 10
    if not tenth:
        return None
    start = statistics.median(numbers[tenth : 2 * tenth])
    end = statistics.median(numbers[-tenth:])
    return end / start - 1 if start else None


def _growth(what: str, column: str, cycles: Sequence[Cells]) -> Target:
    asked = f"no growth above {MOST_GROWTH:.0%} over {LEAST_CYCLES} cycles: {what}"
    grown = growth([e[column] for e in cycles if e[column] is not None])
    if grown is None:
        return Target(asked)
    seen = f"{grown:+.2%} over {len(cycles)} cycles"
    is_enough = len(cycles) >= LEAST_CYCLES
    return Target(asked, seen, grown <= MOST_GROWTH if is_enough else None)


def _astray(what: str, each: Sequence[Cells]) -> Target:
    asked = f"bytes of {what} are predicted within {MOST_ASTRAY:.0%}"
    ratios = {
        e[""]: e["measured"] / e["predicted"]
        for e in each
        if e.get("measured") is not None and e["predicted"]
    }
    if not ratios:
        return Target(asked)
    low, high = (f(ratios, key=ratios.__getitem__) for f in (min, max))
    seen = (
        f"measured {ratios[low]:.2f} ({low}) to {ratios[high]:.2f} ({high}) "
        "of the prediction"
    )
    astray = max(abs(ratio - 1) for ratio in ratios.values())
    return Target(asked, seen, astray <= MOST_ASTRAY)


# Tables -------------------------------------------------------------------------------


def cell(value: object, head: str = "") -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, int):
        return f"-{format_bytes(-value)}" if value < 0 else format_bytes(value)
    if isinstance(value, float):
        return f"{value:.1%}" if head.startswith("share") else f"{value:.3f}"
    return "unknown" if value is None else str(value)


def tables(rows: Sequence[Row]) -> list[Table]:
    found = []
    for title in dict.fromkeys(row.table for row in rows):
        if title in (ASIDE, ways.SWITCHES, ways.PEAKS):
            continue
        own = cells_of(rows, title)
        head = list(dict.fromkeys(each for cells in own for each in cells))
        table = Table(title, head)
        # Of a hundred cycles, ten are enough to see by.
        for cells in own[:: len(own) // 10 or 1] if title == parts.CYCLES else own:
            table.add(*(cell(cells.get(each, ""), each) for each in head))
        found.append(table)
    found += [_switch_table(rows), _copy_table(seconds_of(rows))]
    return [table for table in found if table.rows]


def _switch_table(rows: Sequence[Row]) -> Table:
    switches, peaks = cells_of(rows, ways.SWITCHES), cells_of(rows, ways.PEAKS)
    names = list(dict.fromkeys(each["to"] for each in switches))
    heads = [h for name in names for h in (f"to {name}, s", "with an answer, s")]
    title = "Switches between two models, memory for one (float16, files in memory)"
    table = Table(title, ["", *heads, "peak, pool", "peak, gauge", "limit"])
    for contender in dict.fromkeys(each[""] for each in switches):
        own = [e for e in switches if e[""] == contender]
        counted = [e for e in own if int(e["number"]) >= len(names)]
        shown = []
        for name in names:
            for head in ("ready, s", "answer, s"):
                seconds = [e[head] for e in counted if e["to"] == name]
                shown.append(cell(statistics.median(seconds)) if seconds else "-")
        held = [e for e in peaks if e[""] == contender]
        for head in ("pool", "gauge", "limit"):
            numbers = [e[head] for e in held if e[head] is not None]
            shown.append(cell(max(numbers, default=None) or "none"))
        table.add(contender, *shown)
    return table


def _copy_table(times_s: Mapping[str, Mapping[str, float]]) -> Table:
    head = ["", "load, s", "restore, s", "ratio", "the copy costs, s"]
    table = Table("Copies on the host by default? What they gain and cost", head)
    steps = (ways.WARM, ways.RESTORE, ways.COPY, ways.LEAVE)
    for model, taken in times_s.items():
        if all(step in taken for step in steps):
            load_s, restore_s, copy_s, leave_s = (taken[step] for step in steps)
            ratio = f"{load_s / restore_s:.1f} ×"
            table.add(model, *map(cell, (load_s, restore_s, ratio, copy_s - leave_s)))
    return table


# The whole ----------------------------------------------------------------------------


def report(
    card: str, setup: Setup, outcomes: Mapping[str, Outcome], names: Sequence[str]
) -> str:
    rows = [row for each in outcomes.values() for row in each.rows]
    targets = Table("Asked of it, and seen", ["", "seen", "reached"])
    for asked, seen, reached in judge(rows):
        targets.add(asked, seen, "not measured" if reached is None else cell(reached))
    course = Table("Parts", ["", "s", "problem"])
    for name, outcome in outcomes.items():
        took_s = outcome.ended_s - outcome.started_s
        course.add(name, f"{took_s:.1f}", outcome.error or "none")
    for name in names:
        if name not in outcomes:
            course.add(name, "-", "not begun when this was written")
    opening = [PRETENDED] if setup.pretends else []
    whole = [*opening, f"{card}; {machine()}", targets, course, *tables(rows)]
    return "\n\n".join(map(str, whole)) + "\n"


def keep(
    folder: Path, text: str, card: str, setup: Setup, outcomes: Mapping[str, Outcome]
) -> list[Path]:
    """
    Writes a report and all rows to *folder*, over those of today; their paths.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    name = f"{'pretended-' * setup.pretends}gpu-{slug}-{today()}"
    each = {part: outcome._asdict() for part, outcome in outcomes.items()}
    whole = {"card": card, "pretended": setup.pretends, "parts": each}
    contents = {
        folder / f"{name}.md": f"# {name}\n\n{text}",
        folder / f"{name}.json": json.dumps(whole, indent=1) + "\n",
    }
    for path, written in contents.items():
        part = path.with_name(f"{path.name}.part")
        part.write_text(written, encoding="utf-8")
        part.replace(path)  # a run that is ended here leaves a whole file
    return list(contents)
