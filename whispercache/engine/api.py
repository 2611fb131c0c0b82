"""
Loading: what a cache needs of the library that runs the models.

A `Loader` loads a `LoadedModel` and tells how it was `Released`; loader.py has the one
for faster-whisper, testing.py a fake.
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

__all__ = ["LoadedModel", "Loader", "Released"]


@dataclass(slots=True)
class LoadedModel:
    """
    A model in memory, with what was read of it right after the load.

    Attributes:
        key: What it was loaded as.
        files: Where from.
        whisper: The model; deleted once it was unloaded.
        compute_type: What it computes in.
        is_multilingual: Whether it knows other languages than English.
        supported_languages: Their codes.
        measured_bytes: Growth of memory during the load, or None.
        reloaded: Only its weights were brought back; the rest had been kept.
        restored: They came from a copy in host memory, and were not even read.
        copy_bytes: What that copy takes, beside the weights.
        expected_bytes: What an unload should give back to the card; 0 on the CPU.
        references: How many refer to it while nobody uses it.
        knowledge: Its languages and tokens, if they are known.
        lend: What a holder of a lease gets of it, so that what is set there is his own.
    """

    key: ModelKey
    files: ModelFiles
    whisper: WhisperModel
    compute_type: str
    is_multilingual: bool
    supported_languages: tuple[str, ...]
    measured_bytes: int | None = None
    reloaded: bool = False
    restored: bool = False
    copy_bytes: int = 0
    expected_bytes: int = 0
    references: int = 0
    knowledge: Knowledge | None = None
    lend: Callable[[WhisperModel], WhisperModel] = lambda whisper: whisper

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
        unreturned_bytes: What they took of a card and was not seen to be free.
        used_bytes: What all programs used of the card afterwards, or None.
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


class Loader(Protocol):
    """
    What a cache needs of the library that runs the models.

    `warm_up`, `load`, `unload` and `forget` are called on the thread of the model's
    device, the rest on any.
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

    def choose(self, key: ModelKey, files: ModelFiles) -> ModelFiles:
        """
        What to load *key* from: *files*, or others that give the same model faster.

        Blocks: for some system calls.
        """

    def footprint(
        self, key: ModelKey, files: ModelFiles, workload: Workload
    ) -> Footprint:
        """
        What the model will take, loaded from *files*.
        """

    def remember(self, key: ModelKey, files: ModelFiles, measured_bytes: int) -> None:
        """
        Let a quiet measurement correct later footprints.
        """

    def remember_work(
        self, device: str, predicted_bytes: int, measured_bytes: int
    ) -> None:
        """
        Let what calls took of a card at their peak correct later footprints.
        """

    def read_ahead(self, files: ModelFiles) -> None:
        """
        Have the files of a model read that will soon be loaded. Returns at once.
        """

    def read(self, files: ModelFiles) -> None:
        """
        Read the files of a model into the page cache. Blocks until that is done.
        """

    def warm_up_needed(self, key: ModelKey) -> str:
        """
        What the device of *key* has to do before its first model in that type, in one
        line; empty if nothing.
        """

    def warm_up(self, key: ModelKey) -> int | None:
        """
        Have it done, so that it counts for no model, and shows what is missing.

        Returns:
            What the process keeps of the device for its life, or None if that was not
            measured now.

        Blocks: a second, or half a minute; `warm_up_needed` says which.
        """

    def load(self, key: ModelKey, files: ModelFiles) -> LoadedModel:
        """
        Load a model, from the copy of its weights if there is one, which then stays.

        Blocks until it can be used; any exception means that it failed.
        """

    def follow_up(self, loaded: LoadedModel) -> None:
        """
        Do what the next load of a model will be glad of, now that nobody waits for this
        one. Returns at once.
        """

    def unload(
        self, loaded: LoadedModel, *, load_follows: bool, parks: bool = False
    ) -> Released:
        """
        Free a model's memory, and make sure that it is free.

        If *load_follows* on the same device, memory may be left for that load to use,
        which returns the rest to the system when it ends; or else `return_memory` will.
        If it *parks*, a copy of its weights should stay on the host.
        """

    def parked(self) -> Mapping[ModelKey, int]:
        """
        The models that have left and whose weights are on the host, with their bytes.
        """

    def forget(self, key: ModelKey) -> None:
        """
        Keep nothing of a model that has left.
        """

    def shell_bytes(self) -> int:
        """
        Host memory that is kept of models that have left, so that they return faster;
        of which `parked` is a part.
        """

    def shrink_shells(self, most_bytes: int, but: Collection[ModelKey] = ()) -> None:
        """
        Keep no more than *most_bytes* of that, besides what *but* left.

        Called on the thread of a device.
        """

    def return_memory(self, device: str) -> None:
        """
        Give back to the system what was freed on *device*.
        """

    def abandon(self, loaded: LoadedModel) -> None:
        """
        Let a model never be freed: its device was lost, and freeing would fail.
        """

    def lost(self, device: str) -> None:
        """
        Likewise with what models have left behind that were on *device*.
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

    def signatures(self) -> Mapping[str, Signature]:
        """
        The parameters of ``transcribe``, of ``transcribe`` of the batched pipeline
        (``"batched"``), of ``detect_language``, and of the options of voice activity
        detection (``"vad"``) if they are known; without ``self``.
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
