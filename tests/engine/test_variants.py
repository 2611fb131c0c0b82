"""
Variants: found only while they are as they were written, and built once.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import pytest
from caches import cache_of
from filelock import FileLock
from real import (
    SILENCE,
    TEXT,
    child,
    child_environment,
    clip,
    micro_copy,
    model_of,
    packaged,
    text_of,
)

from whispercache import LoadFailed, ModelCache
from whispercache.core.entries import State
from whispercache.engine import construct
from whispercache.engine.files import stamp_of
from whispercache.engine.loader import FasterWhisperLoader
from whispercache.engine.sizes.header import read_header
from whispercache.engine.variants import build as building
from whispercache.engine.variants.build import Builder
from whispercache.engine.variants.convert import (
    Origin,
    converted_bytes,
    write_converted,
)
from whispercache.engine.variants.manifest import MANIFEST
from whispercache.engine.variants.store import Variant, VariantRefused, Variants
from whispercache.errors import CorruptModel
from whispercache.events import ModelLoading
from whispercache.options import DEFAULT_VARIANTS_BYTES
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from whispercache import ModelKey
    from whispercache.core.entries import Entry
    from whispercache.engine.files import ModelFiles
    from whispercache.engine.kept import KeptModels
    from whispercache.events import Event

ENGINE = "CTranslate2 of the tests"
PLENTY_BYTES = 1024**3
OTHER = "another text of others"


@pytest.fixture(autouse=True)
def _small_ones_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """
    Micro models get variants, too, on a disk that may be full or busy, for each test
    alone.
    """
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr("whispercache.engine.variants.build.MIN_SOURCE_BYTES", 0)
    monkeypatch.setattr("whispercache.engine.variants.store.KEPT_FREE_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def store(tmp_path: Path) -> Variants:
    """
    An empty store.
    """
    return new_store(tmp_path / "variants")


@pytest.fixture
def source(tmp_path: Path) -> Origin:
    """
    A micro model in float16.
    """
    return origin(micro_copy(tmp_path / "model"))


def new_store(directory: Path, limit_bytes: int = PLENTY_BYTES) -> Variants:
    """
    A store that knows nothing yet, as after a start.
    """
    return Variants(ENGINE, limit_bytes, directory)


def origin(directory: Path) -> Origin:
    """
    The model of *directory* as it is now.
    """
    stamp = stamp_of(str(directory))
    return Origin(directory.name, read_header(directory), stamp)


def names(directory: Path) -> set[str]:
    """
    What is in a store, its lock left out.
    """
    return {each.name for each in directory.iterdir()} - {".lock"}


def is_later_than(directory: Path, probe: Path) -> bool:
    """
    Whether the file system's clock, which is coarse, has moved on since *directory*.
    """
    probe.write_text("now", encoding="utf-8")
    now_ns = probe.stat().st_ctime_ns
    probe.unlink()
    return all(each.stat().st_ctime_ns < now_ns for each in directory.iterdir())


def let_time_pass(directory: Path) -> None:
    """
    Wait until a change to a file can be told from its writing.
    """
    probe = directory.parent / ".probe"
    wait_until(lambda: is_later_than(directory, probe), "another time of files")


def flip_byte(path: Path) -> None:
    """
    Change one bit in the middle of a file, and put its time back.
    """
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        (byte,) = file.read(1)
        file.seek(status.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# The store ---------------------------------------------------------------------------


class TestFind:
    """
    A variant is found by what its source is.
    """

    def test_what_was_built_is_found(self, store: Variants, source: Origin) -> None:
        """
        By those who built it, and by others who come later.
        """
        assert store.find(source, "int8") is None
        built = store.build(source, "int8")
        assert store.find(source, "int8") == built
        assert new_store(store.directory).find(source, "int8") == built
        assert store.find(source, "float32") is None
        assert names(store.directory) == {built.name}

    def test_what_is_there_is_not_built_again(
        self, store: Variants, source: Origin
    ) -> None:
        """
        A second build writes nothing.
        """
        built = store.build(source, "int8")
        before = (built / "model.bin").stat()
        assert store.build(source, "int8") == built
        assert (built / "model.bin").stat() == before

    def test_it_is_all_that_a_load_needs(self, store: Variants, source: Origin) -> None:
        """
        The small files are in it as they were, but for the vocabulary, and what was not
        there is not.
        """
        built = store.build(source, "int8")
        small = {each.name for each in source.directory.iterdir()}
        small -= {"model.bin", "vocabulary.json"}
        assert names(built) == {*small, "vocabulary.txt", "model.bin", MANIFEST}
        for name in small:
            original = (source.directory / name).read_bytes()
            assert (built / name).read_bytes() == original

    def test_its_vocabulary_has_a_line_for_each_token(
        self, store: Variants, source: Origin
    ) -> None:
        """
        Which is read twice as fast; empty tokens count, too.
        """
        vocabulary = source.directory / "vocabulary.json"
        tokens = json.loads(vocabulary.read_text(encoding="utf-8"))
        assert "" in tokens
        built = store.build(source, "int8")
        lines = (built / "vocabulary.txt").read_text(encoding="utf-8").split("\n")
        assert lines == [*tokens, ""]

    @pytest.mark.parametrize("token", ["two\nlines", "ends\r", 7, None])
    def test_a_vocabulary_that_lines_cannot_hold_stays_as_it_is(
        self, store: Variants, source: Origin, token: object
    ) -> None:
        """
        A token may be anything.
        """
        vocabulary = source.directory / "vocabulary.json"
        tokens = [*json.loads(vocabulary.read_text(encoding="utf-8"))[:-1], token]
        vocabulary.write_text(json.dumps(tokens) if token else "{", encoding="utf-8")
        built = store.build(source._replace(stamp=()), "int8")
        assert not (built / "vocabulary.txt").exists()
        assert (built / "vocabulary.json").read_bytes() == vocabulary.read_bytes()

    def test_models_that_differ_where_no_sample_is_have_their_own(
        self, store: Variants, source: Origin, tmp_path: Path
    ) -> None:
        """
        Some archives set all times to one; so size and time may be the same.
        """
        os.utime(source.header.path, ns=(1, 1))
        built = store.build(source._replace(stamp=()), "int8")
        elsewhere = tmp_path / "elsewhere"
        shutil.copytree(source.directory, elsewhere)
        flip_byte(elsewhere / "model.bin")
        os.utime(elsewhere / "model.bin", ns=(1, 1))
        assert store.find(origin(elsewhere), "int8") is None
        assert store.find(source._replace(stamp=()), "int8") == built

    def test_weights_that_were_changed_with_their_time_set_back_find_nothing(
        self, store: Variants, source: Origin
    ) -> None:
        """
        By the same process, too, which has seen this size and time before.
        """
        assert source.stamp
        store.build(source, "int8")
        status = source.header.path.stat()
        flip_byte(source.header.path)
        os.utime(source.header.path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert store.find(origin(source.directory), "int8") is None
        assert store.find(source, "int8") is None

    @pytest.mark.parametrize("change", ["touch", "weights", "tokenizer.json", "config"])
    def test_a_source_that_changed_finds_nothing(
        self, store: Variants, source: Origin, change: str
    ) -> None:
        """
        Whether its time, its weights at equal size, or a small file is another.
        """
        store.build(source, "int8")
        weights = source.directory / "model.bin"
        if change == "touch":
            os.utime(weights, ns=(1, 1))
        elif change == "weights":
            size_bytes = weights.stat().st_size
            weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
            assert weights.stat().st_size == size_bytes
        else:
            name = "config.json" if change == "config" else change
            path = source.directory / name
            path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
        changed = source._replace(stamp=stamp_of(str(source.directory)))
        assert store.find(changed, "int8") is None
        assert new_store(store.directory).find(changed, "int8") is None
        assert [each.state for each in store.list()] == ["stale"]

    def test_weights_that_differ_where_a_sample_is_taken_differ(
        self, store: Variants, source: Origin
    ) -> None:
        """
        Even with size and time as they were.
        """
        store.build(source, "int8")
        flip_byte(source.header.path)
        assert store.find(source._replace(stamp=()), "int8") is None

    def test_another_engine_finds_nothing(
        self, store: Variants, source: Origin
    ) -> None:
        """
        Another version of CTranslate2 may convert otherwise.
        """
        store.build(source, "int8")
        other = Variants("CTranslate2 of tomorrow", PLENTY_BYTES, store.directory)
        assert other.find(source, "int8") is None
        assert [each.state for each in other.list()] == ["stale"]

    def test_two_engines_keep_their_own(
        self, store: Variants, source: Origin, tmp_path: Path
    ) -> None:
        """
        Two environments in turn would build for ever otherwise.
        """
        other = Variants("CTranslate2 of tomorrow", PLENTY_BYTES, store.directory)
        own, theirs = store.build(source, "int8"), other.build(source, "int8")
        assert store.find(source, "int8") == own
        assert other.find(source, "int8") == theirs
        crowded = new_store(store.directory, all_bytes(store))
        another = origin(micro_copy(tmp_path / "another", OTHER))
        with pytest.raises(VariantRefused, match="in use"):
            crowded.build(another, "int8")
        assert names(store.directory) == {own.name, theirs.name}

    def test_a_new_variant_takes_the_place_of_the_stale_one(
        self, store: Variants, source: Origin
    ) -> None:
        """
        What nobody would find does not pile up.
        """
        old, other = store.build(source, "int8"), store.build(source, "float32")
        os.utime(source.header.path, ns=(1, 1))
        new = store.build(origin(source.directory), "int8")
        assert names(store.directory) == {new.name, other.name}
        assert old != new

    def test_a_source_that_changes_while_it_is_read_gets_none(
        self, store: Variants, source: Origin, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Half of one file and half of another are no model.
        """

        def change_meanwhile(*arguments: object) -> None:
            write_converted(*arguments)  # type: ignore[arg-type]
            os.utime(source.header.path, ns=(1, 1))

        changed = "whispercache.engine.variants.store.write_converted"
        monkeypatch.setattr(changed, change_meanwhile)
        with pytest.raises(VariantRefused, match="changed meanwhile"):
            store.build(source, "int8")
        assert names(store.directory) == set()

    def test_a_source_that_is_cut_off_gets_none(
        self, store: Variants, source: Origin
    ) -> None:
        """
        And leaves nothing behind.
        """
        with source.header.path.open("r+b") as file:
            file.truncate(source.header.file_bytes // 2)
        with pytest.raises(CorruptModel):
            store.build(source, "int8")
        assert names(store.directory) == set()

    def test_a_source_without_a_tokenizer_gets_none(
        self, store: Variants, source: Origin
    ) -> None:
        """
        Its tokenizer would come from the hub, for the name of the directory.
        """
        (source.directory / "tokenizer.json").unlink()
        with pytest.raises(VariantRefused, match=r"no tokenizer\.json"):
            store.build(source, "int8")

    def test_a_store_that_cannot_be_written_is_used_all_the_same(
        self, store: Variants, source: Origin, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        It need not know when its variants were last used.
        """
        built = store.build(source, "int8")

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError("read-only")

        monkeypatch.setattr(os, "utime", refuse)
        assert store.find(source, "int8") == built


class TestDamage:
    """
    What is not as it was written is never found, and goes.
    """

    @pytest.mark.parametrize(
        "damage",
        [
            "truncated",
            "flipped",
            "replaced",
            "tokenizer",
            "missing",
            "no manifest",
            "half a manifest",
            "another format",
            "a list",
            "one more file",
            "another's name",
        ],
    )
    def test_damage_is_noticed_and_the_variant_rebuilt(
        self,
        store: Variants,
        source: Origin,
        caplog: pytest.LogCaptureFixture,
        damage: str,
    ) -> None:
        """
        Torn or tampered with, with sizes and times put back or not.
        """
        built = store.build(source, "int8")
        let_time_pass(built)
        injure(built, store, source, damage)
        assert [each.state for each in new_store(store.directory).list()][:1] == [
            "broken"
        ]
        assert store.find(source, "int8") is None
        assert not built.exists()
        (record,) = [each for each in caplog.records if "not as it was" in each.message]
        assert str(built) in record.message
        assert store.build(source, "int8") == built
        assert store.find(source, "int8") == built
        states = {each.directory: each.state for each in store.list()}
        assert states[built] == "ready"

    def test_a_copy_is_not_trusted(
        self, store: Variants, source: Origin, tmp_path: Path
    ) -> None:
        """
        Nothing tells what was written to it. It goes, and is built anew.
        """
        built = store.build(source, "int8")
        copy = new_store(tmp_path / "copy")
        shutil.copytree(store.directory, copy.directory)
        assert [each.state for each in copy.list()] == ["broken"]
        assert copy.find(source, "int8") is None
        assert copy.list() == []
        assert copy.build(source, "int8").name == built.name
        assert store.find(source, "int8") == built

    def test_looking_at_a_variant_reads_none_of_its_weights(
        self, store: Variants, source: Origin, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        A stamp is one system call, however large the model.
        """
        built = store.build(source, "int8")
        opened: list[Path] = []
        plain = Path.open

        def noting(path: Path, *rest: Any, **options: Any) -> Any:
            opened.append(path)
            return plain(path, *rest, **options)

        monkeypatch.setattr(Path, "open", noting)
        assert store.find(source, "int8") == built
        assert [each.name for each in opened if each.parent == built] == [MANIFEST]


def injure(built: Path, store: Variants, source: Origin, damage: str) -> None:
    """
    Damage a variant.
    """
    if damage == "another's name":
        shutil.rmtree(built)
        store.build(source, "float32").rename(built)
    elif "manifest" in damage or damage in ("another format", "a list"):
        injure_manifest(built / MANIFEST, damage)
    elif damage == "tokenizer":
        flip_byte(built / "tokenizer.json")
    elif damage == "missing":
        (built / "tokenizer.json").unlink()
    elif damage == "one more file":
        (built / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    else:
        injure_weights(built / "model.bin", damage)


def injure_manifest(path: Path, damage: str) -> None:
    """
    Damage what says how the files were.
    """
    text = path.read_text(encoding="utf-8")
    if damage == "no manifest":
        path.unlink()
    elif damage == "half a manifest":
        path.write_text(text[: len(text) // 2], encoding="utf-8")
    elif damage == "another format":
        told = {**json.loads(text), "format": 0}
        path.write_text(json.dumps(told), encoding="utf-8")
    else:
        path.write_text("[]", encoding="utf-8")


def injure_weights(path: Path, damage: str) -> None:
    """
    Damage a model.bin.
    """
    status = path.stat()
    if damage == "truncated":
        os.truncate(path, status.st_size // 2)
    elif damage == "flipped":
        flip_byte(path)
    else:  # another file in its place, of the same size and time
        new = path.parent.with_name(".new.bin")
        new.write_bytes(bytes(status.st_size))
        new.replace(path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


class TestRoom:
    """
    Variants keep to their limit, and to what the disk can spare.
    """

    def test_the_least_recently_used_one_leaves(
        self, store: Variants, source: Origin, tmp_path: Path
    ) -> None:
        """
        Not the oldest one: that was used since.
        """
        first = store.build(source, "int8")
        second = store.build(source, "float32")
        age(first, 3 * 3600)
        age(second, 2 * 3600)
        assert store.find(source, "int8") == first
        other = origin(micro_copy(tmp_path / "other", OTHER))
        limited = new_store(store.directory, all_bytes(store))
        third = limited.build(other, "int8")
        assert names(store.directory) == {first.name, third.name}
        assert all_bytes(store) <= limited.limit_bytes

    def test_one_in_use_does_not_leave_for_another(
        self, store: Variants, source: Origin
    ) -> None:
        """
        Two that take turns would be written again and again.
        """
        used = store.build(source, "float32")
        limited = new_store(store.directory, all_bytes(store) + 1000)
        with pytest.raises(VariantRefused, match="in use"):
            limited.build(source, "int8")
        assert names(store.directory) == {used.name}
        age(used, 2 * 3600)
        built = limited.build(source, "int8")
        assert names(store.directory) == {built.name}

    def test_what_nobody_would_find_leaves_first(
        self, store: Variants, source: Origin, tmp_path: Path
    ) -> None:
        """
        However lately it was used: its source has changed since.
        """
        ready = store.build(source, "int8")
        age(ready, 1800)
        changing = micro_copy(tmp_path / "other", OTHER)
        stale = store.build(origin(changing), "int8")
        os.utime(changing / "model.bin", ns=(1, 1))
        limited = new_store(store.directory, all_bytes(store))
        new = limited.build(origin(changing), "int8")
        assert names(store.directory) == {ready.name, new.name}
        assert stale != new

    def test_nothing_leaves_for_a_variant_that_is_refused(
        self, store: Variants, source: Origin, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Not for one that the disk has no room for, whoever leaves.
        """
        old = store.build(source, "int8")
        age(old, 2 * 3600)
        limited = new_store(store.directory, all_bytes(store) * 4)
        monkeypatch.setattr(
            "whispercache.engine.variants.store.KEPT_FREE_BYTES", 1 << 62
        )
        with pytest.raises(VariantRefused, match="its disk has"):
            limited.build(source, "float32")
        assert names(store.directory) == {old.name}

    def test_a_variant_above_the_limit_is_refused(
        self, store: Variants, source: Origin
    ) -> None:
        """
        Nobody leaves for it, either.
        """
        other = store.build(source, "int8")
        age(other, 2 * 3600)
        small_bytes = converted_bytes(source.header, "float32") - 1
        with pytest.raises(VariantRefused, match="all variants may take"):
            new_store(store.directory, small_bytes).build(source, "float32")
        assert names(store.directory) == {other.name}

    def test_small_files_count(self, store: Variants, source: Origin) -> None:
        """
        A limit that holds the weights alone is too low.
        """
        weights_bytes = converted_bytes(source.header, "int8")
        with pytest.raises(VariantRefused, match="all variants may take"):
            new_store(store.directory, weights_bytes + 1000).build(source, "int8")

    def test_the_disk_keeps_some_free_bytes(
        self, store: Variants, source: Origin, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        A disk that is nearly full is not filled by what only saves time.
        """
        kept_bytes = 64 << 20
        free_bytes = converted_bytes(source.header, "int8") + kept_bytes
        usage = shutil.disk_usage("/")._replace(free=free_bytes)
        monkeypatch.setattr(
            "whispercache.engine.variants.store.shutil.disk_usage", lambda _: usage
        )
        monkeypatch.setattr(
            "whispercache.engine.variants.store.KEPT_FREE_BYTES", kept_bytes
        )
        with pytest.raises(VariantRefused, match="its disk has"):
            store.build(source, "int8")  # the small files are too much
        monkeypatch.setattr(
            "whispercache.engine.variants.store.KEPT_FREE_BYTES", kept_bytes // 2
        )
        assert store.find(source, "int8") is None
        assert store.build(source, "int8").is_dir()

    def test_a_variant_can_be_removed(self, store: Variants, source: Origin) -> None:
        """
        It tells what it is, and what is gone is no error.
        """
        built = store.build(source, "int8")
        (variant,) = store.list()
        assert variant == Variant(
            built,
            sum(each.stat().st_size for each in built.iterdir()),
            (built / MANIFEST).stat().st_mtime,
            "ready",
            source.model,
            str(source.directory),
            "int8",
            ENGINE,
        )
        store.remove(variant)
        store.remove(variant)
        assert names(store.directory) == set()
        assert store.list() == []


def age(built: Path, seconds: float) -> None:
    """
    Let a variant have been used last so long ago.
    """
    then_s = (built / MANIFEST).stat().st_mtime - seconds
    os.utime(built / MANIFEST, (then_s, then_s))


def all_bytes(store: Variants) -> int:
    """
    What all variants take.
    """
    return sum(each.n_bytes for each in store.list())


# Processes ---------------------------------------------------------------------------

BUILD = """
import sys
from whispercache.engine.variants import store as variants
from whispercache.engine.variants.convert import Origin
from whispercache.engine.sizes.header import read_header

variants.KEPT_FREE_BYTES = 0
engine, store, source = sys.argv[1:4]
store = variants.Variants(engine, 1 << 30, variants.Path(store))
"""
THEN_BUILD = """
print("ready", flush=True)
print(store.build(Origin("model", read_header(source)), "int8").name)
"""
STOP_HALF_WAY = """
def stop_half_way(header, kind, target):
    target.write(bytes(1000))
    target.flush()
    print("half", flush=True)
    sys.stdin.read()

variants.write_converted = stop_half_way
"""


def start(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """
    A Python that runs *code* meanwhile.
    """
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    """
    The next line that a child prints.
    """
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.process
def test_a_killed_build_leaves_nothing_that_is_found(
    store: Variants, source: Origin
) -> None:
    """
    What it had written is swept away by the next build.
    """
    arguments = (ENGINE, store.directory, source.directory)
    with start(BUILD + STOP_HALF_WAY + THEN_BUILD, *arguments) as process:
        assert [line_of(process), line_of(process)] == ["ready", "half"]
        os.kill(process.pid, signal.SIGKILL)
    (left,) = names(store.directory)
    assert left.startswith(".new-")
    assert store.list() == []
    assert store.find(source, "int8") is None
    built = store.build(source, "int8")
    assert names(store.directory) == {built.name}


@pytest.mark.process
def test_two_processes_build_one_variant(store: Variants, source: Origin) -> None:
    """
    The second one finds what the first has built, and both succeed.
    """
    store.directory.mkdir()
    arguments = (ENGINE, store.directory, source.directory)
    with FileLock(store.directory / ".lock"):
        builders = [start(BUILD + THEN_BUILD, *arguments) for _ in "12"]
        assert [line_of(each) for each in builders] == ["ready", "ready"]
    ends = [each.communicate(timeout=250)[0].strip() for each in builders]
    assert [each.returncode for each in builders] == [0, 0]
    assert {*ends} == names(store.directory)
    assert store.find(source, "int8") == store.directory / ends[0]


class Call(NamedTuple):
    """
    One process that a builder would have started.
    """

    command: list[str]
    task: dict[str, object]
    options: dict[str, Any]


class Processes:
    """
    Stands for the processes of a builder, which end when they are let go.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.go = threading.Event()
        self.go.set()
        self.returncode = 0

    def run(
        self, command: list[str], **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """
        Like `subprocess.run`.
        """
        self.calls.append(Call(command, json.loads(command[4]), options))
        assert self.go.wait(60)
        errors = "Traceback\nsome error\n" if self.returncode else ""
        return subprocess.CompletedProcess(command, self.returncode, "", errors)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    """
    No process is started.
    """
    made = Processes()
    monkeypatch.setattr("whispercache.engine.variants.build.subprocess.run", made.run)
    yield made
    made.go.set()


class TestBuilder:
    """
    Builds happen elsewhere, once.
    """

    def test_it_does_not_wait(
        self, store: Variants, source: Origin, processes: Processes
    ) -> None:
        """
        It returns while the build cannot go on.
        """
        processes.go.clear()
        builder = Builder(store)
        builder.build_soon(source, "int8")
        builder.build_soon(source, "float32")
        builder.build_soon(source, "int8")
        wait_until(lambda: processes.calls, "a build")
        assert builder._is_building
        processes.go.set()
        wait_until(lambda: not builder._is_building, "the end of all builds")
        assert [each.task["kind"] for each in processes.calls] == ["int8", "float32"]
        assert {each.command[0] for each in processes.calls} == {sys.executable}

    @pytest.mark.parametrize(
        ("returncode", "level"), [(1, logging.WARNING), (3, logging.INFO)]
    )
    def test_what_failed_is_not_tried_again(
        self,
        store: Variants,
        source: Origin,
        processes: Processes,
        caplog: pytest.LogCaptureFixture,
        *,
        returncode: int,
        level: int,
    ) -> None:
        """
        One line says why; what was refused for want of room is no warning.
        """
        caplog.set_level(logging.INFO, "whispercache")
        processes.returncode = returncode
        builder = Builder(store)
        for _ in "123":
            builder.build_soon(source, "int8")
            wait_until(lambda: not builder._is_building, "the end of a build")
        assert len(processes.calls) == 1
        (record,) = caplog.records
        assert record.levelno == level
        assert record.message == "no int8 variant of model: some error"

    def test_what_was_refused_is_tried_again_later(
        self,
        store: Variants,
        source: Origin,
        processes: Processes,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """
        There may be room by then; a failure is for good.
        """
        monkeypatch.setattr(building, "IN_USE_S", 0.0)
        builder = Builder(store)
        for processes.returncode in (3, 1, 1):
            builder.build_soon(source, "int8")
            wait_until(lambda: not builder._is_building, "the end of a build")
        assert len(processes.calls) == 2

    def test_what_was_built_can_be_built_again(
        self, store: Variants, source: Origin, processes: Processes
    ) -> None:
        """
        It may have left since.
        """
        builder = Builder(store)
        for _ in "12":
            builder.build_soon(source, "int8")
            wait_until(lambda: not builder._is_building, "the end of a build")
        assert len(processes.calls) == 2

    def test_a_source_that_changed_is_tried_after_a_failure(
        self, store: Variants, source: Origin, processes: Processes
    ) -> None:
        """
        It is another one now.
        """
        processes.returncode = 1
        builder = Builder(store)
        for each in (source, source._replace(stamp=(1,))):
            builder.build_soon(each, "int8")
            wait_until(lambda: not builder._is_building, "the end of a build")
        assert len(processes.calls) == 2

    def test_small_models_are_converted_at_each_load(
        self,
        store: Variants,
        source: Origin,
        processes: Processes,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """
        That costs too little to matter.
        """
        size_bytes = source.header.file_bytes
        least = "whispercache.engine.variants.build.MIN_SOURCE_BYTES"
        builder = Builder(store)
        monkeypatch.setattr(least, size_bytes + 1)
        builder.build_soon(source, "int8")
        assert not builder._tried
        monkeypatch.setattr(least, size_bytes)
        builder.build_soon(source, "int8")
        wait_until(lambda: processes.calls, "a build")

    @pytest.mark.parametrize("program", ["/usr/sbin/uwsgi", "/opt/app/app", "", None])
    def test_a_program_that_is_no_python_is_not_started(
        self,
        store: Variants,
        source: Origin,
        processes: Processes,
        monkeypatch: pytest.MonkeyPatch,
        program: str | None,
    ) -> None:
        """
        It would be started once more, with all that it does.
        """
        monkeypatch.setattr(sys, "executable", program)
        builder = Builder(store)
        builder.build_soon(source, "int8")
        assert not builder._is_building
        assert not builder._tried
        assert not processes.calls

    def test_a_frozen_program_is_not_started(
        self,
        store: Variants,
        source: Origin,
        processes: Processes,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """
        Likewise, whatever it is called.
        """
        monkeypatch.setattr(sys, "frozen", True, raising=False)
        builder = Builder(store)
        builder.build_soon(source, "int8")
        assert not builder._is_building
        assert not processes.calls

    def test_a_process_that_cannot_be_started_is_one_warning(
        self,
        store: Variants,
        source: Origin,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """
        Others are built after it.
        """

        def refuse(*_: object, **__: object) -> None:
            raise OSError("no processes left")

        monkeypatch.setattr("whispercache.engine.variants.build.subprocess.run", refuse)
        builder = Builder(store)
        for kind in ("int8", "float32"):
            builder.build_soon(source, kind)
            wait_until(lambda: not builder._is_building, "the end of a build")
        assert [each.levelno for each in caplog.records] == [logging.WARNING] * 2

    def test_a_thread_that_cannot_be_started_is_one_warning(
        self,
        store: Variants,
        source: Origin,
        processes: Processes,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """
        The load that it follows has succeeded, and other builds are tried.
        """

        def refuse(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        builder = Builder(store)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            builder.build_soon(source, "int8")
        assert [each.levelno for each in caplog.records] == [logging.WARNING]
        builder.build_soon(source, "float32")
        wait_until(lambda: processes.calls, "a build")
        assert [each.task["kind"] for each in processes.calls] == ["float32"]

    def test_what_is_odd_in_the_search_path_is_left_out(
        self,
        store: Variants,
        source: Origin,
        processes: Processes,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """
        A path object, which the import system passes over; the current directory. A
        relative one means the same in the process.
        """
        monkeypatch.setattr(sys, "path", ["", Path("odd"), "lib", *sys.path])
        Builder(store).build_soon(source, "int8")
        wait_until(lambda: processes.calls, "a build")
        wanted = [str(Path(each).absolute()) for each in sys.path[2:] if each]
        env = processes.calls[0].options["env"]
        assert env["PYTHONPATH"].split(os.pathsep) == wanted

    def test_a_forked_child_waits_for_nobody(
        self, store: Variants, source: Origin, processes: Processes
    ) -> None:
        """
        Threads of the parent that held the locks are not in it.
        """
        store.build(source, "int8")
        builder = Builder(store)
        builder._lock.acquire()
        builder._is_building = True
        builder.forked()
        assert store.find(source, "int8") is not None
        builder.build_soon(source, "float32")
        wait_until(lambda: processes.calls, "a build")

    @pytest.mark.process
    def test_the_work_is_done_at_the_lowest_priority(
        self, store: Variants, source: Origin
    ) -> None:
        """
        It takes idle time only.
        """
        code = """
import os, sys
from whispercache.engine.variants import build as building

def tell(self, source, kind):
    print(os.getpriority(os.PRIO_PROCESS, 0), kind, source.model)

building.Variants.build = tell
building.run_task(sys.argv[1])
"""
        done = child(code, task_of(store, source))
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["19", "int8", "model"]

    @pytest.mark.process
    def test_a_refusal_is_told_from_a_failure(
        self, store: Variants, source: Origin
    ) -> None:
        """
        By the exit code; each is one line, without a traceback.
        """
        code = (
            "import sys; from whispercache.engine.variants.build import *; "
            "run_task(sys.argv[1])"
        )
        done = child(code, task_of(store, source, limit_bytes=1000))
        assert done.returncode == 3
        assert done.stderr.splitlines() == [done.stderr.strip()]
        (source.directory / "model.bin").unlink()
        done = child(code, task_of(store, source))
        assert done.returncode == 1
        assert done.stderr.splitlines() == [done.stderr.strip()]
        assert "model.bin" in done.stderr


def task_of(store: Variants, source: Origin, limit_bytes: int = PLENTY_BYTES) -> str:
    """
    What a builder tells its process.
    """
    return json.dumps(
        {
            "model": source.model,
            "path": str(source.header.path),
            "kind": "int8",
            "engine": ENGINE,
            "limit_bytes": limit_bytes,
            "directory": str(store.directory),
        }
    )


# With a cache ------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Variants are built in this process, before the load that wants one has ended.
    """
    monkeypatch.setattr(Builder, "build_soon", build_at_once)


def build_at_once(builder: Builder, source: Origin, kind: str) -> None:
    """
    Like `Builder.build_soon`, but in this process and thread.
    """
    builder.variants.build(source, kind)


cache = cache_of()


def variants_there() -> list[Path]:
    """
    The variants of the user that this test is.
    """
    home = Path(os.environ["XDG_CACHE_HOME"], "whispercache", "variants")
    found = home.iterdir() if home.is_dir() else ()
    return sorted(each for each in found if not each.name.startswith("."))


def wait_for_variant() -> Path:
    """
    Block until a process has built one. It takes idle time only, so that may be long.
    """
    pause = threading.Event()
    for _ in range(5000):
        if found := variants_there():
            return found[0]
        pause.wait(0.02)
    raise AssertionError("no variant was built")


def entry_of(cache: ModelCache) -> Entry:
    """
    The books of the one model.
    """
    (entry,) = cache._core.entries.values()
    return entry


def is_of_variant(cache: ModelCache) -> bool:
    """
    Whether the one model in memory was loaded from a variant.
    """
    loaded = entry_of(cache).loaded
    assert loaded is not None
    return loaded.files.original is not None


def said(cache: ModelCache, directory: Path, compute_type: str = "int8") -> str:
    """
    What the model of a directory answers, once all is done that follows its load.
    """
    model = model_of(cache, directory, compute_type=compute_type)
    text = text_of(model.transcribe(SILENCE)[0])
    wait_for_follow_up(cache)
    return text


def wait_for_follow_up(cache: ModelCache) -> None:
    """
    Block until the thread of the CPU has done all that follows a load.
    """
    done = threading.Event()
    cache._core.devices["cpu"].thread.submit(done.set)
    assert done.wait(60)


def held_load(cache: ModelCache, meanwhile: Callable[[], object], source: Path) -> str:
    """
    What a model answers to a request that waits while *meanwhile* is called: the thread
    that will load it is busy.
    """
    busy, go = threading.Event(), threading.Event()

    def work() -> None:
        busy.set()
        assert go.wait(60)

    cache._core.devices["cpu"].thread.submit(work)
    assert busy.wait(60)
    results: list[str | BaseException] = []

    def ask() -> None:
        try:
            results.append(said(cache, source))
        except LoadFailed as error:
            results.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        wait_until(lambda: entry_of(cache).state is State.LOADING, "a load")
        meanwhile()
    finally:
        go.set()
        asking.join(60)
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    return result


class TestCache:
    """
    Callers notice nothing but that loads are faster.
    """

    @pytest.mark.slow
    @pytest.mark.usefixtures("at_once")
    def test_real_models_come_back_from_a_variant(self) -> None:
        """
        With the same words, under the same key, and with less memory reserved for the
        load; nothing is written beside the model.
        """
        source = packaged("base")
        before = {each: each.stat() for each in source.iterdir()}
        loading: list[Event] = []
        with ModelCache() as cache:
            cache.subscribe(loading.append)
            model = model_of(cache, source, compute_type="int8")
            first = text_of(model.transcribe(clip("en-bread"), language="en")[0])
            assert not is_of_variant(cache)
            key = entry_of(cache).key
            wait_for_follow_up(cache)
            (built,) = variants_there()
            cache.evict(source)
            second = text_of(model.transcribe(clip("en-bread"), language="en")[0])
            assert is_of_variant(cache)
            assert entry_of(cache).key == key
            assert key.compute_type == "int8_float32"
            cache._core.check()
            loads = [each for each in loading if isinstance(each, ModelLoading)]
        assert first == second
        assert "bread" in first.lower()
        of_original, of_variant = (each.reserved_bytes for each in loads)
        assert of_variant < of_original
        after = {each: each.stat() for each in source.iterdir()}
        assert [each.st_mtime_ns for each in after.values()] == [
            each.st_mtime_ns for each in before.values()
        ]
        assert after.keys() == before.keys()
        assert variants_there() == [built]

    @pytest.mark.usefixtures("at_once")
    @pytest.mark.parametrize("compute_type", ["int8", "float32", "default"])
    def test_later_loads_use_the_variant(
        self, cache: ModelCache, tmp_path: Path, compute_type: str
    ) -> None:
        """
        Of a model in float16, whatever a CPU computes in.
        """
        source = micro_copy(tmp_path / "model")
        assert said(cache, source, compute_type) == TEXT
        assert not is_of_variant(cache)
        key = entry_of(cache).key
        for _ in "123":
            cache.evict(source)
            assert said(cache, source, compute_type) == TEXT
            assert is_of_variant(cache)
        assert entry_of(cache).key == key
        kind = "int8" if compute_type == "int8" else "float32"
        assert [each.name.rpartition("-")[2] for each in variants_there()] == [kind]

    @pytest.mark.usefixtures("at_once")
    def test_another_process_uses_what_is_there(
        self, cache: ModelCache, tmp_path: Path
    ) -> None:
        """
        Its first load is from the variant.
        """
        source = micro_copy(tmp_path / "model")
        assert said(cache, source) == TEXT
        with ModelCache() as other:
            assert said(other, source) == TEXT
            assert is_of_variant(other)

    @pytest.mark.process
    def test_the_build_goes_on_when_the_program_ends(self, tmp_path: Path) -> None:
        """
        Short programs get their variants, too.
        """
        source = micro_copy(tmp_path / "model")
        code = """
import os, sys, threading
import psutil
from real import model_of
from whispercache import ModelCache
from whispercache.engine.variants import build as building

building.MIN_SOURCE_BYTES = 0
cache = ModelCache()
with cache.lease(sys.argv[1], "cpu", "int8"):
    while not psutil.Process().children():
        threading.Event().wait(0.005)
    os._exit(7)
"""
        done = child(code, source)
        assert done.returncode == 7, done.stderr
        built = wait_for_variant()
        (found,) = Variants("any", PLENTY_BYTES, built.parent).list()
        assert (found.kind, found.source) == ("int8", str(source))

    @pytest.mark.parametrize(
        "how", ["argument", "variable=off", "variable=False", "variable=none", "model"]
    )
    def test_nothing_is_built_where_nothing_is_wanted(
        self,
        tmp_path: Path,
        processes: Processes,
        monkeypatch: pytest.MonkeyPatch,
        how: str,
    ) -> None:
        """
        Turned off in the code or from outside, or for a model that has its type.
        """
        if how.startswith("variable"):
            monkeypatch.setenv("WHISPERCACHE_VARIANTS", how.partition("=")[2])
        quantization = "int8" if how == "model" else None
        source = micro_copy(tmp_path / "model", quantization=quantization)
        with ModelCache(variants=how != "argument") as cache:
            assert said(cache, source) == TEXT
            cache.evict(source)
            assert said(cache, source) == TEXT
            assert not is_of_variant(cache)
        assert not processes.calls
        assert variants_there() == []

    @pytest.mark.usefixtures("at_once")
    def test_turned_off_what_is_there_is_not_used(
        self, cache: ModelCache, tmp_path: Path
    ) -> None:
        """
        The original is loaded.
        """
        source = micro_copy(tmp_path / "model")
        assert said(cache, source) == TEXT
        assert len(variants_there()) == 1
        with ModelCache(variants=False) as other:
            assert said(other, source) == TEXT
            assert not is_of_variant(other)

    @pytest.mark.usefixtures("at_once")
    @pytest.mark.parametrize("damage", ["flipped", "truncated", "half a manifest"])
    def test_a_damaged_variant_is_never_loaded(
        self, cache: ModelCache, tmp_path: Path, damage: str
    ) -> None:
        """
        The original is, and a new variant comes for the load after that.
        """
        source = micro_copy(tmp_path / "model")
        assert said(cache, source) == TEXT
        (built,) = variants_there()
        let_time_pass(built)
        injure(built, Variants("any", 0, built.parent), origin(source), damage)
        cache.evict(source)
        assert said(cache, source) == TEXT
        assert not is_of_variant(cache)
        assert variants_there() == [built]
        cache.evict(source)
        assert said(cache, source) == TEXT
        assert is_of_variant(cache)

    @pytest.mark.usefixtures("at_once")
    @pytest.mark.parametrize("change", ["removed", "flipped"])
    def test_a_variant_that_goes_while_a_request_waits_is_not_missed(
        self, cache: ModelCache, tmp_path: Path, change: str
    ) -> None:
        """
        The request is admitted anew, for the original.
        """
        source = micro_copy(tmp_path / "model")
        assert said(cache, source) == TEXT
        cache.evict(source)
        (built,) = variants_there()
        let_time_pass(built)

        def change_it() -> None:
            files = entry_of(cache).files
            assert files is not None
            assert files.original is not None
            if change == "removed":
                shutil.rmtree(built)
            else:
                flip_byte(built / "model.bin")

        assert held_load(cache, change_it, source) == TEXT
        assert not is_of_variant(cache)

    @pytest.mark.usefixtures("at_once")
    def test_a_variant_that_comes_while_a_request_waits_is_used(
        self, cache: ModelCache, tmp_path: Path
    ) -> None:
        """
        It is the faster way.
        """
        source = micro_copy(tmp_path / "model")
        assert said(cache, source) == TEXT
        cache.evict(source)
        (built,) = variants_there()
        aside = built.rename(tmp_path / "aside")
        assert held_load(cache, lambda: aside.rename(built), source) == TEXT
        assert is_of_variant(cache)

    @pytest.mark.usefixtures("at_once")
    def test_a_variant_that_goes_at_the_last_moment_is_not_missed(
        self, cache: ModelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        After the last look at it, too, the original can be loaded.
        """
        source = micro_copy(tmp_path / "model")
        assert said(cache, source) == TEXT
        cache.evict(source)
        loader = type(cache._core.loader)
        load = loader.load

        def load_too_late(*arguments: object) -> object:
            for each in variants_there():
                shutil.rmtree(each)
            return load(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(loader, "load", load_too_late)
        assert said(cache, source) == TEXT
        assert not is_of_variant(cache)

    def test_a_variant_that_cannot_be_loaded_is_tried_once(
        self,
        tmp_path: Path,
        processes: Processes,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """
        Its content is as it was written, and yet: the original serves, this time and
        from now on, and no other variant is built.
        """
        source = micro_copy(tmp_path / "model")
        with monkeypatch.context() as patch, ModelCache() as cache:
            patch.setattr(Builder, "build_soon", build_at_once)
            assert said(cache, source) == TEXT
        tried: list[str] = []
        build = construct.build

        def build_originals(
            key: ModelKey, files: ModelFiles, kept: KeptModels
        ) -> object:
            if files.original is not None:
                tried.append(files.directory)
                raise RuntimeError("the disk is failing")
            return build(key, files, kept)

        monkeypatch.setattr(construct, "build", build_originals)
        with ModelCache() as cache:
            for _ in "123":
                assert said(cache, source) == TEXT
                assert not is_of_variant(cache)
                cache.evict(source)
            wait_until_idle(builder_of(cache))
            cache._core.check()
            assert cache.stats().load_failures == 0
        assert tried == list(map(str, variants_there()))
        assert not processes.calls
        told = [each for each in caplog.records if "cannot be loaded" in each.message]
        assert len(told) == 1

    @pytest.mark.usefixtures("at_once")
    def test_a_source_that_changes_while_a_request_waits_fails_it(
        self, cache: ModelCache, tmp_path: Path
    ) -> None:
        """
        As without variants: what was promised is not there any more. The next request
        gets the new model.
        """
        source = micro_copy(tmp_path / "model")
        assert said(cache, source) == TEXT
        cache.evict(source)

        def change() -> None:
            micro_copy(source, OTHER)

        with pytest.raises(LoadFailed, match="changed while the request waited"):
            held_load(cache, change, source)
        assert said(cache, source) == f" {OTHER}"
        assert not is_of_variant(cache)
        cache.evict(source)
        assert said(cache, source) == f" {OTHER}"
        assert is_of_variant(cache)

    @pytest.mark.usefixtures("at_once")
    def test_a_changed_model_is_what_it_is_now(
        self, cache: ModelCache, tmp_path: Path
    ) -> None:
        """
        The variant of the old one is not used, and leaves.
        """
        source = micro_copy(tmp_path / "model")
        assert said(cache, source) == TEXT
        (old,) = variants_there()
        cache.evict(source)
        micro_copy(source, OTHER)
        assert said(cache, source) == f" {OTHER}"
        (new,) = variants_there()
        assert old != new

    @pytest.mark.process
    def test_a_cache_directory_that_cannot_be_made_costs_one_line(
        self, cache: ModelCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """
        Callers get their models.
        """
        (tmp_path / "xdg").write_text("not a directory", encoding="utf-8")
        source = micro_copy(tmp_path / "model")
        for _ in "123":
            assert said(cache, source) == TEXT
            wait_until_idle(builder_of(cache))
            cache.evict(source)
        told = [each for each in caplog.records if "no int8 variant" in each.message]
        assert [each.levelno for each in told] == [logging.WARNING]

    @pytest.mark.process
    def test_a_build_is_no_child_that_anybody_must_await(
        self, cache: ModelCache, tmp_path: Path
    ) -> None:
        """
        Its end is taken note of; nothing is left of it.
        """
        source = micro_copy(tmp_path / "model")
        assert said(cache, source) == TEXT
        wait_until_idle(builder_of(cache))
        built = [
            each
            for each in psutil.Process().children()
            if any(
                "whispercache.engine.variants.build" in part for part in each.cmdline()
            )
        ]
        assert built == []
        assert len(variants_there()) == 1


def builder_of(cache: ModelCache) -> Builder:
    """
    Who has variants built for a cache.
    """
    loader = cache._core.loader
    assert isinstance(loader, FasterWhisperLoader)
    builder = loader._store._builder
    assert builder is not None
    return builder


def wait_until_idle(builder: Builder) -> None:
    """
    Block until all builds have ended; their processes take idle time only.
    """
    pause = threading.Event()
    for _ in range(5000):
        if not builder._is_building:
            return
        pause.wait(0.02)
    raise AssertionError("a build did not end")


class TestParameter:
    """
    What ``variants=`` may be.
    """

    @pytest.mark.parametrize(
        ("value", "n_bytes"),
        [
            (True, DEFAULT_VARIANTS_BYTES),
            ("5GiB", 5 * 1024**3),
            (300_000_000, 300_000_000),
            (False, None),
        ],
    )
    def test_it_is_a_limit_or_whether_there_is_one(
        self, value: float | str, n_bytes: int | None
    ) -> None:
        """
        In bytes.
        """
        with ModelCache(variants=value) as cache:
            loader = cache._core.loader
            assert isinstance(loader, FasterWhisperLoader)
            assert loader.variants_bytes == n_bytes

    @pytest.mark.parametrize("value", ["50%", 0.5, "much", 0, -1])
    def test_nonsense_is_refused(self, value: float | str) -> None:
        """
        A share of which disk, for example?
        """
        with pytest.raises(ValueError, match="variants"):
            ModelCache(variants=value)
