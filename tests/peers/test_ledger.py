"""
What processes tell each other: with real processes, which are killed and stopped.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whispercache.peers import ledger as module
from whispercache.peers.ledger import (
    FRESH_S,
    HEARTBEAT_S,
    Account,
    Ledger,
    Owner,
    bytes_to_free,
)
from whispercache.peers.places import default_directory
from whispercache.testing import FakeClock, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

DEVICE = "GPU-1"
_FIELDS = ("promised_bytes", "held_bytes", "idle_bytes", "wanted_bytes")

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """
    This process's ledger.
    """
    ledger = Ledger(tmp_path, DEVICE)
    yield ledger
    ledger.close()


@contextmanager
def child(directory: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """
    A process that runs *code* with a ``ledger``; killed at the end of the block.

    ``say`` sends a line to the test, ``hear`` waits for one.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD + textwrap.dedent(code), str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # Its own children too, which would keep the pipe open.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


_CHILD = f"""
import os, signal, sys, threading, time
from pathlib import Path
from whispercache.peers.ledger import Ledger
directory = Path(sys.argv[1])
ledger = Ledger(directory, {DEVICE!r})
hear = sys.stdin.readline
def say(*words):
    print(*words, flush=True)
"""

HOLD_THE_TURN = """
ledger.publish(promised_bytes=7)
with ledger.turn(10) as has_turn:
    say(has_turn)
    hear()
"""


def hear(process: subprocess.Popen[str]) -> str:
    """
    The next line that a child says.
    """
    assert process.stdout is not None
    return process.stdout.readline().strip()


def say(process: subprocess.Popen[str]) -> None:
    """
    Let a child go on that waits to hear something.
    """
    assert process.stdin is not None
    process.stdin.write("go on\n")


def files(directory: Path) -> set[str]:
    """
    The names of all account files, whole or not.
    """
    return {path.name for path in (directory / DEVICE).iterdir()} - {"load.lock"}


def file_of(directory: Path, account: Account) -> Path:
    """
    Where an account lies.
    """
    return directory / DEVICE / f"{account.owner.file_name}.json"


def write(directory: Path, owner: Owner, ending: str = ".json", **numbers: int) -> Path:
    """
    Write an account as *owner* would.
    """
    path = directory / DEVICE / f"{owner.file_name}{ending}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(dict.fromkeys(_FIELDS, 0) | numbers),
        encoding="utf-8",
    )
    return path


def other_than(
    owner: Owner,
    *,
    pid: int | None = None,
    younger_s: float = 0.0,
    place: str | None = None,
) -> Owner:
    """
    An owner like this one, in part.
    """
    return Owner(
        owner.pid if pid is None else pid,
        owner.started_s + younger_s,
        owner.place if place is None else place,
        owner.number + 1000,
    )


@pytest.mark.process
def test_a_process_sees_what_another_tells(ledger: Ledger, tmp_path: Path) -> None:
    """
    Every number arrives, with who says it.
    """
    code = """
    ledger.publish(promised_bytes=1, held_bytes=9, idle_bytes=3, wanted_bytes=4)
    say("ready")
    hear()
    ledger.publish(held_bytes=9)
    say("ready")
    hear()
    """
    with child(tmp_path, code) as process:
        assert hear(process) == "ready"
        (account,) = ledger.others()
        assert account == Account(account.owner, 1, 9, 3, 4)
        assert account.owner.pid == process.pid
        say(process)
        assert hear(process) == "ready"
        assert ledger.others() == (Account(account.owner, held_bytes=9),)


def test_one_does_not_see_oneself(ledger: Ledger) -> None:
    """
    What one told is returned by the telling, and is not among the others.
    """
    account = ledger.publish(promised_bytes=5)
    assert account.owner.pid == os.getpid()
    assert account.promised_bytes == 5
    assert ledger.others() == ()


def test_nobody_is_there_before_anybody_told_anything(tmp_path: Path) -> None:
    """
    A directory that does not exist yet is empty, and is not made by looking.
    """
    assert Ledger(tmp_path / "new", DEVICE).others() == ()
    assert not (tmp_path / "new").exists()


def test_two_ledgers_of_one_process_are_peers(ledger: Ledger, tmp_path: Path) -> None:
    """
    Two caches in one process neither overwrite nor overlook each other.
    """
    second = Ledger(tmp_path, DEVICE)
    first_account = ledger.publish(held_bytes=1)
    second_account = second.publish(held_bytes=2)
    assert ledger.others() == (second_account,)
    assert second.others() == (first_account,)
    second.close()
    assert ledger.others() == ()


def test_devices_do_not_see_each_other(ledger: Ledger, tmp_path: Path) -> None:
    """
    Accounts and turns are kept apart by device.
    """
    other = Ledger(tmp_path, "GPU-2")
    other.publish(held_bytes=1)
    assert ledger.others() == ()
    with ledger.turn(0) as first:
        done: list[bool] = []

        def try_it() -> None:
            with other.turn(0) as second:
                done.append(second)

        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
        assert (first, done) == (True, [True])
    other.close()


def test_every_device_id_has_a_directory_of_its_own(tmp_path: Path) -> None:
    """
    However odd, it stays inside, and none shares one with another.
    """
    odd = ["cpu", "", ".", "..", "../up", "a/b", "a_b", "a:b", "é", "x" * 300, "x" * 64]
    opened = [Ledger(tmp_path / "in", device_id) for device_id in odd]
    for each in opened:
        each.publish(held_bytes=1)
    assert all(each.others() == () for each in opened)
    assert len(list((tmp_path / "in").iterdir())) == len(odd)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.process
def test_processes_take_turns(tmp_path: Path) -> None:
    """
    There are never two of them in the block.
    """
    code = """
    overlaps = 0
    say("ready")
    hear()
    for _ in range(40):
        with ledger.turn(60) as has_turn:
            assert has_turn
            try:
                (directory / "inside").touch(exist_ok=False)
            except FileExistsError:
                overlaps += 1
            for _ in range(20):
                os.sched_yield()
            (directory / "inside").unlink(missing_ok=True)
    say(overlaps)
    hear()
    """
    with child(tmp_path, code) as first, child(tmp_path, code) as second:
        assert hear(first) == hear(second) == "ready"
        say(first)
        say(second)
        assert hear(first) == hear(second) == "0"


def test_threads_of_one_process_take_turns(ledger: Ledger) -> None:
    """
    One ledger, used on two threads, admits one.
    """
    seen: list[bool] = []

    def try_it() -> None:
        with ledger.turn(0) as has_turn:
            seen.append(has_turn)

    for _ in range(2):
        with ledger.turn(0):
            thread = threading.Thread(target=try_it)
            thread.start()
            thread.join()
    try_it()
    assert seen == [False, False, True]


def test_a_turn_ends_with_its_block_however_that_ends(ledger: Ledger) -> None:
    """
    An error in the block leaves it, and leaves no turn behind.
    """
    with pytest.raises(LookupError), ledger.turn(0):
        raise LookupError
    with ledger.turn(0) as has_turn:
        assert has_turn


@pytest.mark.parametrize("timeout_s", [-1.0, float("inf"), float("nan")])
def test_there_is_no_waiting_for_ever(ledger: Ledger, timeout_s: float) -> None:
    """
    A turn without an end to its waiting is refused.
    """
    with pytest.raises(ValueError, match="timeout_s"), ledger.turn(timeout_s):
        pass


@pytest.mark.process
def test_a_stopped_holder_of_the_turn_costs_only_the_time_that_one_gives(
    ledger: Ledger, tmp_path: Path
) -> None:
    """
    It lives, so it keeps the turn and its account; others go on without.
    """
    with child(tmp_path, HOLD_THE_TURN) as process:
        assert hear(process) == "True"
        process.send_signal(signal.SIGSTOP)
        began_s = time.monotonic()
        with ledger.turn(0.2) as has_turn:
            waited_s = time.monotonic() - began_s
        assert not has_turn
        assert 0.2 <= waited_s < 5
        assert [each.promised_bytes for each in ledger.others()] == [7]
        process.send_signal(signal.SIGCONT)
        say(process)
        with ledger.turn(10) as has_turn:
            assert has_turn


@pytest.mark.process
def test_a_killed_holder_leaves_neither_turn_nor_account(
    ledger: Ledger, tmp_path: Path
) -> None:
    """
    Both are gone before its parent has asked how it ended; the file is removed.
    """
    own = ledger.publish(held_bytes=1)
    with child(tmp_path, HOLD_THE_TURN) as process:
        assert hear(process) == "True"
        with ledger.turn(0) as has_turn:
            assert not has_turn
        assert [each.owner.pid for each in ledger.others()] == [process.pid]
        # Not waited for: it stays a zombie until the end of the block.
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: ledger.others() == (), "no others")
        with ledger.turn(10) as has_turn:
            assert has_turn
        assert files(tmp_path) == {file_of(tmp_path, own).name}


@pytest.mark.process
def test_whoever_waits_for_a_killed_holder_gets_the_turn(
    ledger: Ledger, tmp_path: Path
) -> None:
    """
    It need not be asked for again.
    """
    waiting = """
    say("ready")
    with ledger.turn(60) as has_turn:
        say(has_turn)
    hear()
    """
    with child(tmp_path, HOLD_THE_TURN) as holder, child(tmp_path, waiting) as waiter:
        assert hear(holder) == "True"
        assert hear(waiter) == "ready"
        holder.kill()
        assert hear(waiter) == "True"
    assert ledger.others() == ()


@pytest.mark.process
def test_a_process_killed_while_it_tells_leaves_nothing(
    ledger: Ledger, tmp_path: Path
) -> None:
    """
    Whole files and unfinished ones go; nobody sees a half.
    """
    code = """
    n = 0
    say("ready")
    while True:
        n += 1
        ledger.publish(promised_bytes=n, held_bytes=n, idle_bytes=n, wanted_bytes=n)
    """
    for _ in range(5):
        with child(tmp_path, code) as process:
            assert hear(process) == "ready"
            wait_until(ledger.others, "an account")
            process.kill()
            process.wait()
            assert ledger.others() == ()
            assert files(tmp_path) == set()


@pytest.mark.process
def test_readers_see_whole_accounts_while_they_are_replaced(
    ledger: Ledger, tmp_path: Path
) -> None:
    """
    Never an error, a mixture, or nothing.
    """
    code = """
    ledger.publish(promised_bytes=1, held_bytes=1, idle_bytes=1, wanted_bytes=1)
    say("ready")
    for n in range(2, 1001):
        ledger.publish(promised_bytes=n, held_bytes=n, idle_bytes=n, wanted_bytes=n)
    say("done")
    hear()
    """
    seen: list[int] = []
    with child(tmp_path, code) as process:
        assert hear(process) == "ready"
        while not seen or seen[-1] < 1000:
            (account,) = ledger.others()
            n = account.promised_bytes
            assert account == Account(account.owner, n, n, n, n)
            seen.append(n)
        assert hear(process) == "done"
    assert seen == sorted(seen)
    assert len(set(seen)) > 10


def test_threads_tell_whole_accounts(ledger: Ledger, tmp_path: Path) -> None:
    """
    Threads of one process do not spoil each other's writing.
    """
    reader = Ledger(tmp_path, DEVICE)
    together = threading.Barrier(4)

    def tell() -> None:
        together.wait()
        for n in range(100):
            ledger.publish(promised_bytes=n, wanted_bytes=n)

    threads = [threading.Thread(target=tell) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for account in reader.others():
            assert account.promised_bytes == account.wanted_bytes
    for thread in threads:
        thread.join()
    assert len(reader.others()) == 1


def test_threads_that_tell_first_at_once_share_the_account(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    None writes beside the others, behind a lock of its own.
    """
    together, really = threading.Barrier(4), module._identity

    def identify(pid: int, number: int) -> Owner:
        together.wait(10)
        return really(pid, number)

    monkeypatch.setattr(module, "_identity", identify)
    locks: list[object] = []
    threads = [
        threading.Thread(target=lambda: locks.append(ledger._own().lock))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(locks) == 4
    assert len(set(map(id, locks))) == 1
    ledger.publish(held_bytes=1)
    assert len(files(tmp_path)) == 1


@pytest.mark.process
def test_a_process_that_ends_leaves_nothing(ledger: Ledger, tmp_path: Path) -> None:
    """
    Its account goes with it although nobody closed the ledger.
    """
    code = """
    ledger.publish(held_bytes=1)
    say(len(list((directory / "GPU-1").iterdir())))
    """
    with child(tmp_path, code) as process:
        assert hear(process) == "1"
        assert process.wait(10) == 0
        assert files(tmp_path) == set()
    assert ledger.others() == ()


def test_a_dropped_ledger_takes_its_account_along(
    ledger: Ledger, tmp_path: Path
) -> None:
    """
    The process lives on, and owes nothing for a cache that it has no more.
    """
    other = Ledger(tmp_path, DEVICE)
    other.publish(held_bytes=1)
    assert len(ledger.others()) == 1
    del other
    gc.collect()
    assert ledger.others() == ()


def test_a_closed_ledger_has_no_account_until_it_tells_again(
    ledger: Ledger, tmp_path: Path
) -> None:
    """
    Closing twice, or before anything was told, is fine.
    """
    other = Ledger(tmp_path, DEVICE)
    other.close()
    account = other.publish(held_bytes=1)
    other.close()
    other.close()
    assert ledger.others() == ()
    assert other.publish(held_bytes=1) == account
    assert ledger.others() == (account,)


@pytest.mark.process
def test_a_reused_pid_is_not_taken_for_the_one_before(
    ledger: Ledger, tmp_path: Path
) -> None:
    """
    The number lives, but it began at another time: the file goes.
    """
    own = ledger.publish().owner
    with child(tmp_path, HOLD_THE_TURN) as process:
        assert hear(process) == "True"
        (alive,) = ledger.others()
        mine = write(tmp_path, other_than(own, younger_s=-60), promised_bytes=1)
        living = write(tmp_path, other_than(alive.owner, younger_s=60), held_bytes=1)
        half = write(tmp_path, other_than(own, younger_s=-60), ".tmp")
        same = write(tmp_path, other_than(own), promised_bytes=3)
        assert sorted(each.promised_bytes for each in ledger.others()) == [3, 7]
        gone = [path.exists() for path in (mine, living, half)]
        assert (gone, same.exists()) == ([False] * 3, True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"promised_bytes": 1, "held_by',
        b"[1, 2, 3, 4]",
        b"7",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"promised_bytes": 1}',
        *(
            json.dumps(dict.fromkeys(_FIELDS, nonsense)).encode()
            for nonsense in ("1", 1.0, True, None, -1, [1])
        ),
        json.dumps(dict.fromkeys(_FIELDS, 1) | {"idle_bytes": 2}).encode(),
        b'{"promised_bytes": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_file_that_is_no_account_is_ignored(
    ledger: Ledger, tmp_path: Path, content: bytes
) -> None:
    """
    It stays as long as its owner lives, who will replace it, and goes with him.
    """
    own = ledger.publish().owner
    path = write(tmp_path, other_than(own))
    path.write_bytes(content)
    assert ledger.others() == ()
    assert path.exists()
    dead = write(tmp_path, other_than(own, pid=999_999_999))
    dead.write_bytes(content)
    assert ledger.others() == ()
    assert not dead.exists()


def test_files_of_others_are_left_alone(ledger: Ledger, tmp_path: Path) -> None:
    """
    What has not a name of ours is neither read nor removed.
    """
    folder = file_of(tmp_path, ledger.publish()).parent
    names = {"load.lock", "1.json", "notes.txt", "1-2.00-0.1-3.json.bak", "x-y-z-1.tmp"}
    for name in names:
        (folder / name).write_text("{}", encoding="utf-8")
    # Named like one, but a directory, of a process that does not live.
    (folder / "999999999-1.00-0-1.json").mkdir()
    assert ledger.others() == ()
    assert names < {path.name for path in folder.iterdir()}


def test_a_later_version_may_tell_more(ledger: Ledger, tmp_path: Path) -> None:
    """
    Numbers that are not known are no reason to ignore the rest.
    """
    owner = other_than(ledger.publish().owner)
    write(tmp_path, owner, promised_bytes=3, parked_bytes=4)
    assert ledger.others() == (Account(owner, promised_bytes=3),)


def test_in_another_place_a_file_counts_while_it_is_fresh(
    ledger: Ledger, tmp_path: Path
) -> None:
    """
    Process ids of another container say nothing here, whether or not they exist.
    """
    own = ledger.publish().owner
    living = write(tmp_path, other_than(own, place="0.2"), held_bytes=1)
    unknown = write(tmp_path, other_than(own, pid=999_999_999, place="0.2"))
    assert len(ledger.others()) == 2
    now_s = time.time()
    os.utime(living, (now_s, now_s - FRESH_S - 1))
    # A clock that was set back must not keep it for ever.
    os.utime(unknown, (now_s, now_s + FRESH_S + 60))
    assert ledger.others() == ()
    assert not living.exists()
    assert not unknown.exists()


def test_a_process_that_is_hidden_counts_while_its_file_is_fresh(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A system that does not show processes is no reason to think them dead.
    """
    own = ledger.publish().owner

    def hide(pid: int) -> float:
        raise PermissionError(pid)

    path = write(tmp_path, other_than(own, pid=1), held_bytes=1)
    monkeypatch.setattr(module, "_started_s", hide)
    assert len(ledger.others()) == 1
    os.utime(path, (0, 0))
    assert ledger.others() == ()


def test_the_same_account_is_written_once_a_heartbeat(tmp_path: Path) -> None:
    """
    No change, no writing; until others might think that nobody is there.
    """
    clock = FakeClock()
    ledger = Ledger(tmp_path, DEVICE, clock=clock.now)
    path = file_of(tmp_path, ledger.publish(held_bytes=1))
    # Whatever lies there now, only writing replaces it.
    path.write_bytes(b"")
    ledger.publish(held_bytes=1)
    clock.tick(HEARTBEAT_S - 1)
    ledger.publish(held_bytes=1)
    assert path.read_bytes() == b""
    clock.tick(1)
    ledger.publish(held_bytes=1)
    assert json.loads(path.read_bytes())["held_bytes"] == 1
    path.write_bytes(b"")
    ledger.publish(held_bytes=2)
    assert json.loads(path.read_bytes())["held_bytes"] == 2


def test_a_heart_beats_more_often_than_a_file_grows_old() -> None:
    """
    Two heartbeats may come late.
    """
    assert 3 * HEARTBEAT_S <= FRESH_S


def test_a_directory_that_was_cleared_is_made_again(
    tmp_path: Path, ledger: Ledger
) -> None:
    """
    Systems clear temporary directories under long-lived processes.
    """
    path = file_of(tmp_path, ledger.publish(held_bytes=1))
    path.unlink()
    path.parent.rmdir()
    assert ledger.others() == ()
    ledger.publish(held_bytes=2)
    assert path.exists()
    path.unlink()
    path.parent.rmdir()
    with ledger.turn(0) as has_turn:
        assert has_turn


def test_a_failed_write_keeps_the_account_before(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A full disk raises, leaves no half file, and the next telling tries again.
    """
    reader = Ledger(tmp_path, DEVICE)
    before = ledger.publish(held_bytes=1)

    def full(_: Path, __: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space"):
            ledger.publish(held_bytes=2)
    assert reader.others() == (before,)
    assert len(files(tmp_path)) == 1
    after = ledger.publish(held_bytes=2)
    assert reader.others() == (after,)


def test_a_directory_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    """
    The caller learns it from telling and from taking a turn.
    """
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    ledger = Ledger(tmp_path / "file", DEVICE)
    with pytest.raises(OSError, match="file"):
        ledger.publish()
    with pytest.raises(OSError, match="file"), ledger.turn(0):
        pass


def test_a_file_system_without_locks_is_an_os_error(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Old versions of filelock say it in another way.
    """
    import filelock

    def refuse(_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(OSError, match="knows no locks"), ledger.turn(0):
        pass


@pytest.mark.parametrize(
    "numbers",
    [*({field: -1} for field in _FIELDS), {"held_bytes": 1, "idle_bytes": 2}],
)
def test_an_account_that_cannot_be_true_is_refused(
    ledger: Ledger, tmp_path: Path, numbers: dict[str, int]
) -> None:
    """
    Nothing is told.
    """
    with pytest.raises(ValueError, match="Account"):
        ledger.publish(**numbers)
    assert not (tmp_path / DEVICE).exists()


FORK = """
parent = ledger.publish(held_bytes=1)
parent_file = directory / "GPU-1" / f"{parent.owner.file_name}.json"
def in_child(act):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


@pytest.mark.process
@on_linux
def test_a_forked_child_leaves_its_parents_account_alone(
    ledger: Ledger, tmp_path: Path
) -> None:
    """
    Closing, dropping and ending in the child change nothing of it.
    """
    code = """
    import gc, atexit
    def act():
        global ledger
        ledger.close()
        ledger = None
        gc.collect()
        atexit._run_exitfuncs()
    in_child(act)
    say("forked", parent_file.exists())
    hear()
    """
    with child(tmp_path, FORK + textwrap.dedent(code)) as process:
        assert hear(process) == "forked True"
        assert [each.held_bytes for each in ledger.others()] == [1]


@pytest.mark.process
@on_linux
def test_a_forked_child_has_an_account_of_its_own(
    ledger: Ledger, tmp_path: Path
) -> None:
    """
    It opens with its first telling, even if the fork fell into another's.
    """
    code = """
    def act():
        account = ledger.publish(held_bytes=2)
        assert account.owner.pid == os.getpid() != parent.owner.pid
        assert ledger.others() == (parent,)
        say("child")
        hear()
        ledger.close()
        assert ledger.others() == (parent,)
    with ledger._own().lock:
        in_child(act)
    say("parent", parent_file.exists())
    hear()
    """
    with child(tmp_path, FORK + textwrap.dedent(code)) as process:
        assert hear(process) == "child"
        assert sorted(each.held_bytes for each in ledger.others()) == [1, 2]
        say(process)
        assert hear(process) == "parent True"


@pytest.mark.process
@on_linux
def test_a_forked_child_does_not_end_its_parents_turn(
    ledger: Ledger, tmp_path: Path
) -> None:
    """
    A child that was forked in the block may leave it.
    """
    code = """
    with ledger.turn(0) as has_turn:
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            say(has_turn)
            hear()
    if not pid:
        os._exit(0)
    say("left")
    hear()
    """
    with child(tmp_path, FORK + textwrap.dedent(code)) as process:
        assert hear(process) == "True"
        with ledger.turn(0) as has_turn:
            assert not has_turn
        say(process)
        assert hear(process) == "left"
        with ledger.turn(0) as has_turn:
            assert has_turn


def is_gone(started_s: Callable[[int], float | None], pid: int) -> bool:
    """
    Whether one way to ask says that *pid* does not live.
    """
    return started_s(pid) is None


@pytest.mark.process
@on_linux
def test_the_kernel_and_psutil_agree_on_who_lives(tmp_path: Path) -> None:
    """
    Both know the living, and neither a zombie or a number that nobody has.
    """
    import psutil

    ways = (module._started_in_proc, module._started_by_psutil)
    with child(tmp_path, "hear()") as process:
        in_proc, by_psutil = (way(process.pid) for way in ways)
        assert in_proc is not None
        assert by_psutil is not None
        # psutil's time of boot is in whole seconds.
        assert by_psutil - psutil.boot_time() == pytest.approx(in_proc, abs=2)
        os.kill(process.pid, signal.SIGKILL)
        for way in ways:
            wait_until(partial(is_gone, way, process.pid), "a zombie")
    assert [way(999_999_999) for way in ways] == [None, None]


@pytest.mark.process
@on_linux
def test_a_processs_name_does_not_confuse_its_start(tmp_path: Path) -> None:
    """
    Spaces and brackets may be in it.
    """
    code = """
    before = ledger.publish().owner.started_s
    Path("/proc/self/comm").write_text(") Z (x 1")
    say(os.getpid(), before)
    hear()
    """
    with child(tmp_path, code) as process:
        pid, started_s = hear(process).split()
        assert module._started_in_proc(int(pid)) == float(started_s)


@on_linux
def test_a_system_without_namespaces_is_one_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    As are systems that do not say which boot it is; a fork asks anew.
    """
    here = module._place(os.getpid())
    assert here == module._place(os.getpid()) != "0"
    assert module._NAME.fullmatch(Owner(1, 2.0, here, 3).file_name)

    def refuse(_: Path, **__: object) -> str:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)
        assert module._place(-1) == "0"


def test_a_file_that_goes_while_it_is_judged_is_no_error(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Another process may remove it between the listing and the look.
    """
    own = ledger.publish().owner
    gone = [
        write(tmp_path, other_than(own, place="0.2")),
        write(tmp_path, other_than(own, pid=999_999_999)),
        write(tmp_path, other_than(own)),
    ]
    for path in gone:
        path.unlink()
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(gone))
    assert ledger.others() == ()


def test_psutil_may_be_refused_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    That is another thing than that nobody lives.
    """
    import psutil

    def refuse(pid: int) -> None:
        raise psutil.AccessDenied(pid)

    monkeypatch.setattr(psutil, "Process", refuse)
    with pytest.raises(PermissionError):
        module._started_by_psutil(1)


def test_a_process_that_does_not_know_its_start_tells_nothing(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Nobody could tell it from the next one with its number.
    """
    monkeypatch.setattr(module, "_started_s", lambda _: None)
    with pytest.raises(OSError, match="does not tell"):
        ledger.publish()


@pytest.mark.process
def test_importing_it_imports_no_library() -> None:
    """
    What only a turn needs is imported by a turn.
    """
    script = (
        "import sys, whispercache.peers.ledger; "
        "print({'filelock', 'platformdirs', 'psutil', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )
    assert done.stdout.strip() == "set()"


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """
    The directory of the user's session; temporary files are beside it.
    """
    session, temporary = tmp_path / "session", tmp_path / "temporary"
    session.mkdir(mode=0o700)
    temporary.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(session))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    return session


def fall_back(session: Path) -> Path:
    """
    Where processes meet if not in the session's directory.
    """
    return session.parent / "temporary" / f"whispercache-{os.getuid()}"


def test_processes_meet_in_the_sessions_directory(session: Path) -> None:
    """
    Each finds the same one, which only the user can enter.
    """
    assert default_directory() == default_directory() == session / "whispercache"
    assert (session / "whispercache").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", [None, "", "relative", "missing", "file", "link"])
def test_without_a_session_they_meet_in_the_temporary_directory(
    session: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    """
    Where the variable is not set, or names what cannot be used, as in containers.
    """
    (session.parent / "file").write_text("", encoding="utf-8")
    (session.parent / "link").symlink_to(session)
    (session.parent / "relative").mkdir(mode=0o700)
    monkeypatch.chdir(session.parent)
    if name is None:
        monkeypatch.delenv("XDG_RUNTIME_DIR")
    else:
        named = str(session.parent / name) if name not in {"", "relative"} else name
        monkeypatch.setenv("XDG_RUNTIME_DIR", named)
    assert default_directory() == default_directory() == fall_back(session)
    assert fall_back(session).stat().st_mode & 0o777 == 0o700


def test_anothers_session_is_not_used(
    session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Its variable survives sudo; its owner could put anything into our place there.
    """
    stranger = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: stranger)
    with pytest.raises(PermissionError, match="belongs to another user"):
        # Here, the test's own user made the fall-back too.
        default_directory()
    assert list(session.iterdir()) == []


def test_a_session_that_cannot_be_written_is_not_used(
    session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    As where it is mounted to be read only.
    """
    really = os.access

    def access(path: Path, mode: int) -> bool:
        return session not in path.parents and really(path, mode)

    monkeypatch.setattr(os, "access", access)
    assert default_directory() == fall_back(session)


def test_a_fall_back_that_is_open_to_others_is_refused(session: Path) -> None:
    """
    Somebody might have put something there; the error says what to do.
    """
    session.rmdir()
    default_directory().chmod(0o770)
    with pytest.raises(PermissionError, match="chmod 700"):
        default_directory()


def test_a_fall_back_that_is_no_directory_is_refused(session: Path) -> None:
    """
    A link to one is none: whoever made it could turn it elsewhere.
    """
    session.rmdir()
    made = default_directory()
    fall_back(session).symlink_to(made.rename(session.parent / "moved"))
    with pytest.raises(NotADirectoryError):
        default_directory()


def account(pid: int, idle_bytes: int = 0, **numbers: int) -> Account:
    """
    An account of a process with that number.
    """
    held_bytes = numbers.pop("held_bytes", idle_bytes)
    owner = Owner(pid, 1.0, "0", 0)
    return Account(owner, held_bytes=held_bytes, idle_bytes=idle_bytes, **numbers)


def shares(accounts: list[Account], free_bytes: int = 0) -> list[int]:
    """
    What each of them frees, each by its own reckoning.
    """
    return [
        bytes_to_free(own, [each for each in accounts if each is not own], free_bytes)
        for own in accounts
    ]


def test_the_process_with_most_idle_makes_room_first() -> None:
    """
    The others do only if that is not enough; ties go by process id.
    """
    wanter = account(1, wanted_bytes=5)
    assert shares([wanter, account(2, 3), account(3, 8)]) == [0, 0, 5]
    assert shares([wanter, account(2, 3), account(3, 4)]) == [0, 1, 4]
    assert shares([wanter, account(3, 4), account(2, 4)]) == [0, 1, 4]
    assert shares([wanter, account(2, 1), account(3, 2)]) == [0, 1, 2]


def test_nobody_makes_room_for_himself() -> None:
    """
    What one wants is what one's own idle models cannot give.
    """
    assert shares([account(1, 6, wanted_bytes=3), account(2, 5)]) == [0, 3]
    assert shares([account(1, 6, wanted_bytes=3)]) == [0]


def test_processes_that_wait_for_each_other_both_give_way() -> None:
    """
    Otherwise both would keep idle models, and wait for ever.
    """
    both = [account(1, 6, wanted_bytes=3), account(2, 5, wanted_bytes=4)]
    assert shares(both) == [4, 3]


def test_nothing_leaves_for_room_that_is_there() -> None:
    """
    What is free, and promised to nobody, is given out first.
    """
    wanter = account(1, wanted_bytes=5)
    assert shares([wanter, account(2, 9)], free_bytes=5) == [0, 0]
    assert shares([wanter, account(2, 9)], free_bytes=3) == [0, 2]
    another = account(3, wanted_bytes=5)
    assert shares([wanter, account(2, 9), another], free_bytes=5) == [0, 5, 0]
    promised = account(3, promised_bytes=2)
    assert shares([wanter, account(2, 9), promised], free_bytes=5) == [0, 2, 0]
    assert shares([wanter, account(2, 9), promised], free_bytes=1) == [0, 5, 0]


def test_room_that_one_made_is_not_made_again_by_the_next() -> None:
    """
    Between the unload and the waiter's next word, the gauge shows it.
    """
    wanter, second = account(1, wanted_bytes=5), account(3, 6)
    assert shares([wanter, account(2, 8), second]) == [0, 5, 0]
    assert shares([wanter, account(2, 8), second], free_bytes=5) == [0, 0, 0]
    assert shares([wanter, account(2, 3), second], free_bytes=5) == [0, 0, 0]


def some_accounts(wanters: int) -> st.SearchStrategy[list[Account]]:
    """
    Accounts of which the first few may want something.
    """
    few = st.integers(0, 6)
    return st.lists(st.tuples(few, few, few, few), min_size=1, max_size=6).map(
        lambda rows: [
            account(
                pid,
                idle_bytes,
                held_bytes=idle_bytes + busy_bytes,
                promised_bytes=promised_bytes,
                wanted_bytes=wanted_bytes if pid < wanters else 0,
            )
            for pid, (idle_bytes, busy_bytes, promised_bytes, wanted_bytes) in (
                enumerate(rows)
            )
        ]
    )


@given(some_accounts(wanters=1), st.randoms())
def test_together_they_free_what_one_wants(
    accounts: list[Account], random: Random
) -> None:
    """
    Exactly that, or all that is idle elsewhere, in whatever order they are read.
    """
    wanted_bytes = accounts[0].wanted_bytes
    idle_bytes = sum(each.idle_bytes for each in accounts[1:])
    freed = shares(accounts)
    assert sum(freed) == min(wanted_bytes, idle_bytes)
    assert all(
        share_bytes <= min(each.idle_bytes, wanted_bytes)
        for share_bytes, each in zip(freed, accounts, strict=True)
    )
    random.shuffle(accounts)
    assert sorted(shares(accounts)) == sorted(freed)


@given(some_accounts(wanters=6), st.integers(0, 20))
def test_nobody_frees_more_than_is_idle_or_wanted_elsewhere(
    accounts: list[Account], free_bytes: int
) -> None:
    """
    However many want something; and where somebody could give, somebody does.
    """
    freed = shares(accounts, free_bytes)
    wanted_bytes = sum(each.wanted_bytes for each in accounts)
    promised_bytes = sum(each.promised_bytes for each in accounts)
    missing_bytes = wanted_bytes - max(0, free_bytes - promised_bytes)
    assert sum(freed) <= max(0, missing_bytes)
    for share_bytes, each in zip(freed, accounts, strict=True):
        assert 0 <= share_bytes <= each.idle_bytes
        assert share_bytes <= wanted_bytes - each.wanted_bytes
    could_give = any(
        giver.idle_bytes and giver is not wanter
        for wanter in accounts
        if wanter.wanted_bytes > max(0, free_bytes - promised_bytes)
        for giver in accounts
    )
    assert not could_give or sum(freed) > 0
