"""
The command ``whispercache compare``: its options, its progress and its output.

A summary goes to stdout, the reports into a directory, everything else to stderr.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from whispercache.cache import ModelCache
from whispercache.console import (
    WRONG_USE,
    add_huge_pages,
    bars,
    clock,
    explain,
    interruptible,
)
from whispercache.errors import WhisperCacheError
from whispercache.settings.arguments import (
    add_config,
    add_settings,
    hooks_of,
    settings_of,
)
from whispercache.settings.sources import cache_options
from whispercache.settings.table import ONE_BY_ONE_KEYS

from .references import read_references
from .run import RESULTS, compare

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from rich.progress import Progress as Bars

    from .values import Comparison, Progress, Reference

HELP = """\
references:
  a table with tabs between its columns and a line for each file: 'file', 'language' and
  'text' as the first line names them, or just file and text without such a line

Models take turns, each with all files, so that each is loaded once. What is done is
kept in DIR: after Ctrl-C, the same command goes on where it stopped. The exit code is 2
if a file could not be decoded, or a model failed; the others are compared all the same.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """
    Adds the command's parameters to *parser*.
    """
    parser.description = "How well, and how fast, models hear your audio."
    explain(parser, HELP)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("audio", nargs="+", metavar="AUDIO", help="anything that FFmpeg reads")
    add(
        "--models",
        action="extend",
        required=True,
        type=lambda text: list(filter(None, text.split(","))),
        metavar="MODEL,...",
        help="for example tiny.en,base,base:int8 or mine=/models/mine:int8; may be "
        "repeated",
    )
    add(
        "--references",
        action="append",
        type=Path,
        metavar="TSV",
        help="what is said; see below; may be repeated",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="where reports go")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--language", metavar="CODE", help="de, german or de-AT (default: detected)")
    add("--beam-size", type=int, default=5, metavar="N", help="default: 5")
    add_config(add)
    add_settings(add, "vram", "ram", "on")
    add_huge_pages(parser, keep=True)
    add("--again", action="store_true", help="forget what an earlier run has kept")


def run(options: argparse.Namespace) -> int:
    """
    Runs the command and returns the exit code; raises what `compare` does.
    """
    # Made before the thread: rich asks for the terminal here.
    show = _Show()

    def interrupted() -> None:
        show.close()
        sys.stderr.write(
            f"whispercache: interrupted; {options.out / RESULTS} keeps what is done, "
            "and the same command goes on from there\n"
        )
        sys.stderr.flush()

    try:
        comparison = interruptible(
            lambda: _compare(options, show), name="compare", interrupted=interrupted
        )
    except ModuleNotFoundError as missing:
        # An error of the user's, which the command tells in a line.
        raise WhisperCacheError(str(missing)) from missing
    finally:
        show.close()
    # Last on the terminal, after the bars have gone.
    for failure in comparison.failures:
        sys.stderr.write(f"whispercache: error: {failure.file}: {failure.reason}\n")
    for left_out in comparison.model_failures:
        sys.stderr.write(f"whispercache: error: {left_out.model}: {left_out.reason}\n")
    for note in comparison.notes:
        sys.stderr.write(f"{note}\n")
    from .report import as_lines

    sys.stdout.writelines(f"{line}\n" for line in as_lines(comparison))
    sys.stdout.write(f"{options.out / 'report.html'}\n")
    return WRONG_USE if comparison.failures or comparison.model_failures else 0


def _compare(options: argparse.Namespace, show: _Show) -> Comparison:
    held = settings_of(options)
    with (
        ModelCache(**cache_options(held, ONE_BY_ONE_KEYS)) as cache,
        hooks_of(held, cache),
    ):
        return compare(
            options.audio,
            models=options.models,
            references=_references(options.references or ()),
            device=options.device,
            language=options.language,
            out=options.out,
            cache=cache,
            beam_size=options.beam_size,
            resume=not options.again,
            progress=show,
        )


def _references(tables: Sequence[Path]) -> dict[str, Reference] | None:
    found: dict[str, Reference] = {}
    for table in tables:
        for name, reference in read_references(table).items():
            # The same line in two tables does no harm.
            if found.setdefault(name, reference) != reference:
                raise ValueError(f"{table}: another table has other words for {name!r}")
    return found or None


class _Show:
    """
    Shows progress: bars on a terminal, else a line for each file and model.
    """

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self._started_s = time.monotonic()
        if sys.stderr.isatty():
            from rich.progress import TextColumn

            self._bars = bars(TextColumn("{task.fields[what]}", markup=False))
            self._bars.add_task("all files and models", total=1.0, what="")
            # Hidden until there is a file to show.
            self._bars.add_task("", total=1.0, what="", visible=False)
            self._bars.start()

    def __call__(self, progress: Progress) -> None:
        with self._lock:
            # The work goes on for a moment after Ctrl-C.
            if self._is_closed:
                return
            if self._bars is not None:
                self._move(self._bars, progress)
            elif (found := progress.result) is not None:
                place = f"{progress.done}/{progress.total}"
                sys.stderr.write(
                    f"{place} {found.model} · {found.file}: "
                    f"{found.work_s:.1f} s for {found.duration_s:.1f} s of audio\n"
                )
                sys.stderr.flush()

    def _move(self, bars: Bars, progress: Progress) -> None:
        fraction, left = progress.fraction, "-:--"
        if fraction > 0:
            elapsed_s = time.monotonic() - self._started_s
            left = clock(elapsed_s * (1 - fraction) / fraction)
        bars.update(
            bars.tasks[0].id,
            completed=fraction,
            what=f"{progress.done} of {progress.total} · {left} left",
        )
        name = Path(progress.file).name
        bars.update(
            bars.tasks[1].id,
            visible=True,
            description=f"{progress.model} · {name}" if name else progress.model,
            completed=progress.share,
            what=progress.stage,
        )

    def close(self) -> None:
        with self._lock:
            if self._bars is not None and not self._is_closed:
                self._bars.stop()
            self._is_closed = True
