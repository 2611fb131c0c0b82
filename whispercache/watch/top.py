"""
The live view in a terminal, of a cache in this process or of a server.
"""

from __future__ import annotations

import math
import time
import unicodedata
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from whispercache.console import clock
from whispercache.errors import WhisperCacheError, format_bytes
from whispercache.planning.priority import INTERACTIVE, LEVELS
from whispercache.units import parse_seconds

from .live import Snapshot, UnderWay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import (
        Console,
        ConsoleOptions,
        OverflowMethod,
        RenderableType,
        RenderResult,
    )
    from rich.text import Text

    from whispercache.events import DeviceInfo, ModelInfo
    from whispercache.units import DurationValue

_T = TypeVar("_T")

# Most seconds for a server to answer.
TIMEOUT_S = 5.0
# An address may be anything's; ours are kilobytes.
_LARGEST_ANSWER_BYTES = 16 * 1024**2
_UNAUTHORIZED, _NOT_FOUND = 401, 404
# Unicode's categories of what moves the cursor, ends lines or is not seen.
_STEERS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})

_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")
_KIND_STYLES = {"loaded": "green", "failed": "bold red", "warning": "bold yellow"}

# Where columns are few, the table goes without those that the bars show, too.
_NARROW = 72
_LEAST_NAME = 8
_FEW = 5
_SOME = 10
_PRIORITIES = {level: name for name, level in LEVELS.items()}


def view(
    snapshot: Snapshot, *, trouble: str = "", height: int | None = None
) -> RenderableType:
    """
    Returns a snapshot for rich to print, as wide as the console. *trouble* is the
    reason why there is no newer one. Old events are left out beyond *height* lines.
    """
    return _View(snapshot, trouble, height)


def watch(
    source: Callable[[], Snapshot],
    *,
    interval_s: DurationValue = 1.0,
    console: Console | None = None,
) -> None:
    """
    Shows the snapshots of *source* until Ctrl-C; blocks. In a terminal, its errors are
    shown until it answers again. Without a terminal, shows one snapshot, or raises.

    *source* is `Watch.snapshot`, or what `remote` returns. Between two snapshots are
    *interval_s* seconds.

    Raises:
        TypeError, ValueError: *interval_s* is no time above 0.
    """
    from rich.console import Console

    between_s = parse_seconds(interval_s, "interval_s")
    if not 0 < between_s < math.inf:
        raise ValueError(f"interval_s must be a time above 0, not {interval_s!r}")

    console = console or Console()
    # For scripts and files.
    if not console.is_terminal:
        console.print(view(source()))
        return
    try:
        _follow(source, between_s, console)
    except KeyboardInterrupt:
        return


def remote(url: str, key: str | None = None) -> Callable[[], Snapshot]:
    """
    Returns a source of snapshots of the server at *url*, for `watch`. Raises ValueError
    if *url* is none of ``http://`` or ``https://``, or *key* is none.

    The source blocks for up to `TIMEOUT_S`, twice, and raises, each in one line,
    ConnectionError where nothing answers, PermissionError where the *key* does not fit,
    and ValueError where something else than whispercache answers.
    """
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    # urllib would open files as well.
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address such as http://127.0.0.1:8000")
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ValueError("the key must be of ASCII letters, digits and marks")
    base = url.rstrip("/")

    def ask() -> Snapshot:
        snapshot = _read(Snapshot.from_json, f"{base}/api/ps", key)
        try:
            requests = _read(UnderWay.all_from_json, f"{base}/api/requests", key)
        except _MissingError:
            # Of an older version.
            return snapshot
        return replace(snapshot, requests=requests)

    return ask


class _MissingError(ValueError):
    pass


def _ask(address: str, key: str | None) -> bytes:
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import HTTPRedirectHandler, Request, build_opener

    # Follows no redirection, since the key would go along.
    class Stay(HTTPRedirectHandler):
        def redirect_request(self, *_request: object) -> None:
            return None

    request = Request(address)  # noqa: S310 - remote() checked the scheme
    if key is not None:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        with build_opener(Stay).open(request, timeout=TIMEOUT_S) as answer:
            body: bytes = answer.read(_LARGEST_ANSWER_BYTES)
            return body
    except HTTPError as error:
        error.close()
        if error.code == _UNAUTHORIZED:
            hint = "it asks for a key" if key is None else "the key does not fit"
            raise PermissionError(f"{address}: {hint}") from None
        message = f"{address}: no whispercache server: it answers {error.code}"
        kind = _MissingError if error.code == _NOT_FOUND else ValueError
        raise kind(f"{message} {_printable(error.reason)}") from None
    except HTTPException as error:
        raise ValueError(f"{address}: no HTTP server: {error!r}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        text = getattr(reason, "strerror", None) or str(reason) or type(error).__name__
        raise ConnectionError(f"{address}: no answer: {_printable(text)}") from None


def _read(read: Callable[[Any], _T], address: str, key: str | None) -> _T:
    import json

    body = _ask(address, key)
    try:
        return read(json.loads(body))
    except (ValueError, RecursionError):
        raise ValueError(
            f"{address}: no whispercache server, or one of another version"
        ) from None


class _View:
    def __init__(self, snapshot: Snapshot, trouble: str, height: int | None) -> None:
        self._snapshot = snapshot
        self._trouble = trouble
        self._height = height
        # Stable from one snapshot to the next; a cache lists them by their last use.
        self._models = sorted(
            snapshot.models, key=lambda info: (_rank(info.device), info.key.model)
        )

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        from rich.console import Group

        marks = _Marks(options.encoding)
        fixed = Group(
            *self._head(marks, options.max_width),
            *self._devices(marks, options.max_width),
            *self._table(marks, options.max_width),
            *self._queue(marks),
            *self._requests(marks),
        )
        # Events get the lines that the rest leaves.
        n_lines = len(console.render_lines(fixed, options, pad=False))
        room = _SOME if self._height is None else self._height - n_lines - 2
        yield fixed
        yield from self._events(marks, room)

    def _head(self, marks: _Marks, width: int) -> Iterator[Text]:
        stats = self._snapshot.stats
        at = _time_of_day(self._snapshot.at_s)
        figures = marks.dot.join(
            (
                f"requests {stats.requests}",
                f"hits {stats.hit_ratio:.0%}",
                f"loads {stats.loads}",
                f"evictions {stats.evictions}",
                f"in use {stats.leases}",
            )
        )
        title = (("whispercache", "bold"), f"  {at}")
        if width >= _NARROW:
            yield marks.line(*title, f"  {figures}")
        else:
            yield marks.line(*title)
            yield marks.line(figures)
        if self._trouble:
            yield marks.line((self._trouble, "bold red"))
            yield marks.line((f"What you see is of {at}. Asking again.", "red"))

    def _devices(self, marks: _Marks, width: int) -> Iterator[Text]:
        for device in sorted(self._snapshot.devices, key=lambda one: _rank(one.device)):
            free_bytes = max(0, device.capacity_bytes - device.charged_bytes)
            limit = device.limit_bytes
            figures = (
                f"{format_bytes(free_bytes)} free",
                "no limit set" if limit is None else f"limit {format_bytes(limit)}",
                f"peak {format_bytes(device.peak_bytes)}",
            )
            used, all_ = device.charged_bytes, device.capacity_bytes
            yield marks.line()
            yield marks.line(
                (f"{device.device}  ", "bold"),
                f"{format_bytes(used)} of {format_bytes(all_)}",
                (marks.dot + marks.dot.join(figures), "dim"),
            )
            yield self._bar(device, marks, width)
        if not self._snapshot.devices:
            yield marks.line()
            yield marks.line("Nothing is in memory yet.")

    def _bar(self, device: DeviceInfo, marks: _Marks, width: int) -> Text:
        """
        Returns a device's memory as a bar, with each model's number in the table.
        """
        # Other programs may leave less than the models have.
        scale_bytes = max(device.capacity_bytes, device.charged_bytes, 1)
        bar, end_bytes = marks.line(), 0
        for number, model in enumerate(self._models, 1):
            if model.device != device.device:
                continue
            end_bytes += model.bytes
            # By the end, not by the size, so that rounding errors do not add up.
            n_cells = round(width * min(1.0, end_bytes / scale_bytes)) - len(bar)
            # A narrow part of the bar has no room for a number.
            label = str(number)[: max(0, n_cells)]
            bar.append(label, f"bold reverse {_colour(number)}")
            bar.append(marks.fill(model) * (n_cells - len(label)), _colour(number))
        bar.append(marks.free * (width - len(bar)), "dim")
        return bar

    def _table(self, marks: _Marks, width: int) -> Iterator[RenderableType]:
        """
        Yields a row for each model, by the numbers in the bars.
        """
        from rich.table import Table

        if not self._models:
            return
        table = Table(
            box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim"
        )
        # The name alone has no fixed width, so that it gives way to the others.
        table.add_column("#", no_wrap=True)
        table.add_column("model", min_width=_LEAST_NAME)
        # The bars show the device, too, and the state whether there are leases.
        others = ["device", "memory", "leases", "state", "leaves"]
        shown = others if width >= _NARROW else ["memory", "state", "leaves"]
        for heading in shown:
            table.add_column(heading, no_wrap=True, overflow=marks.overflow)
        for number, model in enumerate(self._models, 1):
            cells = {
                "device": marks.line(model.device),
                "memory": marks.line(format_bytes(model.bytes)),
                "leases": marks.line(str(model.leases)),
                "state": marks.line((_state(model), "bold" if model.leases else "")),
                "leaves": marks.line(_leaves(model)),
            }
            table.add_row(
                marks.line((str(number), f"bold {_colour(number)}")),
                marks.line((model.key.model, "bold")),
                *(cells[heading] for heading in shown),
            )
        yield marks.line()
        yield table
        yield marks.line((marks.legend, "dim"))

    def _queue(self, marks: _Marks) -> Iterator[Text]:
        waiting = self._snapshot.waiting
        if not waiting:
            return
        yield marks.line()
        yield marks.line(("Queue", "bold"), f"  {len(waiting)}")
        for place, request in enumerate(waiting[:_FEW], 1):
            models = " + ".join(key.model for key in request.keys)
            shown = f"{place:3}  {_clock(request.waited_s):>7}  {models}"
            if request.priority != INTERACTIVE:
                name = _PRIORITIES.get(request.priority, f"{request.priority:g}")
                shown += f"  {name}"
            yield marks.line(shown)
        if len(waiting) > _FEW:
            yield marks.line((f"     and {len(waiting) - _FEW} more", "dim"))

    def _requests(self, marks: _Marks) -> Iterator[Text]:
        requests = self._snapshot.requests
        if not requests:
            return
        yield marks.line()
        yield marks.line(("Requests", "bold"), f"  {len(requests)}")
        for request in requests[:_FEW]:
            who = f"  {request.who}" if request.who else ""
            yield marks.line(
                f"{request.phase:11.11} {_clock(request.spent_s):>7}  ",
                f"{request.model or ''}{who}",
            )
        if len(requests) > _FEW:
            yield marks.line((f"     and {len(requests) - _FEW} more", "dim"))

    def _events(self, marks: _Marks, room: int) -> Iterator[Text]:
        if room <= 0 or not self._snapshot.events:
            return
        yield marks.line()
        yield marks.line(("Last events", "bold"))
        for event in self._snapshot.events[: -room - 1 : -1]:
            yield marks.line(
                (f"{_time_of_day(event.at_s)}  ", "dim"),
                (f"{event.kind:8.8}", _KIND_STYLES.get(event.kind, "dim")),
                (f"  {event.model}", "bold"),
                f" {event.text}",
            )


class _Marks:
    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        is_utf = encoding.startswith("utf")
        self._busy, self._idle, self._moving = ("█", "▒", "░") if is_utf else "#=~"
        self.free = "·" if is_utf else "."
        self.dot = " · " if is_utf else ", "
        # rich marks text that was cut off with a sign that ASCII lacks.
        self.overflow: OverflowMethod = "ellipsis" if is_utf else "crop"
        self.legend = (
            f"{self._busy} in use  {self._idle} idle  "
            f"{self._moving} on its way in or out"
        )

    def fill(self, model: ModelInfo) -> str:
        if model.state != "resident":
            return self._moving
        return self._busy if model.leases else self._idle

    def text(self, text: str) -> str:
        return _printable(text).encode(self._encoding, "replace").decode(self._encoding)

    def line(self, *parts: str | tuple[str, str]) -> Text:
        """
        Returns one line of text, cut off at the end of the terminal, without any
        markup.
        """
        from rich.text import Text

        made = Text(no_wrap=True, overflow=self.overflow)
        for part in parts:
            text, style = (part, "") if isinstance(part, str) else part
            made.append(self.text(text), style)
        return made


def _rank(device: str) -> tuple[bool, int, str]:
    """
    Returns a sort key: cards first, by number, and the host last.
    """
    return device == "cpu", len(device), device


def _colour(number: int) -> str:
    return _COLOURS[(number - 1) % len(_COLOURS)]


def _state(model: ModelInfo) -> str:
    if model.state != "resident":
        return "loading" if model.state == "loading" else "leaving"
    if model.leases:
        return "in use"
    return "idle" if model.idle_s is None else f"idle {_clock(model.idle_s)}"


def _leaves(model: ModelInfo) -> str:
    if model.state != "resident":
        return ""
    if model.pinned:
        return "pinned"
    if model.expires_in_s is not None:
        return f"in {_clock(model.expires_in_s)}"
    return "after use" if model.leases else "never"


def _follow(
    source: Callable[[], Snapshot], interval_s: float, console: Console
) -> None:
    from rich.live import Live
    from rich.text import Text

    last: Snapshot | None = None
    # A screen of its own: the terminal is as before at the end.
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            trouble = ""
            try:
                last = source()
            except (OSError, ValueError, WhisperCacheError) as error:
                trouble = _printable(str(error)) or type(error).__name__
            if last is None:
                shown: RenderableType = Text(trouble, style="bold red")
            else:
                shown = view(last, trouble=trouble, height=console.height)
            live.update(shown, refresh=True)
            time.sleep(interval_s)


def _printable(text: str) -> str:
    """
    Returns *text* without characters that steer a terminal, or reverse its text.
    """
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(letter) in _STEERS
        else letter
        for letter in text
    )


def _time_of_day(at_s: float) -> str:
    try:
        return time.strftime("%H:%M:%S", time.localtime(at_s))
    except (OverflowError, ValueError, OSError):  # another server's idea of time
        return "--:--:--"


def _clock(seconds: float) -> str:
    """
    Returns *seconds* as a clock shows them; from two days on, as days.
    """
    days = int(seconds) // 86_400
    return f"{days} days" if days > 1 else clock(int(seconds))
