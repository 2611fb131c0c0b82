"""
The preparation of a call: checked, and with its audio decoded, before it takes a lease.

Whatever can be refused is refused here, so that no model is evicted for it.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from whispercache.engine.sizes.footprint import (
    DEFAULT_WORKLOAD,
    Workload,
    rounded_audio_s,
)

from .parameters import check_batch_size, checked, filters_speech, temperatures_of
from .signatures import bound

if TYPE_CHECKING:
    from collections.abc import Mapping
    from inspect import Signature

    import numpy as np
    from numpy.typing import NDArray

    from whispercache.engine.api import AudioInput

    from .languages import Knowledge

_RATE_HZ = 16_000


class Callee(Protocol):
    """
    A model, as far as calls on it are prepared. Its text is its name.
    """

    def decode_audio(self, audio: AudioInput) -> NDArray[np.float32]:
        """
        Returns the samples of *audio*.
        """

    def signatures(self) -> Mapping[str, Signature]:
        """
        Returns the parameters of calls; see `engine.api.Loader.signatures`.
        """

    def knowledge(self) -> Knowledge | None:
        """
        Returns the languages and tokens of the model, if they are known. May download.
        """


def workload_of(
    options: Mapping[str, object], batch_size: int | None, n_samples: int = 0
) -> Workload:
    """
    Returns the work of a ``transcribe`` call with these options.
    """

    def count(name: str) -> int:
        value = options.get(name)
        return value if isinstance(value, int) and value > 0 else 5

    is_batched = batch_size is not None
    return _known_workload(
        count("beam_size"),
        count("best_of"),
        batch_size or 1,
        any(temperature != 0 for temperature in temperatures_of(options)),
        rounded_audio_s(n_samples / _RATE_HZ),
        filters_speech(options, is_batched=is_batched),
    )


@functools.lru_cache(maxsize=256)
def _known_workload(*parts: Any) -> Workload:  # noqa: ANN401 - those of a Workload
    # The same object each time: footprints are memoized by it.
    workload = Workload(*parts)
    return DEFAULT_WORKLOAD if workload == DEFAULT_WORKLOAD else workload


@dataclass(frozen=True, slots=True)
class Prepared:
    """
    A call that was checked, ready for a lease.

    Attributes:
        samples: The audio; None if the call has features.
        options: Parameters by name, the call's own.
        batch_size: Windows at once of the batched pipeline; None without that.
        workload: Its work, for the reservation of memory.
    """

    samples: NDArray[np.float32] | None
    options: dict[str, object]
    batch_size: int | None
    workload: Workload


def prepared(
    source: Callee,
    audio: AudioInput,
    args: tuple[object, ...],
    options: Mapping[str, object],
    batch_size: int | None,
) -> Prepared:
    """
    Returns a call of ``transcribe``, checked and with its audio decoded.

    Blocks: for decoding; for a download, where only that tells whether the model knows
    the language.

    Raises:
        TypeError, ValueError: a parameter is nonsense, or the model does not know the
            language.
        AudioError: the audio cannot be decoded.
    """
    if batch_size is not None:
        batch_size = check_batch_size(batch_size)
    method = "transcribe" if batch_size is None else "batched"
    values = _values(source.signatures(), method, (audio, *args), options)
    if "language" in values:
        # A call that names none need not wait for this import.
        from .languages import language_code

        values["language"] = language_code(cast("str | None", values["language"]))
    check_knowledge(source, values)
    _check_position(audio)
    # Last, since it takes longest; and before the lease, so that it holds no model.
    samples = source.decode_audio(audio)
    workload = workload_of(values, batch_size, getattr(samples, "size", 0))
    return Prepared(samples, values, batch_size, workload)


def _values(
    signatures: Mapping[str, Signature],
    method: str,
    args: tuple[object, ...],
    options: Mapping[str, object],
) -> dict[str, object]:
    given = bound(signatures[method], args, options)
    given.pop("audio", None)
    vad = signatures.get("vad")
    names = () if vad is None else tuple(vad.parameters)
    return checked(given, is_batched=method == "batched", vad_names=names)


def _check_position(audio: AudioInput) -> None:
    if not hasattr(audio, "seek") or not hasattr(audio, "tell"):
        return
    try:
        position = audio.tell()
        # An asynchronous stream answers with a coroutine; the decoder refuses it.
        if not isinstance(position, int):
            return
        audio.seek(0, os.SEEK_END)
        # seek() of a mapped file returns nothing.
        end = audio.tell()
        audio.seek(position)
    except (OSError, ValueError):
        # A pipe, or a closed file: the decoder says so if it matters.
        return
    if 0 < end <= position:
        # Imported late: PyAV takes long.
        from whispercache.engine.audio.decoder import at_end

        raise at_end(audio)


def check_knowledge(source: Callee, values: Mapping[str, object]) -> None:
    """
    Refuses a call that `languages.check_knowledge` does, without a look at the files,
    which may have to be downloaded for it, where it asks for nothing special.
    """
    wants_words = bool(values.get("word_timestamps"))
    language = cast("str | None", values.get("language"))
    names_tokens = any(
        isinstance(values.get(name), list)
        for name in ("initial_prompt", "suppress_tokens")
    )
    if language is None and not names_tokens and not wants_words:
        # No look at the files, which may have to be downloaded for it.
        return
    from . import languages

    # Its text is made for an error alone.
    languages.check_knowledge(source, values, source.knowledge())


def prepared_detection(
    source: Callee,
    audio: AudioInput | None,
    args: tuple[object, ...],
    options: Mapping[str, object],
) -> Prepared:
    """
    Returns a call of ``detect_language``, checked and with its audio decoded.
    """
    signatures = source.signatures()
    values = _values(signatures, "detect_language", (audio, *args), options)
    if audio is None:
        if "features" in signatures["detect_language"].parameters and (
            values.get("features") is None
        ):
            raise TypeError("give audio, or features, to detect the language of")
        return Prepared(None, values, None, DEFAULT_WORKLOAD)
    _check_position(audio)
    samples = source.decode_audio(audio)
    workload = DEFAULT_WORKLOAD
    if values.get("vad_filter"):
        audio_s = rounded_audio_s(getattr(samples, "size", 0) / _RATE_HZ)
        workload = Workload(audio_s=audio_s, vad=True)
    return Prepared(samples, values, None, workload)
