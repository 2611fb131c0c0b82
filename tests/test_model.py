"""
CachedModel and AsyncCachedModel behave as the WhisperModel that they stand for.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import itertools
import threading
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from caches import cache_of
from faster_whisper import BatchedInferencePipeline, WhisperModel
from faster_whisper.tokenizer import Tokenizer
from jiwer import wer
from real import (
    FEATURES,
    SILENCE,
    TEXT,
    at_once,
    clip,
    decode_audio,
    micro,
    micro_copy,
    model_of,
    packaged,
    plain_model,
    reference,
    text_of,
)

from whispercache import AsyncModelCache, ModelCache, ModelKey, footprint
from whispercache.model import ATTRIBUTES
from whispercache.testing import settle

if TYPE_CHECKING:
    from faster_whisper.transcribe import TranscriptionInfo

    from whispercache import CachedModel

# Longer than a window of 30 s, so that segments come one after the other.
LONG = np.zeros(65 * 16_000, np.float32)

# One value for each parameter of `WhisperModel.transcribe` besides the audio.
PARAMETERS: dict[str, Any] = {
    "language": "en",
    "task": "translate",
    "log_progress": False,
    "beam_size": 2,
    "best_of": 2,
    "patience": 1.5,
    "length_penalty": 0.9,
    "repetition_penalty": 1.1,
    "no_repeat_ngram_size": 3,
    "temperature": [0.0],
    "compression_ratio_threshold": 3.0,
    "log_prob_threshold": -2.0,
    "no_speech_threshold": 0.9,
    "condition_on_previous_text": False,
    "prompt_reset_on_temperature": 0.4,
    "initial_prompt": "says",
    "prefix": " micro",
    "suppress_blank": False,
    "suppress_tokens": [],
    "without_timestamps": True,
    "max_initial_timestamp": 0.5,
    "word_timestamps": True,
    "prepend_punctuations": "(",
    "append_punctuations": ")",
    "multilingual": True,
    "vad_filter": True,
    "vad_parameters": {"threshold": 0.3},
    "max_new_tokens": 20,
    "chunk_length": 20,
    "clip_timestamps": [0.0, 1.0],
    "hallucination_silence_threshold": 2.0,
    "hotwords": "hello",
    "language_detection_threshold": 0.6,
    "language_detection_segments": 2,
}

cache = cache_of(variants=False)


def everything(result: tuple[Any, TranscriptionInfo]) -> tuple[list[Any], Any]:
    """
    Segments and info, to compare.
    """
    segments, info = result
    return [asdict(segment) for segment in segments], asdict(info)


class TestSameAsWhisperModel:
    """
    Results are those of the model without a cache.
    """

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"language": "en", "beam_size": 1},
            {"word_timestamps": True},
            {"without_timestamps": True, "task": "translate"},
            {"vad_filter": True},
            {"language": "de", "multilingual": True},
        ],
        ids=str,
    )
    @pytest.mark.parametrize(
        "audio", [SILENCE, clip("en-bread"), Path(clip("en-bread"))]
    )
    def test_a_micro_model_transcribes_the_same(
        self, cache: ModelCache, audio: Any, options: dict[str, Any]
    ) -> None:
        """
        Each segment, word and number.
        """
        samples = audio if audio is SILENCE else decode_audio(str(audio))
        expected = everything(plain_model(micro()).transcribe(samples, **options))
        got = everything(model_of(cache, micro()).transcribe(audio, **options))
        assert got == expected

    @pytest.mark.slow
    def test_a_real_model_transcribes_the_same(self, cache: ModelCache) -> None:
        """
        tiny.en, with word timestamps; and what it heard is right.
        """
        options: dict[str, Any] = {"beam_size": 1, "word_timestamps": True}
        plain = plain_model(packaged("tiny.en"))
        samples = decode_audio(clip("en-bread"))
        expected = everything(plain.transcribe(samples, **options))
        model = model_of(cache, packaged("tiny.en"))
        got = everything(model.transcribe(clip("en-bread"), **options))
        assert got == expected
        heard = "".join(segment["text"] for segment in got[0])
        assert wer(plain_words(reference("en-bread")), plain_words(heard)) < 0.3

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "language"), [("de-zug", "de"), ("es-casa", "es"), ("en-bread", "en")]
    )
    def test_a_multilingual_model_knows_the_language(
        self, cache: ModelCache, name: str, language: str
    ) -> None:
        """
        Base, with path and samples alike.
        """
        model = model_of(cache, packaged("base"), compute_type="int8")
        found, probability, others = model.detect_language(clip(name))
        assert (found, probability > 0.5) == (language, True)
        assert dict(others)[language] == probability
        assert model.detect_language(decode_audio(clip(name)))[0] == language

    @pytest.mark.parametrize("audio", [LONG, clip("en-two-voices")])
    def test_batches_are_those_of_the_pipeline(
        self, cache: ModelCache, audio: Any
    ) -> None:
        """
        With its own defaults, as `BatchedInferencePipeline` has them.
        """
        pipeline = BatchedInferencePipeline(plain_model(micro()))
        samples = audio if audio is LONG else decode_audio(audio)
        expected = everything(pipeline.transcribe(samples, batch_size=4))
        model = model_of(cache, micro())
        assert everything(model.transcribe(audio, batch_size=4)) == expected
        # No voice is found in silence.
        assert bool(expected[0]) is not (audio is LONG)

    def test_batches_of_two_threads_do_not_mix(self, cache: ModelCache) -> None:
        """
        A pipeline keeps state from call to call, so each call has its own.
        """
        model = model_of(cache, micro())
        stamps = [{"start": start, "end": start + 20} for start in (0, 20, 40)]
        options: dict[str, Any] = {"batch_size": 2, "clip_timestamps": stamps}

        def call() -> str:
            return text_of(model.transcribe(LONG, **options)[0])

        assert at_once([call] * 3) == [TEXT * 3] * 3

    def test_facts_are_the_same(self, cache: ModelCache) -> None:
        """
        What a model says of itself, whichever it is; but for Cantonese, which
        faster-whisper lists for models that have no token for it.
        """
        for english in (False, True):
            directory = micro(english=english)
            plain, model = plain_model(directory), model_of(cache, directory)
            assert model.is_multilingual is plain.model.is_multilingual
            listed = [code for code in plain.supported_languages if code != "yue"]
            assert model.supported_languages == listed


class TestSurface:
    """
    It has all that a WhisperModel has.
    """

    def test_every_public_attribute_is_there(self, cache: ModelCache) -> None:
        """
        tests/dropin has what they do.
        """
        plain, model = plain_model(micro()), model_of(cache, micro())
        public = {name for name in dir(plain) if not name.startswith("_")}
        assert {name for name in public if not hasattr(model, name)} == set()
        assert public <= set(dir(model))
        assert set(ATTRIBUTES) <= public

    @pytest.mark.parametrize(
        "name", ["max_length", "time_precision", "frames_per_second", "feat_kwargs"]
    )
    def test_values_are_those_of_the_model(self, cache: ModelCache, name: str) -> None:
        """
        Numbers that programs read.
        """
        assert getattr(model_of(cache, micro()), name) == getattr(
            plain_model(micro()), name
        )

    def test_methods_below_transcribe_work(self, cache: ModelCache) -> None:
        """
        Those that return something, and those that yield.
        """
        model: Any = model_of(cache, micro())
        encoded = model.encode(np.zeros((80, 3000), np.float32))
        assert list(encoded.shape) == [1, 1500, 32]
        tokenizer = Tokenizer(
            model.hf_tokenizer, multilingual=True, task="transcribe", language="en"
        )
        prompt = model.get_prompt(tokenizer, [], without_timestamps=True)
        assert prompt == [*tokenizer.sot_sequence, tokenizer.no_timestamps]
        assert cache.stats().leases == 0

    def test_the_ctranslate2_model_is_that_of_a_lease(self, cache: ModelCache) -> None:
        """
        Without one there is a view.
        """
        model: Any = model_of(cache, micro())
        with model.lease() as whisper:
            assert whisper.model.model_is_loaded
            assert type(model.model) is not type(whisper.model)

    def test_what_no_model_has_is_an_attribute_error(self, cache: ModelCache) -> None:
        """
        And loads nothing.
        """
        model: Any = model_of(cache, micro())
        with pytest.raises(AttributeError, match="no attribute 'transcripe'"):
            _ = model.transcripe
        assert cache.stats().requests == 0

    def test_the_parameters_tried_here_are_all_there_are(self) -> None:
        """
        A new faster-whisper may bring more.
        """
        signature = inspect.signature(WhisperModel.transcribe)
        assert {"self", "audio", *PARAMETERS} == set(signature.parameters)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", list(PARAMETERS))
    def test_every_parameter_of_transcribe_is_passed_on(
        self, cache: ModelCache, name: str
    ) -> None:
        """
        With the result that it has without a cache.
        """
        # Without samples, which are drawn at random.
        options: dict[str, Any] = {"language": "en", "beam_size": 1, "temperature": 0.0}
        options[name] = PARAMETERS[name]
        expected = everything(plain_model(micro()).transcribe(SILENCE, **options))
        got = everything(model_of(cache, micro()).transcribe(SILENCE, **options))
        assert got == expected

    def test_parameters_may_be_given_by_position(self, cache: ModelCache) -> None:
        """
        In faster-whisper's order, as old programs do.
        """
        arguments = ("en", "translate", False, 1)
        expected = everything(plain_model(micro()).transcribe(SILENCE, *arguments))
        got = everything(model_of(cache, micro()).transcribe(SILENCE, *arguments))
        assert got == expected

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"no_such_parameter": 1}, TypeError),
            ({"language": "xx"}, ValueError),
            ({"beam_size": 0, "language": "en"}, ValueError),
            ({"batch_size": 0}, ValueError),
            ({"batch_size": "two"}, TypeError),
        ],
        ids=str,
    )
    def test_a_call_that_fails_holds_nothing(
        self, cache: ModelCache, options: dict[str, Any], error: type[Exception]
    ) -> None:
        """
        The library's own error passes through, and the model may leave.
        """
        model = model_of(cache, micro())
        with pytest.raises(error):
            text_of(model.transcribe(SILENCE, **options)[0])
        assert cache.stats().leases == 0
        assert cache.evict() in (0, 1)
        assert text_of(model.transcribe(SILENCE)[0]) == TEXT


class TestSegments:
    """
    Lazy segments hold their model.
    """

    def test_the_model_is_held_until_the_last_segment(self, cache: ModelCache) -> None:
        """
        And not a moment longer.
        """
        segments, _ = model_of(cache, micro()).transcribe(LONG)
        for count, _ in enumerate(segments, 1):
            assert cache.stats().leases == 1, count
        assert count >= 3
        assert cache.stats().leases == 0

    @pytest.mark.slow
    @pytest.mark.parametrize("end", ["close", "with", "drop", "break"])
    def test_the_model_is_let_go_when_segments_end_early(
        self, cache: ModelCache, end: str
    ) -> None:
        """
        However that happens; after it they yield nothing more.
        """
        segments, _ = model_of(cache, micro()).transcribe(LONG)
        assert next(segments).text == TEXT
        assert cache.stats().leases == 1
        if end == "close":
            segments.close()
            assert list(segments) == []
        elif end == "with":
            with segments:
                pass
            assert list(segments) == []
        elif end == "drop":
            del segments
        else:
            for _ in segments:
                break
            del segments, _
        settle(cache)
        assert cache.stats().leases == 0

    def test_segments_that_are_passed_around_stay_valid(
        self, cache: ModelCache
    ) -> None:
        """
        The CachedModel itself may go.
        """
        segments, _ = model_of(cache, micro()).transcribe(LONG)
        gc.collect()
        assert text_of(segments) == TEXT * 3

    def test_segments_can_be_read_by_another_thread(self, cache: ModelCache) -> None:
        """
        Web frameworks iterate on another thread than they call.
        """
        segments, _ = model_of(cache, micro()).transcribe(LONG)
        assert at_once([lambda: text_of(segments)]) == [TEXT * 3]
        assert cache.stats().leases == 0

    def test_threads_that_share_segments_get_each_once(self, cache: ModelCache) -> None:
        """
        A plain generator would raise "already executing".
        """
        segments, _ = model_of(cache, micro()).transcribe(np.tile(LONG, 2))
        starts = at_once([lambda: [each.start for each in segments]] * 4)
        everywhere = sorted(itertools.chain.from_iterable(starts))
        assert everywhere == [0.0, 30.0, 60.0, 90.0, 120.0]


class TestComingAndGoing:
    """
    Models are evicted and reloaded under their CachedModels.
    """

    def test_an_evicted_model_comes_back_by_itself(self, cache: ModelCache) -> None:
        """
        At its next use.
        """
        model = model_of(cache, micro())
        for loads in (1, 2, 3):
            assert text_of(model.transcribe(SILENCE)[0]) == TEXT
            assert cache.evict(micro()) == 1
            assert cache.models() == ()
            assert cache.stats().loads == loads

    @pytest.mark.slow
    def test_ten_models_share_the_room_of_one(self, tmp_path: Path) -> None:
        """
        Each answers with its own text, and never are two in memory.
        """
        names = [f"model number {word}" for word in "abcdefghij"]
        directories = [micro_copy(tmp_path / name, name) for name in names]
        one = footprint(directories[0], device="cpu")
        limit_bytes = one.total_bytes + one.weights_bytes // 2
        with ModelCache(ram=limit_bytes) as cache:
            most: list[int] = []
            cache.subscribe(lambda _: most.append(len(cache.models())))
            models = [model_of(cache, directory) for directory in directories]
            for _ in range(2):
                for model, name in zip(models, names, strict=True):
                    assert text_of(model.transcribe(SILENCE)[0]) == f" {name}"
            assert max(most) == 1
            assert cache.stats().loads == 20
            assert cache.devices()[0].peak_bytes <= limit_bytes

    @pytest.mark.slow
    def test_ten_models_in_threads_share_the_room_of_two(self, tmp_path: Path) -> None:
        """
        Each thread has its own model; all get their turn.
        """
        names = [f"model number {word}" for word in "abcdefghij"]
        directories = [micro_copy(tmp_path / name, name) for name in names]
        limit_bytes = 2 * footprint(directories[0], device="cpu").total_bytes
        with ModelCache(ram=limit_bytes) as cache:

            def use(directory: Path) -> list[str]:
                model = model_of(cache, directory)
                return [text_of(model.transcribe(SILENCE)[0]) for _ in range(2)]

            texts = at_once([partial(use, directory) for directory in directories])
            assert texts == [[f" {name}"] * 2 for name in names]
            assert cache.devices()[0].peak_bytes <= limit_bytes

    @pytest.mark.slow
    def test_threads_share_one_model_while_it_is_evicted(
        self, cache: ModelCache
    ) -> None:
        """
        Nobody notices, but by the time it takes.
        """
        model = model_of(cache, micro())
        done = threading.Event()

        def use() -> set[str]:
            return {text_of(model.transcribe(SILENCE)[0]) for _ in range(8)}

        def evict() -> int:
            evicted = 0
            while not done.is_set():
                evicted += cache.evict()
            return evicted

        evictions: list[int] = []
        thread = threading.Thread(target=lambda: evictions.append(evict()))
        thread.start()
        try:
            assert at_once([use] * 4) == [{TEXT}] * 4
        finally:
            done.set()
            thread.join()
        assert evictions[0] > 0

    def test_a_thread_holds_two_models_at_once(
        self, cache: ModelCache, tmp_path: Path
    ) -> None:
        """
        Segments of two models are read in turns.
        """
        other = model_of(cache, micro_copy(tmp_path / "other", "the other one"))
        pairs = zip(
            model_of(cache, micro()).transcribe(LONG)[0],
            other.transcribe(LONG)[0],
            strict=True,
        )
        texts = [(one.text, two.text) for one, two in pairs]
        assert texts == [(TEXT, " the other one")] * 3


class TestAsync:
    """
    AsyncCachedModel, on real models.
    """

    def test_results_are_those_of_the_plain_model(self) -> None:
        """
        Segments, info and language.
        """

        async def run() -> tuple[list[Any], Any, Any]:
            async with AsyncModelCache() as cache:
                model = await cache.get_model(micro(), "cpu", cpu_threads=1)
                segments, info = await model.transcribe(clip("en-bread"))
                found = [asdict(segment) async for segment in segments]
                return found, asdict(info), await model.detect_language(SILENCE)

        plain = plain_model(micro())
        expected = everything(plain.transcribe(decode_audio(clip("en-bread"))))
        assert asyncio.run(run()) == (*expected, plain.detect_language(SILENCE))

    def test_tasks_share_one_load(self) -> None:
        """
        However many start at the same time.
        """

        async def run() -> tuple[list[str], int]:
            async with AsyncModelCache() as cache:
                model = await cache.get_model(micro(), "cpu", cpu_threads=1)

                async def use() -> str:
                    segments, _ = await model.transcribe(SILENCE)
                    return "".join([segment.text async for segment in segments])

                texts = await asyncio.gather(*[use() for _ in range(8)])
                return texts, cache.stats().loads

        assert asyncio.run(run()) == ([TEXT] * 8, 1)

    def test_a_task_that_leaves_lets_the_model_go(self) -> None:
        """
        Closed segments, and a task cancelled in the middle.
        """

        async def run() -> None:
            async with AsyncModelCache() as cache:
                model = await cache.get_model(micro(), "cpu", cpu_threads=1)
                segments, _ = await model.transcribe(LONG)
                async with segments:
                    assert (await anext_of(segments)).text == TEXT
                assert cache.stats().leases == 0
                first = asyncio.Event()

                async def use() -> None:
                    segments, _ = await model.transcribe(np.tile(LONG, 4))
                    async for _ in segments:
                        first.set()

                task = asyncio.create_task(use())
                await first.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                del task
                gc.collect()
                assert await cache.evict(timeout_s=30) == 1

        asyncio.run(run())

    def test_tasks_and_threads_share_the_model(self) -> None:
        """
        It is loaded once for both.
        """

        async def run() -> int:
            async with AsyncModelCache() as cache:
                model = await cache.get_model(micro(), "cpu", cpu_threads=1)
                segments, _ = await model.transcribe(SILENCE)
                assert [segment.text async for segment in segments] == [TEXT]
                blocking = model_of(cache.cache, micro())
                heard = await asyncio.to_thread(
                    lambda: text_of(blocking.transcribe(SILENCE)[0])
                )
                assert heard == TEXT
                assert blocking.key == model.key
                return cache.stats().loads

        assert asyncio.run(run()) == 1


async def anext_of(segments: Any) -> Any:
    """
    The next segment; Python 3.10's anext() is not known to all type checkers.
    """
    return await segments.__anext__()


def plain_words(text: str) -> str:
    """
    Words without capitals and punctuation.
    """
    kept = (char for char in text.lower() if char.isalnum() or char.isspace())
    return " ".join("".join(kept).split())


def test_a_key_tells_the_model_apart(cache: ModelCache) -> None:
    """
    Which weights, where, and in what type.
    """
    model: CachedModel = model_of(cache, packaged("tiny.en"), compute_type="int8")
    options = (("cpu_threads", 1),)
    expected = ModelKey(str(packaged("tiny.en")), "cpu", "int8_float32", options)
    assert model.key == expected
    assert repr(model) == f"<CachedModel {expected}>"


def test_features_can_be_given_for_detection(cache: ModelCache) -> None:
    """
    Instead of audio, as `WhisperModel.detect_language` allows.
    """
    features = np.pad(FEATURES, ((0, 0), (0, 2900)))
    expected = plain_model(micro()).detect_language(features=features)
    assert model_of(cache, micro()).detect_language(features=features) == expected
