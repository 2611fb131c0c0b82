"""
References: the words that are really said in the files, from a table.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from whispercache.engine.calls.languages import language_code

from .values import Reference

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_COLUMNS = ("file", "language", "text")
_WITHOUT_HEADER = ("file", "text")


def read_references(path: str | os.PathLike[str]) -> dict[str, Reference]:
    r"""
    Returns the references in a table: a line for each file, columns divided by tabs.

    Either the first line names the columns, ``file`` and ``text`` and perhaps
    ``language``, in any order; or there is no such line, and each has file and text.
    UTF-8. Quotes mean nothing: a text is all between two tabs.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is not like that, or a file is there twice; says which line.
    """
    try:
        # Not splitlines, which splits at characters that a text may have.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)}: is not UTF-8: {error.reason}") from error
    columns: tuple[str, ...] = _WITHOUT_HEADER
    found: dict[str, Reference] = {}
    has_begun = False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        named = tuple(cell.lower() for cell in cells)
        # A header is the first line that is not empty.
        if not has_begun and {"file", "text"} <= {*named}:
            columns = named
        else:
            where = f"{os.fspath(path)}, line {number}"
            name, reference = _row(where, columns, cells)
            if name in found:
                raise ValueError(f"{where}: {name!r} is there twice")
            found[name] = reference
        has_begun = True
    if not found:
        raise ValueError(f"{os.fspath(path)}: there are no references in it")
    return found


def _row(
    where: str, columns: Sequence[str], cells: Sequence[str]
) -> tuple[str, Reference]:
    # Editors cut trailing blanks, and with them the tab before an empty text.
    cells = [*cells, *[""] * (len(columns) - len(cells) == 1)]
    if len(cells) != len(columns):
        wanted = ", ".join(columns)
        raise ValueError(
            f"{where}: {len(cells)} columns, not {len(columns)} ({wanted})"
        )
    row = dict(zip(columns, cells, strict=True))
    if not row["file"]:
        raise ValueError(f"{where}: no file is named")
    return row["file"], _coded(where, Reference(row["text"], row.get("language")))


def _coded(where: str, reference: Reference) -> Reference:
    try:
        return replace(reference, language=language_code(reference.language))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def match_references(
    files: Iterable[str], references: Mapping[str, Reference | str]
) -> dict[str, Reference]:
    """
    Returns the reference of each file that has one.

    A reference belongs to the file of the same path or, if there is none, to the one of
    the same name. Raises ValueError if one belongs to two files, and if there are some,
    but for none of these.
    """
    by_path: dict[str, list[str]] = {}
    for file in files:
        # A set: for a file without a folder both are the same.
        for name in {os.path.normpath(file), Path(file).name}:
            by_path.setdefault(name, []).append(file)
    exact: dict[str, Reference] = {}
    loose: dict[str, Reference] = {}
    for name, given in references.items():
        reference = Reference(given) if isinstance(given, str) else given
        reference = _coded(f"the reference for {name!r}", reference)
        path = os.path.normpath(name)
        owners = by_path.get(path) or by_path.get(Path(path).name, [])
        same = [file for file in owners if os.path.normpath(file) == path]
        if not same and len(owners) > 1:
            raise ValueError(
                f"the reference for {name!r} could be for {' or '.join(owners)}; "
                "give its path"
            )
        for file in same or owners:
            if not same and file in loose:
                raise ValueError(f"{file} has two references; one is for {name!r}")
            # A full path says more than a name.
            (exact if same else loose)[file] = reference
    found = {**loose, **exact}
    if references and not found:
        raise ValueError(
            f"none of the {len(references)} references is for one of these files; "
            f"the first is for {next(iter(references))!r}"
        )
    return found
