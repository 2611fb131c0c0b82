"""
A cluster in virtual time: the real routing rule over replicas with the real scheduler.

Each replica is a card with a cache of its own, which computes one call at a time; a
router sends each request to one of them as it comes. Routers know what they sent, and
what is in memory as it was a moment ago. Of others' requests they know how many there
were when they last sent one to the same card, as Ray tells them.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, defaultdict, deque
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from cluster_models import (
    CALLS_S,
    CARD_BYTES,
    GIB,
    SIZES,
    WORKSPACE_BYTES,
    load_s,
    requests_of,
)
from pieces import Model, Strategy
from simulation import Simulation
from traces import Request

from whispercache.core.entries import State
from whispercache.keys import ModelKey
from whispercache.planning.routing import RELUCTANCE, Replica, order, pooled
from whispercache.ray.meter import Meter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import TypeAlias

    from simulation import Asked

    from whispercache.core.entries import Entry
    from whispercache.lease import Lease

__all__ = [
    "CLUSTER_MODELS",
    "ROUTES",
    "RULE",
    "FleetReport",
    "busy_trace",
    "by_rule",
    "serve_all",
]

# What is in memory is known this late.
SEEN_EVERY_S = 0.25

# For so long a router believes in others' requests, as Ray's do.
OTHERS_S = 10.0

# As in fake_replica.py: so many calls work on a model, and each takes turns with others
# on the card between two segments.
PARALLEL = 2
SEGMENTS = 5

# What a cache leaves free of a card (`whispercache.devices.memory.headroom_bytes`).
CAPACITY_BYTES = CARD_BYTES - GIB // 2

CLUSTER_MODELS = tuple(
    Model(
        ModelKey(name, "cuda:0", "float16"),
        int(gib * GIB),
        WORKSPACE_BYTES,
        load_s(name),
    )
    for name, (gib, _) in SIZES.items()
)


class FleetReport(NamedTuple):
    """
    How a cluster went: its loads, the seconds from a request to its end, in order, and
    the most bytes on a card.
    """

    loads: int
    took_s: list[float]
    peak_bytes: int

    def share_s(self, share: float) -> float:
        """
        The seconds that *share* of all requests did not exceed.
        """
        return self.took_s[math.ceil(share * len(self.took_s)) - 1]


class Card(Simulation):
    """
    A replica: a simulation that is driven from outside, and computes one call at a
    time.
    """

    def __init__(self, name: str, models: Sequence[Model], capacity_bytes: int) -> None:
        super().__init__(models, capacity_bytes, Strategy())
        self.name = name
        # Requests that it has, by the router that sent them and by model.
        self.queues: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self._senders: dict[Request, int] = {}
        # What it has measured of its loads and calls.
        self.load_s: dict[str, float] = {}
        self.meter = Meter(lambda: self._now_s)
        self.took_s: list[float] = []
        self._free_at_s = 0.0
        # Requests that wait for a turn with a model, and how many have one.
        self._gate: defaultdict[int, deque[Request]] = defaultdict(deque)
        self._working: Counter[int] = Counter()
        # What others see of it: when, and what was there then.
        self._seen: deque[tuple[float, frozenset[str]]] = deque([(0.0, frozenset())])

    def advance(self, until_s: float) -> None:
        """
        Has all happen that happens until then.
        """
        while self._events and self._events[0][0] <= until_s:
            self._now_s, _, call = heapq.heappop(self._events)
            call()
        self._now_s = max(self._now_s, until_s) if math.isfinite(until_s) else until_s

    @property
    def queue(self) -> int:
        """
        The number of requests that it has.
        """
        return sum(each.total() for each in self.queues.values())

    def come(self, request: Request, sender: int) -> None:
        """
        Takes a request that comes now, from one of the routers.
        """
        self.queues[sender][CLUSTER_MODELS[request.model].key.model] += 1
        self._senders[request] = sender
        self._gate[request.model].append(request)
        self._admit(request.model)

    def _admit(self, model: int) -> None:
        """
        Lets those through whose turn it is with a model.
        """
        waiting = self._gate[model]
        while waiting and self._working[model] < PARALLEL:
            self._working[model] += 1
            self._request(waiting.popleft(), None)

    def resident(self) -> frozenset[str]:
        """
        What a router may know: the models that were here, or on their way, when it last
        heard of it.
        """
        if self._now_s - self._seen[-1][0] >= SEEN_EVERY_S:
            here = {State.RESIDENT, State.LOADING}
            there = (each.key.model for each in self._entries if each.state in here)
            self._seen.append((self._now_s, frozenset(there)))
            self._seen.popleft()
        return self._seen[-1][1]

    def _grant(self, asked: Asked, lease: Lease) -> None:
        lease.owned = True
        self._counts["served"] += 1
        work = ExitStack()
        work.enter_context(self.meter.working(lease._entry.key.model))
        self._segment(asked.spec, lease, work, SEGMENTS)

    def _segment(self, spec: Request, lease: Lease, work: ExitStack, left: int) -> None:
        """
        Computes one of the segments that are left, after those that came before.
        """
        if not left:
            work.close()
            self._end_call(spec, lease)
            return
        began_s = max(self._free_at_s, self._now_s)
        self._free_at_s = began_s + spec.service_s / SEGMENTS
        self._at(self._free_at_s, partial(self._segment, spec, lease, work, left - 1))

    def _end_call(self, spec: Request, lease: Lease) -> None:
        self.queues[self._senders.pop(spec)][lease._entry.key.model] -= 1
        self.took_s.append(self._now_s - spec.at_s)
        self._scheduler.release(lease._entry, lease._serial, None)
        self._working[spec.model] -= 1
        self._admit(spec.model)
        self._perform()

    def _loaded(self, entry: Entry) -> None:
        self.load_s[entry.key.model] = self._now_s - self._began_s[entry]
        super()._loaded(entry)


def _told(seconds: float) -> float:
    """
    As replicas tell it.
    """
    return float(f"{seconds:.1g}")


def _all_told(seconds: Mapping[str, float]) -> dict[str, float]:
    return {model: _told(each) for model, each in seconds.items()}


# Chooses a card for a model, as the router of that number.
Route: TypeAlias = "Callable[[Model, Sequence[Card], int], Card]"


def by_rule(models: Sequence[Model], reluctance: float) -> Callable[[], Route]:
    """
    Routes by `whispercache.planning.routing`.
    """
    sizes = {each.key.model: each.weights_bytes for each in models}

    def start() -> Route:
        # When each router sent a model somewhere, where it will be soon.
        sent: dict[tuple[int, str, str], float] = {}
        # How many requests of others there were when a router sent one, and when.
        others: dict[tuple[int, str], tuple[int, float]] = {}

        def resident(router: int, card: Card) -> set[str]:
            mine = {
                name
                for (sender, place, name), at_s in sent.items()
                if (sender, place) == (router, card.name)
                and card._now_s < at_s + 4 * SEEN_EVERY_S
            }
            waited = {name for name, n in card.queues[router].items() if n}
            return mine | waited | card.resident()

        def queued(router: int, card: Card) -> Counter[str]:
            n, at_s = others.get((router, card.name), (0, 0.0))
            known = n if card._now_s < at_s + OTHERS_S else 0
            return card.queues[router] + Counter({"": known})

        def route(model: Model, cards: Sequence[Card], router: int) -> Card:
            known = [
                Replica(
                    card.name,
                    {"cuda:0": CAPACITY_BYTES},
                    dict.fromkeys(resident(router, card), "cuda:0"),
                    sizes=sizes,
                    load_s=_all_told(card.load_s),
                    calls_s=_all_told(card.meter.calls_s),
                    call_s=_told(card.meter.call_s),
                    queued=queued(router, card),
                )
                for card in cards
            ]
            name = order(model.key.model, pooled(known), reluctance)[0].name
            chosen = next(card for card in cards if card.name == name)
            sent[router, name, model.key.model] = chosen._now_s
            n = chosen.queue - chosen.queues[router].total()
            others[router, name] = n, chosen._now_s
            return chosen

        return route

    return start


def round_robin() -> Route:
    """
    Each in turn.
    """
    turns = itertools.count()
    return lambda _model, cards, _router: cards[next(turns) % len(cards)]


def shorter_of_two() -> Route:
    """
    The shorter queue of two by chance, as Ray's default router.
    """
    dice = random.Random(0)

    def route(_model: Model, cards: Sequence[Card], _router: int) -> Card:
        return min(dice.sample(cards, 2), key=lambda each: each.queue)

    return route


def hashed() -> Route:
    """
    Always the same one for a model.
    """
    nothing: Mapping[str, int] = {}

    def route(model: Model, cards: Sequence[Card], _router: int) -> Card:
        alike = [Replica(card.name, nothing) for card in cards]
        name = order(model.key.model, alike)[0].name
        return next(card for card in cards if card.name == name)

    return route


ROUTES: Mapping[str, Callable[[], Route]] = {
    "shorter of two queues": shorter_of_two,
    "round robin": round_robin,
    "hash of the model": hashed,
    **{
        f"rule, a load counts up to {times:g}": by_rule(CLUSTER_MODELS, times)
        for times in (1, 4, 8, 16)
    },
}


# As whispercache.ray routes.
RULE = f"rule, a load counts up to {RELUCTANCE:g}"


def busy_trace(
    dice: random.Random, n: int, cards: int, calls_s: Mapping[str, float] = CALLS_S
) -> Iterator[Request]:
    """
    Yields the same requests as benchmarks/cluster.py plays.
    """
    names = list(SIZES)
    for at_s, name in requests_of(dice, n, cards, calls_s):
        yield Request(at_s, names.index(name), calls_s[name])


def serve_all(
    route: Route, requests: Sequence[Request], n_cards: int, routers: int = 1
) -> FleetReport:
    """
    Serves *requests* with that many cards, and routers that take turns.
    """
    turns = itertools.cycle(range(routers))
    cards = [Card(f"r{i}", CLUSTER_MODELS, CAPACITY_BYTES) for i in range(n_cards)]
    for request in requests:
        for card in cards:
            card.advance(request.at_s)
        router = next(turns)
        route(CLUSTER_MODELS[request.model], cards, router).come(request, router)
    for card in cards:
        card.advance(math.inf)
        assert not card.queue, f"{card.queue} requests are waited for, for ever"
    return FleetReport(
        sum(card._counts["loads"] for card in cards),
        sorted(took_s for card in cards for took_s in card.took_s),
        max(card._device.budget.peak_bytes for card in cards),
    )
