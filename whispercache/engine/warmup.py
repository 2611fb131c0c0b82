"""
Primer: a micro model, and a window of silence, that make a device ready to transcribe.

What a process does for the first time on a GPU takes longer: the context, cuBLAS,
kernels that are compiled or read in. And what is missing shows only then. A micro model
goes through all of it before gigabytes of weights are read.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from typing import TYPE_CHECKING, cast

from whispercache.devices.faults import Fault, classify

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

    from .sizes.architecture import Variable

    Values = Callable[[Variable], NDArray[np.float16]]

__all__ = ["prime", "silent_window", "specification"]

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

_STEPS = 6
"""
Tokens of an answer: each step after the first few repeats what was done.
"""

_BATCH = 2
_BEAMS = 5

_UNLOAD_TRIES_S = 2.0
"""
Seconds for which an unload is tried again. A worker counts as busy for some
milliseconds after it has answered.
"""


def prime(ctranslate2: ModuleType, kind: str, index: int, compute_type: str) -> None:
    """
    Run a micro model on a device, through every kind of kernel that a transcription
    uses.

    What it raises is what a real model would have raised: libraries that are missing, a
    device that is out of order. Then, too, the micro model has been unloaded, unless
    the device was lost, where it is never freed.

    Args:
        ctranslate2: The module of that name.
        kind: ``"cuda"`` or ``"cpu"``.
        index: Which of that kind.
        compute_type: What to compute in.

    Blocks: for as long as the device takes to become ready.

    Raises:
        RuntimeError: CTranslate2 failed.
        OSError: the temporary directory cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="whispercache-") as directory:
        _write_micro(ctranslate2, directory)
        model = ctranslate2.models.Whisper(
            directory,
            device=kind,
            device_index=index,
            compute_type=compute_type,
            intra_threads=1,
        )
    try:
        _transcribe(model, _encode(ctranslate2, model, 1))
        _transcribe_batch(model, _encode(ctranslate2, model, _BATCH))
    except BaseException as error:
        if classify(error) is Fault.STICKY:  # freeing it would end the process
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(model))
        else:
            _unload(model)
        raise
    _unload(model)


def silent_window(whisper: WhisperModel) -> None:
    """
    One window of silence through encode and generate.

    The first call of a model does what its load left undone; later ones, and what they
    answer, are as if this had not been.

    Blocks: for one run of the encoder. Only the thread that loads the model may call
    this: it reads properties of it.
    """
    import numpy as np

    prompt = ["<|startoftranscript|>"]
    if whisper.model.is_multilingual:
        prompt += ["<|en|>", "<|transcribe|>"]
    features = np.zeros((whisper.model.n_mels, AUDIO_FRAMES), np.float32)
    encoded = whisper.encode(features)
    length = len(prompt) + 2
    whisper.model.generate(encoded, [prompt], beam_size=1, max_length=length)


def specification(
    ctranslate2: ModuleType,
    architecture: Architecture,
    tokens: list[str],
    values: Values,
) -> WhisperSpec:
    """
    CTranslate2's specification of a Whisper, valid, with tied output layer.

    Args:
        ctranslate2: The module of that name.
        architecture: The numbers behind the shapes.
        tokens: The vocabulary.
        values: The numbers (float16) of a tensor, called in the order of `layout`. They
            are kept as they are, so views of the same memory take no more than that
            until they are saved, which copies one tensor at a time.
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
    spec.config.suppress_ids = [_IDS["<|startoflm|>"]]
    spec.config.suppress_ids_begin = [_IDS["<|endoftext|>"]]
    spec.config.lang_ids = [_IDS[language] for language in _LANGUAGES]
    spec.config.alignment_heads = [[0, 0], [0, 1]]
    spec.save(directory)


def _encode(ctranslate2: ModuleType, model: Whisper, windows: int) -> StorageView:
    import numpy as np

    features = np.zeros((windows, _MICRO.mels, AUDIO_FRAMES), np.float32)
    return model.encode(ctranslate2.StorageView.from_array(features), to_cpu=False)


def _transcribe(model: Whisper, encoded: StorageView) -> None:
    """
    What ``WhisperModel.transcribe`` asks for, word timestamps and previous text, too.

    Source: faster-whisper 1.2.1, transcribe.py, generate_with_fallback and
    find_alignment.
    """
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
            length_penalty=1.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            max_length=len(prompt) + _STEPS,
            return_scores=True,
            return_no_speech_prob=True,
            suppress_blank=True,
            suppress_tokens=[-1],
            max_initial_timestamp_index=50,
            **options,
        )
    words = [_ids(*_WORDS[:5])]
    model.align(encoded, start, words, AUDIO_FRAMES, median_filter_width=7)


def _transcribe_batch(model: Whisper, encoded: StorageView) -> None:
    """
    What ``BatchedInferencePipeline.transcribe`` asks for.

    Source: faster-whisper 1.2.1, transcribe.py, generate_segment_batched.
    """
    start = _ids("<|startoftranscript|>", "<|en|>", "<|transcribe|>")
    model.generate(
        encoded,
        [[*start, *_ids("<|notimestamps|>")]] * _BATCH,
        beam_size=_BEAMS,
        patience=1.0,
        length_penalty=1.0,
        max_length=len(start) + 1 + _STEPS,
        suppress_blank=True,
        suppress_tokens=[-1],
        return_scores=True,
        return_no_speech_prob=True,
        sampling_temperature=0.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
    )
    words = [_ids(*_WORDS[:5]), _ids(*_WORDS[:3])]
    frames = [AUDIO_FRAMES] * _BATCH
    model.align(encoded, start, words, frames, median_filter_width=7)


def _unload(model: Whisper) -> None:
    """
    Free the weights now: who holds an error still holds the model.
    """
    give_up_s = time.monotonic() + _UNLOAD_TRIES_S
    while model.model_is_loaded and time.monotonic() < give_up_s:
        # Returns without a word if a batch is active or its lock is taken.
        model.unload_model()
        time.sleep(0.0005)


def _ids(*tokens: str) -> list[int]:
    return [_IDS[token] for token in tokens]
