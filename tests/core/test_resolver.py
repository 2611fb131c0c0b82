"""
Names of models: what is in memory answers to each, whatever became of its files.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from faster_whisper.utils import _MODELS
from forbidden import forbid
from starlette.testclient import TestClient

from whispercache import UnknownModel, WhisperCacheError
from whispercache.engine.naming import ModelSpec, anchored, canonical_model, parse_spec
from whispercache.keys import ALIASES, MODELS, OTHER_NAMES
from whispercache.server import ServerOptions, create_app
from whispercache.server.offers import Offers

if TYPE_CHECKING:
    from conftest import MakeCache
    from driver import Driver

    from whispercache import ModelCache


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """
    A directory of a model, "models/mine" from where the test is.
    """
    directory = tmp_path / "models" / "mine"
    directory.mkdir(parents=True)
    (directory / "model.bin").touch()
    monkeypatch.chdir(tmp_path)
    return directory


def names_in_memory(cache: ModelCache) -> list[str]:
    """
    What is in memory.
    """
    return [info.key.model for info in cache.models()]


class TestGone:
    """
    A model in memory whose name does not resolve any more.
    """

    @pytest.mark.parametrize("how", ["removed", "renamed", "emptied"])
    @pytest.mark.parametrize("method", ["evict", "unpin"])
    def test_it_can_be_told_to_leave(
        self, make_cache: MakeCache, driver: Driver, mine: Path, how: str, method: str
    ) -> None:
        """
        By the path that it was asked for by.
        """
        cache = make_cache()
        driver.call(cache, "pin", str(mine), "cpu")
        if how == "emptied":
            (mine / "model.bin").unlink()
        elif how == "renamed":
            mine.rename(mine.with_name("other"))
        else:
            shutil.rmtree(mine)
        assert driver.call(cache, method, str(mine), "cpu") == 1
        left = [] if method == "evict" else [str(mine)]
        assert names_in_memory(cache) == left

    @pytest.mark.parametrize(
        "spelling",
        ["models/mine", "./models/mine", "~/models/mine", "models/../models/mine"],
    )
    def test_any_spelling_will_do(
        self,
        make_cache: MakeCache,
        mine: Path,
        monkeypatch: pytest.MonkeyPatch,
        spelling: str,
    ) -> None:
        """
        Relative to here or to the home directory; as text or as a path.
        """
        monkeypatch.setenv("HOME", str(mine.parents[1]))
        cache = make_cache()
        for given in (spelling, Path(spelling)):
            cache.preload(spelling, "cpu")
            shutil.rmtree(mine)
            assert cache.evict(given) == 1
            mine.mkdir()
            (mine / "model.bin").touch()

    def test_one_that_cannot_be_read_can_leave_too(
        self, make_cache: MakeCache, mine: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Somebody has taken the permissions away.
        """
        cache = make_cache()
        cache.pin(mine, "cpu")
        forbid(mine, monkeypatch)
        assert cache.unpin(mine) == 1
        assert cache.evict(mine) == 1

    def test_a_link_that_leads_elsewhere_means_both(
        self, make_cache: MakeCache, mine: Path
    ) -> None:
        """
        What it meant when it was asked for is what is in memory.
        """
        new = mine.with_name("new")
        shutil.copytree(mine, new)
        link = mine.with_name("current")
        link.symlink_to(mine)
        cache = make_cache()
        cache.preload(link, "cpu")
        link.unlink()
        link.symlink_to(new)
        assert names_in_memory(cache) == [str(mine)]
        assert cache.evict(link) == 1
        cache.preload(link, "cpu")
        assert names_in_memory(cache) == [str(new)]
        link.unlink()
        assert cache.evict(str(link)) == 1

    def test_what_never_was_is_unknown(self, make_cache: MakeCache, mine: Path) -> None:
        """
        Nothing is evicted for it.
        """
        cache = make_cache()
        cache.preload(mine, "cpu")
        for method in (cache.evict, cache.unpin):
            for name in ("bsae", "/no/such/directory", str(mine.parent)):
                with pytest.raises(UnknownModel):
                    method(name)
        assert cache.evict("base") == 0
        assert names_in_memory(cache) == [str(mine)]

    def test_one_that_has_left_can_be_named_again(
        self, make_cache: MakeCache, mine: Path
    ) -> None:
        """
        It is known still, and there is nothing to do.
        """
        cache = make_cache()
        cache.preload(mine, "cpu")
        shutil.rmtree(mine)
        assert (cache.evict(mine), cache.evict(mine), cache.unpin(mine)) == (1, 0, 0)


class TestRelative:
    """
    A path that depends on where one is.
    """

    def test_a_model_is_the_one_that_was_asked_for(
        self, make_cache: MakeCache, mine: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Also after os.chdir(), to where another one of that name is.
        """
        elsewhere = mine.parent / "elsewhere"
        shutil.copytree(mine.parent, elsewhere / "models")
        cache = make_cache()
        model = cache.get_model("models/mine", "cpu")
        monkeypatch.chdir(elsewhere)
        model.lease().release()
        assert names_in_memory(cache) == [str(mine)]
        assert model.key.model == str(mine)

    def test_it_is_found_without_a_look_at_the_disk(
        self, make_cache: MakeCache, mine: Path
    ) -> None:
        """
        From the second time on, as any other.
        """
        cache = make_cache()
        model = cache.get_model("models/mine", "cpu")
        model.lease().release()
        shutil.rmtree(mine)
        model.lease().release()
        assert cache.stats().hits == 1

    def test_what_is_no_directory_stays_as_it_is(self, mine: Path) -> None:
        """
        A size, a repository, and a directory that only has the name of a size.
        """
        Path("base").mkdir()
        for name in ("base", "tiny", "someone/mine", "large", "openai/whisper-base"):
            assert anchored(name) == name
        assert anchored("models/mine") == str(mine)
        assert anchored(Path("models/mine")) == str(mine)
        assert anchored("./not there yet") == str(mine.parents[1] / "not there yet")
        shutil.copy(mine / "model.bin", "base")
        assert anchored("base") == str(Path("base").resolve())


class TestOtherNames:
    """
    What known models are called elsewhere.
    """

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("whisper-large-v3", "large-v3"),
            ("whisper-small", "small"),
            ("whisper-tiny.en", "tiny.en"),
            ("whisper-large", "large-v3"),
            ("whisper-turbo", "large-v3-turbo"),
            ("whisper-large-v3-turbo", "large-v3-turbo"),
            ("Whisper-Large-V3", "large-v3"),
            ("faster-whisper-large-v3", "large-v3"),
            ("faster-whisper-large-v3-turbo", "large-v3-turbo"),
            ("faster-distil-whisper-large-v3", "distil-large-v3"),
            ("distil-whisper-large-v3", "distil-large-v3"),
            ("openai/whisper-large-v3", "large-v3"),
            ("openai/whisper-large-v3-turbo", "large-v3-turbo"),
            ("openai/whisper-base.en", "base.en"),
            ("openai/whisper-large", "large-v1"),
            ("distil-whisper/distil-large-v3", "distil-large-v3"),
            ("distil-whisper/distil-large-v3.5-ct2", "distil-large-v3.5"),
            ("distil-whisper/distil-small.en", "distil-small.en"),
        ],
    )
    def test_a_model_is_known_by_them(self, name: str, meant: str) -> None:
        """
        Those of its publishers mean the conversion that CTranslate2 can read.
        """
        assert canonical_model(name) == meant

    def test_none_stands_for_two_models(self) -> None:
        """
        Nor takes the place of a name that faster-whisper knows.
        """
        assert not OTHER_NAMES.keys() & {*_MODELS, *MODELS, *ALIASES}
        assert set(OTHER_NAMES.values()) == set(MODELS)
        lower = {name.lower() for name in OTHER_NAMES}
        assert len(lower) == len(OTHER_NAMES)

    @pytest.mark.parametrize(
        "name", ["whisper-1", "whisper", "whisper-", "whisper-huge", "my-whisper-base"]
    )
    def test_what_only_looks_alike_is_unknown(self, name: str) -> None:
        """
        No part of a name is guessed.
        """
        with pytest.raises(UnknownModel):
            canonical_model(name)

    def test_other_repositories_are_themselves(self) -> None:
        """
        A fine-tune may be called like the original.
        """
        for name in ("someone/whisper-large-v3", "someone/faster-whisper-base"):
            assert canonical_model(name) == name

    def test_a_directory_of_that_name_wins(self, mine: Path) -> None:
        """
        As over a size, provided that there is a model in it.
        """
        Path("whisper-base").mkdir()
        assert canonical_model("whisper-base") == "base"
        shutil.copy(mine / "model.bin", "whisper-base")
        assert canonical_model("whisper-base") == os.path.realpath("whisper-base")

    def test_a_server_knows_the_same(self) -> None:
        """
        However the model is named on its command line.
        """
        for served in ("large-v3", "whisper-large-v3", "openai/whisper-large-v3"):
            offers = Offers([parse_spec(served)], "cpu")
            for name in ("large", "large-v3", "whisper-large-v3", "whisper-large"):
                offer = offers.find(name)
                assert offer is not None, (served, name)
                assert offer.name == served
            assert offers.find("large-v2") is None


@pytest.mark.parametrize(
    "named", ["base", "whisper-base", "Systran/faster-whisper-base"]
)
@pytest.mark.parametrize("loaded", ["base", "openai/whisper-base"])
def test_names_of_one_model_evict_it(
    make_cache: MakeCache, driver: Driver, named: str, loaded: str
) -> None:
    """
    Whichever it was loaded by.
    """
    cache = make_cache()
    driver.call(cache, "preload", loaded, "cpu")
    assert driver.call(cache, "evict", named) == 1


def test_a_directory_that_cannot_be_read_is_no_missing_one(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    It says so; a size is none the less a size.
    """
    (mine / "base").mkdir()
    forbid(mine, monkeypatch)
    for path in (mine, mine / "base", "models/mine/base"):
        with pytest.raises(WhisperCacheError):
            canonical_model(path)
    with pytest.raises(WhisperCacheError, match="Permission denied"):
        canonical_model(mine)
    monkeypatch.setenv("HOME", str(mine))
    assert canonical_model("base") == "base"


@pytest.mark.process
@pytest.mark.parametrize(
    "text",
    [
        "mine=models/mine",
        "mine=./models/mine",
        "mine=~/models/mine",
        "models/mine",
        "mine={here}/models/mine",
    ],
)
def test_a_server_s_model_can_be_unpinned_and_evicted(
    make_cache: MakeCache, mine: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """
    However its directory is spelled, and after that has gone.
    """
    here = mine.parents[1]
    monkeypatch.setenv("HOME", str(here))
    spec = parse_spec(text.format(here=here))
    assert spec.name == "mine"
    app = create_app(ServerOptions(models=(spec,), device="cpu"), make_cache())
    with TestClient(app, base_url="http://127.0.0.1") as client:

        def ask(method: str, path: str) -> str:
            answer = client.request(method, f"/api/models/mine{path}")
            assert answer.status_code == 200, answer.text
            status: str = answer.json()["status"]
            return status

        def shown() -> list[str]:
            return [each["name"] for each in client.get("/api/ps").json()["models"]]

        assert ask("POST", "/pin") == "pinned"
        assert shown() == ["mine"]
        shutil.rmtree(mine)
        assert ask("DELETE", "/pin") == "unpinned"
        assert ask("DELETE", "") == "evicted"
        assert shown() == []
        assert ask("DELETE", "") == "absent"


class TestSpecs:
    """
    Models as command lines name them, where directories are there.
    """

    @pytest.fixture
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """
        An empty directory, in which the test is.
        """
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        return tmp_path / "here"

    @pytest.mark.parametrize(
        ("text", "name", "model", "kind"),
        [
            ("models/mine", "mine", "models/mine", "default"),
            ("models/mine/", "mine", "models/mine/", "default"),
            ("models/mine:int8", "mine:int8", "models/mine", "int8"),
            ("a/b=models/mine", "a/b", "models/mine", "default"),
            ("org/name=/dir", "org/name", "/dir", "default"),
            ("org/name=C:\\dir:int8", "org/name", "C:\\dir", "int8"),
            ("org/name=base:int8", "org/name", "base", "int8"),
            ("runs/x=1", "x=1", "runs/x=1", "default"),
            ("runs/x=1:int8", "x=1:int8", "runs/x=1", "int8"),
            ("best=runs/x=1", "best", "runs/x=1", "default"),
            ("run:int8", "run:int8", "run:int8", "default"),
            ("run:v2", "run:v2", "run:v2", "default"),
            ("mine=run:v2", "mine", "run:v2", "default"),
            ("run:v2:int8", "run:v2:int8", "run:v2", "int8"),
            ("x=y", "x=y", "x=y", "default"),
            ("./a=b/c", "c", "./a=b/c", "default"),
            ("../a=b/c", "c", "../a=b/c", "default"),
            ("~/a=b/c", "c", "~/a=b/c", "default"),
            ("C:/a=b", "C:/a=b", "C:/a=b", "default"),
            ("D:\\a=b", "D:\\a=b", "D:\\a=b", "default"),
            (".", "here", ".", "default"),
        ],
    )
    def test_what_is_there_decides(
        self, here: Path, text: str, name: str, model: str, kind: str
    ) -> None:
        """
        Paths may hold any mark; what is no path is a name and a model.
        """
        for each in ("models/mine", "runs/x=1", "run:int8", "run:v2", "x=y"):
            (here / each).mkdir(parents=True)
        assert parse_spec(text) == ModelSpec(name, model, kind)
