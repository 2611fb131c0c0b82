"""
Replicas on Ray Serve: each request where its model is, and none lost where one dies.

The models take time and no processor; all else is real.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from real import child_environment, clip, micro
from served import error_of, transcribe

from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from clustered import Nodes
    from ray.serve.handle import DeploymentHandle

pytestmark = [pytest.mark.process, pytest.mark.cluster]

TEXT = "word0 word1 word2 word3 word4"
ROOMY = ("large-v3", "large-v2", "medium")  # 7.7 GiB; a card has 6.5


class Served:
    """
    An application: its client, and the handle of its replicas.
    """

    def __init__(
        self, name: str, http: httpx.Client, replicas: DeploymentHandle[Any]
    ) -> None:
        self.name = name
        self.http = http
        self._replicas = replicas

    def counted(self) -> list[Any]:
        """
        What each replica has done.
        """
        from ray.serve.exceptions import DeploymentUnavailableError

        asked = self._replicas.broadcast("counted")
        try:
            found = asked.results(return_exceptions=True)
        except DeploymentUnavailableError:  # none is there
            return []
        return [each for each in found if not isinstance(each, Exception)]

    def ask(self, model: str, **fields: str) -> httpx.Response:
        """
        A transcript.
        """
        with Path(clip("en-bread")).open("rb") as file:
            return self.http.post(
                "v1/audio/transcriptions",
                data={"model": model, "language": "en", **fields},
                files={"file": ("a.flac", file)},
            )

    def holder(self, model: str) -> Any:
        """
        The only replica that has a model.
        """
        (found,) = [each for each in self.counted() if model in each.models]
        return found

    def wait_for(self, n: int) -> None:
        """
        Waits until there are that many replicas.
        """
        wait_until(lambda: len(self.counted()) == n, "the replicas")


@contextmanager
def serving(nodes: Nodes, name: str, replicas: int, gpus: float) -> Iterator[Served]:
    """
    Replicas of fakes, in an application of that name.
    """
    from cluster_models import SIZES
    from fake_replica import FakeReplica
    from ray import serve

    from whispercache.ray.application import Size, bound, values_of

    settings = {"models": list(SIZES), "device": "cuda", "keep_alive": -1}
    app = bound(
        Size((replicas, replicas), ingresses=1, gpus=gpus, cpus=0),
        values_of(settings),
        FakeReplica,
    )
    serve.run(app, name=name, route_prefix=f"/{name}")
    replicas = serve.get_deployment_handle("engine", name)
    with httpx.Client(base_url=f"{nodes.address}/{name}/", timeout=60) as http:
        yield Served(name, http, replicas)
    serve.delete(name)


@pytest.fixture(scope="module")
def served(nodes: Nodes) -> Iterator[Served]:
    """
    An application for several tests, each of which leaves two replicas.
    """
    with serving(nodes, "several", 2, gpus=1) as served:
        yield served


@pytest.fixture(autouse=True)
def _empty(request: pytest.FixtureRequest) -> None:
    """
    No model is in memory when a test begins.
    """
    if "served" in request.fixturenames:
        served: Served = request.getfixturevalue("served")
        for each in served.http.get("api/ps").json()["models"]:
            served.http.delete(f"api/models/{each['name']}")


def events_of(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """
    The events of a stream.
    """
    for line in lines:
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def stream(
    served: Served, after_first: Callable[[], object], model: str = "large-v3"
) -> tuple[str, dict[str, Any]]:
    """
    The pieces of a stream, put together, and its last event; *after_first* happens
    after the first piece.
    """
    with Path(clip("en-bread")).open("rb") as file:
        form: dict[str, Any] = {
            "data": {"model": model, "language": "en", "stream": "true"},
            "files": {"file": ("a.flac", file)},
        }
        asked = served.http.stream("POST", "v1/audio/transcriptions", **form)
        pieces, last = [], {}
        with asked as answer:
            assert answer.status_code == 200, answer.read()
            for event in events_of(answer.iter_lines()):
                last = event
                if event["type"] == "transcript.text.delta":
                    pieces.append(event["delta"])
                    if len(pieces) == 1:
                        after_first()
    return "".join(pieces), last


def test_requests_go_where_their_model_is(served: Served) -> None:
    """
    Three models that fit no card together are loaded once each, and never more than a
    card holds; the page and the metrics tell where they are.
    """
    from cluster_models import CARD_BYTES

    before = sum(each.loads for each in served.counted())
    for _ in range(2):
        for model in ROOMY:
            answer = served.ask(model)
            assert (answer.status_code, answer.json()["text"]) == (200, TEXT)
    seen = served.counted()
    assert sum(each.loads for each in seen) - before == len(ROOMY)
    assert sorted(name for each in seen for name in each.models) == sorted(ROOMY)
    assert 0 < max(each.peak_bytes for each in seen) <= CARD_BYTES
    # One on each node.
    assert len({each.node for each in seen}) == 2
    shown = served.http.get("api/ps").json()
    where = {each["name"]: each["device"] for each in shown["models"]}
    assert where == {
        name: f"{each.name}/cuda:0" for each in seen for name in each.models
    }
    assert {each["device"] for each in shown["devices"]} >= set(where.values())
    figures = served.http.get("metrics").text
    for each in seen:
        assert f'replica="{each.name}"' in figures
    (affinity,) = (
        float(line.split()[1])
        for line in figures.splitlines()
        if line.startswith("whispercache_affinity_ratio ")
    )
    assert 0 < affinity < 1


def test_a_replica_that_is_killed_costs_its_clients_nothing(served: Served) -> None:
    """
    The stream goes on where it was, in another replica.
    """
    assert served.ask("large-v3").status_code == 200

    def kill() -> None:
        os.kill(served.holder("large-v3").pid, signal.SIGKILL)

    text, last = stream(served, kill)
    assert (text, last["type"], last.get("text")) == (
        TEXT,
        "transcript.text.done",
        TEXT,
    )
    served.wait_for(2)


def test_a_request_that_kills_two_replicas_is_not_tried_again(served: Served) -> None:
    """
    OpenAI's client is told not to do so either.
    """
    from fake_replica import LETHAL

    before = {each.pid for each in served.counted()}
    answer = served.ask("small", prompt=LETHAL)
    assert answer.status_code == 503
    assert error_of(answer)["code"] == "replicas_died"
    assert answer.headers["x-should-retry"] == "false"
    served.wait_for(2)
    assert not before & {each.pid for each in served.counted()}
    assert served.ask("small").json()["text"] == TEXT


def test_calls_end_before_their_replica_does(nodes: Nodes) -> None:
    """
    When an application is taken away, or replaced by a newer one.
    """
    from ray import serve

    with serving(nodes, "leaving", 1, gpus=0) as leaving:
        deleting = threading.Thread(target=serve.delete, args=("leaving",))
        text, last = stream(leaving, deleting.start)
        assert (text, last["type"]) == (TEXT, "transcript.text.done")
        deleting.join(60)
        assert not deleting.is_alive()


def test_the_command_deploys_to_a_cluster_and_returns(nodes: Nodes) -> None:
    """
    What it deployed goes on without it.
    """
    from ray import serve

    model = f"m={micro('micro says hello')}"
    place = ("--ray-address", nodes.ray_address, "--ingresses", "1", "--device", "cpu")
    line = [sys.executable, "-m", "whispercache", "serve", model, "--ray", *place]
    done = subprocess.run(
        line, env=child_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with httpx.Client(base_url=nodes.address, timeout=60) as http:
        heard = transcribe(http, "m")
        assert (heard.status_code, heard.json()["text"]) == (200, "micro says hello")
    serve.delete("whispercache")


def test_a_node_that_leaves_costs_its_clients_nothing(
    nodes: Nodes, served: Served
) -> None:
    """
    As when a machine is taken out of the cluster.
    """
    with ThreadPoolExecutor(3) as pool:
        assert all(each.status_code == 200 for each in pool.map(served.ask, ROOMY))
    (model, *_) = next(
        each.models for each in served.counted() if each.node == nodes.second
    )
    text, last = stream(served, nodes.replace_second, model)
    assert (text, last["type"]) == (TEXT, "transcript.text.done")
    served.wait_for(2)
