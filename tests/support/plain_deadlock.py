"""
The plain reduction: what `whispercache.planning.deadlock` finds, added up anew for each
request in each round. Slow, and short enough to be seen right.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from whispercache.keys import ModelKey
    from whispercache.planning.deadlock import Ceiling, Claim, Hold, Model, Owner

__all__ = ["culprit", "detained", "fits", "unserved"]


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
        still = [claim for claim in left if not fits(claim, kept, ended, ceilings)]
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


def detained(
    claims: Sequence[Claim], holds: Sequence[Hold], ceilings: Mapping[str, Ceiling]
) -> list[Claim]:
    """
    Returns the claims whose owners hold leases that block another claim.
    """
    holders = {hold.owner for hold in holds}
    suspects = [c for c in claims if c.owner is not None and c.owner in holders]
    deadlocked = unserved(claims, holds, ceilings)
    staying: list[Owner] = []
    passing: list[Claim] = []
    # From the youngest: as many as possible keep to the order of arrival.
    for claim in reversed(suspects):
        never = [*staying, claim.owner]
        left = unserved(claims, holds, ceilings, never)
        if all(other in deadlocked for other in left):
            staying.append(claim.owner)
        else:
            passing.append(claim)
    return passing


def fits(
    claim: Claim,
    kept: Iterable[Hold],
    ended: Sequence[Hold],
    ceilings: Mapping[str, Ceiling],
) -> bool:
    """
    Returns True if *claim* can be met while the leases in *kept* last, once those in
    *ended* have ended.
    """
    kept = list(kept)
    leases = Counter((hold.model.key, hold.model.device) for hold in kept)
    if claim.parallel is not None and any(
        leases[model.key, model.device] >= claim.parallel for model, _ in claim.parts
    ):
        return False
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
