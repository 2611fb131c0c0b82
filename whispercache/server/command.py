"""
The command ``whispercache serve``.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whispercache.cache import ModelCache
from whispercache.console import add_huge_pages, explain
from whispercache.errors import WhisperCacheError
from whispercache.planning.priority import parse_priority
from whispercache.settings.arguments import (
    add_config,
    add_settings,
    hooks_of,
    settings_of,
)
from whispercache.settings.sources import cache_options, values_below
from whispercache.settings.table import (
    KEYS_VARIABLE,
    SERVE,
    SERVED_CACHE_KEYS,
    SETTINGS,
)
from whispercache.units import parse_duration, parse_limit

from .options import ServerOptions
from .origins import ANY_ORIGIN

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence
    from types import FrameType

HELP = f"""\
models:
  base                 by its name, which is also what clients call it
  base:int8            in another compute type; clients say base:int8
  mine=/models/mine    a directory; clients say mine
  whisper-1=large-v3   another name

Sizes go by all their usual names: whisper-base and openai/whisper-base are base.
OpenAI's names (whisper-1, gpt-4o-transcribe, …) are the --default, or the first model.

Limits are bytes or 100MiB, times are seconds or 5m. Keys are lines of --key-file, where
# begins a comment, or in ${KEYS_VARIABLE}, with commas between; clients send
Authorization: Bearer KEY. A line "anna: KEY" gives the key a name, for the log and the
list of requests.

Each option may also stand in a file or a variable: see 'whispercache config --help'.

Pages of other sites may not use it, but those of --allow-origin https://app.example;
http://localhost:* is any port, obsidian, electron and tauri are such programs, null are
pages without an origin, such as local files, and * is any site. Clients in containers
call this machine by a name that --allow-host docker allows.

The page is at /, Prometheus metrics at /metrics, probes look at /healthz and /readyz.
"""

_log = logging.getLogger("whispercache")

# A name before a key: a word, a colon and a space, which no key has in it.
_NAMED = re.compile(r"([^\s:]+):\s+(\S+)")
# A # within a key is part of it.
_COMMENT = re.compile(r"(^|\s)#.*")
# Names by which only programs of this machine reach it.
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def add_options(parser: argparse.ArgumentParser) -> None:
    """
    Adds the command's parameters to *parser*.
    """
    parser.description = "OpenAI's audio API over the models you name, and no others."
    explain(parser, HELP)
    parser.set_defaults(run=run)
    add, group = parser.add_argument, parser.add_argument_group
    add(
        "serve.models",
        nargs="*",
        metavar="MODEL",
        help=SETTINGS["serve.models"].meaning,
    )
    add_settings(add, *_keys_of("host port wyoming device preload pin default"))
    add_settings(add, *_keys_of("key_file key_priority"))
    add_config(add)
    cache = "vram ram max_models keep_alive fallback pressure coordinate coordinate_dir"
    add_settings(add, *cache.split(), "park", "variants", "on")
    add_huge_pages(parser, keep=False)
    add_settings(add, *_keys_of("log_format"))
    bounds = (
        "max_upload max_duration max_audio timeout max_waiting parallel drain "
        "idle_timeout strict_names strict vad"
    )
    add_settings(group("limits of a request").add_argument, *_keys_of(bounds))
    web = group("pages of other sites").add_argument
    add_settings(web, *_keys_of("allow_host allow_origin"))


def _keys_of(names: str) -> list[str]:
    return [f"{SERVE}.{name}" for name in names.split()]


def run(options: argparse.Namespace) -> int:
    """
    Serves until SIGTERM, Ctrl-C or the end of its terminal, finishes what has begun,
    and returns the exit code.
    """
    # First: nonsense is told before FastAPI is imported.
    held = settings_of(options)
    setting = values_below(SERVE, held)
    served = server_options(setting)
    try:
        import uvicorn

        from . import logs
        from .app import create_app
        from .drain import Server
    except ModuleNotFoundError as missing:
        raise WhisperCacheError(
            f"{missing.name} is missing; pip install 'whispercache[server]'"
        ) from missing
    _check_free("HTTP", setting["host"], setting["port"], "--port or --host")
    if served.wyoming is not None:
        _check_free("Wyoming", *served.wyoming, "--wyoming")
    with ModelCache(**cache_options(held, SERVED_CACHE_KEYS)) as cache:
        app = create_app(served, cache)
        config = uvicorn.Config(
            app,
            host=setting["host"],
            port=setting["port"],
            # Always there; another one, which uvicorn[standard] brings, answers for
            # itself what it does not know.
            http="h11",
            # uvicorn takes whole seconds.
            timeout_graceful_shutdown=math.ceil(parse_duration(setting["drain"])),
            timeout_keep_alive=math.ceil(parse_duration(setting["idle_timeout"])),
            # Strangers need not know what serves them, and in which version.
            server_header=False,
            log_config=logs.config(setting["log_format"]),
        )
        server = Server(config, app.state.service)
        tell = _tell_in_json if setting["log_format"] == "json" else _tell
        _warn(setting["host"], setting["port"], served, tell)
        # uvicorn raises the signal again when it has finished; its work is done then.
        signal.signal(signal.SIGTERM, lambda *_: None)
        _heed_hang_up(server.handle_exit)
        with hooks_of(held, cache, app.state.service.engine.name_of):
            server.run()
        # The second one ends it at once.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return 0 if server.started else 1


def _heed_hang_up(end: Callable[[int, FrameType | None], None]) -> None:
    # Where the terminal is closed; Windows has no such signal, and nohup ignores it.
    hang_up = getattr(signal, "SIGHUP", None)
    if hang_up is not None and signal.getsignal(hang_up) is signal.SIG_DFL:
        signal.signal(hang_up, end)


def server_options(setting: Mapping[str, Any]) -> ServerOptions:
    """
    Returns what `create_app` takes, from the server's settings by their names.
    """
    hosts = tuple(setting["allow_host"])
    # Here the names are known; elsewhere --allow-host tells them.
    if setting["host"] in LOOPBACK:
        hosts += LOOPBACK
    longest = setting["max_audio"]
    keys = _keys([Path(file) for file in setting["key_file"]])
    return ServerOptions(
        models=tuple(setting["models"]),
        device=setting["device"],
        preload=tuple(setting["preload"]),
        pin=tuple(setting["pin"]),
        keys=tuple(keys),
        key_names=keys,
        key_priorities=_priorities(setting["key_priority"]),
        default=setting["default"],
        strict_names=setting["strict_names"],
        strict=setting["strict"],
        vad=setting["vad"],
        hosts=hosts,
        origins=tuple(setting["allow_origin"]),
        # None would be no limit, which is no setting either.
        max_upload_bytes=parse_limit(setting["max_upload"]).n_bytes or 0,
        max_duration_s=parse_duration(setting["max_duration"]),
        max_audio_s=None if longest is None else parse_duration(longest),
        timeout_s=parse_duration(setting["timeout"]),
        max_waiting=setting["max_waiting"],
        parallel=setting["parallel"],
        wyoming=_address(setting["wyoming"]),
        drain_s=parse_duration(setting["drain"]),
    )


def _check_free(protocol: str, host: str, port: int, option: str) -> None:
    # In one line, before anything is loaded: what fails within uvicorn's start is told
    # in many.
    try:
        places = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, *_, place in places:
            _check_place(family, place, is_only=len(places) == 1)
    except OSError as error:
        reason = error.strerror or error
        raise WhisperCacheError(
            f"{protocol} cannot be spoken on {_joined(host, port)}: {reason}; "
            f"give {option} another value"
        ) from None


def _check_place(family: int, place: Any, *, is_only: bool) -> None:  # noqa: ANN401
    try:
        socket.create_server(place, family=family).close()
    except OSError as error:
        # A name may also stand for an address that a machine without IPv6 lacks.
        lacking = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
        if is_only or error.errno not in lacking:
            raise


def _joined(host: str, port: int) -> str:
    # IPv6
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _address(text: str | None) -> tuple[str, int] | None:
    if text is None:
        return None
    host, _, port = text.rpartition(":")
    # IPv6
    return host.strip("[]"), int(port)


def _keys(files: Sequence[Path]) -> dict[str, str]:
    """
    Returns the names of all keys, empty for those without, by the keys in their order.
    """
    # The processes that decode what strangers sent need not know them.
    named = os.environ.pop(KEYS_VARIABLE, "").split(",")
    keys = {key.strip(): "" for key in named if key.strip()}
    for file in files:
        for key, name in read_keys(file).items():
            keys[key] = keys.get(key) or name
    return keys


def _priorities(texts: Sequence[str]) -> dict[str, float]:
    """
    Returns the priorities of keys by their names.
    """
    found = {}
    for text in texts:
        name, is_told, priority = text.rpartition("=")
        if not is_told:
            raise ValueError(f"key_priority must be as night=batch, not {text!r}")
        found[name.strip()] = parse_priority(priority.strip())
    return found


def read_keys(file: Path) -> dict[str, str]:
    """
    Returns the names of the keys in a file, by the keys: one a line, as ``anna: KEY``,
    or without a name, as ``KEY``. Text after a ``#`` at the beginning of a line, or
    after a space, is a comment. Raises ValueError if there are none.
    """
    try:
        # Windows' editors begin a file with a byte order mark.
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no key file: it is not UTF-8") from error
    found = [_COMMENT.sub("", line).strip() for line in lines]
    if not any(found):
        raise ValueError(f"{file} holds no key, which would let everybody in")
    named = [(_NAMED.fullmatch(line), line) for line in found if line]
    return {one[2] if one else line: one[1] if one else "" for one, line in named}


def _tell(level: int, text: str) -> None:
    warning = "warning: " if level >= logging.WARNING else ""
    sys.stderr.write(f"whispercache: {warning}{text}\n")


def _tell_in_json(level: int, text: str) -> None:
    # Of the standard library's warnings, too, each is a line of JSON.
    logging.captureWarnings(capture=True)
    _log.log(level, "%s", text)


def _warn(
    host: str, port: int, served: ServerOptions, tell: Callable[[int, str], None]
) -> None:
    names = ", ".join(spec.name for spec in served.offered)
    tell(logging.INFO, f"{names} on http://{_joined(host, port)}")
    if served.wyoming is not None:
        there, its_port = served.wyoming
        tell(logging.INFO, f"Wyoming on tcp://{there}:{its_port}")
        if served.keys:
            tell(logging.WARNING, "Wyoming knows no keys")
    strangers = []
    if ANY_ORIGIN in served.origins:
        strangers.append("any page that a browser here shows")
    if host not in LOOPBACK:
        strangers.append("whoever reaches this address")
    for who in strangers if not served.keys else ():
        tell(logging.WARNING, f"{who} may use it; --key-file asks for keys")
