"""
The documentation: it builds, its links lead somewhere, and its tables are computed.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from prometheus_client import CollectorRegistry

from whispercache import ModelCache, errors, footprint
from whispercache.errors import WhisperCacheError
from whispercache.keys import MODELS
from whispercache.metrics import CacheCollector
from whispercache.server.command import add_options
from whispercache.testing import FakeLoader, FakeMachine

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
DEPLOY = ROOT / "examples" / "deploy"

# Device and compute type of each pair of columns.
COLUMNS = (
    ("cuda", "float16"),
    ("cuda", "int8_float16"),
    ("cpu", "float32"),
    ("cpu", "int8"),
)


@pytest.mark.process
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    """
    Warnings are broken links, pages that nothing leads to, and docstrings that do not
    parse.
    """
    command = ["-m", "sphinx", "-q", "-W", "--keep-going", "-b", "dirhtml"]
    done = subprocess.run(
        [sys.executable, *command, str(DOCS), str(tmp_path)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()


def lines_of_sizes() -> Iterator[str]:
    """
    Yields the table of all sizes, as Markdown.
    """
    heads = (f"{kind} on {device}" for device, kind in COLUMNS)
    yield "| model | " + " | ".join(f"{head} | call" for head in heads) + " |"
    yield "| --- |" + " --: | --: |" * len(COLUMNS)
    for model in MODELS:
        found = (footprint(model, kind, device) for device, kind in COLUMNS)
        cells = (
            f"{size.weights_bytes / 2**20:,.0f} | {size.workspace_bytes / 2**20:,.0f}"
            for size in found
        )
        yield f"| {model} | {' | '.join(cells)} |"


def test_the_table_of_sizes_is_what_is_computed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """
    On a machine that has learned nothing yet.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = (DOCS / "memory.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- sizes -->")[2].partition("<!-- /sizes -->")[0]

    assert shown.split("\n")[1:-1] == list(lines_of_sizes())


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, WhisperCacheError)
    ],
)
def test_each_error_has_a_section(name: str) -> None:
    """
    With the name of the class as its heading, by which a search finds it.
    """
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    assert name == "WhisperCacheError" or re.search(rf"^## {name}$", text, re.MULTILINE)


def warnings_of(path: Path) -> Iterator[str]:
    """
    Yields the lines that a module may log as warnings, with dots for what varies.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(
                func=ast.Attribute(attr="warning" | "log"),
                args=[ast.Constant(value=str(text)), *_]
                | [ast.Name("level"), ast.Constant(value=str(text)), *_],
            ):
                yield re.sub(r"%(\.\d)?[a-z]", "…", text)


def test_each_warning_has_a_line() -> None:
    """
    By the texts in the code; those that pass on another error's have no words.
    """
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    _, _, table = text.partition("| the line |")
    cells = re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)
    shown = [each for cell in cells for each in re.findall(r"`([^`]+)`", cell)]
    known = re.compile("|".join(re.escape(each).replace("…", ".+") for each in shown))
    modules = (ROOT / "whispercache").rglob("*.py")
    logged = {line for path in modules for line in warnings_of(path)}

    assert len(logged) > 30
    assert not [
        line for line in logged if re.search(r"\w", line) and not known.fullmatch(line)
    ]


def test_each_finding_is_listed() -> None:
    """
    The page has a line for each script, and no others.
    """
    text = (DOCS / "findings.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w-]+)`", text, re.MULTILINE)
    assert listed == sorted(path.stem for path in (ROOT / "findings").glob("*.sh"))


def test_the_dashboard_asks_for_metrics_that_are_given() -> None:
    """
    By the names and labels that a collector really has, with one of each event.
    """
    registry = CollectorRegistry()
    machine = FakeMachine({"cpu": "8GiB", "cuda:0": "4GiB"})
    loader = FakeLoader(machine, sizes={"small": "1GiB"})
    with ModelCache(loader=loader, probe=machine, vram="2GiB") as cache:
        registry.register(CacheCollector(cache))
        cache.preload("small", "cuda")
        cache.evict("small")
        given = {
            sample.name: set(sample.labels)
            for family in registry.collect()
            for sample in family.samples
        }
    dashboard = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    asked = [
        target["expr"] for panel in dashboard["panels"] for target in panel["targets"]
    ]

    names = {name for text in asked for name in re.findall(r"whispercache_\w+", text)}
    assert len(names) > 10
    assert names <= given.keys()
    for text in asked:
        [name, *_] = re.findall(r"whispercache_\w+", text)
        by = re.search(r"by \((\w+)\)", text)
        assert by is None or by[1] in given[name]


def test_the_files_for_deployment_parse_and_agree() -> None:
    """
    With the Dockerfile's port, user and volume.
    """
    docker = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    text = (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")
    deployment, _, service = yaml.safe_load_all(text)
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    user = deployment["spec"]["template"]["spec"]["securityContext"]["runAsUser"]

    assert f"--uid {user} whispercache" in docker
    assert service["metadata"]["name"] != "whispercache"
    parser = argparse.ArgumentParser()
    add_options(parser)
    for args in (container["args"], compose["services"]["whispercache"]["command"]):
        given = vars(parser.parse_args(args[1:]))
        assert given["serve.models"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] in {"/healthz", "/readyz"}
