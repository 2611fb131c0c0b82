"""
Models on Ray Serve: our router beside Ray's own, over one trace in one run.

    python benchmarks/cluster.py [--requests 240] [--traces 2] [--single 60] [--write]

Needs the extra [ray]. Real Ray, real routers and the real cache in each replica; the
models only take time: three replicas, each with a card of 6.5 GiB that computes one
call at a time, and eight models of 13.3 GiB (cluster_models.py). Ray's multiplexing has
no bytes; it keeps two models, as many of the largest as fit. Its bytes count those that
it evicted in mid-request, for as long as they are used.

What a request costs more through Ray Serve than through `whispercache serve` is
measured with a model that takes no time, by turns.
"""

from __future__ import annotations

import asyncio
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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

import httpx
import numpy as np
import ray
from cluster_models import CARD_BYTES, GIB, SIZES, load_s, requests_of
from fake_replica import FakeReplica
from ray import serve
from ray.serve.config import RequestRouterConfig
from real import clip, micro
from report import Table, machine, parsed, write
from served import command

from whispercache.ray import deployment
from whispercache.server.engine import Terms
from whispercache.server.offers import Offer, Offers
from whispercache.server.options import ServerOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from ray.serve.handle import DeploymentHandle

ROOT = Path(__file__).parents[1]
REPLICAS = 3
# As many of the largest as fit.
SAFE_N = 2
EXPERIMENTAL = "ray.serve.experimental"
OURS = "whispercache.ray"
DEFAULT = "Ray's default router, our caches"
MUXED = f"Ray's multiplexing, N={SAFE_N}"

ROUTERS = {
    OURS: "whispercache.ray.router.ModelRouter",
    DEFAULT: "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
    "round robin, our caches": f"{EXPERIMENTAL}.round_robin_router.RoundRobinRouter",
    "ConsistentHashRouter, our caches": (
        f"{EXPERIMENTAL}.consistent_hash_router.ConsistentHashRouter"
    ),
}


class Muxed:
    """
    A replica with Ray's own multiplexing, of models that take the same time.
    """

    def __init__(self) -> None:
        self._loads = 0
        self._alive: Counter[str] = Counter()
        self._peak_bytes = 0
        self._card = asyncio.Lock()

    @serve.multiplexed(max_num_models_per_replica=SAFE_N)  # type: ignore[untyped-decorator,unused-ignore]
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


def started(way: str, name: str) -> DeploymentHandle[Any]:
    """
    Starts the replicas of a way, and returns their handle.
    """
    if way == MUXED:
        app = serve.deployment(Muxed, name="engine", num_replicas=REPLICAS)
        app = app.options(max_ongoing_requests=1000).bind()
        serve.run(app, name=name, route_prefix=None)
        return serve.get_deployment_handle("engine", name)
    config = RequestRouterConfig(
        request_router_class=ROUTERS[way], request_routing_stats_period_s=0.2
    )
    options = ServerOptions(models=tuple(SIZES), device="cuda", parallel=100)
    app = serve.deployment(FakeReplica, name="engine", num_replicas=REPLICAS)
    app = app.options(
        max_ongoing_requests=1000,
        request_router_config=config,
        user_config={"keep_alive": "-1"},
    )
    serve.run(app.bind(options, {}), name=name, route_prefix=None)
    return serve.get_deployment_handle("engine", name)


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
        by_model = way in (OURS, MUXED)
        key = {"multiplexed_model_id" if by_model else "session_id": name}
        ask = replicas.options(stream=True, method_name="hear", **key)
        began_s = time.perf_counter()
        async for _ in ask.remote(offers.find(name), silence, {}, Terms(600)):
            pass
        return time.perf_counter() - began_s

    asked = (ask(at_s, name) for at_s, name in requests)
    took = await asyncio.gather(*asked, return_exceptions=True)
    return [each for each in took if isinstance(each, float)]


def outcome(way: str, name: str, requests: Sequence[tuple[float, str]]) -> Outcome:
    replicas = started(way, name)
    time.sleep(2)  # for the first statistics
    took_s = asyncio.run(play(way, replicas, requests))
    counted = replicas.broadcast("counted").results()
    serve.delete(name)
    return Outcome(
        100 * sum(each[3] for each in counted) / len(requests),
        sorted(took_s),
        max(each[4] for each in counted),
        len(requests) - len(took_s),
    )


def measures(outcomes: Sequence[Outcome]) -> Iterator[list[float]]:
    """
    Loads, medians and 95th percentiles of the traces.
    """
    yield [each.loads for each in outcomes]
    yield [each.share_s(0.5) for each in outcomes]
    yield [each.share_s(0.95) for each in outcomes]


def routers_table(n: int, traces: int) -> Table:
    """
    All ways over the same traces, relative to Ray's default router.
    """
    table = Table(
        f"{REPLICAS} replicas with cards of {CARD_BYTES / GIB:.1f} GiB, 8 models of "
        f"13.3 GiB, {traces} traces of {n} requests; times relative to the second row",
        ["", "loads/100", "÷", "p50, s", "÷", "p95, s", "÷", "most on a card", "lost"],
    )
    ways = [OURS, DEFAULT, *[each for each in ROUTERS if each not in (OURS, DEFAULT)]]
    found: dict[str, list[Outcome]] = {way: [] for way in (*ways, MUXED)}
    for trace in range(traces):
        requests = list(requests_of(random.Random(trace), n, REPLICAS))
        for i, way in enumerate(found):
            found[way].append(outcome(way, f"w{trace}{i}", requests))
            sys.stderr.write(f"{trace} {way}: {found[way][-1].loads:.1f}\n")
    for way, outcomes in found.items():
        cells = []
        for values, usual in zip(
            measures(outcomes), measures(found[DEFAULT]), strict=True
        ):
            cells += [" ".join(f"{value:.1f}" for value in values)]
            shares = (a / b for a, b in zip(values, usual, strict=True))
            cells += [" ".join(f"{share:.2f}" for share in shares)]
        peak = max(each.peak_bytes for each in outcomes) / GIB
        lost = sum(each.failed for each in outcomes)
        table.add(way, *cells, f"{peak:.1f} GiB", f"{lost}")
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
    options = parsed(__doc__, requests=240, traces=2, single=60)
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
            num_cpus=32,
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
            parts.append(routers_table(options.requests, options.traces))
        serve.shutdown()
        ray.shutdown()
    write(
        "cluster", [machine(), f"Ray {ray.__version__}", *parts], to_file=options.write
    )


if __name__ == "__main__":
    main()
