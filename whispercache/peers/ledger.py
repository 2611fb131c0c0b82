"""
A ledger of accounts in files, through which processes share one device's memory.

Each process replaces a small file of its own, which needs no lock. A lock of the kernel
decides which process may load. Nothing has to be cleaned up: the lock ends with its
holder, and readers remove the files of processes that have ended.

The name of a file identifies its writer: process id, start time, place, and a number.
The place is one boot of one machine and a namespace of process ids. Within it the
kernel knows which processes live. Elsewhere, as in another container that shares the
directory, process ids mean nothing. There a file counts for `FRESH_S` after it was
written, and `Ledger.publish` writes again every `HEARTBEAT_S` if it is called as often.
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
import sys
import threading
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .places import permissions, share

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_log = logging.getLogger("whispercache")

# Seconds after which an unchanged account is written again.
HEARTBEAT_S: Final = 10.0

# Seconds for which the account of a process that cannot be looked up counts as alive.
# Source: a choice. Two heartbeats may be missed, and a process that has ended does not
# block the others for longer.
FRESH_S: Final = 30.0

# Number of a process's reservation among its ledgers.
RESERVATION: Final = 999_999_999

_POLL_S = 0.02
# Start times are exact on Linux; elsewhere a corrected clock may move them a little.
_SAME_START_S = 1.0
_NAME = re.compile(r"([0-9]{1,9})-([0-9]{1,12}\.[0-9]{2})-([0-9a-f.]+)-([0-9]{1,9})")
_numbers = itertools.count()
_inherited: list[object] = []


@dataclass(frozen=True, slots=True, order=True)
class Owner:
    """
    The process and the cache that an account belongs to.
    """

    pid: int
    started_s: float  # on Linux since the start of the machine
    place: str  # the boot and the namespace in which the process id is valid
    number: int  # of the ledger in the process: two caches in one process are peers

    @property
    def file_name(self) -> str:
        """
        The name of the account's file, without suffix.
        """
        return f"{self.pid}-{self.started_s:.2f}-{self.place}-{self.number}"


@dataclass(frozen=True, slots=True)
class Account:
    """
    One process's numbers for a device, as the others read them.

    Attributes:
        owner: The process.
        promised_bytes: Charged, but not on the device's gauge yet: loads in flight,
            and workspace of leases that is reserved but not in use.
        held_bytes: Weights of resident models that are not pinned. The gauge counts
            them, too.
        idle_bytes: The part of ``held_bytes`` that could be evicted at once. It shrinks
            when they are unloaded, not before: until then no other process should make
            the same room.
        wanted_bytes: What the process waits for, less what its own idle models would
            give. Free memory of the device is not taken off.

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
    One process's account of a device, and its view of the others'. Thread-safe.

    All processes must name the same directory and device, and be let into it: whoever
    can write there is trusted. After a fork the parent keeps its account, and the
    child's first `publish` opens another. An account ends with `close`, with the
    ledger, or with the process.

    Args:
        directory: On this machine, not on a network's drive; made if missing. Whom its
            permissions let in may use what is made in it.
        device_id: The same in all processes, however they count devices: a GPU's UUID,
            or ``"cpu"``.
        pid: The process whose account it is, for which this one keeps it: a reservation
            of room, which ends with that process.
        clock: Seconds, for the heartbeat.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        device_id: str,
        *,
        pid: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = Path(directory) / _safe(device_id)
        self._clock = clock
        self._pid = pid
        self._number = next(_numbers) if pid is None else RESERVATION
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
        Replaces this process's account as a whole; `Account` explains the numbers.

        Within `HEARTBEAT_S` an unchanged account is not written again. Callers publish
        at least that often.

        Raises:
            OSError: It cannot be written. The others go on seeing the previous one.
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
        Returns the other live processes' accounts, in the order of their owners.

        Files of processes that have ended are removed. Other files are ignored.

        Raises:
            OSError: The directory is there, but cannot be read.
        """
        own = self._own().owner
        # What was reserved for a process is its to take.
        reserved = replace(own, number=RESERVATION)
        accounts: list[Account] = []
        # A listing this short is one system call, during which no file can be renamed.
        # So a file that is being replaced is not missed.
        for path in self._files():
            owner = _owner(path)
            if owner is None or owner in {own, reserved}:
                continue
            if not _is_alive(owner, path, own.place):
                _remove(path)
            elif path.suffix == ".json" and (account := _read(path, owner)):
                accounts.append(account)
        return tuple(sorted(accounts, key=lambda each: each.owner))

    @contextlib.contextmanager
    def turn(self, timeout_s: float, name: str = "load") -> Iterator[bool]:
        """
        Admits one process at a time to a block of that *name*; yields False if the time
        ran out.

        The kernel ends the turn of a process that dies, but not of one that is stuck.
        A caller that gets False must therefore go on without. Not reentrant.

        Raises:
            OSError: The lock file cannot be made.
            ValueError: *timeout_s* is negative or not finite.

        Blocks: for other processes, with a look every 20 ms.
        """
        if not 0 <= timeout_s < math.inf:
            raise ValueError(f"timeout_s is {timeout_s}; give seconds, 0 or more")
        from filelock import FileLock, Timeout

        self._make_directory()
        # Threads of one process exclude each other too: each has a lock of its own.
        lock = FileLock(
            self._directory / f"{name}.lock",
            timeout=timeout_s,
            mode=self._mode(0o666),
            thread_local=False,
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

    def is_owner_alive(self) -> bool:
        """
        Returns True as long as the process lives whose account this is.
        """
        owner = self._own().owner
        with contextlib.suppress(PermissionError):
            return _started_s(owner.pid) == owner.started_s
        return True

    def close(self) -> None:
        """
        Removes this process's account. A later `publish` opens one again.
        """
        pages = self._pages.get(os.getpid())
        if pages is not None:
            with pages.lock:
                pages.last = None
                _remove_own(self._directory, pages.owner, os.getpid())

    def _own(self) -> _Pages:
        pid = os.getpid()
        pages = self._pages.get(pid)
        if pages is None:
            # Of threads that come here at once, all get what the first one set.
            owner = _identity(self._pid or pid, self._number)
            pages = self._pages.setdefault(pid, _Pages(owner))
            weakref.finalize(self, _remove_own, self._directory, owner, pid)
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
            # In a directory of several users, only a file that was not there is ours.
            with fresh.open("x", encoding="utf-8") as file:
                file.write(text)
            fresh.chmod(self._mode(0o644))
            fresh.replace(self._directory / f"{name}.json")
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise

    def _make_directory(self) -> None:
        # Each time, since the system may clear directories of a session or for
        # temporary files.
        try:
            self._directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._directory.mkdir(mode=0o700)
        except FileExistsError:
            return
        share(self._directory)

    def _mode(self, most: int) -> int:
        return most & permissions(self._directory)


class _Pages:
    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.lock = threading.Lock()
        self.last: Account | None = None  # guarded by lock
        self.written_s = 0.0  # guarded by lock


def bytes_to_free(own: Account, others: Sequence[Account], free_bytes: int) -> int:
    """
    Returns how many of *own*'s idle bytes to evict for what others wait for. Pure.

    All processes that see the same accounts divide the work alike: the one with most
    idle bytes gives first, ties in the order of owners, and none makes room for itself.
    Memory that is free and promised to no process is given out before.

    Args:
        own: The account of the process that asks.
        others: All other accounts of the device.
        free_bytes: Free by the device's gauge now, less headroom.
    """
    accounts = sorted([own, *others], key=lambda each: (-each.idle_bytes, each.owner))
    # What is promised is free on the gauge only because the load has not got that far.
    spare_bytes = max(0, free_bytes - sum(each.promised_bytes for each in accounts))
    idle_bytes = {each.owner: each.idle_bytes for each in accounts}
    # Each process works the whole division out, and takes its own share from it.
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


def _safe(device_id: str) -> str:
    """
    Returns a file name for *device_id*, different for each.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", device_id)[:64]
    if name == device_id and not name.startswith(".") and name:
        return name
    return f"_{name}-{hashlib.sha256(device_id.encode()).hexdigest()[:12]}"


def _identity(pid: int, number: int) -> Owner:
    started_s = _started_s(pid)
    if started_s is None:
        raise OSError(f"the system does not tell when process {pid} started")
    return Owner(pid, started_s, _place(os.getpid()), number)


@functools.lru_cache(maxsize=1)
def _place(pid: int) -> str:
    """
    Identifies the boot of the machine and the namespace of the process *pid*.
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
        # A system may hide processes, of others or even one's own; then the file's age
        # decides.
        with contextlib.suppress(PermissionError):
            started_s = _started_s(owner.pid)
            if started_s is None:
                return False
            return abs(started_s - owner.started_s) < _SAME_START_S
    try:
        # In either direction, since clocks are set back, too.
        return abs(time.time() - path.stat().st_mtime) < FRESH_S
    except OSError:
        return False


def _started_in_proc(pid: int) -> float | None:
    # psutil's create_time adds the time of boot, which moves when the clock is set. Two
    # processes that looked before and after that would take each other for ended.
    # Source: proc_pid_stat(5), fields 3 and 22.
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        # Another user's may be hidden (proc(5), hidepid). Signals tell of it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
        return None
    # The second field is a name in brackets, which may contain spaces and brackets.
    fields = text.rpartition(b")")[2].split()
    if fields[0] in b"ZX":
        # A zombie holds no memory; only its parent has not asked how it ended.
        return None
    return round(int(fields[19]) / os.sysconf("SC_CLK_TCK"), 2)


def _started_by_psutil(pid: int) -> float | None:
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
    try:
        found = json.loads(path.read_bytes())
        values = [found[field] for field in _FIELDS]
        # Exactly int: True is one, too, and would count as a byte.
        if any(type(value) is not int for value in values):
            return None
        return Account(owner, *values)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.debug("%s stays, though its process has ended: %s", path, error)


def _remove_own(directory: Path, owner: Owner, pid: int) -> None:
    # A forked child inherits the finalizer, and must leave its parent's account alone.
    if os.getpid() == pid:
        _remove(directory / f"{owner.file_name}.json")
