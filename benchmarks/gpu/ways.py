"""
Parts about seconds: every way into a card and out of it, switches, exits.
"""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from page_cache import make_cold, read

from gpu.card import Card
from gpu.parts import Heard, plain_cache, say
from gpu.run import ASIDE, Row, cells_of, spawn
from whispercache import ModelCache, Workload
from whispercache.engine.process import versions
from whispercache.engine.sizes.header import read_header
from whispercache.engine.sizes.weights import weights_bytes
from whispercache.engine.variants.convert import Origin, kind_for
from whispercache.engine.variants.store import Variants
from whispercache.errors import WhisperCacheError
from whispercache.events import ModelEvicted, ModelLoaded
from whispercache.options import DEFAULT_VARIANTS_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from faster_whisper import WhisperModel

    from gpu.run import Rows, Setup

TYPES = ("float16", "int8_float16")

# Tables. Those of switches are shown in another form.
TIERS = "Into the card and out of it"
SWITCHES = "Switches"
PEAKS = "Peaks of switches"
EXITS = "Ends of programs that used tiny"

# Ways into a card and out of it.
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

CONTENDERS = PARKS, CACHE, LRU_CACHE, EACH_TIME = (
    "whispercache, copies on the host",
    "whispercache",
    "lru_cache(maxsize=1)",
    "construct each time",
)
WORK = Workload(beam_size=1, fallback=False)
# The limit, as a multiple of what the larger model needs.
SPARE = 1.05

PROGRAMS = CLOSES, LEAVES, PLAIN = (
    "cache, with close()",
    "cache, without",
    "WhisperModel alone",
)

# Objects that live until the interpreter ends.
_kept: list[object] = []


# Into a card and out of it -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Model:
    """
    A model in one type, and the caches that it goes through, each with its events.
    """

    setup: Setup
    card: Card
    caches: dict[str, tuple[ModelCache, Heard]]
    size: str
    kind: str
    n_bytes: int  # of the weights as they lie on the card

    @property
    def path(self) -> Path:
        return self.setup.model(self.size)

    def timed(self, step: str, seconds: list[float], problem: str = "") -> Row:
        cells = {
            "": f"{self.size} {self.kind}: {step}",
            "median, s": statistics.median(seconds) if seconds else None,
            "each, s": ", ".join(f"{each:.3f}" for each in seconds),
            "bytes": self.n_bytes,
            "problem": problem or "none",
        }
        return Row(TIERS, cells)

    def in_and_out(self, through: str) -> tuple[ModelLoaded, ModelEvicted]:
        """
        Loads it and has the cache itself evict it: an explicit eviction keeps no copy.
        """
        cache, heard = self.caches[through]
        device = self.setup.device
        cache.lease(self.path, device, self.kind, keep_alive=0).release()
        return heard.until(ModelLoaded), heard.until(ModelEvicted)


def tiers(setup: Setup, _argument: str) -> Rows:
    """
    Takes a small and a large model, in two types, every way in and out.
    """
    card = Card(setup.device)
    chosen = dict.fromkeys(map(setup.nearest, ("small", "large-v3")))
    ways = (_loads, _copies, _variants, _constructions, _crossings)
    with (
        plain_cache() as plain,
        plain_cache(park=True) as parking,
        plain_cache(variants=True) as varying,
    ):
        named = {"plain": plain, "parking": parking, "varying": varying}
        caches = {name: (cache, Heard(cache)) for name, cache in named.items()}
        # Float16 first: an error of the other may leave the card unusable.
        for kind, size in itertools.product(TYPES, chosen):
            header = read_header(str(setup.model(size)))
            n_bytes = weights_bytes(header, kind, setup.device)
            model = _Model(setup, card, caches, size, kind, n_bytes)
            for way in ways:
                try:
                    yield from way(model)
                except (WhisperCacheError, RuntimeError) as error:
                    yield model.timed(way.__name__[1:], [], str(error))


def prepare(model: Path, *, cold: bool = False) -> None:
    """
    Puts a model's files into the page cache, or out of it.
    """
    files = [file for file in model.iterdir() if file.is_file()]
    if cold:
        make_cold(files)
        return
    for file in files:
        read(file)


def _loads(model: _Model) -> Rows:
    seconds: dict[str, list[float]] = {WARM: [], COLD: [], LEAVE: []}
    problem = ""
    for step in (WARM, COLD) * model.setup.rounds:
        try:
            prepare(model.path, cold=step == COLD)
        except RuntimeError as error:
            problem = str(error)
            continue
        loaded, evicted = model.in_and_out("plain")
        seconds[step].append(loaded.load_s)
        seconds[LEAVE].append(evicted.unload_s)
    for step, each in seconds.items():
        yield model.timed(step, each, problem if step == COLD else "")


def _copies(model: _Model) -> Rows:
    """
    Times evictions that keep a host copy, and restores from it.
    """
    seconds: dict[str, list[float]] = {COPY: [], RESTORE: [], LEAVE_AGAIN: []}
    prepare(model.path)
    for number in range(model.setup.rounds + 2):
        loaded, evicted = model.in_and_out("parking")
        if not evicted.parked or loaded.restored != (number > 0):
            raise RuntimeError("no copy of it was kept; has the host room for one?")
        if loaded.restored:
            seconds[RESTORE].append(loaded.load_s)
        seconds[LEAVE_AGAIN if loaded.restored else COPY].append(evicted.unload_s)
    for step, each in seconds.items():
        yield model.timed(step, each)


def _variants(model: _Model) -> Rows:
    """
    Times loads from a variant, where the type has one.
    """
    header = read_header(str(model.path))
    kind = kind_for(header, model.kind)
    if kind is None:
        return
    engine = f"CTranslate2 {versions()['CTranslate2']}"
    variants = Variants(engine, DEFAULT_VARIANTS_BYTES)
    variant = variants.build(Origin(str(model.path), header), kind)
    seconds = []
    for _ in range(model.setup.rounds):
        prepare(variant)
        loaded, _ = model.in_and_out("varying")
        if not loaded.from_variant:
            raise RuntimeError("the variant was not loaded")
        seconds.append(loaded.load_s)
    yield model.timed(VARIANT, seconds)


def _constructions(model: _Model) -> Rows:
    card, seconds = model.card, []
    for _ in range(model.setup.rounds):
        prepare(model.path)
        started_s = time.perf_counter()
        whisper = _load(model.path, model.setup.device, model.kind)
        card.driver.synchronize(card.ordinal)
        seconds.append(time.perf_counter() - started_s)
        del whisper
        gc.collect()
    yield model.timed(CONSTRUCT, seconds)


def _crossings(model: _Model) -> Rows:
    steps = {"pageable": PAGEABLE, "pinned": PINNED}
    n_bytes, rounds = model.n_bytes, model.setup.rounds
    for crossing in model.card.crossings(n_bytes, rounds, is_one_way=True):
        yield model.timed(steps[crossing.memory], [crossing.seconds])


def _load(path: Path, device: str, compute_type: str) -> WhisperModel:
    from faster_whisper import WhisperModel

    kind, _, index = device.partition(":")
    return WhisperModel(
        str(path), device=kind, device_index=int(index or 0), compute_type=compute_type
    )


# Switches ----------------------------------------------------------------------------


def switch(setup: Setup, argument: str) -> Rows:
    """
    Has each contender switch A, B, A, B, … in processes of its own.

    Their order changes from turn to turn. A second turn is taken only if *argument*,
    the seconds that there are, allows one as long as the first: a turn that is cut off
    gives no figure.
    """
    if setup.nearest("large-v3") == setup.nearest("medium"):
        raise RuntimeError("it takes two models to switch between; --sizes names one")
    failed = []
    started_s = time.monotonic()
    for turn in range(setup.turns):
        took_s = time.monotonic() - started_s
        if turn and took_s + took_s / turn > float(argument):
            break
        start = turn * len(CONTENDERS) // setup.turns
        for contender in CONTENDERS[start:] + CONTENDERS[:start]:
            outcome = spawn("switcher", setup, f"{turn} {contender}")
            yield from outcome.rows
            if outcome.error:
                failed.append(f"{contender}: {outcome.error}")
    if failed:
        raise RuntimeError("; ".join(failed))


def switcher(setup: Setup, argument: str) -> Rows:
    number, _, contender = argument.partition(" ")
    turn = int(number)
    names = [setup.nearest(size) for size in ("large-v3", "medium")]
    card = Card(setup.device)
    limit_bytes = _limit_bytes(setup, names)
    use = _user(contender, setup, limit_bytes)
    peak_bytes, before_bytes = 0, card.gauge_bytes()
    for place in range(setup.switches):
        to = names[place % 2]
        prepare(setup.model(to))
        if place == len(names):
            card.driver.forget_peak(card.ordinal)  # that of the warm-up
        started_s = time.perf_counter()
        answer = use(to)
        ready_s = time.perf_counter() - started_s
        answer()
        answer_s = time.perf_counter() - started_s
        del answer
        peak_bytes = max(peak_bytes, card.gauge_bytes() - before_bytes)
        times = {"ready, s": ready_s, "answer, s": answer_s}
        cells = {"": contender, "turn": str(turn), "number": str(place), "to": to}
        yield Row(SWITCHES, cells | times)
    keeps_to = limit_bytes if contender in (CACHE, PARKS) else 0
    peaks = {"pool": card.held().peak_bytes, "gauge": peak_bytes, "limit": keeps_to}
    yield Row(PEAKS, {"": contender, "turn": str(turn), **peaks})


def _limit_bytes(setup: Setup, names: list[str]) -> int:
    """
    Returns a limit that holds either model and the work of one greedy call.
    """
    with plain_cache() as cache:
        asked = [
            cache.explain(setup.model(name), setup.device, "float16", workload=WORK)
            for name in names
        ]
    return int(SPARE * max(each.needed_bytes for each in asked))


def _user(
    contender: str, setup: Setup, limit_bytes: int
) -> Callable[[str], Callable[[], str]]:
    versions()  # imports CTranslate2 the cache's way
    if contender in (CACHE, PARKS):
        cache = ModelCache(
            vram=limit_bytes,
            max_models=1,
            park=contender == PARKS,
            variants=False,
            keep_alive=-1,
        )

        def lease(name: str) -> Callable[[], str]:
            path = setup.model(name)
            held = cache.lease(path, setup.device, "float16", workload=WORK)

            def answer() -> str:
                with held as whisper:
                    return say(whisper)

            return answer

        return lease

    def load(name: str) -> WhisperModel:
        return _load(setup.model(name), setup.device, "float16")

    if contender == LRU_CACHE:
        cached = functools.lru_cache(maxsize=1)(load)
        return lambda name: functools.partial(say, cached(name))
    held_models: list[WhisperModel] = []

    def construct(name: str) -> Callable[[], str]:
        held_models.clear()
        held_models.append(load(name))
        return lambda: say(held_models[0])

    return construct


# Exits -------------------------------------------------------------------------------


def exits(setup: Setup, _argument: str) -> Rows:
    """
    Times the ends of programs with a small model, on the card and beside it.
    """
    failed = []
    for device in filter(None, (setup.device, setup.beside)):
        for program in PROGRAMS:
            outcome = spawn("exit program", setup, f"{device} {program}")
            last = cells_of(outcome.rows, ASIDE)
            if not last:
                failed.append(f"{program} on {device}: {outcome.error}")
                continue
            cells = {
                "": f"{device}: {program}",
                "last line to end, s": outcome.ended_s - last[0]["at_s"],
                "start to end, s": outcome.ended_s - outcome.started_s,
                "exit code": str(outcome.code),
            }
            yield Row(EXITS, cells)
    if failed:
        raise RuntimeError("; ".join(failed))


def exit_program(setup: Setup, argument: str) -> Rows:
    device, _, program = argument.partition(" ")
    path = setup.model(setup.nearest("tiny"))
    if program == PLAIN:
        kind = "float32" if device == "cpu" else "float16"
        whisper = _load(path, device, kind)
        _kept.append(whisper)
        say(whisper)
    else:
        cache = plain_cache()
        _kept.append(cache)
        with cache.lease(path, device) as whisper:
            say(whisper)
        if program == CLOSES:
            del whisper  # in a program, no frame would refer to it any more
            cache.close()
    sys.stdout.flush()
    yield Row(ASIDE, {"at_s": time.monotonic()})
