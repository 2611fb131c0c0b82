"""
Two caches on one machine, as two programs would have them.
"""

from __future__ import annotations

from whispercache import ModelCache
from whispercache.peers.pressure import LEDGER_S
from whispercache.testing import FakeClock, FakeLoader, FakeMachine, settle

__all__ = ["Tenants"]


class Tenants:
    """
    Two caches that know of each other only by the gauge and the ledger.
    """

    def __init__(self, machine: FakeMachine, clock: FakeClock) -> None:
        self.clock = clock
        sizes = {"small": "2GiB", "medium": "3GiB", "large-v3": "6GiB"}
        self.loaders = [FakeLoader(machine, sizes=sizes) for _ in "12"]
        self.caches = [
            ModelCache(
                coordinate=True,
                loader=loader,
                probe=machine,
                clock=SharedClock(clock),
            )
            for loader in self.loaders
        ]

    def tick(self, seconds: float = LEDGER_S) -> None:
        """
        Let both look at their ledgers, and do what follows.
        """
        self.clock.tick(seconds)
        for cache in self.caches:
            settle(cache)


class SharedClock:
    """
    A clock that a cache may close while the other goes on.
    """

    def __init__(self, clock: FakeClock) -> None:
        self.now = clock.now
        self.call_at = clock.call_at

    def close(self) -> None:
        """
        Do nothing.
        """
