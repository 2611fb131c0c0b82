"""
What a lease on a model in memory costs, beside other ways to hand out something shared.

    python benchmarks/hit_path.py [--seconds 0.3] [--write]

Contenders, each asked for keys in random order, by 1 to 16 threads, at 10 and at 10,000
keys: a bare ``functools.lru_cache``; a ``cachetools.LRUCache`` under a lock, as the
recipes have it; SQLAlchemy's ``QueuePool``, one per key, checked out and in (a real
resource pool: whoever holds a connection has it alone); and whispercache's ``lease()``
+ ``release()``, over fake models, since the model takes no part in it. The first two
pin nothing. A second table has what finds the books of a request on each hit, a plain
``dict``, beside the bounded maps that `cachetools` has for it.

All in one run, in turns, medians of several rounds: machines are noisy, ratios less so.
"""

from __future__ import annotations

import argparse
import functools
import random
import sqlite3
import statistics
import threading
import time
import timeit
from typing import TYPE_CHECKING, cast

from cachetools import FIFOCache, LRUCache
from report import Table, machine, write
from sqlalchemy.pool import QueuePool

from whispercache import ModelCache
from whispercache.testing import FakeLoader, FakeMachine

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

    from sqlalchemy.engine.interfaces import DBAPIConnection

KEYS = (10, 10_000)
THREADS = (1, 2, 4, 8, 16)
ROUNDS = 7


def bare_lru_cache(keys: list[str]) -> Callable[[str], None]:
    """
    ``@lru_cache``: finds the object, and pins nothing.
    """

    @functools.lru_cache(maxsize=len(keys))
    def get_model(name: str, device: str, compute_type: str) -> tuple[str, ...]:
        return name, device, compute_type

    for key in keys:
        get_model(key, "cpu", "int8")

    def use(key: str) -> None:
        get_model(key, "cpu", "int8")

    return use


def locked_lru_cache(keys: list[str]) -> Callable[[str], None]:
    """
    The usual recipe with limits: a `cachetools.LRUCache` under one lock.
    """
    lock = threading.Lock()
    cache: LRUCache[tuple[str, str, str], object] = LRUCache(len(keys))
    for key in keys:
        cache[key, "cpu", "int8"] = object()

    def use(key: str) -> None:
        with lock:
            cache[key, "cpu", "int8"]

    return use


def queue_pool(keys: list[str]) -> Callable[[str], None]:
    """
    SQLAlchemy's pool of connections, one pool for each key.
    """

    def connect() -> DBAPIConnection:
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        return cast("DBAPIConnection", connection)

    # Made when they are needed; nobody waits for one.
    pools = {key: QueuePool(connect, pool_size=max(THREADS)) for key in keys}

    def use(key: str) -> None:
        pools[key].connect().close()

    return use


def whispercache_lease(keys: list[str]) -> Callable[[str], None]:
    """
    ``lease()`` and ``release()``: finds the model, pins it, and lets it go.
    """
    host = FakeMachine({"cpu": "1TiB"})
    loader = FakeLoader(host, default_size=1, workspace_bytes=1 << 20)
    cache = ModelCache(loader=loader, probe=host)
    for key in keys:
        cache.preload(key, "cpu", "int8")

    def use(key: str) -> None:
        cache.lease(key, "cpu", "int8").release()

    return use


CONTENDERS = {
    "functools.lru_cache": bare_lru_cache,
    "cachetools.LRUCache + lock": locked_lru_cache,
    "SQLAlchemy QueuePool": queue_pool,
    "whispercache lease": whispercache_lease,
}


def look_ups(n_keys: int) -> dict[str, float]:
    """
    Microseconds to find one request among *n_keys*, by the map that has them.
    """
    requests = [(f"bench/model-{i}", "cpu", "int8") for i in range(n_keys)]
    order = random.Random(0).choices(requests, k=1000)
    maps: dict[str, MutableMapping[tuple[str, str, str], int]] = {
        "dict": {},
        "cachetools.FIFOCache": FIFOCache(n_keys),
        "cachetools.LRUCache": LRUCache(n_keys),
    }
    taken: dict[str, float] = {}
    for name, known in maps.items():
        known.update((request, place) for place, request in enumerate(requests))
        find = functools.partial(_find_all, known.get, order)
        times_s = timeit.repeat(find, number=20, repeat=ROUNDS)
        taken[name] = statistics.median(times_s) / 20 / len(order) * 1e6
    return taken


def _find_all(
    find: Callable[[tuple[str, str, str]], int | None],
    order: list[tuple[str, str, str]],
) -> None:
    for request in order:
        find(request)


def microseconds(
    use: Callable[[str], None], keys: list[str], threads: int, seconds: float
) -> float:
    """
    Elapsed microseconds over the uses of all threads together.
    """
    stop = threading.Event()
    done = [0] * threads
    ready = threading.Barrier(threads + 1)

    def work(place: int) -> None:
        order = random.Random(place).choices(keys, k=1000)
        ready.wait()
        while not stop.is_set():
            for key in order:
                use(key)
            done[place] += len(order)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    ready.wait()
    started_s = time.perf_counter()
    stop.wait(seconds)
    stop.set()
    for worker in workers:
        worker.join()
    return (time.perf_counter() - started_s) / sum(done) * 1e6


def main() -> None:
    """
    Measure, print, and write if asked to.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="for each number")
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    options = parser.parse_args()
    measured: dict[tuple[str, int, int], list[float]] = {}
    for n_keys in KEYS:
        keys = [f"bench/model-{i}" for i in range(n_keys)]
        uses = {name: make(keys) for name, make in CONTENDERS.items()}
        for _ in range(ROUNDS):
            for threads in THREADS:
                for name, use in uses.items():
                    one = microseconds(use, keys, threads, options.seconds)
                    measured.setdefault((name, n_keys, threads), []).append(one)
    median = {place: statistics.median(all_) for place, all_ in measured.items()}

    table = Table("µs per use, median of rounds", ["", "keys", *map(str, THREADS)])
    for name in CONTENDERS:
        for n_keys in KEYS:
            row = [f"{median[name, n_keys, threads]:.2f}" for threads in THREADS]
            table.add(name, f"{n_keys:,}", *row)
    found = {n_keys: look_ups(n_keys) for n_keys in KEYS}
    maps = Table("µs to find a request", ["", *(f"{n:,} keys" for n in KEYS)])
    for name in found[KEYS[0]]:
        maps.add(name, *(f"{found[n_keys][name]:.2f}" for n_keys in KEYS))
    ours = "whispercache lease"
    one_thread = median[ours, 10, 1]
    to_many = median[ours, 10_000, 1] / one_thread
    to_pool = one_thread / median["SQLAlchemy QueuePool", 10, 1]
    most = THREADS[-1]
    crowd = median[ours, 10, most] / median["SQLAlchemy QueuePool", 10, most]
    lines = [
        f"lease + release, one thread, 10 keys: {one_thread:.2f} µs",
        f"10,000 keys against 10: × {to_many:.2f}",
        f"against SQLAlchemy's QueuePool: × {to_pool:.2f}",
        f"the same, {most} threads: × {crowd:.2f}",
    ]
    write("hit_path", [machine(), table, maps, *lines], to_file=options.write)


if __name__ == "__main__":
    main()
