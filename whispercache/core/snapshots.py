"""
Snapshots of a core, for people and for metrics. Nothing here changes anything.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

from whispercache.errors import format_bytes
from whispercache.events import DeviceInfo, Explanation, ModelInfo, Stats, WaitingInfo
from whispercache.planning.planner import Outcome

from . import demands
from .entries import State
from .refusals import refusal, too_large
from .waiters import Waiter, Wanted

if TYPE_CHECKING:
    from whispercache.engine.sizes.footprint import Workload
    from whispercache.events import ExplainedOutcome, ModelState
    from whispercache.planning.planner import Decision

    from .core import Core
    from .entries import Entry


def stats(core: Core) -> Stats:
    """
    Returns counters since the cache was made.
    """
    with core.changing():
        counts = {**core.state.counts, "hits": core.state.hits}
        return Stats(
            **counts,
            load_s=core.state.load_s,
            wait_s=core.state.wait_s,
            requests=core.state.hits + counts.get("misses", 0),
            waiting=len(core.queue),
            leases=core.state.leases,
        )


def models(core: Core) -> tuple[ModelInfo, ...]:
    """
    Returns the models in memory, or on their way in or out, by device and name.
    """
    with core.changing():
        now_s = core.clock.now()
        held = [entry for entry in core.entries.values() if entry.is_present]
        infos = [_model_info(entry, now_s) for entry in held]
    return tuple(sorted(infos, key=lambda info: (info.device, str(info.key))))


def _model_info(entry: Entry, now_s: float) -> ModelInfo:
    is_idle = entry.is_idle
    expires = is_idle and not entry.pinned and entry.expires_at_s < math.inf
    idle_since_s = entry.last_used_s if is_idle else None
    return ModelInfo(
        key=entry.key,
        state=cast("ModelState", entry.state.value),
        device=entry.device.name,
        weights_bytes=entry.weights_bytes,
        workspace_bytes=entry.workspace_bytes,
        leases=len(entry.leases),
        pinned=entry.pinned,
        idle_s=None if idle_since_s is None else now_s - idle_since_s,
        expires_in_s=max(0.0, entry.expires_at_s - now_s) if expires else None,
        loads=entry.loads,
        load_s=entry.load_s,
        measured_bytes=None if entry.loaded is None else entry.loaded.measured_bytes,
        copy_bytes=entry.copy_bytes,
    )


def devices(core: Core) -> tuple[DeviceInfo, ...]:
    """
    Returns the devices that were used, and what the cache holds of them.
    """
    with core.changing():
        return tuple(
            DeviceInfo(
                device=device.name,
                limit_bytes=device.budget.limit_bytes,
                capacity_bytes=device.budget.capacity_bytes,
                charged_bytes=device.budget.charged_bytes,
                shell_bytes=device.kept_bytes,
                copies_bytes=device.budget.copies_bytes,
                unreturned_bytes=device.budget.unreturned_bytes,
                floor_bytes=device.budget.floor_bytes,
                peak_bytes=device.budget.peak_bytes,
                models=len(device.entries),
            )
            for device in core.devices.values()
        )


def waiting(core: Core) -> tuple[WaitingInfo, ...]:
    """
    Returns the requests that wait, in the order of their turns.
    """
    with core.changing():
        now_s = core.clock.now()
        return tuple(
            WaitingInfo(
                tuple(entry.key for entry in waiter.entries),
                now_s - waiter.since_s,
                waiter.priority,
            )
            for waiter in core.queue
        )


def describe(core: Core, name: str) -> str:
    """
    Returns the state of a cache in one line, for a debugger.
    """
    held = ", ".join(
        f"{info.key} {info.state}"
        + (f" ×{info.leases}" if info.leases else "")
        + (" pinned" if info.pinned else "")
        for info in models(core)
    )
    room = ", ".join(
        f"{info.device} {format_bytes(info.charged_bytes)} of "
        f"{format_bytes(info.capacity_bytes)}"
        for info in devices(core)
    )
    state = "closed" if core.is_closed else room or "unused"
    return f"<{name} {state} | {held or 'no models'} | {len(core.queue)} waiting>"


def explain(core: Core, entry: Entry, workload: Workload) -> Explanation:
    """
    Returns what a request for a located model would do if it were made now.
    """
    with core.changing():
        # A request that is planned but never queued: the real plan, with no effect.
        waiter = Waiter((Wanted(entry, workload),), None, core.clock.now(), None)
        decision = core.scheduler.decide_on(waiter)
        demand, *_ = demands.demands(waiter.wanted)
        device = entry.device
        outcome, reason = _outcome(core, entry, decision)
        return Explanation(
            key=entry.key,
            outcome=outcome,
            needed_bytes=demand.n_bytes,
            free_bytes=max(0, device.budget.left_bytes),
            capacity_bytes=device.budget.capacity_bytes,
            evicts=tuple(victim.key for victim in decision.victims),
            reason=reason,
        )


def _outcome(
    core: Core, entry: Entry, decision: Decision
) -> tuple[ExplainedOutcome, str]:
    if (refused := refusal(entry, core.clock.now())) is not None:
        return "never", str(refused)
    if decision.lacking is not None:
        return "never", str(too_large(core.state, str(entry.key), *decision.lacking))
    if decision.outcome is Outcome.GRANT:
        return "hit", f"{entry.key} is in memory"
    if decision.outcome is Outcome.LOAD:
        return "load", f"{entry.key} would be loaded; there is room"
    if decision.victims:
        names = ", ".join(str(victim.key) for victim in decision.victims)
        return "evict", f"{names} would leave, then {entry.key} could be had"
    waits_for = {
        State.LOADING: "is being loaded",
        State.UNLOADING: "is leaving, and would be loaded again",
    }
    reason = waits_for.get(entry.state, "would wait until leases end")
    return "wait", f"{entry.key} {reason}"
