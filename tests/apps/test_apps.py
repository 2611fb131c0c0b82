"""
Programs that other people wrote, as they are, with models of a cache in place of their
own.
"""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from entrance import through
from programs import PROGRAMS
from real import at_once, clip, micro, packaged

from whispercache import ModelCache, footprint
from whispercache.testing import settle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hearing import Program

pytestmark = [
    pytest.mark.apps,
    pytest.mark.process,
    pytest.mark.slow,
    # Theirs are none of our business.
    pytest.mark.filterwarnings("default"),
]

# What each hears: a clip, and its language if that is told.
CLIPS = [(clip("en-library"), "en"), (clip("es-casa"), None)]
# Packages look each other up while they are imported.
IMPORTS = threading.Lock()


# All tests of one, then those of the next: ovos changes SpeechRecognition for all.
@pytest.fixture(
    scope="module", params=PROGRAMS, ids=lambda program: program.build.__name__
)
def program(request: pytest.FixtureRequest) -> Program:
    """
    Each of them that is installed.
    """
    found: Program = request.param
    if found.missing:
        pytest.skip(found.missing)
    # Else this is no environment for them; tests/dropin tries faster-whisper itself.
    if all(each.missing for each in PROGRAMS if each.distribution != "faster-whisper"):
        pytest.skip("no program of these is installed: see `make apps`")
    return found


@contextmanager
def room_for_one(program: Program, directories: list[Path]) -> Iterator[ModelCache]:
    """
    A cache with room for one model at a time, for a program. Afterwards, all leases are
    back, and there never was more in memory.
    """
    # With what a load may be reserved beyond its prediction.
    limit_bytes = max(
        footprint(each, "float32", "cpu", batch_size=8).total_bytes * 5 // 4
        for each in directories
    )
    most: list[int] = []
    with ModelCache(ram=limit_bytes, max_models=1, variants=False) as cache:
        cache.subscribe(lambda _: most.append(len(cache.models())))
        with through(cache, ctranslate2=program.is_raw):
            yield cache
        gc.collect()
        settle(cache)
        cache._core.check()
        assert cache.stats().leases == 0
        assert max(most) == 1
        assert cache.devices()[0].peak_bytes <= limit_bytes


def heard(program: Program, directories: list[Path]) -> list[str]:
    """
    What it hears with each model: a clip of its own each.
    """
    with IMPORTS:
        hears = [program.build(str(each)) for each in directories]
    return [hear(*said) for hear, said in zip(hears, CLIPS, strict=True)]


def test_it_hears_what_it_would_on_models_of_its_own(program: Program) -> None:
    """
    Real models, one after the other: one load each.
    """
    directories = [packaged("tiny.en"), packaged("base")]
    expected = heard(program, directories)
    assert all(expected), expected
    with room_for_one(program, directories) as cache:
        assert heard(program, directories) == expected
        assert cache.stats().loads == 2


def test_two_of_it_take_turns(program: Program) -> None:
    """
    Two models in turns, one load each time; then from four threads, whose loads come as
    they may, with both models each, in both orders.
    """
    directories = [micro(), micro("the other one")]
    if program.is_real:
        directories = [packaged("tiny.en"), packaged("base")]
    expected = heard(program, directories)
    assert expected[0] != expected[1]
    with room_for_one(program, directories) as cache:
        for loads in (2, 4):
            assert heard(program, directories) == expected
            assert cache.stats().loads == loads

        def use(order: int) -> list[str]:
            with IMPORTS:
                hears = [program.build(str(each)) for each in directories]
            turns = list(zip(hears, CLIPS, strict=True))[::order]
            return [hear(*said) for hear, said in turns][::order]

        if not program.is_process:
            calls = [lambda order=order: use(order) for order in (1, -1) * 2]
            assert at_once(calls) == [expected] * 4
            # Whoever goes on hearing does so beside the others.
            most = float("inf") if program.is_endless else 12
            assert 6 <= cache.stats().loads <= most
