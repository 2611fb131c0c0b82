"""
What a lease on a model in memory costs, beside other ways to hand out something shared.

    python benchmarks/hit_path.py [--seconds 0.3] [--rounds 7] [--base PATH] [--write]

Contenders, each asked for keys in random order, by 1 to 16 threads, at 10 and at 10,000
keys: a bare ``functools.lru_cache``, which pins nothing; SQLAlchemy's ``QueuePool``,
one per key, checked out and in (a real resource pool, which gives a connection to one
user); and whispercache's ``lease()`` + ``release()``, of a cache, of a `CachedModel`
and awaited, over fake models, since the model takes no part in it.

With a *base*, the checkout of another build, that build's leases are measured as well.

Each build has a process of its own for all of the run. The contenders take turns, one
at a time; medians of the rounds. What counts is the CPU time of the process, over all
of its threads, so that other programs on the machine disturb little.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, cast

from report import Table, machine, parsed, write
from sqlalchemy.pool import QueuePool

import whispercache
from whispercache import AsyncModelCache, ModelCache
from whispercache.testing import FakeLoader, FakeMachine

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine.interfaces import DBAPIConnection

    # Uses each of many keys once.
    Use = Callable[[list[str]], None]

KEYS = (10, 10_000)
THREADS = (1, 2, 4, 8, 16)
AT_ONCE = 50


# Contenders ---------------------------------------------------------------------------


def bare_lru_cache(keys: list[str]) -> Use:
    @functools.lru_cache(maxsize=len(keys))
    def get_model(name: str, device: str, compute_type: str) -> tuple[str, ...]:
        return name, device, compute_type

    def use(order: list[str]) -> None:
        for key in order:
            get_model(key, "cpu", "int8")

    use(keys)
    return use


def queue_pool(keys: list[str]) -> Use:
    def connect() -> DBAPIConnection:
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        return cast("DBAPIConnection", connection)

    # Connections are made when they are needed, and there is one for each thread.
    pools = {key: QueuePool(connect, pool_size=max(THREADS)) for key in keys}

    def use(order: list[str]) -> None:
        for key in order:
            pools[key].connect().close()

    return use


@functools.cache
def with_all(n_keys: int) -> ModelCache:
    """
    Returns a cache with so many models in memory.
    """
    host = FakeMachine({"cpu": "1TiB"})
    loader = FakeLoader(host, default_size=1, workspace_bytes=1 << 20)
    cache = ModelCache(loader=loader, probe=host)
    keys = keys_of(n_keys)
    # One by one, each load would look at all the others.
    for place in range(0, n_keys, AT_ONCE):
        cache.lease_many(keys[place : place + AT_ONCE], "cpu", "int8").release()
    return cache


def cache_lease(keys: list[str]) -> Use:
    cache = with_all(len(keys))

    def use(order: list[str]) -> None:
        for key in order:
            cache.lease(key, "cpu", "int8").release()

    return use


def model_lease(keys: list[str]) -> Use:
    cache = with_all(len(keys))
    models = {key: cache.get_model(key, "cpu", "int8") for key in keys}

    def use(order: list[str]) -> None:
        for key in order:
            models[key].lease().release()

    return use


def awaited_lease(keys: list[str]) -> Use:
    cache = AsyncModelCache(with_all(len(keys)))
    here = threading.local()

    async def use_all(order: list[str]) -> None:
        for key in order:
            (await cache.lease(key, "cpu", "int8")).release()

    def use(order: list[str]) -> None:
        # A loop for each thread, which is not what is measured.
        if not hasattr(here, "loop"):
            here.loop = asyncio.new_event_loop()
        here.loop.run_until_complete(use_all(order))

    return use


LEASES = {
    "ModelCache.lease": cache_lease,
    "CachedModel.lease": model_lease,
    "AsyncModelCache.lease": awaited_lease,
}
CONTENDERS = {
    "functools.lru_cache": bare_lru_cache,
    "SQLAlchemy QueuePool": queue_pool,
    **LEASES,
}


# Processes ----------------------------------------------------------------------------


def microseconds(use: Use, keys: list[str], threads: int, seconds: float) -> float:
    """
    Returns the process's microseconds of CPU over the uses of all threads together.
    """
    stop = threading.Event()
    done = [0] * threads
    ready = threading.Barrier(threads + 1)

    def work(place: int) -> None:
        order = random.Random(place).choices(keys, k=1000)
        use(order)
        ready.wait()
        while not stop.is_set():
            use(order)
            done[place] += len(order)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    ready.wait()
    started_s = time.process_time()
    stop.wait(seconds)
    stop.set()
    for worker in workers:
        worker.join()
    return (time.process_time() - started_s) / sum(done) * 1e6


def keys_of(n_keys: int) -> list[str]:
    return [f"bench/model-{i}" for i in range(n_keys)]


def serve(n_keys: int) -> None:
    """
    Measures whatever is asked for, line by line: contender, threads, seconds.
    """
    keys = keys_of(n_keys)
    make = functools.cache(lambda name: CONTENDERS[name](keys))
    for line in sys.stdin:
        name, threads, seconds = line.split(",")
        us = microseconds(make(name), keys, int(threads), float(seconds))
        print(us, flush=True)


class Build:
    """
    A process that measures the contenders of one build.
    """

    def __init__(self, n_keys: int, checkout: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", str(n_keys)],
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, name: str, threads: int, seconds: float) -> float:
        """
        Returns the microseconds of one round.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(name, threads, seconds, sep=",", file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """
        Ends the process.
        """
        self._process.kill()
        self._process.communicate()


def measured(
    contenders: dict[str, tuple[str, Path]], n_keys: int, seconds: float, rounds: int
) -> dict[tuple[str, int, int], float]:
    """
    Returns the median of each contender at each number of threads.
    """
    all_us: dict[tuple[str, int, int], list[float]] = {}
    with ExitStack() as rest:
        builds: dict[Path, Build] = {}
        for _, checkout in contenders.values():
            if checkout not in builds:
                builds[checkout] = Build(n_keys, checkout)
                rest.callback(builds[checkout].close)
        # All is there before the first round.
        for name, checkout in contenders.values():
            builds[checkout].measure(name, 1, 0.01)
        for _ in range(rounds):
            for threads in THREADS:
                for title, (name, checkout) in contenders.items():
                    us = builds[checkout].measure(name, threads, seconds)
                    all_us.setdefault((title, n_keys, threads), []).append(us)
    return {place: statistics.median(each) for place, each in all_us.items()}


# Report -------------------------------------------------------------------------------


def ratios(median: dict[tuple[str, int, int], float]) -> Table:
    """
    Returns the leases of this build as multiples of those of the other.
    """
    table = Table("This build ÷ the base", ["", "keys", *map(str, THREADS)])
    for name in LEASES:
        for n_keys in KEYS:
            row = [
                median[name, n_keys, threads] / median[f"{name}, base", n_keys, threads]
                for threads in THREADS
            ]
            table.add(name, f"{n_keys:,}", *(f"{each:.2f}" for each in row))
    return table


def main() -> None:
    options = parsed(__doc__, seconds=0.3, rounds=7, base="")
    if options.child:
        serve(int(options.child))
        return
    ours = Path(whispercache.__file__).parents[1]
    contenders = {name: (name, ours) for name in CONTENDERS}
    if options.base:
        for name in LEASES:
            contenders[f"{name}, base"] = (name, Path(options.base).resolve())
    median: dict[tuple[str, int, int], float] = {}
    for n_keys in KEYS:
        median |= measured(contenders, n_keys, options.seconds, options.rounds)

    table = Table(
        "µs of CPU per use, median of rounds, by threads",
        ["", "keys", *map(str, THREADS)],
    )
    for title in contenders:
        for n_keys in KEYS:
            row = [f"{median[title, n_keys, threads]:.2f}" for threads in THREADS]
            table.add(title, f"{n_keys:,}", *row)
    lease, pool, most = "ModelCache.lease", "SQLAlchemy QueuePool", THREADS[-1]
    one_thread = median[lease, 10, 1]
    crowd = median[lease, 10, most] / median[pool, 10, most]
    lines: list[object] = [
        f"lease + release, one thread, 10 keys: {one_thread:.2f} µs",
        f"10,000 keys against 10: × {median[lease, 10_000, 1] / one_thread:.2f}",
        f"against {pool}: × {one_thread / median[pool, 10, 1]:.2f}",
        f"the same, {most} threads: × {crowd:.2f}",
    ]
    compared = [ratios(median)] if options.base else []
    write("hit_path", [machine(), table, *compared, *lines], to_file=options.write)


if __name__ == "__main__":
    main()
