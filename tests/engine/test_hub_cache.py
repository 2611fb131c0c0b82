"""
The model hub's cache on this disk, complete or not, with a fake hub.
"""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
from forbidden import forbid
from real import clip, micro

from whispercache import (
    LoadFailed,
    ModelCache,
    NotDownloaded,
    UnknownModel,
    WhisperCacheError,
)
from whispercache.cli.main import main
from whispercache.console import WRONG_USE
from whispercache.devices.probe import SystemProbe
from whispercache.engine.files import downloaded, is_whole, local_files
from whispercache.engine.loader import FasterWhisperLoader
from whispercache.engine.naming import canonical_model, short_name

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MODEL = "someone/mine"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ALL = ("config.json", "model.bin", "tokenizer.json", "vocabulary.json")


class Hub:
    """
    A hub that is played, and its cache.

    Attributes:
        cache: Where the cache is.
        listed: The files of its repository.
        asked: How often it was asked for a download.
        is_away: It cannot be reached.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.listed: list[str] = list(ALL)
        self.asked = 0
        self.is_away = False
        self.answers_when_away = False

    def folder(self, model: str = MODEL) -> Path:
        """
        A repository's folder.
        """
        return self.cache / f"models--{model.replace('/', '--')}"

    def store(
        self,
        model: str = MODEL,
        *,
        names: Iterable[str] = ALL,
        dangling: Iterable[str] = (),
        commit: str = COMMIT,
        ref: str = "main",
    ) -> Path:
        """
        Put files into the cache, as links to blobs, some of which lead nowhere.
        """
        folder = self.folder(model)
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
        for name in names:
            (snapshot / name).unlink(missing_ok=True)
            (snapshot / name).symlink_to(micro() / name)
        for name in dangling:
            (snapshot / name).unlink(missing_ok=True)
            (snapshot / name).symlink_to(folder / "blobs" / "gone")
        return snapshot

    def snapshot_download(self, repository: str, **_: Any) -> str:
        """
        Download, or fail as huggingface-hub does.
        """
        self.asked += 1
        if self.is_away and not self.answers_when_away:
            raise huggingface_hub.errors.LocalEntryNotFoundError("no route to it\nmore")
        if self.is_away:
            return str(self.folder(repository) / "snapshots" / COMMIT)
        return str(self.store(repository, names=self.listed))

    def model_info(self, *_: Any, **__: Any) -> Any:
        """
        Tell what a repository has.
        """
        if self.is_away:
            raise OSError("no route to it")
        siblings = [SimpleNamespace(rfilename=name) for name in self.listed]
        return SimpleNamespace(siblings=siblings)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """
    A hub, and an empty cache.
    """
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(made.cache))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", made.model_info)
    return made


def located(*, download: bool = True, **options: Any) -> str | None:
    """
    The directory that a load would take.
    """
    loader = FasterWhisperLoader(SystemProbe())
    files = loader.locate(MODEL, options, download=download)
    return None if files is None else files.directory


def test_what_is_whole_asks_the_hub_for_nothing(hub: Hub) -> None:
    """
    Nor does it need preprocessor_config.json, which many repositories have not.
    """
    snapshot = hub.store()
    assert is_whole(MODEL, {})
    assert located() == str(snapshot)
    assert hub.asked == 0


@pytest.mark.parametrize("name", [*ALL, "preprocessor_config.json", "vocabulary.txt"])
def test_a_link_that_leads_nowhere_is_fetched_again(hub: Hub, name: str) -> None:
    """
    Somebody has cleaned the cache, or copied half of it.
    """
    snapshot = hub.store(dangling=[name])
    hub.listed = list(ALL)
    assert not is_whole(MODEL, {})
    assert located() == str(snapshot)
    assert hub.asked == 1


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", "pytorch_model.bin"])
def test_a_link_that_nobody_needs_may_lead_nowhere(hub: Hub, name: str) -> None:
    """
    Only what a load would read counts.
    """
    hub.store(dangling=[name])
    assert is_whole(MODEL, {})


@pytest.mark.parametrize("name", ["config.json", "model.bin", "vocabulary.json"])
@pytest.mark.parametrize("is_dangling", [True, False])
def test_a_download_that_is_not_whole_says_so_without_network(
    hub: Hub, name: str, *, is_dangling: bool
) -> None:
    """
    And not that the repository has no model; it names what is missing.
    """
    names = [each for each in ALL if each != name]
    hub.store(names=names, dangling=[name] if is_dangling else ())
    hub.is_away = True
    with pytest.raises(LoadFailed) as caught:
        located()
    told = str(caught.value)
    assert "its download is not whole: vocabulary" in told or f"whole: {name}" in told
    assert "no route to it" in told
    assert "check the network" in told
    assert len(told.splitlines()) == 1


def test_versions_that_answer_without_network_are_asked_again(hub: Hub) -> None:
    """
    Older ones give the folder that is there, as it is.
    """
    hub.store(names=["config.json"])
    hub.is_away = hub.answers_when_away = True
    with pytest.raises(LoadFailed, match=r"not whole: .*model\.bin"):
        located()


def test_a_download_that_had_hardly_begun_is_told_from_none(hub: Hub) -> None:
    """
    There is no snapshot yet, only what has come of a file.
    """
    hub.is_away = True
    with pytest.raises(LoadFailed, match="it is not on this disk, and the download"):
        located()
    blobs = hub.folder() / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "0123.incomplete").write_bytes(b"half")
    with pytest.raises(LoadFailed, match="its download was interrupted, and the"):
        located()


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("is_dangling", [True, False])
def test_what_a_load_can_do_without_is_no_reason_to_fail(
    hub: Hub, name: str, *, is_dangling: bool
) -> None:
    """
    Without network it is tried with what is here.
    """
    names = [each for each in ALL if each != name]
    snapshot = hub.store(names=names, dangling=[name] if is_dangling else ())
    hub.is_away = True
    assert located() == str(snapshot)


def test_one_vocabulary_is_enough(hub: Hub) -> None:
    """
    CTranslate2 passes over the one that it cannot open.
    """
    snapshot = hub.store(dangling=["vocabulary.txt"])
    hub.is_away = True
    assert located() == str(snapshot)


def test_local_files_only_takes_what_will_do(hub: Hub) -> None:
    """
    Else it says what is missing, and asks nobody.
    """
    snapshot = hub.store(names=[*ALL[:2], "vocabulary.json"])
    assert located(local_files_only=True) == str(snapshot)
    (snapshot / "model.bin").unlink()
    with pytest.raises(LoadFailed, match=r"model\.bin.* and local_files_only is set"):
        located(local_files_only=True)
    assert hub.asked == 0


def test_what_is_not_whole_is_not_here_yet(hub: Hub) -> None:
    """
    Where nothing may be downloaded to find out.
    """
    hub.store(dangling=["model.bin"])
    assert located(download=False) is None
    assert local_files(MODEL, {}) is None


def test_a_repository_without_model_bin_says_how_to_get_one(hub: Hub) -> None:
    """
    Where the hub has been asked, it is certain.
    """
    hub.listed = ["config.json", "tokenizer.json"]
    with pytest.raises(UnknownModel, match=r"no model\.bin for CTranslate2.*convert"):
        located()


def test_a_repository_without_vocabulary_is_no_model(hub: Hub) -> None:
    """
    The error says what it lacks.
    """
    hub.listed = ["config.json", "model.bin"]
    with pytest.raises(UnknownModel, match=r"has no .*vocabulary"):
        located()


def test_a_listed_file_that_did_not_come_is_no_reason_to_give_up(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Another try may bring it.
    """
    hub.store(names=["config.json"])
    told = hub.model_info()
    hub.is_away = hub.answers_when_away = True
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: told)
    with pytest.raises(LoadFailed, match=r"not whole: .*; try again"):
        located()


def test_branches_and_commits_have_their_own_snapshots(hub: Hub) -> None:
    """
    Each is found by its name, the commit by itself.
    """
    other = "f" * 40
    main, second = hub.store(), hub.store(commit=other, ref="second")
    for revision, snapshot in (("main", main), ("second", second), (other, second)):
        assert located(revision=revision) == str(snapshot)
    assert located(revision="third", download=False) is None


def test_a_download_root_is_a_cache_of_its_own(hub: Hub) -> None:
    """
    With ~ for the home directory, too.
    """
    shutil.move(hub.store().parents[2], hub.cache.parent / "mine")
    assert located(download=False) is None
    root = hub.cache.parent / "mine"
    found = located(download=False, download_root=str(root))
    assert found is not None
    assert found.startswith(str(root))


def test_a_cache_that_cannot_be_read_is_an_error_of_this_package(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    It says so, and fetches nothing.
    """
    hub.store()
    forbid(hub.folder(), monkeypatch)
    for download in (True, False):
        with pytest.raises(WhisperCacheError, match="Permission denied"):
            located(download=download)
    with pytest.raises(WhisperCacheError, match="Permission denied"):
        downloaded(MODEL, {})
    assert hub.asked == 0


class TestFolders:
    """
    A repository's folder in the cache, given as a path.
    """

    def test_it_is_the_snapshot_of_its_main_branch(self, hub: Hub) -> None:
        """
        However it is spelled.
        """
        snapshot = hub.store()
        hub.store(commit="f" * 40, ref="second")
        assert canonical_model(hub.folder()) == os.path.realpath(snapshot)
        assert canonical_model(f"{hub.folder()}/") == os.path.realpath(snapshot)
        assert canonical_model(snapshot) == os.path.realpath(snapshot)

    def test_a_single_snapshot_needs_no_branch(self, hub: Hub) -> None:
        """
        As where a commit was downloaded, or the folder of all snapshots is given.
        """
        snapshot = hub.store()
        assert canonical_model(snapshot.parent) == os.path.realpath(snapshot)
        shutil.rmtree(hub.folder() / "refs")
        assert canonical_model(hub.folder()) == os.path.realpath(snapshot)

    def test_of_several_one_must_be_named(self, hub: Hub) -> None:
        """
        The error names them all.
        """
        one, two = hub.store(ref="one"), hub.store(commit="f" * 40, ref="two")
        for path in (hub.folder(), one.parent):
            with pytest.raises(UnknownModel, match="give one of") as caught:
                canonical_model(path)
            assert str(one) in str(caught.value)
            assert str(two) in str(caught.value)

    def test_one_without_a_model_says_that_it_is_not_whole(self, hub: Hub) -> None:
        """
        A link that leads nowhere is no model.
        """
        snapshot = hub.store(dangling=["model.bin"])
        for path in (hub.folder(), snapshot):
            with pytest.raises(UnknownModel, match="its download is not whole"):
                canonical_model(path)

    def test_a_link_elsewhere_says_where_it_leads(self, tmp_path: Path) -> None:
        """
        It is not a matter of a conversion.
        """
        (tmp_path / "model.bin").symlink_to("/mnt/models/gone.bin")
        with pytest.raises(UnknownModel, match=r"a link to /mnt/models/gone\.bin, "):
            canonical_model(tmp_path)

    def test_its_name_is_that_of_the_repository(self, hub: Hub) -> None:
        """
        Not that of a commit.
        """
        snapshot = hub.store("Systran/faster-whisper-base")
        for path in (snapshot, hub.folder("Systran/faster-whisper-base")):
            assert short_name(str(path)) == "faster-whisper-base"

    def test_a_model_that_is_asked_for_is_not_downloaded(self, hub: Hub) -> None:
        """
        It is a path.
        """
        hub.is_away = True
        loader = FasterWhisperLoader(SystemProbe())
        snapshot = hub.store()
        files = loader.locate(canonical_model(hub.folder()), {}, download=True)
        assert files is not None
        assert files.directory == os.path.realpath(snapshot)
        assert hub.asked == 0


def test_what_is_not_here_is_told_when_it_may_not_be_fetched(hub: Hub) -> None:
    """
    As by `explain`, which downloads nothing.
    """
    hub.store(dangling=["model.bin"])
    with (
        ModelCache() as cache,
        pytest.raises(NotDownloaded, match="not all on this disk"),
    ):
        cache.explain(MODEL, "cpu")
    assert hub.asked == 0


@pytest.mark.parametrize("dangling", [None, ["model.bin"]])
def test_the_command_downloads_a_repository(
    hub: Hub, dangling: list[str] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Of any size, whether nothing of it is there yet or a part was lost since.
    """
    if dangling is not None:
        hub.store(dangling=dangling)
    code = main(["transcribe", clip("en-bread"), "--model", MODEL, "--ram", "2GiB"])
    told = capsys.readouterr()
    assert (code, told.err) == (0, "")
    assert told.out
    assert hub.asked == 1


def test_the_command_says_that_a_download_failed(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Not that something should be loaded first, which a command cannot do.
    """
    hub.is_away = True
    assert main(["transcribe", clip("en-bread"), "--model", MODEL]) == WRONG_USE
    assert "the download failed" in capsys.readouterr().err
