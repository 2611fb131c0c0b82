"""
The part of `gpu.py` that times every way of a model into a card and out of it.
"""

from __future__ import annotations

import gc
import itertools
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from gpu_card import Card
from gpu_parts import Heard, plain_cache
from gpu_records import Tier
from page import make_cold, read

from whispercache.engine.process import versions
from whispercache.engine.sizes.footprint import read_header, weights_bytes
from whispercache.engine.variants.convert import Origin, kind_for
from whispercache.engine.variants.store import Variants
from whispercache.errors import WhisperCacheError
from whispercache.events import ModelEvicted, ModelLoaded
from whispercache.options import DEFAULT_VARIANTS_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gpu_records import Record
    from gpu_run import Setup

    from whispercache import ModelCache

__all__ = [
    "CONSTRUCT",
    "COPY",
    "LEAVE",
    "PAGEABLE",
    "RESTORE",
    "WARM",
    "prepare",
    "tiers",
]

TYPES = ("float16", "int8_float16")

COLD = "load, files not in the page cache"
WARM = "load, files in the page cache"
VARIANT = "load, its variant in the page cache"
CONSTRUCT = "WhisperModel(), files in the page cache"
LEAVE = "eviction, no copy"
COPY = "eviction that makes the copy"
LEAVE_AGAIN = "eviction, the copy is there"
RESTORE = "restore from the copy"
PAGEABLE = "the card's own copy of these bytes from pageable memory"
PINNED = "the same from pinned memory"
"""
Ways into a card and out of it.
"""


class _Caches(NamedTuple):
    """
    The caches that models go through, each with its events.

    Attributes:
        plain: Keeps nothing of what leaves.
        parking: Keeps copies.
        varying: Loads variants.
    """

    plain: tuple[ModelCache, Heard]
    parking: tuple[ModelCache, Heard]
    varying: tuple[ModelCache, Heard]


@dataclass(frozen=True, slots=True)
class _Model:
    """
    A model in one type, and what is to be done with it.
    """

    setup: Setup
    card: Card
    caches: _Caches
    tier: Tier

    @property
    def path(self) -> Path:
        return self.setup.model(self.tier.size)

    def timed(self, step: str, seconds: list[float], error: str = "") -> Tier:
        return replace(self.tier, step=step, seconds=tuple(seconds), error=error)

    def in_and_out(
        self, through: tuple[ModelCache, Heard]
    ) -> tuple[ModelLoaded, ModelEvicted]:
        """
        Load it, and let it leave by the cache's own choice: what a caller sends away
        leaves no copy.
        """
        cache, heard = through
        kind = self.tier.compute_type
        cache.lease(self.path, self.setup.device, kind, keep_alive=0).release()
        return heard.until(ModelLoaded), heard.until(ModelEvicted)


def tiers(setup: Setup, argument: str) -> Iterator[Record]:
    """
    A small and a large model, in two types, into the card and out of it in every way.
    """
    del argument
    card = Card(setup.device)
    chosen = dict.fromkeys(map(setup.nearest, ("small", "large-v3")))
    ways = (_loads, _copies, _variants, _constructions, _crossings)
    with (
        plain_cache() as plain,
        plain_cache(park=True) as parking,
        plain_cache(variants=True) as varying,
    ):
        caches = _Caches(*((each, Heard(each)) for each in (plain, parking, varying)))
        # Float16 first: an error of the other may leave the card unusable.
        for kind, size in itertools.product(TYPES, chosen):
            header = read_header(str(setup.model(size)))
            n_bytes = weights_bytes(header, kind, setup.device)
            model = _Model(setup, card, caches, Tier(size, kind, "", (), n_bytes))
            for way in ways:
                try:
                    yield from way(model)
                except (WhisperCacheError, RuntimeError) as error:
                    yield model.timed(way.__name__[1:], [], str(error))


def prepare(model: Path, *, cold: bool = False) -> None:
    """
    Put a model's files into the page cache, or out of it.

    Raises:
        RuntimeError: they stay there, as on a file system in memory.
    """
    files = [file for file in model.iterdir() if file.is_file()]
    if cold:
        make_cold(files)
        return
    for file in files:
        read(file)


def _loads(model: _Model) -> Iterator[Tier]:
    """
    Loads by a cache, from files in the page cache and not, and evictions.
    """
    seconds: dict[str, list[float]] = {WARM: [], COLD: [], LEAVE: []}
    problem = ""
    for _ in range(model.setup.rounds):
        for step in (WARM, COLD):
            try:
                prepare(model.path, cold=step == COLD)
            except RuntimeError as error:
                problem = str(error)
                continue
            loaded, evicted = model.in_and_out(model.caches.plain)
            seconds[step].append(loaded.load_s)
            seconds[LEAVE].append(evicted.unload_s)
    for step, each in seconds.items():
        yield model.timed(step, each, problem if step == COLD else "")


def _copies(model: _Model) -> Iterator[Tier]:
    """
    Evictions that leave a copy on the host, and restores from it.

    Raises:
        RuntimeError: no copy was kept.
    """
    seconds: dict[str, list[float]] = {COPY: [], RESTORE: [], LEAVE_AGAIN: []}
    prepare(model.path)
    for number in range(model.setup.rounds + 2):
        loaded, evicted = model.in_and_out(model.caches.parking)
        if not evicted.parked or loaded.restored != (number > 0):
            raise RuntimeError("no copy of it was kept; has the host room for one?")
        if loaded.restored:
            seconds[RESTORE].append(loaded.load_s)
        seconds[LEAVE_AGAIN if loaded.restored else COPY].append(evicted.unload_s)
    for step, each in seconds.items():
        yield model.timed(step, each)


def _variants(model: _Model) -> Iterator[Tier]:
    """
    Loads from a variant, where the type has one.

    Raises:
        RuntimeError: it was not used.
    """
    header = read_header(str(model.path))
    kind = kind_for(header, model.tier.compute_type)
    if kind is None:
        return
    engine = f"CTranslate2 {versions()['CTranslate2']}"
    variants = Variants(engine, DEFAULT_VARIANTS_BYTES)
    variant = variants.build(Origin(str(model.path), header), kind)
    seconds = []
    for _ in range(model.setup.rounds):
        prepare(variant)
        loaded, _ = model.in_and_out(model.caches.varying)
        if not loaded.from_variant:
            raise RuntimeError("the variant was not loaded")
        seconds.append(loaded.load_s)
    yield model.timed(VARIANT, seconds)


def _constructions(model: _Model) -> Iterator[Tier]:
    """
    The same model by faster-whisper alone.
    """
    from faster_whisper import WhisperModel

    card, seconds = model.card, []
    for _ in range(model.setup.rounds):
        prepare(model.path)
        started_s = time.perf_counter()
        whisper = WhisperModel(
            str(model.path),
            device="cuda",
            device_index=card.ordinal,
            compute_type=model.tier.compute_type,
        )
        card.driver.synchronize(card.ordinal)
        seconds.append(time.perf_counter() - started_s)
        del whisper
        gc.collect()
    yield model.timed(CONSTRUCT, seconds)


def _crossings(model: _Model) -> Iterator[Tier]:
    """
    The same bytes by the driver alone.
    """
    steps = {"pageable": PAGEABLE, "pinned": PINNED}
    n_bytes, rounds = model.tier.n_bytes, model.setup.rounds
    for crossing in model.card.crossings(n_bytes, rounds, is_one_way=True):
        yield model.timed(steps[crossing.memory], [crossing.seconds])
