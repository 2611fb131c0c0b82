"""
What ``--print-config`` prints, deployed: its limits, and numbers that change while
models are in memory. Models are fakes; two replicas share one card.
"""

from __future__ import annotations

import io
import re
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from replicas import TEXT, Served, ask, reached, seen_until, stream
from served import error_of, running

from whispercache import ModelCache
from whispercache.cli.main import main
from whispercache.server import ServerOptions, create_app
from whispercache.testing import FakeMachine, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from clustered import Nodes

pytestmark = [pytest.mark.process, pytest.mark.cluster]

ROOMY = ("large-v3", "large-v2", "medium")  # 7.7 GiB; the card has 6.5
NAME = "printed"


class Config:
    """
    A file for ``serve run``, and the application that it makes.
    """

    def __init__(self, nodes: Nodes, path: Path) -> None:
        self._address = nodes.ray_address
        self._path = path
        with redirect_stdout(io.StringIO()) as printed:
            limits = ("--parallel", "1", "--max-waiting", "1", "--timeout", "3s")
            place = ("--device", "cuda", "--gpus", "0.5", "--cpus", "0.5")
            line = ("serve", *ROOMY, *place, *limits, "--ingresses", "1")
            assert main([*line, "--ray", "--print-config"]) == 0
        self._document = yaml.safe_load(printed.getvalue())
        (application,) = self._document["applications"]
        # Beside other tests' applications, and with fakes.
        application.update(
            name=NAME, route_prefix=f"/{NAME}", import_path="quick_replica:build"
        )
        self._engine, _ = application["deployments"]

    def deploy(self, replicas: int) -> None:
        """
        Has that many replicas run, and waits until no others do.
        """
        self.begin(replicas)
        self.wait_for(RUNNING=replicas)

    def begin(self, replicas: int) -> None:
        """
        Asks for that many replicas.
        """
        from click.testing import CliRunner
        from ray.serve.scripts import cli

        self._engine["num_replicas"] = replicas
        self._path.write_text(yaml.safe_dump(self._document))
        line = ["run", str(self._path), "--non-blocking", "--address", self._address]
        done = CliRunner().invoke(cli, line)
        assert done.exit_code == 0, done.output

    def wait_for(self, **states: int) -> None:
        """
        Waits until that many replicas are in those states.
        """
        seen_until(lambda: self._states() == states, f"{states}")

    def end(self) -> None:
        """
        Has all of it end; waits until it has begun to.
        """
        from ray import serve

        serve.delete(NAME, _blocking=False)
        seen_until(
            lambda: serve.status().applications[NAME].status == "DELETING", "its end"
        )

    def _states(self) -> dict[str, int]:
        from ray import serve

        seen = serve.status().applications.get(NAME)
        # Until the file is read, and in the end, there are none.
        if seen is None or {"engine", "ingress"} - seen.deployments.keys():
            return {}
        if not seen.deployments["ingress"].replica_states.get("RUNNING"):
            return {}
        states = seen.deployments["engine"].replica_states
        return {str(state): n for state, n in states.items() if n}


@contextmanager
def local() -> Iterator[httpx.Client]:
    """
    The same server and the same models on one machine.
    """
    from cluster_models import CARD_BYTES, GIB, SIZES
    from fake_replica import TimedLoader

    machine = FakeMachine({"cpu": "64GiB", "cuda:0": CARD_BYTES})
    loader = TimedLoader(machine, {name: int(SIZES[name][0] * GIB) for name in ROOMY})
    loader.pace = 0.1
    options = ServerOptions(
        ROOMY, device="cuda", parallel=1, max_waiting=1, timeout_s=3
    )
    with (
        ModelCache(loader=loader, probe=machine) as cache,
        running(create_app(options, cache)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


@contextmanager
def held(http: httpx.Client, go: Path, n: int = 1) -> Iterator[None]:
    """
    Streams that are at work, until the end of the ``with`` block or until *go* is
    there; they end well.
    """
    with ThreadPoolExecutor(n) as pool:
        try:
            streams = [begun(http, go, pool) for _ in range(n)]
            yield
        finally:
            go.touch()
        assert {each.result()[0] for each in streams} == {TEXT}


def begun(http: httpx.Client, go: Path, pool: ThreadPoolExecutor) -> Future[Any]:
    """
    A stream that has begun. Where a router has not heard yet that a call is over, it
    may choose a replica that is busy; who waits there in vain asks again.
    """
    from fake_replica import UNTIL

    for _ in range(3):
        has_begun = threading.Event()
        asked = pool.submit(
            stream, http, "medium", has_begun.set, prompt=f"{UNTIL}{go}"
        )
        while not has_begun.wait(0.01) and not asked.done():
            pass
        if has_begun.is_set():
            return asked
        assert "model_busy" in str(asked.exception())
    raise AssertionError("no stream has begun")


def refusals(http: httpx.Client, go: Path) -> list[tuple[int, str, dict[str, Any]]]:
    """
    What is told to one who comes when another one waits already, and to that one when
    his time is up: the status, when to try again, and the error.
    """
    with held(http, go), ThreadPoolExecutor(1) as pool:
        waits = pool.submit(ask, http, "medium")
        wait_until(lambda: http.get("api/ps").json()["waiting"], "one waits")
        answers = [ask(http, "medium"), waits.result()]
    told = []
    for answer in answers:
        error = error_of(answer)
        # Times differ.
        error["message"] = re.sub(r"\d\.\d s", "some s", error["message"])
        told.append((answer.status_code, answer.headers["retry-after"], error))
    return told


def test_replicas_come_and_go_while_models_stay_in_memory(
    nodes: Nodes, tmp_path: Path
) -> None:
    """
    By a number in the file. The server lets more requests in where there are more
    replicas, and those that leave end their calls before, as all do in the end.
    """
    config = Config(nodes, tmp_path / "serve.yaml")
    config.deploy(1)
    with reached(nodes, NAME) as served:
        they_are_refused_as_on_one_machine(served, tmp_path)
        (before,) = served.counted()
        config.deploy(2)
        served.wait_for(2)
        assert (before.pid, before.loads) in {
            (each.pid, each.loads) for each in served.counted()
        }
        they_share_a_card(served)
        more_are_let_in(served, tmp_path / "more")
        with held(served.http, tmp_path / "fewer", 2):
            config.begin(1)
            config.wait_for(RUNNING=1, STOPPING=1)
        config.wait_for(RUNNING=1)
        assert served.ask("medium").json()["text"] == TEXT
        with held(served.http, tmp_path / "none"):
            config.end()
    config.wait_for()


def they_are_refused_as_on_one_machine(served: Served, tmp_path: Path) -> None:
    """
    Full queues and time-outs are told by the same status, header and body.
    """
    with local() as http, ThreadPoolExecutor(2) as pool:
        there = pool.submit(refusals, served.http, tmp_path / "there")
        here = pool.submit(refusals, http, tmp_path / "here")
    assert [status for status, _, _ in there.result()] == [429, 503]
    assert there.result() == here.result()


def more_are_let_in(served: Served, go: Path) -> None:
    """
    With two replicas two requests may be at work, where it was one.
    """
    # Into each of them.
    assert served.http.post("api/models/medium/pin").is_success
    with held(served.http, go):
        # The server counts replicas now and then.
        seen_until(lambda: served.ask("medium").is_success, "a second one at work")


def they_share_a_card(served: Served) -> None:
    """
    Two replicas with half a card each are on the same one, and together never want
    more than it has: each makes room for the other.
    """
    from cluster_models import CARD_BYTES

    cards = served.tell("card")
    assert len({card.pid for card in cards}) == 2
    assert {card.visible for card in cards} == {"0"}
    with ThreadPoolExecutor(len(ROOMY)) as pool:
        for _ in range(2):
            answers = pool.map(served.ask, ROOMY)
            assert {each.status_code for each in answers} == {200}
    cards = served.tell("card")
    assert sum(card.held_bytes for card in cards) <= CARD_BYTES
    assert {card.refused for card in cards} == {0}
