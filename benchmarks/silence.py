"""
Voice activity detection as a server's default: what models say in silence and noise,
and what they miss of speech, with it and without.

    python benchmarks/silence.py [--write]

The models are the packaged tiny.en and base, on the CPU as int8; speech is that of the
examples, as it is, made quieter, in white noise, and between long silences. Errors are
counted in words, as `whispercache compare` does. Detection has the parameters of
faster-whisper, and other pauses and paddings for the second column.
"""

from __future__ import annotations

import csv
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from faster_whisper.audio import decode_audio
from report import Table, machine, parsed, write

from examples.weights import find_model
from whispercache import ModelCache
from whispercache.comparison.score import normalise, score

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from whispercache import CachedModel

    Samples: TypeAlias = NDArray[np.float32]
    Row: TypeAlias = dict[str, str]

CLIPS = Path(__file__).resolve().parent.parent / "examples" / "clips"
RATE_HZ = 16_000

WAYS: dict[str, dict[str, Any]] = {
    "without": {},
    "with": {"vad_filter": True},
    "with, pauses of 0.5 s": {
        "vad_filter": True,
        "vad_parameters": {"min_silence_duration_ms": 500},
    },
}


def quiet(n_s: float) -> Samples:
    """
    Returns silence.
    """
    return np.zeros(round(n_s * RATE_HZ), np.float32)


def noise(n_s: float, dbfs: float, seed: int = 1) -> Samples:
    """
    Returns white noise of a loudness, in decibels below full scale.
    """
    drawn = np.random.default_rng(seed).standard_normal(round(n_s * RATE_HZ))
    return (drawn * 10 ** (dbfs / 20)).astype(np.float32)


def hum(n_s: float) -> Samples:
    """
    Returns mains hum with its third harmonic, at -40 dBFS.
    """
    t_s = np.arange(round(n_s * RATE_HZ)) / RATE_HZ
    wave = np.sin(2 * np.pi * 50 * t_s) + 0.3 * np.sin(2 * np.pi * 150 * t_s)
    return (0.01 * wave).astype(np.float32)


def speechless() -> Iterator[tuple[str, Samples]]:
    """
    Yields recordings in which nobody speaks.
    """
    for n_s in (1.0, 3.0, 10.0, 45.0):
        yield f"silence, {n_s:g} s", quiet(n_s)
        yield f"noise at -60 dBFS, {n_s:g} s", noise(n_s, -60)
        yield f"noise at -30 dBFS, {n_s:g} s", noise(n_s, -30)
        yield f"hum, {n_s:g} s", hum(n_s)


def altered(speech: Samples) -> Iterator[tuple[str, Samples]]:
    """
    Yields a recording as it is, and made worse.
    """
    yield "as it is", speech
    yield "30 dB quieter", (speech * 10**-1.5).astype(np.float32)
    yield "50 dB quieter", (speech * 10**-2.5).astype(np.float32)
    loudness = 20 * np.log10(float(np.sqrt(np.mean(speech**2))) + 1e-9)
    for ratio_db in (10, 0):
        yield (
            f"noise {ratio_db} dB below it",
            speech
            + noise(speech.size / RATE_HZ + 1, loudness - ratio_db)[: speech.size],
        )
    yield (
        "after 20 s of silence, before 10",
        np.concatenate((quiet(20), speech, quiet(10))),
    )


def heard(model: CachedModel, audio: Samples, way: str, language: str) -> str:
    """
    Returns the text of a recording.
    """
    segments, _ = model.transcribe(audio, language=language, **WAYS[way])
    return "".join(segment.text for segment in segments)


def spoken(name: str, model: CachedModel, said: Iterable[Row]) -> list[Table]:
    """
    Returns what a model gets wrong of all that is said, and what it takes.
    """
    errors: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    taken_s: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    total = 0
    for row in said:
        total += len(normalise(row["text"], row["language"]).split())
        for label, audio in altered(cast("Samples", decode_audio(row["file"]))):
            for way in WAYS:
                began_s = time.process_time()
                text = heard(model, audio, way, row["language"])
                taken_s[label][way] += time.process_time() - began_s
                found = score(row["text"], text, row["language"]).words
                wrong = found.substitutions + found.deletions + found.insertions
                errors[label][way] += wrong
    tables = [
        Table(f"{name}: wrong of {total} words said", ["recordings", *WAYS]),
        Table(f"{name}: seconds of CPU time", ["recordings", *WAYS]),
    ]
    for label, by_way in errors.items():
        tables[0].add(label, *(str(by_way[way]) for way in WAYS))
        tables[1].add(label, *(f"{taken_s[label][way]:.1f}" for way in WAYS))
    return tables


def silent(name: str, model: CachedModel) -> Table:
    """
    Returns the number of words that a model hears where there are none.
    """
    table = Table(f"{name}: words where nobody speaks", ["recording", *WAYS])
    for label, audio in speechless():
        texts = [normalise(heard(model, audio, way, "en"), "en") for way in WAYS]
        table.add(label, *(str(len(text.split())) for text in texts))
    return table


def main() -> None:
    """
    Prints the tables, and writes them if told to.
    """
    options = parsed(__doc__)
    with (CLIPS / "references.tsv").open(encoding="utf-8") as file:
        said = list(csv.DictReader(file, delimiter="\t"))
    for row in said:
        row["file"] = str(CLIPS / row["file"])
    parts: list[object] = [machine()]
    with ModelCache(keep_alive=-1) as cache:
        for name in ("tiny.en", "base"):
            model = cache.get_model(find_model(name), "cpu", "int8")
            known = [r for r in said if "." not in name or r["language"] == "en"]
            parts += [silent(name, model), *spoken(name, model, known)]
    write("silence", parts, to_file=options.write)


if __name__ == "__main__":
    main()
