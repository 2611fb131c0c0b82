"""
Parts with something in the way: a full card, a second card, a process moved off it.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gpu.card import Card, Parking
from gpu.parts import Heard, noise, plain_cache, say
from gpu.run import ASIDE, Child, Row
from whispercache.devices.cuda import CudaError
from whispercache.engine.sizes.header import read_header
from whispercache.engine.sizes.weights import weights_bytes
from whispercache.errors import WhisperCacheError
from whispercache.events import EvictionCause, ModelEvicted, ModelLoaded, ModelLoading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpu.run import Rows, Setup
    from whispercache import ModelCache
    from whispercache.events import Event

_ANSWER_S = 120.0

# Tables.
FULL = "A card that another tenant fills"
PARKED = "A process with large-v3, parked by the driver from outside"
PAIR = "Two cards at the same time"


# Out of memory -----------------------------------------------------------------------


class _Trial(NamedTuple):
    case: str
    there: tuple[Path, ...]  # models that are loaded before
    leave_bytes: int  # by the other tenant
    is_call: bool  # it comes before a call; else after a load was admitted


def out_of_memory(setup: Setup, _argument: str) -> Rows:
    """
    Has another tenant take the card after a load was admitted, or before a call.
    """
    card = Card(setup.device)
    large, small = setup.nearest("large-v3"), setup.nearest("small")
    if large == small:
        small = setup.sizes[0]
    if large == small:
        raise RuntimeError("it takes two models; --sizes names one")
    idle, wanted = setup.model(large), setup.model(small)
    half_bytes = weights_bytes(read_header(str(wanted)), "float16", setup.device) // 2
    can, cannot = "an idle model can leave for it", "nothing can leave for it"
    trials = (
        _Trial(f"a load, {can}", (idle,), half_bytes, is_call=False),
        _Trial(f"a load, {cannot}", (), half_bytes, is_call=False),
        _Trial(f"a call, {can}", (idle, wanted), setup.full_bytes, is_call=True),
        _Trial(f"a call, {cannot}", (wanted,), setup.full_bytes, is_call=True),
    )
    with plain_cache() as cache:
        for trial in trials:
            yield _try(setup, card, trial, wanted, cache)


def _try(
    setup: Setup, card: Card, trial: _Trial, wanted: Path, cache: ModelCache
) -> Row:
    heard = Heard(cache)
    cache.preload(wanted, setup.device, "float16")  # from here on CUDA runs
    cache.evict()
    for path in trial.there:
        cache.preload(path, setup.device, "float16")
    heard.all_of(ModelEvicted)
    with _another_tenant(cache, card, trial.leave_bytes, at_once=trial.is_call):
        raised = _error_of(setup, trial, wanted, cache)
    gone = heard.all_of(ModelEvicted)
    after = _error_of(setup, trial, wanted, cache)
    cache.evict()
    held = card.held()
    idle_bytes = None
    if held.reserved_bytes is not None and held.used_bytes is not None:
        idle_bytes = held.reserved_bytes - held.used_bytes
    left = sum(each.cause is EvictionCause.OUT_OF_MEMORY for each in gone)
    cells = {
        "": trial.case,
        "evicted": str(left),
        "got it": not raised,
        "works after": not after,
        "idle in the pool": idle_bytes,
        "raised": raised or "nothing",
    }
    return Row(FULL, cells)


def _error_of(setup: Setup, trial: _Trial, wanted: Path, cache: ModelCache) -> str:
    """
    Returns the error that a load or a call ends with, or nothing.
    """
    try:
        if trial.is_call:
            model = cache.get_model(wanted, setup.device, "float16")
            segments, _ = model.transcribe(noise(), language="en", beam_size=1)
            list(segments)
        else:
            cache.preload(wanted, setup.device, "float16")
    except (WhisperCacheError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@contextmanager
def _another_tenant(
    cache: ModelCache, card: Card, leave_bytes: int, *, at_once: bool
) -> Iterator[None]:
    """
    Takes the card but for *leave_bytes*: now, or once the next load was admitted.
    """
    taken: list[int] = []

    def fill(event: Event) -> None:
        if isinstance(event, ModelLoading) and not taken:
            taken.extend(card.fill(leave_bytes))

    unsubscribe = cache.subscribe(fill)
    if at_once:
        taken += card.fill(leave_bytes)
    try:
        yield
    finally:
        unsubscribe()
        for address in taken:
            card.give_back(address)


# Two cards ---------------------------------------------------------------------------


def two_cards(setup: Setup, _argument: str) -> Rows:
    """
    Loads one model on each of two cards at the same time, and has both work.

    Illegal memory accesses were seen there (SYSTRAN/faster-whisper#946).
    """
    card = Card(setup.device)
    count = card.driver.device_count
    if count < 2:  # noqa: PLR2004 - two
        raise RuntimeError("not run: it takes two cards, CUDA sees one")
    devices, path = ("cuda:0", "cuda:1"), setup.model(setup.nearest("small"))
    with plain_cache() as cache:
        heard = Heard(cache)
        alone: dict[str, tuple[float, str]] = {}
        for device in devices:
            cache.preload(path, device, "float16")  # warms the card up
            cache.evict(path)
            with cache.lease(path, device, "float16") as whisper:
                text = say(whisper)
            alone[device] = heard.all_of(ModelLoaded)[-1].load_s, text
            cache.evict(path)
        start = threading.Barrier(len(devices))

        def work(device: str) -> dict[str, object]:
            start.wait(_ANSWER_S)
            with cache.lease(path, device, "float16") as whisper:
                texts = [say(whisper) for _ in range(setup.answers)]
            load_s, text = alone[device]
            differing = sum(each != text for each in texts)
            counts = {"answers": str(len(texts)), "differing": str(differing)}
            return {"": device, "load alone, s": load_s, **counts}

        with ThreadPoolExecutor(len(devices)) as pool:
            pairs = list(pool.map(work, devices))
        seconds = {e.key.device: e.load_s for e in heard.all_of(ModelLoaded)}
        for pair in pairs:
            device = str(pair.pop(""))
            yield Row(PAIR, {"": device, "load, s": seconds[device], **pair})


# Parked from outside -----------------------------------------------------------------


def checkpoint(setup: Setup, _argument: str) -> Rows:
    """
    Moves a process with a large model off the card and back.

    It is done by this user, and by one without privileges.
    """
    failed = []
    # One user where nobody else can be had.
    for user in dict.fromkeys((None, setup.nobody)):
        environment = {}
        if user is not None:
            home = _home_of(user, Path(setup.home), Path(setup.kernels))
            parts = {"CUDA_CACHE_PATH": "kernels", "XDG_CACHE_HOME": "cache"}
            environment = {name: str(home / part) for name, part in parts.items()}
        try:
            child = Child("parker", setup, user=user, environment=environment)
        except OSError as error:  # this Python may be out of another user's reach
            failed.append(f"as {_name(user)}: {error}")
            continue
        outcome = child.outcome()
        yield from outcome.rows
        if outcome.error:
            failed.append(f"as {_name(user)}: {outcome.error}")
    if failed:
        raise RuntimeError("; ".join(failed))


def _home_of(user: int, home: Path, kernels: Path) -> Path:
    """
    Makes caches that another user may write, with the kernels compiled so far.
    """
    own = home / f"of-{user}"
    if kernels.is_dir():
        shutil.copytree(kernels, own / "kernels", dirs_exist_ok=True)
    (own / "cache").mkdir(parents=True, exist_ok=True)
    for path in (own, *own.rglob("*")):
        os.chown(path, user, -1)
    return own


def _name(user: int | None) -> str:
    return str(os.geteuid() if user is None else user)


def parker(setup: Setup, _argument: str) -> Rows:
    """
    Starts a process with a model, moves it off the card and back, and asks it again.
    """
    card = Card(setup.device)
    before_bytes = card.gauge_bytes()
    child = Child("holder", setup)
    answers = child.rows()

    def step(name: str, call: Callable[[], object]) -> Row:
        started_s = time.perf_counter()
        try:
            problem = str(call() or "")
        except (RuntimeError, OSError) as error:  # or the process did not survive it
            problem = str(error)
        took_s = time.perf_counter() - started_s
        cells = {
            "": f"user {_name(None)}: {name}",
            "s": took_s,
            "state after": _state_of(parking),
            "on the card": card.gauge_bytes() - before_bytes,
            "on the host": _resident_bytes(child.pid),
            "problem": problem or "none",
        }
        return Row(PARKED, cells)

    try:
        first = _next_answer(child, answers)
        parking = Parking(child.pid)

        def ask_again() -> str:
            child.go_on()
            return "" if _next_answer(child, answers) == first else "another answer"

        yield step("before", str)
        for name, call in (
            ("lock", parking.lock),
            ("checkpoint", parking.checkpoint),
            ("restore", parking.restore),
            ("unlock", parking.unlock),
            ("answer", ask_again),
        ):
            done = step(name, call)
            yield done
            if done.cells["problem"] != "none":
                break
    finally:
        child.end()


def _next_answer(child: Child, answers: Rows) -> str:
    # One that never comes is ended by the time limit of the part.
    for answer in answers:
        return str(answer.cells["text"])
    raise RuntimeError(f"the process with the model failed: {child.end()}")


def _state_of(parking: Parking) -> str:
    try:
        return parking.state()
    except CudaError as error:
        return str(error)


def _resident_bytes(pid: int) -> int:
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # a process that has ended has none
        return 0


def holder(setup: Setup, _argument: str) -> Rows:
    """
    Holds a large model; answers once, and once more for each line that it reads.
    """
    path = setup.model(setup.nearest("large-v3"))
    with plain_cache() as cache, cache.lease(path, setup.device, "float16") as whisper:
        yield Row(ASIDE, {"text": say(whisper)})
        for _ in sys.stdin:
            yield Row(ASIDE, {"text": say(whisper)})
