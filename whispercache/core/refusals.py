"""
Refusals: the errors with which requests fail, and when a failed load is tried again.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from whispercache.errors import (
    DeviceUnavailable,
    LoadFailed,
    ModelTooLarge,
    WhisperCacheError,
    format_bytes,
)

from . import view

if TYPE_CHECKING:
    from whispercache.keys import ModelKey
    from whispercache.planning.room import Demand

    from .device import Device
    from .entries import Entry
    from .state import CacheState

FIRST_COOL_DOWN_S = 1.0
LAST_COOL_DOWN_S = 60.0
"""
Seconds without a try after a second load in a row failed; doubled from first to last.

The first failure costs nothing: many are over at the next try. A model that never loads
is tried 7 times in its first minute, and once a minute from then on.
"""


def cool_down_s(failures: int) -> float:
    """
    Returns the seconds without a try after so many loads in a row failed.
    """
    # Bounded, since a power of a thousand failures is no number of seconds.
    doublings = min(max(failures - 2, 0), 32)
    return min(FIRST_COOL_DOWN_S * (1 << doublings), LAST_COOL_DOWN_S)


def refusal(entry: Entry, now_s: float) -> WhisperCacheError | None:
    """
    Returns why a request for *entry* fails at once: its device was lost, or its loads
    failed again and again and it is not time to try yet. None if it does not.
    """
    if entry.device.lost_to is not None:
        return lost(entry.device)
    retry_in_s = entry.retry_at_s - now_s
    # More than there ever is: the clock was set back.
    is_cooling = 0 < retry_in_s <= LAST_COOL_DOWN_S
    if entry.failures and is_cooling and not entry.is_present:
        reason = f"{entry.failures} loads in a row failed: {entry.failure}"
        return LoadFailed(str(entry.key), reason, retry_in_s)
    return None


def lost(device: Device) -> DeviceUnavailable:
    """
    Returns why nothing can be had on a device that an error left unusable.
    """
    mend = "restart the process"
    if device.lost_to is not None and "illegal memory access" in device.lost_to:
        # Source: SYSTRAN/faster-whisper#946.
        mend += "; if it uses several GPUs, give each a process of its own"
    return DeviceUnavailable(
        device.name, f"an earlier error left it unusable ({device.lost_to}); {mend}"
    )


def too_large(
    state: CacheState, wanted: str, demand: Demand, reachable_bytes: int
) -> ModelTooLarge:
    """
    Returns why *demand* can never be met.
    """
    device = state.devices[demand.device]
    room = view.room(state, device)
    models = demand.models + demand.own_models
    limit_bytes = device.budget.limit_bytes
    n_bytes = demand.n_bytes + demand.own_bytes
    if demand.models and room.reachable_models() < models:
        reason = f"max_models is {room.max_models}"
        if models == 1:
            reason += ", and all of them are pinned"
        else:
            reason += f", of which {room.pinned_models} are pinned, and {models} "
            reason += "are wanted at once"
    # It would fit, were it not for what is pinned.
    elif n_bytes <= room.ceiling_bytes:
        reason = f"{format_bytes(room.pinned_bytes)} are pinned; unpin a model"
    elif limit_bytes is not None and n_bytes > limit_bytes:
        reason = "that is the limit; raise it, or choose a smaller model or type"
    else:
        reason = "other programs hold the rest; choose a smaller model or type"
    reachable_bytes += demand.own_bytes
    return ModelTooLarge(wanted, device.name, n_bytes, reachable_bytes, reason)


def load_error(key: ModelKey, error: BaseException, reason: str) -> BaseException:
    """
    Returns an error for one of several requests; each gets its own, with its own
    traceback.
    """
    if isinstance(error, WhisperCacheError):
        # The kind of error that the loader raised is what callers catch.
        own: WhisperCacheError = copy.copy(error)
    else:
        own = LoadFailed(str(key), reason)
    own.__cause__ = error
    return own


def one_line(error: BaseException) -> str:
    """
    Returns the text of an error without line breaks.
    """
    text = " ".join(str(error).split())
    return text or type(error).__name__
