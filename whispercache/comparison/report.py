"""
Reports of a comparison: JSON, a table, and a page that explains itself.

Transcripts and file names come from elsewhere. In the page all of them are escaped, and
it allows no script at all; in the table none of them starts a formula.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from whispercache.console import clock
from whispercache.engine.naming import short_name
from whispercache.errors import format_bytes
from whispercache.version import __version__

from .plots import SPAN_WIDTH, plots_of, spans_of
from .score import score

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .values import Comparison, ModelSummary, Result

    Cell: TypeAlias = str | float | None

# The number of colours in the page; models beyond that share them.
REPORTS = ("comparison.json", "comparison.csv", "report.html")
COLOURS = 8

_NONE = "—"
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # noqa: RUF001 - wide ones count too in Excel


def write_reports(comparison: Comparison, folder: Path) -> None:
    """
    Writes all reports; each appears only when it is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in zip(REPORTS, (as_json, as_csv, as_html), strict=True):
        partial = folder / f"{name}.partial"
        # Names of files may be no text.
        partial.write_text(
            write(comparison), encoding="utf-8", errors="backslashreplace", newline=""
        )
        # Atomic: a reader sees the old page or the new one.
        partial.replace(folder / name)


def as_json(comparison: Comparison) -> str:
    """
    Returns the whole comparison with its rates. Times are in seconds.
    """
    document = {
        "whispercache": __version__,
        **asdict(comparison),
        "models": [_with_rates(model) for model in comparison.models],
        "results": [_with_rates(result) for result in comparison.results],
    }
    text = json.dumps(document, ensure_ascii=False, indent=1, default=repr)
    return f"{text}\n"


def _with_rates(value: ModelSummary | Result) -> dict[str, object]:
    return {
        **asdict(value),
        "wer": value.wer,
        "cer": value.cer,
        "real_time_factor": value.real_time_factor,
    }


def as_csv(comparison: Comparison) -> str:
    """
    Returns a row for each model and file. Text that a spreadsheet would take for a
    formula gets an apostrophe before it.
    """
    models = {model.name: model for model in comparison.models}
    said = {file.file: file.reference for file in comparison.files}
    rows = [
        _row(result, models[result.model], said[result.file])
        for result in comparison.results
    ]
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    if rows:
        writer.writerow(rows[0])
    # The header is ours; the cells are not.
    writer.writerows(map(_defused, row.values()) for row in rows)
    return out.getvalue()


def _row(result: Result, model: ModelSummary, said: str | None) -> dict[str, Cell]:
    words = result.words
    return {
        "model": result.model,
        "file": result.file,
        "key": model.key,
        "language": result.language,
        "duration_s": round(result.duration_s, 3),
        "work_s": round(result.work_s, 4),
        "latency_s": None if result.latency_s is None else round(result.latency_s, 4),
        "real_time_factor": _rounded(result.real_time_factor),
        "load_s": round(model.load_s, 4),
        "peak_bytes": result.peak_bytes,
        "wer": _rounded(result.wer),
        "cer": _rounded(result.cer),
        "words": words.said if words else None,
        **{
            name: getattr(words, name) if words else None
            for name in ("hits", "substitutions", "deletions", "insertions")
        },
        "is_kept": int(result.is_kept),
        "reference": said,
        "text": result.text,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _defused(cell: Cell) -> Cell:
    if isinstance(cell, str) and cell.startswith(_FORMULA):
        return f"'{cell}"
    return cell


def as_lines(comparison: Comparison) -> Iterator[str]:
    """
    Yields the outcome in a few lines of plain text, for a terminal.
    """
    columns = ("model", "word errors", "characters", "speed", "load", "peak memory")
    rows = [
        (
            model.name,
            _percent(model.wer),
            _percent(model.cer),
            _speed(model.real_time_factor),
            _seconds(model.load_s),
            _bytes(model.peak_bytes),
        )
        for model in comparison.models
    ]
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for name, *figures in (columns, *rows):
        # Names to the left, figures to the right.
        cells = map(str.rjust, figures, widths[1:])
        yield "  ".join((name.ljust(widths[0]), *cells))
    yield ""
    yield from (each.verdict for each in comparison.differences)
    if not comparison.differences:
        yield from (
            f"{each.first} and {each.second} agree on {_percent(each.share)} of their "
            "words."
            for each in comparison.agreements
        )
    loads = f"{comparison.loads} load{'s' * (comparison.loads != 1)}"
    yield f"{loads}; {comparison.loads_saved} saved by taking models in turns."


def as_html(comparison: Comparison) -> str:
    """
    Returns the page: one file that needs nothing else, for light and dark.
    """
    import jinja2

    # Escapes everything that is not marked as safe; nothing is.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "seconds": _seconds,
        "bytes": _bytes,
        "speed": _speed,
        "clock": clock,
        "short": short_name,
    }
    scatter, whiskers = plots_of(comparison)
    agreements = {
        (each.first, each.second): each.share for each in comparison.agreements
    }
    return environment.get_template("report.html.jinja").render(
        comparison=comparison,
        version=__version__,
        scatter=scatter,
        whiskers=whiskers,
        spans=spans_of(comparison.differences),
        span_width=SPAN_WIDTH,
        sections=list(_sections(comparison)),
        headline=_headline(comparison),
        agreements=agreements,
        duration_s=sum(file.duration_s for file in comparison.files),
        is_scored=any(model.words for model in comparison.models),
        colours=COLOURS,
    )


def _sections(comparison: Comparison) -> Iterator[dict[str, object]]:
    """
    Yields a section of the page for each file, with each model's transcript of it.
    """
    names = [Path(file.file).name for file in comparison.files]
    colours = {model.name: place for place, model in enumerate(comparison.models)}
    is_open = False
    for file, name in zip(comparison.files, names, strict=True):
        results = [each for each in comparison.results if each.file == file.file]
        edits = [each.edits for each in results]
        if file.reference is None:
            # The first model's text stands in for it.
            texts = [each.text for each in results]
            edits = [score(texts[0], text, file.language).edits for text in texts]
        differs = any(edit.kind != "equal" for each in edits for edit in each)
        yield {
            "file": file,
            # Without its folder, where its name tells it apart.
            "label": name if names.count(name) == 1 else file.file,
            "heard": [
                {"result": each, "edits": found, "colour": colours[each.model]}
                for each, found in zip(results, edits, strict=True)
            ],
            # The first one with something to see needs no click.
            "is_open": differs and not is_open,
        }
        is_open = is_open or differs


def _headline(comparison: Comparison) -> str:
    models = comparison.models
    timed = [model for model in models if model.real_time_factor]
    if not timed:
        return "Nothing was heard."
    fastest = min(timed, key=lambda model: model.real_time_factor or 0)
    times = _speed(fastest.real_time_factor)
    speed = f"{fastest.name} is the fastest: {times} as fast as speech."
    scored = [model for model in models if model.wer is not None]
    if not scored:
        return speed
    least = min(model.wer or 0 for model in scored)
    best = [model.name for model in scored if model.wer == least]
    verb = "has" if len(best) == 1 else "have"
    fewest = f"{_listed(best)} {verb} the fewest word errors: {_percent(least)}."
    # The least errors may still be luck.
    if not any(each.better for each in comparison.differences):
        fewest = f"{fewest[:-1]}, which may be chance."
    return f"{fewest} {speed}" if len(scored) > 1 else speed


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{100 * share:.1f} %"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return _NONE
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"  # noqa: PLR2004


def _bytes(n_bytes: int | None) -> str:
    return _NONE if n_bytes is None else format_bytes(n_bytes)


def _speed(factor: float | None) -> str:
    if not factor:
        return _NONE
    times = 1 / factor
    return f"{times:.0f}×" if times >= 10 else f"{times:.{1 + (times < 1)}f}×"  # noqa: PLR2004
