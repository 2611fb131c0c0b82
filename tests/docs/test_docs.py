"""
The documentation: it builds, its links lead somewhere, and its tables are computed ones.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from whispercache import errors, footprint
from whispercache.errors import WhisperCacheError
from whispercache.keys import MODELS

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

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
    pytest.importorskip("furo", reason="Sphinx 9 needs Python 3.11")
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


def test_each_finding_is_listed() -> None:
    """
    The page has a line for each script, and no others.
    """
    text = (DOCS / "findings.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w-]+)`", text, re.MULTILINE)
    assert listed == sorted(path.stem for path in (ROOT / "findings").glob("*.sh"))
