"""
Deadlock: which waiting requests could be served if all who do not wait let go. Pure.

The classic reduction of a resource graph: take everybody who does not wait as done and
their leases as ended, serve whoever fits then, take those as done too, and so on. Who
is left when nothing moves any more waits for memory that only those can free who are
left.
Rules of fairness do not count here, only bytes and numbers of models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from whispercache.keys import ModelKey

__all__ = ["Ceiling", "Claim", "Hold", "Model", "Owner", "culprit", "unserved"]

Owner: TypeAlias = object
"""
Who holds leases or waits for them: a token of a thread or of a task.
"""


@dataclass(frozen=True, slots=True)
class Model:
    """
    A model that is held or wanted.

    Attributes:
        key: Which.
        device: Where.
        weights_bytes: What it takes while it is in memory.
        workers: How many calls it runs at a time.
    """

    key: ModelKey
    device: str
    weights_bytes: int
    workers: int = 1


@dataclass(frozen=True, slots=True)
class Hold:
    """
    A lease that is held.

    Attributes:
        owner: By whom.
        model: On which model.
        workspace_bytes: What its calls take.
    """

    owner: Owner
    model: Model
    workspace_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """
    A request that waits.

    Attributes:
        owner: Whose.
        since_s: Since when.
        parts: The models that it wants together, with the bytes of work on each.
        loading_bytes: What their loads take on top at the peak, by device.
    """

    owner: Owner
    since_s: float
    parts: tuple[tuple[Model, int], ...]
    loading_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ceiling:
    """
    What a device can hold.

    Attributes:
        n_bytes: By its limit.
        max_models: In models; None for any number.
        pinned: The models there that never leave by themselves.
        gauge_bytes: By its gauge, which may count the work of leases as taken; None
            where it cannot be read.
    """

    n_bytes: float
    max_models: int | None = None
    pinned: tuple[Model, ...] = ()
    gauge_bytes: int | None = None


def unserved(
    claims: Sequence[Claim],
    holds: Sequence[Hold],
    ceilings: Mapping[str, Ceiling],
    never: Collection[Owner] = (),
) -> tuple[Claim, ...]:
    """
    The claims that can never be served while their owners wait.

    Args:
        claims: All that wait.
        holds: All leases.
        ceilings: The devices.
        never: Owners taken for such as never let go, for the sake of the question.
    """
    left = [claim for claim in claims if claim.owner not in never]
    while left:
        waiting = {*never, *(claim.owner for claim in left)}
        kept = [hold for hold in holds if hold.owner in waiting]
        ended = [hold for hold in holds if hold.owner not in waiting]
        still = [claim for claim in left if not _fits(claim, kept, ended, ceilings)]
        if len(still) == len(left):
            break
        left = still
    return tuple(left)


def culprit(
    claims: Sequence[Claim], holds: Sequence[Hold], ceilings: Mapping[str, Ceiling]
) -> Claim | None:
    """
    The claim that closed a circle, the latest that did; None if there is no circle.
    """
    left = unserved(claims, holds, ceilings)
    holders = {hold.owner for hold in holds}
    suspects = sorted(
        (claim for claim in left if claim.owner in holders),
        key=lambda claim: claim.since_s,
    )
    for suspect in reversed(suspects):
        freed = [hold for hold in holds if hold.owner is not suspect.owner]
        after = unserved(claims, freed, ceilings)
        if len(after) < len(left):  # it, or somebody else, would get on
            return suspect
    return suspects[-1] if suspects else None


def _fits(
    claim: Claim,
    kept: Iterable[Hold],
    ended: Sequence[Hold],
    ceilings: Mapping[str, Ceiling],
) -> bool:
    """
    Whether *claim* can be met while the leases in *kept* last, once others have ended.
    """
    models: dict[ModelKey, Model] = {}
    work: dict[ModelKey, list[int]] = {}
    for hold in kept:
        models[hold.model.key] = hold.model
        work.setdefault(hold.model.key, []).append(hold.workspace_bytes)
    for model, workspace_bytes in claim.parts:
        models[model.key] = model
        work.setdefault(model.key, []).append(workspace_bytes)
    devices = {model.device for model, _ in claim.parts}.union(claim.loading_bytes)
    for device in devices:
        ceiling = ceilings[device]
        there = {
            **{model.key: model for model in ceiling.pinned},
            **{key: model for key, model in models.items() if model.device == device},
        }
        n_bytes = claim.loading_bytes.get(device, 0) + sum(
            model.weights_bytes + _workspace(model, work.get(key, ()))
            for key, model in there.items()
        )
        too_many = ceiling.max_models is not None and len(there) > ceiling.max_models
        most_bytes = ceiling.n_bytes
        if ceiling.gauge_bytes is not None:
            # Perhaps their work is what the gauge does not show as free.
            returned_bytes = sum(
                hold.workspace_bytes * hold.model.workers
                for hold in ended
                if hold.model.device == device
            )
            most_bytes = min(most_bytes, ceiling.gauge_bytes + returned_bytes)
        if n_bytes > most_bytes or too_many:
            return False
    return True


def _workspace(model: Model, sizes: Collection[int]) -> int:
    return max(sizes, default=0) * min(len(sizes), model.workers)
