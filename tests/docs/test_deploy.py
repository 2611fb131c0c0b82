"""
The files for deployment: they agree with the code and with each other, and the programs
that read them understand them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from prometheus_client import CollectorRegistry

from whispercache import ModelCache
from whispercache.metrics import CacheCollector
from whispercache.server.command import add_options
from whispercache.testing import FakeLoader, FakeMachine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "examples" / "deploy"


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


def test_the_dashboard_has_only_fields_that_grafana_knows() -> None:
    """
    By its makers' library, which reads the known ones and forgets the others.
    """
    wants = "grafana-foundation-sdk needs Python 3.11"
    pytest.importorskip("grafana_foundation_sdk", reason=wants)
    from grafana_foundation_sdk.cog import encoder, plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    dashboard = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    dashboard["panels"][0]["targets"][0]["expression"] = "a field that is none"

    read = Dashboard.from_json(dashboard)
    again = json.loads(encoder.JSONEncoder().encode(read))
    assert lost(dashboard, again) == ["expression"]


def lost(before: object, after: object) -> list[str]:
    """
    Returns the names that a value has no longer, or no longer as they were.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            name
            for key, value in before.items()
            for name in (lost(value, after[key]) if key in after else [key])
        ]
    if isinstance(before, list) and isinstance(after, list):
        assert len(before) == len(after)
        pairs = zip(before, after, strict=True)
        return [name for each in pairs for name in lost(*each)]
    return [] if before == after else [str(before)]


@pytest.mark.process
@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ("compose-spec", "examples/deploy/compose.yaml"),
        ("github-workflows", ".github/workflows/release.yml"),
        ("github-workflows", ".github/workflows/tests.yml"),
        ("citation-file-format", "CITATION.cff"),
    ],
)
def test_files_that_other_programs_read_have_their_form(schema: str, path: str) -> None:
    """
    By the schemas that check-jsonschema brings.
    """
    command = ["-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    done = subprocess.run(
        [sys.executable, *command, str(ROOT / path)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )

    assert done.returncode == 0, done.stdout


def test_the_lock_has_what_the_server_needs() -> None:
    """
    All that the image's Python needs, in versions that the package allows.
    """
    python = {"python_version": "3.13", "python_full_version": "3.13.0"}
    text = (DEPLOY / "requirements.txt").read_text(encoding="utf-8")
    locked = {
        each.name: each.specifier
        for each in map(Requirement, re.findall(r"^(\S.*?) \\$", text, re.MULTILINE))
        if each.marker is None or each.marker.evaluate(python)
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    server = project["optional-dependencies"]["server"]
    wanted = [
        each
        for each in map(Requirement, project["dependencies"] + server)
        if each.marker is None or each.marker.evaluate(python)
    ]

    assert len(wanted) > 10
    for each in wanted:
        [version] = locked[each.name]
        assert each.specifier.contains(version.version), each


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
