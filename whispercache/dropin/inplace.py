"""
Changes of faster-whisper's classes in place: models that a program makes are leased.

Names are left alone: what was imported before, a subclass that was made before and
``isinstance`` mean the same classes. What is put into them asks, for each new model,
whether it is to be leased, and does for all others what the plain ones do. So nothing
depends on who comes after: a mock that gives back what it found gives back something
that heeds `restore`.
"""

from __future__ import annotations

import functools
import inspect
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whispercache.engine import process
from whispercache.engine.audio.samples import in_place_of
from whispercache.engine.calls.prepare import prepared_detection
from whispercache.engine.construct import altered, decoders, genuine
from whispercache.engine.rebound import is_replacement, plain_of, replaces
from whispercache.errors import WhisperCacheError

from .made import Made
from .model import lease_pipelines, leased_of, transcribed
from .refusals import expected
from .whisper import LeasedWhisper

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from faster_whisper import WhisperModel

    from whispercache.engine.api import AudioInput
    from whispercache.source import ModelSource

# Parameters of CTranslate2's constructor, as WhisperModel calls them.
# Source: faster_whisper/transcribe.py, 1.2.1, WhisperModel.__init__.
_RAW_NAMES = {"inter_threads": "num_workers", "intra_threads": "cpu_threads"}


@dataclass(frozen=True, slots=True)
class Offer:
    """
    The way in which new models are made.

    Attributes:
        source_of: Returns where the leases of a model come from, for the parameters of
            its constructor that were given; None if it is to be a plain one.
        preload: True to load it in the constructor.
    """

    source_of: Callable[[Mapping[str, Any]], ModelSource | None]
    preload: bool = False


# A list, which has one or none: functions below look at it when they are called.
_offers: list[Offer] = []


def change(offer: Offer, *, ctranslate2: bool) -> None:
    """
    Has the models that are made from now on leased as *offer* says; with *ctranslate2*
    those of `ctranslate2.models.Whisper` by itself, too. A ``decode_audio`` that reads
    no file is replaced by one that does.
    """
    # Both remember what was there first.
    kinds, whisper = genuine(), process.whisper()
    _put(kinds.model, "__init__", _constructor)
    _put(kinds.model, "transcribe", _transcriber)
    _put(kinds.model, "detect_language", _detector)
    lease_pipelines(kinds.pipeline)
    if process.is_pyav_strict() and process.decoding_problem():
        for module in decoders():
            _put(module, "decode_audio", in_place_of)
    _offers[:] = [offer]
    models = process.ctranslate2().models
    if not ctranslate2:
        _give_back(models, "Whisper")
    elif models.Whisper is whisper:
        models.Whisper = InPlaceWhisper
        replaces(InPlaceWhisper, whisper)


def restore() -> None:
    """
    Has new models made as before. Those that were leased stay so: what leases a whole
    call on them stays in their class, and does nothing for plain ones.
    """
    if not _offers:
        return
    _offers.clear()
    _give_back(genuine().model, "__init__")
    _give_back(process.ctranslate2().models, "Whisper")
    for module in decoders():
        _give_back(module, "decode_audio")


def _put(owner: object, name: str, make: Callable[[Any], object]) -> None:
    plain = getattr(owner, name)
    # A mock of a test has its own idea, and is gone soon.
    if type(plain) is not types.FunctionType or _has_ours(plain):
        return
    made = make(plain)
    replaces(made, plain)
    setattr(owner, name, made)


def _has_ours(found: object) -> bool:
    """
    Returns True if *found* is of this package, or a decorator over what is.
    """
    while found is not None:
        if is_replacement(found):
            return True
        found = getattr(found, "__wrapped__", None)
    return False


def _give_back(owner: object, name: str) -> None:
    # What somebody else has put over ours stays; ours below it does nothing more.
    found = getattr(owner, name)
    if is_replacement(found):
        setattr(owner, name, plain_of(found))


def _constructor(plain: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **options: Any) -> None:  # noqa: ANN401
        offer = next(iter(_offers), None)
        leased = None
        if offer is not None:
            given = signature.bind(self, *args, **options).arguments
            given.pop(next(iter(given)))
            more = given.pop("model_kwargs", {})
            try:
                leased = _leased(self, offer, {**given, **more})
            except WhisperCacheError as error:
                raise expected(error) from error.__cause__
        if leased is None:
            plain(self, *args, **options)

    return init


def _leased(
    whisper: WhisperModel, offer: Offer, given: Mapping[str, Any]
) -> LeasedWhisper | None:
    """
    Makes *whisper* a leased model, if it is to be one, and loads it if *offer* says so.
    """
    source = offer.source_of(given)
    if source is None:
        return None
    leased = LeasedWhisper(source)
    leased.made = Made(whisper, source.initialize(whisper, leased))
    if offer.preload:
        leased.load_model()
    return leased


def _transcriber(plain: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(plain)
    def transcribe(self: Any, audio: AudioInput, *args: Any, **options: Any) -> object:  # noqa: ANN401
        leased = leased_of(self)
        if leased is None:
            return plain(self, audio, *args, **options)
        method = types.MethodType(plain, self)
        return transcribed(leased, method, audio, args, options)

    return transcribe


def _detector(plain: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(plain)
    def detect_language(
        self: Any,  # noqa: ANN401
        audio: AudioInput | None = None,
        *args: Any,  # noqa: ANN401
        **options: Any,  # noqa: ANN401
    ) -> object:
        leased = leased_of(self)
        if leased is None:
            return plain(self, audio, *args, **options)
        ready = prepared_detection(leased.source, audio, args, options)
        return leased.run(altered(types.MethodType(plain, self)), ready)

    return detect_language


class _Either(type):
    """
    The class of a class to which CTranslate2's own models belong, too.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        plain = plain_of(cls)
        return super().__instancecheck__(instance) or (
            plain is not cls and isinstance(instance, plain)
        )


class InPlaceWhisper(LeasedWhisper, metaclass=_Either):
    """
    Takes the place of `ctranslate2.models.Whisper`.
    """

    def __new__(
        cls,
        model_path: str,
        device: str = "cpu",
        *args: object,
        **options: object,
    ) -> Any:  # noqa: ANN401 - a plain one, perhaps
        """
        Returns a view of a cached model, or a plain one if it is not to be cached.
        """
        offer = next(iter(_offers), None)
        made = None
        # Names mean nothing to CTranslate2, and must not cause a download.
        if offer is not None and not args and Path(model_path).is_dir():
            named = {_RAW_NAMES.get(name, name): options[name] for name in options}
            given = {"model_size_or_path": model_path, "device": device, **named}
            try:
                made = cls._leased(offer, given)
            except WhisperCacheError as error:
                raise expected(error) from error.__cause__
        if made is None:
            # CTranslate2 refuses the rest itself.
            return process.whisper()(model_path, device, *args, **options)
        return made

    @classmethod
    def _leased(cls, offer: Offer, given: Mapping[str, Any]) -> InPlaceWhisper | None:
        source = offer.source_of(given)
        if source is None:
            return None
        made = object.__new__(cls)
        LeasedWhisper.__init__(made, source)
        if offer.preload:
            made.load_model()
        return made

    def __init__(self, *_args: object, **_options: object) -> None:
        # All is done above, where the source is known.
        pass
