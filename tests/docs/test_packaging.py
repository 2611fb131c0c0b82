"""
The distribution: it builds, its page can be rendered, and the workflows are sound.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from whispercache.version import __version__

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(sys.executable).parent


def run(tool: str, *options: str) -> str:
    """
    Returns what a tool of this environment prints; fails if it does.
    """
    done = subprocess.run(
        [TOOLS / tool, *options],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.process
def test_what_is_built_is_whole_and_well_described(tmp_path: Path) -> None:
    """
    Source and wheel: metadata that an index takes, and the files that are no code.
    """
    run("pyproject-build", "--no-isolation", "--outdir", str(tmp_path), ".")
    built = sorted(tmp_path.iterdir())
    run("twine", "check", "--strict", *map(str, built))

    with tarfile.open(built[1]) as source:
        there = {Path(name).parts[1] for name in source.getnames()}
    # All that the tests read, so that whoever packages it can run them.
    wanted = {"tests", "docs", "findings", ".github", "CITATION.cff", "setup.cfg"}
    assert wanted <= there
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
    for name in ("py.typed", "server/page/index.html", "startup/sitecustomize.py"):
        assert f"whispercache/{name}" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]


@pytest.mark.process
def test_a_release_has_the_addresses_of_its_repository(tmp_path: Path) -> None:
    """
    By the step of the workflow that comes before the one that builds.
    """
    place = ROOT / ".github" / "workflows" / "release.yml"
    flow = yaml.safe_load(place.read_text(encoding="utf-8"))
    steps = [step["run"] for step in flow["jobs"]["build"]["steps"] if "run" in step]
    assert steps[-1].startswith("python -m build")
    [python, *rest] = steps[-2].split()
    assert python == "python"

    description = built_after(rest, tmp_path)
    home = "https://code.example/somebody/whispercache"
    assert description.get_all("Project-URL") == [
        f"Homepage, {home}",
        f"Documentation, {home}/blob/v1.2.3/README.md#documentation",
        f"Source, {home}/tree/v1.2.3",
        f"Issues, {home}/issues",
        f"Changelog, {home}/blob/v1.2.3/CHANGELOG.md",
    ]
    page = description["Description"]
    links = re.findall(r'(?:\]\(|src="|srcset=")([^)"]+)', page)
    assert len(links) > 20
    assert not [link for link in links if not link.startswith(f"{home}/")]


def built_after(command: list[str], scratch: Path) -> metadata.PackageMetadata:
    """
    Runs a command in a copy of the sources, as the workflow of somebody's repository
    does, and returns the description that a wheel has then.
    """
    copy = scratch / "checkout"
    for name in ("whispercache", ".github"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    environment = {
        "GITHUB_SERVER_URL": "https://code.example",
        "GITHUB_REPOSITORY": "somebody/whispercache",
        "GITHUB_REF_NAME": "v1.2.3",
    }
    command = [sys.executable, *command]
    subprocess.run(command, cwd=copy, env={**os.environ, **environment}, check=True)

    out = ("--wheel", "--outdir", str(scratch / "dist"))
    run("pyproject-build", "--no-isolation", *out, str(copy))
    [wheel] = (scratch / "dist").iterdir()
    run("twine", "check", "--strict", str(wheel))
    [found] = metadata.distributions(name="whispercache", path=[str(wheel)])
    return found.metadata


@pytest.mark.process
def test_the_workflows_ask_for_no_more_than_they_need() -> None:
    """
    By zizmor: pinned actions, no credentials that stay, no rights that are not used.
    """
    run("zizmor", "--offline", "--quiet", "--persona=auditor", ".github/workflows")


def test_each_python_that_is_named_is_tested() -> None:
    """
    By the classifiers, and by the workflow.
    """
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    path = ROOT / ".github" / "workflows" / "tests.yml"
    flow = yaml.safe_load(path.read_text(encoding="utf-8"))
    versions = flow["jobs"]["test"]["strategy"]["matrix"]["python"]
    named = [
        v for v in versions if f'"Programming Language :: Python :: {v}"' in project
    ]
    assert named == versions
    assert project.count('"Programming Language :: Python :: 3.') == len(versions)


def test_the_citation_names_this_version() -> None:
    """
    It is written by hand.
    """
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["version"] == __version__
