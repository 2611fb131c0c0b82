"""
The warm-up: a micro model, and a window of silence, that make a device ready.

The first use of a GPU in a process takes longer: the context, cuBLAS, kernels that are
compiled or read in. And missing libraries show only then. A micro model goes through
all of it before gigabytes of weights are read.
"""

from __future__ import annotations

import logging
import tempfile
from typing import TYPE_CHECKING, Any, cast

from whispercache.devices import release
from whispercache.devices.cublas import cublas_problem, load_cublas
from whispercache.devices.faults import Fault, classify
from whispercache.errors import LoadFailed

from . import process
from .kept import StillLoaded, unload_weights
from .sizes.architecture import AUDIO_FRAMES, Architecture, layout

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import numpy as np
    from ctranslate2 import StorageView
    from ctranslate2.models import Whisper
    from ctranslate2.specs import WhisperSpec
    from faster_whisper import WhisperModel
    from numpy.typing import NDArray

    from whispercache.devices.memory import MemoryProbe
    from whispercache.keys import ModelKey

    from .sizes.architecture import Variable

    Values = Callable[[Variable], NDArray[np.float16]]

_log = logging.getLogger("whispercache")

# Two languages, for one to be detected; the empty token makes CTranslate2 take a model
# for multilingual. With 50 words the output layer's rows are no multiple of 8, as in
# real models, and are padded on a GPU.
_WORDS = [f"word{number}" for number in range(50)]
_LANGUAGES = ["<|en|>", "<|de|>"]
_SPECIAL = [
    *("", "<|endoftext|>", "<|startoftranscript|>", *_LANGUAGES),
    *("<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>"),
    *("<|nospeech|>", "<|notimestamps|>"),
]
_TIMES = [f"<|{step * 0.02:.2f}|>" for step in range(1501)]
_TOKENS = [*_WORDS, *_SPECIAL, *_TIMES]
_IDS = {token: number for number, token in enumerate(_TOKENS)}
# Heads of width 64, as in every Whisper.
_MICRO = Architecture(
    d_model=128,
    encoder_layers=1,
    decoder_layers=1,
    heads=2,
    ffn=512,
    mels=80,
    vocabulary=len(_TOKENS),
)
_NOISE = 0.02
# Tokens of an answer: each step after the first few repeats what was done.
_STEPS = 6

_BATCH = 2
_BEAMS = 5
# What both pipelines of faster-whisper say in each call of generate().
_ALWAYS: dict[str, Any] = {
    "length_penalty": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "return_scores": True,
    "return_no_speech_prob": True,
    "suppress_blank": True,
    "suppress_tokens": [-1],
}


class WarmUps:
    """
    The warm-ups of one loader: which devices are ready for which types.
    """

    def __init__(self, probe: MemoryProbe) -> None:
        self._probe = probe
        self._warm: set[tuple[str, str]] = set()
        self._cold: dict[str, release.Holdings] = {}

    def needed(self, key: ModelKey) -> str:
        """
        Returns what the device of *key* has to do before; nothing for the CPU.
        """
        if key.device == "cpu" or (key.device, key.compute_type) in self._warm:
            return ""
        return release.warm_up_reason(key.device)

    def run(self, key: ModelKey) -> int | None:
        """
        Runs a micro model in the type of *key*, on the thread of its device.

        Returns:
            What the card has lost by that for the life of the process; None if it was
            not the first warm-up of the card, or could not be measured.

        Raises:
            LoadFailed: cuBLAS is missing, or too old for the card.
            RuntimeError: CTranslate2 failed.
        """
        load_cublas()
        kind, _, index = key.device.partition(":")
        # A try that fails may leave the context there, which is part of the floor.
        cold = release.holdings(key.device, self._probe)
        before = self._cold.setdefault(key.device, cold)
        try:
            run_micro_model(
                process.ctranslate2(), kind, int(index or 0), key.compute_type
            )
        except RuntimeError as error:
            reason = cublas_error_reason(error, key)
            if not reason:
                raise
            raise LoadFailed(str(key), reason) from error
        except OSError as error:
            # The micro model cannot be written. The first model pays for all this then.
            _log.warning("%s is not warmed up: %s", key.device, error)
            self._warm.add((key.device, key.compute_type))
            return None
        # A copy: other devices' threads change it meanwhile.
        is_first = all(device != key.device for device, _ in tuple(self._warm))
        self._warm.add((key.device, key.compute_type))
        if not is_first:
            return None
        return release.floor_bytes(key.device, self._probe, before)


def cublas_error_reason(error: Exception, key: ModelKey) -> str:
    """
    Explains an error of cuBLAS, with its cure; empty if it is another error.

    Source: the texts of CTranslate2 4.8.5. Before 4.7 it asks for products in int8 that
    no cuBLAS has for Blackwell (OpenNMT/CTranslate2#1982).
    """
    if "libcublas" in str(error) or "cublas64" in str(error):
        return cublas_problem() or str(error)
    if classify(error) is not Fault.UNSUPPORTED:
        return ""
    why = release.cublas_reason(key.device) or (
        f"it cannot compute in {key.compute_type} on {key.device}"
    )
    other = "another device, such as 'cpu'"
    if key.compute_type.startswith("int8"):
        other = "compute_type='float16'"
    update = "pip install -U nvidia-cublas-cu12 ctranslate2"
    return f"{error}: {why}; {update}, or take {other}"


def run_micro_model(
    ctranslate2: ModuleType, kind: str, index: int, compute_type: str
) -> None:
    """
    Runs a micro model through every kind of kernel that a transcription uses.

    It is unloaded also after an error, which is that of a real model: libraries are
    missing, or the device does not work. On a device that was lost it is never freed.

    Blocks: for as long as the device takes to become ready.

    Raises:
        RuntimeError: CTranslate2 failed.
        OSError: the temporary directory cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="whispercache-") as directory:
        _write_micro(ctranslate2, directory)
        model = process.whisper()(
            directory,
            device=kind,
            device_index=index,
            compute_type=compute_type,
            intra_threads=1,
        )
    try:
        # One window and several take different kernels.
        _transcribe(model, _encode(ctranslate2, model, 1))
        _transcribe_batch(model, _encode(ctranslate2, model, _BATCH))
    except BaseException as error:
        if classify(error) is Fault.STICKY:
            # To free it would end the process.
            process.keep_for_ever(model)
        else:
            _unload(model)
        raise
    _unload(model)


def silent_window(whisper: WhisperModel) -> None:
    """
    Runs one window of silence through encode and generate, which does what a load left
    undone. Later calls, and their answers, are as if this one had not been.

    Blocks: for one run of the encoder. Only the thread that loads the model may call
    this: it reads properties of it.
    """
    import numpy as np

    prompt = ["<|startoftranscript|>"]
    # Others have no tokens of languages and tasks.
    if whisper.model.is_multilingual:
        prompt += ["<|en|>", "<|transcribe|>"]
    features = np.zeros((whisper.model.n_mels, AUDIO_FRAMES), np.float32)
    encoded = whisper.encode(features)
    # Two steps: the first has no keys and values of earlier ones.
    length = len(prompt) + 2
    whisper.model.generate(encoded, [prompt], beam_size=1, max_length=length)


def specification(
    ctranslate2: ModuleType,
    architecture: Architecture,
    tokens: list[str],
    values: Values,
) -> WhisperSpec:
    """
    Returns CTranslate2's specification of a Whisper, valid, with tied output layer.

    *values* gives the float16 numbers of each tensor, in the order of `layout`. They
    are not copied: views of the same memory take no more than that until they are
    saved, one tensor at a time.
    """
    specs = ctranslate2.specs
    spec = specs.WhisperSpec(
        *(architecture.encoder_layers, architecture.heads),
        *(architecture.decoder_layers, architecture.heads),
    )
    for variable in layout(architecture):
        part, _, name = variable.name.rpartition("/")
        owner = specs.model_spec.index_spec(spec, part)
        setattr(owner, name, values(variable))
    spec.decoder.projection.weight = spec.decoder.embeddings.weight
    spec.register_vocabulary(tokens)
    spec.validate()
    # As in files of converted models; only what is valid can be an alias.
    spec.decoder.projection.weight = "decoder/embeddings/weight"
    return cast("WhisperSpec", spec)


def _write_micro(ctranslate2: ModuleType, directory: str) -> None:
    import numpy as np

    random = np.random.default_rng(0)

    def noise(variable: Variable) -> NDArray[np.float16]:
        return (random.standard_normal(variable.shape) * _NOISE).astype(np.float16)

    spec = specification(ctranslate2, _MICRO, _TOKENS, noise)
    # Each kind of setting that a real config.json has, so that its kernels run.
    spec.config.suppress_ids = [_IDS["<|startoflm|>"]]
    spec.config.suppress_ids_begin = [_IDS["<|endoftext|>"]]
    spec.config.lang_ids = [_IDS[language] for language in _LANGUAGES]
    spec.config.alignment_heads = [[0, 0], [0, 1]]
    spec.save(directory)


def _encode(ctranslate2: ModuleType, model: Whisper, windows: int) -> StorageView:
    import numpy as np

    features = np.zeros((windows, _MICRO.mels, AUDIO_FRAMES), np.float32)
    return model.encode(ctranslate2.StorageView.from_array(features), to_cpu=False)


# The calls of ``WhisperModel.transcribe``. Source: faster-whisper 1.2.1, transcribe.py,
# generate_with_fallback and find_alignment.
def _transcribe(model: Whisper, encoded: StorageView) -> None:
    # CTranslate2 4.2.1 goes by the size of the vocabulary, and takes this for English.
    if model.is_multilingual:
        model.detect_language(encoded)
    start = _ids("<|startoftranscript|>", "<|en|>", "<|transcribe|>")
    prompt = [*_ids("<|startofprev|>", *_WORDS[:5]), *start]
    beams = {"beam_size": _BEAMS, "patience": 1.0}
    samples = {
        "beam_size": 1,
        "num_hypotheses": _BEAMS,
        "sampling_topk": 0,
        "sampling_temperature": 0.2,
    }
    for options in (beams, samples):
        model.generate(
            encoded,
            [prompt],
            max_length=len(prompt) + _STEPS,
            max_initial_timestamp_index=50,
            **_ALWAYS,
            **options,
        )
    words = [_ids(*_WORDS[:5])]
    model.align(encoded, start, words, AUDIO_FRAMES, median_filter_width=7)


# Those of ``BatchedInferencePipeline.transcribe``. Source: generate_segment_batched.
def _transcribe_batch(model: Whisper, encoded: StorageView) -> None:
    start = _ids("<|startoftranscript|>", "<|en|>", "<|transcribe|>")
    model.generate(
        encoded,
        [[*start, *_ids("<|notimestamps|>")]] * _BATCH,
        beam_size=_BEAMS,
        patience=1.0,
        max_length=len(start) + 1 + _STEPS,
        sampling_temperature=0.0,
        **_ALWAYS,
    )
    words = [_ids(*_WORDS[:5]), _ids(*_WORDS[:3])]
    frames = [AUDIO_FRAMES] * _BATCH
    model.align(encoded, start, words, frames, median_filter_width=7)


def _unload(model: Whisper) -> None:
    # Now: an error that is still referenced holds the model.
    try:
        unload_weights(model)
    except StillLoaded as still:
        _log.debug("the micro model is not unloaded: %s", still)


def _ids(*tokens: str) -> list[int]:
    return [_IDS[token] for token in tokens]
