"""
The server's log on stderr: lines for people, or JSON for programs.
"""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Literal, TypeAlias

from .seen import current
from .telemetry import trace_ids

if TYPE_CHECKING:
    from collections.abc import Mapping

LogFormat: TypeAlias = Literal["text", "json"]

# The attribute of a record with what JSON has besides its message.
FIELDS = "whispercache"

_ACCESS = "uvicorn.access"
_ACCESS_ARGS = 5


class TextLines(logging.Formatter):
    """
    Lines with the id of the request that they are of.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s%(request)s")

    def format(self, record: logging.LogRecord) -> str:
        """
        Returns the line, and a traceback if there is one.
        """
        request = current()
        record.request = "" if request is None else f" [{request.id}]"
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's
        """
        Returns the line.
        """
        if access := _access(record):
            record.message = (
                '{client} - "{method} {path} HTTP/{http_version}" {status}'.format(
                    **access
                )
            )
        return super().formatMessage(record)


class JsonLines(logging.Formatter):
    """
    Objects, each on a line, with the id of the request, and of the trace, that they are
    of.
    """

    def format(self, record: logging.LogRecord) -> str:
        """
        Returns the object as JSON, a traceback within it.
        """
        request = current()
        at = datetime.fromtimestamp(record.created, timezone.utc)
        access = _access(record)
        line: dict[str, object] = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": "access" if access else record.getMessage(),
            "request_id": None if request is None else request.id,
            **trace_ids(),
            **access,
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # In ASCII: another letter that stderr's encoding lacks would be written in
        # Python's escapes, which JSON does not have.
        return json.dumps(line, default=str)


def _access(record: logging.LogRecord) -> Mapping[str, object]:
    """
    Returns the parts of one of uvicorn's lines on an answer, without the query, which
    may have texts in it; nothing if it is no such line.
    """
    args = record.args
    if record.name != _ACCESS or not isinstance(args, tuple):
        return {}
    if len(args) != _ACCESS_ARGS:
        return {}
    client, method, path, http_version, status = args
    return {
        "client": client,
        "method": method,
        "path": str(path).partition("?")[0],
        "http_version": http_version,
        "status": status,
    }


def config(log_format: LogFormat) -> dict[str, object]:
    """
    Returns the configuration of `logging` for a process that serves.
    """
    lines = JsonLines if log_format == "json" else TextLines
    ours = {"handlers": ["stderr"], "level": "INFO", "propagate": False}
    loggers: dict[str, object] = {"uvicorn": ours, "whispercache": ours}
    if log_format == "json":
        # Whatever else is logged must not come between as text.
        loggers[""] = {"handlers": ["stderr"], "level": "WARNING"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": lines}},
        "handlers": {
            "stderr": {"class": "logging.StreamHandler", "formatter": "lines"}
        },
        "loggers": loggers,
    }
