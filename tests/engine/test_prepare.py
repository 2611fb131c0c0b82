"""
The preparation of calls: equal parameters are checked once, and no two calls share what
one of them may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from faster_whisper import BatchedInferencePipeline, WhisperModel

from whispercache.engine.calls import prepare
from whispercache.engine.calls.languages import Knowledge
from whispercache.engine.construct import signatures
from whispercache.engine.sizes.footprint import DEFAULT_WORKLOAD

if TYPE_CHECKING:
    from collections.abc import Callable

    from whispercache.engine.calls.prepare import Prepared

SECOND = np.zeros(16_000, np.float32)
MINUTES = np.zeros(150 * 16_000, np.float32)
GERMAN = Knowledge(51_865, is_multilingual=True, languages=("en", "de"))


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[object, ...], Any]:
    """
    What is kept of calls: nothing in the beginning.
    """
    found: dict[tuple[object, ...], Any] = {}
    monkeypatch.setattr(prepare, "_kept", found)
    return found


class Source:
    """
    A model that counts how often the signatures of calls are asked for, which is once
    for each check.
    """

    def __init__(self, known: Knowledge = GERMAN) -> None:
        self.known = known
        self.checks = 0

    def decode_audio(self, audio: Any) -> Any:
        """
        Samples are there already.
        """
        return audio

    def signatures(self) -> Any:
        """
        Those of faster-whisper.
        """
        self.checks += 1
        return signatures()

    def knowledge(self) -> Knowledge:
        """
        As given.
        """
        return self.known


def prepared(
    source: Source,
    *args: object,
    audio: Any = SECOND,
    batch_size: int | None = None,
    function: Callable[..., object] | None = WhisperModel.transcribe,
    **options: object,
) -> Prepared:
    """
    A call of faster-whisper's method.
    """
    return prepare.prepared(source, audio, args, options, batch_size, function=function)


def test_equal_parameters_are_checked_once() -> None:
    """
    However many calls, whatever they hear, and of several models.
    """
    source, other = Source(), Source()
    for model in (source, other):
        for audio in (SECOND, MINUTES):
            ready = prepared(model, audio=audio, language="german", beam_size=1)
            assert ready.samples is audio
            assert ready.options["language"] == "de"
            assert (ready.workload.beam_size, ready.workload.vad) == (1, False)
            assert ready.workload.audio_s == (60 if audio is SECOND else 180)
    assert (source.checks, other.checks) == (1, 0)
    assert prepared(source).workload is DEFAULT_WORKLOAD


def test_what_only_looks_equal_is_checked_by_itself() -> None:
    """
    1, 1.0 and True; by name and by position; of another function.
    """
    source = Source()
    assert prepared(source, beam_size=1).options["beam_size"] == 1
    for nonsense in (1.0, "1"):
        with pytest.raises(TypeError, match="beam_size"):
            prepared(source, beam_size=nonsense)
        # Nor is nonsense kept.
        with pytest.raises(TypeError, match="beam_size"):
            prepared(source, beam_size=nonsense)
    with pytest.raises(TypeError, match="no parameter"):
        prepared(source, beam_sise=1)
    assert prepared(source, "en").options["language"] == "en"
    assert prepared(source, language="en").options["language"] == "en"
    with pytest.raises(ValueError, match="task"):
        prepared(source, "en", "en")
    before = source.checks
    pipeline = BatchedInferencePipeline.transcribe
    ready = prepared(source, batch_size=2, function=pipeline, language="en")
    assert (ready.batch_size, ready.workload.batch_size) == (2, 2)
    assert prepared(source, batch_size=3, function=pipeline, language="en").batch_size
    assert source.checks == before + 2


def test_each_call_gets_lists_of_its_own() -> None:
    """
    Those that it gave, those that are defaults, and those that the check makes.
    """
    source, mine = Source(), [50_000]
    for options in ({}, {"suppress_tokens": mine}, {"clip_timestamps": ""}):
        first, second = (prepared(source, **options) for _ in range(2))
        assert first.options == second.options
        lists = {n: v for n, v in first.options.items() if isinstance(v, list)}
        assert {"temperature", "suppress_tokens"} <= set(lists)
        for name, value in lists.items():
            assert second.options[name] is not value
            value.append(0)
    assert mine == [50_000]
    again = prepared(source)
    assert again.options == {
        "temperature": [0.0, 0.2, 0.4, 0.6, 0.8, 1.0],
        "suppress_tokens": [-1],
    }
    # A function that is not known gets what the caller gave.
    assert prepared(source, function=None).options == {}


def test_each_model_is_asked_for_its_own_languages() -> None:
    """
    Though the parameters were fine for another one, or for its files of before.
    """
    english = Knowledge(51_865, is_multilingual=True, languages=("en",))
    source, other = Source(), Source(english)
    for _ in range(2):
        assert prepared(source, language="de").options["language"] == "de"
        with pytest.raises(ValueError, match="does not know German"):
            prepared(other, language="de")
    source.known = english
    with pytest.raises(ValueError, match="does not know German"):
        prepared(source, language="de")


def test_no_more_is_kept_than_a_program_may_need(
    kept: dict[tuple[object, ...], Any],
) -> None:
    """
    A prompt for each call, say.
    """
    source = Source()
    for number in range(3 * prepare._MOST_KEPT):
        ready = prepared(source, initial_prompt=f"about {number}")
        assert ready.options["initial_prompt"] == f"about {number}"
        assert len(kept) <= prepare._MOST_KEPT
    # Values that a caller may change are not kept at all.
    kept.clear()
    prepared(source, temperature=[0.0])
    prepared(source, vad_parameters={"threshold": 0.5})
    assert not kept
