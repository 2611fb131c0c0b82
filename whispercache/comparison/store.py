"""
The results so far, in a file that outlives an interrupted run.

One JSON object a line, appended in one write each. Its last line may be torn by a crash
or a full disk; whatever is no whole record counts as not there.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from whispercache.transcripts import Cue

from .values import Result

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """
    The figures of one load; those of `ModelSummary`.
    """

    load_s: float
    warm_up_s: float
    weights_bytes: int
    peak_bytes: int | None


def hash_of_file(path: str) -> str:
    """
    Returns the SHA-256 of a file's content.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(*parts: object) -> str:
    """
    Returns a text that is equal for equal values of JSON, in this run and the next.
    """
    text = json.dumps(parts, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """
    Results by the fingerprint of all that they depend on, and loads by that of a model;
    for this run only without a *path*. If not *resume*, what is there is forgotten.
    """

    def __init__(self, path: Path | None, *, resume: bool) -> None:
        self._path = path
        self.results: dict[str, Result] = {}
        self.loads: dict[str, LoadRecord] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            # At once, so that an interrupted run does not mix with an older one.
            path.write_bytes(b"")
        elif path.exists():
            for line in path.read_bytes().split(b"\n"):
                # A torn one means that its result is found once more, and nothing else.
                with suppress(ValueError, TypeError, KeyError):
                    self._keep(json.loads(line))

    def add_result(self, key: str, result: Result) -> None:
        """
        Keeps a result; it is on the disk when this returns.
        """
        self.results[key] = result
        fields = {name: getattr(result, name) for name in _RESULT_FIELDS}
        cues = [asdict(cue) for cue in result.cues]
        self._append({"result": key, **fields, "cues": cues})

    def add_load(self, model: str, load: LoadRecord) -> None:
        """
        Keeps the figures of a load, likewise.
        """
        self.loads[model] = load
        self._append({"load": model, **asdict(load)})

    def _append(self, record: Mapping[str, object]) -> None:
        if self._path is None:
            return
        # ASCII, so that file names which are no text are read as they were written.
        line = json.dumps(record).encode() + b"\n"
        with self._path.open("a+b", buffering=0) as file:
            # A torn last line must not spoil the next record.
            if size := file.seek(0, os.SEEK_END):
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)
            # One record is minutes of work.
            os.fsync(file.fileno())

    def _keep(self, record: dict[str, object]) -> None:
        if "result" in record:
            key = str(record.pop("result"))
            cues = record.pop("cues")
            # A record of another version counts as missing.
            if not isinstance(cues, list) or {*record} != {*_RESULT_FIELDS}:
                raise ValueError("not a record of this version")
            heard = tuple(Cue(**cue) for cue in cues)
            self.results[key] = Result(
                **record,  # type: ignore[arg-type]
                cues=heard,
                is_kept=True,
            )
        else:
            key = str(record.pop("load"))
            self.loads[key] = LoadRecord(**record)  # type: ignore[arg-type]


# The fields of a result that are kept; its score depends on the references.
_RESULT_FIELDS = (
    *("model", "file", "language", "certainty", "text"),
    *("duration_s", "work_s", "latency_s", "peak_bytes", "damage"),
)
