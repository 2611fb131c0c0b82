"""
The documentation: it builds, its links lead somewhere, and its tables are computed.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from whispercache import errors, footprint
from whispercache.cli.main import main
from whispercache.errors import WhisperCacheError
from whispercache.keys import MODELS, TYPICAL_COMPUTE_TYPES

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

# Device and compute type of each pair of columns, table by table.
COLUMNS = {
    "sizes": (
        ("cuda", "float16"),
        ("cuda", "int8_float16"),
        ("cpu", "float32"),
        ("cpu", "int8"),
    ),
    "more-sizes": (("cuda", "float32"), ("cuda", "int8_float32")),
}
# Types whose bytes are those of another one.
SAME = {
    ("cuda", "bfloat16"): "float16",
    ("cuda", "int8_bfloat16"): "int8_float16",
    ("cpu", "int8_float32"): "int8",
}


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


def test_the_readme_leads_to_each_page() -> None:
    """
    But to those that are of use in the built documentation alone.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md")}
    linked = set(re.findall(r"\]\((docs/[^)#]+)", text))
    assert linked == pages - {"docs/index.md", "docs/reference.md"}


def lines_of_sizes(columns: tuple[tuple[str, str], ...]) -> Iterator[str]:
    """
    Yields a table of all sizes, as Markdown.
    """
    heads = (f"{kind} on {device}" for device, kind in columns)
    yield "| model | " + " | ".join(f"{head} | call" for head in heads) + " |"
    yield "| --- |" + " --: | --: |" * len(columns)
    for model in MODELS:
        found = (footprint(model, kind, device) for device, kind in columns)
        cells = (
            f"{size.weights_bytes / 2**20:,.0f} | {size.workspace_bytes / 2**20:,.0f}"
            for size in found
        )
        yield f"| {model} | {' | '.join(cells)} |"


@pytest.mark.parametrize("table", COLUMNS)
def test_the_tables_of_sizes_are_what_is_computed(
    table: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """
    On a machine that has learned nothing yet.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = (DOCS / "memory.md").read_text(encoding="utf-8")
    shown = text.partition(f"<!-- {table} -->")[2].partition(f"<!-- /{table} -->")[0]

    assert shown.split("\n")[1:-1] == list(lines_of_sizes(COLUMNS[table]))


def test_each_type_is_in_a_table_or_as_large_as_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """
    int16 apart, which few CPUs have.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shown = {column for columns in COLUMNS.values() for column in columns}

    kinds = TYPICAL_COMPUTE_TYPES.items()
    assert {(device, kind) for device, some in kinds for kind in some} <= shown | {
        *SAME
    }
    for (device, kind), other in SAME.items():
        same, known = (footprint("base", each, device) for each in (kind, other))
        assert same.weights_bytes == known.weights_bytes
        assert same.workspace_bytes == known.workspace_bytes


def test_each_command_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """
    As the program lists them.
    """
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^  (\w+)  ", capsys.readouterr().out, re.MULTILINE)

    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    shown = re.findall(r"^    whispercache (\w+)", text, re.MULTILINE)
    assert len(commands) > 8
    assert sorted(shown) == sorted(commands)


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
