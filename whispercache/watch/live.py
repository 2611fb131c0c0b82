"""
Live: what a cache is doing at this moment, for people who watch it.

One value, `Snapshot`, is what the terminal view shows, what the server's page draws,
and what ``GET /api/ps`` answers. `Watch` takes them of a cache, and remembers the last
events. Nothing here changes anything, or imports more than the standard library.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from whispercache.engine.naming import short_name
from whispercache.errors import format_bytes
from whispercache.events import (
    DeviceInfo,
    DeviceLost,
    DeviceWarmedUp,
    DeviceWarmingUp,
    FellBack,
    ModelEvicted,
    ModelGranted,
    ModelLoaded,
    ModelLoadFailed,
    ModelLoading,
    ModelStillReferenced,
    ReleaseUnconfirmed,
    Stats,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from _typeshed import DataclassInstance
    from typing_extensions import Self

    from whispercache.events import Event, ModelInfo, WaitingInfo
    from whispercache.keys import ModelKey

__all__ = ["LiveEvent", "LiveModel", "LiveRequest", "Snapshot", "Watch", "Watchable"]

T = TypeVar("T")

EVENTS = 50
"""
How many events are remembered.
"""


class Watchable(Protocol):
    """
    A cache, as far as it is watched.
    """

    def stats(self) -> Stats:
        """
        Counters since it was made.
        """

    def models(self) -> tuple[ModelInfo, ...]:
        """
        The models in memory, or on their way in or out.
        """

    def devices(self) -> tuple[DeviceInfo, ...]:
        """
        The devices that were used.
        """

    def waiting(self) -> tuple[WaitingInfo, ...]:
        """
        The requests that wait.
        """

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """
        Call *listener* with each event; returns how to end that.
        """


@dataclass(frozen=True, slots=True)
class LiveModel:
    """
    One model in memory, or on its way in or out; see `ModelInfo`.

    Attributes:
        name: What it goes by.
        device: Where it is.
        compute_type: The effective type.
        state: ``"loading"``, ``"resident"`` or ``"unloading"``.
        weights_bytes: Counted for the model itself.
        workspace_bytes: Counted for its calls.
        leases: How many hold it.
        pinned: Whether it stays when idle.
        idle_s: Seconds since its last lease ended; None while one is held.
        expires_in_s: Seconds until it leaves for idleness; None if it does not.
        loads: How often it was loaded.
        load_s: Seconds of its last load.
    """

    name: str
    device: str
    compute_type: str
    state: str
    weights_bytes: int
    workspace_bytes: int
    leases: int
    pinned: bool
    idle_s: float | None
    expires_in_s: float | None
    loads: int
    load_s: float

    @property
    def bytes(self) -> int:
        """
        All that is counted for it.
        """
        return self.weights_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """
    One request that waits.

    Attributes:
        models: The models that it wants, by name.
        waited_s: Seconds since it was made.
    """

    models: tuple[str, ...]
    waited_s: float


@dataclass(frozen=True, slots=True)
class LiveEvent:
    """
    Something that happened.

    Attributes:
        number: Counts up, so that a reader knows which it has seen.
        at_s: When: seconds since 1970 (UTC).
        kind: ``"loading"``, ``"loaded"``, ``"failed"``, ``"granted"``, ``"evicted"`` or
            ``"warning"``.
        model: The model, by name.
        text: The same as a sentence without the model's name.
    """

    number: int
    at_s: float
    kind: str
    model: str
    text: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """
    What a cache is doing at one moment.

    Attributes:
        at_s: When it was taken: seconds since 1970 (UTC).
        devices: The devices that were used.
        models: The models in memory, or on their way in or out.
        waiting: The requests that wait, the oldest first.
        events: The last events, the oldest first.
        stats: Counters since the cache was made.
    """

    at_s: float
    devices: tuple[DeviceInfo, ...]
    models: tuple[LiveModel, ...]
    waiting: tuple[LiveRequest, ...]
    events: tuple[LiveEvent, ...]
    stats: Stats

    def as_json(self) -> dict[str, object]:
        """
        The same as objects, lists, numbers and strings.
        """
        document: dict[str, object] = asdict(self)
        document["models"] = [
            {**asdict(model), "bytes": model.bytes} for model in self.models
        ]
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, object]) -> Snapshot:
        """
        The snapshot that `as_json` wrote, perhaps in a newer version.

        Raises:
            ValueError: it is none.
        """
        try:
            waiting = _all(LiveRequest, document["waiting"])
            return cls(
                at_s=cast("float", document["at_s"]),
                devices=_all(DeviceInfo, document["devices"]),
                models=_all(LiveModel, document["models"]),
                waiting=tuple(
                    LiveRequest(tuple(each.models), each.waited_s) for each in waiting
                ),
                events=_all(LiveEvent, document["events"]),
                stats=_one(Stats, document["stats"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no snapshot of a cache: {error!r}") from None


def _all(kind: type[T], documents: object) -> tuple[T, ...]:
    return tuple(_one(kind, each) for each in cast("list[object]", documents))


def _one(kind: type[T], document: object) -> T:
    given = cast("dict[str, object]", document)
    names = {each.name for each in fields(cast("type[DataclassInstance]", kind))}
    return kind(**{name: value for name, value in given.items() if name in names})


class Watch:
    """
    Takes snapshots of a cache, and remembers what happened in between.

    Safe to use from any thread. A context manager that ends on exit.

    Args:
        cache: What to watch; events are remembered from now on.
        name_of: What a model is called; by default its name or last part of its path,
            with its compute type.
        clock: Tells the time: seconds since 1970 (UTC).
    """

    def __init__(
        self,
        cache: Watchable,
        name_of: Callable[[ModelKey], str] = short_name,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cache = cache
        self._name_of = name_of
        self._clock = clock
        self._numbers = itertools.count(1)
        self._events: deque[LiveEvent] = deque(maxlen=EVENTS)
        self._unsubscribe = cache.subscribe(self._note)

    def _note(self, event: Event) -> None:
        kind, text = _sentence(event)
        name = self._name_of(event.key)
        if isinstance(event, (DeviceLost, DeviceWarmedUp, DeviceWarmingUp)):
            name = event.device
        last = self._events[-1] if self._events else None
        if kind == "granted" and last and (last.kind, last.model) == ("loaded", name):
            return  # to whoever asked for the load, which tells as much
        number = next(self._numbers)
        self._events.append(LiveEvent(number, self._clock(), kind, name, text))

    def snapshot(self) -> Snapshot:
        """
        What the cache is doing now.
        """
        return Snapshot(
            at_s=self._clock(),
            devices=self._cache.devices(),
            models=tuple(self._model(info) for info in self._cache.models()),
            waiting=tuple(
                LiveRequest(tuple(map(self._name_of, info.keys)), info.waited_s)
                for info in self._cache.waiting()
            ),
            events=tuple(self._events.copy()),
            stats=self._cache.stats(),
        )

    def _model(self, info: ModelInfo) -> LiveModel:
        return LiveModel(
            name=self._name_of(info.key),
            device=info.device,
            compute_type=info.key.compute_type,
            state=info.state,
            weights_bytes=info.weights_bytes,
            workspace_bytes=info.workspace_bytes,
            leases=info.leases,
            pinned=info.pinned,
            idle_s=info.idle_s,
            expires_in_s=info.expires_in_s,
            loads=info.loads,
            load_s=info.load_s,
        )

    def close(self) -> None:
        """
        Watch no longer.
        """
        self._unsubscribe()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


_CAUSES = {
    "capacity": "to make room",
    "expired": "after its keep-alive",
    "explicit": "on request",
    "closed": "as the cache closed",
    "pressure": "for other programs",
    "out_of_memory": "as memory ran out",
}


def _sentence(event: Event) -> tuple[str, str]:
    """
    The kind of an event, and what it says.
    """
    if isinstance(event, ModelLoading):
        return "loading", f"loads into {format_bytes(event.reserved_bytes)}"
    if isinstance(event, DeviceWarmingUp):
        return "loading", f"warms up: {event.reason}"
    if isinstance(event, (DeviceWarmedUp, ModelLoaded)):
        return "loaded", _arrival(event)
    if isinstance(event, ModelGranted):
        return "granted", f"granted after {event.wait_s:.2f} s"
    if isinstance(event, ModelEvicted):
        return "evicted", _departure(event)
    kind = "failed" if isinstance(event, ModelLoadFailed) else "warning"
    return kind, _warning(event)


def _arrival(event: DeviceWarmedUp | ModelLoaded) -> str:
    if isinstance(event, DeviceWarmedUp):
        return f"warmed up in {event.warm_up_s:.2f} s"
    again = " again" if event.reloaded else ""
    again = " from the host" if event.restored else again
    size = format_bytes(event.charged_bytes)
    return f"loaded{again} in {event.load_s:.2f} s: {size}"


def _departure(event: ModelEvicted) -> str:
    why = _CAUSES[event.cause.value]
    text = f"left {why}: {format_bytes(event.credited_bytes)} free"
    if event.parked:
        text += ", a copy stays on the host"
    if event.unreturned_bytes:
        text += f", {format_bytes(event.unreturned_bytes)} not seen to return"
    return text


def _warning(event: Event) -> str:
    if isinstance(event, ModelLoadFailed):
        return f"could not be loaded: {event.reason}"
    if isinstance(event, ReleaseUnconfirmed):
        held = format_bytes(event.charged_bytes)
        return f"has not left yet, {held} stay charged: {event.reason}"
    if isinstance(event, ModelStillReferenced):
        return "left, but somebody still refers to it; it must not be used any more"
    if isinstance(event, DeviceLost):
        return f"is lost for this process: {event.reason}"
    if isinstance(event, FellBack):
        return f"in place of {event.wanted}: {event.reason}"
    return type(event).__name__
