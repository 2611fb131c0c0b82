"""
whispercache: the faster-whisper models you name, in the memory there is.

::

    from whispercache import get_model

    model = get_model("small", device="auto", compute_type="int8")
    segments, info = model.transcribe("talk.wav")
    for segment in segments:
        print(segment.text)

Each call finds its model in memory or loads it. Idle models are evicted after a while,
or when their memory is needed, and it is really returned. See `ModelCache` for limits
of your own.
"""

from typing import TYPE_CHECKING

from .errors import (
    AudioError,
    CacheClosed,
    CacheForked,
    CorruptModel,
    DeviceUnavailable,
    DownloadTimeout,
    EvictionTimeout,
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
from .version import __version__

if TYPE_CHECKING:
    from .aio import AsyncCachedModel
    from .async_cache import AsyncModelCache
    from .cache import ModelCache
    from .comparison import compare
    from .default import configure, default_cache, get_model
    from .devices.heap import use_huge_pages
    from .engine.audio.damage import AudioDamage
    from .engine.audio.decoder import Audio, read_audio
    from .engine.sizes.footprint import Footprint, Workload, footprint
    from .events import (
        DeviceInfo,
        DeviceLost,
        DeviceWarmedUp,
        DeviceWarmingUp,
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
        NoRoom,
        ReleaseUnconfirmed,
        Stats,
        WaitingInfo,
    )
    from .installing import install, installed, uninstall
    from .keys import ModelKey
    from .lease import Lease, Leases
    from .model import CachedModel

__all__ = [
    "AsyncCachedModel",
    "AsyncModelCache",
    "Audio",
    "AudioDamage",
    "AudioError",
    "CacheClosed",
    "CacheForked",
    "CachedModel",
    "CorruptModel",
    "DeviceInfo",
    "DeviceLost",
    "DeviceUnavailable",
    "DeviceWarmedUp",
    "DeviceWarmingUp",
    "DownloadTimeout",
    "Event",
    "EvictionCause",
    "EvictionTimeout",
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
    "NoRoom",
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
    "configure",
    "default_cache",
    "footprint",
    "get_model",
    "install",
    "installed",
    "read_audio",
    "uninstall",
    "use_huge_pages",
]


if not TYPE_CHECKING:  # or any name at all would pass a type checker
    # Imported when a name is first asked for: a program that imports this at its start
    # and needs it at its first request should not wait twice. All others of __all__ are
    # event classes.
    _LATER = {
        "AsyncCachedModel": "aio",
        "AsyncModelCache": "async_cache",
        "Audio": "engine.audio.decoder",
        "AudioDamage": "engine.audio.damage",
        "CachedModel": "model",
        "Footprint": "engine.sizes.footprint",
        "Lease": "lease",
        "Leases": "lease",
        "ModelCache": "cache",
        "ModelKey": "keys",
        "Workload": "engine.sizes.footprint",
        "compare": "comparison",
        "configure": "default",
        "default_cache": "default",
        "footprint": "engine.sizes.footprint",
        "get_model": "default",
        "install": "installing",
        "installed": "installing",
        "read_audio": "engine.audio.decoder",
        "uninstall": "installing",
        "use_huge_pages": "devices.heap",
    }

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        module = _LATER.get(name, "events")
        # Kept, so that this function is called once for each name.
        found = getattr(import_module(f".{module}", __name__), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
