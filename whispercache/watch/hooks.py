"""
Hooks: a command to run, or an address to call, when something happens in a cache.

The cache only notes an event, in a queue with an end; one thread runs the hooks, one
after the other. Whatever they do, or fail to do, costs a line in the log and no more.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from http.client import HTTPException
from typing import TYPE_CHECKING, Final
from urllib.request import Request, urlopen

from whispercache import events
from whispercache.engine.naming import short_name
from whispercache.events import Event

from .log import at_end

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

    from whispercache.keys import ModelKey

    from .live import Watchable

_log = logging.getLogger("whispercache")

MOST_WAITING: Final = 100
"""
Events that wait for their hooks; more are passed over, which is logged.
"""

TIMEOUT_S: Final = 30.0
"""
Seconds that a hook may take. Source: a choice; it is a word to somebody, and no work.
"""

END_S: Final = 5.0
"""
Seconds at the end for the hooks of what has happened.
"""

EVENTS: Final[dict[str, type[Event]]] = {
    name: kind
    for name, kind in vars(events).items()
    if isinstance(kind, type) and issubclass(kind, Event)
}
"""
The events that a hook can name; `Event` is any of them.
"""

_SCHEMES = ("http://", "https://")


@dataclass(frozen=True, slots=True)
class Hook:
    """
    A hook: the events that it is for, and its command or its address.
    """

    kind: type[Event]
    target: str

    @property
    def is_url(self) -> bool:
        """
        True if it is called, and not run.
        """
        return self.target.lower().startswith(_SCHEMES)


def parse_hook(text: str) -> Hook:
    """
    Returns the hook that *text* says: an event's name, and the rest is the target.

    Raises:
        ValueError: There is no such event, or no target.
    """
    name, _, target = text.strip().partition(" ")
    found = {_plain(each): kind for each, kind in EVENTS.items()}.get(_plain(name))
    if found is None:
        raise ValueError(f"there is no event {name}; {_nearest(name)}")
    hook = Hook(found, target.strip())
    if not hook.target:
        raise ValueError(f"say what to run, or which address to call, on {name}")
    if not hook.is_url and not _command(hook.target):
        raise ValueError(f"{hook.target!r} is no command")
    return hook


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()


def _nearest(name: str) -> str:
    from difflib import get_close_matches

    plain = {_plain(each): each for each in EVENTS}
    near = get_close_matches(_plain(name), plain, n=1)
    return f"did you mean {plain[near[0]]}?" if near else f"there are {_names()}"


def _names() -> str:
    return ", ".join(EVENTS)


def _command(target: str) -> str | list[str]:
    # Windows' own rules for quotes are those of its programs.
    return target if os.name == "nt" else shlex.split(target)


def as_json(
    event: Event, at_s: float, name_of: Callable[[ModelKey], str] | None = None
) -> bytes:
    """
    Returns an event as a hook gets it: its name, its time in seconds since 1970 (UTC),
    the model, its device and compute type, and the event's own fields.
    """
    fields = {
        # The key is told in words: its model may be a path.
        name: value.value if isinstance(value, Enum) else value
        for name, value in asdict(event).items()
        if name != "key"
    }
    document = {
        "event": type(event).__name__,
        "at_s": at_s,
        "model": (name_of or _name)(event.key),
        "device": event.key.device,
        "compute_type": event.key.compute_type,
        **fields,
    }
    return json.dumps(document).encode()


def _name(key: ModelKey) -> str:
    # The compute type is told beside it.
    return short_name(key.model)


class Hooks:
    """
    The hooks of a command, for as long as its ``with`` block lasts.

    A command gets the event as JSON on its standard input, and whatever it says goes to
    stderr; an address gets the same by POST. Each has `TIMEOUT_S`; then a command is
    killed, with all that it has started. At the end, hooks of what has happened, and
    the one at work, have `END_S` more.

    Args:
        hooks: As `parse_hook` reads them.
        subscribe: A cache's, which tells what happens.
        name_of: Gives a model's display name; by default its own, without its folder.
    """

    def __init__(
        self,
        hooks: Sequence[str],
        subscribe: Callable[[Callable[[Event], None]], Callable[[], None]],
        name_of: Callable[[ModelKey], str] | None = None,
    ) -> None:
        self._hooks = [parse_hook(each) for each in hooks]
        self._name_of = name_of
        self._is_full = False
        self._ends_at_s: float | None = None
        self._begin()
        self._unsubscribe = subscribe(self._note)

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._queue: queue.Queue[tuple[Event, float] | None] = queue.Queue(MOST_WAITING)
        # The command that runs.
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(
            target=self._run, name="whispercache-hooks", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """
        Ends the hooks. Blocks for `END_S` at most, and a moment.
        """
        self._unsubscribe()
        self._ends_at_s = time.monotonic() + END_S
        try:
            self._queue.put(None, timeout=END_S)
            self._thread.join(max(0.0, self._ends_at_s - time.monotonic()))
        except queue.Full:
            _log.warning("hooks: %d events were not told", self._queue.qsize())
        finally:
            # One that has begun before would have more time, but nobody to end it.
            if (process := self._process) is not None:
                _end(process)
                self._thread.join(1.0)

    def _note(self, event: Event) -> None:
        """
        Notes an event. The cache waits for this, so it never blocks.
        """
        if not any(isinstance(event, hook.kind) for hook in self._hooks):
            return
        # A forked child has neither its parent's thread nor what that has still to do.
        if self._pid != os.getpid():
            self._begin()
        try:
            self._queue.put_nowait((event, time.time()))
        except queue.Full:
            # Once for each time that they fall behind.
            if not self._is_full:
                self._is_full = True
                _log.warning("hooks are too slow: events are passed over")
        else:
            self._is_full = False

    def _run(self) -> None:
        while (noted := self._queue.get()) is not None:
            event, at_s = noted
            body = as_json(event, at_s, self._name_of)
            for hook in self._hooks:
                if isinstance(event, hook.kind):
                    self._carry_out(hook, body)

    def _carry_out(self, hook: Hook, body: bytes) -> None:
        timeout_s = TIMEOUT_S
        if self._ends_at_s is not None:
            timeout_s = self._ends_at_s - time.monotonic()
            if timeout_s <= 0:
                _log.warning("hook %s: there was no time left for it", hook.target)
                return
        try:
            if hook.is_url:
                _call(hook.target, body, timeout_s)
            else:
                self._execute(hook.target, body, timeout_s)
        except (
            # Of an address that does not speak HTTP, which is no OSError.
            HTTPException,
            OSError,
            ValueError,
            subprocess.SubprocessError,
        ) as error:
            _log.warning("hook %s failed: %s", hook.target, error)

    def _execute(self, target: str, body: bytes, timeout_s: float) -> None:
        with _start(target) as process:
            self._process = process
            try:
                # A line, so that what a file gets from `tee -a` can be read again.
                process.communicate(body + b"\n", timeout_s)
            except subprocess.TimeoutExpired:
                _end(process)
                raise TimeoutError(f"it was killed after {timeout_s:.3g} s") from None
            finally:
                self._process = None
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, target)


class HooksOfProcess:
    """
    The hooks of a program that `whispercache run` runs: on the cache that its models
    come from, until the process ends.

    Args:
        hooks: Returns them, as `parse_hook` reads them; called with the first cache.
    """

    def __init__(self, hooks: Callable[[], Sequence[str]]) -> None:
        self._hooks = hooks
        self._cache: Watchable | None = None
        self._running: Hooks | None = None

    def follow(self, cache: Watchable) -> None:
        """
        Has hooks run for what happens in *cache* from now on.
        """
        if self._cache is cache:
            return
        if self._running is not None:
            # The one before was closed.
            self._running.close()
        self._cache = cache
        if hooks := self._hooks():
            self._running = Hooks(hooks, cache.subscribe)
            at_end(self._running.close)


def _call(url: str, body: bytes, timeout_s: float) -> None:
    headers = {"Content-Type": "application/json"}
    request = Request(url, body, headers, method="POST")  # noqa: S310 - by `is_url`
    # Another status than success is raised.
    with urlopen(request, timeout=timeout_s):  # noqa: S310
        pass


def _start(target: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - whoever starts the command says what it runs
        _command(target),
        stdin=subprocess.PIPE,
        # The command's own stdout carries results.
        stdout=sys.__stderr__,
        # What it starts belongs to its group, and ends with it.
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """
    Kills a process that has not ended yet, and those that it has started.
    """
    # The number of one that has ended may be another's.
    if process.poll() is not None:
        return
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        return
    # Windows has no such groups.
    import psutil

    with suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
        for each in (psutil.Process(process.pid), *family):
            with suppress(psutil.Error):
                each.kill()
