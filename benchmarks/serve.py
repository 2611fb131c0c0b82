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
from report import Table, machine, parsed, write

from examples.weights import packaged_model
from whispercache import footprint
from whispercache.errors import format_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

MODELS = {"tiny.en": "default", "base": "default", "base:int8": "int8"}
CLIPS = ("en-bread", "en-garden", "en-library", "en-weather", "de-zug", "es-casa")
DEVICE = "cpu"
MAX_WAITING = 40
SPARE = 1.02
SAMPLE_S = 0.25
DRAIN_S = 30
# Seconds of load before SIGTERM.
AFTER_S = 5.0

ROOT = str(Path(__file__).parents[1])
URL = "/v1/audio/transcriptions"
SUCCESS = "200"
HUNG_UP = "hung up"
QUANTILES = ("p50", "p90", "p99")


class HangUpError(Exception):
    """
    A client that hangs up in the middle of its upload.
    """


@dataclass
class Tally:
    outcomes: Counter[str] = field(default_factory=Counter)
    latencies: dict[str, list[float]] = field(default_factory=dict)  # by model
    audio_s: float = 0.0  # that came back as text


@dataclass
class Server:
    process: psutil.Popen
    url: str
    temporary: Path
    log: Path

    def memory(self) -> tuple[int, int]:
        """
        Returns the resident bytes of the process, and of those that decode for it.
        """
        decoders = 0
        for child in self.process.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                decoders += child.memory_info().rss
        return self.process.memory_info().rss, decoders

    def files(self) -> int:
        return len(list(self.temporary.iterdir()))


def limit_bytes() -> int:
    """
    Returns a limit for any two models and a request of each, but not for all three.
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
    Starts a server with that limit, and waits until it is ready.
    """
    places = []
    for name, kind in MODELS.items():
        place = f"{name}={packaged_model(name.partition(':')[0])}"
        places.append(f"{place}:{kind}" if ":" in name else place)
    options = {"--ram": limit, "--max-waiting": MAX_WAITING, "--drain": DRAIN_S}
    line = [str(each) for option in options.items() for each in option]
    with started(*places, *line) as server:
        yield server


@contextmanager
def started(*arguments: str) -> Iterator[Server]:
    """
    Starts a server with those arguments on the CPU, and waits until it is ready.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "whispercache", "serve", *arguments]
    command += ["--device", DEVICE, "--port", str(port)]
    with tempfile.TemporaryDirectory() as directory:
        temporary, log = Path(directory, "temporary"), Path(directory, "log")
        temporary.mkdir()
        with log.open("wb") as file:
            environment = {**os.environ, "PYTHONPATH": ROOT, "TMPDIR": str(temporary)}
            process = psutil.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            server = Server(process, f"http://127.0.0.1:{port}", temporary, log)
            wait_until_ready(server)
            yield server
        finally:
            with suppress(psutil.NoSuchProcess):
                process.kill()
            process.wait()


def wait_until_ready(server: Server) -> None:
    for _ in range(300):
        with suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/readyz").status_code == HTTPStatus.OK:
                return
        time.sleep(0.1)
    raise SystemExit(f"the server does not start:\n{server.log.read_text()}")


def clips() -> list[tuple[bytes, float]]:
    read = []
    for name in CLIPS:
        path = Path(ROOT, "examples", "clips", f"{name}.flac")
        with av.open(str(path)) as container:
            read.append((path.read_bytes(), (container.duration or 0) / 1e6))
    return read


class Load:
    """
    Clients that send requests until `is_over`, of which some share hangs up.
    """

    def __init__(self, server: Server, seed: int, hang_ups: float) -> None:
        self._server = server
        self._seed = seed
        self._hang_ups = hang_ups
        self._clips = clips()
        self.is_over = False

    async def run(self, clients: int, seconds: float) -> Tally:
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
            model, (clip, audio_s) = dice.choice([*MODELS]), dice.choice(self._clips)
            asked_s = time.perf_counter()
            outcome, retry_s = await self._ask(http, dice, model, clip)
            tally.outcomes[outcome] += 1
            if outcome == SUCCESS:
                took_s = time.perf_counter() - asked_s
                tally.latencies.setdefault(model, []).append(took_s)
                tally.audio_s += audio_s
            for _ in range(round(retry_s * dice.uniform(1, 2) * 10)):
                if self.is_over:
                    return
                await asyncio.sleep(0.1)

    async def _ask(
        self, http: httpx.AsyncClient, dice: random.Random, model: str, clip: bytes
    ) -> tuple[str, float]:
        """
        Sends a request; returns its outcome, and seconds to wait before the next.
        """
        streams, leaves = dice.random() < 1 / 4, dice.random() < self._hang_ups
        fields = {"model": model, "stream": str(streams).lower()}
        files = {"file": ("clip.flac", clip)}
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
    body = request.read()

    async def half() -> AsyncIterator[bytes]:
        yield body[: len(body) // 2]
        raise HangUpError

    broken = http.build_request("POST", URL, headers=request.headers, content=half())
    with suppress(HangUpError):
        await http.send(broken)


async def watch(server: Server, peaks: Counter[str]) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        while True:
            main_bytes, decoders_bytes = server.memory()
            seen = (await http.get("/api/ps")).json()
            models = [each for each in seen["models"] if each["state"] == "resident"]
            now = {
                "process, most": main_bytes,
                "decoders, most": decoders_bytes,
                "most models resident": len(models),
                "most leases": sum(each["leases"] for each in models),
                "most requests waiting": len(seen["waiting"]),
            }
            peaks |= Counter(now)  # which takes the larger of each two
            await asyncio.sleep(SAMPLE_S)


async def under_load(
    server: Server, load: Load, clients: int, seconds: float
) -> tuple[Tally, Counter[str], float]:
    """
    Runs clients and a watcher; returns what they saw, and the seconds.
    """
    peaks: Counter[str] = Counter()
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


def left(server: Server) -> dict[str, int]:
    """
    Returns what it holds idle, once that no longer changes, or after ten seconds.
    """
    found: dict[str, int] = {}
    for _ in range(100):
        seen = httpx.get(f"{server.url}/api/ps").json()
        before = found
        found = {
            "leases": sum(each["leases"] for each in seen["models"]),
            "waiting": len(seen["waiting"]),
            "files": server.files(),
        }
        if found == before and not any(found.values()):
            break
        time.sleep(0.1)
    return found | {"descriptors": server.process.num_fds()}


async def terminate(server: Server, load: Load, clients: int) -> list[str]:
    """
    Sends SIGTERM in the middle of load; returns cells that show how it ended.
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
    files, tracebacks = str(server.files()), str(log.count("Traceback"))
    return [f"{took_s:.1f} s", str(code), outcomes, files, tracebacks]


def counters(server: Server) -> dict[str, int]:
    text = httpx.get(f"{server.url}/metrics").text
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.endswith("_total"):
                name = sample.name.removeprefix("whispercache_")
                found[name.removesuffix("_total")] += int(sample.value)
    return found


def latency_table(tally: Tally) -> Table:
    table = Table("Seconds to the whole answer", ["", "answers", *QUANTILES, "most"])
    everything = [s for times in tally.latencies.values() for s in times]
    for name, times in [*sorted(tally.latencies.items()), ("all", everything)]:
        cuts = statistics.quantiles(times, n=100, method="inclusive")
        shown = [f"{cuts[int(each[1:]) - 1]:.1f}" for each in QUANTILES]
        table.add(name, str(len(times)), *shown, f"{max(times):.1f}")
    return table


def main() -> None:
    options = parsed(__doc__, seconds=120.0, clients=64, seed=1, hang_ups=0.05)
    limit = limit_bytes()
    with serving(limit) as server:
        load = Load(server, options.seed, options.hang_ups)
        # What comes with the first request stays: libraries, threads, a pool.
        asyncio.run(Load(server, 0, 0).run(len(MODELS), 1))
        for name in MODELS:
            httpx.delete(f"{server.url}/api/models/{name}", timeout=60)
        idle_bytes, _ = server.memory()
        before, begun = left(server), counters(server)
        tally, peaks, took_s = asyncio.run(
            under_load(server, load, options.clients, options.seconds)
        )
        after = left(server)
        counted = {n: value - begun[n] for n, value in counters(server).items()}
        again = Load(server, options.seed + 1, options.hang_ups)
        ended = asyncio.run(terminate(server, again, options.clients))
    rest = Table("Left behind", ["", "before", "after"])
    for name, number in before.items():
        rest.add(name, str(number), str(after[name]))
    heads = ["", "took", "exit code", "its clients", "files left", "tracebacks"]
    end = Table("SIGTERM under load", heads)
    end.add("", *ended)
    shown = (
        f"{options.clients} clients for {options.seconds:g} s, seed {options.seed}, "
        f"{options.hang_ups:.0%} hang up; {tally.audio_s / took_s:.2f} s of audio "
        "heard in a second"
    )
    requests = pairs("Requests", "requests", dict(sorted(tally.outcomes.items())))
    used = usage(limit, idle_bytes, peaks, counted)
    tables = [requests, latency_table(tally), *used, rest, end]
    write("serve", [machine(), shown, *tables], to_file=options.write)


def usage(
    limit: int, idle_bytes: int, peaks: Counter[str], counted: Mapping[str, int]
) -> tuple[Table, Table]:
    most_bytes = peaks.pop("process, most", 0)
    memory = {
        "limit of the cache (--ram)": limit,
        "process, no model": idle_bytes,
        "process, most": most_bytes,
        "its growth": most_bytes - idle_bytes,
        "decoders, most": peaks.pop("decoders, most", 0),
    }
    names = ("hits", "misses", "loads", "evictions", "timeouts")
    cache = {name: counted[name] for name in names} | peaks
    shown = {name: format_bytes(n_bytes) for name, n_bytes in memory.items()}
    return pairs("Memory", "bytes", shown), pairs("Cache", "", cache)


def pairs(title: str, head: str, values: Mapping[str, object]) -> Table:
    table = Table(title, ["", head])
    for name, value in values.items():
        table.add(name, str(value))
    return table


if __name__ == "__main__":
    main()
