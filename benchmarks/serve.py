"""
The server under load: 64 clients, three models, room for two.

    python benchmarks/serve.py [--seconds 120] [--clients 64] [--seed 1] [--write]

A ``whispercache serve`` process on the CPU, with tiny.en, base and base:int8 under a
limit that holds any two of them at work, but not all three. Each client asks for some
model with one of the example clips, as a whole or as a stream, waits for the answer,
and asks again; refused ones wait as long as ``Retry-After`` says. Some hang up in
mid-upload or in mid-stream.

Afterwards the server is looked at for what is left of all that. Then there is load
again, and SIGTERM in the middle of it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

import av
import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from report import Table, machine, write

from examples.weights import packaged_model
from whispercache import footprint
from whispercache.errors import format_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

MODELS = {"tiny.en": "default", "base": "default", "base:int8": "int8"}
CLIPS = ("en-bread", "en-garden", "en-library", "en-weather", "de-zug", "es-casa")
DEVICE = "cpu"
MAX_WAITING = 40
SPARE = 1.02
SAMPLE_S = 0.25
DRAIN_S = 30
AFTER_S = 5.0
"""
Seconds of load before SIGTERM.
"""

ROOT = str(Path(__file__).parents[1])
URL = "/v1/audio/transcriptions"
SUCCESS = "200"
HUNG_UP = "hung up"
QUANTILES = ("p50", "p90", "p99")


class HangUpError(Exception):
    """
    The client leaves in the middle of its upload.
    """


@dataclass(frozen=True, slots=True)
class Clip:
    """
    Speech to be sent.
    """

    content: bytes
    seconds: float


@dataclass
class Tally:
    """
    What all clients saw.

    Attributes:
        outcomes: Status codes, hang-ups, and names of errors.
        latencies: Seconds of each success, by model.
        audio_s: Seconds of audio that came back as text.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    latencies: dict[str, list[float]] = field(default_factory=dict)
    audio_s: float = 0.0

    def add(self, outcome: str, model: str, took_s: float, audio_s: float) -> None:
        """
        Note what became of a request.
        """
        self.outcomes[outcome] += 1
        if outcome == SUCCESS:
            self.latencies.setdefault(model, []).append(took_s)
            self.audio_s += audio_s


@dataclass
class Peaks:
    """
    The most that was seen of the server.
    """

    main_bytes: int = 0
    decoders_bytes: int = 0
    waiting: int = 0
    leases: int = 0
    models: int = 0


@dataclass
class Server:
    """
    A server that runs.

    Attributes:
        process: Its process.
        url: Where it is.
        temporary: Its directory for temporary files.
        log: What it writes.
    """

    process: psutil.Popen
    url: str
    temporary: Path
    log: Path

    def memory(self) -> tuple[int, int]:
        """
        Resident bytes of the process, and of those that decode for it.
        """
        decoders = 0
        for child in self.process.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                decoders += child.memory_info().rss
        return self.process.memory_info().rss, decoders

    def files(self) -> int:
        """
        How many temporary files there are.
        """
        return len(list(self.temporary.iterdir()))


def limit_bytes() -> int:
    """
    A limit that any two models keep while each answers one request, but not all three.
    """
    sizes = [
        footprint(packaged_model(name.partition(":")[0]), kind, DEVICE)
        for name, kind in MODELS.items()
    ]
    taken = [each.weights_bytes + each.workspace_bytes for each in sizes]
    limit = int(SPARE * max(a + b for a, b in itertools.combinations(taken, 2)))
    assert limit < sum(taken), "all three fit"
    return limit


@contextmanager
def serving(limit: int) -> Iterator[Server]:
    """
    A server with that limit, ready.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    models = [f"{name}={packaged_model(name.partition(':')[0])}" for name in MODELS]
    kinds = [name.partition(":")[2] for name in MODELS]
    places = [f"{m}:{k}" if k else m for m, k in zip(models, kinds, strict=True)]
    options = {
        "--device": DEVICE,
        "--ram": limit,
        "--port": port,
        "--max-waiting": MAX_WAITING,
        "--drain": DRAIN_S,
    }
    line = [str(each) for option in options.items() for each in option]
    with tempfile.TemporaryDirectory() as directory:
        temporary, log = Path(directory, "temporary"), Path(directory, "log")
        temporary.mkdir()
        with log.open("wb") as file:
            process = psutil.Popen(
                [
                    sys.executable,
                    "-m",
                    "whispercache.cli.main",
                    "serve",
                    *places,
                    *line,
                ],
                env={**os.environ, "PYTHONPATH": ROOT, "TMPDIR": str(temporary)},
                stdout=file,
                stderr=file,
            )
        try:
            server = Server(process, f"http://127.0.0.1:{port}", temporary, log)
            wait_until_ready(server)
            yield server
        finally:
            with suppress(psutil.NoSuchProcess):
                process.kill()
            process.wait()


def wait_until_ready(server: Server) -> None:
    """
    Wait until it answers.
    """
    for _ in range(300):
        with suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/readyz").status_code == HTTPStatus.OK:
                return
        time.sleep(0.1)
    raise SystemExit(f"the server does not start:\n{server.log.read_text()}")


def clips() -> list[Clip]:
    """
    Example clips of a few seconds.
    """
    read = []
    for name in CLIPS:
        path = Path(ROOT, "examples", "clips", f"{name}.flac")
        with av.open(str(path)) as container:
            seconds = (container.duration or 0) / 1e6
        read.append(Clip(path.read_bytes(), seconds))
    return read


class Load:
    """
    Clients that ask until they are told to stop.

    Args:
        server: Whom they ask.
        seed: Of their dice.
        hang_ups: Share of requests that nobody waits for.
    """

    def __init__(self, server: Server, seed: int, hang_ups: float) -> None:
        self._server = server
        self._seed = seed
        self._hang_ups = hang_ups
        self._clips = clips()
        self.is_over = False

    async def run(self, clients: int, seconds: float) -> Tally:
        """
        Ask for so long; what has begun is waited for.
        """
        tally = Tally()
        limits = httpx.Limits(max_connections=None)
        url = self._server.url
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
            tasks = [
                asyncio.create_task(self._client(http, number, tally))
                for number in range(clients)
            ]
            await asyncio.sleep(seconds)
            self.is_over = True
            await asyncio.gather(*tasks)
        return tally

    async def _client(self, http: httpx.AsyncClient, number: int, tally: Tally) -> None:
        dice = random.Random(f"{self._seed} {number}")
        while not self.is_over:
            model, clip = dice.choice(list(MODELS)), dice.choice(self._clips)
            asked_s = time.perf_counter()
            outcome, retry_s = await self._ask(http, dice, model, clip)
            took_s = time.perf_counter() - asked_s
            tally.add(outcome, model, took_s, clip.seconds)
            for _ in range(round(retry_s * dice.uniform(1, 2) * 10)):
                if self.is_over:
                    return
                await asyncio.sleep(0.1)

    async def _ask(
        self, http: httpx.AsyncClient, dice: random.Random, model: str, clip: Clip
    ) -> tuple[str, float]:
        """
        What became of one request, and seconds to wait before the next.
        """
        streams, leaves = dice.random() < 1 / 4, dice.random() < self._hang_ups
        fields = {"model": model, "stream": str(streams).lower()}
        files = {"file": ("clip.flac", clip.content)}
        request = http.build_request("POST", URL, data=fields, files=files)
        try:
            if leaves and not streams:
                await leave_in_mid_upload(http, request)
                return HUNG_UP, 0
            answer = await http.send(request, stream=True)
            try:
                if leaves:
                    await anext(answer.aiter_bytes(), None)
                    return HUNG_UP, 0
                body = await answer.aread()
            finally:
                await answer.aclose()
        except httpx.TransportError as error:
            return type(error).__name__, 0
        outcome = str(answer.status_code)
        is_whole = b"transcript.text.done" in body or not streams
        if outcome == SUCCESS and not is_whole:
            outcome = "broken stream"
        return outcome, float(answer.headers.get("retry-after", 0))


async def leave_in_mid_upload(http: httpx.AsyncClient, request: httpx.Request) -> None:
    """
    Send half of *request*, and hang up.
    """
    body = request.read()

    async def half() -> AsyncIterator[bytes]:
        yield body[: len(body) // 2]
        raise HangUpError

    broken = http.build_request("POST", URL, headers=request.headers, content=half())
    with suppress(HangUpError):
        await http.send(broken)


async def watch(server: Server, peaks: Peaks) -> None:
    """
    Look at the server again and again, until cancelled.
    """
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        while True:
            main_bytes, decoders_bytes = server.memory()
            seen = (await http.get("/api/ps")).json()
            models = [each for each in seen["models"] if each["state"] == "resident"]
            peaks.main_bytes = max(peaks.main_bytes, main_bytes)
            peaks.decoders_bytes = max(peaks.decoders_bytes, decoders_bytes)
            peaks.waiting = max(peaks.waiting, len(seen["waiting"]))
            peaks.leases = max(peaks.leases, sum(each["leases"] for each in models))
            peaks.models = max(peaks.models, len(models))
            await asyncio.sleep(SAMPLE_S)


async def under_load(
    server: Server, load: Load, clients: int, seconds: float
) -> tuple[Tally, Peaks, float]:
    """
    What clients and watcher saw, and how many seconds it went on.
    """
    peaks = Peaks()
    watching = asyncio.create_task(watch(server, peaks))
    begin_s = time.perf_counter()
    try:
        tally = await load.run(clients, seconds)
    finally:
        took_s = time.perf_counter() - begin_s
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    return tally, peaks, took_s


@dataclass(frozen=True, slots=True)
class Left:
    """
    What a server holds while nobody asks.
    """

    leases: int
    waiting: int
    files: int
    descriptors: int


def left(server: Server) -> Left:
    """
    What it holds, once it has come to rest or ten seconds are over.
    """
    found = Left(-1, -1, -1, -1)
    for _ in range(100):
        seen = httpx.get(f"{server.url}/api/ps").json()
        before, found = (
            found,
            Left(
                sum(each["leases"] for each in seen["models"]),
                len(seen["waiting"]),
                server.files(),
                server.process.num_fds(),
            ),
        )
        if found == before and not (found.leases or found.waiting or found.files):
            break
        time.sleep(0.1)
    return found


async def terminate(server: Server, load: Load, clients: int) -> list[str]:
    """
    SIGTERM in the middle of load; cells that tell how it ended.
    """
    asking = asyncio.create_task(load.run(clients, AFTER_S))
    await asyncio.sleep(AFTER_S)
    load.is_over = True
    server.process.send_signal(signal.SIGTERM)
    begin_s = time.perf_counter()
    code = await asyncio.to_thread(server.process.wait, 2 * DRAIN_S)
    took_s = time.perf_counter() - begin_s
    tally = await asking
    outcomes = ", ".join(f"{n} × {what}" for what, n in tally.outcomes.most_common())
    log = server.log.read_text(encoding="utf-8")
    return [
        f"{took_s:.1f} s",
        str(code),
        outcomes,
        str(server.files()),
        str(log.count("Traceback")),
    ]


def counters(server: Server) -> dict[str, int]:
    """
    What the cache has counted since the start.
    """
    text = httpx.get(f"{server.url}/metrics").text
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.endswith("_total"):
                name = sample.name.removeprefix("whispercache_")
                found[name.removesuffix("_total")] += int(sample.value)
    return found


def latency_table(tally: Tally) -> Table:
    """
    Seconds from asking to the last byte of the answer.
    """
    table = Table("Seconds to the whole answer", ["", "answers", *QUANTILES, "most"])
    everything = [s for times in tally.latencies.values() for s in times]
    for name, times in [*sorted(tally.latencies.items()), ("all", everything)]:
        cuts = statistics.quantiles(times, n=100, method="inclusive")
        shown = [f"{cuts[int(each[1:]) - 1]:.1f}" for each in QUANTILES]
        table.add(name, str(len(times)), *shown, f"{max(times):.1f}")
    return table


def measure(options: argparse.Namespace) -> list[object]:
    """
    All that is to be told.
    """
    limit = limit_bytes()
    with serving(limit) as server:
        load = Load(server, options.seed, options.hang_ups)
        # What comes with the first request stays: libraries, threads, a pool.
        asyncio.run(Load(server, 0, 0).run(len(MODELS), 1))
        for name in MODELS:
            httpx.delete(f"{server.url}/api/models/{name}", timeout=60)
        idle_bytes, _ = server.memory()
        before = left(server)
        begun = counters(server)
        tally, peaks, took_s = asyncio.run(
            under_load(server, load, options.clients, options.seconds)
        )
        after = left(server)
        counted = {n: value - begun[n] for n, value in counters(server).items()}
        again = Load(server, options.seed + 1, options.hang_ups)
        ended = asyncio.run(terminate(server, again, options.clients))
    requests = Table("Requests", ["", "requests"])
    for outcome, n in sorted(tally.outcomes.items()):
        requests.add(outcome, str(n))
    memory = Table("Memory", ["", "bytes"])
    memory.add("limit of the cache (--ram)", format_bytes(limit))
    memory.add("process, no model", format_bytes(idle_bytes))
    memory.add("process, most", format_bytes(peaks.main_bytes))
    memory.add("its growth", format_bytes(peaks.main_bytes - idle_bytes))
    memory.add("decoders, most", format_bytes(peaks.decoders_bytes))
    cache = Table("Cache", ["", ""])
    for name in ("hits", "misses", "loads", "evictions", "timeouts"):
        cache.add(name, str(counted[name]))
    cache.add("most models resident", str(peaks.models))
    cache.add("most leases", str(peaks.leases))
    cache.add("most requests waiting", str(peaks.waiting))
    rest = Table("Left behind", ["", "before", "after"])
    for name in Left.__dataclass_fields__:
        rest.add(name, str(getattr(before, name)), str(getattr(after, name)))
    heads = ["", "took", "exit code", "its clients", "files left", "tracebacks"]
    end = Table("SIGTERM under load", heads)
    end.add("", *ended)
    speed = tally.audio_s / took_s
    told = (
        f"{options.clients} clients for {options.seconds:g} s, seed {options.seed}, "
        f"{options.hang_ups:.0%} hang up; {speed:.2f} s of audio heard in a second"
    )
    return [machine(), told, requests, latency_table(tally), memory, cache, rest, end]


def main() -> None:
    """
    Measure, print, and write if asked to.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hang-ups", type=float, default=0.05, help="share of them")
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    options = parser.parse_args()
    write("serve", measure(options), to_file=options.write)


if __name__ == "__main__":
    main()
