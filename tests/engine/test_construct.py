"""
The construction of models over altered globals, and the check that it still works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

import ctranslate2
import faster_whisper
import pytest
from faster_whisper import transcribe as transcribing
from real import SILENCE, TEXT, clip, micro, model_of, text_of

from whispercache import ModelCache
from whispercache.engine import construct, process

if TYPE_CHECKING:
    import types
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    """
    Forgets, before and after, what was checked already.
    """
    cached = (construct._check_lookups, construct._swaps, construct.genuine)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def refactored(function: Callable[..., object]) -> types.FunctionType:
    """
    A function of faster-whisper that looks up other names than today.
    """

    def other() -> object:
        return None

    other.__module__, other.__qualname__ = function.__module__, function.__qualname__
    return other  # type: ignore[return-value]


def check() -> None:
    """
    The check of a model's construction, as each build makes it.
    """
    init = faster_whisper.WhisperModel.__init__
    construct._check_lookups((init,), ("tokenizers",), "tokenizers are not shared")
    construct._swaps()


def test_the_faster_whisper_that_is_installed_looks_all_of_it_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """
    So nothing is logged.
    """
    check()
    assert not caplog.records


def test_a_refactored_faster_whisper_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """
    With the names, and what that costs.
    """
    model, pipeline = (
        faster_whisper.WhisperModel,
        faster_whisper.BatchedInferencePipeline,
    )
    for kind, name in ((model, "__init__"), (pipeline, "transcribe")):
        monkeypatch.setattr(kind, name, refactored(getattr(kind, name)))
    for _ in range(2):
        check()
        construct._swaps.cache_clear()
    first, second = (record.getMessage() for record in caplog.records)
    assert "tokenizers in WhisperModel.__init__: tokenizers are not shared" in first
    assert "collect_chunks in BatchedInferencePipeline.transcribe" in second


def test_a_method_that_a_program_has_replaced_is_no_refactoring(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """
    It may call the original.
    """
    monkeypatch.setattr(faster_whisper.WhisperModel, "transcribe", lambda _: None)
    check()
    assert not caplog.records


REPLACED = [
    (faster_whisper, "WhisperModel"),
    (faster_whisper, "BatchedInferencePipeline"),
    (transcribing, "WhisperModel"),
    (transcribing, "BatchedInferencePipeline"),
    (ctranslate2.models, "Whisper"),
]


def test_classes_that_programs_replace_later_are_loaded_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Mocks of a test, in each place where the names are.
    """
    with ModelCache(variants=False) as cache:
        construct.genuine()
        process.whisper()
        for module, name in REPLACED:
            monkeypatch.setattr(module, name, mock.NonCallableMock())
        model: Any = model_of(cache, micro())
        assert text_of(model.transcribe(SILENCE)[0]) == TEXT
        assert text_of(model.transcribe(clip("en-bread"), batch_size=2)[0])
        with model.lease() as whisper:
            assert text_of(whisper.transcribe(SILENCE)[0]) == TEXT
        assert cache.stats().loads == 1


@pytest.mark.parametrize("module", [faster_whisper, transcribing])
def test_a_name_that_was_replaced_before_is_seen_through(
    monkeypatch: pytest.MonkeyPatch, module: types.ModuleType
) -> None:
    """
    As by programs that put `get_model` in faster-whisper's place, which would call
    itself for ever.
    """
    plain = faster_whisper.WhisperModel
    with ModelCache(variants=False) as cache:
        monkeypatch.setattr(module, "WhisperModel", cache.get_model)
        construct.genuine.cache_clear()
        assert construct.genuine().model is plain
        model = module.WhisperModel(micro(), "cpu", cpu_threads=1)
        assert text_of(model.transcribe(SILENCE)[0]) == TEXT


def test_classes_that_are_nowhere_are_missed_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    And the error says what to do.
    """
    construct.genuine.cache_clear()
    for module in (faster_whisper, transcribing):
        monkeypatch.setattr(module, "WhisperModel", mock.Mock())
    with pytest.raises(ImportError, match="WhisperModel was replaced before"):
        construct.genuine()
