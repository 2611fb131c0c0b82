"""
The distribution: it builds, its page can be rendered, and the workflows are sound.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
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

    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
    for name in ("py.typed", "server/page/index.html", "startup/sitecustomize.py"):
        assert f"whispercache/{name}" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]


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
