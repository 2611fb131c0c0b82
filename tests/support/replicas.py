"""
Applications on Ray Serve, as tests see them: over HTTP, and behind it.
"""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from real import clip

from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from clustered import Nodes
    from ray.serve.handle import DeploymentHandle

__all__ = ["TEXT", "Served", "ask", "reached", "seen_until", "stream"]

TEXT = "word0 word1 word2 word3 word4"


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

    def tell(self, method: str) -> list[Any]:
        """
        What each replica that is there answers.
        """
        from ray.serve.exceptions import DeploymentUnavailableError

        asked = self._replicas.broadcast(method)
        try:
            found = asked.results(return_exceptions=True)
        except DeploymentUnavailableError:  # none is there
            return []
        return [each for each in found if not isinstance(each, Exception)]

    def counted(self) -> list[Any]:
        """
        What each replica has done.
        """
        return self.tell("counted")

    def ask(self, model: str, **fields: str) -> httpx.Response:
        """
        A transcript.
        """
        return ask(self.http, model, **fields)

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
        seen_until(lambda: len(self.counted()) == n, "the replicas")


def seen_until(condition: Callable[[], object], what: str) -> None:
    """
    Blocks until *condition* holds; the cluster, which is asked for it, has other things
    to do.
    """
    pause = threading.Event()
    wait_until(lambda: condition() or pause.wait(0.1), what)


@contextmanager
def reached(nodes: Nodes, name: str) -> Iterator[Served]:
    """
    An application that is there, at its name.
    """
    from ray import serve

    replicas = serve.get_deployment_handle("engine", name)
    with httpx.Client(base_url=f"{nodes.address}/{name}/", timeout=60) as http:
        yield Served(name, http, replicas)


def ask(http: httpx.Client, model: str, **fields: str) -> httpx.Response:
    """
    A transcript of a short clip.
    """
    with Path(clip("en-bread")).open("rb") as file:
        return http.post(
            "v1/audio/transcriptions",
            data={"model": model, "language": "en", **fields},
            files={"file": ("a.flac", file)},
        )


def stream(
    http: httpx.Client,
    model: str,
    after_first: Callable[[], object],
    **fields: str,
) -> tuple[str, dict[str, Any]]:
    """
    The pieces of a stream, put together, and its last event; *after_first* happens
    after the first piece.
    """
    with Path(clip("en-bread")).open("rb") as file:
        form: dict[str, Any] = {
            "data": {"model": model, "language": "en", "stream": "true", **fields},
            "files": {"file": ("a.flac", file)},
        }
        pieces, last = [], {}
        with http.stream("POST", "v1/audio/transcriptions", **form) as answer:
            assert answer.status_code == 200, answer.read()
            for event in _events_of(answer.iter_lines()):
                last = event
                if event["type"] == "transcript.text.delta":
                    pieces.append(event["delta"])
                    if len(pieces) == 1:
                        after_first()
    return "".join(pieces), last


def _events_of(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
