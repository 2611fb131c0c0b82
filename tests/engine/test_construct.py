"""
The construction of models over altered globals, and the check that it still works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import faster_whisper
import pytest

from whispercache.engine import construct

if TYPE_CHECKING:
    import types
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    """
    Forgets, before and after, what was checked already.
    """
    construct._check_lookups.cache_clear()
    construct._swaps.cache_clear()
    yield
    construct._check_lookups.cache_clear()
    construct._swaps.cache_clear()


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
