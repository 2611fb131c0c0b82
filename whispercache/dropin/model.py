"""
CachedWhisperModel: the WhisperModel that `ModelCache.get_model` returns.

It is an instance of a subclass of faster-whisper's own class, made at its first use.
Its methods run as they are, on the object that the program has, and what it sets there
counts. Only ``model`` is a view, and ``transcribe`` and ``detect_language`` hold one
lease over all that they call.
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any, cast

from whispercache.engine.calls.prepare import prepared, prepared_detection
from whispercache.engine.calls.signatures import bound
from whispercache.engine.construct import altered, genuine
from whispercache.engine.rebound import is_replacement, replaces
from whispercache.engine.views import is_view
from whispercache.model import ATTRIBUTES, CachedModel, Handle

from .made import Made
from .whisper import LeasedWhisper

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from faster_whisper import BatchedInferencePipeline, WhisperModel
    from typing_extensions import Self

    from whispercache.engine.api import AudioInput
    from whispercache.engine.calls.languages import Knowledge
    from whispercache.keys import ModelKey
    from whispercache.source import ModelSource

_EXTRACTOR = "feature_extractor"
# What the constructor sets that is large, or a call's own.
_OF_A_MODEL = ("hf_tokenizer", "model", _EXTRACTOR)
# That of `faster_whisper.BatchedInferencePipeline.transcribe`.
_BATCH_SIZE = 8


class CachedWhisperModel(CachedModel):
    """
    A WhisperModel whose weights may be unloaded between two calls.

    Subclasses have faster-whisper's class behind this one. The attributes that its
    constructor sets are made when one is first read, without loading weights.
    """

    def __init__(self, source: ModelSource) -> None:
        super().__init__(source)
        self.model: LeasedWhisper = LeasedWhisper(source)
        self._leased: LeasedWhisper = self.model

    @property
    def served_by(self) -> ModelKey | None:
        """
        The model that the last call got; see `CachedModel.served_by`.
        """
        return self._leased.served_by

    def _lease(self, workload: Any) -> Any:  # noqa: ANN401 - as there
        return self._leased.lease(workload)

    # Calls ----------------------------------------------------------------------------

    # Copied into each class, as the next one.
    def transcribe(  # noqa: D102 - that of faster-whisper's
        self,
        audio: AudioInput,
        *args: object,
        batch_size: int | None = None,
        **options: object,
    ) -> Any:  # noqa: ANN401 - as there
        plain = super(Handle, self).transcribe  # type: ignore[misc]
        leased = leased_of(self)
        if leased is None:
            return plain(audio, *args, **options)
        if batch_size is not None:
            plain = genuine().pipeline(self).transcribe
        return transcribed(leased, plain, audio, args, options, batch_size=batch_size)

    def detect_language(  # noqa: D102 - that of faster-whisper's
        self, audio: AudioInput | None = None, *args: object, **options: object
    ) -> Any:  # noqa: ANN401 - as there
        plain = super(Handle, self).detect_language  # type: ignore[misc]
        leased = leased_of(self)
        if leased is None:
            return plain(audio, *args, **options)
        ready = prepared_detection(leased.source, audio, args, options)
        return leased.run(altered(plain), ready)

    # Attributes -----------------------------------------------------------------------

    def _knowledge(self) -> Knowledge:
        known = self._source.knowledge()
        assert known is not None  # all of this loader's models are known
        return known

    @property
    def supported_languages(self) -> list[str]:
        """
        The codes of the languages that the model knows. Does not load it.
        """
        return list(self._knowledge().languages)

    @property
    def is_multilingual(self) -> bool:
        """
        True if the model knows other languages than English. Does not load it.
        """
        return self._knowledge().is_multilingual

    @property
    def feature_extractor(self) -> object:
        """
        The feature extractor; during a call, that call's own copy.
        """
        call = self._leased.here.call
        if call is None:
            return self._made(_EXTRACTOR)
        own = self.__dict__.get(_EXTRACTOR)
        # Looked up a dozen times in a transcription.
        if call.extractor is None or call.made_of is not own:
            call.take(own)
        return call.extractor

    @feature_extractor.setter
    def feature_extractor(self, value: object) -> None:
        vars(self)[_EXTRACTOR] = value

    def __getattr__(self, name: str) -> object:
        # Called only for what is not set, or not set yet.
        mine = vars(self)
        if name not in ATTRIBUTES or "_leased" not in mine:
            kind = type(self).__name__
            raise AttributeError(f"{kind!r} object has no attribute {name!r}")
        call = self._leased.here.call
        if call is None:
            return self._made(name)
        theirs = vars(call.loaded.whisper)
        # A tokenizer would be kept beyond the model for each of these.
        if name not in _OF_A_MODEL:
            for each, value in theirs.items():
                if each not in _OF_A_MODEL:
                    mine.setdefault(each, value)
        return theirs[name]

    def _made(self, name: str) -> object:
        """
        Returns an attribute that the constructor sets, which is run now if need be.
        """
        mine = vars(self)
        if name not in mine:
            shell = object.__new__(genuine().model)
            stamp = self._source.initialize(shell, self._leased)
            # One that was set before, or by another thread meanwhile, stays.
            for each, value in vars(shell).items():
                mine.setdefault(each, value)
            self._leased.made = Made(self, stamp)
        return mine[name]

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        object.__delattr__(self, name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *ATTRIBUTES})

    def __copy__(self) -> Self:
        copied = object.__new__(type(self))
        own = vars(copied)
        own.update(vars(self))
        # Or a call on one would be taken for a call on the other.
        own["_leased"] = LeasedWhisper(self._source)
        if self._leased.made is not None:
            own["_leased"].made = self._leased.made.of(copied)
        if self.model is self._leased:
            own["model"] = own["_leased"]
        return copied

    def __deepcopy__(self, _memo: object) -> Self:
        return self.__copy__()

    def __repr__(self) -> str:
        return f"<CachedModel {self._source}>"


def leased_of(whisper: object) -> LeasedWhisper | None:
    """
    Returns the view that a call on *whisper* is to be leased by; None where it holds a
    plain model, or is within a call that has a lease.
    """
    model: object = getattr(whisper, "model", None)
    if isinstance(model, LeasedWhisper) and model.here.call is None:
        return model
    return None


def transcribed(
    leased: LeasedWhisper,
    method: Callable[..., object],
    audio: AudioInput,
    args: tuple[object, ...],
    options: Mapping[str, object],
    *,
    batch_size: int | None = None,
) -> object:
    """
    Calls a *method*, ``transcribe`` of a model or of a batched pipeline, with one lease
    over all that it calls. Its other parameters are those of `prepared`.
    """
    function = getattr(method, "__func__", None)
    # A mock of a test, say.
    if type(function) is not types.FunctionType:
        function = None
    ready = prepared(leased.source, audio, args, options, batch_size, function=function)
    # Samples need no decoder, so only voice activity would find another function.
    if function is None or batch_size is not None or ready.workload.vad:
        method = altered(method)
    return leased.run(method, ready)


@functools.cache
def class_over(base: type[WhisperModel]) -> type[CachedWhisperModel]:
    """
    Returns the class of cached models over faster-whisper's *base*. Its signatures are
    those of *base*.
    """

    def like(method: str) -> Callable[..., object]:
        # A copy, since to call the method costs each call more.
        ours = getattr(CachedWhisperModel, method)
        made = types.FunctionType(
            ours.__code__,
            ours.__globals__,
            method,
            ours.__defaults__,
            ours.__closure__,
        )
        made.__kwdefaults__ = ours.__kwdefaults__
        return functools.update_wrapper(made, getattr(base, method))

    def new(_kind: type, *args: object, **options: object) -> object:
        # A program that calls the class of a model means faster-whisper's.
        return base(*args, **options)

    names = ("__doc__", "__init__", "__module__", "__qualname__")
    attributes = {name: getattr(base, name) for name in names}
    methods = {name: like(name) for name in ("transcribe", "detect_language")}
    bases = (CachedWhisperModel, base)
    made = type(base.__name__, bases, {"__new__": new, **attributes, **methods})
    return cast("type[CachedWhisperModel]", made)


def lease_pipelines(kind: type[BatchedInferencePipeline]) -> None:
    """
    Has the batched pipeline hold one lease over a call, where its model is a cached
    one, and hear as models of leases do, where it is one of those. With other models it
    does what it did.
    """
    plain = kind.transcribe
    # A mock of a test has its own idea, and is gone soon.
    if type(plain) is not types.FunctionType or is_replacement(plain):
        return

    @functools.wraps(plain)
    def transcribe(self: Any, *args: Any, **options: Any) -> object:  # noqa: ANN401
        model = getattr(self, "model", None)
        leased = leased_of(model)
        if leased is None:
            method: Any = types.MethodType(plain, self)
            return (altered(method) if is_view(model) else method)(*args, **options)
        signature = leased.source.signatures()["batched"]
        given = bound(signature, args, options)
        if "audio" not in given:
            return plain(self, *args, **options)  # says what is missing
        audio = cast("AudioInput", given.pop("audio"))
        batch_size = cast("int", given.pop("batch_size", _BATCH_SIZE))
        method = types.MethodType(plain, self)
        return transcribed(leased, method, audio, (), given, batch_size=batch_size)

    replaces(transcribe, plain)
    kind.transcribe = transcribe


def cached_model(base: type[WhisperModel], source: ModelSource) -> CachedModel:
    """
    Returns a model of *source*, of a class over faster-whisper's *base*.
    """
    # Now, in case that a program has put the plain method back.
    lease_pipelines(genuine().pipeline)
    model = object.__new__(class_over(cast("Any", base)))
    CachedWhisperModel.__init__(model, source)
    return model
