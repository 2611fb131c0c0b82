"""
Three ways in which ``@lru_cache def get_model()`` fails, and how a cache does not.

Each of the two is a process of its own, so that its memory is its own. The models are
real ones: tiny.en takes 144 MiB of weights on the CPU in float32, and base 277.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from weights import find_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    # What it returns is a WhisperModel, or a CachedModel, which has its methods.
    GetModel = Callable[[str, str, str], Any]

CLIP = str(Path(__file__).parent / "clips" / "en-harbour-long.flac")
TINY, BASE = find_model("tiny.en"), find_model("base")


def main() -> None:
    """
    Runs both programs, or the one that the command line names.
    """
    programs = {"lru_cache": with_lru_cache, "whispercache": with_whispercache}
    for name in sys.argv[1:]:
        print(f"{name}:", flush=True)
        programs[name]()
    if not sys.argv[1:]:
        for name in programs:
            subprocess.run([sys.executable, __file__, name], check=True)  # noqa: S603


def with_lru_cache() -> None:
    """
    Has the remedy that most people write first.
    """
    from faster_whisper import WhisperModel

    loads: list[str] = []

    @lru_cache(maxsize=1)
    def get_model(size: str, device: str, compute_type: str) -> WhisperModel:
        loads.append(size)
        return WhisperModel(size, device=device, compute_type=compute_type)

    work_side_by_side(get_model)
    give_back(get_model, get_model.cache_clear)
    loads.clear()
    ask_at_once(get_model)
    print(f"  four threads ask for base at once: {len(loads)} loads")


def with_whispercache() -> None:
    """
    Has the cache instead; no line of the work itself is another one.
    """
    from whispercache import ModelCache

    with ModelCache() as cache:
        # As lru_cache(maxsize=1): what base needs to work, and not tiny.en as well.
        needed_bytes = cache.explain(BASE, "cpu", "float32").needed_bytes
        cache.resize(ram=int(1.05 * needed_bytes))

        work_side_by_side(cache.get_model)
        give_back(cache.get_model, lambda: cache.evict(BASE, "cpu", "float32"))
        before = cache.stats().loads
        ask_at_once(cache.get_model)
        print(
            f"  four threads ask for base at once: {cache.stats().loads - before} load"
        )


def ask_at_once(get_model: GetModel) -> None:
    """
    Has four threads ask for one model, as four requests at the start of a service do.
    """
    audio = np.zeros(16_000, np.float32)
    ready = threading.Barrier(4)

    def ask(_: int) -> None:
        ready.wait()
        get_model(BASE, "cpu", "float32").detect_language(audio)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))


def work_side_by_side(get_model: GetModel) -> None:
    """
    Has one thread transcribe with tiny.en, and another with base in the midst of it.
    """
    begun = threading.Event()

    def listen(size: str) -> None:
        if size == BASE:
            begun.wait()
        segments, _ = get_model(size, "cpu", "float32").transcribe(CLIP, language="en")
        for _ in segments:
            begun.set()

    with watched() as peak, ThreadPoolExecutor(2) as pool:
        list(pool.map(listen, (TINY, BASE)))
    print(f"  tiny.en and base in turns, room for one: {peak[0]:.0f} MiB at most")


def give_back(get_model: GetModel, clear: Callable[[], object]) -> None:
    """
    Has the model leave memory, while an object of the program still refers to it.
    """
    model = get_model(BASE, "cpu", "float32")
    list(model.transcribe(CLIP, language="en")[0])
    before = memory_mib()
    clear()
    print(f"  told to leave memory: {before:.0f} MiB before, {memory_mib():.0f} after")


@contextmanager
def watched() -> Iterator[list[float]]:
    """
    Yields the most memory that this process had in the block, looked at each 5 ms.
    """
    peak, done = [0.0], threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], memory_mib())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def memory_mib() -> float:
    """
    Returns the memory that this process has now.
    """
    return float(psutil.Process().memory_info().rss / 1024**2)


if __name__ == "__main__":
    main()
