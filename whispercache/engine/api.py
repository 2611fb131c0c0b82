"""
Protocols: all that a cache needs of the library that runs the models.

A loader of your own needs an `Engine`'s three methods:

    class Stub:
        def footprint(self, key, files, workload):
            return Footprint(10**9, 10**8, 10**9, 0)

        def load(self, key, files):
            return LoadedModel(key, files, MyModel(key.model))

        def unload(self, loaded, **_):
            loaded.whisper.close()
            return Released(confirmed=True)

    cache = ModelCache(loader=Stub())

The methods of the other protocols, which together are a `Loader`, are optional, each by
itself: adapter.py adds what lacks.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeAlias

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Iterable, Mapping
    from inspect import Signature

    import numpy as np
    from faster_whisper import WhisperModel
    from numpy.typing import NDArray

    from whispercache.keys import ModelKey, OptionValue

    from .calls.languages import Knowledge
    from .files import ModelFiles
    from .sizes.footprint import Footprint, Workload

    AudioInput: TypeAlias = str | os.PathLike[str] | BinaryIO | NDArray[np.float32]

__all__ = ["Engine", "LoadedModel", "Loader", "Released"]


@dataclass(slots=True)
class LoadedModel:
    """
    A model in memory, with what was read of it right after the load.

    Attributes:
        key: The key that it was loaded for.
        files: The files that it was loaded from.
        whisper: The model; deleted once it was unloaded.
        compute_type: The type that it computes in; that of the key if empty.
        is_multilingual: It knows other languages than English.
        supported_languages: Codes of the languages that it knows.
        measured_bytes: Growth of memory during the load, or None.
        reloaded: Only its weights were loaded; the rest had been kept.
        restored: The weights came from a copy in host memory, not from the disk.
        copy_bytes: Size of that copy, which stays beside the weights.
        expected_bytes: Bytes that an unload should give back to the card; 0 on the CPU.
        references: Number of references to it while nothing uses it.
        knowledge: Its languages and tokens, if they are known.
        lend: Returns what a lease hands out, so that what is set there stays there.
        cut: Makes all that was lent useless, since the model is gone.
    """

    key: ModelKey
    files: ModelFiles
    whisper: WhisperModel
    compute_type: str = ""
    is_multilingual: bool = True
    supported_languages: tuple[str, ...] = ()
    measured_bytes: int | None = None
    reloaded: bool = False
    restored: bool = False
    copy_bytes: int = 0
    expected_bytes: int = 0
    references: int = 0
    knowledge: Knowledge | None = None
    lend: Callable[[WhisperModel], WhisperModel] = lambda whisper: whisper
    cut: Callable[[], None] = lambda: None

    # A loader of a user's own computes in what it was asked for, as a rule.
    def __post_init__(self) -> None:
        self.compute_type = self.compute_type or self.key.compute_type

    @property
    def stamp(self) -> tuple[int, ...]:
        """
        The stamp of the files that were asked for.
        """
        return (self.files.original or self.files).stamp

    def count_references(self) -> int:
        """
        Counts the references to the model and to CTranslate2's part of it.
        """
        return sys.getrefcount(self.whisper) + sys.getrefcount(self.whisper.model)


@dataclass(frozen=True, slots=True)
class Released:
    """
    The outcome of an unload.

    Attributes:
        confirmed: The weights are off the device.
        returned_bytes: Fall of memory that was seen, or None.
        reason: The obstacle, if not confirmed.
        references: Number of references to the object that should not be there.
        unreturned_bytes: Bytes of a card that were not seen to be free again.
        used_bytes: Bytes that all programs used of the card afterwards, or None.
        peak_bytes: Most that this process used of the card since the load or unload
            before, or None.
    """

    confirmed: bool
    returned_bytes: int | None = None
    reason: str = ""
    references: int = 0
    unreturned_bytes: int = 0
    used_bytes: int | None = None
    peak_bytes: int | None = None


class Engine(Protocol):
    """
    The part that every loader has: sizes, loads and unloads.
    """

    def footprint(
        self, key: ModelKey, files: ModelFiles, workload: Workload
    ) -> Footprint:
        """
        Returns what the model will take, loaded from *files*. Called on any thread.
        """

    def load(self, key: ModelKey, files: ModelFiles) -> LoadedModel:
        """
        Loads a model, from the host copy of its weights if there is one, which stays.

        Blocks until it can be used; any exception means that it failed. Called on the
        thread of the model's device.
        """

    def unload(
        self, loaded: LoadedModel, *, load_follows: bool, parks: bool = False
    ) -> Released:
        """
        Frees a model's memory, and confirms that it is free. Called on the thread of
        the model's device.

        Args:
            loaded: The model, which nothing uses.
            load_follows: A load on the same device is next, which may use freed memory,
                and returns the rest to the system; or `return_memory` does.
            parks: A copy of the weights should stay on the host.
        """


class Devices(Protocol):
    """
    The devices that models can be loaded to.
    """

    def devices(self) -> tuple[str, ...]:
        """
        Returns ``"cpu"``, and ``"cuda:N"`` for each card.
        """

    def supported_compute_types(self, device: str) -> frozenset[str]:
        """
        Returns the effective types that *device* computes in.
        """

    def warm_up_needed(self, key: ModelKey) -> str:
        """
        Returns what comes before the first model in that type, in one line, or nothing.
        """

    def warm_up(self, key: ModelKey) -> int | None:
        """
        Does it, so that it counts for no model, and shows what is missing. Returns what
        the process keeps of the device for its life, or None if that was not measured
        now.

        Blocks: a second, or half a minute. Called on the thread of the device.
        """


class ModelStore(Protocol):
    """
    The files of models on this disk.
    """

    def locate(
        self, model: str, options: Mapping[str, OptionValue], *, download: bool
    ) -> ModelFiles | None:
        """
        Returns a model's files, downloaded if allowed and needed; None if not here.
        Blocks.

        Raises:
            CorruptModel: they are broken.
            LoadFailed: the download failed.
            UnknownModel: the hub has no such repository.
        """

    def choose(self, key: ModelKey, files: ModelFiles) -> ModelFiles:
        """
        Returns the files to load *key* from: *files*, or others that give the same
        model faster. Blocks for some system calls.
        """

    def read_ahead(self, files: ModelFiles) -> None:
        """
        Starts to read the files of a model that will soon be loaded. Returns at once.
        """

    def read(self, files: ModelFiles) -> None:
        """
        Reads the files of a model into the page cache. Blocks until that is done.
        """

    def follow_up(self, loaded: LoadedModel) -> None:
        """
        Starts work, such as building a variant, that makes the next load of this model
        faster, once nothing waits for this load any more. Returns at once.
        """


class Sizes(Protocol):
    """
    Measurements, which correct later footprints.
    """

    def remember(self, key: ModelKey, files: ModelFiles, measured_bytes: int) -> None:
        """
        Notes the growth of memory during a load that nothing else disturbed.
        """

    def remember_work(
        self, device: str, predicted_bytes: int, measured_bytes: int
    ) -> None:
        """
        Notes what calls took of a card at their peak.
        """


class HostMemory(Protocol):
    """
    The host memory that unloaded models keep.
    """

    def host_copies(self) -> Mapping[ModelKey, int]:
        """
        Returns the bytes of the host copies of unloaded models' weights.
        """

    def forget(self, key: ModelKey) -> None:
        """
        Drops whatever is kept of an unloaded model, on the thread of its device.
        """

    def kept_bytes(self) -> int:
        """
        Returns the bytes that are kept of unloaded models, host copies included.
        """

    def shrink_kept(self, most_bytes: int, but: Collection[ModelKey] = ()) -> None:
        """
        Drops what is kept until no more than *most_bytes* are left, besides those of
        *but*. Called on the thread of any device.
        """

    def return_memory(self, device: str) -> None:
        """
        Returns to the system what was freed on *device*.
        """


class ProcessLife(Protocol):
    """
    Lost devices, forks, and the end of the interpreter.
    """

    def abandon(self, loaded: LoadedModel) -> None:
        """
        Keeps a model for ever: its device was lost, and freeing it would fail.
        """

    def lost(self, device: str) -> None:
        """
        Keeps the host copies of models of *device* for ever, likewise.
        """

    def forked(self, loaded: Iterable[LoadedModel]) -> None:
        """
        Prepares a forked child: nothing of the parent's models may be freed, or wait.
        """

    def quiesce(self, loaded: LoadedModel, timeout_s: float) -> bool:
        """
        Stops daemon threads at a model, as the interpreter ends, and waits for calls in
        flight. Returns True if they ended in time.
        """


class Calls(Protocol):
    """
    The calls that a model takes, and their audio.
    """

    def signatures(self) -> Mapping[str, Signature]:
        """
        Returns the parameters of ``transcribe``, of ``transcribe`` of the batched
        pipeline (``"batched"``), of ``detect_language``, and of the options of voice
        activity detection (``"vad"``) if they are known; without ``self``.
        """

    def batched(self, whisper: WhisperModel) -> Callable[..., object]:
        """
        Returns the ``transcribe`` of the batched pipeline over a model.
        """

    def whisper_class(self) -> type[WhisperModel] | None:
        """
        Returns the class of which `ModelCache.get_model` gives out an instance; None if
        its models are not of it, and calls are passed to them as they are.
        """

    def initialize(
        self, whisper: WhisperModel, files: ModelFiles, model: object
    ) -> None:
        """
        Sets all attributes of a new instance of that class, *model* for CTranslate2's
        part of it, without loading weights. Called on any thread. Blocks for parsing a
        tokenizer.
        """

    def decode_audio(self, audio: AudioInput) -> NDArray[np.float32]:
        """
        Returns the samples of *audio*: float32 (samples,), mono, 16 kHz.

        Raises:
            AudioError, OSError: it cannot be decoded, or opened.
        """


class Loader(
    Engine, Devices, ModelStore, Sizes, HostMemory, ProcessLife, Calls, Protocol
):
    """
    All of it: the interface that the cache calls.
    """
