"""
Models of random weights in the exact sizes of real ones, for machines without network.

The files have the names, the shapes and the bytes of real ones in float16 that
the same CTranslate2 converted, so loads and memory are theirs. What such a model hears
means nothing, but it is the same each time, 30 tokens a window: random layers make the
text, sure enough of each token that faster-whisper does not try again at another
temperature, until the positions from there on lead to its end.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from byte_level import tokenizer, vocabulary

from whispercache.engine.sizes.architecture import ARCHITECTURES
from whispercache.engine.warmup import specification

if TYPE_CHECKING:
    from ctranslate2.specs import WhisperSpec
    from numpy.typing import NDArray

    from whispercache.engine.sizes.architecture import Architecture, Variable

    Array = NDArray[np.float16]

_SYLLABLES = [first + second for first in "bcdfghjklmnprstvwxyz" for second in "aeiou"]
# Leads through all words of three syllables, from one to an unlike one.
_WORD_STEP = 7919

_POOL_ELEMENTS = 1 << 22
# From the start of a row in the pool to that of the next.
_ROW_STEP = 61
# Standard deviation of logits. The first of 50,000 is then a few ahead of the second.
_SHARPNESS = 15.0
_TEXT_TOKENS = 30
# How much positions weigh, for each layer of the decoder. With less, one word is said
# again and again, and faster-whisper tries again at other temperatures.
_LAYER_WEIGHT = 8.0
# Far more than layers and positions.
_PULL = 1000.0

_COUNT = struct.calcsize("I")


def write(size: str, directory: Path) -> Path:
    """
    Writes a model of a known *size* to *directory*, made if missing, and returns it.

    Blocks: for as long as the disk takes; no more than one tensor is in memory.
    """
    tokens, special = _vocabulary(size)
    spec = _specification(size, tokens)
    directory.mkdir(parents=True, exist_ok=True)
    spec.save(str(directory))
    for name, content in (
        ("tokenizer.json", tokenizer(tokens, special)),
        ("preprocessor_config.json", {"feature_size": ARCHITECTURES[size].mels}),
    ):
        text = json.dumps(content, ensure_ascii=False)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def model_bytes(size: str) -> int:
    spec = _specification(size, _vocabulary(size)[0])
    total = 4 * _COUNT + _string_bytes(spec.name)
    for name, value in spec.variables().items():
        if isinstance(value, str):
            total += _string_bytes(name) + _string_bytes(value)
        else:
            lengths = 2 + (len(value.shape) + 1) * _COUNT
            total += _string_bytes(name) + lengths + int(value.num_bytes())
    return total


def _string_bytes(text: str) -> int:
    return struct.calcsize("H") + len(text) + 1


def _specification(size: str, tokens: list[str]) -> WhisperSpec:
    import ctranslate2

    architecture = ARCHITECTURES[size]
    end = tokens.index("<|endoftext|>")
    weights = _Weights(architecture, end)
    spec = specification(ctranslate2, architecture, tokens, weights)
    spec.config.suppress_ids = []
    spec.config.suppress_ids_begin = [end]
    start = end + len(("<|endoftext|>", "<|startoftranscript|>"))
    languages = tokens.index("<|translate|>") - start
    spec.config.lang_ids = [start + number for number in range(languages)]
    spec.config.alignment_heads = [[architecture.decoder_layers - 1, 0]]
    return spec


def _vocabulary(size: str) -> tuple[list[str], list[str]]:
    """
    Returns all tokens of a size, and the special ones among them.
    """
    from faster_whisper.tokenizer import _LANGUAGE_CODES

    wanted, english = ARCHITECTURES[size].vocabulary, size.endswith(".en")
    knows_cantonese = wanted > ARCHITECTURES["large-v2"].vocabulary
    languages = [code for code in _LANGUAGE_CODES if knows_cantonese or code != "yue"]
    without_words, _ = vocabulary([], languages, english=english)
    count = wanted - len(without_words)
    return vocabulary(map(_word, range(count)), languages, english=english)


def _word(number: int) -> str:
    base = len(_SYLLABLES)
    place = number * _WORD_STEP % base**3
    return " " + "".join(_SYLLABLES[place // base**digit % base] for digit in range(3))


class _Weights:
    """
    The numbers of each tensor: views of one pool, without memory of their own.
    """

    def __init__(self, architecture: Architecture, end: int) -> None:
        self._random = np.random.default_rng(0)
        pool = self._random.standard_normal(_POOL_ELEMENTS, np.float32)
        self._pool = (pool / np.sqrt(architecture.d_model)).astype(np.float16)
        self._place = np.float16(_LAYER_WEIGHT * architecture.decoder_layers)
        self._end = end
        self._end_row = self._pool[:0]

    def __call__(self, variable: Variable) -> Array:
        name, shape = variable.name, variable.shape
        if name.endswith(("beta", "bias")):
            return np.broadcast_to(np.float16(0), shape)
        if name.endswith("gamma"):
            scale = _SHARPNESS if name == "decoder/layer_norm/gamma" else 1
            return np.broadcast_to(np.float16(scale), shape)
        view = self._view(shape)
        if name == "decoder/embeddings/weight":
            self._end_row = view[self._end]
        if name == "decoder/position_encodings/encodings":
            view = view * self._place
            view[_TEXT_TOKENS:] += np.float16(_PULL) * self._end_row
        return view

    def _view(self, shape: tuple[int, ...]) -> Array:
        """
        Returns overlapping rows of the pool, from a random place on.
        """
        columns = math.prod(shape[1:])
        needed = (shape[0] - 1) * _ROW_STEP + columns
        start = int(self._random.integers(_POOL_ELEMENTS - needed))
        windows = np.lib.stride_tricks.sliding_window_view(
            self._pool[start : start + needed], columns
        )[::_ROW_STEP]
        return windows.reshape(shape)
