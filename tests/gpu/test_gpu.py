"""
On a real card: the real driver, the real CTranslate2, models of random weights.

Skipped where there is none. Models are written to the directory that the variable
WHISPERCACHE_GPU_MODELS names, or found there; else to one of the tests. Where the fake
drivers are in the card's place, as in
test_gpu_benchmark.py, the same tests run over CTranslate2's stand-in and micro models:
that tests these tests.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import pytest
from fakes import GIB, MIB
from gpu import command, pretend
from gpu.card import Card
from gpu.parts import Heard, look, noise, plain_cache, say
from gpu.report import LEAST_RETURNED, MOST_ASTRAY, MOST_GROWTH, growth
from gpu.run import Setup
from gpu.trials import out_of_memory, two_cards
from real import at_once, child

from whispercache.devices.probe import SystemProbe
from whispercache.errors import LeaseTimeout
from whispercache.events import ModelEvicted, ModelLoaded
from whispercache.testing import check

if TYPE_CHECKING:
    from collections.abc import Iterator

    from whispercache import ModelCache

pytestmark = pytest.mark.process

DEVICE = "cuda:0"
TYPE = "float16"
SIZES = ("tiny", "small", "large-v3")
LARGE_NEEDS_BYTES = 8 * GIB
# The pool takes memory of the card in pieces, of which any used byte keeps one.
MOST_IDLE_BYTES = 64 * MIB
CYCLES = 20
# The first of all may have to wait until CUDA has compiled its kernels.
CHILD_S = 300.0
PRETENDS = "FAKE_GPU_STATE" in os.environ

_PROLOGUE = f"""
import json, os, sys
sys.path.append({str(Path(pretend.__file__).parents[1])!r})
if {PRETENDS}:
    from gpu import pretend
    pretend.install("suite")
from gpu.card import Card
from gpu.parts import Heard, plain_cache, say
from whispercache.events import DeviceWarmedUp, ModelEvicted

path, device = sys.argv[1], {DEVICE!r}
"""


def problem() -> str:
    """
    Why there is no card, in one line; empty if there is one.
    """
    if PRETENDS:
        pretend.install("out of memory")
    (found,) = look(Setup("", ""), "")
    return str(found.cells["problem"])


if reason := problem():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """
    Where the models are.
    """
    home = tmp_path_factory.mktemp("gpu")
    models = os.environ.get("WHISPERCACHE_GPU_MODELS") or str(home / "models")
    free_bytes = SystemProbe().read(DEVICE).free_bytes
    sizes = SIZES if free_bytes >= LARGE_NEEDS_BYTES else SIZES[:-1]
    setup = Setup(str(home), models, sizes, pretends=PRETENDS)
    if PRETENDS:
        setup = replace(setup, full_bytes=64 << 10)
    problem = command.write_models(setup)
    assert not problem, problem
    return setup


@pytest.fixture(params=SIZES)
def model(request: pytest.FixtureRequest, setup: Setup) -> Path:
    """
    A model of each size that the card has room for.
    """
    if request.param not in setup.sizes:
        pytest.skip(f"the card has no {LARGE_NEEDS_BYTES >> 30} GiB free")
    return setup.model(request.param)


@pytest.fixture
def tiny(setup: Setup) -> Path:
    """
    The smallest model.
    """
    return setup.model("tiny")


@pytest.fixture
def card() -> Card:
    """
    The card.
    """
    return Card(DEVICE)


@pytest.fixture
def cache() -> Iterator[ModelCache]:
    """
    A cache that is checked and closed afterwards.
    """
    with plain_cache() as cache:
        yield cache
        check(cache)


def warmed(cache: ModelCache, model: Path) -> Heard:
    """
    The events of a cache that has loaded the model once, and so has all that comes
    once.
    """
    cache.preload(model, DEVICE, TYPE)
    cache.evict()
    return Heard(cache)


def answer(code: str, model: Path, **environment: str) -> object:
    """
    What *code* left in ``answer``, run in a process of its own, which ends with 0.
    """
    epilogue = "\nprint(json.dumps(answer))\n"
    done = child(
        _PROLOGUE + code + epilogue,
        model,
        environment=environment,
        timeout_s=CHILD_S,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def text(cache: ModelCache, model: Path) -> str:
    """
    What the model answers.
    """
    with cache.lease(model, DEVICE, TYPE) as whisper:
        return say(whisper)


# What is taken, and what comes back ---------------------------------------------------


def test_a_context_is_made_by_the_first_load_and_by_nothing_before(
    tiny: Path,
) -> None:
    """
    To ask for devices, models, memory and explanations takes nothing of the card.
    """
    code = """
from whispercache.devices.probe import SystemProbe
card = Card(device)
with plain_cache() as cache:
    SystemProbe().read(device)
    cache.get_model(path, device, "float16")
    cache.explain(path, device, "float16")
    before = card.driver.is_active(0)
    cache.preload(path, device, "float16")
    answer = [before, card.driver.is_active(0)]
"""
    assert answer(code, tiny) == [False, True]


def test_the_floor_is_measured_once_and_told(tiny: Path) -> None:
    """
    The first warm-up measures it, that of a second compute type does not.
    """
    code = """
with plain_cache() as cache:
    heard = Heard(cache)
    for kind in ("float16", "float32"):
        cache.preload(path, device, kind)
    floors = [each.floor_bytes for each in heard.all_of(DeviceWarmedUp)]
    told = [each.floor_bytes for each in cache.devices() if each.device == device]
    answer = [floors, told]
"""
    found = answer(code, tiny)
    assert isinstance(found, list)
    floors, told = found
    assert floors[0] > 0
    assert floors[1:] == [None]
    assert told == floors[:1]


def test_an_unload_returns_the_weights(
    model: Path, card: Card, cache: ModelCache
) -> None:
    """
    Nearly all bytes that a load took are seen to come back, and the pool is as before.
    """
    heard = warmed(cache, model)
    before = card.held()
    cache.preload(model, DEVICE, TYPE)
    measured_bytes = heard.until(ModelLoaded).measured_bytes
    cache.evict(model)
    evicted = heard.until(ModelEvicted)
    after = card.held()
    assert measured_bytes is not None
    assert evicted.returned_bytes is not None
    assert evicted.returned_bytes >= LEAST_RETURNED * measured_bytes
    assert evicted.unreturned_bytes == 0
    if before.reserved_bytes is not None and after.reserved_bytes is not None:
        left_bytes = after.reserved_bytes - before.reserved_bytes
        assert left_bytes <= (1 - LEAST_RETURNED) * measured_bytes


def test_bytes_are_as_predicted(model: Path, cache: ModelCache) -> None:
    """
    A load takes what was set aside for it, give or take a tenth.
    """
    heard = warmed(cache, model)
    cache.preload(model, DEVICE, TYPE)
    loaded = heard.until(ModelLoaded)
    assert loaded.measured_bytes == pytest.approx(loaded.charged_bytes, rel=MOST_ASTRAY)


def test_many_loads_and_unloads_leave_nothing(
    tiny: Path, card: Card, cache: ModelCache
) -> None:
    """
    Neither the pool nor the card grows.
    """
    warmed(cache, tiny)
    there, left = [], []
    for _ in range(CYCLES):
        cache.preload(tiny, DEVICE, TYPE)
        there.append(card.held())
        cache.evict(tiny)
        left.append(card.held())
    readings = [
        [held.reserved_bytes or 0 for held in there],
        [held.gauge_bytes for held in there],
        [held.gauge_bytes for held in left],
    ]
    grown = [growth(numbers) or 0.0 for numbers in readings]
    assert max(grown) <= MOST_GROWTH, grown


def test_a_pool_that_was_told_to_keep_memory_gives_it_back(
    tiny: Path, card: Card, cache: ModelCache
) -> None:
    """
    Another library's threshold does not keep the weights from the card.
    """
    heard = warmed(cache, tiny)
    before = card.held()
    if before.reserved_bytes is None:
        pytest.skip("this card has no memory pool")
    card.set_threshold(2**63)
    try:
        cache.preload(tiny, DEVICE, TYPE)
        cache.evict(tiny)
    finally:
        card.set_threshold(0)
    assert heard.until(ModelEvicted).unreturned_bytes == 0
    after = card.held()
    assert after.reserved_bytes is not None
    assert after.reserved_bytes <= before.reserved_bytes


# Answers ------------------------------------------------------------------------------


def test_a_model_that_comes_back_from_its_files_answers_the_same(
    model: Path, cache: ModelCache
) -> None:
    """
    An unload and a load change nothing.
    """
    first = text(cache, model)
    assert first
    cache.evict(model)
    assert text(cache, model) == first


def test_a_model_that_comes_back_from_its_copy_answers_the_same(model: Path) -> None:
    """
    Its weights go to host memory and return, twice.
    """
    with plain_cache(park=True) as cache:
        heard = Heard(cache)
        texts = []
        for _ in range(3):
            with cache.lease(model, DEVICE, TYPE, keep_alive=0) as whisper:
                texts.append(say(whisper))
            del whisper
            assert heard.until(ModelEvicted).parked
        assert cache.stats().restores == 2
    assert texts[0]
    assert texts == texts[:1] * 3


def test_two_caches_share_a_card(tiny: Path, setup: Setup) -> None:
    """
    Threads that use models of either at the same time all get the right answers.
    """
    models = [tiny, setup.model("small")]
    with plain_cache() as one, plain_cache() as other:
        wanted = [text(one, model) for model in models]
        calls = [
            partial(text, cache, model)
            for cache in (one, other)
            for model in models
            for _ in "12"
        ]
        texts = at_once(calls)
    expected = [each for _ in "12" for each in wanted for _ in "12"]
    assert texts == expected


def test_an_eviction_waits_for_the_end_of_a_transcription(
    tiny: Path, cache: ModelCache
) -> None:
    """
    A model in use stays, and finishes; then it leaves.
    """
    model = cache.get_model(tiny, DEVICE, TYPE)
    segments, _ = model.transcribe(
        noise(65), language="en", beam_size=1, without_timestamps=True
    )
    first = next(iter(segments))
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(LeaseTimeout):
            pool.submit(cache.evict, tiny, timeout_s=0.2).result()
        going = pool.submit(cache.evict, tiny, timeout_s=60)
        rest = list(segments)
        assert going.result() == 1
    assert first.text
    assert len(rest) == 2


# When something is in the way ---------------------------------------------------------


def test_a_full_card_is_survived(setup: Setup) -> None:
    """
    Idle models leave for a load and for a call that find too little; where none is, the
    caller is told. Afterwards everything works, and next to nothing stays in the pool.
    """
    found = [row.cells for row in out_of_memory(setup, "")]
    assert [each["got it"] for each in found] == [True, False, True, False]
    assert [each["evicted"] != "0" for each in found] == [True, False, True, False]
    assert all("out of memory" in e["raised"] for e in found if not e["got it"])
    assert all(each["works after"] for each in found)
    assert all((e["idle in the pool"] or 0) <= MOST_IDLE_BYTES for e in found)


@pytest.mark.parametrize("allocator", ["cuda_malloc_async", "cub_caching"])
@pytest.mark.parametrize("parks", [False, True], ids=["loaded", "parked"])
def test_a_process_ends_well_with_a_model_in_it(
    tiny: Path,
    allocator: str,
    parks: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """
    The interpreter's end unloads what is loaded, drops copies, and exits with 0.
    """
    code = f"""
cache = plain_cache(park=True)
heard = Heard(cache)
lease = cache.lease(path, device, "float16", keep_alive=0 if {parks} else None)
with lease as whisper:
    answer = bool(say(whisper))
if {parks}:
    del whisper
    assert heard.until(ModelEvicted).parked
"""
    assert answer(code, tiny, CT2_CUDA_ALLOCATOR=allocator) is True


def test_two_cards_load_and_work_at_the_same_time(setup: Setup, card: Card) -> None:
    """
    No answer differs from what the card says alone (SYSTRAN/faster-whisper#946).
    """
    if card.driver.device_count < 2:
        pytest.skip("it takes two cards, CUDA sees one")
    pairs = [row.cells for row in two_cards(setup, "")]
    assert [pair[""] for pair in pairs] == ["cuda:0", "cuda:1"]
    assert [pair["differing"] for pair in pairs] == ["0", "0"]
