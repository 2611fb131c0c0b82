"""
A Ray cluster of two nodes on this machine, and what tests do to it.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT = Path(__file__).parents[2]
# For the fakes, here and in the cluster's processes.
_PLACES = [str(_ROOT), str(_ROOT / "tests" / "support"), str(_ROOT / "benchmarks")]

_STORE = {"object_store_memory": 100 * 1024**2}
# Ray takes our word for the cards: of two replicas that want one, each node has one.
# All else is on the first.
_FIRST = {"num_cpus": 8, "num_gpus": 1, "include_dashboard": False, **_STORE}
_SECOND = {"num_cpus": 0, "num_gpus": 1, **_STORE}


class Nodes:
    """
    The nodes of a cluster, its address, and that of its HTTP proxies.
    """

    def __init__(self, cluster: Any, address: str) -> None:
        self._cluster = cluster
        self.ray_address: str = cluster.address
        self.address = address
        self._second = cluster.add_node(**_SECOND)

    @property
    def second(self) -> str:
        """
        The id of the node that may be taken away.
        """
        return str(self._second.node_id)

    def replace_second(self, *, graceful: bool) -> None:
        """
        Takes the second node away, or has all its processes killed, and adds another
        one.
        """
        self._cluster.remove_node(self._second, allow_graceful=graceful)
        self._second = self._cluster.add_node(**_SECOND)

    def processes(self, deployment: str) -> list[psutil.Process]:
        """
        The processes of the replicas of an application's deployment, such as
        ``"application:deployment"``. Ray gives them titles.
        """
        title = f"ray::ServeReplica:{deployment}"
        return [
            child
            for node in self._cluster.list_all_nodes()
            for raylet in node.all_processes["raylet"]
            for child in psutil.Process(raylet.process.pid).children(recursive=True)
            # What it does comes after that.
            if " ".join(child.cmdline()).startswith(title)
        ]


@contextmanager
def running_nodes() -> Iterator[Nodes]:
    """
    Two nodes, with Ray Serve on them.
    """
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    sys.path += _PLACES[1:]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # A short path: there are sockets in it.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        path = os.pathsep.join([*_PLACES, os.environ.get("PYTHONPATH", "")])
        patch.setenv("PYTHONPATH", path)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Ray writes its address there, whatever folder a node is given, and makes none.
        patch.setenv("RAY_TMPDIR", folder)
        Path(folder, "ray").mkdir()
        # As many processes as processors, most of which nobody needs.
        patch.setenv("RAY_prestart_worker_first_driver", "0")
        # On a busy machine all of it takes long.
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
        patch.setenv("RAY_raylet_start_wait_time_s", "120")
        head = {**_FIRST, "temp_dir": folder}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            nodes = Nodes(cluster, f"http://127.0.0.1:{port}")
            ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
            # Clients' connections to another node's proxy would end with that node.
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": "127.0.0.1", "port": port},
            )
            yield nodes
            serve.shutdown()
        finally:
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
