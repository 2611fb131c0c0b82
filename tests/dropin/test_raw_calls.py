"""
Calls on CTranslate2's part of a cached model, each with a lease of its own.
"""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Any

import ctranslate2
import numpy as np
import pytest
from faster_whisper.audio import pad_or_trim
from faster_whisper.tokenizer import Tokenizer
from real import (
    MIB,
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
    text_of,
)

from whispercache import ModelCache, footprint
from whispercache.devices.faults import Fault
from whispercache.testing import settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

OTHER = " the other one"


@pytest.fixture
def cache() -> Iterator[ModelCache]:
    """
    A cache with real models, of which one is in memory at a time.
    """
    with ModelCache(variants=False, max_models=1) as made:
        yield made
        gc.collect()
        settle(made)
        made._core.check()
        assert made.stats().leases == 0
        assert not made._core.state.spared


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """
    The directory of another model.
    """
    return micro_copy(tmp_path / "other", OTHER.strip())


def nothing() -> None:
    """
    Happens between two calls.
    """


def said(
    model: Any, audio: Any = SILENCE, between: Callable[[], object] = nothing
) -> str:
    """
    What a program that calls encode and generate by itself hears.
    """
    tokenizer = Tokenizer(
        model.hf_tokenizer,
        model.model.is_multilingual,
        task="transcribe",
        language="en",
    )
    prompt = model.get_prompt(tokenizer, [], without_timestamps=True)
    encoded = model.encode(pad_or_trim(model.feature_extractor(audio)))
    between()
    (result,) = model.model.generate(encoded, [prompt], beam_size=5)
    return str(tokenizer.decode(result.sequences_ids[0]))


# One by one ---------------------------------------------------------------------------


def test_each_call_has_a_lease_of_its_own(cache: ModelCache) -> None:
    """
    And answers what CTranslate2 does, by position and by name.
    """
    plain, model = plain_model(micro()).model, model_of(cache, micro()).model
    found: list[Any] = []
    for each in (plain, model):
        features = ctranslate2.StorageView.from_array(np.zeros((2, 80, 3000), "f4"))
        encoded = each.encode(features, to_cpu=True)
        start = "<|startoftranscript|>"
        texts = each.generate(
            encoded, [[start, "<|en|>", "<|transcribe|>"]] * 2, num_hypotheses=2
        )
        languages = each.detect_language(features=encoded)
        (sot,) = texts[0].sequences_ids[0][:1]
        aligned = each.align(encoded, [sot], [[sot], [sot]], [100, 200])
        found.append(
            (
                np.array(encoded).tolist(),
                [text.sequences for text in texts],
                languages,
                [each.alignments for each in aligned],
            )
        )
    assert found[0] == found[1]
    assert (cache.stats().requests, cache.stats().loads) == (4, 1)
    assert cache.stats().leases == 0


def test_a_call_reserves_its_own_work(cache: ModelCache) -> None:
    """
    As many windows, beams and samples as it names.
    """
    model = model_of(cache, micro()).model
    peaks = []
    for windows in (1, 8):
        encoded = model.encode(
            ctranslate2.StorageView.from_array(np.zeros((windows, 80, 3000), "f4"))
        )
        for options in ({"beam_size": 1}, {"num_hypotheses": 5, "beam_size": 1}):
            start = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>"]
            model.generate(encoded, [start] * windows, sampling_topk=0, **options)
        (entry,) = cache._core.entries.values()
        peaks.append(max(each.workspace_bytes for each in entry.footprints.values()))
        assert any(each.batch_size == windows for each in entry.footprints)
        assert any(each.best_of == 5 and each.fallback for each in entry.footprints)
    assert peaks[1] > peaks[0]


def test_an_asynchronous_call_is_over_when_it_returns(cache: ModelCache) -> None:
    """
    So that no work goes on without a lease.
    """
    model = model_of(cache, micro()).model
    features = ctranslate2.StorageView.from_array(np.zeros((1, 80, 3000), "f4"))
    start = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>"]
    (expected,) = model.generate(features, [start])
    (found,) = model.generate(features, [start], asynchronous=True)
    assert cache.evict() == 1
    assert found.done()
    assert found.result().sequences == expected.sequences


def test_a_call_that_fails_holds_nothing(cache: ModelCache) -> None:
    """
    CTranslate2's own error comes out.
    """
    model: Any = model_of(cache, micro()).model
    features = ctranslate2.StorageView.from_array(np.zeros((1, 80, 3000), "f4"))
    start = ["<|startoftranscript|>"]
    for prompts, options in (
        ([["no such token"]], {}),
        ([start], {"beam_size": 0}),
        ([start], {"no_such_option": 1}),
    ):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            model.generate(features, prompts, **options)
        assert cache.stats().leases == 0
    with pytest.raises(TypeError):
        model.encode("nothing")
    assert cache.stats().leases == 0


def test_a_call_that_runs_out_of_memory_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Once idle models have left.
    """
    with ModelCache(variants=False) as cache:
        idle = model_of(cache, micro_copy(tmp_path / "idle"))
        idle.lease().release()
        model: Any = model_of(cache, micro())
        tries: list[str] = []

        def failing(*_: Any) -> str:
            tries.append("")
            if len(tries) == 1:
                raise RuntimeError("CUDA failed with error out of memory")
            return "detected"

        monkeypatch.setattr("whispercache.dropin.whisper._method", lambda *_: failing)
        monkeypatch.setattr(
            "whispercache.core.unloads.classify", lambda _: Fault.OUT_OF_MEMORY
        )
        assert model.model.detect_language("features") == "detected"
        assert len(tries) == 2
        assert [info.key for info in cache.models()] == [model.key]


def test_batches_are_counted_while_the_model_is_there(cache: ModelCache) -> None:
    """
    And none is where it is not.
    """
    model = model_of(cache, micro()).model
    assert (model.num_active_batches, model.num_queued_batches) == (0, 0)
    model.load_model()
    assert (model.num_active_batches, model.num_queued_batches) == (0, 0)


# Coming and going ---------------------------------------------------------------------


@pytest.fixture
def _no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    What is waited for is no time that passes.
    """
    monkeypatch.setattr("whispercache.core.entries.SPARED_S", 3600.0)


@pytest.mark.usefixtures("_no_time")
def test_a_model_may_leave_between_two_calls(cache: ModelCache, other: Path) -> None:
    """
    Evicted by name, or because its own program wants another one, and waits for nobody.
    """
    model: Any = model_of(cache, micro())
    assert said(model) == TEXT
    assert said(model, between=lambda: cache.evict(micro())) == TEXT
    second: Any = model_of(cache, other)
    assert said(model, between=lambda: text_of(second.transcribe(SILENCE)[0])) == TEXT
    assert cache.stats().loads == 4


def test_an_output_that_is_kept_holds_nothing(cache: ModelCache, other: Path) -> None:
    """
    Its own thread has another model at once, and other threads soon.
    """
    model: Any = model_of(cache, micro())
    second: Any = model_of(cache, other)
    features = pad_or_trim(model.feature_extractor(SILENCE))
    kept = model.encode(features)
    assert said(second) == OTHER
    again = model.encode(features)
    assert at_once([lambda: said(second)]) == [OTHER]
    assert cache.evict() == 1
    assert np.array_equal(np.array(kept), np.array(again))


@pytest.mark.usefixtures("_no_time")
@pytest.mark.parametrize("keep_alive", ["5m", 0])
def test_two_threads_with_two_models_take_turns(
    other: Path, keep_alive: float | str
) -> None:
    """
    With room for one, each transcription of an encode and a generate is one load. The
    turn of one ends with its output.
    """
    with ModelCache(variants=False, max_models=1, keep_alive=keep_alive) as cache:
        models: list[Any] = [model_of(cache, micro()), model_of(cache, other)]

        def use(model: Any) -> list[str]:
            return [said(model) for _ in range(4)]

        texts = at_once([lambda model=each: use(model) for each in models])  # type: ignore[misc]
        assert texts == [[TEXT] * 4, [OTHER] * 4]
        assert cache.stats().loads <= 8
        assert cache.stats().leases == 0


def test_a_spared_model_leaves_for_who_is_impatient(other: Path) -> None:
    """
    A thread that goes on and on does not keep others out.
    """
    with ModelCache(variants=False, max_models=1, patience_s=0.2) as cache:
        model: Any = model_of(cache, micro())
        features = pad_or_trim(model.feature_extractor(SILENCE))
        done = threading.Event()

        def go_on() -> None:
            kept = model.encode(features)
            while not done.is_set():
                kept = model.encode(features)
            del kept

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            second: Any = model_of(cache, other, timeout_s=20)
            assert text_of(second.transcribe(SILENCE)[0]) == OTHER
        finally:
            done.set()
            thread.join()


def test_unloading_is_a_hint_and_loading_a_preload(cache: ModelCache) -> None:
    """
    A model that others use stays; the next call loads it in any case.
    """
    model: Any = model_of(cache, micro())
    model.model.load_model(keep_cache=True)
    assert cache.stats().loads == 1
    with model.lease():
        model.model.unload_model()
    assert model.model.model_is_loaded
    model.model.unload_model(to_cpu=True)
    assert model.model.model_is_loaded
    model.model.unload_model()
    settle(cache)
    assert not model.model.model_is_loaded
    model.model.unload_model()
    cache.pin(micro(), "cpu", cpu_threads=1)
    model.model.unload_model()
    assert said(model) == TEXT
    assert cache.stats().loads == 2


def test_no_reference_to_the_model_escapes(cache: ModelCache) -> None:
    """
    What a program keeps of a view works after the model left, and keeps nothing of it.
    """
    model: Any = model_of(cache, micro())
    kept = model.model
    methods = [kept.encode, kept.generate, kept.detect_language]
    features = pad_or_trim(model.feature_extractor(SILENCE))
    output = model.encode(features)
    reached = [model, kept, *methods, *vars(kept).values(), *vars(model).values()]
    raw = [
        each
        for seen in reached
        for each in [seen, *gc.get_referents(seen)]
        if isinstance(each, ctranslate2.models.Whisper)
    ]
    assert not raw
    cache.evict()
    assert methods[2](output)[0][0][0] == "<|en|>"


def test_threads_that_hammer_a_model_that_is_evicted_crash_nothing(
    cache: ModelCache,
) -> None:
    """
    A model without leases would end the process here.
    """
    model: Any = model_of(cache, micro())
    expected = said(model)
    done = threading.Event()

    def evict() -> int:
        evicted = 0
        while not done.is_set():
            evicted += cache.evict()
        return evicted

    def use() -> int:
        try:
            facts = {(model.model.n_mels, model.model.compute_type) for _ in range(50)}
            texts = {said(model) for _ in range(10)}
            assert texts == {expected}
            assert len(facts) == 1
        finally:
            done.set()
        return 1

    assert at_once([evict, use, use, use])[0] > 0


# Fallbacks ----------------------------------------------------------------------------


def test_calls_stay_with_the_model_of_the_first() -> None:
    """
    What was encoded by a fallback is decoded by it, though the one that was asked for
    can be had again.
    """
    directory = packaged("base")
    too_little = footprint(directory, "int8", "cpu").total_bytes + 30 * MIB
    with ModelCache(variants=False, ram=too_little) as cache:
        model: Any = model_of(
            cache, directory, compute_type="float32", fallback=["int8"]
        )
        audio = decode_audio(clip("en-bread"))
        assert model.model.compute_type == "float32"

        def grow() -> None:
            assert model.served_by.compute_type == "int8_float32"
            assert model.model.compute_type == "int8_float32"
            cache.resize(ram="4GiB")

        expected = said(plain_model(directory, compute_type="int8"), audio)
        assert said(model, audio, grow) == expected
        assert [i.key.compute_type for i in cache.models()] == ["int8_float32"]
        # Whole calls go on by themselves.
        text_of(model.transcribe(SILENCE)[0])
        assert model.served_by.compute_type == "float32"
        assert said(model, audio) == expected
        assert model.served_by.compute_type == "int8_float32"
