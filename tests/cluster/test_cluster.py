"""
Replicas on Ray Serve: each request where its model is, and none lost where one dies.

The models take time and no processor; all else is real.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from real import child_environment, clip, micro
from replicas import TEXT, reached, seen_until, stream
from served import error_of, transcribe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clustered import Nodes
    from replicas import Served

pytestmark = [pytest.mark.process, pytest.mark.cluster]

ROOMY = ("large-v3", "large-v2", "medium")  # 7.7 GiB; a card has 6.5


@pytest.fixture(scope="module")
def served(nodes: Nodes) -> Iterator[Served]:
    """
    Replicas of fakes behind two servers; each test leaves two of each.
    """
    from cluster_models import SIZES
    from quick_replica import QuickReplica
    from ray import serve

    from whispercache.ray.application import Size, bound, values_of

    offered = {"models": list(SIZES), "device": "cuda"}
    settings = {**offered, "keep_alive": -1, "parallel": 10}
    size = Size((2, 2), ingresses=2, gpus=1, cpus=0)
    app = bound(size, values_of(settings), QuickReplica)
    serve.run(app, name="several", route_prefix="/several")
    with reached(nodes, "several") as served:
        yield served
    # Other tests need not wait for it.
    serve.delete("several", _blocking=False)


@pytest.fixture(autouse=True)
def _empty(request: pytest.FixtureRequest) -> None:
    """
    No model is in memory when a test begins.
    """
    if "served" in request.fixturenames:
        served: Served = request.getfixturevalue("served")
        for each in served.http.get("api/ps").json()["models"]:
            served.http.delete(f"api/models/{each['name']}")


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

    text, last = stream(served.http, "large-v3", kill)
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


def test_a_server_that_dies_takes_its_requests_with_it_and_no_others(
    nodes: Nodes, served: Served, tmp_path: Path
) -> None:
    """
    They are 500, and streams end; OpenAI's client asks once more by itself, and the
    other server answers.
    """
    from fake_replica import UNTIL

    go, begun = tmp_path / "go", threading.Semaphore(0)
    held = f"{UNTIL}{go}"

    def streamed() -> str:
        try:
            text, _ = stream(served.http, "small", begun.release, prompt=held)
        except httpx.RemoteProtocolError:
            return "cut off"
        return text

    def asked() -> str:
        answer = served.ask("small", prompt=held)
        return answer.json()["text"] if answer.is_success else str(answer.status_code)

    def asked_by_openai() -> str:
        with (
            openai.OpenAI(base_url=f"{served.http.base_url}v1", api_key="-") as client,
            Path(clip("en-bread")).open("rb") as file,
        ):
            transcriptions = client.audio.transcriptions
            return transcriptions.create(model="small", file=file, prompt=held).text

    with ThreadPoolExecutor(8) as pool:
        found = []
        try:
            # One after the other: of many at once Ray sends all to one server.
            for _ in range(3):
                found.append(pool.submit(streamed))
                assert begun.acquire(timeout=30)
            found += [pool.submit(asked) for _ in range(2)]
            by_openai = [pool.submit(asked_by_openai) for _ in range(3)]
            first, _ = nodes.processes("several:ingress")
            first.kill()
            # Now, and not when there are two again.
            assert served.ask("medium").json()["text"] == TEXT
        finally:
            go.touch()
        assert {each.result() for each in by_openai} == {TEXT}
        told = {each.result() for each in found}
    assert {TEXT, "cut off"} <= told <= {TEXT, "cut off", "500"}
    seen_until(lambda: len(nodes.processes("several:ingress")) == 2, "a new server")


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


@pytest.mark.parametrize("graceful", [True, False])
def test_a_node_that_leaves_costs_its_clients_nothing(
    nodes: Nodes, served: Served, *, graceful: bool
) -> None:
    """
    As when a machine is taken out of the cluster, or falls out of it.
    """
    with ThreadPoolExecutor(3) as pool:
        assert all(each.status_code == 200 for each in pool.map(served.ask, ROOMY))
    (model, *_) = next(
        each.models for each in served.counted() if each.node == nodes.second
    )
    left = stream(served.http, model, lambda: nodes.replace_second(graceful=graceful))
    assert left[0] == TEXT
    assert left[1]["type"] == "transcript.text.done"
    served.wait_for(2)
