"""
The command ``whispercache variants``, and the commands that can do without variants.

Each test has a cache directory of its own. Micro models serve where any model would.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import ctranslate2
import pytest
from real import MIB, child_environment, clip, micro, micro_copy, packaged, reference

from whispercache.cache import ModelCache
from whispercache.cli.main import main
from whispercache.cli.variants import as_json, as_lines
from whispercache.engine.loader import FasterWhisperLoader
from whispercache.engine.variants.store import Variant, Variants
from whispercache.errors import WhisperCacheError
from whispercache.server import command as serve

if TYPE_CHECKING:
    from collections.abc import Callable

    from whispercache.engine.api import LoadedModel
    from whispercache.engine.files import ModelFiles
    from whispercache.keys import ModelKey

COLUMNS = ["model", "type", "size", "last", "used", "state", "source"]


class Result(NamedTuple):
    """
    How a run of the command ended.
    """

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """
    Where the variants of this test are.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "cache" / "whispercache" / "variants"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """
    Runs the command in this process.
    """

    def call(*arguments: str | Path) -> Result:
        try:
            code = main([str(each) for each in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def alpha(tmp_path: Path) -> Path:
    """
    A micro model that may be changed; its file is float16.
    """
    return micro_copy(tmp_path / "alpha", "alpha speaks")


@pytest.fixture
def beta(tmp_path: Path) -> Path:
    """
    Another one.
    """
    return micro_copy(tmp_path / "beta", "beta speaks")


def listed(run: Callable[..., Result]) -> list[dict[str, object]]:
    """
    What the command lists as JSON.
    """
    result = run("variants", "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert isinstance(found, list)
    return found


def names(run: Callable[..., Result]) -> set[str]:
    """
    Variants that are listed, as a directory's last part and a type.
    """
    return {f"{Path(str(one['model'])).name}:{one['kind']}" for one in listed(run)}


class TestBuild:
    """
    ``whispercache variants build``.
    """

    def test_each_model_gets_a_line_of_what_it_takes(
        self, run: Callable[..., Result], alpha: Path, beta: Path, store: Path
    ) -> None:
        """
        Size and seconds on stdout; stderr has what begins, and of what.
        """
        result = run("variants", "build", alpha, f"{beta}:float32")
        assert result.code == 0
        first, second = result.out.splitlines()
        assert re.fullmatch(r"alpha:int8: [\d.]+ KiB in \d+\.\d s", first)
        assert re.fullmatch(r"beta:float32: [\d.]+ [KM]iB in \d+\.\d s", second)
        assert re.fullmatch(
            rf"alpha:int8: converting [\d.]+ KiB of {re.escape(str(alpha))}\n"
            rf"beta:float32: converting [\d.]+ KiB of {re.escape(str(beta))}\n",
            result.err,
        )
        assert len(list(store.glob("*/model.bin"))) == 2

    @pytest.mark.parametrize("again", ["", ":int8", ":int8_float16", ":int8_bfloat16"])
    def test_all_types_of_int8_share_one(
        self, run: Callable[..., Result], alpha: Path, again: str
    ) -> None:
        """
        Whichever is named, it is there already, and nothing is converted.
        """
        run("variants", "build", f"{alpha}:int8_float32")
        result = run("variants", "build", f"{alpha}{again}")
        assert result.code == 0
        assert re.fullmatch(r"alpha:int8: there already, [\d.]+ KiB\n", result.out)
        assert result.err == ""

    def test_the_type_that_the_file_has_is_not_built(
        self, run: Callable[..., Result], alpha: Path
    ) -> None:
        """
        That is said, and is no error.
        """
        result = run("variants", "build", f"{alpha}:float16")
        said = "alpha:float16: not needed, its file is float16 already\n"
        assert result == (0, said, "")
        assert listed(run) == []

    def test_one_that_fails_does_not_stop_the_others(
        self, run: Callable[..., Result], alpha: Path, beta: Path, tmp_path: Path
    ) -> None:
        """
        A line for each of them, exit code 2, and the good ones are there.
        """
        with (alpha / "model.bin").open("r+b") as file:
            file.truncate(100_000)
        nowhere = tmp_path / "nowhere"
        result = run("variants", "build", alpha, "tinny", nowhere, beta)
        assert result.code == 2
        assert result.out.startswith("beta:int8: ")
        broken, unknown, missing, begun = result.err.splitlines()
        assert broken.startswith(f"whispercache: error: the model in {alpha} is broken")
        assert "did you mean 'tiny'" in unknown
        assert str(nowhere) in missing
        assert begun.startswith("beta:int8: converting")
        assert names(run) == {"beta:int8"}

    @pytest.mark.parametrize(
        ("quantization", "wanted", "said"),
        [
            (None, "bfloat16", "variants are int8, float32, float16, not bfloat16"),
            (None, "int16", "variants are int8, float32, float16, not int16"),
            ("int8", "float32", "its file is int8, which cannot become float32"),
        ],
    )
    def test_what_cannot_be_converted_is_refused(
        self,
        run: Callable[..., Result],
        tmp_path: Path,
        quantization: str | None,
        wanted: str,
        said: str,
    ) -> None:
        """
        In one line with the model, the type and the reason.
        """
        model = micro_copy(tmp_path / "gamma", quantization=quantization)
        result = run("variants", "build", f"{model}:{wanted}")
        line = f"whispercache: error: gamma:{wanted}: {said}\n"
        assert result == (2, "", line)

    @pytest.mark.parametrize(
        ("wanted", "said"),
        [
            ("auto", "depends on the device"),
            ("default", "depends on the device"),
            ("int4", "'int4' is no compute type"),
        ],
    )
    def test_a_type_that_is_none_is_refused_before_any_work(
        self, run: Callable[..., Result], alpha: Path, wanted: str, said: str
    ) -> None:
        """
        Not even the model before it is built.
        """
        result = run("variants", "build", alpha, f"{alpha}:{wanted}")
        assert (result.code, result.out) == (2, "")
        assert result.err.count("\n") == 1
        assert said in result.err
        assert listed(run) == []

    def test_no_more_than_the_limit_is_written(
        self, run: Callable[..., Result], store: Path
    ) -> None:
        """
        One that is larger by itself is refused, with both sizes.
        """
        model = packaged("tiny.en")
        result = run("variants", "build", f"{model}:float32", "--limit", "100MiB")
        assert (result.code, result.out) == (2, "")
        error = result.err.splitlines()[-1]
        assert error.startswith(f"whispercache: error: {model.name}:float32: it takes ")
        assert error.endswith("and all variants may take 100.0 MiB")
        assert not list(store.glob("*/model.bin"))

    def test_the_limit_counts_what_is_there(
        self, run: Callable[..., Result], alpha: Path, beta: Path, store: Path
    ) -> None:
        """
        What was not used for longest leaves, if that is long enough ago.
        """
        run("variants", "build", f"{alpha}:float32")
        (manifest,) = store.glob("*/variant.json")
        long_ago_s = time.time() - 7200
        os.utime(manifest, (long_ago_s, long_ago_s))
        (size_bytes,) = (int(str(one["n_bytes"])) for one in listed(run))
        assert 0.75 * MIB < size_bytes < 1.5 * MIB  # so that two exceed the limit
        result = run("variants", "build", f"{beta}:float32", "--limit", "1.5MiB")
        assert result.code == 0
        assert names(run) == {"beta:float32"}

    def test_a_share_is_no_limit(self, run: Callable[..., Result], alpha: Path) -> None:
        """
        Of what would not be clear.
        """
        result = run("variants", "build", alpha, "--limit", "50%")
        assert (result.code, result.out) == (2, "")
        assert (
            "--limit must be bytes, such as '6GiB' or '800MiB', not '50%'" in result.err
        )


class TestList:
    """
    ``whispercache variants``.
    """

    @pytest.mark.parametrize("words", [("variants",), ("variants", "list")])
    def test_where_there_are_none_it_says_how_they_come(
        self, run: Callable[..., Result], store: Path, words: tuple[str, ...]
    ) -> None:
        """
        With the directory, and a command to try.
        """
        result = run(*words)
        assert (result.code, result.err) == (0, "")
        assert f"no variants yet in {store}." in result.out
        assert "whispercache variants build base:int8" in result.out

    def test_a_line_tells_all_about_one(
        self, run: Callable[..., Result], alpha: Path, beta: Path, store: Path
    ) -> None:
        """
        And the last line what all take together, of how much.
        """
        run("variants", "build", beta, alpha)
        result = run("variants")
        header, first, second, empty, total = result.out.splitlines()
        assert header.split() == COLUMNS
        line = rf"alpha  int8  [\d.]+ KiB  just now   ready  {alpha}"
        assert re.fullmatch(line, first)
        assert second.split()[:2] == ["beta", "int8"]
        assert empty == ""
        pattern = r"2 variants, [\d.]+ (K|M)iB of 16\.0 GiB, in (.+)"
        match = re.fullmatch(pattern, total)
        assert match
        assert match[2] == str(store)

    def test_json_has_every_field(
        self, run: Callable[..., Result], alpha: Path, store: Path
    ) -> None:
        """
        An object for each variant, for programs.
        """
        run("variants", "build", alpha)
        (found,) = listed(run)
        (directory,) = store.glob("*-int8")
        n_bytes = sum(each.stat().st_size for each in directory.iterdir())
        used_s = (directory / "variant.json").stat().st_mtime
        assert found == {
            "directory": str(directory),
            "model": str(alpha),
            "source": str(alpha),
            "kind": "int8",
            "n_bytes": n_bytes,
            "used_s": used_s,
            "state": "ready",
            "engine": f"CTranslate2 {ctranslate2.__version__}",
        }

    def test_json_may_be_asked_for_on_either_side_of_list(
        self, run: Callable[..., Result]
    ) -> None:
        """
        An empty list is a list.
        """
        assert run("variants", "--json", "list") == (0, "[]\n", "")
        assert run("variants", "list", "--json") == (0, "[]\n", "")

    def test_states_are_told(
        self, run: Callable[..., Result], alpha: Path, beta: Path, store: Path
    ) -> None:
        """
        One whose model has changed is stale, one that was written to is broken.
        """
        run("variants", "build", alpha, beta, f"{beta}:float32")
        (alpha / "config.json").write_text("{}")
        (large,) = store.glob("*-float32/model.bin")
        with large.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(bytes(100))
        states = {f"{one['model']}:{one['kind']}": one["state"] for one in listed(run)}
        assert states == {
            f"{alpha}:int8": "stale",
            f"{beta}:int8": "ready",
            f"{beta}:float32": "broken",
        }

    @pytest.mark.parametrize(
        ("passed_s", "said"),
        [
            (-5, "just now"),
            (59, "just now"),
            (60, "1 min ago"),
            (3599, "59 min ago"),
            (3 * 3600, "3 h ago"),
            (86_400, "1 day ago"),
            (9 * 86_400, "9 days ago"),
        ],
    )
    def test_times_are_in_words(self, passed_s: int, said: str) -> None:
        """
        In the largest unit that is full; a clock that was set back does no harm.
        """
        variant = Variant(Path("d"), 5, 1e9 - passed_s, "ready", "base", "s", "int8")
        _, row, *_ = as_lines([variant], MIB, Path("all"), 1e9)
        assert f"  {said}  " in row

    def test_what_cannot_be_read_has_no_time(self) -> None:
        """
        And it is not 1970.
        """
        variant = Variant(Path("1234567890ab-int8"), 2048, 0.0, "broken")
        _, row, *_ = as_lines([variant], MIB, Path("all"), 1e9)
        assert row.split() == ["?", "?", "2.0", "KiB", "?", "broken", "?"]
        assert json.loads(as_json([variant]))[0]["directory"] == "1234567890ab-int8"


class TestRemove:
    """
    ``whispercache variants remove``.
    """

    @pytest.fixture(autouse=True)
    def _built(self, run: Callable[..., Result], alpha: Path, beta: Path) -> None:
        """
        Two of alpha and one of beta.
        """
        result = run("variants", "build", alpha, f"{alpha}:float32", beta)
        assert result.code == 0

    @pytest.mark.parametrize(
        ("which", "left"),
        [
            ("alpha:int8", {"alpha:float32", "beta:int8"}),
            ("alpha:int8_float16", {"alpha:float32", "beta:int8"}),
            ("{folder}/alpha:float32", {"alpha:int8", "beta:int8"}),
            ("alpha", {"beta:int8"}),
            ("{folder}/./alpha", {"beta:int8"}),
        ],
    )
    def test_a_model_is_named_with_or_without_a_type(
        self, run: Callable[..., Result], tmp_path: Path, which: str, left: set[str]
    ) -> None:
        """
        As the table shows it, or as the model is asked for elsewhere.
        """
        result = run("variants", "remove", which.format(folder=tmp_path))
        assert (result.code, result.err) == (0, "")
        assert names(run) == left

    def test_it_says_what_has_gone_and_its_bytes(
        self, run: Callable[..., Result]
    ) -> None:
        """
        A line for each, and if they were several, one for all.
        """
        result = run("variants", "remove", "beta", "alpha", "alpha:int8")
        *lines, total = result.out.splitlines()
        assert {re.sub(r"[\d.]+ [KM]iB", "SIZE", line) for line in lines} == {
            "removed beta:int8, SIZE",
            "removed alpha:float32, SIZE",
            "removed alpha:int8, SIZE",
        }
        assert len(lines) == 3
        assert total.startswith("3 variants removed, ")

    def test_variants_of_a_model_that_has_gone_can_be_named(
        self, run: Callable[..., Result], alpha: Path, tmp_path: Path
    ) -> None:
        """
        By the path that it had, though nothing is there.
        """
        shutil.rmtree(alpha)
        result = run("variants", "remove", tmp_path / "beta" / ".." / "alpha")
        assert result.code == 0
        assert names(run) == {"beta:int8"}

    def test_all_removes_all_and_models_stay(
        self, run: Callable[..., Result], alpha: Path, beta: Path, store: Path
    ) -> None:
        """
        Those that are stale or broken, too. A second time there is nothing to do, which
        is no error.
        """
        (store / "no-manifest").mkdir()
        result = run("variants", "remove", "--all")
        assert result.code == 0
        assert "removed no-manifest, 0 B\n" in result.out
        assert "4 variants removed, " in result.out
        assert listed(run) == []
        assert (alpha / "model.bin").exists()
        assert (beta / "model.bin").exists()
        assert run("variants", "remove", "--all") == (0, "nothing to remove\n", "")

    def test_what_is_not_there_is_an_error_and_the_rest_goes(
        self, run: Callable[..., Result]
    ) -> None:
        """
        One line for each name that nothing has, exit code 2.
        """
        result = run("variants", "remove", "alpha:float16", "gamma", "beta")
        assert result.code == 2
        assert result.err == (
            "whispercache: error: there is no variant 'alpha:float16'\n"
            "whispercache: error: there is no variant 'gamma'\n"
        )
        assert names(run) == {"alpha:float32", "alpha:int8"}

    def test_nothing_goes_where_nothing_was_named(
        self, run: Callable[..., Result]
    ) -> None:
        """
        All of them must be asked for.
        """
        result = run("variants", "remove")
        assert (result.code, result.out) == (2, "")
        assert "or give --all" in result.err
        assert len(listed(run)) == 3

    def test_one_that_cannot_be_deleted_does_not_stop_the_others(
        self, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        As where another program holds its files open; the exit code is 2.
        """
        remove = Variants.remove

        def refusing(variants: Variants, variant: Variant) -> None:
            if variant.model.endswith("alpha"):
                raise PermissionError(13, "Permission denied", str(variant.directory))
            remove(variants, variant)

        monkeypatch.setattr(Variants, "remove", refusing)
        result = run("variants", "remove", "--all")
        assert result.code == 2
        assert result.out.startswith("removed beta:int8, ")
        assert result.out.count("\n") == 1
        assert result.err.count("Permission denied\n") == 2
        assert names(run) == {"alpha:float32", "alpha:int8"}


@pytest.mark.process
class TestProcess:
    """
    The command in a process of its own, as a user runs it.
    """

    def test_a_real_model_is_built_listed_used_and_removed(self) -> None:
        """
        Plain text, not folded to 80 columns; what the variant hears is right.
        """
        model = str(packaged("tiny.en"))
        name = Path(model).name

        built = child("variants", "build", f"{model}:int8")
        assert built.code == 0, built.err
        assert re.fullmatch(rf"{name}:int8: 4\d\.\d MiB in [\d.]+ s\n", built.out)

        shown = child("variants")
        assert (shown.code, shown.err) == (0, "")
        assert "\x1b" not in shown.out
        assert shown.out.splitlines()[1].endswith(model)

        place = ("--device", "cpu", "--compute-type", "int8", "--language", "en")
        heard = child("transcribe", clip("en-bread"), "--model", model, *place)
        assert heard == (0, f"{reference('en-bread')}\n", "")

        gone = child("variants", "remove", f"{name}:int8")
        assert re.fullmatch(rf"removed {name}:int8, 4\d\.\d MiB\n", gone.out)

    @pytest.mark.parametrize("words", [(), ("list",), ("build",), ("remove",)])
    def test_help_comes_without_heavy_imports(self, words: tuple[str, ...]) -> None:
        """
        It is complete, and neither models' libraries nor rich were imported for it.
        """
        code = f"""
import sys
from whispercache.cli.main import main
try:
    main({["variants", *words, "--help"]!r})
except SystemExit as end:
    print(end.code, sorted(sys.modules))
"""
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=child_environment(),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        usage, *_, last = done.stdout.splitlines()
        assert usage.startswith(" ".join(("usage: whispercache variants", *words)))
        assert last.startswith("0 ")
        heavy = ("faster_whisper", "ctranslate2", "numpy", "rich", "huggingface_hub")
        assert [name for name in heavy if f"'{name}'" in last] == []


def child(*arguments: str) -> Result:
    """
    Run the command as a process, at 80 columns.
    """
    done = subprocess.run(
        [sys.executable, "-m", "whispercache", *arguments],
        env=child_environment({"COLUMNS": "80"}),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return Result(done.returncode, done.stdout, done.stderr)


class TestWithout:
    """
    ``--no-variants`` of other commands.
    """

    @pytest.mark.parametrize(
        ("option", "is_used"), [((), True), (("--no-variants",), False)]
    )
    def test_transcribe_uses_variants_unless_told_not_to(
        self,
        run: Callable[..., Result],
        alpha: Path,
        monkeypatch: pytest.MonkeyPatch,
        option: tuple[str, ...],
        is_used: bool,  # noqa: FBT001 - a parameter of the test
    ) -> None:
        """
        What was built is what is loaded, and the text is the same.
        """
        loaded: list[ModelFiles] = []
        load = FasterWhisperLoader.load

        def noting(
            loader: FasterWhisperLoader, key: ModelKey, files: ModelFiles
        ) -> LoadedModel:
            loaded.append(files)
            return load(loader, key, files)

        monkeypatch.setattr(FasterWhisperLoader, "load", noting)
        run("variants", "build", alpha)
        place = ("--device", "cpu", "--compute-type", "int8")
        model = ("--model", alpha)
        result = run("transcribe", clip("en-bread"), *model, *place, *option)
        assert result == (0, "alpha speaks\n", "")
        (files,) = loaded
        assert (files.original is not None) is is_used
        assert (files.directory != str(alpha)) is is_used

    @pytest.mark.parametrize(
        ("option", "wanted"), [((), True), (("--no-variants",), False)]
    )
    def test_serve_uses_variants_unless_told_not_to(
        self,
        run: Callable[..., Result],
        monkeypatch: pytest.MonkeyPatch,
        option: tuple[str, ...],
        wanted: bool,  # noqa: FBT001 - a parameter of the test
    ) -> None:
        """
        Its cache is made so.
        """
        made: list[ModelCache] = []

        def noting(**options: object) -> ModelCache:
            made.append(ModelCache(**options))  # type: ignore[arg-type]
            made[0].close()
            raise WhisperCacheError("enough")

        monkeypatch.setattr(serve, "ModelCache", noting)
        result = run("serve", f"m={micro('micro a')}", "--port", "0", *option)
        assert (result.code, result.err) == (2, "whispercache: error: enough\n")
        (cache,) = made
        loader = cache._core.loader
        assert isinstance(loader, FasterWhisperLoader)
        assert (loader.variants_bytes is not None) is wanted
