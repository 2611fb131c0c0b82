"""
What a program gains that makes a model for each call: SpeechRecognition's
``recognize_faster_whisper``, four calls.

    .venv-apps/bin/python benchmarks/apps.py [--rounds 7] [--write]

By itself it loads a model four times; under `installed()`, with a cache made for these
four, once. Real models and four clips, int8 on the CPU, one thread. In turns in one
run; medians of the times, and of each round's ratio to four loads. The cache keeps no
variant of the weights, so both convert float16 in each load. How many models were made
and loaded is counted in a round before.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.append(str(Path(__file__).resolve().parents[1]))

import speech_recognition
from faster_whisper import WhisperModel
from report import Table, machine, parsed, write

from examples.weights import packaged_model
from whispercache import ModelCache, installed

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ["en-bread", "en-garden", "en-library", "en-weather"]
PLACE: dict[str, Any] = {"device": "cpu", "compute_type": "int8", "cpu_threads": 1}


@functools.cache
def recorded(name: str) -> speech_recognition.AudioData:
    with speech_recognition.AudioFile(f"{ROOT}/examples/clips/{name}.flac") as source:
        return speech_recognition.Recognizer().record(source)


def heard(model: str) -> list[str]:
    recognizer = speech_recognition.Recognizer()
    return [
        recognizer.recognize_faster_whisper(
            recorded(name), model=model, language="en", init_options=PLACE
        )
        for name in CLIPS
    ]


def alone(model: str) -> list[str]:
    return heard(model)


def cached(model: str) -> list[str]:
    with ModelCache(variants=False) as cache, installed(cache):
        return heard(model)


def counted(model: str) -> tuple[int, int]:
    """
    Returns how many models are made without a cache, and how many loaded with one.
    """
    made = patch.object(
        WhisperModel, "__init__", autospec=True, side_effect=WhisperModel.__init__
    )
    with made as init:
        texts = alone(model)
    with ModelCache(variants=False) as cache, installed(cache):
        assert heard(model) == texts
        return init.call_count, cache.stats().loads


def taken_s(call: Any, model: str) -> tuple[float, float]:  # noqa: ANN401 - a function
    start_s, cpu_s = time.perf_counter(), time.process_time()
    call(model)
    return time.perf_counter() - start_s, time.process_time() - cpu_s


def main() -> None:
    options = parsed(__doc__, rounds=7)
    columns = ["", "models loaded", "s", "ratio", "s of CPU", "ratio"]
    table = Table("Four calls", columns)
    for name in ("tiny.en", "base"):
        model = str(packaged_model(name))
        loads = counted(model)
        turns: list[list[tuple[float, float]]] = [[], []]
        for number in range(options.rounds):
            for index in (0, 1)[:: -1 if number % 2 else 1]:
                turns[index].append(taken_s((alone, cached)[index], model))
        for each, loaded, taken in zip(
            (name, f"{name}, cached"), loads, turns, strict=True
        ):
            cells = []
            for kind in range(2):
                pairs = zip(taken, turns[0], strict=True)
                ratio = statistics.median(a[kind] / b[kind] for a, b in pairs)
                seconds = statistics.median(one[kind] for one in taken)
                cells += [f"{seconds:.2f}", f"{ratio:.2f}"]
            table.add(each, str(loaded), *cells)
    program = f"SpeechRecognition {version('speechrecognition')}"
    write("apps", [f"{machine()}, {program}", table], to_file=options.write)


if __name__ == "__main__":
    main()
