"""
What programs do with models of their own, done with leased ones: those that they make
by themselves once `install` was called, and those of `get_model`.
"""

from __future__ import annotations

import copy
import gc
import json
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from caches import installed_cache
from faster_whisper import BatchedInferencePipeline, WhisperModel
from real import SILENCE, TEXT, at_once, child, micro, model_of, plain_model, text_of

from whispercache import ModelCache, installed

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[[], Any]

LONG = np.zeros(65 * 16_000, np.float32)
SECOND = [{"start": 0, "end": 1}]


class Program(WhisperModel):  # type: ignore[misc]
    """
    A subclass with a constructor, results and threads of its own.
    """

    def __init__(self, name: Any, *, beam_size: int = 1) -> None:
        self.beam_size, self.n_encoded = beam_size, 0
        super().__init__(str(name), device="cpu", cpu_threads=1)
        self.suffix = "" if self.model.is_multilingual else ".en"
        self.n_tokens = self.hf_tokenizer.get_vocab_size()

    def transcribe(self, audio: Any, **options: Any) -> Any:
        """
        Return a list, as of old.
        """
        segments, info = super().transcribe(audio, beam_size=self.beam_size, **options)
        return list(segments), info

    def encode(self, features: Any) -> Any:
        """
        Encode elsewhere.
        """
        self.n_encoded += 1
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(super().encode, features).result()


cache = installed_cache()


@pytest.fixture(params=["installed", "get_model"])
def make(cache: ModelCache, request: pytest.FixtureRequest) -> Make:
    """
    A new object, of either kind.
    """

    def made() -> Any:
        if request.param == "get_model":
            return model_of(cache, micro())
        with installed(cache):
            return WhisperModel(str(micro()), "cpu", cpu_threads=1)

    return made


def test_a_subclass_with_a_constructor_of_its_own(cache: ModelCache) -> None:
    """
    It looks at the model before anything is loaded, and pipelines run over it.
    """
    with installed(cache):
        model = Program(micro(), beam_size=2)
    assert cache.stats().requests == 0
    assert (model.suffix, model.n_tokens) == ("", plain_tokens())
    segments, _ = model.transcribe(SILENCE)
    assert (type(segments), text_of(segments)) == (list, TEXT)
    pipeline = BatchedInferencePipeline(model)
    assert text_of(pipeline.transcribe(SILENCE, clip_timestamps=SECOND)[0]) == TEXT
    # What it encoded elsewhere took leases of its own, beside those of the calls.
    assert model.n_encoded > 0
    assert (cache.stats().loads, cache.stats().requests) == (1, 2 + model.n_encoded)


def plain_tokens() -> int:
    """
    Tokens of a plain model.
    """
    tokenizer: Any = plain_model(micro()).hf_tokenizer
    return int(tokenizer.get_vocab_size())


def test_segments_that_are_dropped_let_the_model_go(
    cache: ModelCache, make: Make
) -> None:
    """
    Before the first, or after it; the object itself may be gone long before.
    """
    for n_heard in (0, 1):
        model = make()
        segments, _ = model.transcribe(LONG)
        for _ in range(n_heard):
            next(segments)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert cache.stats().leases == 1
        del segments
        gc.collect()
        assert gone() is None
        assert cache.stats().leases == 0


def test_segments_outlive_the_thread_that_asked_for_them(
    cache: ModelCache, make: Make
) -> None:
    """
    Another one goes on.
    """
    model, box = make(), []

    def begin() -> None:
        segments, _ = model.transcribe(LONG)
        box.append((next(segments), segments))

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join(60)
    ((first, rest),) = box
    assert cache.stats().leases == 1
    assert text_of([first, *rest]) == TEXT * 3


def test_calls_within_a_loop_over_segments(cache: ModelCache, make: Make) -> None:
    """
    On the same object, and on another one of that model.
    """
    model, other = make(), make()
    seen = [
        (text_of(each.transcribe(SILENCE)[0]), each.detect_language(SILENCE)[0])
        for _ in model.transcribe(LONG)[0]
        for each in (model, other)
    ]
    assert seen == [(TEXT, "en")] * 6
    assert cache.stats().loads == 1


def test_copies_are_models_of_their_own(make: Make) -> None:
    """
    Pickled they are not, as plain ones.
    """
    model = make()
    for other in (copy.copy(model), copy.deepcopy(model)):
        other.max_length = 200
        assert model.max_length == 448
        assert text_of(other.transcribe(SILENCE)[0]) == TEXT
    for each in (model, plain_model(micro())):
        with pytest.raises(TypeError):
            pickle.dumps(each)


def test_probes_find_what_they_find_on_a_plain_one(make: Make) -> None:
    """
    Programs tell kinds of models apart by what they have; and an object is true, equal
    to itself alone, and has one model.
    """
    model, plain = make(), plain_model(micro())
    names = (
        *("generate", "to", "eval", "config", "device", "dims", "decode", "__len__"),
        *("encode", "transcribe", "feature_extractor", "hf_tokenizer", "__call__"),
    )
    for name in names:
        assert hasattr(model, name) is hasattr(plain, name), name
    assert bool(model)
    assert model.model is model.model
    assert model.feature_extractor is model.feature_extractor
    assert {model: 1}[model] == 1
    assert model != make()
    assert weakref.ref(model)() is model


def test_threads_meet_at_an_object_s_first_use(cache: ModelCache, make: Make) -> None:
    """
    What is made then is made once.
    """
    model = make()
    found = at_once([lambda: model.feature_extractor] * 4)
    assert len({id(each) for each in found}) == 1
    calls = [lambda: text_of(model.transcribe(SILENCE)[0])] * 4
    assert at_once(calls) == [TEXT] * 4
    assert cache.stats().loads == 1


@pytest.mark.process
def test_forked_children_use_it_only_before_a_load() -> None:
    """
    Where a plain model, which is loaded when it is made, would hang for ever.
    """
    done = child(
        """
import json
from faster_whisper import WhisperModel
from whispercache import install
from children import in_child
from real import SILENCE, micro, text_of

install(variants=False)
model = WhisperModel(str(micro()), "cpu", cpu_threads=1)

def heard():
    return text_of(model.transcribe(SILENCE)[0])

print(json.dumps([in_child(heard), heard(), in_child(heard)]))
""",
        covered=False,
    )
    assert done.returncode == 0, done.stderr
    before, here, after = json.loads(done.stdout)
    assert before == here == TEXT
    assert after.startswith("CacheForked: models were loaded")
