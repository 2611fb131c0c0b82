"""
The agenda: what all decisions share, the state, the rules, the time, and a list of what
is to be done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .effects import Stop, WakeAt

if TYPE_CHECKING:
    from collections.abc import Callable

    from whispercache.events import Event
    from whispercache.planning.policies import Policy

    from .effects import Effect
    from .reminders import Thing
    from .state import CacheState


@dataclass(frozen=True, slots=True)
class Rules:
    """
    The parameters of the decisions.

    Attributes:
        policy: Which idle model is evicted first.
        keep_alive_s: How long a model stays idle, unless its lease says otherwise.
        patience_s: How long hits may pass a request that waits for memory.
        max_waiting: Most requests that wait; None for any number.
        parallel: Most leases on a model, unless a request says otherwise.
    """

    policy: Policy
    keep_alive_s: float
    patience_s: float
    max_waiting: int | None = None
    parallel: int | None = None


@dataclass(frozen=True, slots=True)
class Agenda:
    """
    The state with what decisions need besides it. All of it needs the lock.

    Attributes:
        state: What is decided over.
        rules: What is decided by.
        now: Monotonic seconds.
        note: Notes an effect.
    """

    state: CacheState
    rules: Rules
    now: Callable[[], float]
    note: Callable[[Effect], None]

    def tell(self, event: Event) -> None:
        """
        Notes an event, to be told in its order.
        """
        self.state.outbox.append(event)

    def wake_by(self, at_s: float) -> None:
        """
        Has `Scheduler.tick` called at *at_s*, or earlier.
        """
        state = self.state
        if at_s < state.wake_at_s:
            state.add_timer(at_s)
            self.note(WakeAt(at_s))
        # Another thread is about to set it, or was kept from that by Ctrl-C.
        elif state.wake_at_s in state.unset_s:
            self.note(WakeAt(state.wake_at_s))

    def remind(self, at_s: float, thing: Thing) -> None:
        """
        Has `Scheduler.tick` look at *thing* at *at_s*.
        """
        self.state.reminders.add(at_s, thing)
        self.wake_by(at_s)

    def stop_if_over(self) -> None:
        """
        Has all threads end once the cache is closed and empty.
        """
        if self.state.is_over:
            self.note(Stop())
