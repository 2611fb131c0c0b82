"""
Tables and results of the benchmarks, on the terminal and as Markdown files.
"""

from __future__ import annotations

import argparse
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
    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append(list(cells))

    def __str__(self) -> str:
        table = [self.head, *self.rows]
        widths = [
            max(1, *(len(row[i]) for row in table)) for i in range(len(self.head))
        ]

        def line(cells: list[str]) -> str:
            first, *rest = (
                cell.ljust(width) if not i else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            return f"| {' | '.join([first, *rest])} |"

        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        body = [line(self.head), line(rule), *map(line, self.rows)]
        return "\n".join([f"**{self.title}**", "", *body])


def parsed(doc: str | None, **defaults: float | str) -> argparse.Namespace:
    """
    Parses the command line of a benchmark.

    Args:
        doc: Its docstring.
        defaults: Its numbers and texts, by the names of their options.
    """
    assert doc is not None
    parser = argparse.ArgumentParser(description=doc.partition("\n\n")[0])
    for name, value in defaults.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(value), default=value)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # this is a process of it
    return parser.parse_args()


def machine() -> str:
    """
    Describes where and with what the numbers were made.
    """
    others = [f"{name} {version(name)}" for name in ("faster-whisper", "ctranslate2")]
    packages = [f"whispercache {whispercache.__version__}", *others]
    return (
        f"{today()}, {cpu_name()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, {', '.join(packages)}"
    )


def today() -> dt.date:
    return dt.datetime.now(dt.timezone.utc).date()


def write(name: str, parts: list[object], *, to_file: bool) -> None:
    """
    Prints a result, and keeps it under ``results/`` if asked to.
    """
    text = "\n\n".join(map(str, parts)) + "\n"
    print(text)
    if to_file:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}-{today()}.md"
        path.write_text(f"# {name}\n\n{text}", encoding="utf-8")
        print(f"written to {path}")
