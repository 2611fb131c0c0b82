"""
Snapshots of a cache, for people who watch it.

One value, `Snapshot`, is what the terminal view shows, what the server's page draws,
and what ``GET /api/ps`` answers. `Watch` takes them of a cache, and remembers the last
events. Nothing here changes anything, or imports more than the standard library.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Protocol,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

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
    ModelInfo,
    ModelLoaded,
    ModelLoadFailed,
    ModelLoading,
    ModelStillReferenced,
    NoRoom,
    ReleaseUnconfirmed,
    Stats,
    WaitingInfo,
)
from whispercache.keys import ModelKey

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Self

    from whispercache.events import Event

# Number of events that are remembered.
EVENTS = 50

# No amount of ours is as large.
_HUGE = 2**60


class Watchable(Protocol):
    """
    The methods of a cache that are needed to watch it.
    """

    def stats(self) -> Stats: ...
    def models(self) -> tuple[ModelInfo, ...]: ...
    def devices(self) -> tuple[DeviceInfo, ...]: ...
    def waiting(self) -> tuple[WaitingInfo, ...]: ...
    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]: ...


@dataclass(frozen=True, slots=True)
class LiveEvent:
    """
    An event in words, at a time in seconds since 1970 (UTC). *number* counts up, so
    that a reader knows which it has seen. *kind* is one of "loading", "loaded",
    "failed", "granted", "evicted" and "warning". *text* is a sentence without the name
    of the *model*.
    """

    number: int
    at_s: float
    kind: str
    model: str
    text: str


@dataclass(frozen=True, slots=True)
class UnderWay:
    """
    A request that a server is at work on: its phase and the seconds that it spent in
    it, the name of its key, and the served model; None where that is not known.
    """

    phase: str
    spent_s: float
    who: str | None = None
    model: str | None = None

    @classmethod
    def all_from_json(cls, document: Mapping[str, Any]) -> tuple[Self, ...]:
        """
        Returns those that ``GET /api/requests`` tells, perhaps of a newer version;
        raises ValueError if *document* is none of its answers.
        """
        try:
            given = [
                {**each, "spent_s": each["seconds"].get(each["phase"], 0)}
                for each in document["under_way"]
            ]
            return tuple(cast("Self", _made(cls, each)) for each in given)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no list of requests: {error!r}") from None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """
    The state of a cache at *at_s*, in seconds since 1970 (UTC): its devices, models and
    waiting requests, its last events, the oldest first, and its counters.

    *requests* are those under way in a server. It lists them at an address of their
    own, so they are not in the document.

    A model's key has its display name in place of ``model``: a path of the machine is
    nothing for readers elsewhere.
    """

    at_s: float
    devices: tuple[DeviceInfo, ...]
    models: tuple[ModelInfo, ...]
    waiting: tuple[WaitingInfo, ...]
    events: tuple[LiveEvent, ...]
    stats: Stats
    requests: tuple[UnderWay, ...] = ()

    def as_json(self) -> dict[str, object]:
        """
        Returns the same as objects, lists, numbers and strings.
        """
        told = asdict(self)
        del told["requests"]
        return {
            **told,
            "models": [_model_as_json(each) for each in self.models],
            "waiting": [
                {
                    "models": [key.model for key in each.keys],
                    "waited_s": each.waited_s,
                    "priority": each.priority,
                }
                for each in self.waiting
            ],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """
        Returns the snapshot that `as_json` wrote, perhaps in a newer version; raises
        ValueError if *document* is none.
        """
        try:
            models = [
                {**each, "key": {**each, "model": each["name"]}}
                for each in document["models"]
            ]
            waiting = [
                {**each, "keys": [_unplaced(name) for name in each["models"]]}
                for each in document["waiting"]
            ]
            made = _made(cls, {**document, "models": models, "waiting": waiting})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no snapshot of a cache: {error!r}") from None
        return cast("Self", made)


_MODEL_FIELDS = (
    *("device", "state", "weights_bytes", "workspace_bytes", "bytes", "leases"),
    *("pinned", "idle_s", "expires_in_s", "loads", "load_s"),
)


def _model_as_json(info: ModelInfo) -> dict[str, object]:
    return {
        "name": info.key.model,
        "compute_type": info.key.compute_type,
        **{name: getattr(info, name) for name in _MODEL_FIELDS},
    }


def _unplaced(name: str) -> dict[str, str]:
    return {"model": name, "device": "", "compute_type": ""}


def _made(hint: Any, given: Any) -> object:  # noqa: ANN401 - as JSON gives it
    """
    Returns *given* as a value of the type *hint*. Raises ValueError, TypeError or
    AttributeError if any part of it is of another type.
    """
    if is_dataclass(hint):
        # The names that are imported for type checkers alone.
        hints = get_type_hints(hint, localns={"ModelKey": ModelKey})
        # A newer server has fields that are not known here.
        known = [name for name in hints if name in given]
        make = cast("Callable[..., object]", hint)
        return make(**{name: _made(hints[name], given[name]) for name in known})
    if get_origin(hint) is tuple:
        return tuple(_made(get_args(hint)[0], each) for each in given)
    kinds = (str,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
    # JSON writes a whole float as an int.
    if not isinstance(given, (*kinds, int) if float in kinds else kinds):
        raise TypeError(f"{given!r} is no {kinds}")
    if isinstance(given, (int, float)) and not -_HUGE < given < _HUGE:
        raise ValueError(f"{given!r} is no amount")
    return given


class Watch:
    """
    A source of snapshots of a cache, which remembers the events in between. *name_of*
    gives a model's display name.

    Safe to use from any thread. A context manager that ends on exit.
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
        # Appends and copies of a deque need no lock.
        self._events: deque[LiveEvent] = deque(maxlen=EVENTS)
        self._unsubscribe = cache.subscribe(self._note)

    def _note(self, event: Event) -> None:
        kind, name, text = in_words(event, self._name_of)
        last = self._events[-1] if self._events else None
        if kind == "granted" and last and (last.kind, last.model) == ("loaded", name):
            return  # to the request that asked for the load
        number = next(self._numbers)
        self._events.append(LiveEvent(number, self._clock(), kind, name, text))

    def snapshot(self) -> Snapshot:
        """
        Returns what the cache is doing now.
        """
        return Snapshot(
            # Not taken under one lock: the parts may be a moment apart.
            at_s=self._clock(),
            devices=self._cache.devices(),
            models=tuple(
                replace(info, key=self._named(info.key))
                for info in self._cache.models()
            ),
            waiting=tuple(
                replace(info, keys=tuple(map(self._named, info.keys)))
                for info in self._cache.waiting()
            ),
            events=tuple(self._events.copy()),
            stats=self._cache.stats(),
        )

    def _named(self, key: ModelKey) -> ModelKey:
        return replace(key, model=self._name_of(key), options=())

    def close(self) -> None:
        """
        Ends the subscription to events.
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


def in_words(
    event: Event, name_of: Callable[[ModelKey], str] = short_name
) -> tuple[str, str, str]:
    """
    Returns the kind of an event, the name of what it happened to, and a sentence on it,
    as `LiveEvent` has them.
    """
    kind, text = _sentence(event)
    # They happen to a device; the model only noticed.
    if isinstance(event, (DeviceLost, DeviceWarmedUp, DeviceWarmingUp)):
        return kind, event.device, text
    return kind, name_of(event.key), text


def _sentence(event: Event) -> tuple[str, str]:
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
    if isinstance(event, (FellBack, NoRoom)):
        return _lack(event)
    return type(event).__name__


def _lack(event: FellBack | NoRoom) -> str:
    if isinstance(event, FellBack):
        return f"in place of {event.wanted}: {event.reason}"
    return f"has no room for {format_bytes(event.needed_bytes)}: {event.reason}"
