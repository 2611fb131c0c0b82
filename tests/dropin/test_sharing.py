"""
Programs of all kinds on cached models, with memory for one: in turns, and at once.
"""

from __future__ import annotations

import gc
import types
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from faster_whisper import BatchedInferencePipeline
from faster_whisper.audio import pad_or_trim
from faster_whisper.tokenizer import Tokenizer
from real import (
    at_once,
    clip,
    decode_audio,
    micro,
    micro_copy,
    model_of,
    plain_model,
    text_of,
)

from whispercache import ModelCache, footprint
from whispercache.testing import settle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

AUDIO = decode_audio(clip("en-bread"))


def words(model: Any) -> str:
    """
    Most scripts: words, where there is speech.
    """
    segments, _ = model.transcribe(AUDIO, word_timestamps=True, vad_filter=True)
    return " ".join(f"{w.start:.2f}{w.word}" for s in segments for w in s.words)


def batched(model: Any) -> str:
    """
    Scripts that want to be fast, with a pipeline of their own.
    """
    return text_of(BatchedInferencePipeline(model=model).transcribe(AUDIO)[0])


def by_itself(model: Any) -> str:
    """
    Batches of a package's own, word by word: encode, detect, generate and align.
    """
    tokenizer = Tokenizer(
        model.hf_tokenizer,
        model.model.is_multilingual,
        task="transcribe",
        language="en",
    )
    features = pad_or_trim(model.feature_extractor(AUDIO))
    encoded = model.encode(np.stack([features] * 2))
    languages = [found[0][0] for found in model.model.detect_language(encoded)]
    prompt = model.get_prompt(tokenizer, [], without_timestamps=True)
    results = model.model.generate(encoded, [prompt] * 2, beam_size=2)
    tokens = [each.sequences_ids[0] for each in results]
    aligned = model.find_alignment(tokenizer, tokens, encoded, 3000)
    return f"{languages} {[tokenizer.decode(each) for each in tokens]} {aligned}"


def changed(model: Any) -> str:
    """
    Packages that put a method of their own in its place, and call the old one.
    """
    if not hasattr(model, "transcribe_original"):
        model.transcribe_original = model.transcribe

        def transcribe(self: Any, audio: Any) -> str:
            return text_of(self.transcribe_original(audio, beam_size=2)[0]).upper()

        model.transcribe = types.MethodType(transcribe, model)
    return str(model.transcribe(AUDIO))


def language(model: Any) -> str:
    """
    Those that ask for the language first.
    """
    return f"{model.detect_language(AUDIO)} {text_of(model.transcribe(AUDIO)[0])}"


PROGRAMS = [words, batched, by_itself, changed, language]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_hears_what_it_would_on_plain_models(
    program: Callable[[Any], str], tmp_path: Path
) -> None:
    """
    Two models in turns, one load each; then from four threads, whose loads come as they
    may. Never is more there than fits, and all leases come back.
    """
    directories = [micro(), micro_copy(tmp_path / "other", "the other one")]
    expected = [program(plain_model(directory)) for directory in directories]
    assert all(expected)
    assert expected[0] != expected[1]
    # With what a load may be reserved beyond its prediction.
    batch = footprint(directories[0], device="cpu", batch_size=8)
    limit_bytes = batch.total_bytes * 5 // 4
    with ModelCache(ram=limit_bytes, max_models=1, variants=False) as cache:
        most: list[int] = []
        cache.subscribe(lambda _: most.append(len(cache.models())))
        shared = [model_of(cache, directory) for directory in directories]
        for _ in range(2):
            assert [program(model) for model in shared] == expected
        assert cache.stats().loads == 4

        def use(order: int) -> list[str]:
            mine = [model_of(cache, directory) for directory in directories][::order]
            return [program(model) for model in mine][::order]

        calls = [lambda order=order: use(order) for order in (1, -1) * 2]
        assert at_once(calls) == [expected] * 4
        gc.collect()
        settle(cache)
        cache._core.check()
        assert cache.stats().leases == 0
        assert max(most) == 1
        assert cache.devices()[0].peak_bytes <= limit_bytes


def test_threads_may_share_one_object() -> None:
    """
    As those of a web server do, each with calls of its own kind.
    """
    programs = [words, batched, by_itself, language]
    expected = [program(plain_model(micro())) for program in programs]
    with ModelCache(variants=False) as cache:
        model = model_of(cache, micro())
        calls = [lambda program=program: program(model) for program in programs]
        assert at_once(calls) == expected
        assert cache.stats().loads == 1
