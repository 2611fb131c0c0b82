"""
Bytes that a model takes, before it is loaded.

The shapes come from the header of model.bin or, where no file is there yet, from the
architecture of a known size; both go through the same sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .architecture import (
    ARCHITECTURES,
    AUDIO_FRAMES,
    AUDIO_POSITIONS,
    HUB_COMPUTE_TYPE,
    ITEM_BYTES,
    TEXT_POSITIONS,
    Architecture,
)
from .errors import UnknownModel
from .header import ModelHeader, read_header
from .keys import (
    TYPICAL_COMPUTE_TYPES,
    canonical_device,
    canonical_model,
    effective_compute_type,
    is_directory,
)
from .weights import (
    DTYPES,
    Source,
    architecture_of,
    converting_bytes,
    is_cpu,
    output_copy_bytes,
    packing_bytes,
    packs_weights,
    weights_bytes,
)

if TYPE_CHECKING:
    import os

__all__ = [
    "ARCHITECTURES",
    "DEFAULT_WORKLOAD",
    "Architecture",
    "Footprint",
    "ModelHeader",
    "Source",
    "Workload",
    "estimate",
    "footprint",
    "read_header",
    "weights_bytes",
    "workspace_bytes",
]

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


@dataclass(frozen=True, slots=True)
class Workload:
    """
    What one call does, as far as memory goes. The defaults are faster-whisper's.

    Attributes:
        beam_size: Beams at temperature 0.
        best_of: Samples at a higher temperature.
        batch_size: Windows at once; above 1 this is the batched pipeline.
        fallback: Whether a temperature above 0 can be reached.
    """

    beam_size: int = 5
    best_of: int = 5
    batch_size: int = 1
    fallback: bool = True

    def __post_init__(self) -> None:
        for name in ("beam_size", "best_of", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")


DEFAULT_WORKLOAD = Workload()


@dataclass(frozen=True, slots=True)
class Footprint:
    """
    What one model takes, in bytes.

    Attributes:
        weights_bytes: Resident on its device while it is loaded. On the CPU with its
            vocabulary and tokenizer; on a GPU with the padded copy of the output layer,
            which the first call makes and the unload frees.
        workspace_bytes: On top of that, at the peak of one call. Calls at the same time
            take it each.
        loading_bytes: Peak on its device while it loads.
        host_loading_bytes: Peak in host RAM while it loads to a GPU; 0 on the CPU.

    The CUDA context, compiled kernels and the caller's audio are nobody's footprint.
    """

    weights_bytes: int
    workspace_bytes: int
    loading_bytes: int
    host_loading_bytes: int

    @property
    def total_bytes(self) -> int:
        """
        What must be free on the device to load the model and make one call.
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
) -> Footprint:
    """
    What *model* takes on *device*. Nothing is loaded and nothing downloaded.

    Args:
        model: A known size, its alias or repository, a directory, or a repository that
            was downloaded before.
        compute_type: As for a load; resolved for a typical device of that kind.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``. The device need not exist.
        beam_size: See `Workload`.
        best_of: See `Workload`.
        batch_size: See `Workload`.
        fallback: See `Workload`.

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
    workload = Workload(beam_size, best_of, batch_size, fallback)
    source, saved = _source(canonical_model(model))
    supported = TYPICAL_COMPUTE_TYPES[canonical.partition(":")[0]]
    effective = effective_compute_type(compute_type, saved, canonical, supported)
    return estimate(source, effective, canonical, workload)


def estimate(
    source: Source,
    compute_type: str,
    device: str,
    workload: Workload | None = None,
) -> Footprint:
    """
    The footprint of a model whose header or architecture is known.

    Args:
        source: `read_header()` of the model, or one of `ARCHITECTURES`; for the latter
            the file is taken to be float16.
        compute_type: An effective one, see `effective_compute_type()`.
        device: ``"cpu"`` or ``"cuda:N"``.
        workload: What a call does; faster-whisper's defaults if None.
    """
    architecture = architecture_of(source)
    workspace = workspace_bytes(
        architecture, compute_type, device, workload or Workload()
    )
    weights = weights_bytes(source, compute_type, device)
    converting = converting_bytes(source, compute_type)
    host_bytes = architecture.vocabulary * _HOST_BYTES_PER_TOKEN
    parsing_bytes = architecture.vocabulary * _PARSING_BYTES_PER_TOKEN
    if not is_cpu(device):
        weights += output_copy_bytes(architecture, compute_type)
        host_loading = host_bytes + max(converting, parsing_bytes)
        return Footprint(weights, workspace, weights, host_loading)
    resident = weights + host_bytes
    # The tokenizer is parsed before the weights come.
    peak = max(resident, host_bytes + max(converting, parsing_bytes))
    if packs_weights():
        extra, unpacked = packing_bytes(source, compute_type)
        resident += extra
        peak = max(peak, resident + unpacked)
    return Footprint(resident, workspace, peak, 0)


def workspace_bytes(
    architecture: Architecture, compute_type: str, device: str, workload: Workload
) -> int:
    """
    Bytes at the peak of one call: the larger of encoding and decoding.

    Text is taken to be as long as Whisper allows. A temperature above 0 copies what the
    decoder keeps of the audio *best_of* times; the batched pipeline stays at its first
    temperature. Not counted: audio and features of the whole file, in host RAM.

    Source: layers of CTranslate2 4.8. Peaks on the CPU were 0.8 to 1.2 times this, for
    tiny.en and base, float32 and int8, batches of 1 to 8; none was measured on a card.
    """
    on_cpu = is_cpu(device)
    item_bytes = 4 if on_cpu else ITEM_BYTES[DTYPES[compute_type][1]]
    buffers = _CPU_BUFFERS if on_cpu else _CUDA_BUFFERS
    batch, width = workload.batch_size, architecture.d_model
    audio = batch * AUDIO_POSITIONS * width
    scores = batch * architecture.heads * AUDIO_POSITIONS**2
    features = batch * architecture.mels * AUDIO_FRAMES
    encoding = scores + buffers * audio + features
    decoding = _decoding(architecture, batch, workload.beam_size, copies=1)
    if workload.fallback and batch == 1:
        best_of = workload.best_of
        sampling = _decoding(architecture, batch, best_of, copies=best_of)
        decoding = max(decoding, sampling)
    return item_bytes * max(encoding, audio + decoding)


def _decoding(architecture: Architecture, batch: int, rows: int, copies: int) -> int:
    """
    Numbers held while decoding: keys and values of audio and text, and the logits.
    """
    layers, width = architecture.decoder_layers, architecture.d_model
    audio = 2 * layers * batch * copies * AUDIO_POSITIONS * width
    # One layer's keys are there twice while a position is added to them.
    text = (2 * layers + 1) * batch * rows * TEXT_POSITIONS * width
    return audio + text + batch * rows * architecture.vocabulary


def _source(model: str) -> tuple[Source, str]:
    """
    Where the shapes of *model* come from, and the compute type it is saved in.
    """
    if known := ARCHITECTURES.get(model):
        return known, HUB_COMPUTE_TYPE
    header = read_header(model if is_directory(model) else _downloaded(model))
    return header, header.saved_compute_type


def _downloaded(repository: str) -> str:
    """
    The model.bin of a hub repository in the local cache.

    Raises:
        UnknownModel: it was not downloaded yet.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "model.bin")
    if not isinstance(found, str):
        raise UnknownModel(
            repository,
            "its size is not listed and it is not on this disk; download it first, "
            "with cache.preload() or huggingface_hub.snapshot_download()",
        )
    return found
