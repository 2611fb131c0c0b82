"""
The loader: models of faster-whisper in and out of memory.

Models are built, loaded and unloaded on their device's own thread (`DeviceThread`), and
a model's properties are read there once, right after the load: CTranslate2 guards
neither against a load or unload at the same time, and reading then can crash the
process.
"""

from __future__ import annotations

import gc
import logging
import traceback
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from whispercache.devices import heap, host, release
from whispercache.devices.faults import Fault, classify
from whispercache.errors import DeviceUnavailable, LoadFailed

from . import construct, process
from .api import LoadedModel, Released
from .audio.samples import samples_of
from .files import stamp_of
from .kept import KeptModel, KeptModels, StillLoaded, unload_weights
from .sizes.learned import LearnedFootprints, Sizer
from .store import ModelStore
from .warmup import WarmUps, cublas_error_reason, silent_window

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from inspect import Signature

    import numpy as np
    from faster_whisper import WhisperModel
    from numpy.typing import NDArray

    from whispercache.devices.memory import MemoryProbe
    from whispercache.keys import ModelKey, OptionValue

    from .api import AudioInput
    from .files import ModelFiles
    from .sizes.footprint import Footprint, Workload
    from .variants.store import Variants

_log = logging.getLogger("whispercache")


@dataclass(slots=True)
class FasterWhisperLoader:
    """
    A `Loader` of `faster_whisper.WhisperModel`. Its methods are documented there, and
    in the parts that they forward to.

    Attributes:
        probe: Gauge for measurements on GPUs.
        learned: Corrections of footprints that were measured before.
        variants_bytes: Most bytes of disk for all variants; None to use none.
    """

    probe: MemoryProbe
    learned: LearnedFootprints = field(default_factory=LearnedFootprints)
    variants_bytes: int | None = None
    _store: ModelStore = field(init=False)
    _sizer: Sizer = field(init=False)
    _warm_ups: WarmUps = field(init=False)
    _kept: KeptModels = field(default_factory=KeptModels)
    _present: dict[ModelKey, LoadedModel] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._store = ModelStore(self.variants_bytes)
        self._sizer = Sizer(self.probe, self.learned)
        self._warm_ups = WarmUps(self.probe)

    # Devices -------------------------------------------------------------------------

    def devices(self) -> tuple[str, ...]:
        cards = range(process.ctranslate2().get_cuda_device_count())
        return ("cpu", *(f"cuda:{index}" for index in cards))

    def supported_compute_types(self, device: str) -> frozenset[str]:
        supported = process.ctranslate2().get_supported_compute_types
        kind, _, index = device.partition(":")
        try:
            return frozenset(supported(kind, int(index or 0)))
        except (RuntimeError, ValueError) as error:
            raise DeviceUnavailable(device, str(error)) from error

    def warm_up_needed(self, key: ModelKey) -> str:
        return self._warm_ups.needed(key)

    def warm_up(self, key: ModelKey) -> int | None:
        process.enter()
        return self._warm_ups.run(key)

    # Files and sizes -----------------------------------------------------------------

    def locate(
        self, model: str, options: Mapping[str, OptionValue], *, download: bool
    ) -> ModelFiles | None:
        return self._store.locate(model, options, download=download)

    def choose(self, key: ModelKey, files: ModelFiles) -> ModelFiles:
        return self._store.choose(key, files)

    def follow_up(self, loaded: LoadedModel) -> None:
        self._store.follow_up(loaded)

    def read_ahead(self, files: ModelFiles) -> None:
        self._store.read_ahead(files)

    def read(self, files: ModelFiles) -> None:
        self._store.read(files)

    @property
    def variants(self) -> Variants | None:
        return self._store.variants

    def footprint(
        self, key: ModelKey, files: ModelFiles, workload: Workload
    ) -> Footprint:
        return self._sizer.footprint(key, files, workload)

    def remember(self, key: ModelKey, files: ModelFiles, measured_bytes: int) -> None:
        self._sizer.remember(key, files, measured_bytes)

    def remember_work(
        self, device: str, predicted_bytes: int, measured_bytes: int
    ) -> None:
        self._sizer.remember_work(device, predicted_bytes, measured_bytes)

    # Load ----------------------------------------------------------------------------

    def load(self, key: ModelKey, files: ModelFiles) -> LoadedModel:
        _check_unchanged(key, files)
        process.enter()
        before = self._held(key.device)
        left = self._kept.take(key)
        # One of other files would decode the new weights with the old tokenizer.
        kept = left if left is not None and left.files == files else None
        with heap.loading(partial(self._sizer.host_loading_bytes, key, files)):
            whisper = self._with_weights(key, files, kept)
        reloaded = kept is not None and kept.whisper is not None
        copy_bytes = 0 if kept is None else kept.copy_bytes
        if not reloaded:
            # A reload leaves its buffers for the next one; `return_memory` comes later.
            host.return_free_memory()
        grown_bytes = self._held(key.device).growth_since(before)
        loaded = construct.described(key, files, whisper)
        loaded.measured_bytes = None if reloaded else grown_bytes
        loaded.expected_bytes = self._expected_bytes(key, files, grown_bytes)
        loaded.reloaded, loaded.restored = reloaded, copy_bytes > 0
        loaded.copy_bytes = copy_bytes
        if key.device != "cpu":
            release.forget_peak(key.device)
        # Only now: until the measurement all of them were in memory. Yet the names here
        # must not count among the references that are always there.
        del whisper, left, kept
        loaded.references = loaded.count_references()
        self._present[key] = loaded
        return loaded

    def _with_weights(
        self, key: ModelKey, files: ModelFiles, kept: KeptModel | None
    ) -> WhisperModel:
        whisper = None if kept is None else kept.whisper
        try:
            if kept is not None and whisper is not None:
                # The copy stays, so that the next unload need not copy again.
                whisper.model.load_model(keep_cache=kept.copy_bytes > 0)
            else:
                whisper = construct.build(key, files, self._kept)
                if key.device != "cpu":
                    # Allocates what the first call would, so that it is measured, too.
                    silent_window(whisper)
            if key.device != "cpu":
                # The copies run on this thread's stream, the model's work on others.
                release.synchronize(key.device)
        except Exception as error:
            self._failed(key, files, whisper, error)
            reason = cublas_error_reason(error, key)
            if not reason:
                raise
            # The frames of the traceback hold the model.
            traceback.clear_frames(error.__traceback__)
            raise LoadFailed(str(key), reason) from error
        return whisper

    def _failed(
        self,
        key: ModelKey,
        files: ModelFiles,
        whisper: WhisperModel | None,
        error: Exception,
    ) -> None:
        fault = classify(error)
        if files.original is not None and fault is Fault.OTHER:
            self._store.reject(key, files.original)
        if whisper is not None and fault is Fault.STICKY and key.device != "cpu":
            # As in `abandon`.
            process.keep_for_ever(whisper.model)

    def _expected_bytes(
        self, key: ModelKey, files: ModelFiles, grown_bytes: int | None
    ) -> int:
        # The growth may be less than the prediction where an allocator had kept memory
        # of the model before.
        if key.device == "cpu":
            return 0
        n_bytes = self._sizer.weights_bytes(key, files)
        return n_bytes if grown_bytes is None else max(0, min(n_bytes, grown_bytes))

    # Unload --------------------------------------------------------------------------

    def unload(
        self, loaded: LoadedModel, *, load_follows: bool, parks: bool = False
    ) -> Released:
        """
        Unloads the weights, confirms that they are gone, and returns the memory.

        A load that follows takes the host's freed pages as they are: asking the system
        for new ones costs a third of a small model's load.

        On the CPU all but the weights is kept. On a GPU that would keep cuBLAS handles
        and their memory on the card, so only the tokenizer is kept; unless the model
        *parks*, since the copy of its weights is in the object.
        """
        device = loaded.key.device
        if device != "cpu":
            release.settle(device)
        before = self._held(device)
        references = _references_left(loaded)
        if load_follows:
            heap.keep()
        # A copy in the very memory that the weights were in would gain nothing.
        to_host = parks and not release.is_integrated(device)
        try:
            to_host = unload_weights(loaded.whisper.model, loaded.key, to_host=to_host)
        except StillLoaded as still:
            return Released(confirmed=False, reason=f"not unloaded: {still}")
        self._kept.keep(loaded.key, self._rest_of(loaded, has_copy=to_host))
        self._present.pop(loaded.key, None)
        loaded.cut()
        del loaded.whisper
        if not load_follows:
            self.return_memory(device)
        if device == "cpu":
            grown = None if load_follows else self._held(device).growth_since(before)
            fallen = None if grown is None else -grown
            return Released(
                confirmed=True, returned_bytes=fallen, references=references
            )
        return self._released(loaded, before, references)

    def _released(
        self, loaded: LoadedModel, before: release.Holdings, references: int
    ) -> Released:
        device = loaded.key.device
        seen = release.returned(
            device,
            self.probe,
            before,
            loaded.expected_bytes,
            is_quiet=self._is_quiet(device),
        )
        release.forget_peak(device)
        return Released(
            confirmed=True,
            returned_bytes=seen.returned_bytes,
            references=references,
            unreturned_bytes=seen.unreturned_bytes,
            used_bytes=seen.used_bytes,
            peak_bytes=None if before.pool is None else before.pool.peak_bytes,
        )

    def _rest_of(self, loaded: LoadedModel, *, has_copy: bool) -> KeptModel:
        key, whisper = loaded.key, loaded.whisper
        copy_bytes = self._sizer.weights_bytes(key, loaded.files) if has_copy else 0
        keeps_object = key.device == "cpu" or copy_bytes > 0
        return KeptModel(
            loaded.files,
            whisper.hf_tokenizer,
            whisper.hf_tokenizer.get_vocab_size(),
            whisper if keeps_object else None,
            copy_bytes,
        )

    def _is_quiet(self, device: str) -> bool:
        # A copy: other devices' threads change it meanwhile.
        here = [e for e in list(self._present.values()) if e.key.device == device]
        return not any(each.whisper.model.num_active_batches for each in here)

    def _held(self, device: str) -> release.Holdings:
        if device == "cpu":
            return release.Holdings(None, host.anonymous_bytes())
        return release.holdings(device, self.probe)

    def return_memory(self, device: str) -> None:
        del device
        # What was kept for a load that did not come.
        heap.settle()
        # A load to a GPU has its buffers on the host, too.
        host.return_free_memory()

    # Kept models ---------------------------------------------------------------------

    def host_copies(self) -> Mapping[ModelKey, int]:
        return self._kept.copies()

    def forget(self, key: ModelKey) -> None:
        self._kept.take(key)
        host.return_free_memory()

    def kept_bytes(self) -> int:
        return self._kept.n_bytes

    def shrink_kept(self, most_bytes: int, but: Collection[ModelKey] = ()) -> None:
        if self._kept.shrink(most_bytes, but):
            host.return_free_memory()

    # The process ---------------------------------------------------------------------

    def abandon(self, loaded: LoadedModel) -> None:
        """
        Keeps a model for ever. CTranslate2 throws where CUDA does not free, and what a
        destructor throws ends the process.

        Source: src/cuda/allocator.cc @ 0ea0c41; read, not run.
        """
        self._present.pop(loaded.key, None)
        # It is deleted already if the card broke during the unload.
        whisper = getattr(loaded, "whisper", None)
        if whisper is not None:
            process.keep_for_ever(whisper.model)

    def lost(self, device: str) -> None:
        for key in [each for each in self._kept.copies() if each.device == device]:
            kept = self._kept.take(key)
            if kept is not None and kept.whisper is not None:
                process.keep_for_ever(kept.whisper.model)

    def forked(self, loaded: Iterable[LoadedModel]) -> None:
        """
        Keeps the parent's models for ever: the threads that their destructors wait for
        are not in the child, which would hang at its exit.

        Source: CTranslate2 4.8.5, CPU: a child with a model in it never ended, and with
        one more reference it did.
        """
        kept = [each.whisper for each in self._kept.all() if each.whisper]
        for whisper in (*kept, *(each.whisper for each in loaded)):
            process.keep_for_ever(whisper.model)
        self._kept = KeptModels()
        self._warm_ups = WarmUps(self.probe)
        self._present.clear()
        self._store.forked()
        self.learned.forked()

    def quiesce(self, loaded: LoadedModel, timeout_s: float) -> bool:
        return process.quiesce(loaded, timeout_s)

    # Calls ---------------------------------------------------------------------------

    def signatures(self) -> Mapping[str, Signature]:
        return construct.signatures()

    def batched(self, whisper: WhisperModel) -> Callable[..., object]:
        return construct.batched(whisper)

    def whisper_class(self) -> type[WhisperModel] | None:
        model: type[WhisperModel] = construct.genuine().model
        return model

    def initialize(
        self, whisper: WhisperModel, files: ModelFiles, model: object
    ) -> None:
        construct.initialize(whisper, files, self._kept, lambda *_, **__: model)

    def decode_audio(self, audio: AudioInput) -> NDArray[np.float32]:
        return samples_of(audio)


def _check_unchanged(key: ModelKey, files: ModelFiles) -> None:
    # With other weights the footprint, the tokenizer and the variant would be wrong.
    original = files.original or files
    if stamp_of(original.directory) != original.stamp:
        reason = "its files changed while the request waited; ask again"
        raise LoadFailed(str(key), reason)


def _references_left(loaded: LoadedModel) -> int:
    if loaded.count_references() > loaded.references:
        # Programs that put methods on a leased model tie it to itself.
        gc.collect()
    return max(0, loaded.count_references() - loaded.references)
