"""
docs/architecture.md and the code agree.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "whispercache"
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

# A file of the package or of the benchmarks, and perhaps a name in it.
PLACES = sorted(set(re.findall(r"`([a-z_/]+(?:\.py|/))(?::([\w.]+))?`", TEXT)))


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """
    Classes, functions, methods and constants of a module, with dots.
    """
    names: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)  # a constant with a type, or an alias

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(names)


@pytest.mark.parametrize(("place", "name"), PLACES)
def test_each_place_that_the_page_names_exists(place: str, name: str) -> None:
    """
    A file or a folder, and the class or function in it.
    """
    path = (ROOT if place.startswith("benchmarks/") else PACKAGE) / place
    assert path.exists()
    assert not name or name in names_in(path)


def test_the_page_is_a_page() -> None:
    """
    At most 120 lines, of which at most 25 explain a word.
    """
    assert len(TEXT.splitlines()) <= 120
    glossary = TEXT.partition("## Words")[2]
    assert 10 <= len(re.findall(r"^\| [^-]", glossary, re.MULTILINE)) - 1 <= 25


def test_the_page_has_every_room_and_every_cause_of_an_eviction() -> None:
    """
    Packages of the house; members of `EvictionCause`.
    """
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {f"{room}/" for room in rooms} <= {place for place, _ in PLACES}
    text = (PACKAGE / "events.py").read_text(encoding="utf-8")
    known = re.search(r"class EvictionCause.*?@property", text, re.DOTALL)
    assert known is not None
    causes = set(re.findall(r"^    ([A-Z_]+) = ", known[0], re.MULTILINE))
    assert causes == set(re.findall(r"\| `([A-Z_]+)` \|", TEXT))
