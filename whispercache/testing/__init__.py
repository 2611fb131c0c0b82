"""
Fakes with which a whole cache runs without a model, a GPU, or time passing.

::

    machine = FakeMachine({"cpu": "8GiB", "cuda:0": "4GiB"})
    loader = FakeLoader(machine, sizes={"small": "1GiB", "large-v3": "3GiB"})
    clock = FakeClock()
    with ModelCache(loader=loader, probe=machine, clock=clock) as cache:
        with cache.lease("small", "cuda"):
            ...
        clock.tick(300)
        settle(cache)
        assert not cache.models()

The fakes are strict: a model loaded twice, used after its unload, unloaded in use, or
loaded where there is no room raises, as it would crash or fail with the real thing.
"""

from .clock import FakeClock
from .loader import FakeLoader, FakeSegment, FakeWhisper, Gate
from .machine import FakeMachine
from .waiting import check, settle, wait_until

__all__ = [
    "FakeClock",
    "FakeLoader",
    "FakeMachine",
    "FakeSegment",
    "FakeWhisper",
    "Gate",
    "check",
    "settle",
    "wait_until",
]
