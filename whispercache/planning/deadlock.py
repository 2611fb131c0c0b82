"""
Deadlock: the waiting requests that no release of others can ever help.

It is the classic reduction of a resource graph: the leases of all owners that do not
wait are taken as ended; requests that fit then are taken as served, and their leases as
ended too; and so on. The requests that are left wait for memory that only their own
owners hold. Rules of fairness do not count here, only bytes and numbers of models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from whispercache.keys import ModelKey

Owner: TypeAlias = object
"""
A holder of leases, or one that waits for them: a token of a thread or of a task.
"""


@dataclass(frozen=True, slots=True)
class Model:
    """
    A model that is held or wanted.

    Attributes:
        key: The model.
        device: The device where it is.
        weights_bytes: Bytes that it takes while it is in memory.
        workers: The number of calls that it runs at a time.
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
        owner: Its holder.
        model: The model that is leased.
        workspace_bytes: Bytes that its calls take.
    """

    owner: Owner
    model: Model
    workspace_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """
    A request that waits.

    Attributes:
        owner: The one that waits.
        since_s: The time when it began to wait.
        parts: The models that it wants together, with the bytes of work on each.
        loading_bytes: Bytes that their loads take on top at the peak, by device.
    """

    owner: Owner
    since_s: float
    parts: tuple[tuple[Model, int], ...]
    loading_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ceiling:
    """
    The most that a device can hold.

    Attributes:
        n_bytes: Bytes by its limit.
        max_models: Models; None for any number.
        pinned: The pinned models there, which are not evicted.
        gauge_bytes: Bytes by its gauge, which may count the work of leases as taken;
            None where it cannot be read.
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
    Returns the claims that can never be served while their owners wait.

    Args:
        claims: All that wait.
        holds: All leases.
        ceilings: The devices.
        never: Owners that are assumed never to release anything.
    """
    left = [claim for claim in claims if claim.owner not in never]
    # Each round serves at least one, so there are no more rounds than claims.
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
    Returns the claim that completed a deadlock, the latest that did; None if there is
    no deadlock.
    """
    left = unserved(claims, holds, ceilings)
    holders = {hold.owner for hold in holds}
    suspects = sorted(
        (claim for claim in left if claim.owner in holders),
        key=lambda claim: claim.since_s,
    )
    # From the latest: without it, the others might have been served.
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
    Returns True if *claim* can be met while the leases in *kept* last, once those in
    *ended* have ended.
    """
    # By model and device: a leased model may have a copy on the host as well.
    models: dict[tuple[ModelKey, str], Model] = {}
    work: dict[tuple[ModelKey, str], list[int]] = {}
    for model, workspace_bytes in (
        *((hold.model, hold.workspace_bytes) for hold in kept),
        *claim.parts,
    ):
        place = model.key, model.device
        models[place] = model
        work.setdefault(place, []).append(workspace_bytes)
    devices = {model.device for model, _ in claim.parts}.union(claim.loading_bytes)
    for device in devices:
        ceiling = ceilings[device]
        there = {
            **{(model.key, device): model for model in ceiling.pinned},
            **{place: each for place, each in models.items() if place[1] == device},
        }
        n_bytes = claim.loading_bytes.get(device, 0) + sum(
            model.weights_bytes + _workspace(model, work.get(place, ()))
            for place, model in there.items()
        )
        # Models count as well as bytes, the pinned ones among them.
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
