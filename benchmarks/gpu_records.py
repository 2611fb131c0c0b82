"""
What `gpu.py` measures: flat records, as the child processes print them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "Crossing",
    "Cycle",
    "Exit",
    "Held",
    "LastLine",
    "Look",
    "Machine",
    "Pair",
    "Peak",
    "Record",
    "Said",
    "Size",
    "Step",
    "Survival",
    "Switch",
    "Tier",
    "WarmUp",
    "Work",
    "dump",
    "of_type",
    "revive",
]


@dataclass(frozen=True, slots=True)
class Look:
    """
    Whether there is a card to measure on.

    Attributes:
        card: Its name; empty without one.
        cards: How many CTranslate2 sees.
        problem: Why not, in one line.
    """

    card: str
    cards: int
    problem: str


@dataclass(frozen=True, slots=True)
class Machine:
    """
    What the figures were made on.

    Attributes:
        name: Of a fact.
        value: The fact.
    """

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Crossing:
    """
    A copy between host and card, by the driver's own calls.

    Attributes:
        way: ``"to the card"`` or ``"to the host"``.
        memory: Which memory of the host: ``"pageable"``, ``"pinned"``, or ``"fresh"``
            for pageable memory that was never written to.
        n_bytes: What is copied.
        seconds: Median.
    """

    way: str
    memory: str
    n_bytes: int
    seconds: float

    @property
    def rate(self) -> float:
        """
        Bytes a second.
        """
        return self.n_bytes / self.seconds


@dataclass(frozen=True, slots=True)
class WarmUp:
    """
    The first load of a process.

    Attributes:
        process: ``"first"``, or ``"second"``: with the kernel cache that the first
            left.
        warm_up_s: Until the card was ready (`DeviceWarmedUp`).
        load_s: Of the load after it.
        answer_s: Of the first transcription.
        floor_bytes: What the process keeps of the card for its life, if measured.
        kernels_bytes: Size of the kernel cache at the end.
        reason: What the warm-up does here, in whispercache's words.
    """

    process: str
    warm_up_s: float
    load_s: float
    answer_s: float
    floor_bytes: int | None
    kernels_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Held:
    """
    What is held of a card at one moment.

    Attributes:
        used_bytes: In this process's memory pool, allocated; None without a pool.
        reserved_bytes: In the pool, allocated or not.
        peak_bytes: The most that was allocated in it since it was last asked to forget.
        gauge_bytes: What all programs hold together, by the gauge.
    """

    used_bytes: int | None
    reserved_bytes: int | None
    peak_bytes: int | None
    gauge_bytes: int


@dataclass(frozen=True, slots=True)
class Size:
    """
    One model, loaded, used, and unloaded.

    Attributes:
        size: Which.
        compute_type: What it computes in.
        weights_bytes: Of its tensors, by its file.
        predicted_bytes: What whispercache expected it to take.
        measured_bytes: What the load took, by whispercache.
        load_s: Of the load.
        returned_bytes: What came back at the unload, by whispercache.
        pool_bytes: How much more the pool held while the model was there than before.
        pool_left_bytes: How much more it held after the unload than before the load.
        gauge_bytes: As *pool_bytes*, by the gauge; others move that.
        gauge_left_bytes: As *pool_left_bytes*, by the gauge.
        error: Why the rest is not there.
    """

    size: str
    compute_type: str
    weights_bytes: int = 0
    predicted_bytes: int = 0
    measured_bytes: int | None = None
    load_s: float = 0.0
    returned_bytes: int | None = None
    pool_bytes: int | None = None
    pool_left_bytes: int | None = None
    gauge_bytes: int = 0
    gauge_left_bytes: int = 0
    error: str = ""

    @property
    def bytes(self) -> tuple[int | None, int]:
        """
        Measured and predicted.
        """
        return self.measured_bytes, self.predicted_bytes

    @property
    def returned_share(self) -> float | None:
        """
        The smallest share of the weights' bytes that anybody saw come back, at most 1.

        The gauge is asked only where there is no pool: it moves in steps of megabytes,
        and with other programs.
        """
        if self.error or not self.weights_bytes:
            return None
        left_bytes = self.gauge_left_bytes
        if self.pool_left_bytes is not None:
            left_bytes = self.pool_left_bytes
        shares = [1 - max(0, left_bytes) / self.weights_bytes]
        if self.returned_bytes is not None:
            shares.append(self.returned_bytes / self.weights_bytes)
        return min(1.0, *shares)


@dataclass(frozen=True, slots=True)
class Work:
    """
    What one transcription took besides the weights.

    Attributes:
        size: Of which model.
        compute_type: What it computes in.
        work: The beams and windows, in words.
        predicted_bytes: What whispercache sets aside for it.
        measured_bytes: Peak of the pool above what was allocated before.
        seconds: Of the transcription: one batch, as long as a text can be.
    """

    size: str
    compute_type: str
    work: str
    predicted_bytes: int
    measured_bytes: int
    seconds: float

    @property
    def bytes(self) -> tuple[int, int]:
        """
        Measured and predicted.
        """
        return self.measured_bytes, self.predicted_bytes


@dataclass(frozen=True, slots=True)
class Cycle:
    """
    One of many loads and unloads.

    Attributes:
        number: From 0.
        loaded: With the model there.
        left: After it has left.
        host_bytes: Anonymous memory of the process then.
    """

    number: int
    loaded: Held
    left: Held
    host_bytes: int


@dataclass(frozen=True, slots=True)
class Tier:
    """
    One way of a model into the card or out of it.

    Attributes:
        size: Which.
        compute_type: What it computes in.
        step: What was done; a line of `gpu_tiers`.
        seconds: Of each time.
        n_bytes: Of its weights, as they lie on the card.
        error: Why it could not be done.
    """

    size: str
    compute_type: str
    step: str
    seconds: tuple[float, ...]
    n_bytes: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Switch:
    """
    One switch from a model to another.

    Attributes:
        contender: Who did it.
        turn: In which process, from 0.
        number: Which of the process, from 0.
        to: The model.
        ready_s: Until the model was there.
        answer_s: Until its first answer.
    """

    contender: str
    turn: int
    number: int
    to: str
    ready_s: float
    answer_s: float


@dataclass(frozen=True, slots=True)
class Peak:
    """
    The most that a contender held of the card.

    Attributes:
        contender: Who.
        turn: In which process.
        pool_bytes: By its memory pool.
        gauge_bytes: By the gauge, right after each switch, above what was held before.
        limit_bytes: What it was told to keep to; 0 for nothing.
    """

    contender: str
    turn: int
    pool_bytes: int | None
    gauge_bytes: int
    limit_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LastLine:
    """
    A program is about to end.

    Attributes:
        at_s: When; of the system's monotonic clock.
    """

    at_s: float


@dataclass(frozen=True, slots=True)
class Exit:
    """
    How long a program took to end.

    Attributes:
        device: Where it had a model.
        program: Which, in words.
        whole_s: From its start to its end.
        exit_s: From its last line to its end.
        code: Its exit code.
    """

    device: str
    program: str
    whole_s: float
    exit_s: float
    code: int


@dataclass(frozen=True, slots=True)
class Survival:
    """
    A card that was too full on purpose.

    Attributes:
        case: What was tried, in words.
        raised: The error that the caller got; empty if none.
        evicted: Models that left for it.
        worked: Whether the caller got its model, or its answer.
        works_after: Whether the same works once there is room.
        idle_bytes: What the pool holds for nobody then, with all models gone.
    """

    case: str
    raised: str
    evicted: int
    worked: bool
    works_after: bool
    idle_bytes: int | None


@dataclass(frozen=True, slots=True)
class Pair:
    """
    One of two cards that worked at the same time.

    Attributes:
        device: Which.
        load_s: Of the load, beside the other's.
        alone_s: Of the load alone.
        answers: How often it answered beside the other.
        differing: How many of these were not what it had answered alone.
    """

    device: str
    load_s: float
    alone_s: float
    answers: int
    differing: int


@dataclass(frozen=True, slots=True)
class Step:
    """
    One step of parking a whole process outside of the card.

    Attributes:
        user: Who did it, to a process of its own.
        step: Which.
        seconds: How long it took.
        state: Of the process after it, by the driver.
        gauge_bytes: What the process holds of the card then, by the gauge.
        host_bytes: Its resident set then.
        error: What the driver refused, or whether the answer was another.
    """

    user: str
    step: str
    seconds: float
    state: str
    gauge_bytes: int
    host_bytes: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Said:
    """
    What a model answered.

    Attributes:
        text: That.
    """

    text: str


Record: TypeAlias = (
    Look
    | Machine
    | Crossing
    | WarmUp
    | Size
    | Work
    | Cycle
    | Tier
    | Switch
    | Peak
    | LastLine
    | Exit
    | Survival
    | Pair
    | Step
    | Said
)

_TYPES: dict[str, type[Record]] = {
    each.__name__: each
    for each in (
        *(Look, Machine, Crossing, WarmUp, Size, Work, Cycle, Tier, Switch, Peak),
        *(LastLine, Exit, Survival, Pair, Step, Said),
    )
}

_MARK = "record"
R = TypeVar("R")


def dump(record: Record) -> str:
    """
    A record in one line.
    """
    return json.dumps({_MARK: type(record).__name__, **asdict(record)})


def revive(line: str) -> Record | None:
    """
    The record in a line; None if that is something else, or only a part of it.
    """
    try:
        found = json.loads(line)
        kind = _TYPES[found.pop(_MARK)]
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    if kind is Cycle:
        found |= {name: Held(**found[name]) for name in ("loaded", "left")}
    if kind is Tier:
        found["seconds"] = tuple(found["seconds"])
    return kind(**found)


def of_type(records: Iterable[Record], kind: type[R]) -> list[R]:
    """
    Those of *records* that are of that type.
    """
    return [record for record in records if isinstance(record, kind)]
