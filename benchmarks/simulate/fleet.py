"""
A cluster in virtual time: the real routing rule over replicas with the real scheduler.

Each replica is a card with a cache of its own, which computes one call at a time; a
router sends each request to one of them as it comes. Routers know what they sent and
what is in memory, the latter as it was a moment ago; with several of them, each knows
only its own requests.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, deque
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from cluster_models import CARD_BYTES, GIB, SIZES, load_s, requests_of
from pieces import Model, Strategy
from simulation import Simulation
from traces import Request

from whispercache.core.entries import State
from whispercache.keys import ModelKey
from whispercache.planning.routing import RELUCTANCE, Replica, order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import TypeAlias

    from simulation import Asked

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

CLUSTER_MODELS = tuple(
    Model(ModelKey(name, "cuda:0", "float16"), int(gib * GIB), GIB // 4, load_s(name))
    for name, (gib, _) in SIZES.items()
)
CALLS_S = [call_s for _, call_s in SIZES.values()]


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
        # Requests that it has, by the router that sent them.
        self.queues: Counter[int] = Counter()
        self._senders: dict[Request, int] = {}
        self.took_s: list[float] = []
        self._free_at_s = 0.0
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
        return self.queues.total()

    def come(self, request: Request, sender: int) -> None:
        """
        Takes a request that comes now, from one of the routers.
        """
        self.queues[sender] += 1
        self._senders[request] = sender
        self._request(request, None)

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
        # After those that compute already.
        self._free_at_s = max(self._free_at_s, self._now_s) + asked.spec.service_s
        self._at(self._free_at_s, partial(self._end_call, asked, lease))

    def _end_call(self, asked: Asked, lease: Lease) -> None:
        self.queues[self._senders.pop(asked.spec)] -= 1
        self.took_s.append(self._now_s - asked.spec.at_s)
        self._scheduler.release(lease._entry, lease._serial, None)
        self._perform()


# Chooses a card for a model, as the router of that number.
Route: TypeAlias = "Callable[[Model, Sequence[Card], int], Card]"


def by_rule(models: Sequence[Model], reluctance: float) -> Callable[[], Route]:
    """
    Routes by `whispercache.planning.routing`.
    """
    sizes = {each.key.model: each.weights_bytes for each in models}
    loads_s = {each.key.model: each.load_s for each in models}
    call_s = sum(CALLS_S) / len(CALLS_S)

    def start() -> Route:
        # When each router sent a model somewhere, where it will be soon.
        sent: dict[tuple[int, str, str], float] = {}

        def resident(router: int, card: Card) -> set[str]:
            mine = {
                name
                for (sender, place, name), at_s in sent.items()
                if (sender, place) == (router, card.name)
                and card._now_s < at_s + 4 * SEEN_EVERY_S
            }
            return mine | card.resident()

        def route(model: Model, cards: Sequence[Card], router: int) -> Card:
            known = [
                Replica(
                    card.name,
                    {"cuda:0": CARD_BYTES},
                    dict.fromkeys(resident(router, card), "cuda:0"),
                    sizes=sizes,
                    load_s=loads_s,
                    call_s=call_s,
                    queue=card.queues[router],
                )
                for card in cards
            ]
            name = order(model.key.model, known, reluctance)[0].name
            chosen = next(card for card in cards if card.name == name)
            sent[router, name, model.key.model] = chosen._now_s
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
        f"rule, a load counts {times:g}": by_rule(CLUSTER_MODELS, times)
        for times in (1, 2, 3, 8)
    },
}


# As whispercache.ray routes.
RULE = f"rule, a load counts {RELUCTANCE:g}"


def busy_trace(dice: random.Random, n: int, cards: int) -> Iterator[Request]:
    """
    Yields the same requests as benchmarks/cluster.py plays.
    """
    names = list(SIZES)
    for at_s, name in requests_of(dice, n, cards):
        model = names.index(name)
        yield Request(at_s, model, CALLS_S[model])


def serve_all(
    route: Route, requests: Sequence[Request], n_cards: int, routers: int = 1
) -> FleetReport:
    """
    Serves *requests* with that many cards, and routers that take turns.
    """
    turns = itertools.cycle(range(routers))
    cards = [Card(f"r{i}", CLUSTER_MODELS, CARD_BYTES) for i in range(n_cards)]
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
