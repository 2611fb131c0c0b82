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
import hashlib
import logging
import os
import sys
import threading
import time
import types
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeAlias, cast

from cachetools import LRUCache

from . import memory
from .errors import (
    AudioError,
    CacheClosed,
    CacheForked,
    CorruptModel,
    DeviceUnavailable,
    LoadFailed,
    UnknownModel,
    WhisperCacheError,
)
from .features import InBlocks
from .footprint import estimate, read_header
from .keys import MODELS, is_directory
from .learned import LearnedFootprints

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import numpy as np
    from faster_whisper import WhisperModel
    from numpy.typing import NDArray

    from .footprint import Footprint, Source, Workload
    from .keys import ModelKey, OptionValue
    from .memory import MemoryProbe

    AudioInput: TypeAlias = str | os.PathLike[str] | BinaryIO | NDArray[np.float32]

__all__ = [
    "FasterWhisperLoader",
    "LoadedModel",
    "Loader",
    "ModelFiles",
    "Released",
    "versions",
]

_log = logging.getLogger("whispercache")

UNLOAD_TRIES_S = 2.0
"""
Seconds for which a busy model is asked again to unload before that counts as refused.

Source: right after a finished call 72 of 100 unloads did nothing, and a retry loop
ended within 4.2 ms (CTranslate2 4.8.5, CPU); the rest allows for a card's slowest
kernel.
"""

HEAP_SLACK = 1.25
"""
What a load on the CPU reserves, as a multiple of its predicted peak.

Source: with the heap's holes and the shell that the model before left, loads of base to
int8 in turn with tiny.en peaked at 1.21 times the prediction (benchmarks/switch.py).
"""

QUIET_LOOKS = 10
"""
Looks at a model, 2 ms apart, that must find no batch before it counts as quiet.
"""

KEPT_SHELLS = 4
KEPT_TOKENIZERS = 4

_HUB_FILES = (
    "config.json",
    "preprocessor_config.json",
    "model.bin",
    "tokenizer.json",
    "vocabulary.*",
)


_STAMPED = (
    *("model.bin", "config.json", "preprocessor_config.json", "tokenizer.json"),
    *("vocabulary.json", "vocabulary.txt"),
)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """
    Where a model's files are, and what its header says.

    Attributes:
        directory: The directory with model.bin.
        saved_compute_type: The type of the weights in the file.
        stamp: Size, time and inode of each file when the header was read.
        source: The header, or the architecture of a known size whose files are not
            here; None where a loader needs neither.
    """

    directory: str
    saved_compute_type: str
    stamp: tuple[int, ...] = ()
    source: Source | None = None


@dataclass(slots=True)
class LoadedModel:
    """
    A model in memory, with what was read of it right after the load.

    Attributes:
        key: What it was loaded as.
        files: Where from.
        whisper: The model; None once it was unloaded.
        compute_type: What it computes in.
        is_multilingual: Whether it knows other languages than English.
        supported_languages: Their codes.
        measured_bytes: Growth of memory during the load, or None.
        reloaded: Only its weights were read; the rest had been kept.
        references: How many refer to it while nobody uses it.
    """

    key: ModelKey
    files: ModelFiles
    whisper: WhisperModel
    compute_type: str
    is_multilingual: bool
    supported_languages: tuple[str, ...]
    measured_bytes: int | None = None
    reloaded: bool = False
    references: int = 0

    def count_references(self) -> int:
        """
        How many refer to the model now, to it and to CTranslate2's part of it.
        """
        return sys.getrefcount(self.whisper) + sys.getrefcount(self.whisper.model)


@dataclass(frozen=True, slots=True)
class Released:
    """
    How an unload ended.

    Attributes:
        confirmed: The weights have left the device.
        returned_bytes: Fall of memory that was seen, or None.
        reason: What was seen instead, if not confirmed.
        references: References to the object that are left, but should not be.
    """

    confirmed: bool
    returned_bytes: int | None = None
    reason: str = ""
    references: int = 0


class Loader(Protocol):
    """
    What a cache needs of the library that runs the models.

    `load` and `unload` are called on the thread of the model's device, the rest on any.
    """

    def devices(self) -> tuple[str, ...]:
        """
        Where models can be loaded: ``"cpu"``, and ``"cuda:N"`` for each card.
        """

    def supported_compute_types(self, device: str) -> frozenset[str]:
        """
        The effective types that *device* computes in.
        """

    def locate(
        self, model: str, options: Mapping[str, OptionValue], *, download: bool
    ) -> ModelFiles | None:
        """
        A model's files, downloaded if allowed and needed; None if they are not here.

        Blocks for a download.

        Raises:
            CorruptModel: they are broken.
            LoadFailed: the download failed.
            UnknownModel: the hub has no such repository.
        """

    def footprint(
        self, key: ModelKey, files: ModelFiles, workload: Workload
    ) -> Footprint:
        """
        What the model will take.
        """

    def remember(self, key: ModelKey, files: ModelFiles, measured_bytes: int) -> None:
        """
        Let a quiet measurement correct later footprints.
        """

    def load(self, key: ModelKey, files: ModelFiles) -> LoadedModel:
        """
        Load a model. Blocks until it can be used; any exception means that it failed.
        """

    def unload(self, loaded: LoadedModel, *, load_follows: bool) -> Released:
        """
        Free a model's memory, and make sure that it is free.

        If *load_follows* on the same device, memory may be left for that load to use,
        which returns the rest to the system when it ends; or else `return_memory` will.
        """

    def return_memory(self, device: str) -> None:
        """
        Give back to the system what was freed on *device*.
        """

    def forked(self, loaded: Iterable[LoadedModel]) -> None:
        """
        Let nothing of the parent's models be freed, or wait, in a child that was
        forked.
        """

    def quiesce(self, loaded: LoadedModel, timeout_s: float) -> bool:
        """
        Let daemon threads begin no more calls on a model, at the interpreter's end, and
        wait for those in flight; whether they ended in time.
        """

    def batched(self, whisper: WhisperModel) -> Callable[..., object]:
        """
        The ``transcribe`` of the batched pipeline over a model.
        """

    def decode_audio(self, audio: AudioInput) -> NDArray[np.float32]:
        """
        Samples of *audio*: float32 (samples,), mono, 16 kHz.

        Raises:
            AudioError: it cannot be decoded.
            OSError: it cannot be opened.
        """


@dataclass(slots=True)
class _Shell:
    """
    A model without weights: tokenizer, feature extractor, worker threads.
    """

    whisper: WhisperModel
    files: ModelFiles


@functools.cache
def _ctranslate2() -> types.ModuleType:
    """
    CTranslate2, imported in such a way that its idle threads sleep.

    GNU OpenMP's threads spin for a while after each piece of work. Where anything else
    wants the cores, loads to int8 and transcriptions then take several times as long;
    where nothing does, sleeping costs nothing that could be measured. The variable is
    read once, by CTranslate2's own copy of OpenMP; a value that is set already stands.

    Source: two busy cores, CTranslate2 4.8.5: base to int8 in 0.29 s against 1.12 s, a
    transcription by base in 2.0 s against 6.0 s.
    """
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


class _Tokenizers:
    """
    Builds models that share one tokenizer per content of tokenizer.json.

    Parsing it takes a third of a small model's load and holds the GIL all the while,
    and WhisperModel's constructor has no hook for it. So the constructor is run with
    its own view of the name ``tokenizers``; faster-whisper's module stays as it is.

    Source: one shared by six threads, 346,000 operations, no error (tokenizers 0.22).
    """

    def __init__(self) -> None:
        self._by_content: LRUCache[bytes, object] = LRUCache(KEPT_TOKENIZERS)
        self._lock = threading.Lock()

    def build(self, directory: str, **options: object) -> WhisperModel:
        """
        A `WhisperModel` of *directory*, its tokenizer shared.
        """
        _ctranslate2()
        from faster_whisper import WhisperModel

        plain = WhisperModel.__init__
        shared = types.SimpleNamespace(
            Tokenizer=types.SimpleNamespace(
                from_file=self.from_file,
                from_pretrained=partial(_tokenizer_from_hub, directory),
            )
        )
        init = types.FunctionType(
            plain.__code__,
            {**plain.__globals__, "tokenizers": shared},
            plain.__name__,
            plain.__defaults__,
            plain.__closure__,
        )
        init.__kwdefaults__ = plain.__kwdefaults__
        whisper: WhisperModel = WhisperModel.__new__(WhisperModel)
        init(whisper, directory, **options)
        return whisper

    def from_file(self, path: str) -> object:
        """
        The tokenizer of a tokenizer.json, parsed once.
        """
        from tokenizers import Tokenizer

        content = Path(path).read_bytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        with self._lock:
            tokenizer = self._by_content.get(digest)
        if tokenizer is None:
            try:
                tokenizer = Tokenizer.from_buffer(content)
            except Exception as error:  # tokenizers raises nothing narrower
                raise CorruptModel(path, str(error)) from error
            with self._lock:
                self._by_content[digest] = tokenizer
        return tokenizer


@dataclass(slots=True)
class FasterWhisperLoader:
    """
    Loads `faster_whisper.WhisperModel`.

    Attributes:
        probe: Gauge for measurements on GPUs.
        learned: Corrections of footprints that were measured before.
    """

    probe: MemoryProbe
    learned: LearnedFootprints = field(default_factory=LearnedFootprints)
    _shells: LRUCache[ModelKey, _Shell] = field(
        default_factory=lambda: LRUCache(KEPT_SHELLS)
    )
    _tokenizers: _Tokenizers = field(default_factory=_Tokenizers)
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
            return _files_in(model)
        here = _snapshot(model, options, local_files_only=True)
        if download and not (here and _is_whole(here)):
            with self._lock:
                downloading = self._downloading.setdefault(model, threading.Lock())
            with downloading:
                here = _downloaded(model, options)
        return None if here is None else _files_in(here)

    def footprint(
        self, key: ModelKey, files: ModelFiles, workload: Workload
    ) -> Footprint:
        """
        From the header or the architecture, corrected by what was measured before.
        """
        assert files.source is not None
        predicted = estimate(files.source, key.compute_type, key.device, workload)
        weights_bytes = self.learned.correct(
            key.model,
            key.compute_type,
            self.probe.device_name(key.device),
            predicted.weights_bytes,
        )
        # Upwards only: a load into memory that an earlier one left looks too small.
        growth_bytes = max(0, weights_bytes - predicted.weights_bytes)
        loading_bytes = predicted.loading_bytes + growth_bytes
        if key.device == "cpu":
            loading_bytes = int(loading_bytes * HEAP_SLACK)
        return replace(
            predicted,
            weights_bytes=predicted.weights_bytes + growth_bytes,
            loading_bytes=loading_bytes,
        )

    def remember(self, key: ModelKey, files: ModelFiles, measured_bytes: int) -> None:
        """
        Note what a load took, for the next footprint.
        """
        assert files.source is not None
        predicted = estimate(files.source, key.compute_type, key.device)
        self.learned.record(
            key.model,
            key.compute_type,
            self.probe.device_name(key.device),
            predicted.weights_bytes,
            measured_bytes,
        )

    def load(self, key: ModelKey, files: ModelFiles) -> LoadedModel:
        """
        Build the model, or read the weights back into a shell that was kept.
        """
        if _stamp(files.directory) != files.stamp:
            raise LoadFailed(
                str(key), "its files changed while the request waited; ask again"
            )
        _use_in_this_process()
        before = self._held_bytes(key.device)
        with self._lock:
            shell = self._shells.pop(key, None)
        # A shell of other files would decode the new weights with the old tokenizer.
        if shell is not None and shell.files == files:
            whisper = shell.whisper
            whisper.model.load_model()
        else:
            shell = None
            whisper = self._build(key, files)
        model = whisper.model
        if model.compute_type != key.compute_type:
            _log.warning("%s computes in %s", key, model.compute_type)
        if shell is None:
            # A reload leaves its buffers for the next one; `return_memory` comes later.
            memory.return_free_memory()
        after = self._held_bytes(key.device)
        grown = None if before is None or after is None else after - before
        loaded = LoadedModel(
            key=key,
            files=files,
            whisper=whisper,
            compute_type=str(model.compute_type),
            is_multilingual=bool(model.is_multilingual),
            supported_languages=tuple(whisper.supported_languages),
            measured_bytes=None if shell else grown,
            reloaded=shell is not None,
        )
        del model, whisper, shell
        loaded.references = loaded.count_references()
        return loaded

    def _build(self, key: ModelKey, files: ModelFiles) -> WhisperModel:
        kind, _, index = key.device.partition(":")
        options = dict(key.options)
        for hub_option in ("download_root", "revision"):
            options.pop(hub_option, None)
        whisper = self._tokenizers.build(
            files.directory,
            device=kind,
            device_index=int(index or 0),
            compute_type=key.compute_type,
            **options,
        )
        whisper.feature_extractor = InBlocks(whisper.feature_extractor)
        return whisper

    def unload(self, loaded: LoadedModel, *, load_follows: bool) -> Released:
        """
        Unload the weights, ask again until they are gone, and return the memory.

        A load that follows at once takes the freed pages as they are: asking the system
        for new ones costs a third of a small model's load.

        On the CPU the shell is kept for a while. On a GPU it would keep cuBLAS handles
        and their memory on the card, so the whole object goes.
        """
        before = self._held_bytes(loaded.key.device)
        references = max(0, loaded.count_references() - loaded.references)
        model = loaded.whisper.model
        give_up_s = time.monotonic() + UNLOAD_TRIES_S
        while True:
            # Returns without a word if a batch is active or its lock is taken.
            model.unload_model()
            if not model.model_is_loaded:
                break
            if time.monotonic() > give_up_s:
                reason = f"{model.num_active_batches} batches are still active"
                return Released(confirmed=False, reason=f"not unloaded: {reason}")
            time.sleep(0.0005)
        if loaded.key.device == "cpu":
            with self._lock:
                self._shells[loaded.key] = _Shell(loaded.whisper, loaded.files)
        del model, loaded.whisper
        if load_follows:
            return Released(confirmed=True, references=references)
        self.return_memory(loaded.key.device)
        after = self._held_bytes(loaded.key.device)
        fallen = None if before is None or after is None else before - after
        return Released(confirmed=True, returned_bytes=fallen, references=references)

    def return_memory(self, device: str) -> None:
        """
        Trim the heap: a load to a GPU, too, has its buffers on the host.
        """
        del device
        memory.return_free_memory()

    def forked(self, loaded: Iterable[LoadedModel]) -> None:
        """
        Keep the parent's models for ever: the threads that their destructors wait for
        are not in the child, which would hang at its exit.

        Source: CTranslate2 4.8.5, CPU: a child with a model in it never ended, and with
        one more reference it did.
        """
        shells = [shell.whisper for shell in self._shells.values()]
        for whisper in (*shells, *(each.whisper for each in loaded)):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(whisper.model))
        self._shells.clear()
        self._downloading.clear()
        self._lock = threading.Lock()
        self._tokenizers = _Tokenizers()
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

    def _held_bytes(self, device: str) -> int | None:
        """
        Memory in use: of this process on the host, of all programs on a card.
        """
        if device == "cpu":
            return memory.anonymous_bytes()
        try:
            reading = self.probe.read(device)
        except DeviceUnavailable:
            return None
        return reading.total_bytes - reading.free_bytes

    def batched(self, whisper: WhisperModel) -> Callable[..., object]:
        """
        A new pipeline each time: it keeps state from call to call.
        """
        _ctranslate2()
        from faster_whisper import BatchedInferencePipeline

        return BatchedInferencePipeline(whisper).transcribe  # type: ignore[no-any-return]

    def decode_audio(self, audio: AudioInput) -> NDArray[np.float32]:
        """
        Samples of a file, a binary stream, or an array that has them already.
        """
        import numpy as np

        _ctranslate2()
        from faster_whisper.audio import decode_audio

        if isinstance(audio, np.ndarray):
            if audio.ndim != 1 or audio.dtype.kind != "f":
                got = f"an array of {audio.dtype}, shape {audio.shape}"
                raise AudioError(got, "samples are floats in one dimension")
            return audio.astype(np.float32, copy=False)
        name = repr(os.fspath(audio)) if isinstance(audio, (str, os.PathLike)) else ""
        source = os.fspath(audio) if isinstance(audio, os.PathLike) else audio
        try:
            samples: NDArray[np.float32] = decode_audio(source)
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except (ValueError, IndexError, OSError, TypeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            if isinstance(error, IndexError):  # there is no first stream of audio
                reason = "no audio in it"
            raise AudioError(name or type(audio).__name__, reason) from error
        if not samples.size:
            raise AudioError(name or type(audio).__name__, "no audio in it")
        return samples


def _tokenizer_from_hub(directory: str, repository: str) -> object:
    """
    The tokenizer of a model that brings none, from the hub, as faster-whisper does.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_pretrained(repository)
    except Exception as error:  # tokenizers raises nothing narrower
        raise LoadFailed(
            directory,
            "it has no tokenizer.json and the model hub cannot be reached; put the "
            f"tokenizer.json of {repository} beside its model.bin",
        ) from error


def _stamp(directory: str) -> tuple[int, ...]:
    stamp: list[int] = []
    for name in _STAMPED:
        try:
            status = os.stat(os.path.join(directory, name))
        except FileNotFoundError as error:
            if name == "model.bin":
                raise LoadFailed(directory, "its model.bin is gone") from error
            stamp.append(0)
        except OSError as error:
            raise LoadFailed(directory, f"{name} cannot be read: {error}") from error
        else:
            stamp += status.st_size, status.st_mtime_ns, status.st_ino
    return tuple(stamp)


def _files_in(directory: str) -> ModelFiles:
    stamp = _stamp(directory)
    header = read_header(directory)
    if not Path(directory, "config.json").is_file():
        raise CorruptModel(directory, "config.json is missing")
    return ModelFiles(directory, header.saved_compute_type, stamp, header)


def _downloaded(model: str, options: Mapping[str, OptionValue]) -> str:
    """
    Directory of a repository, after a download if need be.
    """
    # Somebody else may have fetched it while this caller waited.
    here = _snapshot(model, options, local_files_only=True)
    if here is not None and (_is_whole(here) or options.get("local_files_only")):
        return here
    if options.get("local_files_only"):
        raise LoadFailed(
            model,
            "it is not on this disk and local_files_only is set; allow the download, "
            "or give the directory of a model",
        )
    _log.info("downloading %s", model)
    try:
        fetched = _snapshot(model, options, local_files_only=False)
    except LoadFailed:
        if here is None:
            raise
        return here
    assert fetched is not None
    return fetched


def _is_whole(directory: str) -> bool:
    """
    Whether no file is missing, as after an interrupted download.

    huggingface-hub tells by itself from 2.0 on only. A few repositories have no
    tokenizer; they look interrupted for ever, which costs a question to the hub each
    time.
    """
    found = set(os.listdir(directory))
    return {"config.json", "model.bin", "tokenizer.json"} <= found and any(
        name.startswith("vocabulary.") for name in found
    )


def _snapshot(
    model: str, options: Mapping[str, OptionValue], *, local_files_only: bool
) -> str | None:
    """
    Directory of a repository in the hub's local cache, after a download if allowed.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    token = options.get("use_auth_token")
    try:
        directory = snapshot_download(
            MODELS.get(model, model),
            revision=_text(options.get("revision")),
            cache_dir=_text(options.get("download_root")),
            token=token if isinstance(token, bool) else _text(token),
            local_files_only=local_files_only,
            allow_patterns=list(_HUB_FILES),
        )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        reason = "the model hub has no such repository or revision, or it is private"
        raise UnknownModel(model, reason) from error
    except Exception as error:  # also those of its HTTP library, whichever that is
        if local_files_only:
            return None
        raise _unreachable(model, error) from error
    # An interrupted download leaves a snapshot without its largest file.
    if not Path(directory, "model.bin").is_file():
        if local_files_only:
            return None
        raise UnknownModel(model, "the repository has no model.bin for CTranslate2")
    return str(directory)


def _text(value: OptionValue) -> str | None:
    return None if value is None else str(value)


def _unreachable(model: str, error: Exception) -> WhisperCacheError:
    first = str(error).strip().partition("\n")[0]
    return LoadFailed(
        model,
        f"it is not on this disk and the download failed ({first}); check the network, "
        "or give the directory of a model",
    )
