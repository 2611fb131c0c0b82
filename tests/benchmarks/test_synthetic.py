"""
Models of random weights: as large as real ones, and good for a transcription.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from real import plain_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from synthetic import model_bytes, write

from whispercache.engine.sizes.architecture import ARCHITECTURES
from whispercache.engine.sizes.header import read_header
from whispercache.engine.sizes.weights import weights_bytes

SECONDS_2 = np.random.default_rng(0).standard_normal(32_000).astype(np.float32) / 10
OTHER_2 = np.sin(np.arange(32_000) / 20).astype(np.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    Directory of the size tiny.
    """
    return write("tiny", tmp_path_factory.mktemp("synthetic") / "tiny")


def test_a_synthetic_model_has_the_size_of_the_real_one(tiny: Path) -> None:
    """
    Its file has the bytes that were told, its tensors those of the known size.
    """
    header = read_header(tiny)
    assert header.file_bytes == model_bytes("tiny")
    assert header.saved_compute_type == "float16"
    known = ARCHITECTURES["tiny"]
    assert header.architecture == known
    for device in ("cpu", "cuda:0"):
        expected_bytes = weights_bytes(known, "float16", device)
        assert weights_bytes(header, "float16", device) == expected_bytes


@pytest.mark.parametrize(
    ("size", "n_bytes"), [("base", 145_217_607), ("large-v3", 3_087_284_237)]
)
def test_sizes_are_exact_to_the_byte(size: str, n_bytes: int) -> None:
    """
    A synthetic file is as long as the one on the hub.
    """
    assert model_bytes(size) == n_bytes


@pytest.mark.slow
def test_a_synthetic_model_hears_the_same_each_time(tiny: Path) -> None:
    """
    Two seconds are the same words twice, at the first temperature; others are others.
    """
    whisper = plain_model(tiny, compute_type="int8")
    first, again, other = (
        list(whisper.transcribe(audio, language="en", beam_size=2)[0])
        for audio in (SECONDS_2, SECONDS_2, OTHER_2)
    )
    assert first == again
    assert {segment.temperature for segment in first} == {0.0}
    texts = [[segment.text for segment in heard] for heard in (first, other)]
    assert all(texts)
    assert texts[0] != texts[1]
