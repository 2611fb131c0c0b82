"""
Errors: every exception of whispercache.

::

    WhisperCacheError
    ├── UnknownModel(…, LookupError)            resolve: no such size, hub name or path
    ├── UnsupportedComputeType(…, ValueError)   resolve: the device lacks that type
    ├── DeviceUnavailable(…, RuntimeError)      resolve: no such device, or no driver
    ├── ModelTooLarge(…, MemoryError)           admit: can never fit
    ├── LeaseTimeout(…, TimeoutError)           wait: not served in time
    │   ├── DownloadTimeout                     wait: for its files, in a server
    │   └── EvictionTimeout                     evict, close: not unloaded in time
    ├── TooManyWaiters                          wait: refused at the door
    ├── LeaseDeadlock(…, RuntimeError)          wait: only the waiting could end it
    ├── LoadFailed                              load: the original error is its cause
    │   ├── NotDownloaded                       resolve: its files are not on this disk
    │   └── CorruptModel                        load: the files themselves are broken
    ├── AudioError(…, ValueError)               use: the audio cannot be decoded
    └── CacheClosed(…, RuntimeError)            any time after close()
        └── CacheForked                         in a child, after os.fork()

Each message is one line: the problem, the model, the numbers with their units, and the
next step. The same data are attributes, and every exception pickles. *model* is the
model's key as text, if nothing else is said.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "AudioError",
    "CacheClosed",
    "CacheForked",
    "CorruptModel",
    "DeviceUnavailable",
    "DownloadTimeout",
    "EvictionTimeout",
    "LeaseDeadlock",
    "LeaseTimeout",
    "LoadFailed",
    "ModelTooLarge",
    "NotDownloaded",
    "TooManyWaiters",
    "UnknownModel",
    "UnsupportedComputeType",
    "WhisperCacheError",
    "format_bytes",
]

_KIB = 1024
_MIB = 1024**2
_GIB = 1024**3


def format_bytes(n_bytes: int) -> str:
    """
    Returns *n_bytes* for people to read: ``"1.5 GiB"``, ``"144.1 MiB"``, ``"512 B"``.
    """
    # Differences are shown as well, so the size decides, not the sign.
    for unit, size in (("GiB", _GIB), ("MiB", _MIB), ("KiB", _KIB)):
        if abs(n_bytes) >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} B"


class WhisperCacheError(Exception):
    """
    The base of all errors that whispercache raises on purpose.
    """

    def __post_init__(self) -> None:
        # By position, as the default pickle makes an error anew. Only the fields:
        # subclasses of a user's own have other attributes besides.
        fields: tuple[str, ...] = getattr(self, "__match_args__", ())
        Exception.__init__(self, *(getattr(self, name) for name in fields))


@dataclass(eq=False, repr=False)
class UnknownModel(WhisperCacheError, LookupError):
    """
    The name is no known size, and no directory with a model is there.

    Attributes:
        model: The name or path that was asked for.
        reason: The places that were searched, and a name to try instead.
    """

    model: str
    reason: str

    def __str__(self) -> str:
        return f"unknown model {self.model!r}: {self.reason}"


@dataclass(eq=False, repr=False)
class UnsupportedComputeType(WhisperCacheError, ValueError):
    """
    The device has no arithmetic for this compute type, or no such type exists.

    Attributes:
        compute_type: The type that was asked for.
        device: The device, for example ``"cpu"`` or ``"cuda:0"``.
        supported: The types that the device does support, sorted.
    """

    compute_type: str
    device: str
    supported: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"compute type {self.compute_type!r} is not supported on {self.device}; "
            f"use one of {', '.join(self.supported)}, or 'default'"
        )


@dataclass(eq=False, repr=False)
class DeviceUnavailable(WhisperCacheError, RuntimeError):
    """
    The device does not exist here, or its driver or libraries cannot be used.

    Attributes:
        device: The device that was asked for.
        reason: The part that is missing, and how to mend it.
    """

    device: str
    reason: str

    def __str__(self) -> str:
        return f"device {self.device!r} cannot be used: {self.reason}"


@dataclass(eq=False, repr=False)
class ModelTooLarge(WhisperCacheError, MemoryError):
    """
    The request can never be served, so it fails at once and evicts nothing.

    Attributes:
        device: The device whose memory is too small.
        needed_bytes: Bytes that loading and one call would take there.
        capacity_bytes: Most bytes that the cache could use there.
        reason: The bound of the capacity, and the next step.
    """

    model: str
    device: str
    needed_bytes: int
    capacity_bytes: int
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.model} needs {format_bytes(self.needed_bytes)} on {self.device}, "
            f"of which at most {format_bytes(self.capacity_bytes)} can be had: "
            f"{self.reason}"
        )


@dataclass(eq=False, repr=False)
class LeaseTimeout(WhisperCacheError, TimeoutError):
    """
    The lease was not granted within its ``timeout_s``.

    A load that was already running goes on; its model will be there next time.

    Attributes:
        waited_s: Seconds waited.
        position: Place in the queue when time ran out, 1 for the next; None where it
            waited in none.
    """

    model: str
    waited_s: float
    position: int | None = None

    def __str__(self) -> str:
        # Downloads and evictions have no queue; pickles of version 0.1 say 0 for that.
        place = f" (place {self.position} in the queue)" if self.position else ""
        return (
            f"{self.model} could not be had within {self.waited_s:.2f} s{place}; "
            "release leases sooner, raise the limit, or wait longer with timeout_s"
        )


class DownloadTimeout(LeaseTimeout):
    """
    The model's files were not on this machine within the time that a request had.

    The download goes on; they will be there later.
    """

    def __str__(self) -> str:
        return (
            f"{self.model} was not downloaded within {self.waited_s:.2f} s; that goes "
            "on, so ask again later, or download it beforehand"
        )


class EvictionTimeout(LeaseTimeout):
    """
    The model was not unloaded within the ``timeout_s`` of an eviction or a close.
    """

    def __str__(self) -> str:
        return (
            f"{self.model} was not unloaded within {self.waited_s:.2f} s; release the "
            "leases on it, or consume or close its segments"
        )


@dataclass(eq=False, repr=False)
class TooManyWaiters(WhisperCacheError):
    """
    ``max_waiting`` requests wait already; this one was refused at the door.

    Attributes:
        waiting: Number of requests that wait.
    """

    model: str
    waiting: int

    def __str__(self) -> str:
        return (
            f"{self.model} was refused: {self.waiting} requests wait already; "
            "try again later, or raise max_waiting"
        )


@dataclass(eq=False, repr=False)
class LeaseDeadlock(WhisperCacheError, RuntimeError):
    """
    The request waited for memory that only its own caller could free, or callers that
    wait in the same way. None would ever have been served; the others go on.

    Attributes:
        held: The models on which the caller holds leases.
        own: True if the caller waited for its own leases to end, and nothing else.
    """

    model: str
    held: tuple[str, ...]
    own: bool = False

    def __str__(self) -> str:
        if self.own:
            return (
                f"{self.model} would wait for leases on {', '.join(self.held)} that "
                "only its caller can end; end them first (consume or close their "
                "segments), or say hand_over() where another thread ends them"
            )
        return (
            f"{self.model} waits for memory that only the holders of "
            f"{', '.join(self.held)} can free, and they wait too; end those leases "
            "first (consume or close their segments), or take all models at once with "
            "lease_many"
        )


@dataclass(eq=False, repr=False)
class LoadFailed(WhisperCacheError):
    """
    The model could not be downloaded or loaded; ``__cause__`` tells more.

    Attributes:
        reason: The problem, and the next step.
        retry_in_s: Seconds for which further requests fail at once, since loads failed
            again and again; None if the next one is tried.
    """

    model: str
    reason: str
    retry_in_s: float | None = None

    def __str__(self) -> str:
        return f"cannot load {self.model}: {self.reason}{self._again()}"

    def _again(self) -> str:
        if self.retry_in_s is None:
            return ""
        return f" (it will be tried again in {self.retry_in_s:.1f} s at the earliest)"


class NotDownloaded(LoadFailed):
    """
    A hub repository of unknown size is not on this disk, and was not to be downloaded.

    Attributes:
        model: The repository.
        reason: The next step.
    """


@dataclass(eq=False, repr=False)
class CorruptModel(LoadFailed):
    """
    A model's files are truncated, or are not what they should be.

    Attributes:
        model: Path of the file or directory.
        reason: The problem with it.
        cure: The next step.
    """

    cure: str = "delete it and download or convert it again"

    def __str__(self) -> str:
        return (
            f"the model in {self.model} is broken: {self.reason}; "
            f"{self.cure}{self._again()}"
        )


@dataclass(eq=False, repr=False)
class AudioError(WhisperCacheError, ValueError):
    """
    The audio could not be opened or decoded. No model was loaded for it.

    Where FFmpeg is to blame it is an error of `av.error`, too, as in faster-whisper.

    Attributes:
        audio: Path of the audio, or the type of the object.
        reason: The decoder's own words.
    """

    audio: str
    reason: str

    def __str__(self) -> str:
        return (
            f"cannot decode audio {self.audio}: {self.reason}; "
            "give a file that FFmpeg reads, or float32 samples (mono, 16 kHz)"
        )


class CacheClosed(WhisperCacheError, RuntimeError):
    """
    The cache was closed, before the request or while it waited.
    """

    def __init__(
        self, reason: str = "the cache is closed; make a new ModelCache"
    ) -> None:
        super().__init__(reason)


class CacheForked(CacheClosed):
    """
    The cache was used before this process was forked, and cannot be used in the child.

    A model's threads do not survive a fork, and CTranslate2 hangs without them.
    """

    def __init__(
        self,
        reason: str = (
            "models were loaded, or a GPU was looked for, before this process was "
            "forked, and that does not work in a child; do both after the fork, or "
            "start processes by 'spawn'"
        ),
    ) -> None:
        super().__init__(reason)
