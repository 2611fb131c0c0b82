"""
English speech goes to tiny.en, all other languages to base, in memory that holds one.

No line below loads or unloads a model: the cache swaps the two as the speech demands.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.live import Live
from rich.table import Table
from weights import find_model

from whispercache import ModelCache, ModelEvicted, ModelLoaded, WhisperCacheError

if TYPE_CHECKING:
    from whispercache import CachedModel, Event

CLIPS = Path(__file__).parent / "clips"
TINY, BASE = find_model("tiny.en"), find_model("base")
NAMES = {TINY: "tiny.en", BASE: "base"}


def main() -> None:
    """
    Transcribe the files that the command line names, or the clips beside this file.
    """
    options = parse_options()
    news: list[str] = []
    with ModelCache() as cache:
        english = cache.get_model(TINY, "cpu", "float32")
        multilingual = cache.get_model(BASE, "cpu", "float32")

        # A little more than base takes by itself: too little for both.
        needed_bytes = cache.explain(BASE, "cpu", "float32").needed_bytes
        cache.resize(ram=options.ram or int(1.05 * needed_bytes))
        cache.subscribe(lambda event: news.extend(describe(event)))

        # Often a caller knows the language. Where not, base listens to all files first:
        # going back and forth between listening and answering would swap every time.
        languages = {
            path: options.language or multilingual.detect_language(path)[0]
            for path in options.audio
        }

        table = Table("clip", "language", "model", "heard", "what the cache did")
        with Live(table, vertical_overflow="visible"):
            for path, language in languages.items():
                model = english if language == "en" else multilingual
                text = transcribe(model, path, language)
                name = NAMES[model.key.model]
                table.add_row(path.stem, language, name, text, "\n".join(news) or "hit")
                news.clear()
        report(cache)


def transcribe(model: CachedModel, path: Path, language: str) -> str:
    """
    The text of *path*.
    """
    segments, _ = model.transcribe(path, language=language)
    # Whisper works while this loop runs; the model cannot leave before its end.
    return "".join(segment.text for segment in segments).strip()


def describe(event: Event) -> list[str]:
    """
    An event in a few words, or none if it is not worth one.
    """
    name = NAMES[event.key.model]
    if isinstance(event, ModelLoaded):
        return [f"{name} loaded, {event.load_s:.2f} s"]
    if isinstance(event, ModelEvicted):
        return [f"{name} evicted, {event.credited_bytes / 2**20:.0f} MiB"]
    return []


def report(cache: ModelCache) -> None:
    """
    Print what the cache did in all, and what it holds.
    """
    stats, (device,) = cache.stats(), cache.devices()
    print(
        f"\n{stats.requests} requests: {stats.hits} hits, {stats.loads} loads "
        f"in {stats.load_s:.1f} s, {stats.evictions} evictions."
    )
    print(
        f"Memory: never more than {device.peak_bytes / 2**20:.0f} MiB "
        f"of {device.capacity_bytes / 2**20:.0f} MiB."
    )
    for model in cache.models():
        name = NAMES[model.key.model]
        print(f"Still there: {name}, {model.bytes / 2**20:.0f} MiB.")


def parse_options() -> argparse.Namespace:
    """
    What the command line asks for.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("audio", nargs="*", type=Path, help="files that FFmpeg reads")
    parser.add_argument("--language", help="of all files, as in 'en'; else detected")
    parser.add_argument("--ram", help="limit, as in '600MiB'; else what base takes")
    options = parser.parse_args()
    # By what is said rather than by language: the models take turns.
    options.audio = options.audio or sorted(
        CLIPS.glob("*.flac"), key=lambda path: path.stem.partition("-")[2]
    )
    return options


if __name__ == "__main__":
    try:
        main()
    except (WhisperCacheError, OSError, ValueError) as error:
        raise SystemExit(f"multilingual: {error}") from None
