"""
Tables and results of the benchmarks, on the terminal and as Markdown files.
"""

from __future__ import annotations

import datetime as dt
import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import whispercache
from whispercache.devices.host import cpu_name

RESULTS = Path(__file__).parent / "results"


@dataclass
class Table:
    """
    A Markdown table.
    """

    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """
        Add a row.
        """
        self.rows.append(list(cells))

    def __str__(self) -> str:
        table = [self.head, *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(self.head))]

        def line(cells: list[str]) -> str:
            first, *rest = (
                cell.ljust(width) if not i else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            return f"| {' | '.join([first, *rest])} |"

        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        body = [line(self.head), line(rule), *map(line, self.rows)]
        return "\n".join([f"**{self.title}**", "", *body])


def machine() -> str:
    """
    Where and with what the numbers were made.
    """
    others = [f"{name} {version(name)}" for name in ("faster-whisper", "ctranslate2")]
    packages = [f"whispercache {whispercache.__version__}", *others]
    return (
        f"{_today()}, {cpu_name()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, {', '.join(packages)}"
    )


def _today() -> dt.date:
    return dt.datetime.now(dt.timezone.utc).date()


def write(name: str, parts: list[object], *, to_file: bool) -> None:
    """
    Print a result, and keep it under ``results/`` if asked to.
    """
    text = "\n\n".join(map(str, parts)) + "\n"
    print(text)
    if to_file:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}-{_today()}.md"
        path.write_text(f"# {name}\n\n{text}", encoding="utf-8")
        print(f"written to {path}")
