"""
Asks Ollama and ComfyUI to leave the card when whispercache has no room on it.

::

    whispercache serve large-v3 --on NoRoom "python examples/neighbours.py"

The event comes as JSON on standard input. The request that found no room has failed by
then, or waits for a retry of its client's; the next one finds what the others gave up.

Both load again what they are asked for next, in their own time. Addresses come from
``OLLAMA_HOST`` and ``COMFYUI_URL``; a program that is not there is passed over.
"""

from __future__ import annotations

import json
import os
import sys
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

OLLAMA = os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434"
COMFYUI = os.environ.get("COMFYUI_URL") or "http://127.0.0.1:8188"
TIMEOUT_S = 10.0


def ask(url: str, body: object = None) -> bytes:
    """
    Returns the answer to a GET, or to a POST of *body* as JSON.
    """
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - addresses of yours
    with urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
        content: bytes = answer.read()
        return content


def empty_ollama(address: str) -> list[str]:
    """
    Has Ollama unload all that it holds, and returns the names.
    """
    url = address if "//" in address else f"http://{address}"
    models = json.loads(ask(f"{url}/api/ps"))["models"]
    names = [model["name"] for model in models]
    for name in names:
        # No prompt, and kept for no time: that unloads it.
        ask(f"{url}/api/generate", {"model": name, "keep_alive": 0})
    return names


def empty_comfyui(url: str) -> None:
    """
    Has ComfyUI unload its models, and give back what it keeps for the next ones. It
    does so between two prompts, and not in the middle of one.
    """
    ask(f"{url}/free", {"unload_models": True, "free_memory": True})


def main() -> int:
    """
    Asks both, and returns the exit code: 1 if one that is there would not.
    """
    if sys.stdin.isatty():
        print("This is a hook: whispercache gives it the event on standard input.")
        return 1
    event = json.load(sys.stdin)
    needed = f"{event['needed_bytes'] / 2**30:.1f} GiB"
    print(f"{event['model']} needs {needed} on {event['device']}")
    code = 0
    for name, leave in (
        ("Ollama", lambda: empty_ollama(OLLAMA)),
        ("ComfyUI", lambda: empty_comfyui(COMFYUI)),
    ):
        try:
            left = leave()
        except HTTPError as error:
            print(f"{name} would not leave: {error}")
            code = 1
        except URLError as error:
            print(f"{name} is not there: {error.reason}")
        else:
            print(f"{name} was asked to leave{':' if left else ''}", *left or ())
    return code


if __name__ == "__main__":
    sys.exit(main())
