"""
The command ``whispercache config``, and settings as options of the others.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

import pytest
from real import clip, micro

from whispercache.cli import config, doctor, variants
from whispercache.cli.doctor import Finding
from whispercache.cli.main import main
from whispercache.console import WRONG_USE
from whispercache.server import command as serve
from whispercache.settings.arguments import settings_of
from whispercache.settings.table import KEYS_VARIABLE, SETTINGS

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """
    A file of settings.
    """
    path = tmp_path / "my.toml"
    path.write_text(
        'ram = "1GiB"\ncoordinate = true\npressure = "watch"\nvariants = "5GiB"\n'
        'fallback = ["int8", "cpu"]\nvram = {"cuda:0" = "2GiB"}\n',
        encoding="utf-8",
    )
    return path


class TestConfig:
    """
    What it prints.
    """

    def test_every_setting_has_its_value_and_its_place(
        self,
        file: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """
        A line each, in columns, and the file below.
        """
        monkeypatch.setenv("WHISPERCACHE_KEEP_ALIVE", "10m")
        assert main(["config", "--config", str(file)]) == 0
        lines = capsys.readouterr().out.splitlines()
        rows = {line.split()[0]: line.split(None, 1)[1] for line in lines if line}
        shown = {key: " ".join(rows[key].split()) for key in SETTINGS}
        assert shown["ram"] == f"1GiB {file}"
        assert shown["vram"] == f"cuda:0=2GiB {file}"
        assert shown["fallback"] == f"int8, cpu {file}"
        assert shown["coordinate"] == f"on {file}"
        assert shown["keep_alive"] == "10m WHISPERCACHE_KEEP_ALIVE"
        assert shown["max_models"] == "none default"
        assert shown["serve.port"] == "8000 default"
        assert f"file: {file}" in lines

    def test_json_has_the_same_for_programs(
        self,
        file: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """
        Values with their types.
        """
        monkeypatch.setenv("WHISPERCACHE_MAX_MODELS", "2")
        assert main(["config", "--json", "--config", str(file)]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["file"] == str(file)
        assert list(told["settings"]) == list(SETTINGS)
        assert told["settings"]["vram"] == {
            "value": {"cuda:0": "2GiB"},
            "source": "file",
            "place": str(file),
        }
        variable = "WHISPERCACHE_MAX_MODELS"
        assert told["settings"]["max_models"] == {
            "value": 2,
            "source": "variable",
            "place": variable,
        }
        usual = {"value": False, "source": "default", "place": None}
        assert told["settings"]["park"] == usual

    @pytest.mark.parametrize("how", [(), ("--json",)])
    def test_keys_are_not_printed(
        self,
        how: tuple[str, ...],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """
        Only that there are some.
        """
        monkeypatch.setenv(KEYS_VARIABLE, "hush")
        assert main(["config", *how]) == 0
        out = capsys.readouterr().out
        assert KEYS_VARIABLE in out
        assert "hush" not in out

    def test_it_says_where_a_file_would_be(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """
        For who wants to write one.
        """
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        main(["config"])
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("no file; ")
        assert str(tmp_path) in last
        assert last.endswith("config.toml")

    def test_nonsense_is_one_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """
        With exit code 2.
        """
        monkeypatch.setenv("WHISPERCACHE_RAM", "lots")
        assert main(["config"]) == WRONG_USE
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("whispercache: error: WHISPERCACHE_RAM must be an amount")
        assert err.count("\n") == 1

    def test_help_lists_every_variable(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """
        In lines of their own, of at most 88 columns.
        """
        with pytest.raises(SystemExit):
            main(["config", "--help"])
        lines = capsys.readouterr().out.splitlines()
        for setting in SETTINGS.values():
            (line,) = [each for each in lines if f"{setting.variable} " in each]
            assert line.endswith(setting.meaning)
            assert len(line) <= 88


class TestOptions:
    """
    Settings as options of ``whispercache serve``, which has most of them.
    """

    @staticmethod
    def parsed(*line: str) -> argparse.Namespace:
        """
        The options of a command line.
        """
        parser = argparse.ArgumentParser()
        serve.add_options(parser)
        return parser.parse_args(line)

    def test_an_option_wins_over_the_file_both_ways(self, file: Path) -> None:
        """
        Switches can be turned off again, and limits be lifted.
        """
        line = (
            *("base", "--config", str(file), "--no-coordinate", "--pressure", "load"),
            *("--ram", "auto", "--fallback", "none", "--variants", "on"),
        )
        held = settings_of(self.parsed(*line))
        assert {key: held[key].value for key in ("coordinate", "pressure", "ram")} == {
            "coordinate": False,
            "pressure": "load",
            "ram": "auto",
        }
        assert held["fallback"].value == []
        assert held["variants"].value is True
        assert held["vram"].value == {"cuda:0": "2GiB"}
        assert held["serve.models"].value == ["base"]

    def test_short_options_say_one_value(self) -> None:
        """
        As they did before there were settings.
        """
        held = settings_of(self.parsed("base", "--watch", "--no-variants"))
        assert held["pressure"].value == "watch"
        assert held["variants"].value is False

    def test_every_setting_of_a_server_is_an_option(self) -> None:
        """
        Of the same name.
        """
        given = vars(self.parsed("base"))
        assert {key for key in SETTINGS if key.startswith("serve.")} <= set(given)

    def test_models_with_commas_in_them_are_one_argument(self) -> None:
        """
        Commas part models only in a variable.
        """
        held = settings_of(self.parsed("m=/models/a,b"))
        assert held["serve.models"].value == ["m=/models/a,b"]


class TestTranscribe:
    """
    A command that loads models heeds the settings, too.
    """

    def test_its_limit_comes_from_a_variable_and_an_argument_wins(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """
        A model that is too large for it is refused before anything is loaded.
        """
        line = ["transcribe", clip("en-bread"), "--model", str(micro("micro a"))]
        monkeypatch.setenv("WHISPERCACHE_RAM", "2MiB")
        assert main(line) == WRONG_USE
        assert "2.0 MiB" in capsys.readouterr().err
        assert main([*line, "--ram", "auto"]) == 0
        assert capsys.readouterr().out == "micro a\n"

    def test_models_take_turns_whatever_the_keep_alive(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """
        Each is loaded once for all files, as --help says.
        """
        loads: list[object] = []
        monkeypatch.setattr(
            "whispercache.cli.transcribe._Transcription._watch",
            lambda _, event: loads.append(type(event).__name__),
        )
        monkeypatch.setenv("WHISPERCACHE_KEEP_ALIVE", "0")
        files = [clip("en-bread"), clip("en-garden")]
        assert main(["transcribe", *files, "--model", str(micro("micro a"))]) == 0
        assert capsys.readouterr().out.count("\nmicro a\n") == 2
        assert loads.count("ModelLoaded") == 1


def test_the_doctor_says_what_holds_and_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    With the place that it came from.
    """
    assert doctor._settings() == Finding("works", "settings", "the defaults")
    monkeypatch.setenv("WHISPERCACHE_RAM", "3GiB")
    assert doctor._settings().text == "ram from WHISPERCACHE_RAM"
    monkeypatch.setenv("WHISPERCACHE_RAM", "lots")
    found = doctor._settings()
    assert found.mark == "wrong"
    assert "WHISPERCACHE_RAM must be an amount of memory" in found.text


def test_variants_are_bounded_by_the_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    On and off are no sizes: what is asked for is done all the same.
    """
    for said, limit in {"3GiB": 3, "off": 16, "on": 16}.items():
        monkeypatch.setenv("WHISPERCACHE_VARIANTS", said)
        assert variants._limit_bytes() == limit * 1024**3
    assert variants._limit_bytes("4GiB") == 4 * 1024**3
    monkeypatch.setenv("WHISPERCACHE_VARIANTS", "of")
    assert main(["variants"]) == WRONG_USE
    assert "WHISPERCACHE_VARIANTS must be on, off or bytes" in capsys.readouterr().err


def test_the_help_of_a_module_is_that_of_the_table() -> None:
    """
    Not written twice.
    """
    assert all(setting.meaning in config._HELP for setting in SETTINGS.values())
