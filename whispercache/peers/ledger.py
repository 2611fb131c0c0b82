"""
What processes that share one device's memory tell each other, through files.

Each process replaces a small file of its own, so nobody needs a lock to tell, and a
kernel's lock decides whose turn it is to load. Nobody has to tidy up: the lock vanishes
with its holder, and whoever reads removes what the dead left behind.

The name of a file says who wrote it: process id, start time, place, and a number. The
place is one boot of one machine and a namespace of process ids. In one's own place the
kernel knows who lives. Elsewhere, as in another container that shares the directory,
process ids mean nothing: there a file counts for `FRESH_S` after it was written, and
`Ledger.publish` writes again every `HEARTBEAT_S` if it is called that often.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import stat
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "FRESH_S",
    "HEARTBEAT_S",
    "Account",
    "Ledger",
    "Owner",
    "bytes_to_free",
    "default_directory",
]

_log = logging.getLogger("whispercache")

HEARTBEAT_S: Final = 10.0
"""
Seconds after which an account is written again although nothing in it changed.
"""

FRESH_S: Final = 30.0
"""
Seconds for which the account of a process that cannot be looked up counts as alive.

Source: a choice. Two heartbeats may be late; whoever is gone blocks no longer.
"""

_POLL_S = 0.02
# Start times are exact on Linux; elsewhere a corrected clock may move them a little.
_SAME_START_S = 1.0
_NAME = re.compile(r"([0-9]{1,9})-([0-9]{1,12}\.[0-9]{2})-([0-9a-f.]+)-([0-9]{1,9})")
_numbers = itertools.count()
_inherited: list[object] = []


@dataclass(frozen=True, slots=True, order=True)
class Owner:
    """
    Whose account it is.

    Attributes:
        pid: Its process.
        started_s: When that began: on Linux in seconds since the machine did.
        place: Where the process id means something.
        number: Which of the process's ledgers: two caches in one process are peers.
    """

    pid: int
    started_s: float
    place: str
    number: int

    @property
    def file_name(self) -> str:
        """
        The name of its file, without the ending.
        """
        return f"{self.pid}-{self.started_s:.2f}-{self.place}-{self.number}"


@dataclass(frozen=True, slots=True)
class Account:
    """
    What one process tells the others of a device.

    Attributes:
        owner: The process.
        promised_bytes: Charged, but not on the device's gauge yet: a load in flight,
            the work of leases that have not begun.
        held_bytes: Weights of models in memory that are not pinned, which the gauge
            counts too.
        idle_bytes: Those of ``held_bytes`` that could leave at once. Lower it when they
            have left, not before: until then nobody else should make the same room.
        wanted_bytes: What it waits for, less what its own idle models would give. What
            happens to be free on the device is not taken off.

    Raises:
        ValueError: A number is negative, or more is idle than held.
    """

    owner: Owner
    promised_bytes: int = 0
    held_bytes: int = 0
    idle_bytes: int = 0
    wanted_bytes: int = 0

    def __post_init__(self) -> None:
        if min(self.promised_bytes, self.idle_bytes, self.wanted_bytes) < 0:
            raise ValueError(f"no account has less than nothing: {self}")
        if self.idle_bytes > self.held_bytes:
            raise ValueError(f"more cannot be idle than is held: {self}")


_FIELDS = ("promised_bytes", "held_bytes", "idle_bytes", "wanted_bytes")


class Ledger:
    """
    One process's account of a device, and its sight of the others'. Thread-safe.

    All processes must be one user's, and name the same directory and device. After a
    fork, the parent keeps its account, and the child's first `publish` opens one of its
    own. An account vanishes with `close`, with the ledger, and with the process.

    Args:
        directory: On this machine, not on a network's drive; made if missing.
        device_id: What all processes call the device, whatever order they count in: a
            GPU's UUID, or ``"cpu"``.
        clock: Seconds, for the heartbeat.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        device_id: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = Path(directory) / _safe(device_id)
        self._clock = clock
        self._number = next(_numbers)
        # By process, and set without a lock of ours: a fork may find any lock held.
        self._pages: dict[int, _Pages] = {}

    def publish(
        self,
        *,
        promised_bytes: int = 0,
        held_bytes: int = 0,
        idle_bytes: int = 0,
        wanted_bytes: int = 0,
    ) -> Account:
        """
        Replace this process's account, whole; the meaning of the numbers: `Account`.

        Nothing is written if nothing changed within `HEARTBEAT_S`. Call it at least
        that often, with what the account is now.

        Raises:
            OSError: It cannot be written; the others go on seeing the one before.
            ValueError: The numbers cannot be true.
        """
        pages = self._own()
        account = Account(
            pages.owner, promised_bytes, held_bytes, idle_bytes, wanted_bytes
        )
        with pages.lock:
            now_s = self._clock()
            if account != pages.last or now_s - pages.written_s >= HEARTBEAT_S:
                self._write(account)
                pages.last, pages.written_s = account, now_s
        return account

    def others(self) -> tuple[Account, ...]:
        """
        The accounts of all who live, except this one, in the order of their owners.

        What the dead left is removed. A file that is no account is ignored.

        Raises:
            OSError: The directory is there, but cannot be read.
        """
        own = self._own().owner
        accounts: list[Account] = []
        # So short a listing is one system call, during which nobody can rename: a file
        # that is being replaced is not missed.
        for path in self._files():
            owner = _owner(path)
            if owner is None or owner == own:
                continue
            if not _is_alive(owner, path, own.place):
                _remove(path)
            elif path.suffix == ".json" and (account := _read(path, owner)):
                accounts.append(account)
        return tuple(sorted(accounts, key=lambda each: each.owner))

    @contextlib.contextmanager
    def turn(self, timeout_s: float) -> Iterator[bool]:
        """
        A block that one process at a time is in; False in it says that time ran out.

        The kernel ends the turn of a process that dies, but not of one that is stuck:
        whoever gets False must go on without. Not reentrant.

        Args:
            timeout_s: How long to wait; 0 tries once. There is no waiting for ever.

        Raises:
            OSError: The lock file cannot be made.
            ValueError: *timeout_s* is negative or not finite.

        Blocks: waits for other processes, looking every 20 ms.
        """
        if not 0 <= timeout_s < math.inf:
            raise ValueError(f"timeout_s is {timeout_s}; give seconds, 0 or more")
        from filelock import FileLock, Timeout

        self._make_directory()
        # Threads of one process exclude each other too: each has a lock of its own.
        lock = FileLock(
            self._directory / "load.lock", timeout=timeout_s, thread_local=False
        )
        pid = os.getpid()
        try:
            lock.acquire(poll_interval=_POLL_S)
        except Timeout:
            has_turn = False
        except NotImplementedError as error:
            raise OSError(f"{self._directory} knows no locks") from error
        else:
            has_turn = True
        try:
            yield has_turn
        finally:
            if os.getpid() != pid:
                # A child forked in the block shares the kernel's lock, and must not end
                # its parent's turn, as old versions of filelock do on collection.
                _inherited.append(lock)
            elif has_turn:
                lock.release()

    def close(self) -> None:
        """
        Remove this process's account. A later `publish` opens one again.
        """
        pages = self._pages.get(os.getpid())
        if pages is not None:
            with pages.lock:
                pages.last = None
                _remove_own(self._directory, pages.owner)

    def _own(self) -> _Pages:
        pid = os.getpid()
        pages = self._pages.get(pid)
        if pages is None:
            # Of threads that come here at once, all get what the first one set.
            pages = self._pages.setdefault(pid, _Pages(_own_identity(self._number)))
            weakref.finalize(self, _remove_own, self._directory, pages.owner)
        return pages

    def _files(self) -> list[Path]:
        try:
            return list(self._directory.iterdir())
        except FileNotFoundError:
            return []

    def _write(self, account: Account) -> None:
        name = account.owner.file_name
        fresh = self._directory / f"{name}.tmp"
        text = json.dumps({field: getattr(account, field) for field in _FIELDS})
        self._make_directory()
        try:
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(self._directory / f"{name}.json")
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise

    def _make_directory(self) -> None:
        # Each time: the system may clear a temporary directory, or that of a session.
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)


class _Pages:
    """
    What a ledger remembers of the account that it wrote.
    """

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.lock = threading.Lock()
        self.last: Account | None = None  # guarded by lock
        self.written_s = 0.0  # guarded by lock


def bytes_to_free(own: Account, others: Sequence[Account], free_bytes: int) -> int:
    """
    How many of *own*'s idle bytes should leave for what others wait for. Pure.

    All who see the same accounts divide the work alike: whoever has most idle goes
    first, ties in the order of owners, and nobody makes room for himself. What is free
    and promised to nobody is given out before anything has to leave.

    Args:
        own: The account of whoever asks.
        others: All other accounts of the device.
        free_bytes: What the device's gauge says is free, less headroom, now.
    """
    accounts = sorted([own, *others], key=lambda each: (-each.idle_bytes, each.owner))
    spare_bytes = max(0, free_bytes - sum(each.promised_bytes for each in accounts))
    idle_bytes = {each.owner: each.idle_bytes for each in accounts}
    for wanter in sorted(accounts, key=lambda each: each.owner):
        missing_bytes = wanter.wanted_bytes
        given_bytes = min(spare_bytes, missing_bytes)
        spare_bytes -= given_bytes
        missing_bytes -= given_bytes
        for giver in accounts:
            if giver.owner != wanter.owner:
                given_bytes = min(idle_bytes[giver.owner], missing_bytes)
                idle_bytes[giver.owner] -= given_bytes
                missing_bytes -= given_bytes
    return own.idle_bytes - idle_bytes[own.owner]


def default_directory() -> Path:
    """
    Where one user's processes on this machine find each other; private to the user.

    It is in ``$XDG_RUNTIME_DIR`` if that is set and the user's own, else in the
    directory for temporary files. Processes that see different environments, as a
    service and a shell do, must be given the same directory.

    Raises:
        OSError: Neither can be used.
    """
    # Not what platformdirs takes without the variable: /run/user/<uid> comes and goes
    # with the user's logins, and a service's workers would part company.
    session = os.environ.get("XDG_RUNTIME_DIR")
    if session and Path(session).is_absolute():
        try:
            _check_own(Path(session))
            return _private(Path(session) / "whispercache")
        except OSError as error:
            _log.debug("XDG_RUNTIME_DIR is not used: %s", error)
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    return _private(Path(tempfile.gettempdir()) / f"whispercache{user}")


def _private(path: Path) -> Path:
    """
    *path*, made if missing, if only this user can look or write there.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = _check_own(path)
    if os.name == "posix" and status.st_mode & 0o077:
        raise PermissionError(f"{path} is open to others; run: chmod 700 {path}")
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written")
    return path


def _check_own(path: Path) -> os.stat_result:
    # Not following a link: in a public directory, anybody could have made it.
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(f"{path} is not a directory")
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to another user")
    return status


def _safe(device_id: str) -> str:
    """
    A file name for *device_id*, different for each.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", device_id)[:64]
    if name == device_id and not name.startswith(".") and name:
        return name
    return f"_{name}-{hashlib.sha256(device_id.encode()).hexdigest()[:12]}"


def _own_identity(number: int) -> Owner:
    started_s = _started_s(os.getpid())
    if started_s is None:
        raise OSError("the system does not tell when this process started")
    return Owner(os.getpid(), started_s, _place(os.getpid()), number)


@functools.lru_cache(maxsize=1)
def _place(pid: int) -> str:
    """
    One boot of one machine and one namespace of process ids, of the process *pid*.
    """
    del pid  # only so that a forked child asks again
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return "0"
    return f"{boot.replace('-', '').strip()[:12]}.{namespace:x}"


def _is_alive(owner: Owner, path: Path, place: str) -> bool:
    if owner.place == place:
        # Where a system hides processes, their files have to tell.
        with contextlib.suppress(PermissionError):
            started_s = _started_s(owner.pid)
            if started_s is None:
                return False
            return abs(started_s - owner.started_s) < _SAME_START_S
    return _is_fresh(path)


def _is_fresh(path: Path) -> bool:
    try:
        # From the future, too: clocks are set back.
        return abs(time.time() - path.stat().st_mtime) < FRESH_S
    except OSError:
        return False


def _started_in_proc(pid: int) -> float | None:
    """
    Seconds from the machine's start to that of *pid*; None if it does not live.

    Not psutil's create_time, which adds the time of boot: that moves when the clock is
    set, and two processes that looked before and after would think each other dead.

    Source: proc_pid_stat(5), fields 3 and 22.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is a name in brackets, and may have spaces and brackets in it.
    fields = text.rpartition(b")")[2].split()
    if fields[0] in b"ZX":
        # A zombie's memory is gone, though its parent has not asked how it ended.
        return None
    return round(int(fields[19]) / os.sysconf("SC_CLK_TCK"), 2)


def _started_by_psutil(pid: int) -> float | None:
    """
    Seconds from 1970 to the start of *pid*; None if it does not live.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return round(process.create_time(), 2)
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied as error:
        raise PermissionError(str(error)) from error


_started_s = _started_in_proc if sys.platform == "linux" else _started_by_psutil


def _owner(path: Path) -> Owner | None:
    match = _NAME.fullmatch(path.stem)
    if match is None or path.suffix not in {".json", ".tmp"}:
        return None
    return Owner(int(match[1]), float(match[2]), match[3], int(match[4]))


def _read(path: Path, owner: Owner) -> Account | None:
    """
    The account in the file; None if there is none.
    """
    try:
        found = json.loads(path.read_bytes())
        values = [found[field] for field in _FIELDS]
        if any(type(value) is not int for value in values):
            return None
        return Account(owner, *values)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.debug("%s stays, though nobody lives who wrote it: %s", path, error)


def _remove_own(directory: Path, owner: Owner) -> None:
    # A forked child inherits the finalizer, and must leave its parent's account alone.
    if os.getpid() == owner.pid:
        _remove(directory / f"{owner.file_name}.json")
