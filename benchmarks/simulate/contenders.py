"""
What is compared: this cache's rules, variants of them, and what others do.

The others run under the real planner too, with another order of victims.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from pieces import CARD, Model, Strategy

from whispercache.engine.sizes.architecture import ARCHITECTURES, layout
from whispercache.engine.sizes.footprint import estimate
from whispercache.keys import ModelKey
from whispercache.planning import planner as admission
from whispercache.planning.planner import MAX_OVERTAKES, Decision
from whispercache.planning.policies import POLICIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from traces import Request

    from whispercache.planning.planner import Pending, Planner
    from whispercache.planning.policies import Resident
    from whispercache.planning.room import Room

__all__ = [
    "CONTENDERS",
    "MODELS",
    "OWN_DISK_BYTES_PER_S",
    "WARM_BYTES_PER_S",
    "Slots",
    "on_disk",
    "overtaking",
    "slots",
    "with_bar",
    "without_drain",
    "without_keep",
]

_COMPUTE_TYPES = ("float16", "int8_float16")
_SIZES = (
    *("tiny", "base", "small", "medium", "large-v2", "large-v3"),
    *("large-v3-turbo", "distil-large-v3"),  # so far 16 models, of which 4 are alike
    *("tiny.en", "base.en", "small.en", "medium.en"),
)


_OPEN_S = 0.25

WARM_BYTES_PER_S = 6e9
"""
How fast a load takes a file out of the page cache and its weights to the card.

Source: page.py; read() takes the 145 MB of base out of the page cache at 12 GB/s, and a
copy to the card goes at 12 GB/s. On the CPU, the float32 files of tiny.en and base, 151
and 290 MB, load in 25 and 51 ms: 5.3 GB/s.
"""

OWN_DISK_BYTES_PER_S = 2.3e9
"""
How fast a disk can be: that of the machine all this was measured on.

Source: page.py; read() of base's 145 MB takes 62 ms after POSIX_FADV_DONTNEED.
"""


def _model(size: str, compute_type: str) -> Model:
    """
    What a model takes on a card, by the closed form.

    Source: the seconds are those of the earlier study: from
    a file at 0.6 GB/s, from host RAM at 12 GB/s. Files are float16 on the hub. From the
    page cache see `WARM_BYTES_PER_S`.
    """
    architecture = ARCHITECTURES[size]
    footprint = estimate(architecture, compute_type, CARD)
    file_bytes = sum(variable.nbytes for variable in layout(architecture))
    return Model(
        ModelKey(size, CARD, compute_type),
        footprint.weights_bytes,
        footprint.workspace_bytes,
        load_s=_OPEN_S + file_bytes / 0.6e9,
        restore_s=0.03 + footprint.weights_bytes / 12e9,
        file_bytes=file_bytes,
        read_s=file_bytes / 0.6e9,
        warm_load_s=_OPEN_S + file_bytes / WARM_BYTES_PER_S,
    )


def on_disk(model: Model, bytes_per_s: float) -> Model:
    """
    The same model, with its file on a disk of that speed.
    """
    read_s = model.file_bytes / bytes_per_s
    return replace(model, load_s=_OPEN_S + read_s, read_s=read_s)


MODELS = tuple(_model(size, each) for size in _SIZES for each in _COMPUTE_TYPES)
"""
Twenty-four real models; the first sixteen for what is compared to the optimum.
"""


# Orders of victims -------------------------------------------------------------------


_ALPHABET = {
    key: place for place, key in enumerate(sorted((m.key for m in MODELS), key=str))
}


def _alphabetical(resident: Resident, _now_s: float) -> float:
    """
    Ollama's order: shortest keep-alive first, then by name. Here all keep alike.
    """
    return _ALPHABET[resident.key]


def _smallest(resident: Resident, _now_s: float) -> float:
    """
    InvokeAI's order.
    """
    return resident.weights_bytes


# Planners ----------------------------------------------------------------------------


def without_keep(
    queue: Sequence[Pending],
    rooms: Mapping[str, Room],
    idle: Callable[[str], Iterable[Resident]],
    busy: Callable[[str], Iterable[Resident]],
) -> list[Decision]:
    """
    The real plan, but victims are all in order up to the last that is needed.
    """
    wanted = {key for pending in queue for key in pending.keys}
    gone: set[ModelKey] = set()
    decisions = []
    for decision in admission.plan(queue, rooms, idle, busy):
        needed = {victim.key for victim in decision.victims}
        victims = []
        for each in idle(CARD):
            if needed <= gone:
                break  # the keep pass never spares the last
            if each.key not in gone and (each.key in needed or each.key not in wanted):
                victims.append(each)
                gone.add(each.key)
        decisions.append(replace(decision, victims=tuple(victims)))
    return decisions


def overtaking(most: float) -> Planner:
    """
    The real plan, with *most* instead of `MAX_OVERTAKES`.
    """

    def plan(
        queue: Sequence[Pending],
        rooms: Mapping[str, Room],
        idle: Callable[[str], Iterable[Resident]],
        busy: Callable[[str], Iterable[Resident]],
    ) -> list[Decision]:
        seen = [
            replace(each, overtaken=MAX_OVERTAKES if each.overtaken >= most else 0)
            for each in queue
        ]
        return admission.plan(seen, rooms, idle, busy)

    return plan


def without_drain(
    queue: Sequence[Pending],
    rooms: Mapping[str, Room],
    idle: Callable[[str], Iterable[Resident]],
    busy: Callable[[str], Iterable[Resident]],
) -> list[Decision]:
    """
    The real plan, but nothing is kept back for anybody.
    """
    return [
        replace(decision, drain=())
        for decision in admission.plan(queue, rooms, idle, busy)
    ]


def with_bar(
    queue: Sequence[Pending],
    rooms: Mapping[str, Room],
    idle: Callable[[str], Iterable[Resident]],
    busy: Callable[[str], Iterable[Resident]],
) -> list[Decision]:
    """
    The real plan, but no load passes one that has lost its patience.
    """
    barring = [
        replace(pending, overtaken=MAX_OVERTAKES) if pending.impatient else pending
        for pending in queue
    ]
    return admission.plan(barring, rooms, idle, busy)


_LRU = POLICIES["lru"]

CONTENDERS: Mapping[str, Strategy] = {
    "LRU + keep": Strategy(),
    "gap": Strategy(POLICIES["gap"]),
    "LRU, no keep": Strategy(_LRU, without_keep),
    "LRU + keep, TTL 300": Strategy(keep_alive_s=300.0),
    "gap, TTL 300": Strategy(POLICIES["gap"], keep_alive_s=300.0),
    "Ollama's order": Strategy(_alphabetical, without_keep),
    "smallest first": Strategy(_smallest, without_keep),
}
"""
Rules, by name. The first is this cache's.
"""


# A number of slots -------------------------------------------------------------------


class Slots(NamedTuple):
    """
    How a run of `slots` went.

    Attributes:
        load_s: Seconds spent on loads.
        peak_bytes: The most that was held.
    """

    load_s: float
    peak_bytes: int


def slots(models: Sequence[Model], requests: Iterable[Request], n: int) -> Slots:
    """
    ``@lru_cache(maxsize=n)`` around the constructor, for one caller.

    The model that is dropped is still there while the next one loads, so at its peak it
    holds one more than its name says.
    """
    held: OrderedDict[int, Model] = OrderedDict()
    load_s, held_bytes, peak_bytes = 0.0, 0, 0
    for request in requests:
        model = models[request.model]
        if request.model not in held:
            load_s += model.load_s
            held_bytes += model.weights_bytes
        held[request.model] = model
        held.move_to_end(request.model)
        loading_bytes = held_bytes
        if len(held) > n:
            held_bytes -= held.popitem(last=False)[1].weights_bytes
        working_bytes = held_bytes + model.workspace_bytes
        peak_bytes = max(peak_bytes, loading_bytes, working_bytes)
    return Slots(load_s, peak_bytes)
