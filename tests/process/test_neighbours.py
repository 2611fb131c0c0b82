"""
The example that asks other programs to leave, against stand-ins that speak their APIs.

Sources: Ollama's docs/api.md, "List Running Models" and "Unload a model"; ComfyUI's
server.py, ``POST /free``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from real import child_environment

from whispercache import ModelKey, NoRoom
from whispercache.watch.hooks import as_json

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.process

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "neighbours.py"
EVENT = as_json(
    NoRoom(ModelKey("large-v3", "cuda:0", "int8"), "cuda:0", 3 << 30, 1, ""), 0
)


class Neighbours:
    """
    What is loaded in either, and what they were asked.
    """

    def __init__(self) -> None:
        self.ollama: list[str] = ["llama3.2:latest", "qwen3:8b"]
        self.comfyui: set[str] = {"unet", "vae", "execution cache"}
        self.status: int = 200

    def answer(self, method: str, path: str, body: dict[str, Any]) -> object:
        """
        What the program answers; None if it knows no such thing.
        """
        if (method, path) == ("GET", "/api/ps"):
            return {
                "models": [{"name": n, "model": n, "size_vram": 1} for n in self.ollama]
            }
        if (method, path) == ("POST", "/api/generate"):
            assert "prompt" not in body, "that would be an answer, and a load"
            assert body["keep_alive"] == 0
            self.ollama.remove(body["model"])
            return {"model": body["model"], "done": True, "done_reason": "unload"}
        if (method, path) == ("POST", "/free"):
            if body.get("unload_models"):
                self.comfyui -= {"unet", "vae"}
            if body.get("free_memory"):
                self.comfyui.clear()
            return ""
        return None


@contextmanager
def neighbours() -> Iterator[tuple[Neighbours, str]]:
    """
    Both, at one address.
    """
    state = Neighbours()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length) or "{}")
            found = state.answer(self.command, self.path, body)
            self.send_response(404 if found is None else state.status)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode() if found else b"")

        do_GET = do_POST = _answer  # noqa: N815 - as http.server calls them

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield state, f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def told(ollama: str, comfyui: str) -> subprocess.CompletedProcess[bytes]:
    """
    The example, as a hook runs it.
    """
    return subprocess.run(
        [sys.executable, str(EXAMPLE)],
        input=EVENT,
        capture_output=True,
        env=child_environment(
            {"OLLAMA_HOST": ollama, "COMFYUI_URL": f"http://{comfyui}"}
        ),
        timeout=60,
        check=False,
    )


def test_by_hand_it_says_that_it_is_a_hook() -> None:
    """
    A terminal has no event: without this, it waits for one.
    """
    pty = pytest.importorskip("pty", reason="Windows has no such terminals")
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, str(EXAMPLE)],
            stdin=theirs,
            capture_output=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 1
    assert b"This is a hook" in done.stdout


def test_both_are_asked_to_leave_in_their_own_words() -> None:
    """
    Each model of Ollama's, and all that ComfyUI keeps.
    """
    with neighbours() as (state, place):
        done = told(place, place)
    assert done.returncode == 0, done.stderr
    assert not state.ollama
    assert not state.comfyui
    assert b"large-v3 needs 3.0 GiB on cuda:0" in done.stdout
    assert b"Ollama was asked to leave: llama3.2:latest qwen3:8b" in done.stdout


def test_who_is_not_there_is_passed_over_and_who_refuses_is_told() -> None:
    """
    The exit code is what the log of the hook shows.
    """
    done = told("127.0.0.1:9", "127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"is not there") == 2
    with neighbours() as (state, place):
        state.status = 500
        done = told(place, place)
    assert done.returncode == 1
    assert done.stdout.count(b"would not leave") == 2
