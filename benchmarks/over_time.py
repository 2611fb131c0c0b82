"""
The memory of a program over time, with a cache and with ``lru_cache(maxsize=1)``.

    python benchmarks/over_time.py [--write]

Both do what `make demo` does: English clips go to tiny.en and the others to base, in
float32 on the CPU. Each is a process of its own; its private memory is looked at each
10 ms, from the start of the first clip. The limit is what base needs by the cache's own
account, on top of what the process takes without a model; lru_cache knows of none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
from report import RESULTS, Table, machine, parsed, today, write

from examples.weights import find_model

if TYPE_CHECKING:
    from collections.abc import Callable

    # Seconds and MiB, one after the other.
    Curve: TypeAlias = list[tuple[float, float]]

_FOUND = sorted((Path(__file__).parent.parent / "examples" / "clips").glob("*-*.flac"))
# One in English after one that is not, as in a service for everybody.
CLIPS = sorted(_FOUND, key=lambda clip: (clip.name.startswith("en"), clip.name))
CLIPS = [each for pair in zip(CLIPS, reversed(CLIPS), strict=True) for each in pair]
CLIPS = CLIPS[: len(_FOUND)]
WAYS = LRU_CACHE, WHISPERCACHE = ("lru_cache(maxsize=1)", "whispercache")
EVERY_S = 0.01
# OpenMP's threads spin while they wait, which takes long where others want the cores.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
MIB = 1024**2


# The program -------------------------------------------------------------------------


def program(way: str) -> dict[str, Any]:
    """
    Runs it in this process, and returns its curve, its loads and the limit.
    """
    if way == LRU_CACHE:
        from faster_whisper import WhisperModel

        loads: list[str] = []

        @lru_cache(maxsize=1)
        def get_model(size: str, device: str, compute_type: str) -> WhisperModel:
            loads.append(size)
            return WhisperModel(size, device=device, compute_type=compute_type)

        empty_mib = memory_mib()
        return {"curve": watched(get_model), "loads": len(loads), "empty": empty_mib}
    from whispercache import ModelCache

    with ModelCache(variants=False) as cache:
        place = (find_model("base"), "cpu", "float32")
        needed_bytes = cache.explain(*place).needed_bytes
        cache.resize(ram=int(1.05 * needed_bytes))
        empty_mib = memory_mib()
        curve = watched(cache.get_model)
        limit_mib = 1.05 * needed_bytes / MIB
        loads_made = cache.stats().loads
    return {
        "curve": curve,
        "loads": loads_made,
        "empty": empty_mib,
        "limit": limit_mib,
    }


def watched(get_model: Callable[[str, str, str], Any]) -> Curve:
    """
    Transcribes all clips, and returns the memory over time.
    """
    curve: Curve = []
    done = threading.Event()
    started_s = time.perf_counter()

    def look() -> None:
        while not done.wait(EVERY_S):
            curve.append((time.perf_counter() - started_s, memory_mib()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for clip in CLIPS:
            language = clip.name[:2]
            size = find_model("tiny.en" if language == "en" else "base")
            model = get_model(size, "cpu", "float32")
            list(model.transcribe(str(clip), language=language)[0])
    finally:
        done.set()
        thread.join()
    return curve


def memory_mib() -> float:
    # Private: the pages of a file that is read are not the program's.
    return float(psutil.Process().memory_info().rss - shared_bytes()) / MIB


def shared_bytes() -> int:
    return int(psutil.Process().memory_info().shared)


# The results -------------------------------------------------------------------------


def draw(results: dict[str, dict[str, Any]], *, dark: bool) -> Path:
    """
    Draws the curves, and returns the picture's path.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.style.context("dark_background" if dark else "default"):
        figure, axes = plt.subplots(figsize=(8.0, 3.4), layout="constrained")
        colours = ("#e69f00", "#56b4e9") if dark else ("#b36b00", "#0072b2")
        for colour, (way, result) in zip(colours, results.items(), strict=True):
            seconds, mib = zip(*result["curve"], strict=True)
            axes.plot(seconds, mib, color=colour, label=way, linewidth=1.2)
        ours = results[WHISPERCACHE]
        axes.axhline(
            ours["empty"] + ours["limit"],
            color="#999999",
            linestyle="--",
            label="the cache's limit, on top of the empty process",
        )
        axes.set(xlabel="seconds", ylabel="MiB", ylim=(0, None), xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right", fontsize=9)
        name = f"over-time-{today()}{'-dark' if dark else ''}.png"
        path = RESULTS / name
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def main() -> None:
    """
    Runs both, and prints a table.
    """
    options = parsed(__doc__)
    if options.child:
        print(json.dumps(program(options.child)))
        return
    results: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--child", way]
        told = subprocess.run(
            command, capture_output=True, text=True, check=True, env=ONE_THREAD
        )
        results[way] = json.loads(told.stdout.splitlines()[-1])
    head = ["", "loads", "most, MiB", "median, MiB", "seconds"]
    table = Table(f"{len(CLIPS)} clips, tiny.en and base in turns", head)
    for way, result in results.items():
        mib = sorted(value for _, value in result["curve"])
        seconds = result["curve"][-1][0]
        cells = (result["loads"], mib[-1], mib[len(mib) // 2], seconds)
        table.add(way, *(f"{cell:.0f}" for cell in cells))
    ours = results[WHISPERCACHE]
    allowed = ours["empty"] + ours["limit"]
    limit = f"The limit, on top of the empty process: {allowed:.0f} MiB."
    if options.write:
        for dark in (False, True):
            draw(results, dark=dark)
    write("over-time", [machine(), table, limit], to_file=options.write)


if __name__ == "__main__":
    main()
