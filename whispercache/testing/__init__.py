"""
Fakes with which a whole cache runs without a model, a GPU, or time passing.

::

    machine = FakeMachine({"cpu": "8GiB", "cuda:0": "4GiB"})
    loader = FakeLoader(machine, sizes={"small": "1GiB", "large-v3": "3GiB"})
    clock = FakeClock()
    with ModelCache(loader=loader, probe=machine, clock=clock) as cache:
        with cache.lease("small", "cuda"):
            ...
        clock.tick(300)
        settle(cache)
        assert not cache.models()

The fakes are strict: a model loaded twice, used after its unload, unloaded in use, or
loaded where there is no room raises, as it would crash or fail with the real thing.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import threading
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, cast

from whispercache.cache import ModelCache
from whispercache.devices.memory import MemoryReading
from whispercache.engine.api import LoadedModel, Released
from whispercache.engine.calls.signatures import signature_of
from whispercache.engine.files import ModelFiles
from whispercache.engine.sizes.footprint import Footprint
from whispercache.errors import DeviceUnavailable
from whispercache.keys import TYPICAL_COMPUTE_TYPES
from whispercache.units import parse_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
    from inspect import Signature

    import numpy as np
    from faster_whisper import WhisperModel
    from numpy.typing import NDArray

    from whispercache.aio import AsyncModelCache
    from whispercache.core.core import Core
    from whispercache.engine.api import AudioInput
    from whispercache.engine.sizes.footprint import Workload
    from whispercache.keys import ModelKey, OptionValue

__all__ = [
    "FakeClock",
    "FakeLoader",
    "FakeMachine",
    "FakeSegment",
    "FakeWhisper",
    "Gate",
    "check",
    "settle",
    "wait_until",
]

_PATIENCE_S = 30.0
_QUIET_PASSES = 2


class FakeClock:
    """
    A clock that stands still until `tick`.
    """

    def __init__(self, start_s: float = 1000.0) -> None:
        self._now_s = start_s
        # The garbage collector may end a lease in here, and that sets a timer.
        self._lock = threading.RLock()
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def now(self) -> float:
        """
        Seconds, as far as they were ticked.
        """
        return self._now_s

    def call_at(self, when_s: float, call: Callable[[], None]) -> None:
        """
        Run *call* within the `tick` that reaches *when_s*, even if that is now.
        """
        with self._lock:
            heapq.heappush(self._calls, (when_s, next(self._order), call))

    def tick(self, seconds: float = 0.0) -> None:
        """
        Let *seconds* pass, and run what falls due, in order, on this thread.
        """
        until_s = self._now_s + seconds
        while True:
            with self._lock:
                if not self._calls or self._calls[0][0] > until_s:
                    self._now_s = until_s
                    return
                when_s, _, call = heapq.heappop(self._calls)
                self._now_s = max(self._now_s, when_s)
            call()

    def close(self) -> None:
        """
        Forget all calls.
        """
        with self._lock:
            self._calls.clear()


class FakeMachine:
    """
    Devices with so much memory, some of it used by other programs. A `MemoryProbe`.

    Args:
        devices: Memory by device: bytes, or as in ``"10GiB"``.
    """

    def __init__(self, devices: Mapping[str, int | str]) -> None:
        self.total_bytes: dict[str, int] = {
            name: _n_bytes(size) for name, size in devices.items()
        }
        self.held_bytes: Counter[str] = Counter()
        self.others_bytes: Counter[str] = Counter()
        self.peak_bytes: Counter[str] = Counter()
        self.reading_fails: Exception | None = None
        self._lock = threading.Lock()

    def others(self, device: str, n_bytes: int | str) -> None:
        """
        Let other programs hold so much of *device* from now on.
        """
        self.others_bytes[device] = _n_bytes(n_bytes) if n_bytes else 0

    def cuda_devices(self) -> tuple[str, ...]:
        """
        The fake cards.
        """
        return tuple(name for name in self.total_bytes if name != "cpu")

    def read(self, device: str) -> MemoryReading:
        """
        What is free, truthfully; or the error of `reading_fails`.
        """
        if self.reading_fails is not None:
            # A new one: one that is kept would keep its callers' frames, and leases.
            raise copy.copy(self.reading_fails)
        if device not in self.total_bytes:
            raise DeviceUnavailable(device, f"there are {', '.join(self.total_bytes)}")
        return MemoryReading(self.total_bytes[device], self.free_bytes(device), "fake")

    def device_name(self, device: str) -> str:
        """
        Its name is its name.
        """
        return f"fake {device}"

    def device_id(self, device: str) -> str:
        """
        Likewise.
        """
        return f"fake-{device}"

    def free_bytes(self, device: str) -> int:
        """
        What nobody holds.
        """
        held_bytes = self.held_bytes[device] + self.others_bytes[device]
        return self.total_bytes[device] - held_bytes

    def used_bytes(self, device: str) -> int:
        """
        What anybody holds.
        """
        return self.total_bytes[device] - self.free_bytes(device)

    def take(self, device: str, n_bytes: int) -> None:
        """
        Allocate; as CTranslate2 does, with its error, where there is too little.
        """
        with self._lock:
            if n_bytes > self.free_bytes(device):
                raise RuntimeError("CUDA failed with error out of memory")
            self.held_bytes[device] += n_bytes
            self.peak_bytes[device] = max(
                self.peak_bytes[device], self.held_bytes[device]
            )

    def give_back(self, device: str, n_bytes: int) -> None:
        """
        Free what was allocated.
        """
        with self._lock:
            self.held_bytes[device] -= n_bytes
            assert self.held_bytes[device] >= 0, f"{device}: freed twice"


@dataclass(frozen=True, slots=True)
class FakeSegment:
    """
    A piece of a fake transcription: its text is the key of the model that spoke.
    """

    text: str
    start: float = 0.0
    end: float = 1.0


class FakeWhisper:
    """
    Stands for a WhisperModel. Any use after its unload raises.
    """

    def __init__(self, key: ModelKey, segments: int = 3) -> None:
        self.key = key
        self.segments = segments
        self.is_loaded = True
        self.calls: int = 0

    def transcribe(
        self, audio: object, language: str | None = None, **options: object
    ) -> tuple[Iterator[FakeSegment], dict[str, object]]:
        """
        As lazy as the real one: segments are made while they are iterated over.
        """
        self._check()
        info = {"language": language or "en", "audio": audio, **options}
        return self._speak(), info

    def _speak(self) -> Iterator[FakeSegment]:
        for second in range(self.segments):
            self._check()
            yield FakeSegment(str(self.key), second, second + 1)

    def detect_language(
        self, audio: object = None, **_options: object
    ) -> tuple[str, float, list[tuple[str, float]]]:
        """
        It is always English.
        """
        self._check()
        del audio
        return "en", 1.0, [("en", 1.0)]

    def _check(self) -> None:
        self.calls += 1
        if not self.is_loaded:
            raise RuntimeError(f"{self.key} was used after its unload")


# Whatever a test puts in place of its methods.
_SIGNATURES: Mapping[str, Signature] = {
    "transcribe": signature_of(FakeWhisper.transcribe),
    "batched": signature_of(FakeWhisper.transcribe),
    "detect_language": signature_of(FakeWhisper.detect_language),
}


class Gate:
    """
    Holds a load or an unload until it is opened.

    Attributes:
        reached: Set when something stands before the gate.
    """

    def __init__(self) -> None:
        self.reached: threading.Event = threading.Event()
        self._open = threading.Event()

    def open(self) -> None:
        """
        Let all pass from now on.
        """
        self._open.set()

    def wait_reached(self) -> None:
        """
        Block until something stands before the gate.
        """
        assert self.reached.wait(_PATIENCE_S), "nothing came to the gate"

    def pass_through(self) -> None:
        """
        Stand before the gate, and pass when it is open.
        """
        self.reached.set()
        assert self._open.wait(_PATIENCE_S), "the gate was never opened"


@dataclass(slots=True)
class FakeLoader:
    """
    Loads `FakeWhisper` models into the memory of a `FakeMachine`.

    Attributes:
        machine: Where the memory is.
        sizes: Weights by canonical model name: bytes, or as in ``"1GiB"``.
        default_size: Weights of all others.
        workspace_bytes: What each call takes, times its ``batch_size``.
        loading_factor: Peak while loading, as a multiple of the weights.
        load_s: Seconds that a load takes, by a fake clock; see `clock`.
        clock: Ticked by *load_s* during each load, if given.
        saved_compute_type: The type of all files.
        missing: Names that have to be "downloaded" first.
        fail_loads: By model name, errors for its next loads, the first first.
        refuse_unloads: So many unloads to come will silently do nothing.
        shell_size: What each model that has left leaves on the host, ``"cpu"``.
        warm_up_reason: What each card says that it does before its first model in a
            type; nothing is done if it is empty.
        warm_up_s: Seconds that that takes, by a fake clock; see `clock`.
        floor_size: What it keeps of a card.
        kept_size: What each unload from a card will not give back.
        loads: How often each model was loaded.
        unloads: How often each was unloaded.
        downloads: How often each was downloaded.
        resident: What is in memory.
        shells: What models that have left left, copies of weights included.
        copies: Copies of weights that are on a card as well.
        abandoned_bytes: What models on lost devices hold for ever.
        warm: Devices and types that have been warmed up.
        read_files: How often each directory was read.
        read_ahead_files: How often each was asked to be read ahead.
    """

    machine: FakeMachine
    sizes: Mapping[str, int | str] = field(default_factory=dict)
    default_size: int | str = "1GiB"
    workspace_bytes: int = 0
    loading_factor: float = 1.0
    host_loading_bytes: int = 0
    load_s: float = 0.0
    clock: FakeClock | None = None
    saved_compute_type: str = "float16"
    missing: set[str] = field(default_factory=set)
    fail_loads: dict[str, list[BaseException]] = field(
        default_factory=lambda: defaultdict(list)
    )
    refuse_unloads: int = 0
    shell_size: int | str = 0
    warm_up_reason: str = ""
    warm_up_s: float = 0.0
    floor_size: int | str = 0
    kept_size: int | str = 0
    loads: Counter[str] = field(default_factory=Counter)
    unloads: Counter[str] = field(default_factory=Counter)
    downloads: Counter[str] = field(default_factory=Counter)
    resident: dict[ModelKey, FakeWhisper] = field(default_factory=dict)
    remembered: list[tuple[ModelKey, int]] = field(default_factory=list)
    remembered_work: list[tuple[str, int, int]] = field(default_factory=list)
    shells: dict[ModelKey, int] = field(default_factory=dict)
    copies: dict[ModelKey, int] = field(default_factory=dict)
    abandoned_bytes: Counter[str] = field(default_factory=Counter)
    warm: list[tuple[str, str]] = field(default_factory=list)
    _parked: dict[ModelKey, int] = field(default_factory=dict)
    read_files: Counter[str] = field(default_factory=Counter)
    read_ahead_files: Counter[str] = field(default_factory=Counter)
    _load_gates: dict[str, Gate] = field(default_factory=dict)
    _unload_gates: dict[str, Gate] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def holding_loads(self, model: str) -> Iterator[Gate]:
        """
        Hold loads of *model* before a gate, until the end of the block at the latest.
        """
        gate = self._load_gates[model] = Gate()
        try:
            yield gate
        finally:
            del self._load_gates[model]
            gate.open()

    @contextmanager
    def holding_unloads(self, model: str) -> Iterator[Gate]:
        """
        Hold unloads of *model* before a gate, until the end of the block at the latest.
        """
        gate = self._unload_gates[model] = Gate()
        try:
            yield gate
        finally:
            del self._unload_gates[model]
            gate.open()

    def devices(self) -> tuple[str, ...]:
        """
        Those of the machine.
        """
        return tuple(self.machine.total_bytes)

    def supported_compute_types(self, device: str) -> frozenset[str]:
        """
        What such a device typically supports.
        """
        return TYPICAL_COMPUTE_TYPES[device.partition(":")[0]]

    def locate(
        self, model: str, options: Mapping[str, OptionValue], *, download: bool
    ) -> ModelFiles | None:
        """
        Files that are here, or become so by a download.
        """
        del options
        with self._lock:
            if model in self.missing:
                if not download:
                    return None
                self.missing.discard(model)
                self.downloads[model] += 1
        return ModelFiles(f"fake/{model}", self.saved_compute_type)

    def choose(self, key: ModelKey, files: ModelFiles) -> ModelFiles:
        """
        There are no others.
        """
        del key
        return files

    def remember_work(
        self, device: str, predicted_bytes: int, measured_bytes: int
    ) -> None:
        """
        Note it.
        """
        self.remembered_work.append((device, predicted_bytes, measured_bytes))

    def read_ahead(self, files: ModelFiles) -> None:
        """
        Note it.
        """
        self.read_ahead_files[files.directory] += 1

    def read(self, files: ModelFiles) -> None:
        """
        Note it.
        """
        self.read_files[files.directory] += 1

    def footprint(
        self, key: ModelKey, files: ModelFiles, workload: Workload
    ) -> Footprint:
        """
        The size that was given, whatever the compute type.
        """
        del files
        weights_bytes = _n_bytes(self.sizes.get(key.model, self.default_size))
        return Footprint(
            weights_bytes=weights_bytes,
            workspace_bytes=self.workspace_bytes * workload.batch_size,
            loading_bytes=int(weights_bytes * self.loading_factor),
            host_loading_bytes=0 if key.device == "cpu" else self.host_loading_bytes,
        )

    def remember(self, key: ModelKey, files: ModelFiles, measured_bytes: int) -> None:
        """
        Note that a measurement was offered.
        """
        del files
        self.remembered.append((key, measured_bytes))

    def load(self, key: ModelKey, files: ModelFiles) -> LoadedModel:
        """
        Take the memory, or raise.
        """
        if gate := self._load_gates.get(key.model):
            gate.pass_through()
        if self.clock is not None and self.load_s:
            self.clock.tick(self.load_s)
        if errors := self.fail_loads.get(key.model):
            raise errors.pop(0)
        assert key not in self.resident, f"{key} was loaded twice"
        n_bytes = _n_bytes(self.sizes.get(key.model, self.default_size))
        copy_bytes = self._parked.pop(key, 0)
        if shell_bytes := self.shells.pop(key, 0):
            self.machine.give_back("cpu", shell_bytes)
        self.machine.take(key.device, n_bytes)
        if copy_bytes:
            self.machine.take("cpu", copy_bytes)
            self.copies[key] = copy_bytes
        whisper = FakeWhisper(key)
        self.resident[key] = whisper
        self.loads[key.model] += 1
        return LoadedModel(
            key=key,
            files=files,
            whisper=cast("WhisperModel", whisper),
            compute_type=key.compute_type,
            is_multilingual=not key.model.endswith(".en"),
            supported_languages=("en",),
            measured_bytes=n_bytes,
            restored=copy_bytes > 0,
            copy_bytes=copy_bytes,
        )

    def warm_up_needed(self, key: ModelKey) -> str:
        """
        The reason that was given, for each card and type once.
        """
        is_warm = (key.device, key.compute_type) in self.warm
        return "" if key.device == "cpu" or is_warm else self.warm_up_reason

    def warm_up(self, key: ModelKey) -> int | None:
        """
        Take the floor, the first time.
        """
        if errors := self.fail_loads.get(f"warm-up of {key.device}"):
            raise errors.pop(0)
        if self.clock is not None and self.warm_up_s:
            self.clock.tick(self.warm_up_s)
        is_first = all(device != key.device for device, _ in self.warm)
        self.warm.append((key.device, key.compute_type))
        if not is_first:
            return None
        floor_bytes = _n_bytes(self.floor_size) if self.floor_size else 0
        self.machine.others_bytes[key.device] += floor_bytes
        return floor_bytes

    def parked(self) -> Mapping[ModelKey, int]:
        """
        Copies of weights that have left.
        """
        return dict(self._parked)

    def forget(self, key: ModelKey) -> None:
        """
        Drop what a model left.
        """
        self._parked.pop(key, 0)
        if shell_bytes := self.shells.pop(key, 0):
            self.machine.give_back("cpu", shell_bytes)

    def follow_up(self, loaded: LoadedModel) -> None:
        """
        There is nothing to do.
        """

    def shell_bytes(self) -> int:
        """
        What the shells take.
        """
        return sum(list(self.shells.values()))

    def shrink_shells(self, most_bytes: int, but: Collection[ModelKey] = ()) -> None:
        """
        Drop shells, the oldest first.
        """
        most_bytes += sum(self.shells.get(each, 0) for each in but)
        for key in [each for each in self.shells if each not in but]:
            if self.shell_bytes() > most_bytes:
                self.forget(key)

    def abandon(self, loaded: LoadedModel) -> None:
        """
        Its memory stays taken.
        """
        key = loaded.key
        del self.resident[key]
        n_bytes = _n_bytes(self.sizes.get(key.model, self.default_size))
        self.abandoned_bytes[key.device] += n_bytes
        self.abandoned_bytes["cpu"] += self.copies.pop(key, 0)

    def lost(self, device: str) -> None:
        """
        Copies of models of *device* stay taken, the rest of what they left goes.
        """
        for key in [each for each in self.shells if each.device == device]:
            copy_bytes = self._parked.pop(key, 0)
            self.abandoned_bytes["cpu"] += copy_bytes
            self.machine.give_back("cpu", self.shells.pop(key) - copy_bytes)

    def forked(self, loaded: Iterable[LoadedModel]) -> None:
        """
        Fakes survive a fork.
        """

    def quiesce(self, loaded: LoadedModel, timeout_s: float) -> bool:
        """
        Fakes do nothing by themselves.
        """
        del loaded, timeout_s
        return True

    def return_memory(self, device: str) -> None:
        """
        Nothing is ever kept back.
        """

    def unload(
        self, loaded: LoadedModel, *, load_follows: bool = False, parks: bool = False
    ) -> Released:
        """
        Give the memory back, or do nothing and say so.
        """
        del load_follows
        key = loaded.key
        if gate := self._unload_gates.get(key.model):
            gate.pass_through()
        if self.refuse_unloads > 0:
            self.refuse_unloads -= 1
            return Released(confirmed=False, reason="1 batch is still active")
        whisper = self.resident.pop(key)
        whisper.is_loaded = False
        n_bytes = _n_bytes(self.sizes.get(key.model, self.default_size))
        kept_bytes = _n_bytes(self.kept_size) if key.device != "cpu" else 0
        self.machine.give_back(key.device, n_bytes - kept_bytes)
        self.unloads[key.model] += 1
        copy_bytes = self.copies.pop(key, 0)
        if parks and not copy_bytes:
            copy_bytes = n_bytes
            self.machine.take("cpu", copy_bytes)
        elif copy_bytes and not parks:
            self.machine.give_back("cpu", copy_bytes)
            copy_bytes = 0
        if shell_bytes := _n_bytes(self.shell_size):
            self.machine.take("cpu", shell_bytes)
        if shell_bytes or copy_bytes:
            self.shells[key] = shell_bytes + copy_bytes
        if copy_bytes:
            self._parked[key] = copy_bytes
        return Released(
            confirmed=True,
            returned_bytes=n_bytes - kept_bytes,
            unreturned_bytes=kept_bytes,
            used_bytes=self.machine.used_bytes(key.device),
        )

    def signatures(self) -> Mapping[str, Signature]:
        """
        Those of `FakeWhisper`, which takes whatever there is.
        """
        return _SIGNATURES

    def batched(self, whisper: WhisperModel) -> Callable[..., object]:
        """
        The fake's own transcribe, which ignores the batch.
        """
        transcribe: Callable[..., object] = whisper.transcribe
        return transcribe

    def decode_audio(self, audio: AudioInput) -> NDArray[np.float32]:
        """
        Whatever was given.
        """
        return cast("NDArray[np.float32]", audio)


def check(cache: ModelCache | AsyncModelCache) -> None:
    """
    Assert the invariants of a cache.
    """
    _core(cache).check()


def settle(cache: ModelCache | AsyncModelCache) -> None:
    """
    Block until all loads and unloads that were begun are over.

    An unload that was refused is over; it is tried again when the clock ticks.
    """
    core = _core(cache)
    # Until nothing changed twice: what ends on one device may begin something on
    # another, and that can be seen before it is handed over.
    before: object = None
    unchanged = 0
    while unchanged < _QUIET_PASSES:
        for device in list(core.devices.values()):
            done, thread = threading.Event(), device.thread._thread
            device.thread.submit(done.set)
            # The thread of a closed cache may have ended before.
            wait_until(partial(_is_over, done, thread), f"an idle {device.name}")
        entries = list(core.entries.values())
        after = [(entry.key, entry.state, entry.loads) for entry in entries]
        unchanged = unchanged + 1 if after == before else 0
        before = after


def _is_over(done: threading.Event, thread: threading.Thread) -> bool:
    return done.is_set() or not thread.is_alive()


def wait_until(condition: Callable[[], object], what: str = "condition") -> None:
    """
    Block until *condition* holds, looking every millisecond, for ten seconds at most.
    """
    pause = threading.Event()
    for _ in range(int(_PATIENCE_S * 1000)):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError(f"{what} did not come true within {_PATIENCE_S:.0f} s")


def _core(cache: ModelCache | AsyncModelCache) -> Core:
    return (cache if isinstance(cache, ModelCache) else cache.cache)._core


def _n_bytes(size: int | str) -> int:
    return size if isinstance(size, int) else parse_limit(size).n_bytes or 0
