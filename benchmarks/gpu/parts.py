"""
Parts about bytes: the machine, the first load, each size, many cycles.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import whispercache
from gpu.card import Card
from gpu.run import ASIDE, Row, spawn
from whispercache import ModelCache
from whispercache.devices.host import anonymous_bytes, cpu_name, host_room
from whispercache.devices.nvml import driver_version
from whispercache.devices.probe import SystemProbe
from whispercache.engine.process import versions
from whispercache.engine.sizes.architecture import TEXT_POSITIONS
from whispercache.engine.sizes.footprint import Workload, workspace_bytes
from whispercache.engine.sizes.header import read_header
from whispercache.engine.sizes.weights import weights_bytes
from whispercache.errors import DeviceUnavailable, WhisperCacheError, format_bytes
from whispercache.events import (
    DeviceWarmedUp,
    DeviceWarmingUp,
    ModelEvicted,
    ModelLoaded,
)

if TYPE_CHECKING:
    import numpy as np
    from faster_whisper import WhisperModel
    from numpy.typing import NDArray

    from gpu.card import Held
    from gpu.run import Rows, Setup
    from whispercache.events import Event

E = TypeVar("E", bound="Event")

SAMPLE_RATE = 16_000

# Tables.
MACHINE = "Machine"
CROSSINGS = "Copies between host and card, by the driver alone"
WARM_UPS = "The first load of a process (tiny, float16)"
BYTES = "Bytes of models (float16): predicted, measured, returned, left behind"
WORK = "Bytes of work (float16), texts as long as can be"
CYCLES = "Loads and unloads of tiny, float16"


class Heard:
    def __init__(self, cache: ModelCache) -> None:
        self._events: SimpleQueue[Event] = SimpleQueue()
        cache.subscribe(self._events.put)

    def until(self, kind: type[E], timeout_s: float = 120.0) -> E:
        """
        Returns the next event of a kind and drops those before it.
        """
        while True:
            event = self._events.get(timeout=timeout_s)
            if isinstance(event, kind):
                return event

    def all_of(self, kind: type[E]) -> list[E]:
        found = []
        while not self._events.empty():
            event = self._events.get()
            if isinstance(event, kind):
                found.append(event)
        return found


def noise(seconds: float = 1.0) -> NDArray[np.float32]:
    """
    Returns audio that is not silent: float32 (samples,), mono, 16 kHz.
    """
    import numpy as np

    random = np.random.default_rng(0)
    return random.standard_normal(int(seconds * SAMPLE_RATE), np.float32) * 0.01


def say(whisper: WhisperModel) -> str:
    segments, _ = whisper.transcribe(
        noise(), language="en", beam_size=1, temperature=0.0, without_timestamps=True
    )
    return "".join(segment.text for segment in segments)


def plain_cache(*, park: bool = False, variants: bool = False) -> ModelCache:
    """
    Returns a cache without keep-alive, which loads models from their own files.
    """
    return ModelCache(park=park, variants=variants, keep_alive=-1)


# The machine -------------------------------------------------------------------------


def look(setup: Setup, _argument: str) -> Rows:
    import ctranslate2

    probe = SystemProbe()
    cards = ctranslate2.get_cuda_device_count()
    try:
        probe.read(setup.device)
        name = probe.device_name(setup.device)
    except DeviceUnavailable as error:
        yield Row(ASIDE, {"card": "", "problem": str(error)})
        return
    problem = "" if cards else "CTranslate2 sees no card; it may be built without CUDA"
    yield Row(ASIDE, {"card": name, "problem": problem})


def machine(setup: Setup, _argument: str) -> Rows:
    card = Card(setup.device)
    reading = card.probe.read(setup.device)
    major, minor = card.driver.compute_capability(card.ordinal)
    ram_bytes, _, _ = host_room()
    facts = {
        "card": card.probe.device_name(setup.device),
        "its memory": f"{format_bytes(reading.total_bytes)}, by {reading.source}",
        "compute capability": f"{major}.{minor}",
        "driver": driver_version() or "unknown",
        "CUDA of the driver": card.cuda_version(),
        "processor": f"{cpu_name()}, {os.cpu_count()} cores",
        "memory": format_bytes(ram_bytes),
        "Python": platform.python_version(),
        **versions(),
        "whispercache": whispercache.__version__,
        "allocator": os.environ.get("CT2_CUDA_ALLOCATOR", "CTranslate2's default"),
    }
    for name, value in facts.items():
        yield Row(MACHINE, {"": name, "value": value})
    n_bytes = min(setup.crossing_bytes, reading.free_bytes // 4)
    for way, memory, seconds in card.crossings(n_bytes):
        rate = f"{n_bytes / seconds / 1e9:.2f}"
        name = f"{way}, {memory} memory"
        cells = {"": name, "bytes": n_bytes, "s": seconds, "GB/s": rate}
        yield Row(CROSSINGS, cells)


# Warm-up -----------------------------------------------------------------------------


def warm_ups(setup: Setup, _argument: str) -> Rows:
    """
    Runs `warm_up` in a process, and in another with the first one's kernel cache.
    """
    for process in ("first", "second"):
        outcome = spawn("warm", setup, process)
        yield from outcome.rows
        if outcome.error:
            raise RuntimeError(f"the {process} process: {outcome.error}")


def warm_up(setup: Setup, argument: str) -> Rows:
    size = setup.nearest("tiny")
    with plain_cache() as cache:
        heard = Heard(cache)
        with cache.lease(setup.model(size), setup.device, "float16") as whisper:
            reason = heard.until(DeviceWarmingUp).reason
            warmed = heard.until(DeviceWarmedUp)
            loaded = heard.until(ModelLoaded)
            started_s = time.perf_counter()
            say(whisper)
            answer_s = time.perf_counter() - started_s
    kernels = (file for file in Path(setup.kernels).rglob("*") if file.is_file())
    cells = {
        "": f"{argument} process",
        "warm-up, s": warmed.warm_up_s,
        "load, s": loaded.load_s,
        "first answer, s": answer_s,
        "floor": warmed.floor_bytes,
        "kernel cache": sum(file.stat().st_size for file in kernels),
        "what it does": reason,
    }
    yield Row(WARM_UPS, cells)


# Bytes -------------------------------------------------------------------------------


def sizes(setup: Setup, _argument: str) -> Rows:
    card = Card(setup.device)
    with plain_cache() as cache:
        heard = Heard(cache)
        # One load and unload first, for what comes once in a process.
        first = setup.model(setup.sizes[0])
        cache.preload(first, setup.device, "float16")
        cache.evict(first)
        heard.until(ModelEvicted)
        for size in setup.sizes:
            try:
                yield from _size(setup, card, cache, heard, size)
            except (WhisperCacheError, RuntimeError) as error:
                yield Row(BYTES, {"": f"{size}: {error}"})


def _size(setup: Setup, card: Card, cache: ModelCache, heard: Heard, size: str) -> Rows:
    path, kind = setup.model(size), "float16"
    header = read_header(str(path))
    before = card.held()
    with cache.lease(path, setup.device, kind) as whisper:
        loaded = heard.until(ModelLoaded)
        there = card.held()
        for name, work in workloads(setup.batch).items():
            grown, took_s = _grown(card, there, whisper, work)
            if grown is None:
                continue  # without a pool there is no peak to be read
            predicted = workspace_bytes(header.architecture, kind, setup.device, work)
            cells = {"": f"{size}, {name}", "predicted": predicted, "measured": grown}
            yield Row(WORK, {**cells, "ratio": f"{grown / predicted:.2f}", "s": took_s})
    del whisper  # or its handles would stay on the card
    cache.evict(path)
    evicted = heard.until(ModelEvicted)
    after = card.held()
    weights = weights_bytes(header, kind, setup.device)
    left = difference(after.reserved_bytes, before.reserved_bytes)
    gauge_left = after.gauge_bytes - before.gauge_bytes
    # The gauge counts only without a pool: it moves with other programs.
    seen_left = gauge_left if left is None else left
    cells = {
        "": size,
        "weights": weights,
        "predicted": loaded.charged_bytes,
        "measured": loaded.measured_bytes,
        "load, s": loaded.load_s,
        "returned": evicted.returned_bytes,
        "pool": difference(there.used_bytes, before.used_bytes),
        "left, pool": left,
        "gauge": there.gauge_bytes - before.gauge_bytes,
        "left, gauge": gauge_left,
        "share returned": share(weights, evicted.returned_bytes, seen_left),
    }
    yield Row(BYTES, cells)


def _grown(
    card: Card, there: Held, whisper: WhisperModel, work: Workload
) -> tuple[int | None, float]:
    """
    Returns the bytes of the pool that a call took at its peak beside those that were
    *there*, and its seconds.
    """
    card.driver.forget_peak(card.ordinal)
    started_s = time.perf_counter()
    _work(whisper, work)
    took_s = time.perf_counter() - started_s
    return difference(card.held().peak_bytes, there.used_bytes), took_s


def difference(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one - other


def share(weights: int, returned: int | None, left: int) -> float:
    """
    Returns the smallest share of the weights that was seen to return, at most 1.
    """
    shares = [1.0, 1 - max(0, left) / weights]
    return min(shares if returned is None else [*shares, returned / weights])


def workloads(batch: int) -> dict[str, Workload]:
    return {
        "beam 1": Workload(1, 1, 1, fallback=False),
        "beam 5": Workload(5, 1, 1, fallback=False),
        f"beam 1, batch {batch}": Workload(1, 1, batch, fallback=False),
        f"beam 5, batch {batch}": Workload(5, 1, batch, fallback=False),
        "temperature 0.2, best of 5": Workload(5, 5, 1, fallback=True),
    }


def _work(whisper: WhisperModel, work: Workload) -> None:
    """
    Transcribes as many windows as a batch has, each with the longest possible text.

    The end of the text is suppressed, and faster-whisper has no reason to try again. A
    text is half of what the decoder holds. The other half is a prompt, such as the text
    before makes one.
    """
    from faster_whisper import BatchedInferencePipeline

    end = whisper.hf_tokenizer.token_to_id("<|endoftext|>")
    options = {
        "language": "en",
        "beam_size": work.beam_size,
        "best_of": work.best_of,
        "temperature": 0.2 if work.fallback else 0.0,
        "suppress_tokens": [-1, end],
        "initial_prompt": "x " * TEXT_POSITIONS,
        "without_timestamps": True,
        "compression_ratio_threshold": None,
        "log_prob_threshold": None,
        "no_speech_threshold": None,
        "condition_on_previous_text": False,
    }
    if work.batch_size == 1:
        segments, _ = whisper.transcribe(noise(), **options)
    else:
        clips = [{"start": n, "end": n + 1} for n in range(work.batch_size)]
        segments, _ = BatchedInferencePipeline(whisper).transcribe(
            noise(work.batch_size),
            batch_size=work.batch_size,
            clip_timestamps=clips,
            vad_filter=False,
            **options,
        )
    for _ in segments:
        pass


def cycles(setup: Setup, _argument: str) -> Rows:
    card, path = Card(setup.device), setup.model(setup.nearest("tiny"))
    with plain_cache() as cache:
        for number in range(setup.cycles):
            cache.preload(path, setup.device, "float16")
            loaded = card.held()
            cache.evict(path)
            left = card.held()
            cells = {
                "cycle": str(number),
                "pool, loaded": loaded.reserved_bytes,
                "pool, left": left.reserved_bytes,
                "gauge, loaded": loaded.gauge_bytes,
                "gauge, left": left.gauge_bytes,
                "host": anonymous_bytes() or 0,
            }
            yield Row(CYCLES, cells)
