"""
The pages about other people's packages name the versions that are tried.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
# Not pinned: it comes with this package.
OWN = "fasterwhisper"


def normal(name: str) -> str:
    """
    A name as it is compared: WhisperLive is whisper-live.
    """
    return re.sub(r"[^a-z0-9]", "", name.partition("(")[0].lower())


def tried(group: str) -> dict[str, str]:
    """
    The versions of a group of dependencies that says which.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    texts: list[str] = project["dependency-groups"][group]
    pins = (re.match(r"([\w.-]+).*==([\w.]+)", text) for text in texts)
    return {normal(pin[1]): pin[2] for pin in pins if pin}


def in_node() -> dict[str, str]:
    """
    The versions of the clients for Node.
    """
    path = ROOT / "tests" / "clients" / "package.json"
    found: dict[str, str] = json.loads(path.read_text("utf-8"))["dependencies"]
    return {normal(name): version for name, version in found.items()}


def rows(page: str) -> dict[str, str]:
    """
    The packages of a page's table, and their versions.
    """
    text = (ROOT / "docs" / page).read_text("utf-8")
    found = re.findall(r"^\| ([^|]+) \| ([\d., ]+) \|", text, re.MULTILINE)
    return dict(found)


def test_the_page_of_programs_has_the_versions_that_are_tried() -> None:
    """
    Each that is there is one of those that `make apps` installs.
    """
    pins = tried("apps") | tried("apps-alone")
    named = {normal(name): version for name, version in rows("programs.md").items()}
    del named[OWN]
    assert {name: pins.get(name) for name in named} == named


@pytest.mark.parametrize("node", [False, True], ids=["PyPI", "npm"])
def test_the_page_of_clients_has_the_versions_that_are_tried(*, node: bool) -> None:
    """
    Each that is there is one of those that `make clients` installs, and for npm each
    that is installed is there.
    """
    named = {
        normal(name): version
        for names, versions in rows("clients.md").items()
        if names.endswith("(npm)") == node
        for name, version in zip(names.split(", "), versions.split(", "), strict=True)
    }
    pins = in_node() if node else tried("clients")
    assert named
    assert {name: pins.get(name) for name in named} == named
    assert not node or named == pins
