"""
Extras: each works alone, and the core without any.

What the others bring is hidden from a process of its own, so this holds wherever the
tests run.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from real import child, clip, micro

if TYPE_CHECKING:
    from pathlib import Path
    from subprocess import CompletedProcess

pytestmark = pytest.mark.process

BROUGHT = {
    "server": ("fastapi", "pebble", "python_multipart", "starlette", "uvicorn"),
    "wyoming": ("wyoming",),
    "metrics": ("prometheus_client",),
    "compare": ("jinja2", "jiwer", "scipy", "whisper_normalizer"),
}
"""
What each extra brings; the server brings what metrics brings, too.
"""
ALL = tuple(name for names in BROUGHT.values() for name in names)


def alone(extra: str | None, code: str, *arguments: str) -> CompletedProcess[str]:
    """
    Run *code* where only *extra* is installed, or none.
    """
    own = {"server": (*BROUGHT["server"], *BROUGHT["metrics"])}
    hidden = set(ALL) - set(own.get(extra or "", BROUGHT.get(extra or "", ())))
    hide = f"import sys; sys.modules.update(dict.fromkeys({sorted(hidden)!r}))"
    return child(f"{hide}\n{code}", *arguments)


def test_importing_the_package_imports_no_extra() -> None:
    """
    Nor anything else that is heavy; the command's help needs none, either.
    """
    heavy = [*ALL, "numpy", "rich", "faster_whisper", "ctranslate2", "asyncio"]
    code = f"import whispercache; print([m for m in {heavy} if sys.modules.get(m)])"
    assert alone(None, code).stdout == "[]\n"
    done = alone(
        None,
        "from whispercache.cli.main import main; main(sys.argv[1:])",
        "compare",
        "-h",
    )
    assert "usage: whispercache compare" in done.stdout
    assert not done.stderr


def test_the_core_works_without_extras() -> None:
    """
    Models are loaded and heard.
    """
    code = """
import whispercache
from whispercache import ModelCache
import whispercache.server, whispercache.comparison, whispercache.watch.top
with ModelCache() as cache:
    segments, _ = cache.get_model(sys.argv[1], "cpu").transcribe(sys.argv[2])
    print([segment.text for segment in segments])
"""
    done = alone(None, code, str(micro("micro a")), clip("en-bread"))
    assert done.stdout == "[' micro a']\n", done.stderr


def test_the_server_needs_only_its_own_extra() -> None:
    """
    It starts, answers, and tells its metrics.
    """
    code = """
from fastapi.testclient import TestClient
from whispercache.server import ServerOptions, create_app
from whispercache.engine.naming import ModelSpec

def main():
    options = ServerOptions(models=(ModelSpec("m", sys.argv[1]),), device="cpu")
    with TestClient(create_app(options)) as client:
        print(client.get("/v1/models").json()["data"][0]["id"])
        print("whispercache_requests_total" in client.get("/metrics").text)

if __name__ == "__main__":
    main()
"""
    done = alone("server", code, str(micro("micro a")))
    assert done.stdout == "m\nTrue\n", done.stderr


def test_a_server_says_which_extra_a_protocol_needs() -> None:
    """
    Before it listens anywhere.
    """
    code = """
from whispercache.cli.main import main
if __name__ == "__main__":
    line = ["serve", "m=" + sys.argv[1], "--port", "0", "--wyoming", "127.0.0.1:0"]
    sys.exit(main(line))
"""
    done = alone("server", code, str(micro("micro a")))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "wyoming is missing; pip install 'whispercache[wyoming]'" in done.stderr


def test_metrics_need_only_their_own_extra() -> None:
    """
    No server is needed to tell them.
    """
    code = """
from prometheus_client import CollectorRegistry, generate_latest
from whispercache import ModelCache
from whispercache.metrics import CacheCollector
registry = CollectorRegistry()
with ModelCache() as cache:
    registry.register(CacheCollector(cache))
    print(b"whispercache_requests_total" in generate_latest(registry))
"""
    done = alone("metrics", code)
    assert done.stdout == "True\n", done.stderr


def test_a_comparison_needs_only_its_own_extra(tmp_path: Path) -> None:
    """
    With scores and a report.
    """
    (tmp_path / "refs.tsv").write_text(
        f"file\ttext\n{clip('en-bread')}\tmicro a\n", encoding="utf-8"
    )
    code = """
import json, whispercache
found = whispercache.compare(
    [sys.argv[2]], models=["m=" + sys.argv[1]], references=sys.argv[3],
    device="cpu", out=sys.argv[4],
)
print(json.dumps([[model.name, model.wer] for model in found.models]))
"""
    done = alone(
        "compare",
        code,
        str(micro("micro a")),
        clip("en-bread"),
        str(tmp_path / "refs.tsv"),
        str(tmp_path / "out"),
    )
    assert done.stdout, done.stderr
    assert json.loads(done.stdout) == [["m", 0.0]]
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("extra", "arguments"),
    [
        ("server", ("serve", "m=MODEL")),
        ("compare", ("compare", "CLIP", "--models", "m=MODEL", "--out", "OUT")),
    ],
)
def test_a_command_names_the_extra_that_is_missing(
    extra: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    """
    In one line, with exit code 2.
    """
    places = {
        "m=MODEL": f"m={micro('micro a')}",
        "CLIP": clip("en-bread"),
        "OUT": str(tmp_path / "out"),
    }
    done = alone(
        None,
        "from whispercache.cli.main import main; sys.exit(main(sys.argv[1:]))",
        *(places.get(argument, argument) for argument in arguments),
    )
    assert done.returncode == 2
    assert f"pip install 'whispercache[{extra}]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_metrics_name_the_extra_that_is_missing() -> None:
    """
    When they are imported.
    """
    done = alone(None, "import whispercache.metrics")
    assert "ImportError" in done.stderr.splitlines()[-1]
    assert "pip install 'whispercache[metrics]'" in done.stderr
