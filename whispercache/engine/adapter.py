"""
The adapter that makes a full `Loader` of one that has only some of its methods.
"""

from __future__ import annotations

import inspect
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from whispercache.keys import TYPICAL_COMPUTE_TYPES

from .api import Engine, Loader
from .files import ModelFiles
from .sizes.architecture import HUB_COMPUTE_TYPE

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from inspect import Signature

    import numpy as np
    from faster_whisper import WhisperModel
    from numpy.typing import NDArray

    from whispercache.keys import ModelKey, OptionValue

    from .api import AudioInput, LoadedModel

__all__ = ["completed"]


def completed(engine: Engine) -> Loader:
    """
    Returns *engine* itself if it has all methods of a `Loader`, or else an object that
    has its methods, and a default for each that it lacks.

    By default there is the CPU alone, all files are here, nothing is measured or kept
    beside loaded models, calls take any parameters, and audio is decoded as for
    faster-whisper.

    Raises:
        TypeError: it lacks a method of an `Engine`.
    """
    lacking = [name for name in _methods(Engine) if not hasattr(engine, name)]
    if lacking:
        wanted = ", ".join(_methods(Engine))
        raise TypeError(
            f"a loader needs {wanted}; {type(engine).__name__} has no "
            f"{' or '.join(lacking)}"
        )
    there = [name for name in _methods(Loader) if hasattr(engine, name)]
    if len(there) == len(_methods(Loader)):
        return cast("Loader", engine)
    made = _Defaults()
    for name in there:
        setattr(made, name, getattr(engine, name))
    return cast("Loader", made)


def _methods(protocol: type) -> list[str]:
    return [name for name in dir(protocol) if not name.startswith("_")]


def _call(audio: object = None, **options: object) -> None:
    """
    Any call; for its signature.
    """


class _Defaults:
    """
    The defaults of all optional methods.
    """

    # Devices

    def devices(self) -> tuple[str, ...]:
        return ("cpu",)

    def supported_compute_types(self, device: str) -> frozenset[str]:
        return TYPICAL_COMPUTE_TYPES[device.partition(":")[0]]

    def warm_up_needed(self, key: ModelKey) -> str:
        del key
        return ""

    def warm_up(self, key: ModelKey) -> int | None:
        del key
        return None

    # ModelStore

    def locate(
        self, model: str, options: Mapping[str, OptionValue], *, download: bool
    ) -> ModelFiles | None:
        del options, download
        return ModelFiles(model, HUB_COMPUTE_TYPE)

    def choose(self, key: ModelKey, files: ModelFiles) -> ModelFiles:
        del key
        return files

    def read_ahead(self, files: ModelFiles) -> None:
        pass

    def read(self, files: ModelFiles) -> None:
        pass

    def follow_up(self, loaded: LoadedModel) -> None:
        pass

    # Sizes

    def remember(self, key: ModelKey, files: ModelFiles, measured_bytes: int) -> None:
        pass

    def remember_work(
        self, device: str, predicted_bytes: int, measured_bytes: int
    ) -> None:
        pass

    # HostMemory

    def parked(self) -> Mapping[ModelKey, int]:
        return MappingProxyType({})

    def forget(self, key: ModelKey) -> None:
        pass

    def shell_bytes(self) -> int:
        return 0

    def shrink_shells(self, most_bytes: int, but: Collection[ModelKey] = ()) -> None:
        pass

    def return_memory(self, device: str) -> None:
        pass

    # ProcessLife

    def abandon(self, loaded: LoadedModel) -> None:
        pass

    def lost(self, device: str) -> None:
        pass

    def forked(self, loaded: Iterable[LoadedModel]) -> None:
        pass

    def quiesce(self, loaded: LoadedModel, timeout_s: float) -> bool:
        del loaded, timeout_s
        return True

    # Calls

    def signatures(self) -> Mapping[str, Signature]:
        anything = inspect.signature(_call)
        return dict.fromkeys(("transcribe", "batched", "detect_language"), anything)

    def batched(self, whisper: WhisperModel) -> Callable[..., object]:
        transcribe: Callable[..., object] = whisper.transcribe
        return transcribe

    def decode_audio(self, audio: AudioInput) -> NDArray[np.float32]:
        # Imported late, as it needs numpy.
        from .audio.samples import samples_of

        return samples_of(audio)
