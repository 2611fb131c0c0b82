"""
Models on Ray Serve: our router beside Ray's own, over the same traces in one run.

    python benchmarks/cluster.py [--requests 240] [--traces 3] [--single 60] [--write]

Needs the extra [ray]. Real Ray, real routers and the real cache in each replica; the
models only take time: three replicas, each with a card of 6.5 GiB that computes one
call at a time, and eight models of 13.3 GiB (cluster_models.py). All ways serve a trace
at the same time, each with replicas of its own, so that what else the machine does
concerns all alike.

Ray's multiplexing knows no bytes, only a number of models, N. By its bytes that one is
safe with which the largest N fit, and a call's workspace (`safe_n`). It evicts models
in mid-request, too, whose bytes are counted for as long as they are used; so N=1 is
shown as well.

What a request costs more through Ray Serve than through `whispercache serve` is
measured with a model that takes no time, by turns.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import secrets
import statistics
import sys
import tempfile
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

import httpx
import numpy as np
import ray
from cluster_models import (
    CARD_BYTES,
    GIB,
    SIZES,
    WORKSPACE_BYTES,
    load_s,
    requests_of,
)
from fake_replica import FakeReplica
from ray import serve
from ray.serve.config import RequestRouterConfig
from real import clip, micro
from report import Table, machine, parsed, write
from served import command

from whispercache.ray import deployment
from whispercache.ray.router import STATS_S
from whispercache.server.engine import Terms
from whispercache.server.offers import Offer, Offers
from whispercache.server.options import ServerOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence

    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

ROOT = Path(__file__).parents[1]
REPLICAS = 3
NO_PROCESSOR = {"num_cpus": 0}
EXPERIMENTAL = "ray.serve.experimental"
OURS = "whispercache.ray"
DEFAULT = "Ray's default router, our caches"


def safe_n() -> int:
    """
    The number of models that fit whichever they are, with the workspace of one call.
    """
    left_gib = (CARD_BYTES - WORKSPACE_BYTES) / GIB
    largest = sorted((gib for gib, _ in SIZES.values()), reverse=True)
    return sum(total <= left_gib for total in itertools.accumulate(largest))


MUXED = {
    f"Ray's multiplexing, N={n}": n
    # Once more, if a single one is not safe.
    for n in dict.fromkeys((safe_n(), 1))
}
SAFE = next(iter(MUXED))

ROUTERS = {
    OURS: "whispercache.ray.router.ModelRouter",
    DEFAULT: "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
    "round robin, our caches": f"{EXPERIMENTAL}.round_robin_router.RoundRobinRouter",
    "ConsistentHashRouter, our caches": (
        f"{EXPERIMENTAL}.consistent_hash_router.ConsistentHashRouter"
    ),
}


def muxed(n: int) -> type:
    """
    Returns a replica with Ray's own multiplexing of *n* models, which take the same
    time.
    """

    class Muxed:
        def __init__(self) -> None:
            self._loads = 0
            self._alive: Counter[str] = Counter()
            self._peak_bytes = 0
            self._card = asyncio.Lock()

        @serve.multiplexed(max_num_models_per_replica=n)  # type: ignore[untyped-decorator,unused-ignore]
        async def model(self, name: str) -> object:
            class Model: ...

            self._loads += 1
            model = Model()
            self._alive[name] += 1
            weakref.finalize(model, self._alive.subtract, [name])
            alive = sum(SIZES[each][0] * n for each, n in self._alive.items())
            self._peak_bytes = max(self._peak_bytes, int(alive * GIB))
            await asyncio.sleep(load_s(name))
            return model

        async def hear(self, offer: Offer, *_: object) -> AsyncIterator[object]:
            model = await self.model(offer.name)
            async with self._card:
                await asyncio.sleep(SIZES[offer.name][1])
            del model
            yield None

        async def counted(self) -> tuple[str, int, str, int, int]:
            return "", os.getpid(), "", self._loads, self._peak_bytes

    return Muxed


@dataclass(frozen=True)
class Outcome:
    """
    How a way went: loads for each hundred requests, seconds in order, peak bytes.
    """

    loads: float
    took_s: list[float]
    peak_bytes: int
    failed: int

    def share_s(self, share: float) -> float:
        return self.took_s[math.ceil(share * len(self.took_s)) - 1]


def application(way: str) -> Application:
    """
    The replicas of a way.
    """
    if way in MUXED:
        return (
            serve.deployment(muxed(MUXED[way]), name="engine", num_replicas=REPLICAS)
            .options(max_ongoing_requests=1000, ray_actor_options=NO_PROCESSOR)
            .bind()
        )
    config = RequestRouterConfig(
        request_router_class=ROUTERS[way], request_routing_stats_period_s=STATS_S
    )
    options = ServerOptions(models=tuple(SIZES), device="cuda")
    return (
        serve.deployment(FakeReplica, name="engine", num_replicas=REPLICAS)
        .options(
            max_ongoing_requests=1000,
            ray_actor_options=NO_PROCESSOR,
            request_router_config=config,
            user_config={"keep_alive": "-1"},
        )
        .bind(options, {})
    )


async def play(
    way: str, replicas: DeploymentHandle[Any], requests: Sequence[tuple[float, str]]
) -> list[float]:
    """
    Sends each request at its time, and returns the seconds that each took.
    """
    offers = Offers(ServerOptions(models=tuple(SIZES)).offered, "cuda")
    silence = ray.put(np.zeros(16_000, np.float32))
    start_s = time.perf_counter()

    async def ask(at_s: float, name: str) -> float:
        await asyncio.sleep(max(0.0, start_s + at_s - time.perf_counter()))
        # Routers that know of no models go by the session.
        by_model = way == OURS or way in MUXED
        key = {"multiplexed_model_id" if by_model else "session_id": name}
        ask = replicas.options(stream=True, method_name="hear", **key)
        began_s = time.perf_counter()
        async for _ in ask.remote(offers.find(name), silence, {}, Terms(600)):
            pass
        return time.perf_counter() - began_s

    asked = (ask(at_s, name) for at_s, name in requests)
    took = await asyncio.gather(*asked, return_exceptions=True)
    return [each for each in took if isinstance(each, float)]


def outcomes(
    ways: Sequence[str], requests: Sequence[tuple[float, str]]
) -> list[Outcome]:
    """
    How the ways serve the requests, all at the same time.
    """
    names = [f"way{i}" for i in range(len(ways))]
    handles = serve.run_many(
        [
            serve.RunTarget(application(way), name=name, route_prefix=None)
            for way, name in zip(ways, names, strict=True)
        ]
    )
    time.sleep(2)  # for the first statistics

    async def all_ways() -> list[list[float]]:
        playing = (
            play(way, replicas, requests)
            for way, replicas in zip(ways, handles, strict=True)
        )
        return await asyncio.gather(*playing)

    taken = asyncio.run(all_ways())
    counted = [replicas.broadcast("counted").results() for replicas in handles]
    with ThreadPoolExecutor() as pool:
        list(pool.map(serve.delete, names))
    return [
        Outcome(
            100 * sum(each[3] for each in replicas) / len(requests),
            sorted(took_s),
            max(each[4] for each in replicas),
            len(requests) - len(took_s),
        )
        for took_s, replicas in zip(taken, counted, strict=True)
    ]


def measures(outcomes: Sequence[Outcome]) -> Iterator[list[float]]:
    """
    Loads, medians and 95th percentiles of the traces.
    """
    yield [each.loads for each in outcomes]
    yield [each.share_s(0.5) for each in outcomes]
    yield [each.share_s(0.95) for each in outcomes]


def played(n: int, traces: int) -> dict[str, list[Outcome]]:
    """
    How each way served each of the traces.
    """
    ways = [OURS, DEFAULT, *[each for each in ROUTERS if each not in (OURS, DEFAULT)]]
    ways += MUXED
    found: dict[str, list[Outcome]] = {way: [] for way in ways}
    for trace in range(traces):
        requests = list(requests_of(random.Random(trace), n, REPLICAS))
        for way, outcome in zip(ways, outcomes(ways, requests), strict=True):
            found[way].append(outcome)
            sys.stderr.write(
                f"{trace} {way}: {outcome.loads:.1f} {outcome.share_s(0.95):.1f} s\n"
            )
    return found


def routers_table(n: int, found: Mapping[str, Sequence[Outcome]]) -> Table:
    """
    All ways over the same traces, relative to Ray's default router.
    """
    traces = len(found[OURS])
    table = Table(
        f"{REPLICAS} replicas with cards of {CARD_BYTES / GIB:.1f} GiB, 8 models of "
        f"13.3 GiB, {traces} traces of {n} requests; ratios to the second row",
        ["", "loads/100", "÷", "p50, s", "÷", "p95, s", "÷", "most on a card", "lost"],
    )
    for way, outcomes in found.items():
        cells = []
        for values, usual in zip(
            measures(outcomes), measures(found[DEFAULT]), strict=True
        ):
            cells += [" ".join(f"{value:.1f}" for value in values)]
            cells += [" ".join(f"{share:.2f}" for share in _shares(values, usual))]
        peak = max(each.peak_bytes for each in outcomes) / GIB
        lost = sum(each.failed for each in outcomes)
        table.add(way, *cells, f"{peak:.1f} GiB", f"{lost}")
    return table


def _shares(values: Iterable[float], usual: Iterable[float]) -> list[float]:
    return [a / b for a, b in zip(values, usual, strict=True)]


def targets_table(found: Mapping[str, Sequence[Outcome]]) -> Table:
    """
    What our router is to reach, and what it reached.
    """
    loads, _, p95 = measures(found[OURS])
    usual_loads, _, usual_p95 = measures(found[DEFAULT])
    muxed_loads, _, muxed_p95 = measures(found[SAFE])
    card = [each.peak_bytes / CARD_BYTES for each in found[OURS]]
    table = Table(
        "Targets of our router",
        ["", "at most", "median", "worst", "traces that reach it"],
    )
    for what, most, values in (
        ("loads ÷ Ray's default router's", 0.15, _shares(loads, usual_loads)),
        ("p95 ÷ Ray's default router's", 0.65, _shares(p95, usual_p95)),
        (f"loads ÷ {SAFE}", 0.35, _shares(loads, muxed_loads)),
        (f"p95 ÷ {SAFE}", math.inf, _shares(p95, muxed_p95)),
        ("most on a card ÷ the card", 1.0, card),
    ):
        reached = sum(value <= most for value in values)
        table.add(
            what,
            f"{most:.2f}" if math.isfinite(most) else "",
            f"{statistics.median(values):.2f}",
            f"{max(values):.2f}",
            f"{reached} of {len(values)}" if math.isfinite(most) else "",
        )
    return table


class Took(NamedTuple):
    """
    Milliseconds of requests through one server.
    """

    plain: list[float]
    ray: list[float]


def overhead_line(n: int, address: str) -> str:
    """
    What Ray Serve adds to a request, with a model that takes no time; both compute it
    on one thread, as a replica with one processor does.
    """
    model = f"m={micro('micro says hello')}"
    serve.run(deployment([model], device="cpu"), name="micro", route_prefix="/")
    took = Took([], [])
    with (
        command(model, "--device", "cpu", OMP_NUM_THREADS="1") as (_, plain),
        httpx.Client(base_url=address, timeout=60) as through,
    ):
        for _ in range(n):
            for client, values in ((plain, took.plain), (through, took.ray)):
                began_s = time.perf_counter()
                with Path(clip("en-bread")).open("rb") as file:
                    client.post(
                        "/v1/audio/transcriptions",
                        data={"model": "m", "language": "en"},
                        files={"file": ("a.flac", file)},
                    ).raise_for_status()
                values.append(1000 * (time.perf_counter() - began_s))
    serve.delete("micro")
    plain_ms, ray_ms = statistics.median(took.plain), statistics.median(took.ray)
    return (
        f"A request of 3 s of audio, one at a time: {plain_ms:.0f} ms by `whispercache "
        f"serve`, {ray_ms:.0f} ms through Ray Serve, by turns, medians of {n}: "
        f"{ray_ms - plain_ms:.0f} ms more."
    )


def main() -> None:
    options = parsed(__doc__, requests=240, traces=3, single=60)
    started_s = time.perf_counter()
    path = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [*path, os.environ.get("PYTHONPATH", "")]
    )
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Else Ray writes one into the user's home.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray.init(
            address="local",
            # Of as many, Ray starts processes ahead.
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * 1024**2,
            _temp_dir=folder,
        )
        serve.start(http_options={"host": "127.0.0.1", "port": 8123})
        address = "http://127.0.0.1:8123"
        parts: list[object] = [overhead_line(options.single, address)]
        # With no traces, the first alone.
        if options.traces:
            found = played(options.requests, options.traces)
            parts += [routers_table(options.requests, found), targets_table(found)]
        serve.shutdown()
        ray.shutdown()
    parts.append(f"All of this took {time.perf_counter() - started_s:.0f} s.")
    write(
        "cluster", [machine(), f"Ray {ray.__version__}", *parts], to_file=options.write
    )


if __name__ == "__main__":
    main()
