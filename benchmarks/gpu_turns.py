"""
The parts of `gpu.py` that compare processes: switches between two models, and exits.
"""

from __future__ import annotations

import functools
import sys
import time
from typing import TYPE_CHECKING

from gpu_card import Card
from gpu_parts import plain_cache, say
from gpu_records import Exit, LastLine, Peak, Switch, of_type
from gpu_run import spawn
from gpu_tiers import prepare

from whispercache import ModelCache, Workload
from whispercache.engine.process import versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from faster_whisper import WhisperModel
    from gpu_records import Record
    from gpu_run import Setup

__all__ = ["CONTENDERS", "PROGRAMS", "exit_program", "exits", "switch", "switcher"]

CONTENDERS = PARKS, CACHE, LRU_CACHE, CONSTRUCT = (
    "whispercache, copies on the host",
    "whispercache",
    "lru_cache(maxsize=1)",
    "construct each time",
)
WORK = Workload(beam_size=1, fallback=False)
SPARE = 1.05
"""
How much more than the larger model the limit is.
"""

PROGRAMS = CLOSES, LEAVES, PLAIN = (
    "cache, with close()",
    "cache, without",
    "WhisperModel alone",
)

_kept: list[object] = []
"""
What is there until the interpreter ends.
"""


# Switches ----------------------------------------------------------------------------


def switch(setup: Setup, argument: str) -> Iterator[Record]:
    """
    A, B, A, B, … by each contender, each in processes of its own, in changing order;
    again, if that may take as long as before.

    Raises:
        RuntimeError: there are no two models, or a contender failed.
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
            yield from outcome.records
            if outcome.error:
                failed.append(f"{contender}: {outcome.error}")
    if failed:
        raise RuntimeError("; ".join(failed))


def switcher(setup: Setup, argument: str) -> Iterator[Record]:
    """
    One contender's turn.
    """
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
        yield Switch(contender, turn, place, to, ready_s, answer_s)
    keeps_to = limit_bytes if contender in (CACHE, PARKS) else 0
    yield Peak(contender, turn, card.held().peak_bytes, peak_bytes, keeps_to)


def _limit_bytes(setup: Setup, names: list[str]) -> int:
    """
    A limit that holds either model and the work of one greedy call.
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
    """
    What makes a model usable; it returns what has it answer once.
    """
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
    load = functools.partial(_load, setup)
    if contender == LRU_CACHE:
        cached = functools.lru_cache(maxsize=1)(load)
        return lambda name: functools.partial(say, cached(name))
    held_models: list[WhisperModel] = []

    def construct(name: str) -> Callable[[], str]:
        held_models.clear()
        held_models.append(load(name))
        return lambda: say(held_models[0])

    return construct


def _load(setup: Setup, name: str, device: str = "") -> WhisperModel:
    """
    A model by faster-whisper alone.
    """
    from faster_whisper import WhisperModel

    kind, _, index = (device or setup.device).partition(":")
    return WhisperModel(
        str(setup.model(name)),
        device=kind,
        device_index=int(index or 0),
        compute_type="float16" if kind == "cuda" else "float32",
    )


# Exits -------------------------------------------------------------------------------


def exits(setup: Setup, argument: str) -> Iterator[Record]:
    """
    How long programs with a small model take to end, on the card and beside it.

    Raises:
        RuntimeError: one failed before its last line.
    """
    del argument
    failed = []
    for device in filter(None, (setup.device, setup.beside)):
        for program in PROGRAMS:
            outcome = spawn("exit program", setup, f"{device} {program}")
            last = of_type(outcome.records, LastLine)
            if not last:
                failed.append(f"{program} on {device}: {outcome.error}")
                continue
            yield Exit(
                device,
                program,
                whole_s=outcome.ended_s - outcome.started_s,
                exit_s=outcome.ended_s - last[0].at_s,
                code=outcome.code,
            )
    if failed:
        raise RuntimeError("; ".join(failed))


def exit_program(setup: Setup, argument: str) -> Iterator[Record]:
    """
    A program that answers once, and ends.
    """
    device, _, program = argument.partition(" ")
    size = setup.nearest("tiny")
    if program == PLAIN:
        whisper = _load(setup, size, device)
        _kept.append(whisper)
        say(whisper)
    else:
        cache = plain_cache()
        _kept.append(cache)
        with cache.lease(setup.model(size), device) as whisper:
            say(whisper)
        if program == CLOSES:
            # What this function still refers to would not be there in a program.
            del whisper
            cache.close()
    sys.stdout.flush()
    yield LastLine(time.monotonic())
