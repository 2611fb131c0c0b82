"""
The command ``whispercache``: its options, its errors and its exit codes.

Errors go to stderr, one line each; stdout carries results.
Heavy imports wait for a command that needs them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import gc
import io
import math
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from whispercache import __version__
from whispercache.console import (
    INTERRUPTED,
    WRONG_USE,
    add_huge_pages,
    error_line,
    explain,
)
from whispercache.errors import WhisperCacheError
from whispercache.settings.arguments import add_config, add_settings
from whispercache.settings.table import KEY_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.console import Console

# Most seconds from the end of the command to that of its process.
EXIT_S = 15.0

# Exit code after the end of the reader: 128 and the number of the signal.
BROKEN_PIPE = 141

# argparse has no room for the longest name beside its help.
_COMMANDS_HELP = """\
commands:
  transcribe  transcribe files with one or more models
  serve       OpenAI's audio API over the models you name
  run         a program of others, with its models from a cache
  reserve     a program of others, with room that is made and kept for it
  top         what a server is doing, live
  compare     how well, and how fast, models hear your audio
  models      what each known model takes, and where it fits now
  variants    copies of models that load faster: list, build and remove them
  config      the settings that hold, and where each came from
  doctor      what is needed here, what works, and how to mend the rest

'whispercache COMMAND --help' tells more.
"""

_FORMATS_HELP = """\
formats:
  txt   the text, a line for each segment
  srt   SubRip subtitles
  vtt   WebVTT subtitles
  json  JSON Lines: for each file and model one object on one line, with file, model,
        language, duration, text, and segments of start, end and text; times in seconds

Models take turns, each with all files, so that each is loaded once. With several files
or models, a heading goes before each text on stdout, except in json; --output-dir
writes FILE.MODEL.FORMAT instead, for example talk.base.srt. A file that cannot be
decoded is reported and passed over, and the exit code is 2.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs the command, and returns the exit code: 0, or 2 if something could not be done;
    1 from ``doctor``.

    Without *arguments* they are those of this process, which may then be set up for the
    command alone: nothing else runs in it.
    """
    _prepare()
    try:
        given = sys.argv[1:] if arguments is None else arguments
        options = _parser(given).parse_args(given)
        options.owns_process = arguments is None
        if options.owns_process:
            _set_up_heap(options)
        command: Callable[[argparse.Namespace], int] = options.run
        code = command(options)
        # Here, where a broken pipe can still be told from other errors.
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    # RuntimeError is CTranslate2's, ValueError faster-whisper's and ours for nonsense.
    except (WhisperCacheError, OSError, RuntimeError, ValueError, MemoryError) as error:
        sys.stderr.write(f"{error_line(error)}\n")
        return WRONG_USE
    return code


def script() -> NoReturn:
    """
    Runs the command as a process of its own, and ends that. The end of the interpreter
    waits for threads; a download may never end.
    """
    code = main()
    # The end of the interpreter looks for cycles in all that was imported, and again
    # after that. The system frees it as well.
    gc.freeze()
    last = threading.Timer(EXIT_S, os._exit, (code,))
    # Or it would itself be waited for.
    last.daemon = True
    last.start()
    sys.exit(code)


def _prepare() -> None:
    """
    Prepares stdout for any text: UTF-8, or what a terminal can show. A process that was
    started without streams, as by some supervisors, writes to nowhere.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Not inherited by the program of `run`, which has none as before.
            nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, nowhere)
    if isinstance(sys.stdout, io.TextIOWrapper):
        encoding = None if sys.stdout.isatty() else "utf-8"
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")


def _set_up_heap(options: argparse.Namespace) -> None:
    """
    Prepares this process for the loads of a command, before its threads start.
    """
    # Other commands load no model.
    if getattr(options, "no_huge_pages", True):
        return
    from whispercache.devices.heap import use_huge_pages

    # Blocks of batches differ too much in size to be used again: their peak would be up
    # to 1.4 times as high.
    batches = getattr(options, "batch_size", None) is not None
    use_huge_pages(keep=options.keeps_freed and not batches)


class _Parser(argparse.ArgumentParser):
    """
    A parser whose errors are one line, with the nearest of what there is.
    """

    def parse_known_args(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        namespace: argparse.Namespace | None = None,
    ) -> tuple[argparse.Namespace, list[str]]:
        """
        Returns what was understood, and nothing else: a command tells by itself what
        it does not know, since it knows what is near.
        """
        into = namespace or argparse.Namespace()
        found, rest = super().parse_known_args(args, into)
        if rest:
            near = _nearest(rest[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(rest)}{near}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        self.exit(
            WRONG_USE, f"whispercache: error: {message}; see '{self.prog} --help'\n"
        )


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="whispercache",
        description="The faster-whisper models you name, in the memory there is.",
        usage="whispercache [-h] [--version] COMMAND ...",
    )
    explain(parser, _COMMANDS_HELP)
    parser.add_argument(
        "--version", action="version", version=f"whispercache {__version__}"
    )
    if arguments and not arguments[0].startswith("-") and arguments[0] not in _COMMANDS:
        near = _nearest(arguments[0], _COMMANDS)
        parser.error(f"there is no command {arguments[0]!r}{near}")
    commands = parser.add_subparsers(
        metavar="COMMAND", prog="whispercache", required=True, help=argparse.SUPPRESS
    )
    for name, add_options in _COMMANDS.items():
        parser_of_command = commands.add_parser(name)
        # Those of the others would import what only they need.
        if name in arguments:
            add_options(parser_of_command)
    return parser


def _nearest(given: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(given, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _add_place(parser: argparse.ArgumentParser, auto: str, default: str) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help=f"auto, cpu, cuda or cuda:N (default: auto, {auto})",
    )
    parser.add_argument(
        "--compute-type",
        default="default",
        metavar="TYPE",
        help=f"for example int8, float16, float32 (default: {default})",
    )


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.description = "What each known model takes, and where there is room for it."
    parser.add_argument("--json", action="store_true", help="print bytes as JSON")
    _add_place(parser, "all that are here", "what is worth a look")
    parser.set_defaults(run=_models)


def _add_transcribe(parser: argparse.ArgumentParser) -> None:
    from whispercache.transcripts import FORMATS

    from .transcribe import transcribe

    parser.description = "Transcribe audio and video files with one or more models."
    explain(parser, _FORMATS_HELP)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="anything that FFmpeg reads")
    add(
        "--model",
        dest="models",
        action="append",
        required=True,
        metavar="MODEL",
        help="a size such as base, a hub repository or a directory; may be repeated",
    )
    _add_place(parser, "a GPU with room, else the CPU", "as the model was saved")
    add(
        "--language",
        type=_language,
        metavar="LANGUAGE",
        help="for example de, german or de-AT (default: detected)",
    )
    add("--task", choices=("transcribe", "translate"), default="transcribe")
    add("--batch-size", type=_count, metavar="N", help="windows of 30 s at once")
    add("--beam-size", type=_count, default=5, metavar="N", help="default: 5")
    add("--vad", action="store_true", help="leave out what is not speech")
    add("--format", choices=tuple(FORMATS), default="txt", help="see below")
    add("--output-dir", type=Path, metavar="DIR", help="write files there, not stdout")
    add_config(add)
    add_settings(add, "vram", "ram", "variants", "on")
    add_huge_pages(parser, keep=True)
    parser.set_defaults(run=transcribe)


def _language(text: str) -> str | None:
    from whispercache.engine.calls.languages import language_code

    try:
        return language_code(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_serve(parser: argparse.ArgumentParser) -> None:
    from whispercache.ray import command as cluster
    from whispercache.server import command

    command.add_options(parser)
    cluster.add_options(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    from . import run

    run.add_options(parser)


def _add_reserve(parser: argparse.ArgumentParser) -> None:
    from . import reserve

    reserve.add_options(parser)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    from whispercache.comparison import command

    command.add_options(parser)


def _add_variants(parser: argparse.ArgumentParser) -> None:
    from . import variants

    variants.add_options(parser)


def _add_config(parser: argparse.ArgumentParser) -> None:
    from . import config

    config.add_options(parser)


def _add_top(parser: argparse.ArgumentParser) -> None:
    parser.description = "What a server is doing, live in this terminal."
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="(%(default)s)")
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help=f"with its key; or ${KEY_VARIABLE}",
    )
    parser.add_argument("--once", action="store_true", help="show it once, and end")
    parser.add_argument(
        "--interval",
        default="1s",
        metavar="TIME",
        help="between two looks (default: %(default)s)",
    )
    parser.set_defaults(run=_top)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Examine this machine. The exit code is 1 if something is wrong."
    )
    parser.set_defaults(run=_doctor)


_COMMANDS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "transcribe": _add_transcribe,
    "serve": _add_serve,
    "run": _add_run,
    "reserve": _add_reserve,
    "top": _add_top,
    "compare": _add_compare,
    "models": _add_models,
    "variants": _add_variants,
    "config": _add_config,
    "doctor": _add_doctor,
}


def _models(options: argparse.Namespace) -> int:
    from whispercache.devices.probe import SystemProbe
    from whispercache.engine.loader import FasterWhisperLoader
    from whispercache.keys import canonical_device

    from .models import as_json, show, survey

    probe = SystemProbe()
    asked = None if options.compute_type == "default" else options.compute_type
    device = canonical_device(options.device)
    found = survey(device, asked, FasterWhisperLoader(probe), probe)
    if options.json:
        sys.stdout.write(f"{as_json(found)}\n")
    else:
        _print(lambda console: show(found, console))
    return 0


def _top(options: argparse.Namespace) -> int:
    from whispercache.units import parse_duration
    from whispercache.watch.top import remote, view, watch

    # A file that was named wins.
    key = os.environ.get(KEY_VARIABLE)
    if options.key_file is not None:
        from whispercache.server.command import read_keys

        key = next(iter(read_keys(options.key_file)))
    source = remote(options.url, key)
    # "1s", as all times here.
    interval_s = parse_duration(options.interval, "--interval")
    if not 0 < interval_s < math.inf:
        raise ValueError("--interval must be a time above 0, such as 500ms")
    if options.once:
        seen = source()
        _print(lambda console: console.print(view(seen)))
    else:
        watch(source, interval_s=interval_s)
    return 0


def _doctor(_options: argparse.Namespace) -> int:
    from whispercache.devices.probe import SystemProbe
    from whispercache.engine.loader import FasterWhisperLoader

    from .doctor import examine, show

    probe = SystemProbe()
    findings = list(examine(FasterWhisperLoader(probe), probe))
    _print(lambda console: show(findings, console))
    return int(any(finding.mark == "wrong" for finding in findings))


def _print(show: Callable[[Console], None]) -> None:
    """
    Writes what *show* prints. rich itself would end the process at a broken pipe.
    """
    from rich.console import Console

    console = Console(highlight=False, emoji=False)
    with console.capture() as captured:
        show(console)
    # rich fills lines up with spaces.
    lines = (line.rstrip() for line in captured.get().splitlines())
    sys.stdout.writelines(f"{line}\n" for line in lines)
