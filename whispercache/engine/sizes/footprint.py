"""
The bytes that a model takes, before it is loaded.

The shapes come from the header of model.bin or, where no file is there yet, from the
architecture of a known size; both go through the same sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from whispercache.engine.naming import canonical_model
from whispercache.errors import UnknownModel
from whispercache.keys import (
    TYPICAL_COMPUTE_TYPES,
    ModelKey,
    canonical_device,
    compute_type_on,
    effective_compute_type,
    frozen_compute_type,
    is_directory,
)

from .architecture import (
    ARCHITECTURES,
    AUDIO_FRAMES,
    AUDIO_POSITIONS,
    HUB_COMPUTE_TYPE,
    ITEM_BYTES,
    TEXT_POSITIONS,
    Architecture,
)
from .header import read_header
from .weights import (
    DTYPES,
    Source,
    architecture_of,
    converting_bytes,
    output_copy_bytes,
    packing_bytes,
    packs_weights,
    weights_bytes,
)

if TYPE_CHECKING:
    import os

# Vocabulary tables and tokenizer.json, kept as long as the model. Source: growth of
# anonymous memory less the weights, CTranslate2 4.8.5, tokenizers 0.23: 15.3 MiB for
# tiny.en, 18.3 MiB for base, most of it the tokenizer.
_HOST_BYTES_PER_TOKEN = 340
# What parsing tokenizer.json takes besides; 13 to 29 MiB, measured as above.
_PARSING_BYTES_PER_TOKEN = 600
# Hidden states at the peak of the encoder, besides the attention scores. Source: a
# layer holds 6 (CTranslate2 src/layers/attention.cc @ 0d8bcd3); on the CPU malloc keeps
# freed ones, and 5 to 18 were measured, mostly 6 to 13.
_CUDA_BUFFERS = 6
_CPU_BUFFERS = 12
# What a load on the CPU reserves, as a multiple of its predicted peak. Source: with the
# heap's holes and the kept tokenizer of the model before, loads of base to int8 in turn
# with tiny.en peaked at 1.21 times the prediction (benchmarks/switch.py).
HEAP_SLACK = 1.25

_SAMPLES_BYTES_PER_S = 4 * 16_000
_FRAMES_PER_S = 100
# Memory of the detection of voice activity for a block (speech.py).
_VAD_BYTES = 16 * 1024**2
# Size of the batched pipeline's windows, padded to 30 s, as a multiple of the features
# in them. At most 2: two in a row are more than 30 s together, or they would be one.
_PADDED = 1.5
# Most that features take while they are made: 0.9 MiB for each second of up to a
# minute, and less for the blocks of longer audio (features.py).
_EXTRACTING_BYTES = 54 * 1024**2


@dataclass(frozen=True, slots=True)
class Workload:
    """
    The work of one call, as far as memory goes. The defaults are faster-whisper's.

    Attributes:
        beam_size: Beams at temperature 0.
        best_of: Samples at a higher temperature.
        batch_size: Windows at once; above 1 this is the batched pipeline.
        fallback: A temperature above 0 can be reached.
        audio_s: Seconds of audio, whose features are in host memory. Calls give it
            rounded up; see `rounded_audio_s`.
        vad: Voice activity is looked for in it.
    """

    beam_size: int = 5
    best_of: int = 5
    batch_size: int = 1
    fallback: bool = True
    audio_s: int = 60
    vad: bool = False

    def __post_init__(self) -> None:
        for name in ("beam_size", "best_of", "batch_size", "audio_s"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")


def rounded_audio_s(audio_s: float) -> int:
    """
    Rounds seconds of audio up, so that most calls on a model share a footprint: to one
    minute, above ten to five, above an hour to half an hour.
    """
    for most_s, step_s in ((600, 60), (3600, 300)):
        if audio_s <= most_s:
            return max(1, math.ceil(audio_s / step_s)) * step_s
    return math.ceil(audio_s / 1800) * 1800


DEFAULT_WORKLOAD = Workload()


@dataclass(frozen=True, slots=True)
class Footprint:
    """
    The bytes that one model takes.

    Attributes:
        weights_bytes: Resident on its device while it is loaded. On the CPU with its
            vocabulary and tokenizer; on a GPU with the padded copy of the output layer,
            which the first call makes and the unload frees.
        workspace_bytes: On top of that, at the peak of one call. Calls at the same time
            take it each.
        loading_bytes: Peak on its device while it loads, with what a cache reserves on
            the CPU for the heap's holes.
        host_loading_bytes: Peak in host RAM while it loads to a GPU; 0 on the CPU.

    The CUDA context, compiled kernels and the caller's audio are in no footprint.
    """

    weights_bytes: int
    workspace_bytes: int
    loading_bytes: int
    host_loading_bytes: int

    @property
    def total_bytes(self) -> int:
        """
        Bytes that must be free on the device to load the model and make one call.
        """
        return max(self.weights_bytes + self.workspace_bytes, self.loading_bytes)


def footprint(
    model: str | os.PathLike[str],
    compute_type: str = "default",
    device: str = "cpu",
    *,
    beam_size: int = 5,
    best_of: int = 5,
    batch_size: int = 1,
    fallback: bool = True,
    audio_s: float = 60,
    vad: bool = False,
) -> Footprint:
    """
    Returns the bytes that *model* takes on *device*. Nothing is loaded and nothing
    downloaded.

    A cache reserves these: they include what earlier loads on this machine have
    measured. Only on a card they may be less than a cache reserves: where the GPUs of
    this machine differ, or have slices (MIG), or NVML does not know them, what was
    measured on which of them is known only once CUDA has started, which this does not
    do. They then are what is predicted for any card.

    Args:
        model: A known size, its alias or repository, a directory, or a repository that
            was downloaded before.
        compute_type: As for a load; resolved for a typical device of that kind.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``. The device need not exist.
        beam_size: See `Workload`.
        best_of: See `Workload`.
        batch_size: See `Workload`.
        fallback: See `Workload`.
        audio_s: See `Workload`; rounded up as there.
        vad: See `Workload`.

    Blocks: milliseconds, if a header has to be read.

    Raises:
        UnknownModel: no such size, or neither listed here nor on this disk.
        UnsupportedComputeType: devices of this kind do not have it.
        CorruptModel: the directory's model.bin is broken.
        ValueError: *device* is ``"auto"`` or nonsense.
    """
    canonical = canonical_device(device)
    if canonical == "auto":
        raise ValueError("the bytes depend on the device: name 'cpu' or 'cuda'")
    # As calls do it, so that this is what they reserve.
    rounded_s = rounded_audio_s(audio_s)
    workload = Workload(beam_size, best_of, batch_size, fallback, rounded_s, vad)
    model_name = canonical_model(model)
    source, saved = _source(model_name)
    supported = TYPICAL_COMPUTE_TYPES[canonical.partition(":")[0]]
    wanted = compute_type_on(frozen_compute_type(compute_type), canonical)
    effective = effective_compute_type(wanted, saved, canonical, supported)
    predicted = estimate(source, effective, canonical, workload)
    # Imported late: who imports the package need not wait for them.
    from whispercache.devices.host import cpu_name
    from whispercache.devices.nvml import common_name

    from .learned import LearnedFootprints, corrected

    name = cpu_name() if canonical == "cpu" else common_name()
    if name is not None:
        key = ModelKey(model_name, canonical, effective)
        predicted = corrected(predicted, LearnedFootprints(), key, name)
    return reserved(predicted, canonical)


def reserved(predicted: Footprint, device: str) -> Footprint:
    """
    Returns what a cache reserves of *device* where so much was predicted.
    """
    if device != "cpu":
        return predicted
    loading_bytes = int(predicted.loading_bytes * HEAP_SLACK)
    return replace(predicted, loading_bytes=loading_bytes)


def estimate(
    source: Source,
    compute_type: str,
    device: str,
    workload: Workload = DEFAULT_WORKLOAD,
) -> Footprint:
    """
    Returns the footprint of a model whose header or architecture is known; the latter
    is that of a float16 file. *compute_type* is an effective one.
    """
    architecture = architecture_of(source)
    workspace = workspace_bytes(architecture, compute_type, device, workload)
    weights = weights_bytes(source, compute_type, device)
    converting = converting_bytes(source, compute_type)
    host_bytes = architecture.vocabulary * _HOST_BYTES_PER_TOKEN
    parsing_bytes = architecture.vocabulary * _PARSING_BYTES_PER_TOKEN
    if device != "cpu":
        weights += output_copy_bytes(architecture, compute_type)
        host_loading = host_bytes + max(converting, parsing_bytes)
        return Footprint(weights, workspace, weights, host_loading)
    resident = weights + host_bytes
    # The tokenizer is parsed before the weights come.
    peak = max(resident, host_bytes + max(converting, parsing_bytes))
    # Intel CPUs only; the copies are made at the end of the load.
    if packs_weights():
        extra, unpacked = packing_bytes(source, compute_type)
        resident += extra
        peak = max(peak, resident + unpacked)
    return Footprint(resident, workspace, peak, 0)


def workspace_bytes(
    architecture: Architecture, compute_type: str, device: str, workload: Workload
) -> int:
    """
    Returns the bytes at the peak of one call: the larger of encoding and decoding.

    Text is as long as Whisper allows. A temperature above 0 copies what the decoder
    keeps of the audio *best_of* times. On the CPU `audio_bytes` are included. Not
    counted: features on a GPU's host, and the samples themselves.

    Source: layers of CTranslate2 4.8. Peaks on the CPU were 0.8 to 1.2 times this, for
    tiny.en and base, float32 and int8, batches of 1 to 8; none was measured on a card.
    """
    on_cpu = device == "cpu"
    item_bytes = 4 if on_cpu else ITEM_BYTES[DTYPES[compute_type][1]]
    buffers = _CPU_BUFFERS if on_cpu else _CUDA_BUFFERS
    batch, width = workload.batch_size, architecture.d_model
    audio = batch * AUDIO_POSITIONS * width
    scores = batch * architecture.heads * AUDIO_POSITIONS**2
    features = batch * architecture.mels * AUDIO_FRAMES
    encoding = scores + buffers * audio + features
    # Encoding and decoding follow each other, so the larger one counts.
    decoding = _decoding(architecture, batch, workload.beam_size, copies=1)
    # A batch has no fallback: the pipeline stays at its first temperature.
    if workload.fallback and batch == 1:
        best_of = workload.best_of
        sampling = _decoding(architecture, batch, best_of, copies=best_of)
        decoding = max(decoding, sampling)
    work = item_bytes * max(encoding, audio + decoding)
    if not on_cpu:
        return work
    making, keeping = audio_bytes(architecture, workload)
    return max(making, work + keeping)


def audio_bytes(architecture: Architecture, workload: Workload) -> tuple[int, int]:
    """
    Returns the bytes of host memory that the audio takes besides its samples: at the
    peak while a call begins, and while its segments are iterated over.

    The detection of voice activity copies the samples, and then what is speech. The
    batched pipeline has features twice for a moment, and padded ones twice for another.

    Source: faster_whisper/transcribe.py, 1.2.1. Measured with 30 minutes, in MiB, and
    predicted: 97 and 109, with voice activity 214 and 219, batched 260 and 330; without
    blocks 1486, 1779 and 404 (benchmarks/audio_memory.py, onnxruntime 1.32).
    """
    features = workload.audio_s * _FRAMES_PER_S * architecture.mels * 4
    samples = workload.audio_s * _SAMPLES_BYTES_PER_S
    is_batched = workload.batch_size > 1
    speech = samples if workload.vad or is_batched else 0
    keeping = int(features * _PADDED) if is_batched else features
    making = speech + features + (2 * keeping if is_batched else _EXTRACTING_BYTES)
    if workload.vad:
        making = max(making, samples + _VAD_BYTES)
    return max(making, speech + features + _EXTRACTING_BYTES), keeping


def _decoding(architecture: Architecture, batch: int, rows: int, copies: int) -> int:
    """
    Returns how many numbers decoding holds: keys and values, and the logits.
    """
    layers, width = architecture.decoder_layers, architecture.d_model
    audio = 2 * layers * batch * copies * AUDIO_POSITIONS * width
    # One layer's keys are there twice while a position is added to them.
    text = (2 * layers + 1) * batch * rows * TEXT_POSITIONS * width
    return audio + text + batch * rows * architecture.vocabulary


def _source(model: str) -> tuple[Source, str]:
    # Before any look at the disk: the answer is the same with and without files.
    if known := ARCHITECTURES.get(model):
        return known, HUB_COMPUTE_TYPE
    header = read_header(model if is_directory(model) else _downloaded(model))
    return header, header.saved_compute_type


def _downloaded(repository: str) -> str:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "model.bin")
    if not isinstance(found, str):
        raise UnknownModel(
            repository,
            "its size is not listed and it is not on this disk; download it first, "
            "with cache.preload() or huggingface_hub.snapshot_download()",
        )
    return found
