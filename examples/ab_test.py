"""
The same speech through two models in two compute types, side by side.

One cache holds what fits: with ``--ram 600MiB`` the answers stay, the loads multiply.
"""

from __future__ import annotations

import argparse
import csv
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jiwer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from weights import find_model

from whispercache import ModelCache, WhisperCacheError

CLIPS = Path(__file__).parent / "clips"


class Answer(NamedTuple):
    """
    What a model heard in a clip; what is said there, as far as that is known.
    """

    language: str
    said: str
    heard: str


@dataclass
class Variant:
    """
    One model in one compute type, and how it did.
    """

    name: str
    compute_type: str
    answers: list[Answer] = field(default_factory=list)
    work_s: float = 0.0


def main() -> None:
    """
    Compare on the files that the command line names, or on the clips beside this file.
    """
    options = parse_options()
    references = read_references()
    variants = [
        Variant(name, compute_type)
        for name in ("tiny.en", "base")
        for compute_type in ("float32", "int8")
    ]
    with ModelCache(ram=options.ram) as cache:
        table = Table("clip", "model", "type", "word errors", "heard")
        with Live(table, vertical_overflow="visible"):
            for path in options.audio:
                language, said = references.get(path.name, ("", ""))
                for variant in variants:
                    heard = transcribe(cache, variant, path, language)
                    answer = Answer(language, said, heard)
                    variant.answers.append(answer)
                    names = (path.stem, variant.name, variant.compute_type)
                    table.add_row(*names, word_errors([answer]), heard)
                table.add_section()
        report(cache, variants)


def transcribe(cache: ModelCache, variant: Variant, path: Path, language: str) -> str:
    """
    The text of *path*. Its seconds, without those of a load, count for *variant*.

    The *language* is detected if it is empty: almost half of the work on a short clip.
    """
    model = find_model(variant.name)
    # A real WhisperModel, in memory until the end of the block.
    with cache.lease(model, "cpu", variant.compute_type) as whisper:
        started_s = time.perf_counter()
        # No dice, so the same answer each time; no loops, where a model hears nonsense.
        known = language if whisper.model.is_multilingual else "en"
        segments, _ = whisper.transcribe(
            str(path), known or None, temperature=0, no_repeat_ngram_size=4
        )
        text = "".join(segment.text for segment in segments).strip()
        variant.work_s += time.perf_counter() - started_s
    return text


def word_errors(answers: list[Answer]) -> str:
    """
    Wrong, missing and extra words as a share of those said, case and punctuation aside.
    """
    known = [answer for answer in answers if answer.said]
    if not known:
        return "?"
    said = [words(answer.said) for answer in known]
    return f"{jiwer.wer(said, [words(answer.heard) for answer in known]):.0%}"


def words(text: str) -> str:
    """
    *text* in lower case and without punctuation.
    """
    return re.sub(r"[^\w\s]", "", text.lower())


def report(cache: ModelCache, variants: list[Variant]) -> None:
    """
    Print how each variant did on all clips, and what the cache did for it.
    """
    table = Table("model", "type", "word errors: English", "others", "seconds of work")
    for variant in variants:
        english = [answer for answer in variant.answers if answer.language == "en"]
        others = [answer for answer in variant.answers if answer.language != "en"]
        rates = (word_errors(english), word_errors(others))
        names = (variant.name, variant.compute_type)
        table.add_row(*names, *rates, f"{variant.work_s:.1f}")
    stats = cache.stats()
    console = Console(highlight=False)
    console.print("", table)
    console.print(
        f"{stats.requests} requests: {stats.hits} hits, {stats.loads} loads "
        f"in {stats.load_s:.1f} s, {stats.evictions} evictions."
    )


def read_references() -> dict[str, tuple[str, str]]:
    """
    Language and words of each of the clips, by file name.
    """
    with (CLIPS / "references.tsv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return {row["file"]: (row["language"], row["text"]) for row in rows}


def parse_options() -> argparse.Namespace:
    """
    What the command line asks for.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("audio", nargs="*", type=Path, help="files that FFmpeg reads")
    parser.add_argument("--ram", default="1GiB", help="limit (default: %(default)s)")
    options = parser.parse_args()
    options.audio = options.audio or sorted(CLIPS.glob("*.flac"))
    return options


if __name__ == "__main__":
    try:
        main()
    except (WhisperCacheError, OSError, ValueError) as error:
        raise SystemExit(f"ab_test: {error}") from None
