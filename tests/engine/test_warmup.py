"""
The warm-up: it uses all that a transcription uses, and leaves nothing behind.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import ctranslate2
import numpy as np
import psutil
import pytest
from real import clip, micro, packaged, plain_model, text_of

from whispercache.engine import process, warmup
from whispercache.engine.warmup import run_micro_model, silent_window
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from ctranslate2.models import Whisper

_PLAIN = ctranslate2.models.Whisper
MISSING = "Library libcublas.so.12 is not found or cannot be loaded"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """
    Where temporary files go; nothing is in it.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


class Watched:
    """
    A model that notes what is asked of it, and fails where it is told to.
    """

    def __init__(self, failing: str, *arguments: Any, **options: Any) -> None:
        self.model: Whisper = _PLAIN(*arguments, **options)
        self.options = options
        self.asked: set[str] = set()
        self._failing = failing

    def __getattr__(self, name: str) -> object:
        self.asked.add(name)
        if name == self._failing:
            raise RuntimeError(MISSING)
        return getattr(self.model, name)


class Watch(Protocol):
    """
    Lets all models be watched from then on, and returns the list that they come to.
    """

    def __call__(self, failing: str = "") -> list[Watched]:
        """
        *failing* is the method that fails.
        """


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """
    Watches CTranslate2's models.
    """

    def watched(failing: str = "") -> list[Watched]:
        models: list[Watched] = []

        def construct(*arguments: Any, **options: Any) -> Watched:
            models.append(Watched(failing, *arguments, **options))
            return models[-1]

        # The first for models without a cache.
        monkeypatch.setattr(ctranslate2.models, "Whisper", construct)
        monkeypatch.setattr(process, "whisper", lambda: construct)
        return models

    return watched


@pytest.mark.parametrize(
    "compute_type", sorted(ctranslate2.get_supported_compute_types("cpu"))
)
def test_a_device_is_primed_in_each_compute_type(
    compute_type: str, temporary: Path, watch: Watch
) -> None:
    """
    The micro model computes as it was told to, and its weights and files are gone then.
    """
    models = watch()
    run_micro_model(ctranslate2, "cpu", 0, compute_type)
    (micro_model,) = models
    assert micro_model.options["compute_type"] == compute_type
    assert not micro_model.model.model_is_loaded
    assert list(temporary.iterdir()) == []


def test_the_warm_up_asks_for_all_that_a_transcription_does(watch: Watch) -> None:
    """
    Whatever faster-whisper runs of a model, with word timestamps, the warm-up ran, too.
    """
    models = watch()
    run_micro_model(ctranslate2, "cpu", 0, "float32")
    whisper = plain_model(micro())
    segments, _ = whisper.transcribe(clip("en-bread"), word_timestamps=True)
    assert text_of(segments)
    primed, used = (model.asked for model in models)
    methods = {name for name in used if callable(getattr(_PLAIN, name))}
    assert {"align", "detect_language", "encode", "generate"} <= methods <= primed


def test_the_warm_up_leaves_no_threads() -> None:
    """
    Threads of a micro model end with it.
    """
    run_micro_model(ctranslate2, "cpu", 0, "float32")
    gc.collect()
    before = psutil.Process().num_threads()
    run_micro_model(ctranslate2, "cpu", 0, "float32")
    wait_until(lambda: psutil.Process().num_threads() <= before)


@pytest.mark.parametrize("method", ["encode", "generate", "align"])
def test_an_error_of_the_device_comes_out_as_it_is(
    method: str, temporary: Path, watch: Watch
) -> None:
    """
    What CTranslate2 raises is what the warm-up raises, and no weights or files stay.
    """
    models = watch(method)
    with pytest.raises(RuntimeError) as caught:
        run_micro_model(ctranslate2, "cpu", 0, "float32")
    assert str(caught.value) == MISSING
    assert caught.value.__context__ is None
    assert not models[0].model.model_is_loaded
    assert list(temporary.iterdir()) == []


def test_a_device_that_is_not_there_fails_as_for_a_real_model(temporary: Path) -> None:
    """
    An error of the load comes out, too, and no files stay.
    """
    with pytest.raises(ValueError, match="unsupported device"):
        run_micro_model(ctranslate2, "abacus", 0, "float32")
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("english", [False, True])
def test_a_silent_window_leaves_the_answers_of_a_micro_model(*, english: bool) -> None:
    """
    Multilingual or not, a model hears after a window of silence what it heard before.
    """
    whisper = plain_model(micro(english=english))
    before = text_of(whisper.transcribe(clip("en-bread"))[0])
    silent_window(whisper)
    assert text_of(whisper.transcribe(clip("en-bread"))[0]) == before != ""


@pytest.mark.slow
def test_a_silent_window_leaves_the_answers_of_a_real_model() -> None:
    """
    tiny.en hears the same words, at the same times, with the same scores.
    """
    whisper = plain_model(packaged("tiny.en"), compute_type="int8")
    expected = list(whisper.transcribe(clip("en-bread"), beam_size=2)[0])
    silent_window(whisper)
    after, _ = whisper.transcribe(clip("en-bread"), beam_size=2)
    assert list(after) == expected
    assert expected


def test_a_silent_window_runs_the_encoder_and_the_decoder(watch: Watch) -> None:
    """
    Both halves of a model have run once, in a window of 30 s.
    """
    models = watch()
    silent_window(plain_model(micro()))
    assert {"encode", "generate"} <= models[0].asked


def test_a_silent_window_has_the_bands_that_the_model_hears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    128 mel bands go into a model of 128, whatever its feature extractor was told.
    """
    monkeypatch.setattr(warmup, "_MICRO", replace(warmup._MICRO, mels=128))
    warmup._write_micro(ctranslate2, str(tmp_path))
    shutil.copy(micro() / "tokenizer.json", tmp_path)
    whisper = plain_model(tmp_path)
    assert whisper.model.n_mels == 128
    with pytest.raises(ValueError, match="80"):
        whisper.encode(np.zeros((80, 3000), np.float32))
    silent_window(whisper)
