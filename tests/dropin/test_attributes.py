"""
A cached model is a WhisperModel to whatever looks at it, and to look loads nothing.
"""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
from typing import TYPE_CHECKING, Any

import ctranslate2
import numpy as np
import pytest
from caches import cache_of
from faster_whisper import BatchedInferencePipeline, WhisperModel
from faster_whisper import transcribe as transcribing
from real import SILENCE, TEXT, micro, micro_copy, model_of, plain_model, text_of

from whispercache import AsyncModelCache, CachedModel, ModelCache
from whispercache.engine.facts import facts_of
from whispercache.engine.files import ModelFiles
from whispercache.engine.sizes.architecture import ARCHITECTURES
from whispercache.model import ATTRIBUTES

if TYPE_CHECKING:
    from pathlib import Path

cache = cache_of(variants=False, max_models=1)


def looked_up(kind: type, *path: str) -> set[str]:
    """
    The names that faster-whisper looks up behind ``self.path`` in a class.
    """
    tree = ast.parse(inspect.getsource(transcribing))
    (found,) = (
        each
        for each in tree.body
        if isinstance(each, ast.ClassDef) and each.name == kind.__name__
    )
    chain = ".".join(("self", *path))
    return {
        each.attr
        for each in ast.walk(found)
        if isinstance(each, ast.Attribute) and ast.unparse(each.value) == chain
    }


def test_all_that_faster_whisper_looks_up_is_there(cache: ModelCache) -> None:
    """
    On the model and on CTranslate2's part of it, by its own methods and the pipeline's.
    """
    model: Any = model_of(cache, micro())
    own = looked_up(WhisperModel) | looked_up(BatchedInferencePipeline, "model")
    raw = looked_up(WhisperModel, "model")
    raw |= looked_up(BatchedInferencePipeline, "model", "model")
    # The test finds what it looks for.
    assert {"encode", "hf_tokenizer", "_get_feature_kwargs", "model"} <= own
    assert {"generate", "align", "is_multilingual", "n_mels", "device"} <= raw
    for name in own:
        assert hasattr(model, name), name
    for name in raw:
        assert hasattr(model.model, name), name
    assert cache.stats().requests == 0


def test_all_that_a_plain_one_has_is_there(cache: ModelCache) -> None:
    """
    Of the same types, values and signatures, private methods included.
    """
    plain: Any = plain_model(micro())
    model: Any = model_of(cache, micro())
    assert set(vars(plain)) == {*ATTRIBUTES, "model"}
    assert set(dir(plain)) <= set(dir(model))
    for name in dir(plain):
        theirs, ours = getattr(plain, name), getattr(model, name)
        if name in ("feature_extractor", "model", "supported_languages"):
            continue
        if not name.startswith("__"):
            assert type(ours) is type(theirs), name
        if inspect.ismethod(theirs):
            assert inspect.signature(ours) == inspect.signature(theirs), name
    for name in set(vars(plain)) - {"model", "feature_extractor", "hf_tokenizer"}:
        assert getattr(model, name) == getattr(plain, name), name
    assert cache.stats().requests == 0


@pytest.mark.parametrize("english", [False, True])
def test_ctranslate2_s_part_has_the_same_facts(
    cache: ModelCache, *, english: bool
) -> None:
    """
    Each that CTranslate2 tells, though nothing is loaded.
    """
    plain = plain_model(micro(english=english), compute_type="int8").model
    ours = model_of(cache, micro(english=english), compute_type="int8").model
    public = {name for name in dir(plain) if not name.startswith("_")}
    assert public <= set(dir(ours))
    facts = {name for name in public if not callable(getattr(plain, name))}
    assert {"n_mels", "num_languages", "device_index", "num_workers"} <= facts
    for name in facts - {"model_is_loaded"}:
        assert getattr(ours, name) == getattr(plain, name), name
        assert type(getattr(ours, name)) is type(getattr(plain, name)), name
    assert (ours.model_is_loaded, cache.stats().requests) == (False, 0)
    ours.load_model()
    assert (ours.model_is_loaded, cache.stats().loads) == (True, 1)
    with pytest.raises(AttributeError):
        _ = ours.translate


def test_facts_of_a_known_size_need_no_files() -> None:
    """
    Those of models that were never downloaded.
    """

    def known(size: str) -> tuple[bool, int, int]:
        facts = facts_of(ModelFiles("", "float16", source=ARCHITECTURES[size]))
        return facts.is_multilingual, facts.n_mels, facts.num_languages

    assert known("tiny.en") == (False, 80, 99)
    assert known("large-v2") == (True, 80, 99)
    assert known("large-v3") == (True, 128, 100)


def test_it_is_one_by_its_class(cache: ModelCache) -> None:
    """
    For ``isinstance``, and for programs that ask for the module of a class.
    """
    model, other = model_of(cache, micro()), model_of(cache, micro())
    for kind in (WhisperModel, CachedModel):
        assert isinstance(model, kind)
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        assert getattr(type(model), name) == getattr(WhisperModel, name)
    assert type(model) is type(other)
    assert model is not other
    assert repr(model) == f"<CachedModel {model.key}>"
    assert repr(model.model) == f"<LeasedWhisper {model.key}>"


def test_reading_another_model_s_attributes_loads_nothing(
    cache: ModelCache, tmp_path: Path
) -> None:
    """
    With room for one, and in the middle of a call on the one that is there.
    """
    model = model_of(cache, micro())
    other: Any = model_of(cache, micro_copy(tmp_path / "other", "the other one"))
    segments, _ = model.transcribe(np.zeros(65 * 16_000, np.float32))
    for _ in segments:
        seen = [getattr(other, name) for name in ATTRIBUTES]
        assert other.supported_languages == model.supported_languages
        assert other.is_multilingual
    assert len(seen) == len(ATTRIBUTES)
    assert (cache.stats().loads, cache.stats().evictions) == (1, 0)
    assert text_of(other.transcribe(SILENCE)[0]) == " the other one"


def test_equal_tokenizers_are_one(cache: ModelCache, tmp_path: Path) -> None:
    """
    Of two objects, of another model with the same file, and of the loaded model.
    """
    model: Any = model_of(cache, micro())
    copied: Any = model_of(cache, micro_copy(tmp_path / "copy"))
    assert model.hf_tokenizer is model.hf_tokenizer is copied.hf_tokenizer
    with model.lease() as whisper:
        assert whisper.hf_tokenizer is model.hf_tokenizer


def test_a_call_keeps_no_tokenizer_on_the_object(cache: ModelCache) -> None:
    """
    It belongs to the model in memory, and would not be given back with it.
    """
    model: Any = model_of(cache, micro())
    assert text_of(model.transcribe(SILENCE, word_timestamps=True)[0]) == TEXT
    assert "hf_tokenizer" not in vars(model)


def test_what_is_not_there_is_missed_as_on_a_plain_one(cache: ModelCache) -> None:
    """
    And nothing is made for it.
    """
    model: Any = model_of(cache, micro())
    plain: Any = plain_model(micro())
    messages = []
    for each in (plain, model):
        with pytest.raises(AttributeError) as caught:
            _ = each.transcripe
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "feature_extractor" not in vars(model)


def test_a_copy_has_settings_of_its_own(cache: ModelCache) -> None:
    """
    Shallow or deep; other processes get none.
    """
    model: Any = model_of(cache, micro())
    model.max_length = 300
    for other in (copy.copy(model), copy.deepcopy(model)):
        other.max_length = 200
        assert (model.max_length, other.max_length) == (300, 200)
        assert other.key == model.key
        assert text_of(other.transcribe(SILENCE)[0]) == TEXT
        assert other.served_by == other.key
    assert model.served_by is None
    for each in (model, model.model):
        with pytest.raises(TypeError, match=r"get_model\(\) in the other process"):
            pickle.dumps(each)
    assert repr(copy.copy(model.model)) == repr(copy.deepcopy(model.model))


def test_models_of_a_plain_program_are_left_alone(cache: ModelCache) -> None:
    """
    Though faster-whisper's pipeline asks whose model it has.
    """
    model_of(cache, micro())
    plain = plain_model(micro())
    assert type(plain) is WhisperModel
    assert isinstance(plain.model, ctranslate2.models.Whisper)
    pipeline = BatchedInferencePipeline(plain)
    stamps = [{"start": 0, "end": 1}]
    segments, _ = pipeline.transcribe(SILENCE, clip_timestamps=stamps)
    assert inspect.isgenerator(segments)
    assert text_of(segments) == TEXT
    assert cache.stats().requests == 0
    # The class of a cached one makes plain ones.
    kind: Any = type(model_of(cache, micro()))
    assert type(kind(str(micro()), "cpu")) is WhisperModel
    # Nor does each new model add a layer to it.
    before = BatchedInferencePipeline.transcribe
    model_of(cache, micro())
    assert BatchedInferencePipeline.transcribe is before
    assert len(inspect.signature(before).parameters) > 20


def test_the_awaited_model_is_what_it_was(cache: ModelCache) -> None:
    """
    Its calls are coroutines, so it is no WhisperModel.
    """
    import asyncio

    async def made() -> object:
        return await AsyncModelCache(cache).get_model(micro(), "cpu")

    assert not isinstance(asyncio.run(made()), WhisperModel)
