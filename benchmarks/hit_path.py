"""
What a lease on a model in memory costs, beside other ways to hand out something shared.

    python benchmarks/hit_path.py [--seconds 0.3] [--write]

Contenders, each asked for keys in random order, by 1 to 16 threads, at 10 and at 10,000
keys: a bare ``functools.lru_cache``, which pins nothing; SQLAlchemy's ``QueuePool``,
one per key, checked out and in (a real resource pool, which gives a connection to one
user); and whispercache's ``lease()`` + ``release()``, over fake models, since the model
takes no part in it.

All in one run, in turns, medians of several rounds: machines are noisy, ratios less so.
"""

from __future__ import annotations

import functools
import random
import sqlite3
import statistics
import threading
import time
from typing import TYPE_CHECKING, cast

from report import Table, machine, parsed, write
from sqlalchemy.pool import QueuePool

from whispercache import ModelCache
from whispercache.testing import FakeLoader, FakeMachine

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine.interfaces import DBAPIConnection

KEYS = (10, 10_000)
THREADS = (1, 2, 4, 8, 16)
ROUNDS = 7


def bare_lru_cache(keys: list[str]) -> Callable[[str], None]:
    @functools.lru_cache(maxsize=len(keys))
    def get_model(name: str, device: str, compute_type: str) -> tuple[str, ...]:
        return name, device, compute_type

    for key in keys:
        get_model(key, "cpu", "int8")

    def use(key: str) -> None:
        get_model(key, "cpu", "int8")

    return use


def queue_pool(keys: list[str]) -> Callable[[str], None]:
    def connect() -> DBAPIConnection:
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        return cast("DBAPIConnection", connection)

    # Connections are made when they are needed, and there is one for each thread.
    pools = {key: QueuePool(connect, pool_size=max(THREADS)) for key in keys}

    def use(key: str) -> None:
        pools[key].connect().close()

    return use


def whispercache_lease(keys: list[str]) -> Callable[[str], None]:
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
    "SQLAlchemy QueuePool": queue_pool,
    "whispercache lease": whispercache_lease,
}


def microseconds(
    use: Callable[[str], None], keys: list[str], threads: int, seconds: float
) -> float:
    """
    Returns the elapsed microseconds over the uses of all threads together.
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
    options = parsed(__doc__, seconds=0.3)
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
    write("hit_path", [machine(), table, *lines], to_file=options.write)


if __name__ == "__main__":
    main()
