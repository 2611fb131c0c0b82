"""
The command ``whispercache serve``.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from whispercache.cache import ModelCache
from whispercache.console import add_limits, explain
from whispercache.errors import WhisperCacheError
from whispercache.units import parse_duration, parse_limit

from .options import ANY_ORIGIN, ServerOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Environment variable with keys, separated by commas; a command line is seen by others.
KEYS_VARIABLE = "WHISPERCACHE_API_KEYS"

HELP = f"""\
models:
  base                 by its name, which is also what clients call it
  base:int8            in another compute type; clients say base:int8
  mine=/models/mine    a directory; clients say mine
  whisper-1=large-v3   another name; by default whisper-1 is the first of them

Limits are bytes or 100MiB, times are seconds or 5m. Keys are lines of --key-file, where
# begins a comment, or in ${KEYS_VARIABLE}, with commas between; clients send
Authorization: Bearer KEY.

Pages of other sites may not use it, but those of --allow-origin https://app.example;
null are pages without an origin, such as local files, and * is any site.

The page is at /, Prometheus metrics at /metrics, probes look at /healthz and /readyz.
"""

# A # within a key is part of it.
_COMMENT = re.compile(r"(^|\s)#.*")
_LAST_PORT = 65_535
# Names by which only programs of this machine reach it.
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def add_options(parser: argparse.ArgumentParser) -> None:
    """
    Adds the command's parameters to *parser*.
    """
    parser.description = "OpenAI's audio API over the models you name, and no others."
    explain(parser, HELP)
    parser.set_defaults(run=run)
    _add_service(parser.add_argument)
    add_limits(parser)
    _add_cache(parser.add_argument)
    _add_bounds(parser.add_argument_group("limits of a request").add_argument)
    _add_web(parser.add_argument_group("pages of other sites").add_argument)


def _add_service(add: Callable[..., object]) -> None:
    add("models", nargs="+", metavar="MODEL", help="[NAME=]MODEL[:TYPE], see below")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s)",
    )
    add("--port", type=_port, default=8000, metavar="PORT", help="default: %(default)s")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add_many = partial(add, action="append", default=[])
    add_many("--preload", metavar="NAME", help="load it now")
    add_many("--pin", metavar="NAME", help="load and keep it")
    add_many(
        "--key-file",
        type=Path,
        metavar="FILE",
        help=f"its keys, one a line; or ${KEYS_VARIABLE}, with commas; may be repeated",
    )


def _add_cache(add: Callable[..., object]) -> None:
    add("--max-models", type=int, metavar="N", help="on each device")
    add("--keep-alive", metavar="TIME", default="5m", help="of idle models: 5m, 0, -1")
    add("--fallback", action="append", default=[], metavar="RUNG", help="as in the API")
    add("--watch", action="store_true", help="unload before other programs run out")
    add("--coordinate", action="store_true", help="with other processes of this user")
    add("--park", metavar="LIMIT", help="keep copies of what a GPU unloads: 16GiB")
    add("--no-variants", action="store_true", help="read models as they were saved")


def _add_bounds(add: Callable[..., object]) -> None:
    add("--max-upload", metavar="SIZE", default="100MiB", help="default: %(default)s")
    add("--max-duration", metavar="TIME", default="1h", help="of audio (%(default)s)")
    add("--max-audio", metavar="TIME", help="of all at work (as --max-duration)")
    add("--timeout", metavar="TIME", default="60s", help="for a model (%(default)s)")
    add("--max-waiting", type=int, default=64, metavar="N", help="default: %(default)s")
    add(
        "--parallel",
        type=int,
        default=2,
        metavar="N",
        help="calls on one model at once",
    )
    add(
        "--drain",
        metavar="TIME",
        default="30s",
        help="to finish at the end (%(default)s)",
    )


def _add_web(add: Callable[..., object]) -> None:
    add_many = partial(add, action="append", default=[])
    add_many("--allow-host", metavar="NAME", help="of this server")
    add_many("--allow-origin", metavar="URL", help="of a page; null, * (see below)")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > _LAST_PORT:
        message = f"{text!r} is no port; give a number up to {_LAST_PORT}"
        raise argparse.ArgumentTypeError(message)
    return int(text)


def run(options: argparse.Namespace) -> int:
    """
    Serves until SIGTERM or Ctrl-C, finishes what has begun, and returns the exit code.
    """
    # First: nonsense is told before FastAPI is imported.
    served = _served(options)
    try:
        import uvicorn

        from .app import create_app
        from .drain import Server
    except ModuleNotFoundError as missing:
        raise WhisperCacheError(
            f"{missing.name} is missing; pip install 'whispercache[server]'"
        ) from missing
    with _cache(options) as cache:
        app = create_app(served, cache)
        config = uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            # uvicorn takes whole seconds.
            timeout_graceful_shutdown=math.ceil(_seconds(options, "drain")),
            # Strangers need not know what serves them, and in which version.
            server_header=False,
            log_config=_LOGGING,
        )
        server = Server(config, app.state.service)
        _warn(options, served)
        # uvicorn raises the signal again when it has finished; its work is done then.
        signal.signal(signal.SIGTERM, lambda *_: None)
        server.run()
        # The second one ends it at once.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return 0 if server.started else 1


def _cache(options: argparse.Namespace) -> ModelCache:
    return ModelCache(
        vram=options.vram,
        ram=options.ram,
        max_models=options.max_models,
        keep_alive=options.keep_alive,
        fallback=options.fallback,
        pressure="watch" if options.watch else "load",
        coordinate=options.coordinate,
        park=options.park or False,
        variants=not options.no_variants,
    )


def _served(options: argparse.Namespace) -> ServerOptions:
    hosts = tuple(options.allow_host)
    # Here the names are known; elsewhere --allow-host tells them.
    if options.host in LOOPBACK:
        hosts += LOOPBACK
    max_upload_bytes = parse_limit(options.max_upload, "--max-upload").of(0)
    return ServerOptions(
        models=tuple(options.models),
        device=options.device,
        preload=tuple(options.preload),
        pin=tuple(options.pin),
        keys=_keys(options.key_file),
        hosts=hosts,
        origins=tuple(options.allow_origin),
        # None would be no limit, which ServerOptions does not have.
        max_upload_bytes=max_upload_bytes or 0,
        max_duration_s=_seconds(options, "max_duration"),
        max_audio_s=_seconds(options, "max_audio") if options.max_audio else None,
        timeout_s=_seconds(options, "timeout"),
        max_waiting=options.max_waiting,
        parallel=options.parallel,
    )


def _seconds(options: argparse.Namespace, name: str) -> float:
    seconds = parse_duration(getattr(options, name), f"--{name.replace('_', '-')}")
    # -1 is for ever in Ollama's words.
    if math.isinf(seconds):
        raise ValueError(f"--{name.replace('_', '-')} must have an end")
    return seconds


def _keys(files: Sequence[Path]) -> tuple[str, ...]:
    # The processes that decode what strangers sent need not know them.
    named = os.environ.pop(KEYS_VARIABLE, "").split(",")
    keys = [key.strip() for key in named if key.strip()]
    for file in files:
        keys += read_keys(file)
    # Each once, in order.
    return tuple(dict.fromkeys(keys))


def read_keys(file: Path) -> list[str]:
    """
    Returns the keys in a file, one a line. Text after a ``#`` at the beginning of a
    line, or after a space, is a comment. Raises ValueError if there are none.
    """
    try:
        # Windows' editors begin a file with a byte order mark.
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no key file: it is not UTF-8") from error
    keys = [_COMMENT.sub("", line).strip() for line in lines]
    if not any(keys):
        raise ValueError(f"{file} holds no key, which would let everybody in")
    return [key for key in keys if key]


def _warn(options: argparse.Namespace, served: ServerOptions) -> None:
    names = ", ".join(spec.name for spec in served.offered)
    # IPv6
    host = f"[{options.host}]" if ":" in options.host else options.host
    sys.stderr.write(f"whispercache: {names} on http://{host}:{options.port}\n")
    strangers = []
    if ANY_ORIGIN in served.origins:
        strangers.append("any page that a browser here shows")
    if options.host not in LOOPBACK:
        strangers.append("whoever reaches this address")
    for who in strangers if not served.keys else ():
        sys.stderr.write(
            f"whispercache: warning: {who} may use it; --key-file asks for keys\n"
        )


_LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "plain": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}
    },
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "loggers": {
        "uvicorn": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
        "whispercache": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
    },
}
