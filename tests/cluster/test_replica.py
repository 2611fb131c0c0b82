"""
One replica, asked as Ray and servers ask it, without a cluster.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from whispercache import DeviceLost, ModelKey
from whispercache.server import ServerOptions
from whispercache.server.engine import Terms
from whispercache.server.offers import Offers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cluster_models import CARD_BYTES, GIB, SIZES

pytestmark = pytest.mark.cluster

SILENCE = np.zeros(16_000, np.float32)
OPTIONS = ServerOptions(models=tuple(SIZES), device="cuda")
OFFERS = {offer.name: offer for offer in Offers(OPTIONS.offered, "cuda")}


def run(
    monkeypatch: pytest.MonkeyPatch, steps: Callable[[Any], Awaitable[None]]
) -> None:
    """
    What a replica of fakes does.
    """
    serve = pytest.importorskip("ray.serve", reason="this needs the extra [ray]")
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    import fake_replica

    monkeypatch.setattr(fake_replica, "load_s", lambda _: 0.0)

    async def main() -> None:
        replica = fake_replica.FakeReplica(OPTIONS, {})
        await steps(replica)

    asyncio.run(main())


def test_what_it_tells_once_and_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Nothing in the latter changes by itself: each change is sent to all routers.
    """

    async def steps(replica: Any) -> None:
        fixed = await replica.record_replica_metadata()
        assert list(fixed["capacity"]) == ["cuda:0"]
        assert 0.8 * CARD_BYTES < fixed["capacity"]["cuda:0"] <= CARD_BYTES
        assert fixed["sizes"].keys() == SIZES.keys()
        assert fixed["sizes"]["small"] >= GIB // 2
        told = await replica.record_routing_stats()
        assert told["resident"] == {}
        await replica.load(OFFERS["small"], Terms(5))
        told = await replica.record_routing_stats()
        assert told["resident"] == {"small": ("cuda:0", GIB // 2)}
        await asyncio.sleep(0.01)
        assert await replica.record_routing_stats() == told
        assert told["calls_s"] == {}
        async for _ in replica.hear(OFFERS["small"], SILENCE, {}, Terms(5)):
            pass
        told = await replica.record_routing_stats()
        # No timer sleeps for less.
        assert told["calls_s"]["small"] >= 0.2
        assert (await replica.record_autoscaling_stats())["fill"] > 0
        assert (await replica.seen())[0] == "r1"

    run(monkeypatch, steps)


def test_limits_and_pins_change_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    By what stands in ``user_config``.
    """

    async def steps(replica: Any) -> None:
        await replica.reconfigure({"pin": ["small"], "vram": "4GiB"})
        await asyncio.gather(*replica._pins.values())
        assert (await replica.record_routing_stats())["pinned"] == ["small"]
        assert (await replica.record_replica_metadata())["capacity"] == {
            "cuda:0": 4 * GIB
        }
        await replica.reconfigure({"pin": [], "vram": "auto"})
        told = await replica.record_routing_stats()
        assert (told["pinned"], list(told["resident"])) == ([], ["small"])
        with pytest.raises(ValueError, match="nobody is not among"):
            await replica.reconfigure({"pin": ["nobody"]})

    run(monkeypatch, steps)


def test_who_leaves_in_mid_stream_lets_the_model_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    At once, and not when the generator is collected.
    """

    async def steps(replica: Any) -> None:
        stream = replica.hear(OFFERS["small"], SILENCE, {}, Terms(5))
        heard = []
        async for kind, item in stream:
            heard.append(item if kind == "phase" else kind)
            if kind == "segment":
                break
        # What it waits for in between is the engine's to tell.
        assert (heard[0], heard[-3:]) == ("here", ["working", "info", "segment"])
        assert "loading" in heard
        assert replica._cache.stats().leases == 1
        await stream.aclose()
        assert replica._cache.stats().leases == 0

    run(monkeypatch, steps)


def test_a_replica_that_is_of_no_more_use_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    So that Ray replaces it.
    """

    async def steps(replica: Any) -> None:
        await replica.check_health()
        key = ModelKey("small", "cuda:0", "float16")
        replica._note(DeviceLost(key, "cuda:0", "it fell off the bus"))
        with pytest.raises(RuntimeError, match="fell off the bus"):
            await replica.check_health()

    run(monkeypatch, steps)
