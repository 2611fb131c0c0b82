"""
Model: `CachedModel`, a WhisperModel that takes a lease for each call.

It knows the cache only as a source of leases, and the same code serves the awaited
model.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NoReturn, cast

from .engine.calls.prepare import prepared, prepared_detection
from .engine.sizes.footprint import DEFAULT_WORKLOAD, Workload
from .results import call_in_parts, call_leased

if TYPE_CHECKING:
    from faster_whisper.transcribe import Segment, TranscriptionInfo
    from typing_extensions import Self

    from .engine.api import AudioInput
    from .keys import ModelKey
    from .lease import Lease
    from .results import Breaks, LeasedIterator
    from .source import ModelSource

# The other attributes and methods of a WhisperModel; a test compares with the real one.
ATTRIBUTES = (
    "feat_kwargs",
    "feature_extractor",
    "frames_per_second",
    "hf_tokenizer",
    "input_stride",
    "logger",
    "max_length",
    "num_samples_per_token",
    "time_precision",
    "tokens_per_second",
)
_METHODS = (
    "add_word_timestamps",
    "encode",
    "find_alignment",
    "generate_segments",
    "generate_with_fallback",
    "get_prompt",
)


class Handle:
    """
    A name for a model of a cache, without anything of its own that could be changed.
    """

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._served_by: ModelKey | None = None

    @property
    def key(self) -> ModelKey:
        """
        The model: canonical name, device, effective compute type.
        """
        return self._source.key

    @property
    def served_by(self) -> ModelKey | None:
        """
        The model that the last call got; not `key` after a fallback. None before the
        first call.

        With several threads, ask the ``segments`` of a call for their ``key`` instead.
        """
        return self._served_by

    def breaks(self, lease: Lease, workload: Workload | None = None) -> Breaks | None:
        """
        Returns how a call of this model with *lease* gives it back between two
        segments, for those of a higher priority; None if this one has the usual one.
        """
        return self._source.breaks(lease, workload or DEFAULT_WORKLOAD)

    def __setattr__(self, name: str, value: object) -> None:
        # Set on the handle, an attribute would never reach the model that computes.
        if name not in ("_cache", "_served_by", "_source"):
            raise self._refusal(name)
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise self._refusal(name)

    def _refusal(self, name: str) -> AttributeError:
        return AttributeError(
            f"{name!r} of a {type(self).__name__} cannot be changed: others use the "
            "same model, and it is unloaded and reloaded. Pass it to each call, as in "
            "transcribe(audio, beam_size=1), or set it on the model of a lease ('with "
            "model.lease() as whisper'), which no other call sees"
        )

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _memo: object) -> Self:
        return self  # like a function: it is a name, and not the model

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled: it belongs to a cache of this "
            "process. Send its name, and call get_model() in the other process"
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._source}>"


class CachedModel(Handle):
    """
    A WhisperModel that is in memory when it is used.

    Each call takes a lease, and loads the model if it is not there. A lazy ``segments``
    holds the lease until it is exhausted, closed or collected. Between calls the model
    may be evicted, and the next call reloads it: hold as many of these as you like.

    Made by `ModelCache.get_model`; safe to share between threads. It is an instance of
    `faster_whisper.WhisperModel` too, whose ``model`` is a view that takes a lease for
    each call. Only where a cache has a loader of a user's own it is not: calls are
    passed to the models of that, nothing can be set, and ``model`` is missing.
    """

    def lease(self) -> Lease:
        """
        Returns the real model, held for a ``with`` block. Blocks until it is granted.
        """
        return self._lease(DEFAULT_WORKLOAD)

    def _lease(self, workload: Workload) -> Lease:
        lease = self._source.lease(workload)
        # Not under a lock: with several threads it is any of their last ones. Mostly it
        # is what it was, and to set it costs more than all else here.
        key: ModelKey = lease._entry.key  # what the property `key` returns, sooner
        if self._served_by is not key:
            self._served_by = key
        return lease

    def transcribe(
        self,
        audio: AudioInput,
        *args: object,
        batch_size: int | None = None,
        **options: object,
    ) -> tuple[LeasedIterator[Segment], TranscriptionInfo]:
        """
        Transcribes, as `faster_whisper.WhisperModel.transcribe` does.

        Args:
            audio: A path, a binary stream, or float32 samples (samples,), mono, 16 kHz.
            args: Further positional parameters of ``transcribe``, ``language`` first:
                a code, a name or a locale (``"de"``, ``"german"``, ``"de-AT"``); None
                or ``"auto"`` to detect it.
            batch_size: Number of windows at once. If given, the batched pipeline does
                the work, with its own defaults (``vad_filter=True``,
                ``without_timestamps=True``).
            options: All other parameters of ``transcribe``. With ``multilingual=True``
                each window's language is detected, whatever *language* says.

        Returns:
            The segments, computed while they are iterated over, and the info.

        Raises:
            TypeError, ValueError: a parameter is nonsense, or the model does not know
                the language; no model was loaded for it.
            AudioError: the audio cannot be decoded; likewise.
            WhisperCacheError: the model cannot be had; see `ModelCache.lease`.

        Blocks: for decoding, the lease, and the language detection if none is given.
        """
        ready = prepared(self._source, audio, args, options, batch_size)
        # All that can be refused was refused before this: no model is loaded for it.
        lease = self._lease(ready.workload)
        call = self._source.transcriber(lease, ready.batch_size)
        return cast(
            "tuple[LeasedIterator[Segment], TranscriptionInfo]",
            call_in_parts(
                self._source.breaks(lease, ready.workload),
                lease,
                call,
                ready.samples,
                **ready.options,
            ),
        )

    def detect_language(
        self, audio: AudioInput | None = None, *args: object, **options: object
    ) -> tuple[str, float, list[tuple[str, float]]]:
        """
        Detects the language, as `faster_whisper.WhisperModel.detect_language` does.

        Args:
            audio: As for `transcribe`, paths and streams included.
            args: Further positional parameters, ``features`` first.
            options: Further parameters.

        Returns:
            The language code, its probability, and those of all languages.
        """
        ready = prepared_detection(self._source, audio, args, options)
        lease = self._lease(ready.workload)
        call = lease.whisper.detect_language
        return cast(
            "tuple[str, float, list[tuple[str, float]]]",
            call_leased(lease, call, ready.samples, **ready.options),
        )

    @property
    def supported_languages(self) -> list[str]:
        """
        The codes of the languages that the model knows. Loads it if need be.
        """
        lease = self.lease()
        with lease:
            return list(lease.loaded.supported_languages)

    @property
    def is_multilingual(self) -> bool:
        """
        True if the model knows other languages than English. Loads it if need be.
        """
        lease = self.lease()
        with lease:
            return lease.loaded.is_multilingual

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - as of a WhisperModel
        # Called only for names that are not here, so those of the model.
        if name in ATTRIBUTES:
            with self.lease() as whisper:
                return getattr(whisper, name)
        # Not methods of the class: faster-whisper's own signatures stay the truth.
        if name in _METHODS:
            return functools.partial(self._call, name)
        if name == "model":
            raise AttributeError(
                "the CTranslate2 model may be unloaded at any time; hold it with "
                "'with cached_model.lease() as whisper: whisper.model'"
            )
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def _call(self, name: str, *args: object, **options: object) -> object:
        lease = self.lease()
        return call_leased(lease, getattr(lease.whisper, name), *args, **options)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *ATTRIBUTES, *_METHODS]
