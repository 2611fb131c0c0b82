"""
A request to the server, beside the same call in the client's own process.

    python benchmarks/overhead.py [--rounds 40] [--write]

Both have the model in memory and huge pages, look for voice activity, as the server
does by default, and are given the same file, one at a time and by turns. The server
decodes the upload in a process of its own, and answers through a connection that is
kept.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import httpx
from report import Table, machine, parsed, write
from serve import DEVICE, URL, started

from examples.weights import packaged_model
from whispercache import ModelCache, use_huge_pages

if TYPE_CHECKING:
    from collections.abc import Callable

CLIPS = Path(__file__).resolve().parent.parent / "examples" / "clips"
PAIRS = (
    ("tiny.en", "en-bread"),
    ("base", "en-bread"),
    ("base", "en-weather"),
    ("base", "en-harbour-long"),
)


class Took(NamedTuple):
    here_s: float
    served_s: float


def timed(call: Callable[[], str]) -> tuple[float, str]:
    began_s = time.perf_counter()
    text = call()
    return time.perf_counter() - began_s, " ".join(text.split())


def pair(
    cache: ModelCache, http: httpx.Client, name: str, clip: str, rounds: int
) -> list[Took]:
    """
    Returns what each of *rounds* took, in turn which of the two begins.
    """
    path = CLIPS / f"{clip}.flac"
    model = cache.get_model(packaged_model(name), DEVICE)

    def here() -> str:
        segments, _ = model.transcribe(path, language="en", vad_filter=True)
        return "".join(each.text for each in segments)

    def served() -> str:
        with path.open("rb") as file:
            answer = http.post(
                URL,
                data={"model": name, "language": "en"},
                files={"file": (path.name, file)},
            )
        answer.raise_for_status()
        return str(answer.json()["text"])

    took = []
    # The first ones load, and start what is started once.
    for n in range(-2, rounds):
        if n % 2:
            here_s, mine = timed(here)
            served_s, theirs = timed(served)
        else:
            served_s, theirs = timed(served)
            here_s, mine = timed(here)
        if mine != theirs:
            raise SystemExit(f"not the same text:\n{mine}\n{theirs}")
        if n >= 0:
            took.append(Took(here_s, served_s))
    return took


def main() -> None:
    options = parsed(__doc__, rounds=40)
    # As the command does; before there are threads.
    use_huge_pages()
    table = Table(
        f"One request at a time, medians of {options.rounds} by turns",
        ["model, clip", "in the process, ms", "served, ms", "÷", "more, ms"],
    )
    places = [f"{name}={packaged_model(name)}" for name in ("tiny.en", "base")]
    with (
        started(*places) as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
        ModelCache() as cache,
    ):
        for name, clip in PAIRS:
            rounds = options.rounds // 4 if "long" in clip else options.rounds
            took = pair(cache, http, name, clip, max(3, rounds))
            here_s, served_s = map(statistics.median, zip(*took, strict=True))
            table.add(
                f"{name}, {clip}",
                f"{1000 * here_s:.0f}",
                f"{1000 * served_s:.0f}",
                f"{served_s / here_s:.3f}",
                f"{1000 * statistics.median(b - a for a, b in took):.0f}",
            )
    write("overhead", [machine(), table], to_file=options.write)


if __name__ == "__main__":
    main()
