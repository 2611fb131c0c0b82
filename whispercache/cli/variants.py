"""
The command ``whispercache variants``: lists, builds and removes a user's variants.

Results go to stdout, a line each; beginnings and errors to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

from whispercache.console import WRONG_USE, error_line, explain
from whispercache.devices.probe import SystemProbe
from whispercache.engine.loader import FasterWhisperLoader
from whispercache.engine.naming import canonical_model, parse_spec, short_name
from whispercache.engine.sizes.header import ModelHeader
from whispercache.engine.sizes.weights import DTYPES
from whispercache.engine.variants.convert import KINDS, Origin, kind_for
from whispercache.engine.variants.store import VariantRefused
from whispercache.errors import UnknownModel, WhisperCacheError, format_bytes
from whispercache.options import DEFAULT_VARIANTS_BYTES, variants_bytes
from whispercache.settings.sources import settle

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from whispercache.engine.naming import ModelSpec
    from whispercache.engine.variants.store import Variant, Variants
    from whispercache.units import LimitValue

_HELP = """\
A model whose file has another type than it is used in is converted at each load. A
variant is a copy that was converted once, and gives the same results. Models that are
loaded get theirs by themselves, in the background; 'build' does it ahead.

states:
  ready   used when its model is loaded in this type
  stale   its model has changed or gone, or CTranslate2 is another version by now
  broken  its files were written to, copied or made by an earlier version; it is never
          loaded, and 'remove --all' removes it, or 'remove NAME' where it has one
"""

_BUILD_HELP = """\
models:
  base              by its name, to int8; downloaded first if it is not on this disk
  base:float32      to another type: int8, float32, float16
  /models/mine:int8 a directory

int8 is for all types of int8: int8_float32, which it is on a CPU, int8_float16 and
int8_bfloat16. The exit code is 2 if one cannot be built; the others are all the same.
A cache that builds more keeps to a limit of its own, ModelCache(variants="20GiB") or
WHISPERCACHE_VARIANTS=20GiB.
"""

_REMOVE_HELP = """\
which:
  base        all of a model
  base:int8   one type of it

They are built again when they are missed. The exit code is 2 if one of those that are
named is not there.
"""

_UNITS_S = (("day", 86_400), ("h", 3600), ("min", 60))


def add_options(parser: argparse.ArgumentParser) -> None:
    """
    Adds the command's parameters, and those of the commands below it, to *parser*.
    """
    parser.description = "List, build and remove copies of models that load faster."
    explain(parser, _HELP)
    parser.usage = f"{parser.prog} [-h] [--json] [COMMAND ...]"
    parser.add_argument("--json", action="store_true", help="list them as JSON")
    parser.set_defaults(run=_list)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", prog=parser.prog
    )
    shown = commands.add_parser("list", help="show them, as without a command")
    # Its own default would undo a --json before it.
    shown.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="as JSON"
    )
    _add_build(commands.add_parser("build", help="convert models now"))
    _add_remove(commands.add_parser("remove", help="delete some, or all"))


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.description = "Convert models now, so that their first load is fast, too."
    explain(parser, _BUILD_HELP)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL[:TYPE]", help="see below")
    add(
        "--limit",
        metavar="SIZE",
        help="of all variants; those not used for an hour make room "
        f"(default: as set, or {DEFAULT_VARIANTS_BYTES // 1024**3}GiB)",
    )
    parser.set_defaults(run=_build)


def _add_remove(parser: argparse.ArgumentParser) -> None:
    parser.description = "Delete variants. Models stay where they are."
    explain(parser, _REMOVE_HELP)
    add = parser.add_argument
    add("which", nargs="*", metavar="MODEL[:TYPE]", help="see below")
    add("--all", action="store_true", help="all of them")
    parser.set_defaults(run=_remove)


def _list(options: argparse.Namespace) -> int:
    variants = _variants()
    found = sorted(variants.list(), key=_name)
    if options.json:
        sys.stdout.write(f"{as_json(found)}\n")
        return 0
    lines = as_lines(found, variants.limit_bytes, variants.directory, time.time())
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 0


def as_json(found: Iterable[Variant]) -> str:
    """
    Returns variants as a JSON list of objects; ``used_s`` is in seconds since 1970.
    """
    objects = [{**asdict(each), "directory": str(each.directory)} for each in found]
    return json.dumps(objects, indent=2)


def as_lines(
    found: Sequence[Variant], limit_bytes: int, directory: Path, now_s: float
) -> list[str]:
    """
    Returns variants as a table, and a line on all of them. *now_s* is in seconds since
    1970.
    """
    if not found:
        return [
            f"There are no variants yet in {directory}.",
            "Models that must be converted when they are loaded get theirs by",
            "themselves. To build one now: whispercache variants build base:int8",
        ]
    rows = [("model", "type", "size", "last used", "state", "source")]
    rows += (
        (
            short_name(each.model),
            each.kind,
            format_bytes(each.n_bytes),
            _ago(now_s - each.used_s) if each.used_s else "?",
            each.state,
            each.source,
        )
        for each in found
    )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    total = f"{_total(found)} of {format_bytes(limit_bytes)}"
    return [
        # Not by rich, which would fold or cut long paths.
        *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows),
        "",
        f"{total}, in {directory}",
    ]


def _ago(passed_s: float) -> str:
    for unit, size_s in _UNITS_S:
        number = int(passed_s // size_s)
        if number >= 1:
            return f"{number} {unit}{'s' * (unit == 'day' and number > 1)} ago"
    return "just now"


def _total(found: Sequence[Variant], verb: str = "") -> str:
    n_bytes = sum(each.n_bytes for each in found)
    count = f"{len(found)} variant{'s' * (len(found) != 1)}"
    return f"{count}{verb}, {format_bytes(n_bytes)}"


def _build(options: argparse.Namespace) -> int:
    wanted = [_wanted(text) for text in dict.fromkeys(options.models)]
    loader = _loader(_limit_bytes(options.limit))
    failures = 0
    for model, compute_type in wanted:
        try:
            line = _built(loader, model, compute_type)
        except (WhisperCacheError, OSError) as error:
            failures += 1
            _complain(error)
        else:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
    return WRONG_USE if failures else 0


def _limit_bytes(said: str | None = None) -> int:
    """
    Returns the limit that was said on the command line, or else that of the settings.
    """
    value = settle()["variants"].value if said is None else said
    # To be on or off is no limit: what is asked for here is done all the same.
    is_switch = isinstance(value, bool)
    return variants_bytes(cast("LimitValue", is_switch or value), "--limit")


def _wanted(text: str) -> tuple[str, str]:
    spec = parse_spec(text)
    named = spec.compute_type
    # "default" that was spelt out is refused below: it depends on the device.
    if named == "default" and not text.strip().endswith(":default"):
        named = "int8"
    if named in ("auto", "default"):
        raise ValueError(
            f"{text!r}: which type that is depends on the device; name one of "
            f"{', '.join(KINDS)}"
        )
    return spec.model, "int8_float32" if named == "int8" else named


def _built(loader: FasterWhisperLoader, name: str, compute_type: str) -> str:
    """
    Builds one variant unless it is there, and returns the outcome in a line.
    """
    model = canonical_model(name)
    files = loader.locate(model, {}, download=True)
    # With download=True there are files, or an error.
    assert files is not None and isinstance(files.source, ModelHeader)
    source = Origin(model, files.source, files.stamp)
    weight = DTYPES[compute_type][0]
    title = f"{short_name(model)}:{weight}"
    variants = _variants(loader)
    try:
        kind = _kind(source, compute_type)
        if kind is None:
            return f"{title}: not needed, its file is {weight} already"
        # Another process may have built it meanwhile; build() looks again.
        there = variants.find(source, kind)
        if there is not None:
            return f"{title}: there already, {format_bytes(_bytes_in(there))}"
        size = format_bytes(source.header.file_bytes)
        sys.stderr.write(f"{title}: converting {size} of {source.directory}\n")
        sys.stderr.flush()
        started_s = time.monotonic()
        built = variants.build(source, kind)
    except VariantRefused as refused:  # which does not say of what
        raise VariantRefused(f"{title}: {refused}") from refused
    took_s = time.monotonic() - started_s
    return f"{title}: {format_bytes(_bytes_in(built))} in {took_s:.1f} s"


def _kind(source: Origin, compute_type: str) -> str | None:
    kind = kind_for(source.header, compute_type)
    wanted, saved = (
        DTYPES[each][0] for each in (compute_type, source.header.saved_compute_type)
    )
    if kind is not None or wanted == saved:
        return kind
    if wanted not in KINDS:
        raise VariantRefused(f"variants are {', '.join(KINDS)}, not {wanted}")
    raise VariantRefused(f"its file is {saved}, which cannot become {wanted}")


def _bytes_in(directory: Path) -> int:
    return sum(each.stat().st_size for each in directory.iterdir())


def _remove(options: argparse.Namespace) -> int:
    if not (options.which or options.all):
        raise ValueError("name what to remove, or give --all")
    # A misspelt name is found before anything is removed.
    specs = {text: parse_spec(text) for text in options.which}
    variants = _variants()
    found = variants.list()
    chosen = list(found) if options.all else []
    failures = 0
    for text, spec in specs.items():
        named = [each for each in found if _is_named(each, spec)]
        chosen += (each for each in named if each not in chosen)
        if not named:
            failures += 1
            _complain(WhisperCacheError(f"there is no variant {text!r}"))
    if not chosen and not failures:
        sys.stdout.write("nothing to remove\n")
    gone = []
    for each in chosen:
        try:
            variants.remove(each)
        except OSError as error:
            failures += 1
            _complain(error)
        else:
            gone.append(each)
            sys.stdout.write(f"removed {_name(each)}, {format_bytes(each.n_bytes)}\n")
    if len(gone) > 1:
        sys.stdout.write(f"{_total(gone, ' removed')}\n")
    return WRONG_USE if failures else 0


def _is_named(variant: Variant, spec: ModelSpec) -> bool:
    kind = DTYPES.get(spec.compute_type, (spec.compute_type,))[0]
    if kind not in ("default", "auto", variant.kind):
        return False
    try:
        model = canonical_model(spec.model)
    except UnknownModel:  # its directory may have gone since
        model = str(Path(spec.model).expanduser().resolve())
    return model == variant.model or spec.model == short_name(variant.model)


def _name(variant: Variant) -> str:
    # The manifest of a broken one may tell nothing of its model.
    if variant.state == "broken":
        return variant.directory.name
    return f"{short_name(variant.model)}:{variant.kind}"


def _loader(limit_bytes: int) -> FasterWhisperLoader:
    return FasterWhisperLoader(SystemProbe(), variants_bytes=limit_bytes)


def _variants(loader: FasterWhisperLoader | None = None) -> Variants:
    variants = (loader or _loader(_limit_bytes())).variants
    assert variants is not None
    return variants


def _complain(error: Exception) -> None:
    sys.stderr.write(f"{error_line(error)}\n")
