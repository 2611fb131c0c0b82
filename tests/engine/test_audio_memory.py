"""
The memory that audio takes: bounded, and reserved by each lease.
"""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from faster_whisper import vad
from faster_whisper.vad import VadOptions
from real import MIB, at_once, clip, decode_audio, micro_copy, model_of

from whispercache import ModelCache, ModelTooLarge, Workload, footprint
from whispercache.engine.audio.speech import BLOCK_WINDOWS, InBlocks, bounded_names
from whispercache.engine.calls.prepare import workload_of
from whispercache.engine.sizes.architecture import ARCHITECTURES
from whispercache.engine.sizes.footprint import (
    DEFAULT_WORKLOAD,
    audio_bytes,
    rounded_audio_s,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

RATE = 16_000
WINDOW = 512
BLOCK = BLOCK_WINDOWS * WINDOW
HOUR = 3600 * RATE


class Session:
    """
    Stands for onnxruntime's: it notes how many windows it is given at once.
    """

    def __init__(self) -> None:
        self.most = 0

    def get_inputs(self) -> list[Any]:
        """
        Those of Silero VAD 6.
        """
        return [type("Input", (), {"name": name}) for name in ("input", "h", "c")]

    def run(self, _outputs: None, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        """
        Nobody ever speaks.
        """
        windows = len(inputs["input"])
        self.most = max(self.most, windows)
        return np.zeros((windows, 1), np.float32), inputs["h"], inputs["c"]


def bounded(get_vad_model: Any = vad.get_vad_model) -> dict[str, Any]:
    """
    The functions, over a model of voice activity.
    """
    functions = (vad.get_speech_timestamps, get_vad_model, vad.collect_chunks)
    return dict(bounded_names(*functions, VadOptions))


@pytest.fixture(scope="module")
def speech() -> np.ndarray[Any, np.dtype[np.float32]]:
    """
    A minute of it, with pauses.
    """
    parts = [decode_audio(clip(name)) for name in ("en-two-voices", "en-bread")] * 6
    silence = np.zeros(3 * RATE, np.float32)
    joined = np.concatenate([part for each in parts for part in (each, silence)])
    return np.ascontiguousarray(joined[: 60 * RATE], np.float32)


# Where somebody speaks ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "length",
    [
        *(1, WINDOW, 5 * RATE, BLOCK - WINDOW, BLOCK - 1, BLOCK, BLOCK + 1),
        *(3 * BLOCK - 30, 3 * BLOCK + 500, 60 * RATE),
    ],
)
def test_blocks_find_the_same_speech(speech: np.ndarray, length: int) -> None:
    """
    To the last bit of a probability, wherever the audio ends; it stays as it was.
    """
    audio = speech[:length]
    before = audio.copy()
    real = vad.get_vad_model()
    padded = np.pad(audio, (0, WINDOW - len(audio) % WINDOW))
    expected = real(padded.copy())
    assert np.array_equal(InBlocks(real.session)(padded.copy()), expected)
    found = bounded()["get_speech_timestamps"](audio)
    assert found == vad.get_speech_timestamps(audio)
    assert np.array_equal(audio, before)


@pytest.mark.parametrize(
    "options",
    [None, VadOptions(threshold=0.3), {"min_silence_duration_ms": 200}],
    ids=str,
)
def test_options_reach_the_detection(speech: np.ndarray, options: Any) -> None:
    """
    As an object, as a mapping, or not at all.
    """
    plain = VadOptions(**options) if isinstance(options, dict) else options
    expected = vad.get_speech_timestamps(speech, plain)
    assert bounded()["get_speech_timestamps"](speech, options) == expected
    assert len(expected) > 1


def test_only_a_block_is_looked_at_at_once() -> None:
    """
    Audio takes one copy of its samples, and next to nothing besides.
    """
    session = Session()
    model = type("Model", (), {"session": session})
    audio = np.zeros(HOUR // 6, np.float32)
    timestamps = bounded(lambda: model)["get_speech_timestamps"]
    tracemalloc.start()
    try:
        assert timestamps(audio) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert session.most == BLOCK_WINDOWS
    assert peak < 1.2 * audio.nbytes
    # The test can fail: faster-whisper looks at more.
    plain = vad.SileroVADModel.__new__(vad.SileroVADModel)
    plain.session = session
    plain(np.zeros(20_000 * WINDOW, np.float32))
    assert session.most > BLOCK_WINDOWS


def test_a_model_that_is_not_known_here_is_used_as_it_is() -> None:
    """
    As of an older faster-whisper, or a newer one.
    """
    asked = []

    def other(samples: np.ndarray) -> np.ndarray:
        asked.append(samples)
        return np.zeros((len(samples) // WINDOW, 1), np.float32)

    assert bounded(lambda: other)["get_speech_timestamps"](np.zeros(RATE)) == []
    assert len(asked) == 1


def test_threads_build_the_model_once() -> None:
    """
    Where faster-whisper's two first users build one each.
    """
    built: list[object] = []

    def build() -> object:
        if not built:
            built.append(object())
            model.session.run(None, {"input": [0], "h": 0, "c": 0})
        return model

    model: Any = type("Model", (), {"session": Session()})
    timestamps = bounded(build)["get_speech_timestamps"]
    at_once([lambda: timestamps(np.zeros(RATE, np.float32))] * 4)
    assert len(built) == 1


def test_what_is_speech_is_copied_once(speech: np.ndarray) -> None:
    """
    By whoever joins it; limits and silence are faster-whisper's affair.
    """
    collect = bounded()["collect_chunks"]
    clips = [{"start": 5, "end": 100}, {"start": 200, "end": 40_000}]
    parts, (whole,) = collect(speech, clips)
    (expected,), (told,) = vad.collect_chunks(speech, clips)
    assert all(np.shares_memory(part, speech) for part in parts)
    assert np.array_equal(np.concatenate(parts, axis=0), expected)
    assert whole == told
    for found, other in (
        (collect(speech, []), vad.collect_chunks(speech, [])),
        (
            collect(speech, clips, max_duration=1.0),
            vad.collect_chunks(speech, clips, max_duration=1.0),
        ),
    ):
        assert found[1] == other[1]
        assert all(map(np.array_equal, found[0], other[0]))


# What a lease reserves ---------------------------------------------------------------


def test_a_call_says_how_long_its_audio_is() -> None:
    """
    Rounded up, so that calls share a footprint; up to a minute it is the usual one.
    """
    assert workload_of({}, None, RATE) is DEFAULT_WORKLOAD
    assert workload_of({}, None) is DEFAULT_WORKLOAD
    assert workload_of({}, None, 61 * RATE).audio_s == 120
    assert workload_of({"vad_filter": True}, None, 61 * RATE).vad
    assert not workload_of({"vad_filter": True, "clip_timestamps": [1.0]}, None).vad
    assert workload_of({}, 8, 61 * RATE).vad
    assert not workload_of({"vad_filter": False}, 8).vad
    clips = [{"start": 0, "end": 1}]
    assert not workload_of({"clip_timestamps": clips}, 8).vad


def test_lengths_are_rounded_up_and_few() -> None:
    """
    Never down; and some dozens for a whole day.
    """
    rounded = [rounded_audio_s(seconds) for seconds in range(86_400)]
    assert all(to >= s for s, to in enumerate(rounded))
    assert rounded == sorted(rounded)
    assert len(set(rounded)) < 80
    assert [rounded_audio_s(s) for s in (0, 60, 60.1, 601, 3601)] == [
        *(60, 60, 120, 900, 5400)
    ]


def test_what_comes_of_audio_is_near_what_was_measured() -> None:
    """
    MiB for 30 minutes with 80 mels: benchmarks/audio_memory.py.
    """
    tiny = ARCHITECTURES["tiny"]
    for workload, measured in (
        (Workload(audio_s=1800), 97),
        (Workload(audio_s=1800, vad=True), 214),
        (Workload(audio_s=1800, vad=True, batch_size=2), 260),
    ):
        making, keeping = audio_bytes(tiny, workload)
        assert measured <= making / MIB <= 1.3 * measured
        assert keeping < making
    large = ARCHITECTURES["large-v3"]
    assert audio_bytes(large, DEFAULT_WORKLOAD) > audio_bytes(tiny, DEFAULT_WORKLOAD)


@pytest.mark.parametrize("compute_type", ["default", "float32", "int8"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beam_size": 1, "fallback": False},
        {"batch_size": 4, "audio_s": 1800, "vad": True},
        {"audio_s": 7200},
    ],
    ids=str,
)
def test_footprint_is_what_the_cache_reserves(
    tmp_path: Path, compute_type: str, options: dict[str, Any]
) -> None:
    """
    To the byte, as long as nothing was learned of the model.
    """
    unlearned = micro_copy(tmp_path / "model")
    told = footprint(unlearned, compute_type, "cpu", **options)
    with ModelCache(variants=False) as cache:
        planned_for = Workload(**options)
        planned = cache.explain(unlearned, "cpu", compute_type, workload=planned_for)
        assert planned.needed_bytes == told.total_bytes
        with cache.lease(unlearned, "cpu", compute_type, workload=planned_for):
            (info,) = cache.models()
            assert info.weights_bytes == told.weights_bytes
            (host,) = cache.devices()
            charged = told.weights_bytes + told.workspace_bytes
            assert host.charged_bytes == charged


def test_long_audio_is_refused_where_there_is_no_room_for_it(tmp_path: Path) -> None:
    """
    With the numbers, and before a load; a short one is heard.
    """
    unlearned = micro_copy(tmp_path / "model")
    most_bytes = footprint(unlearned, device="cpu").total_bytes
    with ModelCache(ram=most_bytes, variants=False) as cache:
        model = model_of(cache, unlearned)
        long = np.zeros(2 * HOUR, np.float32)
        for options in ({}, {"vad_filter": True}, {"batch_size": 4}):
            with pytest.raises(ModelTooLarge, match=r"\d MiB|\d GiB"):
                model.transcribe(long, **options)
        with pytest.raises(ModelTooLarge):
            model.detect_language(long, vad_filter=True)
        assert cache.stats().loads == 0
        assert list(model.transcribe(long[:RATE])[0])
        assert cache.stats().loads == 1


@pytest.mark.parametrize("field", ["audio_s", "beam_size"])
def test_a_workload_of_nothing_is_refused(field: str) -> None:
    """
    By its name.
    """
    with pytest.raises(ValueError, match=field):
        Workload(**{field: 0})  # type: ignore[arg-type]
