"""
The shapes of Whisper models, and the numbers behind those of the known sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# Mel frames in a window of 30 s.
AUDIO_FRAMES = 3000

AUDIO_POSITIONS = 1500
TEXT_POSITIONS = 448
# The type that the known models are saved in on the hub.
HUB_COMPUTE_TYPE = "float16"

_CONV_WIDTH = 3
# Bytes of one element, by type, in the order of the numbers that model.bin uses for
# them.
ITEM_BYTES: Mapping[str, int] = {
    "float32": 4,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "float16": 2,
    "bfloat16": 2,
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """
    The numbers that fix every shape in a Whisper model.

    Attributes:
        d_model: Width of the hidden state.
        encoder_layers: Layers of the encoder.
        decoder_layers: Layers of the decoder.
        heads: Attention heads of the encoder.
        ffn: Width of the feed-forward layers.
        mels: Mel bands of the input, 80 or 128.
        vocabulary: Tokens, timestamps and special ones included.
    """

    d_model: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    ffn: int
    mels: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Variable:
    """
    One tensor in model.bin.

    Attributes:
        name: For example ``"encoder/conv1/weight"``.
        shape: Dimensions; empty for a scalar.
        dtype: Saved type, a key of `ITEM_BYTES`.
        nbytes: Bytes of its payload.
        offset: Start of the payload in the file, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    offset: int

    @property
    def elements(self) -> int:
        """
        The number of its elements.
        """
        return prod(self.shape)


# Sizes of the vocabularies; that of large-v3 added Cantonese.
ENGLISH_TOKENS, _MULTILINGUAL, CANTONESE_TOKENS = 51864, 51865, 51866
_LARGE = (1280, 32, 32, 20, 5120, 80, _MULTILINGUAL)
# The known models, by canonical name; their files on the hub are float16. Source:
# config.json of each on the model hub (openai, distil-whisper).
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        name: Architecture(*numbers)
        for name, numbers in {
            "tiny": (384, 4, 4, 6, 1536, 80, _MULTILINGUAL),
            "tiny.en": (384, 4, 4, 6, 1536, 80, ENGLISH_TOKENS),
            "base": (512, 6, 6, 8, 2048, 80, _MULTILINGUAL),
            "base.en": (512, 6, 6, 8, 2048, 80, ENGLISH_TOKENS),
            "small": (768, 12, 12, 12, 3072, 80, _MULTILINGUAL),
            "small.en": (768, 12, 12, 12, 3072, 80, ENGLISH_TOKENS),
            "medium": (1024, 24, 24, 16, 4096, 80, _MULTILINGUAL),
            "medium.en": (1024, 24, 24, 16, 4096, 80, ENGLISH_TOKENS),
            "large-v1": _LARGE,
            "large-v2": _LARGE,
            "large-v3": (1280, 32, 32, 20, 5120, 128, CANTONESE_TOKENS),
            "large-v3-turbo": (1280, 32, 4, 20, 5120, 128, CANTONESE_TOKENS),
            "distil-small.en": (768, 12, 4, 12, 3072, 80, ENGLISH_TOKENS),
            "distil-medium.en": (1024, 24, 2, 16, 4096, 80, ENGLISH_TOKENS),
            "distil-large-v2": (1280, 32, 2, 20, 5120, 80, _MULTILINGUAL),
            "distil-large-v3": (1280, 32, 2, 20, 5120, 128, CANTONESE_TOKENS),
            "distil-large-v3.5": (1280, 32, 2, 20, 5120, 128, CANTONESE_TOKENS),
        }.items()
    }
)


@lru_cache(maxsize=32)
def layout(architecture: Architecture) -> tuple[Variable, ...]:
    """
    Returns the tensors of a float16 model.bin of this architecture, offsets left at 0.
    """
    width, mels = architecture.d_model, architecture.mels
    shapes: dict[str, tuple[int, ...]] = {
        "decoder/embeddings/weight": (architecture.vocabulary, width),
        "decoder/position_encodings/encodings": (TEXT_POSITIONS, width),
        "encoder/position_encodings/encodings": (AUDIO_POSITIONS, width),
        "encoder/conv1/weight": (width, mels, _CONV_WIDTH),
        "encoder/conv1/bias": (width,),
        "encoder/conv2/weight": (width, width, _CONV_WIDTH),
        "encoder/conv2/bias": (width,),
        **_norm("encoder", width),
        **_norm("decoder", width),
    }
    for layer in range(architecture.encoder_layers):
        shapes |= _layer(f"encoder/layer_{layer}", architecture)
    for layer in range(architecture.decoder_layers):
        prefix = f"decoder/layer_{layer}"
        shapes |= _layer(prefix, architecture)
        # Keys and values of the audio are one layer, queries another.
        shapes |= _block(f"{prefix}/attention", width, (width, 2 * width, width))
    return tuple(
        Variable(name, shape, HUB_COMPUTE_TYPE, 2 * prod(shape), 0)
        for name, shape in shapes.items()
    )


def _layer(prefix: str, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    width, ffn = architecture.d_model, architecture.ffn
    return {
        # Queries, keys and values are one layer.
        **_block(f"{prefix}/self_attention", width, (3 * width, width)),
        **_block(f"{prefix}/ffn", width, (ffn, width)),
        f"{prefix}/ffn/linear_1/weight": (width, ffn),
    }


def _block(
    prefix: str, width: int, outputs: Iterable[int]
) -> dict[str, tuple[int, ...]]:
    shapes = _norm(prefix, width)
    for number, rows in enumerate(outputs):
        shapes[f"{prefix}/linear_{number}/weight"] = (rows, width)
        shapes[f"{prefix}/linear_{number}/bias"] = (rows,)
    return shapes


def _norm(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}/layer_norm/{part}": (width,) for part in ("beta", "gamma")}
