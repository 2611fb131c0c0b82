"""
What several replicas show, as one: the page, ``/api/ps`` and ``/metrics`` have it.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily, Metric

from whispercache.events import Stats
from whispercache.watch.live import EVENTS, LiveEvent, Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Numbers of events: microseconds since 1970, on which all servers of a cluster agree.
_PER_S = 1_000_000


def merged_snapshot(at_s: float, parts: Mapping[str, Snapshot]) -> Snapshot:
    """
    Returns the state of all replicas, by their names, at *at_s*. Devices are called
    ``"replica/device"``; events tell the replica at their end.
    """
    events = sorted(
        (_placed_event(name, event) for name in parts for event in parts[name].events),
        key=lambda event: event.number,
    )
    # In an order that stays: replicas answer in any.
    parts = dict(sorted(parts.items()))
    return Snapshot(
        at_s=at_s,
        devices=tuple(
            replace(each, device=f"{name}/{each.device}")
            for name, seen in parts.items()
            for each in seen.devices
        ),
        models=tuple(
            replace(
                each,
                device=f"{name}/{each.device}",
                key=replace(each.key, device=f"{name}/{each.key.device}"),
            )
            for name, seen in parts.items()
            for each in seen.models
        ),
        waiting=tuple(each for seen in parts.values() for each in seen.waiting),
        events=tuple(events[-EVENTS:]),
        stats=_summed(seen.stats for seen in parts.values()),
    )


def _placed_event(name: str, event: LiveEvent) -> LiveEvent:
    number = round(event.at_s * _PER_S)
    return replace(event, number=number, text=f"{event.text} ({name})")


def _summed(stats: Iterable[Stats]) -> Stats:
    listed = list(stats)
    return Stats(
        **{
            field.name: sum(getattr(each, field.name) for each in listed)
            for field in fields(Stats)
        }
    )


def merged_metrics(
    parts: Mapping[str, Sequence[Metric]], affinity: float
) -> list[Metric]:
    """
    Returns the figures of all replicas, each with the label ``replica``, and the share
    of requests that found their model where they were sent.
    """
    merged: dict[str, Metric] = {}
    for name, metrics in parts.items():
        for metric in metrics:
            whole = merged.setdefault(
                metric.name,
                Metric(metric.name, metric.documentation, metric.type, metric.unit),
            )
            whole.samples += [
                sample._replace(labels={**sample.labels, "replica": name})
                for sample in metric.samples
            ]
    found = GaugeMetricFamily(
        "whispercache_affinity_ratio",
        "Requests that found their model in memory, as a share of all, in all replicas "
        "that there are.",
        value=affinity,
    )
    return [*merged.values(), found]
