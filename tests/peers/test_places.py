"""
The directory of ledgers: private by default, or made for several users.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from whispercache.peers.ledger import Ledger
from whispercache.peers.places import given_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import MakeCache
    from typing_extensions import Self

GROUP = 54_321
DEVICE = "GPU-1"

needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0,
    reason="only root can become another user",
)

# A process of another user. All is imported before: it may not see this checkout.
_CHILD = f"""
import os, sys, time
import encodings.ascii, filelock, json
from whispercache.peers.ledger import Ledger
directory, uid = sys.argv[1], int(sys.argv[2])
os.setgroups([{GROUP}])
os.setgid(uid)
os.setuid(uid)
os.umask(0o077)
ledger = Ledger(directory, {DEVICE!r})
hear = sys.stdin.readline
def say(*words):
    print(*words, flush=True)
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """
    A directory for a group, as the documentation has it made.
    """
    path = Path(tempfile.mkdtemp(prefix="whispercache-"))
    os.chown(path, -1, GROUP)
    path.chmod(0o2770)
    yield path
    shutil.rmtree(path)


class User:
    """
    A process of the user *uid*, which runs *code* with a ``ledger``.
    """

    def __init__(self, directory: Path, uid: int, code: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD + code, str(directory), str(uid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def hear(self) -> str:
        """
        Wait for the next line that it says.
        """
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def say(self) -> None:
        """
        Let it go on.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("go on\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """
        End it, without a word to it.
        """
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


@needs_root
@pytest.mark.process
def test_users_of_one_group_share_a_ledger(shared: Path) -> None:
    """
    They read each other's accounts, take turns, and remove what the ended left; nobody
    else may look.
    """
    holds = "ledger.publish(promised_bytes=7)\nwith ledger.turn(10) as mine:\n"
    holds += "    say(mine); hear()\nsay('let go'); hear()"
    looks = """
ledger.publish(wanted_bytes=5)
say([a.promised_bytes for a in ledger.others()])
with ledger.turn(0) as mine:
    say(mine)
hear()
with ledger.turn(10) as mine:
    say(mine)
hear()
say(ledger.others())
hear()
"""
    with ExitStack() as running:
        first = running.enter_context(User(shared, 12_001, holds))
        assert first.hear() == "True"
        second = running.enter_context(User(shared, 12_002, looks))
        assert second.hear() == "[7]"
        assert second.hear() == "False"
        first.say()
        assert first.hear() == "let go"
        files = list((shared / DEVICE).iterdir())
        assert {file.stat().st_gid for file in files} == {GROUP}
        assert {file.stat().st_uid for file in files} == {12_001, 12_002}
        assert not [file for file in files if file.stat().st_mode & stat.S_IRWXO]
        second.say()
        assert second.hear() == "True"
        first.kill()
        second.say()
        assert second.hear() == "()"
        owners = {file.stat().st_uid for file in (shared / DEVICE).glob("*.json")}
        assert owners == {12_002}


@needs_root
@pytest.mark.process
def test_a_process_that_is_hidden_counts_by_its_file(shared: Path) -> None:
    """
    /proc may not show those of others; signals tell that one is there.
    """
    code = """
from whispercache.peers import ledger as module
from pathlib import Path
hear()
real = Path.read_bytes
def hidden(path):
    if str(path).startswith("/proc/") and f"/{os.getpid()}/" not in str(path):
        raise FileNotFoundError(path)
    return real(path)
Path.read_bytes = hidden
say([a.promised_bytes for a in ledger.others()])
"""
    holds = "ledger.publish(promised_bytes=7)\nsay('there'); hear()"
    with User(shared, 12_002, code) as second, User(shared, 12_001, holds) as first:
        assert first.hear() == "there"
        second.say()
        assert second.hear() == "[7]"


def test_one_user_s_directory_stays_private(tmp_path: Path) -> None:
    """
    Made if missing, for its maker alone, whatever the umask is.
    """
    place = given_directory(tmp_path / "a" / "b")
    before = os.umask(0)
    try:
        ledger = Ledger(place, DEVICE)
        ledger.publish(promised_bytes=1)
        with ledger.turn(1) as has_turn:
            assert has_turn
    finally:
        os.umask(before)
    for path in (place, *place.rglob("*")):
        assert not path.stat().st_mode & 0o077, path
    ledger.close()


def test_a_directory_that_cannot_work_is_refused(tmp_path: Path) -> None:
    """
    With what to do instead.
    """
    sticky = tmp_path / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    with pytest.raises(
        PermissionError, match=r"install -d -m 2770 -g GROUP .*/sticky/"
    ):
        given_directory(sticky)
    with pytest.raises(ValueError, match="no absolute path"):
        given_directory("here")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match="file"):
        given_directory(file)


def test_caches_that_are_given_a_directory_coordinate_in_it(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    """
    Without another word.
    """
    cache = make_cache(coordinate_dir=tmp_path)
    cache.preload("base", "cuda:0")
    assert len(list(tmp_path.glob("*/*.json"))) == 1
    cache.close()
    assert not list(tmp_path.glob("*/*.json"))
