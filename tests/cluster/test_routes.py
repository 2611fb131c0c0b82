"""
Through Ray Serve, a server answers as it does on one machine: by the same tests.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from served import TINY, offered

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clustered import Nodes

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

import test_openai_client
from test_openai_client import client

__all__ = ["client"]  # a fixture

pytestmark = [pytest.mark.process, pytest.mark.cluster]


@pytest.fixture(scope="module")
def http(nodes: Nodes) -> Iterator[httpx.Client]:
    """
    A replica with tiny.en and base, behind a server.
    """
    from ray import serve

    from whispercache.ray import deployment

    tiny, base = offered(TINY, "base:int8")
    models = [f"{tiny.name}={tiny.model}", f"{base.name}={base.model}:int8"]
    app = deployment(models, device="cpu", ingresses=1, keep_alive=-1, variants=False)
    serve.run(app, name="routes", route_prefix="/")
    with httpx.Client(base_url=nodes.address, timeout=60) as http:
        yield http
    serve.delete("routes")


def _only_by_http(test: object) -> bool:
    asked = {"client", "http"}
    marks = getattr(test, "pytestmark", [])
    tried = {
        name
        for mark in marks
        if mark.name == "parametrize"
        for name in (
            mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        )
    }
    assert callable(test)
    return inspect.signature(test).parameters.keys() <= asked | tried


SHARED = {
    name: test
    for name, test in vars(test_openai_client).items()
    if name.startswith("test_") and _only_by_http(test)
}
globals().update(SHARED)


def test_most_tests_are_shared() -> None:
    """
    All that need no more than an address.
    """
    assert len(SHARED) > 15
