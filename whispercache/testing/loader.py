"""
A loader of models that take memory of a fake machine and compute nothing.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from whispercache.engine.api import LoadedModel, Released
from whispercache.engine.calls.signatures import signature_of
from whispercache.engine.files import ModelFiles
from whispercache.engine.sizes.footprint import Footprint
from whispercache.keys import TYPICAL_COMPUTE_TYPES

from .machine import as_bytes
from .waiting import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from inspect import Signature

    import numpy as np
    from faster_whisper import WhisperModel
    from numpy.typing import NDArray

    from whispercache.engine.api import AudioInput
    from whispercache.engine.sizes.footprint import Workload
    from whispercache.keys import ModelKey, OptionValue

    from .clock import FakeClock
    from .machine import FakeMachine


@dataclass(frozen=True, slots=True)
class FakeSegment:
    """
    A piece of a fake transcription. Its text is the key of the model that spoke.
    """

    text: str
    start: float = 0.0
    end: float = 1.0


class FakeWhisper:
    """
    A stand-in for a WhisperModel. Any use after its unload raises.
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
        Returns segments that are made while they are iterated over, as the real ones.
        """
        self._check()
        info = {"language": language or "en", "audio": audio, **options}
        return self._speak(), info

    def _speak(self) -> Iterator[FakeSegment]:
        # Each step is a use of the model, which may have been unloaded meanwhile.
        for second in range(self.segments):
            self._check()
            yield FakeSegment(str(self.key), second, second + 1)

    def detect_language(
        self, audio: object = None, **_options: object
    ) -> tuple[str, float, list[tuple[str, float]]]:
        """
        Returns English, always.
        """
        self._check()
        del audio
        return "en", 1.0, [("en", 1.0)]

    def _check(self) -> None:
        self.calls += 1
        if not self.is_loaded:
            raise RuntimeError(f"{self.key} was used after its unload")


# Taken once, so that a test may put other methods in place of these.
_SIGNATURES: Mapping[str, Signature] = {
    "transcribe": signature_of(FakeWhisper.transcribe),
    "batched": signature_of(FakeWhisper.transcribe),
    "detect_language": signature_of(FakeWhisper.detect_language),
}


class Gate:
    """
    A gate that holds a load or an unload until it is opened.

    Attributes:
        reached: Set when a load or unload stands before the gate.
    """

    def __init__(self) -> None:
        self.reached: threading.Event = threading.Event()
        self._open = threading.Event()

    def open(self) -> None:
        """
        Lets all pass from now on.
        """
        self._open.set()

    def wait_reached(self) -> None:
        """
        Blocks until a load or unload stands before the gate.
        """
        assert self.reached.wait(PATIENCE_S), "nothing came to the gate"

    def pass_through(self) -> None:
        """
        Stands before the gate, and passes when it is open.
        """
        self.reached.set()
        assert self._open.wait(PATIENCE_S), "the gate was never opened"


@contextmanager
def _holding(gates: dict[str, Gate], model: str) -> Iterator[Gate]:
    gate = gates[model] = Gate()
    try:
        yield gate
    finally:
        del gates[model]
        gate.open()


@dataclass(slots=True)
class FakeLoader:
    """
    A loader of `FakeWhisper` models into the memory of a `FakeMachine`.

    Its other methods are those of `whispercache.engine.api.Loader`, for the cache.

    Attributes:
        machine: The machine that has the memory.
        sizes: Weights by canonical model name: bytes, or text such as ``"1GiB"``.
        default_size: Weights of all others.
        workspace_bytes: Workspace of each call, times its ``batch_size``.
        loading_factor: Peak while loading, as a multiple of the weights.
        load_s: Seconds that a load takes, by a fake clock; see `clock`.
        clock: Ticked by *load_s* during each load, if given.
        saved_compute_type: The type of all files.
        missing: Names that have to be "downloaded" first.
        fail_loads: By model name, errors for its next loads, the first one first.
        refuse_unloads: Number of unloads to come that silently do nothing.
        shell_size: Host memory that each unloaded model keeps, as its tokenizer would.
        warm_up_reason: The reason that each card gives for its warm-up before its first
            model in a type; there is no warm-up if it is empty.
        warm_up_s: Seconds that a warm-up takes, by a fake clock; see `clock`.
        floor_size: Memory of a card that the first warm-up takes for good.
        kept_size: Memory of a card that each unload does not give back.
        loads, unloads, downloads: How often each model was loaded, and so on.
        resident: The models in memory.
        remembered: Models, and the bytes that they were measured to take.
        remembered_work: Devices, with the bytes predicted and measured of calls.
        shells: Host memory that unloaded models keep, host copies included.
        copies: Host copies of weights that are on a card as well.
        abandoned_bytes: Memory that models on lost devices hold for ever.
        warm: Devices and types that have been warmed up.
        read_files, read_ahead_files: How often each directory was read (ahead).
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

    def holding_loads(self, model: str) -> AbstractContextManager[Gate]:
        """
        Holds loads of *model* before a gate, at most until the end of the block.
        """
        return _holding(self._load_gates, model)

    def holding_unloads(self, model: str) -> AbstractContextManager[Gate]:
        """
        Holds unloads of *model* before a gate, at most until the end of the block.
        """
        return _holding(self._unload_gates, model)

    def _weights_bytes(self, key: ModelKey) -> int:
        return as_bytes(self.sizes.get(key.model, self.default_size))

    def devices(self) -> tuple[str, ...]:
        return tuple(self.machine.total_bytes)

    def supported_compute_types(self, device: str) -> frozenset[str]:
        return TYPICAL_COMPUTE_TYPES[device.partition(":")[0]]

    def locate(
        self, model: str, options: Mapping[str, OptionValue], *, download: bool
    ) -> ModelFiles | None:
        del options
        # Several threads may ask at once, and only one of them downloads.
        with self._lock:
            if model in self.missing:
                if not download:
                    return None
                self.missing.discard(model)
                self.downloads[model] += 1
        return ModelFiles(f"fake/{model}", self.saved_compute_type)

    def choose(self, key: ModelKey, files: ModelFiles) -> ModelFiles:
        del key
        return files

    def remember_work(
        self, device: str, predicted_bytes: int, measured_bytes: int
    ) -> None:
        self.remembered_work.append((device, predicted_bytes, measured_bytes))

    def read_ahead(self, files: ModelFiles) -> None:
        self.read_ahead_files[files.directory] += 1

    def read(self, files: ModelFiles) -> None:
        self.read_files[files.directory] += 1

    def footprint(
        self, key: ModelKey, files: ModelFiles, workload: Workload
    ) -> Footprint:
        del files
        weights_bytes = self._weights_bytes(key)
        return Footprint(
            weights_bytes=weights_bytes,
            workspace_bytes=self.workspace_bytes * workload.batch_size,
            loading_bytes=int(weights_bytes * self.loading_factor),
            host_loading_bytes=0 if key.device == "cpu" else self.host_loading_bytes,
        )

    def remember(self, key: ModelKey, files: ModelFiles, measured_bytes: int) -> None:
        del files
        self.remembered.append((key, measured_bytes))

    def load(self, key: ModelKey, files: ModelFiles) -> LoadedModel:
        # Before anything is taken, so that a test sees the reservation alone.
        if gate := self._load_gates.get(key.model):
            gate.pass_through()
        if self.clock is not None and self.load_s:
            self.clock.tick(self.load_s)
        if errors := self.fail_loads.get(key.model):
            raise errors.pop(0)
        assert key not in self.resident, f"{key} was loaded twice"
        n_bytes = self._weights_bytes(key)
        # A host copy stays beside the model; what else was kept is used up by the load.
        copy_bytes = self._parked.get(key, 0)
        self.forget(key)
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
            measured_bytes=n_bytes,  # exactly as predicted
            restored=copy_bytes > 0,
            copy_bytes=copy_bytes,
        )

    def warm_up_needed(self, key: ModelKey) -> str:
        is_warm = (key.device, key.compute_type) in self.warm
        return "" if key.device == "cpu" or is_warm else self.warm_up_reason

    def warm_up(self, key: ModelKey) -> int | None:
        if errors := self.fail_loads.get(f"warm-up of {key.device}"):
            raise errors.pop(0)
        if self.clock is not None and self.warm_up_s:
            self.clock.tick(self.warm_up_s)
        is_first = all(device != key.device for device, _ in self.warm)
        self.warm.append((key.device, key.compute_type))
        if not is_first:
            return None
        floor_bytes = as_bytes(self.floor_size) if self.floor_size else 0
        # Other programs', to the cache: no unload gives it back.
        self.machine.others_bytes[key.device] += floor_bytes
        return floor_bytes

    def host_copies(self) -> Mapping[ModelKey, int]:
        return dict(self._parked)

    def forget(self, key: ModelKey) -> None:
        self._parked.pop(key, 0)
        if shell_bytes := self.shells.pop(key, 0):
            self.machine.give_back("cpu", shell_bytes)

    def follow_up(self, loaded: LoadedModel) -> None: ...

    def kept_bytes(self) -> int:
        return sum(list(self.shells.values()))

    def shrink_kept(self, most_bytes: int, but: Collection[ModelKey] = ()) -> None:
        # Those that are spared do not count.
        most_bytes += sum(self.shells.get(each, 0) for each in but)
        for key in [each for each in self.shells if each not in but]:
            if self.kept_bytes() > most_bytes:
                self.forget(key)

    def abandon(self, loaded: LoadedModel) -> None:
        key = loaded.key
        del self.resident[key]
        n_bytes = self._weights_bytes(key)
        self.abandoned_bytes[key.device] += n_bytes
        self.abandoned_bytes["cpu"] += self.copies.pop(key, 0)

    def lost(self, device: str) -> None:
        for key in [each for each in self.shells if each.device == device]:
            copy_bytes = self._parked.pop(key, 0)
            self.abandoned_bytes["cpu"] += copy_bytes
            self.machine.give_back("cpu", self.shells.pop(key) - copy_bytes)

    def forked(self, loaded: Iterable[LoadedModel]) -> None: ...

    def quiesce(self, loaded: LoadedModel, timeout_s: float) -> bool:
        del loaded, timeout_s
        return True

    def return_memory(self, device: str) -> None: ...

    def unload(
        self, loaded: LoadedModel, *, load_follows: bool = False, parks: bool = False
    ) -> Released:
        del load_follows
        key = loaded.key
        if gate := self._unload_gates.get(key.model):
            gate.pass_through()
        # As CTranslate2 does while a call is ending: nothing, without an error.
        if self.refuse_unloads > 0:
            self.refuse_unloads -= 1
            return Released(confirmed=False, reason="1 batch is still active")
        # From now on any use of it raises.
        whisper = self.resident.pop(key)
        whisper.is_loaded = False
        n_bytes = self._weights_bytes(key)
        kept_bytes = as_bytes(self.kept_size) if key.device != "cpu" else 0
        self.machine.give_back(key.device, n_bytes - kept_bytes)
        self.unloads[key.model] += 1
        self._keep(key, n_bytes, parks=parks)
        return Released(
            confirmed=True,
            returned_bytes=n_bytes - kept_bytes,
            unreturned_bytes=kept_bytes,
            used_bytes=self.machine.used_bytes(key.device),
        )

    def _keep(self, key: ModelKey, n_bytes: int, *, parks: bool) -> None:
        """
        Keeps a shell of a model that was unloaded, and a copy of its weights.
        """
        copy_bytes = self.copies.pop(key, 0)
        # A copy that was kept while the model was on the card serves again.
        if parks and not copy_bytes:
            copy_bytes = n_bytes
            self.machine.take("cpu", copy_bytes)
        elif copy_bytes and not parks:
            self.machine.give_back("cpu", copy_bytes)
            copy_bytes = 0
        shell_bytes = as_bytes(self.shell_size)
        # An unload does not fail for want of room for what it would keep.
        if shell_bytes > self.machine.free_bytes("cpu"):
            shell_bytes = 0
        if shell_bytes:
            self.machine.take("cpu", shell_bytes)
        if shell_bytes or copy_bytes:
            self.shells[key] = shell_bytes + copy_bytes
        if copy_bytes:
            self._parked[key] = copy_bytes

    def signatures(self) -> Mapping[str, Signature]:
        return _SIGNATURES

    def batched(self, whisper: WhisperModel) -> Callable[..., object]:
        transcribe: Callable[..., object] = whisper.transcribe
        return transcribe

    def whisper_class(self) -> type[WhisperModel] | None: ...

    def initialize(
        self, whisper: WhisperModel, files: ModelFiles, model: object
    ) -> None: ...

    def decode_audio(self, audio: AudioInput) -> NDArray[np.float32]:
        return cast("NDArray[np.float32]", audio)
