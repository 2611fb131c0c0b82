"""
How many replicas there should be, and what share of a card one takes.
"""

from __future__ import annotations

import math
from statistics import mean
from typing import TYPE_CHECKING

from whispercache.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray.serve.config import AutoscalingContext

    from whispercache.units import LimitValue

LOST_SHARE = 0.25
"""
One replica more if requests spend a larger share of their time on waiting and loading.
"""

IDLE_SHARE = 0.5
"""
One replica less if those that stay would be busy for a smaller share of the time.
"""

CONTEXT_BYTES = 512 * 1024**2
"""
What a process takes of a card besides its models: CUDA's context and kernels.
"""

# Too little is lost to wait for a replica, which has to load its models, too.
_LITTLE = LOST_SHARE / 5


def by_pressure(
    ctx: AutoscalingContext,
) -> tuple[int, dict[str, object]]:
    """
    Returns the number of replicas that there should be: a policy for Ray's autoscaling.

    One more if loads and waiting eat more than `LOST_SHARE` of the requests' time. One
    less if they eat hardly any, the others would be busy for less than `IDLE_SHARE` of
    the time, and what is in memory would fit into them. How soon, Ray's
    ``upscale_delay_s`` and ``downscale_delay_s`` say.
    """
    told: Mapping[str, Mapping[object, float]] = ctx.aggregated_metrics or {}
    lost, busy, fill = (
        list(told.get(name, {}).values())
        for name in ("lost_share", "busy_share", "fill")
    )
    return wanted_replicas(ctx.current_num_replicas, lost, busy, fill), {}


def wanted_replicas(
    n: int, lost: Sequence[float], busy: Sequence[float], fill: Sequence[float]
) -> int:
    """
    Returns the number of replicas that there should be in place of *n*, by what each of
    them tells: the share of requests' time that waiting and loads took, the share of
    its own time that it was at work, and the share of its memory that is charged.
    """
    if not lost:  # none has told anything yet
        return n
    # One that is overrun is enough: requests wait there, or their model is there.
    if max(lost) > LOST_SHARE and mean(lost) > _LITTLE:
        return n + 1
    fits_fewer = n > 1 and sum(busy) < IDLE_SHARE * (n - 1) and sum(fill) <= n - 1
    return n - 1 if fits_fewer and mean(lost) < _LITTLE else n


def gpus_for(
    *models: str,
    card: LimitValue,
    compute_type: str = "float16",
) -> float:
    """
    Returns the share of a card that a replica needs to hold all *models* at once, for
    ``deployment(gpus=…)``: a whole number of hundredths, and of cards from 1 on.

    Args:
        models: As for `whispercache.footprint`.
        card: Bytes of one card, such as ``"24GiB"``.
        compute_type: That of all of them.

    Raises:
        ValueError: *card* is no number of bytes.
        WhisperCacheError: a model or its type does not exist.
    """
    from whispercache import footprint

    card_bytes = parse_bytes(card, "card")
    takes = [footprint(each, compute_type, "cuda") for each in models]
    # All at once, and one call; as more than one process pays for CUDA, so does each.
    needed_bytes = sum(each.weights_bytes for each in takes)
    needed_bytes += max((each.workspace_bytes for each in takes), default=0)
    share = (needed_bytes + CONTEXT_BYTES) / card_bytes
    # Ray shares single cards; of several, a process has whole ones.
    return math.ceil(share) if share > 1 else max(math.ceil(100 * share), 1) / 100
