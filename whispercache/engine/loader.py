"""
Load: the only module that knows faster-whisper and CTranslate2.

Models are built, loaded and unloaded on their device's own thread (`DeviceThread`), and
a model's properties are read there once, right after the load: CTranslate2 guards
neither against a load or unload at the same time, and reading then can crash the
process.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import inspect
import logging
import os
import threading
import time
import traceback
import types
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from whispercache.devices import memory, release
from whispercache.devices.cublas import cublas_problem, load_cublas
from whispercache.devices.faults import Fault, classify
from whispercache.errors import (
    AudioError,
    CacheClosed,
    CacheForked,
    DeviceUnavailable,
    LoadFailed,
    WhisperCacheError,
)
from whispercache.keys import is_directory

from . import telemetry, warmup
from .api import LoadedModel, Released
from .audio.features import InBlocks
from .audio.speech import bounded_names
from .calls.languages import check_knowledge, knowledge_of
from .calls.signatures import signature_of
from .claims import check_tokens, unalignable, undetectable
from .files import (
    ModelFiles,
    claims_of,
    downloaded,
    files_in,
    is_whole,
    local_files,
    stamp_of,
)
from .kept import Shell, Shells
from .read_ahead import ReadAhead, read_through
from .rebound import rebound, swapped
from .sizes.footprint import estimate, reserved
from .sizes.header import ModelHeader
from .sizes.learned import LearnedFootprints
from .variants.convert import Origin, kind_for
from .views import lending, lends

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from inspect import Signature

    import numpy as np
    from faster_whisper import WhisperModel
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from whispercache.devices.memory import MemoryProbe
    from whispercache.errors import CorruptModel
    from whispercache.keys import ModelKey, OptionValue

    from .api import AudioInput
    from .calls.languages import Knowledge
    from .rebound import Swaps
    from .sizes.footprint import Footprint, Workload
    from .variants.build import Builder
    from .variants.store import Variants

__all__ = ["FasterWhisperLoader", "versions"]

_log = logging.getLogger("whispercache")

UNLOAD_TRIES_S = 2.0
"""
Seconds for which a busy model is asked again to unload before that counts as refused.

Source: right after a finished call 72 of 100 unloads did nothing, and a retry loop
ended within 4.2 ms (CTranslate2 4.8.5, CPU); the rest allows for a card's slowest
kernel.
"""

_WORK = "(calls)"
"""
Stands for a model's name where calls of all models are meant.
"""

QUIET_LOOKS = 10
"""
Looks at a model, 2 ms apart, that must find no batch before it counts as quiet.
"""


@functools.cache
def _ctranslate2() -> types.ModuleType:
    """
    CTranslate2, imported in such a way that its idle threads sleep.

    GNU OpenMP's threads spin for a while after each piece of work. Where anything else
    wants the cores, loads to int8 and transcriptions then take several times as long;
    where nothing does, sleeping costs nothing that could be measured. The variable is
    read once, by CTranslate2's own copy of OpenMP; a value that is set already stands.
    What faster-whisper imports later may read the environment, too: see `telemetry`.

    Source: two busy cores, CTranslate2 4.8.5: base to int8 in 0.29 s against 1.12 s, a
    transcription by base in 2.0 s against 6.0 s.
    """
    telemetry.keep_off()
    name = "OMP_WAIT_POLICY"
    given = os.environ.get(name)
    os.environ.setdefault(name, "PASSIVE")
    try:
        import ctranslate2
    finally:
        if given is None:
            del os.environ[name]
    return cast("types.ModuleType", ctranslate2)


_used_in: list[int] = []


def _use_in_this_process() -> None:
    """
    Note that models live in this process.

    Raises:
        CacheForked: some lived in the process that forked this one. OpenMP's threads
            are gone, and the first parallel work would wait for them for ever.
    """
    if not _used_in:
        _used_in.append(os.getpid())
    if _used_in[0] != os.getpid():
        raise CacheForked


def versions() -> dict[str, str]:
    """
    Versions of the libraries that run the models, by name.

    Raises:
        ImportError: one of them is missing, or cannot be loaded.
    """
    ctranslate2 = _ctranslate2()
    import faster_whisper

    return {
        "faster-whisper": str(faster_whisper.__version__),
        "CTranslate2": str(ctranslate2.__version__),
    }


class _Gone:
    """
    Stands for a model when the interpreter ends. A daemon thread that touches it never
    goes on; any other is told.
    """

    def __getattr__(self, name: str) -> object:
        if threading.current_thread().daemon:
            threading.Event().wait()
        raise CacheClosed(f"the interpreter is ending; {name!r} of a model is gone")


# A model that comes and goes takes the same each time.
_estimate = functools.lru_cache(maxsize=256)(estimate)


def _construct(files: ModelFiles, shells: Shells, **options: object) -> WhisperModel:
    """
    A `WhisperModel` of *files* whose tokenizer is shared.

    Parsing it takes a third of a small model's load and holds the GIL all the while,
    and WhisperModel's constructor has no hook for it. So the constructor is run with
    its own view of the name ``tokenizers``; faster-whisper's module stays as it is.

    It is parsed first, as what that takes besides would come on top of the weights.
    Where there is none, faster-whisper would fetch one that does not know large-v3's
    tokens; and where no file tells how many mel bands there are, it would take 80.

    Source: the peak of loading base as int8 was 1.28 times what it leaves, and is 1.02
    (tests/engine/test_variants.py, benchmarks/switch.py).
    """
    _ctranslate2()
    from faster_whisper import WhisperModel
    from faster_whisper.feature_extractor import FeatureExtractor

    assert isinstance(files.source, ModelHeader)
    tokenizer = _tokenizer_of(files, shells)
    shared = types.SimpleNamespace(
        Tokenizer=types.SimpleNamespace(
            from_file=lambda _path: tokenizer,
            from_pretrained=lambda _repository: tokenizer,
        )
    )
    init = rebound(
        WhisperModel.__init__,
        tokenizers=shared,
        FeatureExtractor=partial(
            FeatureExtractor, feature_size=files.source.architecture.mels
        ),
    )
    whisper: WhisperModel = object.__new__(lending(WhisperModel, _swaps()))
    init(whisper, files.directory, **options)
    return whisper


@functools.cache
def _swaps() -> Swaps:
    """
    Functions that calls find in place of those of faster-whisper that take much memory.
    """
    _ctranslate2()
    from faster_whisper import vad

    def vad_model() -> object:
        # Looked up now: programs put others in its place.
        return vad.get_vad_model()

    bounded = bounded_names(
        vad.get_speech_timestamps,
        vad_model,
        vad.collect_chunks,
        vad.VadOptions,
    )
    return tuple((getattr(vad, name), other) for name, other in bounded.items())


@dataclass(slots=True)
class FasterWhisperLoader:
    """
    Loads `faster_whisper.WhisperModel`.

    Attributes:
        probe: Gauge for measurements on GPUs.
        learned: Corrections of footprints that were measured before.
        variants_bytes: Most bytes of disk for all variants; None to use none.
    """

    probe: MemoryProbe
    learned: LearnedFootprints = field(default_factory=LearnedFootprints)
    variants_bytes: int | None = None
    _shells: Shells = field(default_factory=Shells)
    _pages: ReadAhead = field(default_factory=ReadAhead)
    _builder: Builder | None = None
    _warm: set[tuple[str, str]] = field(default_factory=set)
    _cold: dict[str, release.Holdings] = field(default_factory=dict)
    _present: dict[ModelKey, LoadedModel] = field(default_factory=dict)
    _downloading: dict[str, threading.Lock] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def devices(self) -> tuple[str, ...]:
        """
        The CPU, and the cards that CTranslate2 sees.
        """
        ctranslate2 = _ctranslate2()

        cards = range(ctranslate2.get_cuda_device_count())
        return ("cpu", *(f"cuda:{index}" for index in cards))

    def supported_compute_types(self, device: str) -> frozenset[str]:
        """
        The types that CTranslate2 supports on *device*.
        """
        ctranslate2 = _ctranslate2()

        kind, _, index = device.partition(":")
        try:
            return frozenset(
                ctranslate2.get_supported_compute_types(kind, int(index or 0))
            )
        except (RuntimeError, ValueError) as error:
            raise DeviceUnavailable(device, str(error)) from error

    def locate(
        self, model: str, options: Mapping[str, OptionValue], *, download: bool
    ) -> ModelFiles | None:
        """
        A model's files: a directory, the hub's local cache, or a download into it.
        """
        if is_directory(model):
            return files_in(model)
        if not download or is_whole(model, options):
            return local_files(model, options)
        with self._lock:
            downloading = self._downloading.setdefault(model, threading.Lock())
        with downloading:
            return downloaded(model, options)

    def choose(self, key: ModelKey, files: ModelFiles) -> ModelFiles:
        """
        The variant of *files* that CTranslate2 need not convert, if there is one.
        """
        original = files.original or files
        builder = self._get_builder()
        wanted = _wanted_variant(key, original)
        if builder is None or wanted is None:
            return original
        directory = builder.variants.find(*wanted)
        if directory is None:
            return original
        try:
            variant = files_in(str(directory))
        except WhisperCacheError as error:  # it has just gone
            _log.debug("no variant of %s: %s", key, error)
            return original
        saved = original.saved_compute_type
        return replace(variant, saved_compute_type=saved, original=original)

    def follow_up(self, loaded: LoadedModel) -> None:
        """
        Have the variant built that was not there.
        """
        builder = self._get_builder()
        wanted = _wanted_variant(loaded.key, loaded.files)
        if builder is not None and wanted is not None:
            builder.build_soon(*wanted)

    @property
    def variants(self) -> Variants | None:
        """
        The user's variants; None if none are to be used.
        """
        builder = self._get_builder()
        return None if builder is None else builder.variants

    def _reject(self, key: ModelKey, original: ModelFiles) -> None:
        """
        Use a variant no more that could not be loaded.
        """
        builder, wanted = self._get_builder(), _wanted_variant(key, original)
        if builder is not None and wanted is not None:
            builder.variants.reject(*wanted)

    def _get_builder(self) -> Builder | None:
        """
        The user's variants, and who builds them; None if there should be none.
        """
        if self.variants_bytes is None:
            return None
        if self._builder is None:
            from .variants.build import Builder
            from .variants.store import Variants

            engine = f"CTranslate2 {_ctranslate2().__version__}"
            builder = Builder(Variants(engine, self.variants_bytes))
            with self._lock:
                self._builder = self._builder or builder
        return self._builder

    def footprint(
        self, key: ModelKey, files: ModelFiles, workload: Workload
    ) -> Footprint:
        """
        From the header or the architecture, corrected by what was measured before.
        """
        assert files.source is not None
        predicted = _estimate(files.source, key.compute_type, key.device, workload)
        weights_bytes = self.learned.correct(
            key.model,
            key.compute_type,
            self._name_of(key.device),
            predicted.weights_bytes,
        )
        # Upwards only: a load into memory that an earlier one left looks too small.
        growth_bytes = max(0, weights_bytes - predicted.weights_bytes)
        workspace_bytes = predicted.workspace_bytes
        if key.device != "cpu":
            # Upwards only, too: few calls do all that was reserved for.
            card = self._name_of(key.device)
            seen_bytes = self.learned.correct(_WORK, "", card, workspace_bytes)
            workspace_bytes = max(workspace_bytes, seen_bytes)
        corrected = replace(
            predicted,
            weights_bytes=predicted.weights_bytes + growth_bytes,
            workspace_bytes=workspace_bytes,
            loading_bytes=predicted.loading_bytes + growth_bytes,
        )
        return reserved(corrected, key.device)

    def remember(self, key: ModelKey, files: ModelFiles, measured_bytes: int) -> None:
        """
        Note what a load took, for the next footprint.
        """
        assert files.source is not None
        predicted = _estimate(files.source, key.compute_type, key.device)
        self.learned.record(
            key.model,
            key.compute_type,
            self._name_of(key.device),
            predicted.weights_bytes,
            measured_bytes,
        )

    def _name_of(self, device: str) -> str:
        """
        What the hardware is called; just its place where no driver of NVIDIA knows it,
        as with ROCm.
        """
        try:
            return self.probe.device_name(device)
        except DeviceUnavailable as error:
            _log.debug("%s has no name: %s", device, error)
            return device

    def warm_up_needed(self, key: ModelKey) -> str:
        """
        Nothing on the CPU; else see `release.warm_up_reason`.
        """
        if key.device == "cpu" or (key.device, key.compute_type) in self._warm:
            return ""
        return release.warm_up_reason(key.device)

    def warm_up(self, key: ModelKey) -> int | None:
        """
        Run a micro model in the type of *key*, and see what the card has lost by that.
        """
        load_cublas()
        _use_in_this_process()
        kind, _, index = key.device.partition(":")
        # A try that fails may leave the context there, which is part of the floor.
        cold = release.holdings(key.device, self.probe)
        before = self._cold.setdefault(key.device, cold)
        try:
            warmup.prime(_ctranslate2(), kind, int(index or 0), key.compute_type)
        except RuntimeError as error:
            reason = _of_cublas(error, key)
            if not reason:
                raise
            raise LoadFailed(str(key), reason) from error
        except OSError as error:  # nowhere to write it; the first model pays then
            _log.warning("%s is not warmed up: %s", key.device, error)
            self._warm.add((key.device, key.compute_type))
            return None
        # A copy: other devices' threads change it meanwhile.
        is_first = all(device != key.device for device, _ in tuple(self._warm))
        self._warm.add((key.device, key.compute_type))
        return release.floor_bytes(key.device, self.probe, before) if is_first else None

    def remember_work(
        self, device: str, predicted_bytes: int, measured_bytes: int
    ) -> None:
        """
        Note what calls took, for the next footprint on a card of that name.
        """
        card = self._name_of(device)
        self.learned.record(_WORK, "", card, predicted_bytes, measured_bytes)

    def load(self, key: ModelKey, files: ModelFiles) -> LoadedModel:
        """
        Build the model, or bring the weights back into a shell that was kept.
        """
        original = files.original or files
        if stamp_of(original.directory) != original.stamp:
            raise LoadFailed(
                str(key), "its files changed while the request waited; ask again"
            )
        _use_in_this_process()
        before = self._held(key.device)
        shell = self._shells.take(key)
        # One of other files would decode the new weights with the old tokenizer.
        kept = shell if shell is not None and shell.files == files else None
        whisper = None if kept is None else kept.whisper
        copy_bytes = 0 if kept is None else kept.copy_bytes
        reloaded = whisper is not None
        try:
            if whisper is not None:
                # What is copied stays, so that the next unload need not copy again.
                whisper.model.load_model(keep_cache=copy_bytes > 0)
            else:  # its tokenizer is still of use, so it lives until then
                whisper = self._build(key, files)
            if key.device != "cpu":
                if not reloaded:
                    # Makes what the first call would, so that it is measured, too.
                    warmup.silent_window(whisper)
                # The copies run on this thread's stream, its work on others'.
                release.synchronize(key.device)
        except Exception as error:
            self._failed(key, files, whisper, error)
            reason = _of_cublas(error, key)
            if not reason:
                raise
            # The frames of the traceback hold the model.
            traceback.clear_frames(error.__traceback__)
            raise LoadFailed(str(key), reason) from error
        model = whisper.model
        if model.compute_type != key.compute_type:
            _log.warning("%s computes in %s", key, model.compute_type)
        if not reloaded:
            # A reload leaves its buffers for the next one; `return_memory` comes later.
            memory.return_free_memory()
        grown = self._held(key.device).growth_since(before)
        known = knowledge_of(files)
        loaded = LoadedModel(
            key=key,
            files=files,
            whisper=whisper,
            compute_type=str(model.compute_type),
            is_multilingual=bool(model.is_multilingual),
            supported_languages=_languages(whisper, known),
            measured_bytes=None if reloaded else grown,
            reloaded=reloaded,
            restored=copy_bytes > 0,
            copy_bytes=copy_bytes,
            expected_bytes=_expected_bytes(key, files, grown),
            knowledge=known,
            lend=lends(type(whisper), partial(check_knowledge, str(key), known=known)),
        )
        if key.device != "cpu":
            release.forget_peak(key.device)
        del model, whisper, kept, shell
        loaded.references = loaded.count_references()
        self._present[key] = loaded
        return loaded

    def _failed(
        self,
        key: ModelKey,
        files: ModelFiles,
        whisper: WhisperModel | None,
        error: Exception,
    ) -> None:
        """
        Use a variant no more that did not load, nor free what is on a broken device.
        """
        fault = classify(error)
        if files.original is not None and fault is Fault.OTHER:
            self._reject(key, files.original)
        if whisper is not None and fault is Fault.STICKY and key.device != "cpu":
            _keep_for_ever(whisper)  # as in `abandon`

    def _build(self, key: ModelKey, files: ModelFiles) -> WhisperModel:
        kind, _, index = key.device.partition(":")
        options = dict(key.options)
        for hub_option in ("download_root", "revision"):
            options.pop(hub_option, None)
        whisper = _construct(
            files,
            self._shells,
            device=kind,
            device_index=int(index or 0),
            compute_type=key.compute_type,
            **options,
        )
        whisper.feature_extractor = InBlocks(whisper.feature_extractor)
        claims, directory = claims_of(files), (files.original or files).directory
        if problem := claims.alignment_problem:
            _log.warning("%s cannot tell when words were said: %s", key, problem)
            _refuse(whisper, "find_alignment", partial(unalignable, directory, problem))
        if not claims.can_detect:
            _log.warning("%s cannot detect languages: config.json names none", key)
            _refuse(whisper, "detect_language", partial(undetectable, directory))
        return whisper

    def unload(
        self, loaded: LoadedModel, *, load_follows: bool, parks: bool = False
    ) -> Released:
        """
        Unload the weights, ask again until they are gone, and return the memory.

        A load that follows at once takes the host's freed pages as they are: asking the
        system for new ones costs a third of a small model's load.

        On the CPU the whole shell is kept for a while. On a GPU it would keep cuBLAS
        handles and their memory on the card, so of that only the tokenizer is, but for
        a model that *parks*: its copy is in there.
        """
        device = loaded.key.device
        if device != "cpu":
            release.settle(device)
        before = self._held(device)
        references = _references_left(loaded)
        try:
            # A copy beside it in the same memory would be of no use.
            parks = parks and not release.is_integrated(device)
            parks = _unload_weights(loaded, parks=parks)
        except _StillLoaded as still:
            return Released(confirmed=False, reason=f"not unloaded: {still}")
        self._shells.keep(loaded.key, _shell_of(loaded, parks=parks))
        self._present.pop(loaded.key, None)
        del loaded.whisper
        if not load_follows:
            self.return_memory(device)
        if device != "cpu":
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
        grown = None if load_follows else self._held(device).growth_since(before)
        fallen = None if grown is None else -grown
        return Released(confirmed=True, returned_bytes=fallen, references=references)

    def _is_quiet(self, device: str) -> bool:
        """
        Whether no call runs on any model on *device*, on whose thread this is.
        """
        # A copy: other devices' threads change it meanwhile.
        here = [e for e in list(self._present.values()) if e.key.device == device]
        return not any(each.whisper.model.num_active_batches for each in here)

    def parked(self) -> Mapping[ModelKey, int]:
        """
        The shells that have weights in them.
        """
        return self._shells.copies()

    def forget(self, key: ModelKey) -> None:
        """
        Drop a model's shell, and give its memory back.
        """
        self._shells.take(key)
        memory.return_free_memory()

    def return_memory(self, device: str) -> None:
        """
        Trim the heap: a load to a GPU, too, has its buffers on the host.
        """
        del device
        memory.return_free_memory()

    def shell_bytes(self) -> int:
        """
        What the shells take.
        """
        return self._shells.n_bytes

    def shrink_shells(self, most_bytes: int, but: Collection[ModelKey] = ()) -> None:
        """
        Drop shells, and give their memory back.
        """
        if self._shells.shrink(most_bytes, but):
            memory.return_free_memory()

    def read_ahead(self, files: ModelFiles) -> None:
        """
        Ask the kernel for model.bin.
        """
        if files.directory:  # else it is to be downloaded
            self._pages.start(Path(files.directory, "model.bin"))

    def read(self, files: ModelFiles) -> None:
        """
        Read model.bin.
        """
        try:
            read_through(Path(files.directory, "model.bin"))
        except OSError as error:
            raise LoadFailed(files.directory, f"it cannot be read: {error}") from error

    def abandon(self, loaded: LoadedModel) -> None:
        """
        Keep it for ever. CTranslate2 throws where CUDA does not free, and what a
        destructor throws ends the process.

        Source: src/cuda/allocator.cc @ 0ea0c41; read, not run.
        """
        self._present.pop(loaded.key, None)
        whisper = getattr(loaded, "whisper", None)
        if whisper is not None:  # the card may have broken right after it had gone
            _keep_for_ever(whisper)

    def lost(self, device: str) -> None:
        """
        Keep the parked models of *device* for ever, likewise.
        """
        for key in [each for each in self._shells.copies() if each.device == device]:
            shell = self._shells.take(key)
            if shell is not None and shell.whisper is not None:
                _keep_for_ever(shell.whisper)

    def forked(self, loaded: Iterable[LoadedModel]) -> None:
        """
        Keep the parent's models for ever: the threads that their destructors wait for
        are not in the child, which would hang at its exit.

        Source: CTranslate2 4.8.5, CPU: a child with a model in it never ended, and with
        one more reference it did.
        """
        kept = [shell.whisper for shell in self._shells.all() if shell.whisper]
        for whisper in (*kept, *(each.whisper for each in loaded)):
            _keep_for_ever(whisper)
        self._shells = Shells()
        self._pages = ReadAhead()
        self._downloading.clear()
        self._warm.clear()
        self._cold.clear()
        self._present.clear()
        self._lock = threading.Lock()
        if self._builder is not None:
            self._builder.forked()
        self.learned.forked()

    def quiesce(self, loaded: LoadedModel, timeout_s: float) -> bool:
        """
        Put something in the model's place that stops daemon threads.

        Source: a daemon thread in mid-transcription at exit was a SIGSEGV, 10 of 10
        times (CTranslate2 4.8.5, CPU).
        """
        model = loaded.whisper.model
        loaded.whisper.model = _Gone()
        give_up_s = time.monotonic() + timeout_s
        quiet = 0
        # A call may just be on its way to the model that it looked up before.
        while quiet < QUIET_LOOKS:
            if time.monotonic() > give_up_s:
                return False
            quiet = 0 if model.num_active_batches else quiet + 1
            time.sleep(0.002)
        return True

    def _held(self, device: str) -> release.Holdings:
        """
        Memory in use: of this process on the host, and both ways on a card.
        """
        if device == "cpu":
            return release.Holdings(None, memory.anonymous_bytes())
        return release.holdings(device, self.probe)

    def signatures(self) -> Mapping[str, Signature]:
        """
        Those of the faster-whisper that is installed.
        """
        _ctranslate2()
        from faster_whisper import BatchedInferencePipeline, WhisperModel
        from faster_whisper.vad import VadOptions

        return {
            "transcribe": signature_of(WhisperModel.transcribe),
            "batched": signature_of(BatchedInferencePipeline.transcribe),
            "detect_language": signature_of(WhisperModel.detect_language),
            "vad": _signature(VadOptions),
        }

    def batched(self, whisper: WhisperModel) -> Callable[..., object]:
        """
        A new pipeline each time: it keeps state from call to call.
        """
        _ctranslate2()
        from faster_whisper import BatchedInferencePipeline

        return swapped(BatchedInferencePipeline(whisper).transcribe, _swaps())

    def decode_audio(self, audio: AudioInput) -> NDArray[np.float32]:
        """
        Samples of a file, a binary stream, or an array that has them already.
        """
        import numpy as np

        if isinstance(audio, np.ndarray):
            return _as_samples(audio)
        from .audio.decoder import name_of, read_audio

        heard = read_audio(audio)
        if heard.damage is not None:
            _log.warning("%s is damaged: %s", name_of(audio), heard.damage)
        return heard.samples


def _as_samples(audio: NDArray[np.generic]) -> NDArray[np.float32]:
    """
    An array that was given in place of a file, if it holds samples.

    Raises:
        AudioError: it does not.
    """
    if audio.ndim == 1 and audio.dtype.kind == "f":
        return audio.astype("float32", copy=False)
    got = f"an array of {audio.dtype}, shape {audio.shape}"
    if audio.ndim == 1 and audio.dtype.kind == "i":
        full = 2 ** (8 * audio.dtype.itemsize - 1)
        mend = f"samples are floats in ±1: take audio.astype('float32') / {full}"
        raise AudioError(got, mend)
    raise AudioError(got, "samples are floats in one dimension")


_signature = functools.cache(inspect.signature)


def _keep_for_ever(whisper: WhisperModel) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(whisper.model))


def _references_left(loaded: LoadedModel) -> int:
    """
    How many refer to a model that nobody leases, and should not.
    """
    if loaded.count_references() > loaded.references:
        # Programs that put methods on a leased model tie it to itself.
        gc.collect()
    return max(0, loaded.count_references() - loaded.references)


class _StillLoaded(Exception):
    """
    A model did not unload; the text says what is in the way.
    """


def _unload_weights(loaded: LoadedModel, *, parks: bool) -> bool:
    """
    Unload until CTranslate2 says that it happened; whether a copy is on the host.

    Raises:
        _StillLoaded: it did not happen in time.
    """
    model = loaded.whisper.model
    give_up_s = time.monotonic() + UNLOAD_TRIES_S
    while True:
        # Returns without a word if a batch is active or its lock is taken.
        try:
            model.unload_model(to_cpu=parks)
        except (RuntimeError, MemoryError) as error:
            if not parks:
                raise
            # It may have lost its weights without knowing; only this mends it.
            _log.warning("%s leaves without a copy on the host: %s", loaded.key, error)
            parks = False
            continue
        if not model.model_is_loaded:
            return parks
        if time.monotonic() > give_up_s:
            raise _StillLoaded(f"{model.num_active_batches} batches are still active")
        time.sleep(0.0005)


def _expected_bytes(key: ModelKey, files: ModelFiles, grown: int | None) -> int:
    """
    What an unload should give back to a card: what was predicted, or was seen to come
    if that is less, as where an allocator had kept memory of the model before.
    """
    if key.device == "cpu" or files.source is None:
        return 0
    predicted = _estimate(files.source, key.compute_type, key.device)
    n_bytes = predicted.weights_bytes
    return n_bytes if grown is None else max(0, min(n_bytes, grown))


def _of_cublas(error: Exception, key: ModelKey) -> str:
    """
    What an error has to do with cuBLAS, and how to mend it; empty if nothing.

    Source: the texts of CTranslate2 4.8.5. Before 4.7 it asks for products in int8 that
    no cuBLAS has for Blackwell (OpenNMT/CTranslate2#1982).
    """
    if "libcublas" in str(error) or "cublas64" in str(error):
        return cublas_problem() or str(error)
    if classify(error) is not Fault.UNSUPPORTED:
        return ""
    why = release.cublas_reason(key.device) or (
        f"it cannot compute in {key.compute_type} on {key.device}"
    )
    other = "another device, such as 'cpu'"
    if key.compute_type.startswith("int8"):
        other = "compute_type='float16'"
    update = "pip install -U nvidia-cublas-cu12 ctranslate2"
    return f"{error}: {why}; {update}, or take {other}"


def _languages(whisper: WhisperModel, known: Knowledge | None) -> tuple[str, ...]:
    """
    The languages that a model has tokens for; faster-whisper lists all that there are.
    """
    every: list[str] = whisper.supported_languages
    return tuple(code for code in every if known is None or code in known.languages)


def _shell_of(loaded: LoadedModel, *, parks: bool) -> Shell:
    whisper = loaded.whisper
    tokenizer = whisper.hf_tokenizer
    copy_bytes = 0
    if parks and loaded.files.source is not None:
        predicted = _estimate(
            loaded.files.source, loaded.key.compute_type, loaded.key.device
        )
        copy_bytes = predicted.weights_bytes
    is_whole = loaded.key.device == "cpu" or copy_bytes > 0
    return Shell(
        loaded.files,
        tokenizer,
        tokenizer.get_vocab_size(),
        whisper if is_whole else None,
        copy_bytes,
    )


def _wanted_variant(key: ModelKey, files: ModelFiles) -> tuple[Origin, str] | None:
    """
    What to look for, if *files* would have to be converted at each load.
    """
    if files.original is not None or not isinstance(files.source, ModelHeader):
        return None
    kind = kind_for(files.source, key.compute_type)
    if kind is None:
        return None
    return Origin(key.model, files.source, files.stamp), kind


def _refuse(
    whisper: WhisperModel, method: str, error: Callable[[], CorruptModel]
) -> None:
    """
    Has a method of *whisper* raise an *error* where CTranslate2 would end the process,
    or say nothing of use.

    By its class, so that whatever is made after its likeness does so, too.
    """

    def refused(*_: object, **__: object) -> None:
        raise error()

    plain = type(whisper)
    whisper.__class__ = type(plain.__name__, (plain,), {method: refused})


def _tokenizer_of(files: ModelFiles, shells: Shells) -> Tokenizer:
    """
    The tokenizer of a model: its own, or else OpenAI's, as faster-whisper does.

    Raises:
        CorruptModel: it is broken, or numbers its tokens otherwise than the model.
        LoadFailed: there is none, and the hub cannot be reached.
    """
    path = os.path.join(files.directory, "tokenizer.json")
    vocabulary = claims_of(files).vocabulary
    if os.path.isfile(path):
        found, origin = shells.tokenizer(path), "tokenizer.json"
    else:
        repository = vocabulary.tokenizer
        found = _tokenizer_from_hub(files.directory, repository)
        origin = f"the tokenizer of {repository}"
    check_tokens(files.directory, vocabulary, found, origin)
    return found


def _tokenizer_from_hub(directory: str, repository: str) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_pretrained(repository)
    except Exception as error:  # tokenizers raises nothing narrower
        raise LoadFailed(
            directory,
            "it has no tokenizer.json and the model hub cannot be reached; put the "
            f"tokenizer.json of {repository} beside its model.bin",
        ) from error
