"""
The exact optimum for a single caller: the fewest load seconds that any policy needs.

A program over sets. What may be in memory after a request is a set of models, so with
16 models there are 65,536 states, and each request is a handful of array operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pieces import Model

__all__ = ["MAX_MODELS", "least_load_s"]

MAX_MODELS = 16
"""
More would take 128 KiB of states, doubled for each, per request.
"""


def least_load_s(
    models: Sequence[Model], requests: Iterable[int], capacity_bytes: int
) -> float:
    """
    The fewest load seconds in which one caller's *requests* can be served in order.

    The entry of a set is the least cost so far after which at least that set is in
    memory. Whoever holds more can drop it for nothing, so entries never fall as sets
    grow, a model is dropped only when its room is needed, and nothing is loaded before
    it is asked for; none of that can cost more.

    Raises:
        ValueError: more than `MAX_MODELS`, or a model that never fits.
    """
    if len(models) > MAX_MODELS:
        raise ValueError(f"{len(models)} models: more than {MAX_MODELS}")
    held_bytes = np.zeros(1, dtype=np.int64)
    for model in models:
        held_bytes = np.concatenate([held_bytes, held_bytes + model.weights_bytes])
    too_many = [
        (held_bytes + model.workspace_bytes > capacity_bytes)
        .reshape(-1, 2, 1 << place)[:, 1, :]
        .copy()
        for place, model in enumerate(models)
    ]
    cost_s = np.full(held_bytes.shape, np.inf)
    cost_s[0] = 0.0
    last = -1
    for place in requests:
        if place == last:
            continue  # it is there, and so is the room for its work
        last = place
        pairs = cost_s.reshape(-1, 2, 1 << place)
        without, with_it = pairs[:, 0, :], pairs[:, 1, :]
        np.minimum(with_it, without + models[place].load_s, out=with_it)
        with_it[too_many[place]] = np.inf
        without[:] = with_it
    least_s = float(cost_s.min())
    if least_s == np.inf:
        raise ValueError("a model is larger than the memory")
    return least_s
