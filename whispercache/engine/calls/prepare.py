"""
The preparation of a call: checked, and with its audio decoded, before it takes a lease.

Whatever can be refused is refused here, so that no model is evicted for it.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from whispercache.engine.rebound import plain_of
from whispercache.engine.sizes.footprint import (
    DEFAULT_WORKLOAD,
    Workload,
    rounded_audio_s,
)

from .parameters import check_batch_size, checked, filters_speech, temperatures_of
from .signatures import bound, default_lists

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from inspect import Signature

    import numpy as np
    from numpy.typing import NDArray

    from whispercache.engine.api import AudioInput

    from .languages import Knowledge

_RATE_HZ = 16_000

# Of these types one value is as good as an equal one, and no call can change it.
_PLAIN = frozenset((type(None), bool, int, float, str))
# Sets of parameters whose check is kept. Most programs have a few.
_MOST_KEPT = 64


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


@dataclass(slots=True)
class Prepared:
    """
    A call that was checked, ready for a lease.

    Attributes:
        samples: The audio; None if the call has features.
        options: Parameters by name, the call's own.
        batch_size: Windows at once of the batched pipeline; None without that.
        workload: Its work, for the reservation of memory.
    """

    # Not frozen: to set a field of that takes a call each.
    samples: NDArray[np.float32] | None
    options: dict[str, object]
    batch_size: int | None
    workload: Workload


class _Checked:
    """
    The parameters of a call that were checked, and serve for all that are equal.

    Attributes:
        values: The parameters by name.
        lists: Those that are defaults and lists, of which each call gets its own.
        asks: They may be more than a model knows.
        known: The model's languages and tokens that they were last compared with.
        workload: The work of a call on a minute of audio.
    """

    __slots__ = ("asks", "known", "lists", "values", "workload")

    def __init__(
        self,
        values: dict[str, object],
        batch_size: int | None,
        function: Callable[..., object] | None,
    ) -> None:
        lists = () if function is None else default_lists(plain_of(function))
        self.values: dict[str, object] = values
        self.lists: list[tuple[str, list[object]]] = [
            (name, default) for name, default in lists if name not in values
        ]
        self.asks: bool = _asks_knowledge(values)
        self.known: Knowledge | None = None
        self.workload: Workload = workload_of(values, batch_size)


# By all that makes calls equal.
_kept: dict[tuple[object, ...], _Checked] = {}


def prepared(
    source: Callee,
    audio: AudioInput,
    args: tuple[object, ...],
    options: Mapping[str, object],
    batch_size: int | None,
    *,
    function: Callable[..., object] | None = None,
) -> Prepared:
    """
    Returns a call of ``transcribe``, checked and with its audio decoded.

    Args:
        source: The model.
        audio: What it is to hear.
        args: Parameters by position, after the audio.
        options: Parameters by name.
        batch_size: Windows at once of the batched pipeline; None without that.
        function: What will be called, of faster-whisper's class: equal parameters of it
            are checked once, and lists among its defaults are given to it as copies.

    Blocks: for decoding; for a download, where only that tells whether the model knows
    the language.

    Raises:
        TypeError, ValueError: a parameter is nonsense, or the model does not know the
            language.
        AudioError: the audio cannot be decoded.
    """
    if batch_size is not None:
        batch_size = check_batch_size(batch_size)
    found = _checked(source, args, options, batch_size, function)
    values = dict(found.values)
    for name, default in found.lists:
        values[name] = default[:]
    if found.asks:
        known = source.knowledge()
        if known is not found.known:
            from .languages import check_knowledge

            check_knowledge(source, values, known)
            found.known = known
    _check_position(audio)
    # Last, since it takes longest; and before the lease, so that it holds no model.
    samples = source.decode_audio(audio)
    workload, n_samples = found.workload, getattr(samples, "size", 0)
    if n_samples > workload.audio_s * _RATE_HZ:
        workload = workload_of(values, batch_size, n_samples)
    return Prepared(samples, values, batch_size, workload)


def _checked(
    source: Callee,
    args: tuple[object, ...],
    options: Mapping[str, object],
    batch_size: int | None,
    function: Callable[..., object] | None,
) -> _Checked:
    given = tuple(options.values())
    kinds = tuple(map(type, (*args, *given)))
    if function is None or not _PLAIN.issuperset(kinds):
        return _newly_checked(source, args, options, batch_size, function)
    # With the types: 1, 1.0 and True are equal.
    key = (function, batch_size, args, tuple(options), given, kinds)
    found = _kept.get(key)
    if found is None:
        found = _newly_checked(source, args, options, batch_size, function)
        # Of some, the check makes a list.
        if _PLAIN.issuperset(map(type, found.values.values())):
            if len(_kept) >= _MOST_KEPT:
                _kept.clear()
            _kept[key] = found
    return found


def _newly_checked(
    source: Callee,
    args: tuple[object, ...],
    options: Mapping[str, object],
    batch_size: int | None,
    function: Callable[..., object] | None,
) -> _Checked:
    method = "transcribe" if batch_size is None else "batched"
    values = _values(source.signatures(), method, (None, *args), options)
    if "language" in values:
        # A call that names none need not wait for this import.
        from .languages import language_code

        values["language"] = language_code(cast("str | None", values["language"]))
    return _Checked(values, batch_size, function)


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


def _asks_knowledge(values: Mapping[str, object]) -> bool:
    """
    Returns True if a call may ask for more than a model knows, so that its files must
    be looked at, and perhaps downloaded for that.
    """
    return (
        values.get("language") is not None
        or bool(values.get("word_timestamps"))
        or any(
            isinstance(values.get(name), list)
            for name in ("initial_prompt", "suppress_tokens")
        )
    )


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
