"""
whispercache: the faster-whisper models you name, in the memory there is.

::

    from whispercache import get_model

    model = get_model("small", device="auto", compute_type="int8")
    segments, info = model.transcribe("talk.wav")
    for segment in segments:
        print(segment.text)

Each call finds its model in memory or loads it; idle models leave, for room or after a
while, and their memory is really returned. See `ModelCache` for limits of your own.
"""

from typing import TYPE_CHECKING

from .cache import ModelCache, default_cache, get_model
from .errors import (
    AudioError,
    CacheClosed,
    CacheForked,
    CorruptModel,
    DeviceUnavailable,
    LeaseDeadlock,
    LeaseTimeout,
    LoadFailed,
    ModelTooLarge,
    NotDownloaded,
    TooManyWaiters,
    UnknownModel,
    UnsupportedComputeType,
    WhisperCacheError,
)
from .events import (
    DeviceInfo,
    DeviceLost,
    Event,
    EvictionCause,
    Explanation,
    FellBack,
    ModelEvicted,
    ModelGranted,
    ModelInfo,
    ModelLoaded,
    ModelLoadFailed,
    ModelLoading,
    ModelStillReferenced,
    ReleaseUnconfirmed,
    Stats,
    WaitingInfo,
)
from .footprint import Footprint, Workload, footprint
from .keys import ModelKey
from .lease import Lease, Leases
from .model import CachedModel
from .version import __version__

if TYPE_CHECKING:
    from .aio import AsyncCachedModel, AsyncModelCache
    from .comparison import compare

__all__ = [
    "AsyncCachedModel",
    "AsyncModelCache",
    "AudioError",
    "CacheClosed",
    "CacheForked",
    "CachedModel",
    "CorruptModel",
    "DeviceInfo",
    "DeviceLost",
    "DeviceUnavailable",
    "Event",
    "EvictionCause",
    "Explanation",
    "FellBack",
    "Footprint",
    "Lease",
    "LeaseDeadlock",
    "LeaseTimeout",
    "Leases",
    "LoadFailed",
    "ModelCache",
    "ModelEvicted",
    "ModelGranted",
    "ModelInfo",
    "ModelKey",
    "ModelLoadFailed",
    "ModelLoaded",
    "ModelLoading",
    "ModelStillReferenced",
    "ModelTooLarge",
    "NotDownloaded",
    "ReleaseUnconfirmed",
    "Stats",
    "TooManyWaiters",
    "UnknownModel",
    "UnsupportedComputeType",
    "WaitingInfo",
    "WhisperCacheError",
    "Workload",
    "__version__",
    "compare",
    "default_cache",
    "footprint",
    "get_model",
]


if not TYPE_CHECKING:  # or any name at all would pass a type checker

    def __getattr__(name: str) -> object:
        # Importing asyncio takes a third of the time, and threads do without it.
        if name in ("AsyncCachedModel", "AsyncModelCache"):
            from . import aio

            return getattr(aio, name)
        if name == "compare":
            from .comparison import compare

            return compare
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
