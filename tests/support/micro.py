"""
Micro Whisper models, built from nothing: half a megabyte, milliseconds to load.

The decoder is a Markov chain. Its layers add next to nothing to the token's own
embedding, and the output layer maps each token to the next one of a script, so a model
answers its text to any audio. A test can tell by the answer which model gave it.

It does so in int8 on any CPU. Where that has no VNNI, oneDNN multiplies bytes in pairs:
activations from 0 to 255, where 128 stands for zero, by weights from -127 to 127. The
sum of two products has 16 bits and is cut off at 32767, which two large weights exceed.
To make them small does not help: CTranslate2 scales each row until its largest is 127.
So the last channel is silent, its activations are zero, and each row's weight there is
twice the largest of the others. Those become 64 at most, and no pair is too much:
2 × 255 × 64 = 32640, and 255 × 64 + 128 × 127 = 32576 with the silent channel.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import numpy as np
from byte_level import tokenizer, visible, vocabulary
from ctranslate2.specs import WhisperSpec
from faster_whisper.tokenizer import _LANGUAGE_CODES

if TYPE_CHECKING:
    from ctranslate2.specs.attention_spec import MultiHeadAttentionSpec
    from ctranslate2.specs.common_spec import LayerNormSpec, LinearSpec
    from numpy.typing import NDArray

    Array = NDArray[np.float16]

__all__ = ["build_micro"]

_END_S = 2.0
_POSITIONS = {"encoder": 1500, "decoder": 448}
_LANGUAGES = [code for code in _LANGUAGE_CODES if code != "yue"]
# Word timestamps: words are as many encoder frames (20 ms) long each.
_WORD_FRAMES = 8
_FIRST_WORD = 5
# What the layers add; zeros would be merged into one tensor on saving.
_QUIET = 1e-3


def build_micro(
    directory: Path,
    text: str = "hello world",
    *,
    english: bool = False,
    quantization: str | None = None,
    d_model: int = 32,
    layers: int = 2,
    mels: int = 80,
) -> Path:
    """
    Write a model that answers *text* to every window, and return its directory.

    Args:
        directory: Where to; made if it is missing.
        text: Different words, divided by spaces; fewer than *d_model* less 10.
        english: Build an English-only model, else one that always detects English.
        quantization: What to save the weights in; float16 if None.
        d_model: Width, a multiple of 8.
        layers: Layers of encoder and decoder each.
        mels: Mel bands that it takes; no file beside model.bin says so.
    """
    words = [f" {word}" for word in text.split()]
    if not words or len(set(words)) != len(words):
        raise ValueError("the text needs words, each of them once")
    tokens, special = _vocabulary(words, english=english)
    builder = _Builder(d_model)
    spec = builder.spec(layers, mels)
    ids = {token: number for number, token in enumerate(tokens)}
    chain = _chain(ids, words, english=english)
    decoder = spec.decoder
    decoder.embeddings.weight, decoder.projection.weight = builder.script(
        len(tokens), chain, (ids[visible(words[-1])], ids["<|endoftext|>"])
    )
    spec.register_vocabulary(tokens)
    spec.config.suppress_ids = []
    spec.config.suppress_ids_begin = [ids["<|endoftext|>"]]
    spec.config.lang_ids = [ids[f"<|{code}|>"] for code in _LANGUAGES]
    spec.config.alignment_heads = [[layers - 1, 0]]
    spec.validate()
    spec.optimize(quantization=quantization)
    directory.mkdir(parents=True, exist_ok=True)
    spec.save(str(directory))
    content = json.dumps(tokenizer(tokens, special), ensure_ascii=False)
    (directory / "tokenizer.json").write_text(content, encoding="utf-8")
    return directory


class _Builder:
    """
    Fills a specification with noise of one width.
    """

    def __init__(self, d_model: int) -> None:
        self._width = d_model
        self._random = np.random.default_rng(0)

    def spec(self, layers: int, mels: int) -> WhisperSpec:
        width, heads = self._width, max(1, self._width // 64)
        spec = WhisperSpec(layers, heads, layers, heads)
        for name, stack in (("encoder", spec.encoder), ("decoder", spec.decoder)):
            scale = 0.02 if name == "encoder" else _QUIET
            positions = self._noise(_POSITIONS[name], width, scale=scale)
            if name == "encoder":
                steps = np.arange(len(positions))
                positions[steps, np.minimum(steps // _WORD_FRAMES, width - 2)] = 20
            stack.position_encodings.encodings = positions
            self._norm(stack.layer_norm)
            for layer in stack.layer:
                self._attention(layer.self_attention, (3 * width, width), scale)
                if name == "decoder":
                    rows = (width, 2 * width, width)
                    self._attention(layer.attention, rows, scale)
                    self._align(layer.attention.linear)
                self._norm(layer.ffn.layer_norm)
                self._linear(layer.ffn.linear_0, 4 * width, width)
                self._linear(layer.ffn.linear_1, width, 4 * width, scale)
        for conv, inputs in ((spec.encoder.conv1, mels), (spec.encoder.conv2, width)):
            conv.weight = self._one_in_each(width, inputs, 3)
            conv.bias = self._noise(width)
        return spec

    def script(
        self, vocabulary: int, chain: dict[int, int], last: tuple[int, int]
    ) -> tuple[Array, Array]:
        """
        Embeddings and output layer that lead each token of *chain* to the next.

        After the last word comes a timestamp or, where those are suppressed, the end of
        the text, the runner-up. The end is aligned to audio like a word after the last.
        """
        if len(chain) >= self._width:
            raise ValueError(f"the text is too long for a width of {self._width}")
        embeddings = self._noise(vocabulary, self._width, scale=_QUIET)
        # All is as likely after what is not in it: a search that strays finds no end.
        embeddings[:, -1] = 4
        projection = self._noise(vocabulary, self._width)
        for axis, (token, following) in enumerate(chain.items()):
            embeddings[token] = 0
            embeddings[token, axis] = 4
            projection[following, axis] = 8
            if token == last[0]:
                projection[last[1], axis] = 7
            if following == last[1]:
                embeddings[following] = embeddings[token]
        _spare(projection)
        return embeddings, projection

    def _attention(
        self, spec: MultiHeadAttentionSpec, rows: tuple[int, ...], scale: float
    ) -> None:
        self._norm(spec.layer_norm)
        for linear, outputs in zip(spec.linear, rows, strict=True):
            self._linear(linear, outputs, self._width, scale)

    def _align(self, linear: list[LinearSpec]) -> None:
        """
        Let each word attend to a stretch of the audio of its own, one after the other.
        """
        for each, shift in zip(linear, (0, _FIRST_WORD), strict=False):
            axes = np.arange(self._width - 1 - shift)
            each.weight[axes + shift, axes] += 1.5
            _spare(each.weight)

    def _linear(
        self, spec: LinearSpec, rows: int, columns: int, scale: float = 0.02
    ) -> None:
        spec.weight = self._noise(rows, columns, scale=scale)
        spec.bias = self._noise(rows, scale=scale)
        spec.weight[-1] = spec.bias[-1] = 0
        _spare(spec.weight)

    def _norm(self, spec: LayerNormSpec) -> None:
        spec.gamma = 1 + self._noise(self._width, scale=_QUIET)
        spec.beta = self._noise(self._width, scale=_QUIET)
        spec.gamma[-1] = spec.beta[-1] = 0

    def _one_in_each(self, rows: int, *shape: int) -> Array:
        """
        Weights of which each row has one, which cannot meet another.
        """
        weights = np.zeros((rows, math.prod(shape)), np.float16)
        places = self._random.integers(weights.shape[1], size=rows)
        weights[np.arange(rows), places] = self._noise(rows)
        return weights.reshape(rows, *shape)

    def _noise(self, *shape: int, scale: float = 0.02) -> Array:
        return (self._random.standard_normal(shape) * scale).astype(np.float16)


def _spare(weights: Array) -> None:
    """
    Leave half the range of int8 to each row's weight in the silent channel, the last.
    """
    weights[:, -1] = 2 * np.abs(weights[:, :-1]).max(axis=1)


def _chain(ids: dict[str, int], words: list[str], *, english: bool) -> dict[int, int]:
    """
    Which token follows which.
    """
    spoken = [visible(word) for word in words]
    script = ["<|0.00|>", *spoken, f"<|{_END_S:.2f}|>", "<|endoftext|>"]
    pairs = [
        ("<|startoftranscript|>", script[0] if english else "<|en|>"),
        ("<|transcribe|>", script[0]),
        ("<|translate|>", script[0]),
        ("<|notimestamps|>", script[1]),
        *itertools.pairwise(script),
    ]
    return {ids[token]: ids[following] for token, following in pairs}


def _vocabulary(words: list[str], *, english: bool) -> tuple[list[str], list[str]]:
    return vocabulary(words, _LANGUAGES, english=english)
