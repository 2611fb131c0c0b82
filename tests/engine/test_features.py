"""
The features of long audio, in blocks, beside faster-whisper's own way.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import tracemalloc

import numpy as np
import pytest
from faster_whisper.feature_extractor import FeatureExtractor
from real import MIB, clip, decode_audio, micro, model_of

from whispercache import ModelCache
from whispercache.engine.audio.features import BLOCK_S, LONG_S, InBlocks, in_blocks

RATE = 16_000
BLOCK = BLOCK_S * RATE


@pytest.fixture(scope="module")
def speech() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """
    Two and a half minutes.
    """
    samples = np.tile(decode_audio(clip("en-harbour-long")), 5)
    return np.ascontiguousarray(samples[: 150 * RATE], np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("padding", [0, 160, 480_000])
@pytest.mark.parametrize(
    "length", [3 * BLOCK, 3 * BLOCK + 1, 3 * BLOCK + 159, 3 * BLOCK + 7_777, 150 * RATE]
)
def test_blocks_make_the_same_features(
    speech: np.ndarray, mels: int, padding: int, length: int
) -> None:
    """
    Up to the last bit of a float32, wherever the audio ends in its last block.
    """
    plain = FeatureExtractor(feature_size=mels)
    blocks = in_blocks(FeatureExtractor)(feature_size=mels)
    expected = plain(speech[:length], padding=padding)
    found = blocks(speech[:length], padding=padding)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-7)


def test_short_audio_is_faster_whispers_own_affair(speech: np.ndarray) -> None:
    """
    Bit by bit the same, whatever its window.
    """
    blocks, plain = in_blocks(FeatureExtractor)(), FeatureExtractor()
    short = speech[: LONG_S * RATE]
    assert np.array_equal(blocks(short, chunk_length=20), plain(short, chunk_length=20))
    assert blocks.nb_max_frames == plain.nb_max_frames == 2000
    assert blocks.sampling_rate == RATE


def test_a_window_of_another_length_is_noted(speech: np.ndarray) -> None:
    """
    faster-whisper looks it up there afterwards.
    """
    blocks = in_blocks(FeatureExtractor)()
    blocks(speech, chunk_length=20)
    assert blocks.nb_max_frames == 2000
    assert blocks.n_samples == 20 * RATE
    with pytest.raises(AttributeError):
        _ = blocks.mood
    assert copy.copy(blocks).sampling_rate == RATE


def test_it_is_one_of_faster_whispers_to_a_program() -> None:
    """
    By its class, and as a copy of any kind, which goes on in blocks.
    """
    made = in_blocks(FeatureExtractor)(feature_size=128)
    made.mood = "good"
    pickled = pickle.loads(pickle.dumps(made))
    for each in (copy.copy(made), copy.deepcopy(made), pickled):
        assert isinstance(each, FeatureExtractor)
        assert type(each) is type(made)
        assert each.mood == "good"
        assert len(each.mel_filters) == 128
    assert type(made).__name__ == "FeatureExtractor"
    parameters = inspect.signature(made).parameters
    assert parameters.keys() == inspect.signature(FeatureExtractor()).parameters.keys()


def test_memory_does_not_grow_with_the_audio_but_for_the_result(
    speech: np.ndarray,
) -> None:
    """
    Where faster-whisper takes 0.9 MiB for each second.
    """

    def most_bytes(extractor: FeatureExtractor) -> int:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        extractor(speech)
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    try:
        plain = most_bytes(FeatureExtractor())
        blocks = most_bytes(in_blocks(FeatureExtractor)())
    finally:
        tracemalloc.stop()
    assert plain > 120 * MIB
    assert blocks < 50 * MIB


def test_cached_models_take_long_audio_in_blocks() -> None:
    """
    And hear what is in all of it.
    """
    with ModelCache() as cache:
        model = model_of(cache, micro("micro a"))
        with model.lease() as whisper:
            assert isinstance(whisper.feature_extractor, InBlocks)
        segments, info = model.transcribe(np.zeros(95 * RATE, np.float32))
        assert info.duration == 95
        assert [segment.seek for segment in segments][-1] >= 60 * 100
