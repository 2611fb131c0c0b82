"""
The lookout: sees to it that no request waits for what no event of ours will tell.

All of it needs the lock, and calls nothing that could wait.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import deadlocks
from .effects import LookAgain

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .agenda import Agenda
    from .device import Device

DEADLOCK_S = 0.04
"""
Delay before a possible deadlock is checked.

Only a request that has waited half as long is failed, since a lease may just be moving
to a thread that will release it. The error therefore arrives 20 to 60 ms after the
deadlock.
"""

LEAST_CHECKS = 10
"""
Delay before that check, as a multiple of what the last one took, if that is more: with
thousands that wait, it would keep the lock for most of the time.
"""

LOOK_AGAIN_S = 1.0
"""
Seconds after which a gauge that could not be read, or does not show yet what was freed,
is read again for those who wait.
"""

LOOK_EVERY_S = 0.02
"""
Least seconds between two looks at a gauge because a lease has ended. Each release
beside a queue asks for one.
"""


class Lookout:
    """
    Has gauges read, and deadlocks looked for.
    """

    def __init__(self, agenda: Agenda) -> None:
        self._agenda = agenda
        self._state = agenda.state
        self._now = agenda.now

    def look_out(
        self, devices: Iterable[Device], *, suspects: bool = True, least_s: float = 0.0
    ) -> None:
        """
        Sees to it that no request waits in vain: for what a new reading would show,
        *least_s* after the last one, or in a deadlock, unless that was just looked for.
        """
        state, now_s = self._state, self._now()
        for device in devices:
            self._look_at(device, now_s, least_s)
        is_looked_for = state.deadlocks_at_s < math.inf
        if suspects and not is_looked_for and deadlocks.suspects(state):
            pause_s = max(DEADLOCK_S, LEAST_CHECKS * state.check_s)
            state.deadlocks_at_s = now_s + pause_s
            self._agenda.wake_by(state.deadlocks_at_s)

    def _look_at(self, device: Device, now_s: float, least_s: float) -> None:
        # What ended may have left more than the last reading knew of.
        if device.is_stale and not device.is_moving and device.budget.may_gain:
            next_s = device.looked_s + least_s
            if now_s >= next_s:
                device.is_stale = False
                device.looked_s = now_s
                self._agenda.note(LookAgain(device))
                return
            at_s = next_s
        elif device.unreturned_bytes:
            # No event of ours will tell that it was returned.
            at_s = now_s + LOOK_AGAIN_S
        else:
            return
        if device.look_at_s == math.inf:
            device.look_at_s = at_s
            self._agenda.remind(at_s, device)
