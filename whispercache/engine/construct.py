"""
The construction of a WhisperModel, and of calls on it, over altered globals.

faster-whisper has no hook for some of what is changed here: the tokenizer that its
constructor parses, the number of mel bands that it assumes, and functions of voice
activity detection that take much memory. Copies of its functions find other things
behind those names; see `rebound`. A release of faster-whisper that no longer looks the
names up would make that useless without an error, so this is checked and logged once.

Its classes are those of the first use, whatever programs put in their place later.
"""

from __future__ import annotations

import functools
import inspect
import logging
import types
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from whispercache.errors import LoadFailed

from . import process
from .api import LoadedModel
from .audio.features import in_blocks
from .audio.samples import in_place_of
from .audio.speech import bounded_names
from .calls.languages import check_knowledge, knowledge_of
from .calls.signatures import signature_of
from .claims import check_tokens, unalignable, undetectable
from .files import claims_of
from .process import ctranslate2, versions
from .rebound import plain_of, rebound, swapped
from .sizes.header import ModelHeader
from .views import Bridge, in_heap, lending, lends, own_lists

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from inspect import Signature

    from faster_whisper import WhisperModel
    from tokenizers import Tokenizer

    from whispercache.errors import CorruptModel
    from whispercache.keys import ModelKey

    from .calls.languages import Knowledge
    from .files import ModelFiles
    from .kept import KeptModels
    from .rebound import Swaps

_log = logging.getLogger("whispercache")

_HUB_OPTIONS = ("download_root", "revision")

_signature = functools.cache(inspect.signature)


@dataclass(frozen=True, slots=True)
class Genuine:
    """
    The classes of faster-whisper, as they were at the first use.

    Attributes:
        model: `faster_whisper.WhisperModel`.
        pipeline: `faster_whisper.BatchedInferencePipeline`.
        init: The constructor of models.
    """

    model: Any
    pipeline: Any
    init: Callable[..., None]


@functools.cache
def genuine() -> Genuine:
    """
    Returns faster-whisper's classes, whatever programs put in the place of their names:
    mocks of a test, or functions that ask this very cache.

    Raises:
        ImportError: they were replaced in all places before the first use.
    """
    ctranslate2()
    import faster_whisper
    from faster_whisper import transcribe

    def found(name: str) -> Any:  # noqa: ANN401 - a class of its own for each name
        # The second is the name that programs import, and replace.
        for module in (transcribe, faster_whisper):
            kind = getattr(module, name)
            if isinstance(kind, type) and kind.__module__ == transcribe.__name__:
                return kind
        raise ImportError(
            f"faster_whisper.{name} was replaced before whispercache first used it; "
            "make a ModelCache and load a model before that"
        )

    model = found("WhisperModel")
    # The import may itself have been what changed them (`whispercache run`).
    return Genuine(model, found("BatchedInferencePipeline"), plain_of(model.__init__))


def build(key: ModelKey, files: ModelFiles, kept: KeptModels) -> WhisperModel:
    """
    Returns the WhisperModel of *key*, built from *files*. Methods for which these lack
    something are replaced by ones that say so.

    Blocks: for the load of the weights.

    Raises:
        CorruptModel: the tokenizer is broken, or of another model.
        LoadFailed: there is no tokenizer, and the hub cannot be reached.
    """
    kind, _, index = key.device.partition(":")
    # They are a matter of the download, which is over.
    options = {name: value for name, value in key.options if name not in _HUB_OPTIONS}
    # Not by a call of the class, which would run the plain constructor.
    whisper: WhisperModel = object.__new__(lending(genuine().model, _swaps()))
    initialize(
        whisper,
        files,
        kept,
        process.whisper(),
        device=kind,
        device_index=int(index or 0),
        compute_type=key.compute_type,
        **options,
    )
    claims, directory = claims_of(files), (files.original or files).directory
    if problem := claims.alignment_problem:
        _log.warning("%s cannot tell when words were said: %s", key, problem)
        error = partial(unalignable, directory, problem)
        _refuse(whisper, "find_alignment", "align", error)
    if not claims.can_detect:
        _log.warning("%s cannot detect languages: config.json names none", key)
        name = "detect_language"
        _refuse(whisper, name, name, partial(undetectable, directory))
    return whisper


def described(key: ModelKey, files: ModelFiles, whisper: WhisperModel) -> LoadedModel:
    """
    Reads the properties of a model that was just loaded.
    """
    model = whisper.model
    if model.compute_type != key.compute_type:
        _log.warning("%s computes in %s", key, model.compute_type)
    known = knowledge_of(files)
    check = partial(check_knowledge, str(key), known=known)
    bridge = Bridge(whisper)
    return LoadedModel(
        key=key,
        files=files,
        whisper=whisper,
        compute_type=str(model.compute_type),
        is_multilingual=bool(model.is_multilingual),
        supported_languages=_languages(whisper, known),
        knowledge=known,
        lend=lends(type(whisper), bridge, check),
        cut=bridge.cut,
    )


def batched(whisper: WhisperModel) -> Callable[..., object]:
    """
    Returns the ``transcribe`` of a new batched pipeline: it keeps state between calls.
    """
    call = altered(genuine().pipeline(whisper).transcribe)
    return in_heap(whisper.model.device, call, keeps=False)


def altered(method: Callable[..., object]) -> Callable[..., object]:
    """
    Returns a *method* of faster-whisper, bound to its object, over altered globals. A
    call gets lists of its own as defaults, which it tells in its info. One that a
    program has put there is returned as it is.
    """
    if type(method) is not types.MethodType:
        return method
    # One that we have put there does nothing for a call that holds its lease.
    plain = plain_of(method.__func__)
    made = swapped(types.MethodType(plain, method.__self__), _swaps())
    lists = own_lists(plain)
    return partial(made, **lists) if lists else made


def signatures() -> Mapping[str, Signature]:
    """
    Returns the signatures of the faster-whisper that is installed.
    """
    model, pipeline = genuine().model, genuine().pipeline
    # Looked up now: programs, and tests, put others in their place.
    return _signatures(model.transcribe, pipeline.transcribe, model.detect_language)


@functools.lru_cache(maxsize=16)
def _signatures(
    transcribe: Callable[..., object],
    batched: Callable[..., object],
    detect_language: Callable[..., object],
) -> Mapping[str, Signature]:
    from faster_whisper.vad import VadOptions

    return {
        "transcribe": signature_of(transcribe),
        "batched": signature_of(batched),
        "detect_language": signature_of(detect_language),
        "vad": _signature(VadOptions),
    }


def initialize(
    whisper: WhisperModel,
    files: ModelFiles,
    kept: KeptModels,
    make: Callable[..., object],
    **options: object,
) -> None:
    """
    Runs faster-whisper's constructor on *whisper*, which shares its tokenizer with
    equal ones. *make* makes its CTranslate2 model, or what stands for that.

    Parsing one takes a third of a small model's load and holds the GIL. Where a model
    has none, faster-whisper would fetch one that does not know large-v3's tokens; and
    where no file gives the number of mel bands, it would take 80.

    Source: the peak of loading base as int8 was 1.28 times what it leaves, and is 1.02
    (tests/engine/test_variants.py, benchmarks/switch.py).
    """
    init = genuine().init
    from faster_whisper.feature_extractor import FeatureExtractor

    assert isinstance(files.source, ModelHeader)
    # Before the weights: what parsing takes would come on top of them.
    tokenizer = _tokenizer_of(files, kept)
    shared = types.SimpleNamespace(
        Tokenizer=types.SimpleNamespace(
            # Whichever way faster-whisper takes, the tokenizer is there already.
            from_file=lambda _path: tokenizer,
            from_pretrained=lambda _repository: tokenizer,
        )
    )
    mels = files.source.architecture.mels
    extractor = partial(cast("Any", in_blocks(FeatureExtractor)), feature_size=mels)
    models = types.SimpleNamespace(models=types.SimpleNamespace(Whisper=make))
    names = {
        "tokenizers": shared,
        "FeatureExtractor": extractor,
        "ctranslate2": models,
    }
    _check_lookups(
        (init,),
        tuple(names),
        "each model parses a tokenizer of its own, takes 80 mel bands, or is loaded "
        "without need",
    )
    rebound(init, **names)(whisper, files.directory, **options)


def decoders() -> tuple[types.ModuleType, ...]:
    """
    Returns the modules that have faster-whisper's ``decode_audio``.
    """
    import faster_whisper
    from faster_whisper import audio, transcribe

    return audio, transcribe, faster_whisper


@functools.cache
def _swaps() -> Swaps:
    model, pipeline = genuine().model, genuine().pipeline
    from faster_whisper import audio, vad

    def vad_model() -> object:
        # Looked up now: programs put others in its place.
        return vad.get_vad_model()

    bounded = bounded_names(
        vad.get_speech_timestamps,
        vad_model,
        vad.collect_chunks,
        vad.VadOptions,
    )
    methods = (plain_of(model.transcribe), plain_of(pipeline.transcribe))
    consequence = "voice activity detection takes more memory"
    _check_lookups(methods, tuple(bounded), consequence)
    _check_lookups((vad.get_speech_timestamps,), ("get_vad_model",), consequence)
    decode = plain_of(audio.decode_audio)
    # Pipelines are given samples.
    lookup = methods[:1], (decode.__name__,)
    _check_lookups(*lookup, "a leased model may read no files with PyAV 19")
    swaps = tuple((getattr(vad, name), other) for name, other in bounded.items())
    return (*swaps, (decode, in_place_of(decode)))


@functools.cache
def _check_lookups(
    functions: tuple[Callable[..., object], ...],
    names: tuple[str, ...],
    consequence: str,
) -> None:
    """
    Warns, once, if faster-whisper no longer looks up a name that is replaced for it.
    """
    missing = {
        f"{name} in {function.__qualname__}"
        for function in functions
        # One that a program has put in its place says nothing of faster-whisper.
        if str(function.__module__).startswith("faster_whisper.")
        for name in names
        if name not in function.__code__.co_names
    }
    if missing:
        _log.warning(
            "faster-whisper %s does not look up %s: %s. Please report this",
            versions()["faster-whisper"],
            ", ".join(sorted(missing)),
            consequence,
        )


def _languages(whisper: WhisperModel, known: Knowledge | None) -> tuple[str, ...]:
    # faster-whisper lists all.
    every: list[str] = whisper.supported_languages
    return tuple(code for code in every if known is None or code in known.languages)


def _refuse(
    whisper: WhisperModel, method: str, raw: str, error: Callable[[], CorruptModel]
) -> None:
    """
    Makes a method raise an *error* where CTranslate2 would end the process, in its own
    method *raw*.
    """

    def refused(*_: object, **__: object) -> None:
        raise error()

    # By its class: views of the model, which have its class, refuse it, too.
    plain = type(whisper)
    changes = {method: refused, "refusals": {**plain.refusals, raw: error}}
    whisper.__class__ = type(plain.__name__, (plain,), changes)


def _tokenizer_of(files: ModelFiles, kept: KeptModels) -> Tokenizer:
    path = Path(files.directory, "tokenizer.json")
    vocabulary = claims_of(files).vocabulary
    if path.is_file():
        found, origin = kept.tokenizer(str(path)), "tokenizer.json"
    else:
        # OpenAI's with the same tokens.
        found = _tokenizer_from_hub(files.directory, vocabulary.tokenizer)
        origin = f"the tokenizer of {vocabulary.tokenizer}"
    check_tokens(files.directory, vocabulary, found, origin)
    return found


def _tokenizer_from_hub(directory: str, repository: str) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_pretrained(repository)
    # tokenizers raises nothing narrower.
    except Exception as error:
        raise LoadFailed(
            directory,
            "it has no tokenizer.json and the model hub cannot be reached; put the "
            f"tokenizer.json of {repository} beside its model.bin",
        ) from error
