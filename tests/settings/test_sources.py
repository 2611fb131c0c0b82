"""
Settings from arguments, variables and a file: who wins, and what is refused.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from whispercache import ModelCache
from whispercache.devices.host import user_cache
from whispercache.options import VARIANTS_VARIABLE, CacheOptions
from whispercache.server import ServerOptions
from whispercache.settings.kinds import shown
from whispercache.settings.sources import Held, file_in_use, read, settle, usual_file
from whispercache.settings.table import (
    CACHE_KEYS,
    CONFIG_VARIABLE,
    ONE_BY_ONE_KEYS,
    SETTINGS,
    key_of,
)
from whispercache.units import parse_duration, parse_limit

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]


@pytest.fixture
def users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """
    The place of the user's file, where nothing is yet.
    """
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = usual_file()
    assert file is not None
    assert tmp_path in file.parents
    file.parent.mkdir(parents=True)
    return file


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """
    Writes a file of settings, and returns its path.
    """

    def write(text: str) -> str:
        file = tmp_path / "named.toml"
        file.write_text(text, encoding="utf-8")
        return str(file)

    return write


class TestOrder:
    """
    What is said nearer wins.
    """

    def test_arguments_win_over_variables_over_the_file_over_defaults(
        self, write: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Each with the place that it came from.
        """
        file = write('ram = "1GiB"\nvram = "1GiB"\nkeep_alive = "1m"\n')
        monkeypatch.setenv("WHISPERCACHE_RAM", "2GiB")
        monkeypatch.setenv("WHISPERCACHE_VRAM", "2GiB")
        held = settle({"ram": "3GiB"}, file)
        assert held["ram"] == Held("3GiB", "argument", "--ram")
        assert held["vram"] == Held("2GiB", "variable", "WHISPERCACHE_VRAM")
        assert held["keep_alive"] == Held("1m", "file", file)
        assert held["policy"] == Held("lru", "default", "")
        assert list(held) == list(SETTINGS)

    def test_the_file_is_named_by_argument_variable_or_habit(
        self,
        users_file: Path,
        write: Callable[[str], str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """
        Without any there is none, and that is no error.
        """
        assert file_in_use() is None
        assert settle()["ram"].source == "default"
        users_file.write_text('ram = "1GiB"', encoding="utf-8")
        assert settle()["ram"].value == "1GiB"
        other = tmp_path / "other.toml"
        other.write_text('ram = "2GiB"', encoding="utf-8")
        monkeypatch.setenv(CONFIG_VARIABLE, str(other))
        assert settle()["ram"].value == "2GiB"
        assert settle(config=write('ram = "3GiB"'))["ram"].value == "3GiB"

    def test_a_file_that_was_named_must_be_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        A misspelt name must not be taken for no limits.
        """
        with pytest.raises(FileNotFoundError, match="gone"):
            settle(config=str(tmp_path / "gone"))
        monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "gone"))
        with pytest.raises(FileNotFoundError, match="gone"):
            settle()

    def test_a_home_of_somebody_else_is_no_error(
        self,
        users_file: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """
        A service that gave up its rights cannot look there; a warning says so.
        """

        def refused(path: Path) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        with monkeypatch.context() as patched:
            patched.setattr(Path, "stat", refused)
            assert settle()["ram"].source == "default"
        assert str(users_file) in caplog.text

    def test_nobody_without_a_home_has_a_file(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        And no error: such users have defaults, and no directory for caches either.
        """
        monkeypatch.delenv("XDG_CONFIG_HOME")
        monkeypatch.setenv("HOME", "")
        monkeypatch.setattr("os.path.expanduser", str)
        # As for a user id without a name.
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
        assert usual_file() is None
        assert settle()["ram"].source == "default"
        monkeypatch.delenv("XDG_CACHE_HOME")
        with pytest.raises(FileNotFoundError, match="set XDG_CACHE_HOME"):
            user_cache()

    def test_an_empty_variable_is_as_good_as_none(
        self, write: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Docker Compose cannot leave one out.
        """
        monkeypatch.setenv("WHISPERCACHE_RAM", " ")
        monkeypatch.setenv("WHISPERCACHE_ANYTHING", "")
        monkeypatch.setenv(CONFIG_VARIABLE, "")
        assert settle(config=write('ram = "1GiB"'))["ram"].source == "file"
        assert file_in_use() is None

    def test_what_kubernetes_says_of_services_is_passed_over(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Of services that are called whispercache and whispercache-serve.
        """
        for name in ("WHISPERCACHE", "WHISPERCACHE_SERVE"):
            for rest, value in {
                "SERVICE_HOST": "10.0.0.11",
                "SERVICE_PORT": "8000",
                "SERVICE_PORT_HTTP": "8000",
                "PORT": "tcp://10.0.0.11:8000",
                "PORT_8000_TCP": "tcp://10.0.0.11:8000",
                "PORT_8000_TCP_PROTO": "tcp",
                "PORT_8000_TCP_PORT": "8000",
                "PORT_8000_TCP_ADDR": "10.0.0.11",
            }.items():
                monkeypatch.setenv(f"{name}_{rest}", value)
        assert settle()["serve.port"] == Held(8000)
        monkeypatch.setenv("WHISPERCACHE_SERVE_PORT", "9000")
        assert settle()["serve.port"].value == 9000


class TestRefusals:
    """
    What is unknown or nonsense is an error that names its place.
    """

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("kep_alive = 1", "no setting kep_alive; did you mean keep_alive?"),
            ("max-models = 1", "did you mean max_models?"),
            ("port = 1", "did you mean serve.port?"),
            ("[serve]\nprot = 1", "no setting serve.prot; did you mean serve.port?"),
            ("[serve]\nmax_wating = 1", "did you mean serve.max_waiting?"),
            ("max_wating = 1", "did you mean max_waiting?"),
            ("[serve]\nram = 1", "no setting serve.ram; did you mean ram?"),
            ("[server]\nport = 1", "did you mean serve?"),
            ("zzz = 1", "'whispercache config --help' lists all"),
            ("serve = 1", "serve must be a table"),
            ('ram = "lots"', "ram must be an amount of memory"),
            ("ram = 10", "ram=10 would be that many bytes"),
            ("ram = true", "ram must be a number or text, not bool"),
            (
                'vram = {"gpu" = "1GiB"}',
                "vram is for cards such as 'cuda:0', not 'gpu'",
            ),
            ('vram = {"cpu" = "1GiB"}', "for cards such as 'cuda:0', not 'cpu'"),
            ('vram = {"cuda:0" = "x"}', "vram['cuda:0'] must be an amount"),
            ("keep_alive = 2020-01-01", "must be a number or text, not date"),
            ("max_models = 0", "max_models must be at least 1, not 0"),
            ("max_models = true", "must be a whole number, not True"),
            ("max_models = 1.5", "must be a whole number, not 1.5"),
            ('policy = "fifo"', "policy must be lru or gap, not 'fifo'"),
            ("patience_s = -1", "patience_s must have an end"),
            ("coordinate = 1", "coordinate must be on or off, not 1"),
            ("park = 1", "park must be on, off or an amount of memory"),
            ('coordinate = "maybe"', "coordinate must be on or off"),
            ('fallback = ["int9"]', "fallback 'int9' is neither"),
            ('variants = "20%"', "variants must be on, off or bytes"),
            ('variants = "lots"', "variants must be on, off or bytes"),
            ('serve.max_upload = "lots"', "serve.max_upload must be bytes"),
            ('serve.port = "http"', "serve.port: 'http' is no port"),
            ("serve.key_file = [1]", "serve.key_file: each must be text"),
            ("serve.models = 1", "serve.models must be a list of texts"),
            ('serve.max_upload = "80%"', "serve.max_upload must be bytes"),
            ("serve.timeout = -1", "serve.timeout must have an end"),
            ("ram", "is no TOML: "),
            ("ram = 1\nram = 2", "is no TOML: "),
        ],
    )
    def test_of_the_file(
        self, write: Callable[[str], str], text: str, said: str
    ) -> None:
        """
        With the name of the file.
        """
        file = write(text)
        with pytest.raises(ValueError, match=re.escape(said)) as error:
            settle(config=file)
        assert str(error.value).startswith(file)

    @pytest.mark.parametrize(
        ("variable", "value", "said"),
        [
            ("VRAN", "1GiB", "no setting WHISPERCACHE_VRAN; did you mean {}VRAM?"),
            ("KEEPALIVE", "1", "did you mean {}KEEP_ALIVE?"),
            ("RAN", "1", "did you mean {}RAM?"),
            ("RUN_TOPP", "1", "did you mean {}RUN_TOP?"),
            ("API_KYE", "1", "did you mean {}API_KEY?"),
            ("PORT", "80", "did you mean {}SERVE_PORT?"),
            ("CONFIG_FILE", "x", "did you mean {}CONFIG?"),
            ("ZZZ", "1", "'whispercache config --help' lists all"),
            ("RAM", "10", "{}RAM='10' would be that many bytes"),
            ("VRAM", "cuda:0=1GiB,cuda:x=1GiB", "{}VRAM is for cards such as"),
            ("MAX_MODELS", "two", "{}MAX_MODELS must be a whole number"),
            ("VARIANTS", "of", "{}VARIANTS must be on, off or bytes"),
            ("SERVE_DRAIN", "never", "{}SERVE_DRAIN must be seconds or"),
        ],
    )
    def test_of_a_variable(
        self, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
    ) -> None:
        """
        With its name, whole.
        """
        monkeypatch.setenv(f"WHISPERCACHE_{variable}", value)
        wanted = said.format("WHISPERCACHE_")
        with pytest.raises(ValueError, match=re.escape(wanted)):
            settle()

    def test_a_file_of_another_encoding(self, tmp_path: Path) -> None:
        """
        UTF-8 with a mark before it is read, as Windows' editors write it; no other is.
        """
        file = tmp_path / "marked.toml"
        file.write_text('ram = "1GiB"\r\n', encoding="utf-8-sig")
        assert settle(config=str(file))["ram"].value == "1GiB"
        file.write_text('ram = "1GiB"', encoding="utf-16")
        with pytest.raises(ValueError, match="is no TOML"):
            settle(config=str(file))


class TestValues:
    """
    The same by each of the ways, and as the cache or the server takes it.
    """

    @pytest.mark.parametrize(
        ("key", "toml", "text", "value"),
        [
            ("vram", "0.5", "50%", None),
            ("vram", "1073741824", "1GiB", None),
            ("vram", '{"cuda:0" = "1GiB"}', " cuda:0 = 1GiB ", {"cuda:0": "1GiB"}),
            ("max_models", "2", "2", 2),
            ("keep_alive", "-1", "-1", -1),
            ("keep_alive", "inf", "-5m", -1),
            ("patience_s", "90", "1m30s", 90.0),
            ("fallback", '["int8", "cpu"]', "int8, cpu", ["int8", "cpu"]),
            ("fallback", "[]", "none", []),
            ("coordinate", "true", "yes", True),
            ("coordinate", "false", "0", False),
            ("park", "true", "on", True),
            ("park", '"16GiB"', "16GiB", "16GiB"),
            ("variants", "false", "off", False),
            ("serve.port", "80", " 80 ", 80),
            ("serve.max_waiting", "0", "0", 0),
            ("serve.pin", '"a,b"', "a, b", ["a", "b"]),
            ("serve.models", '["a,b", "c=d"]', None, ["a,b", "c=d"]),
        ],
    )
    def test_a_file_and_a_variable_say_the_same(  # noqa: PLR0917 - columns of a table
        self,
        write: Callable[[str], str],
        monkeypatch: pytest.MonkeyPatch,
        key: str,
        toml: str,
        text: str | None,
        value: object,
    ) -> None:
        """
        In their own words.
        """
        table, _, name = key.rpartition(".")
        head = f"[{table}]\n" if table else ""
        found = [settle(config=write(f"{head}{name} = {toml}"))[key].value]
        if text is not None:
            monkeypatch.setenv(SETTINGS[key].variable, text)
            found.append(settle()[key].value)
        for each in found:
            if value is not None:
                assert each == value
                assert type(each) is type(value)
            else:
                assert parse_limit(each).of(2 << 30) == 1 << 30  # type: ignore[arg-type]

    def test_none_takes_a_limit_back(
        self, write: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        TOML has no word for it, and a nearer place may have to say so.
        """
        file = write('max_models = 2\nserve.max_audio = "1h"\nfallback = ["cpu"]')
        for key in ("max_models", "serve.max_audio", "fallback"):
            monkeypatch.setenv(SETTINGS[key].variable, "none")
        held = settle(config=file)
        assert held["max_models"].value is None
        assert held["serve.max_audio"].value is None
        assert held["fallback"].value == []

    def test_key_files_are_beside_the_file_that_names_them(
        self, write: Callable[[str], str], tmp_path: Path
    ) -> None:
        """
        Wherever the server is started; those of a command are where that is.
        """
        file = write('serve.key_file = ["keys", "/etc/keys"]')
        assert settle(config=file)["serve.key_file"].value == [
            str(tmp_path / "keys"),
            "/etc/keys",
        ]
        said = settle({"serve.key_file": ["keys"]})
        assert said["serve.key_file"].value == ["keys"]

    @pytest.mark.parametrize("key", SETTINGS)
    def test_a_default_is_shown_as_it_could_be_said(self, key: str) -> None:
        """
        So that who copies the output of ``whispercache config`` changes nothing.
        """
        setting = SETTINGS[key]
        said = shown(setting.default)
        assert said
        assert shown(read(setting, said, key)) == said


class TestTable:
    """
    One table, and nothing beside it.
    """

    def test_the_cache_s_defaults_are_those_of_a_model_cache(self) -> None:
        """
        Every parameter of a `ModelCache` but its parts is a setting.
        """
        parameters = inspect.signature(ModelCache).parameters
        parts = {"loader", "probe", "clock"}
        assert set(parameters) - parts == set(CACHE_KEYS)
        assert set(CacheOptions.__annotations__) == set(parameters)
        for key in CACHE_KEYS:
            default = parameters[key].default
            assert SETTINGS[key].default == ([] if default == () else default), key
        assert set(ONE_BY_ONE_KEYS) < set(CACHE_KEYS)

    def test_the_server_s_defaults_are_those_of_its_options(self) -> None:
        """
        In the same units.
        """
        options = ServerOptions(models=("base",))
        of = {key: setting.default for key, setting in SETTINGS.items()}
        assert parse_limit(of["serve.max_upload"]).n_bytes == options.max_upload_bytes  # type: ignore[arg-type]
        assert parse_duration(of["serve.max_duration"]) == options.max_duration_s  # type: ignore[arg-type]
        assert parse_duration(of["serve.timeout"]) == options.timeout_s  # type: ignore[arg-type]
        for name in ("max_waiting", "parallel", "device"):
            assert of[f"serve.{name}"] == getattr(options, name)
        assert of["serve.max_audio"] is options.max_audio_s is None

    def test_every_variable_that_is_named_anywhere_is_known(self) -> None:
        """
        In the package, its tests, its tools and its documents.
        """
        files = [
            path
            for folder in ("whispercache", "benchmarks", "docs", "examples")
            for path in (ROOT / folder).rglob("*")
            if path.suffix in {".py", ".sh", ".md"}
        ]
        files += [ROOT / name for name in ("Makefile", "README.md", "pyproject.toml")]
        named = {
            name
            for path in files
            for name in re.findall(
                r"\bWHISPERCACHE_[A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8")
            )
        }
        assert len(named) > len(SETTINGS)
        for name in named:
            key_of(name)

    def test_the_variable_of_variants_is_the_one_that_every_cache_knows(self) -> None:
        """
        It can turn them off for caches that have limits of their own.
        """
        assert SETTINGS["variants"].variable == VARIANTS_VARIABLE

    def test_the_documentation_has_the_table(self) -> None:
        """
        Line by line as it is here.
        """
        text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
        rows = [line for line in text.splitlines() if "| `WHISPERCACHE_" in line]
        assert rows == [
            f"| `{setting.key}` | `{setting.variable}` | {shown(setting.default)} | "
            f"{setting.meaning} |"
            for setting in SETTINGS.values()
        ]
