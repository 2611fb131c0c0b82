"""
The parts of `gpu.py` that one process measures alone, but for `gpu_tiers`.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from gpu_card import Card
from gpu_records import Cycle, Look, Machine, Size, WarmUp, Work

import whispercache
from whispercache import ModelCache
from whispercache.devices.host import anonymous_bytes, cpu_name, host_room
from whispercache.devices.nvml import driver_version
from whispercache.devices.probe import SystemProbe
from whispercache.engine.process import versions
from whispercache.engine.sizes.architecture import TEXT_POSITIONS
from whispercache.engine.sizes.footprint import (
    Workload,
    read_header,
    weights_bytes,
    workspace_bytes,
)
from whispercache.errors import DeviceUnavailable, WhisperCacheError, format_bytes
from whispercache.events import (
    DeviceWarmedUp,
    DeviceWarmingUp,
    ModelEvicted,
    ModelLoaded,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from faster_whisper import WhisperModel
    from gpu_records import Record
    from gpu_run import Setup
    from numpy.typing import NDArray

    from whispercache.events import Event

__all__ = [
    "Heard",
    "cycles",
    "look",
    "machine",
    "noise",
    "plain_cache",
    "say",
    "sizes",
    "warm_up",
]

E = TypeVar("E", bound="Event")

SAMPLE_RATE = 16_000


class Heard:
    """
    The events of a cache, in order.
    """

    def __init__(self, cache: ModelCache) -> None:
        self._events: SimpleQueue[Event] = SimpleQueue()
        cache.subscribe(self._events.put)

    def until(self, kind: type[E], timeout_s: float = 120.0) -> E:
        """
        The next event of that kind; those before it are passed over.

        Raises:
            queue.Empty: none came in time.
        """
        while True:
            event = self._events.get(timeout=timeout_s)
            if isinstance(event, kind):
                return event

    def all_of(self, kind: type[E]) -> list[E]:
        """
        Those of that kind that have come; all that have come are gone then.
        """
        found = []
        while not self._events.empty():
            event = self._events.get()
            if isinstance(event, kind):
                found.append(event)
        return found


def noise(seconds: float = 1.0) -> NDArray[np.float32]:
    """
    Audio that has something in it.
    """
    import numpy as np

    random = np.random.default_rng(0)
    return random.standard_normal(int(seconds * SAMPLE_RATE), np.float32) * 0.01


def say(whisper: WhisperModel) -> str:
    """
    What a model answers to `noise`, with one beam.
    """
    segments, _ = whisper.transcribe(
        noise(), language="en", beam_size=1, temperature=0.0, without_timestamps=True
    )
    return "".join(segment.text for segment in segments)


def plain_cache(*, park: bool = False, variants: bool = False) -> ModelCache:
    """
    A cache that lets no model go by itself, and loads their own files.
    """
    return ModelCache(park=park, variants=variants, keep_alive=-1)


# The machine -------------------------------------------------------------------------


def look(setup: Setup, argument: str) -> Iterator[Record]:
    """
    Whether there is a card, and what keeps us from it.
    """
    del argument
    import ctranslate2

    probe = SystemProbe()
    cards = ctranslate2.get_cuda_device_count()
    try:
        probe.read(setup.device)
        name = probe.device_name(setup.device)
    except DeviceUnavailable as error:
        yield Look("", cards, str(error))
        return
    problem = "" if cards else "CTranslate2 sees no card; it may be built without CUDA"
    yield Look(name, cards, problem)


def machine(setup: Setup, argument: str) -> Iterator[Record]:
    """
    What the machine is, and its rates between host and card.
    """
    del argument
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
        yield Machine(name, value)
    n_bytes = min(setup.crossing_bytes, reading.free_bytes // 4)
    yield from card.crossings(n_bytes)


# Warm-up -----------------------------------------------------------------------------


def warm_up(setup: Setup, argument: str) -> Iterator[Record]:
    """
    The first load of a process, and its first answer.
    """
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
    yield WarmUp(
        process=argument,
        warm_up_s=warmed.warm_up_s,
        load_s=loaded.load_s,
        answer_s=answer_s,
        floor_bytes=warmed.floor_bytes,
        kernels_bytes=sum(file.stat().st_size for file in kernels),
        reason=reason,
    )


# Bytes -------------------------------------------------------------------------------


def sizes(setup: Setup, argument: str) -> Iterator[Record]:
    """
    Each size, loaded, used in several ways, and unloaded.
    """
    del argument
    card = Card(setup.device)
    with plain_cache() as cache:
        heard = Heard(cache)
        first = setup.model(setup.sizes[0])
        cache.preload(first, setup.device, "float16")  # what comes once is over then
        cache.evict(first)
        heard.until(ModelEvicted)
        for size in setup.sizes:
            try:
                yield from _size(setup, card, cache, heard, size)
            except (WhisperCacheError, RuntimeError) as error:
                yield Size(size, "float16", error=str(error))


def _size(
    setup: Setup, card: Card, cache: ModelCache, heard: Heard, size: str
) -> Iterator[Record]:
    path, kind = setup.model(size), "float16"
    header = read_header(str(path))
    before = card.held()
    with cache.lease(path, setup.device, kind) as whisper:
        loaded = heard.until(ModelLoaded)
        there = card.held()
        for name, work in workloads(setup.batch).items():
            card.driver.forget_peak(card.ordinal)
            started_s = time.perf_counter()
            _work(whisper, work)
            took_s = time.perf_counter() - started_s
            held = card.held()
            if held.peak_bytes is None or there.used_bytes is None:
                continue  # without a pool there is no peak to be read
            predicted = workspace_bytes(header.architecture, kind, setup.device, work)
            grown = held.peak_bytes - there.used_bytes
            yield Work(size, kind, name, predicted, grown, took_s)
    del whisper  # or its handles would stay on the card
    cache.evict(path)
    evicted = heard.until(ModelEvicted)
    after = card.held()
    yield Size(
        size,
        kind,
        weights_bytes=weights_bytes(header, kind, setup.device),
        predicted_bytes=loaded.charged_bytes,
        measured_bytes=loaded.measured_bytes,
        load_s=loaded.load_s,
        returned_bytes=evicted.returned_bytes,
        pool_bytes=_difference(there.used_bytes, before.used_bytes),
        pool_left_bytes=_difference(after.reserved_bytes, before.reserved_bytes),
        gauge_bytes=there.gauge_bytes - before.gauge_bytes,
        gauge_left_bytes=after.gauge_bytes - before.gauge_bytes,
    )


def workloads(batch: int) -> dict[str, Workload]:
    """
    What is measured, by name.
    """
    return {
        "beam 1": Workload(1, 1, 1, fallback=False),
        "beam 5": Workload(5, 1, 1, fallback=False),
        f"beam 1, batch {batch}": Workload(1, 1, batch, fallback=False),
        f"beam 5, batch {batch}": Workload(5, 1, batch, fallback=False),
        "temperature 0.2, best of 5": Workload(5, 5, 1, fallback=True),
    }


def _work(whisper: WhisperModel, work: Workload) -> None:
    """
    Transcribe as many windows as there are in a batch, each with the longest text.

    The end of the text is suppressed, and nothing makes faster-whisper try again. A
    text is half of what the decoder holds; a prompt, as the text before makes one, is
    the other half.
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


def _difference(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one - other


def cycles(setup: Setup, argument: str) -> Iterator[Record]:
    """
    Many loads and unloads of the smallest model.
    """
    del argument
    card, path = Card(setup.device), setup.model(setup.nearest("tiny"))
    with plain_cache() as cache:
        for number in range(setup.cycles):
            cache.preload(path, setup.device, "float16")
            loaded = card.held()
            cache.evict(path)
            left = card.held()
            yield Cycle(number, loaded, left, anonymous_bytes() or 0)
