"""
The command: what it prints and where, what it says when something is wrong.

Micro models tell by their answer which of them was asked. What concerns a process as a
whole (its streams, its signals, what it imports) is tried in child processes.
"""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import faster_whisper
import pytest
from fakes import MIB, FakeGpus, build_drivers
from faster_whisper import WhisperModel
from hypothesis import given
from hypothesis import strategies as st
from micro import build_micro
from real import packaged

from whispercache import __version__, footprint
from whispercache.cli import doctor
from whispercache.cli import transcribe as job
from whispercache.cli.doctor import Finding, examine
from whispercache.cli.main import main
from whispercache.cli.models import survey
from whispercache.cli.progress import remaining_s
from whispercache.devices.probe import SystemProbe
from whispercache.dropin.model import class_over
from whispercache.engine.loader import FasterWhisperLoader
from whispercache.errors import DeviceUnavailable
from whispercache.keys import MODELS
from whispercache.testing import FakeLoader, FakeMachine
from whispercache.transcripts import FORMATS, Cue, Transcript

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
CLIPS = ROOT / "examples" / "clips"
BREAD = str(CLIPS / "en-bread.flac")
GARDEN = str(CLIPS / "en-garden.flac")
SPOKEN = "My grandmother bakes bread every Sunday morning."
GIB = 1024 * MIB

ONE_CARD = f"""
card GPU-11111111-2222-3333-4444-555555555555 0000:01:00.0 {8 * GIB} {5 * GIB} Alpha
visible 0
"""


class Result(NamedTuple):
    """
    How a run of the command ended.
    """

    code: int
    out: str
    err: str


class Models(NamedTuple):
    """
    Directories of micro models that say their names.
    """

    alpha: str
    beta: str


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """
    The models, built once.
    """
    folder = tmp_path_factory.mktemp("cli-models")
    names = Models._fields
    return Models(*(str(build_micro(folder / n, f"{n} speaks")) for n in names))


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """
    Runs the command in this process.
    """
    # More threads only spin where other programs want the processor.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(*arguments: str) -> Result:
        try:
            code = main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        return Result(code, *capsys.readouterr())

    return call


def start(*arguments: str, **streams: object) -> subprocess.Popen[bytes]:
    """
    Start the command in a process of its own.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        # Buffers are what a broken pipe leaves behind.
        "PYTHONUNBUFFERED": "",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
    }
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-m", "whispercache", *arguments],
        env=environment,
        cwd=ROOT,
        **pipes,
    )


def finish(child: subprocess.Popen[bytes]) -> Result:
    """
    Wait for a child's end.
    """
    out, err = child.communicate(timeout=60)
    return Result(child.returncode, (out or b"").decode(), (err or b"").decode())


class TestTranscribe:
    """
    ``whispercache transcribe``.
    """

    @pytest.mark.process
    def test_real_speech_comes_out_as_text_and_nothing_else(self) -> None:
        """
        One file and one model: stdout is the transcript, stderr is empty.
        """
        child = start("transcribe", BREAD, "--model", str(packaged("tiny.en")))
        assert finish(child) == (0, f"{SPOKEN}\n", "")

    def test_models_take_turns_each_with_all_files(
        self, run: Callable[..., Result], models: Models
    ) -> None:
        """
        Under headings, the first model's texts all come before the second's.
        """
        arguments = ("--model", models.alpha, "--model", models.beta)
        result = run("transcribe", BREAD, GARDEN, *arguments)
        assert result == (
            0,
            "".join(
                f"==> {file} · {name} <==\n{name} speaks\n\n"
                for name in ("alpha", "beta")
                for file in (BREAD, GARDEN)
            ),
            "",
        )

    def test_each_model_is_loaded_once(
        self,
        run: Callable[..., Result],
        models: Models,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """
        Two files through one model, named twice: one load.
        """
        loads = []
        load = FasterWhisperLoader.load

        def counting(*arguments: object) -> object:
            loads.append(arguments)
            return load(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(FasterWhisperLoader, "load", counting)
        twice = ("--model", models.alpha, "--model", f"{models.alpha}/.")
        result = run("transcribe", BREAD, GARDEN, *twice)
        assert result.out.count("alpha speaks") == 2
        assert len(loads) == 1

    def test_json_is_one_object_for_each_file_and_model(
        self, run: Callable[..., Result], models: Models
    ) -> None:
        """
        Each line parses by itself, and has what --help says.
        """
        arguments = ("--model", models.alpha, "--model", models.beta)
        result = run(
            "transcribe",
            BREAD,
            GARDEN,
            *arguments,
            "--format",
            "json",
            "--device",
            "cpu",
        )
        objects = [json.loads(line) for line in result.out.splitlines()]
        assert [(one["file"], one["text"]) for one in objects] == [
            (file, f"{name} speaks")
            for name in ("alpha", "beta")
            for file in (BREAD, GARDEN)
        ]
        assert objects[0] == {
            "file": BREAD,
            "model": f"{os.path.realpath(models.alpha)}/cpu/float32",
            "language": "en",
            "duration": pytest.approx(3.0, abs=0.5),
            "text": "alpha speaks",
            "segments": [{"start": 0.0, "end": 2.0, "text": "alpha speaks"}],
        }

    @pytest.mark.process
    @pytest.mark.parametrize("name", ["srt", "vtt"])
    def test_subtitles_of_real_speech_parse(self, name: str) -> None:
        """
        Two sentences are two cues, one after the other.
        """
        model, clip = str(packaged("tiny.en")), str(CLIPS / "en-two-voices.flac")
        result = finish(start("transcribe", clip, "--model", model, "--format", name))
        assert result.code == 0
        first, second = PARSERS[name](result.out)
        assert first.text.endswith("Sunday morning.")
        assert second.text.startswith("We planted tomatoes")
        assert 0 <= first.start_s < first.end_s <= second.start_s < second.end_s

    @pytest.mark.process
    def test_batches_keep_the_times_of_subtitles(self) -> None:
        """
        Batched and with voice detection, half a minute is still more than one cue.
        """
        model, clip = (
            str(packaged("tiny.en")),
            str(CLIPS / "en-harbour-long.flac"),
        )
        options = ("--batch-size", "2", "--vad", "--beam-size", "1", "--format", "srt")
        result = finish(start("transcribe", clip, "--model", model, *options))
        cues = PARSERS["srt"](result.out)
        assert len(cues) > 3
        assert "lighthouse" in " ".join(cue.text for cue in cues)

    @pytest.mark.parametrize("owns_process", [False, True])
    def test_it_sets_up_only_a_process_of_its_own(
        self,
        models: Models,
        monkeypatch: pytest.MonkeyPatch,
        *,
        owns_process: bool,
    ) -> None:
        """
        A program that calls it keeps its environment as it was.
        """
        name = "OPENBLAS_THREAD_TIMEOUT"
        # So that it is as before after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
        place = ["--model", models.alpha, "--no-huge-pages"]
        arguments = ["transcribe", BREAD, *place]
        monkeypatch.setattr(sys, "argv", ["whispercache", *arguments])
        assert main(None if owns_process else arguments) == 0
        assert (name in os.environ) == owns_process

    def test_a_model_leaves_before_the_next_one_comes(
        self,
        run: Callable[..., Result],
        models: Models,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """
        The first one's memory is the second one's to use.
        """
        done = []
        load, unload = FasterWhisperLoader.load, FasterWhisperLoader.unload

        def loading(loader: FasterWhisperLoader, *rest: Any) -> object:
            done.append("load")
            return load(loader, *rest)

        def unloading(
            loader: FasterWhisperLoader, *rest: Any, **options: Any
        ) -> object:
            done.append("unload")
            return unload(loader, *rest, **options)

        monkeypatch.setattr(FasterWhisperLoader, "load", loading)
        monkeypatch.setattr(FasterWhisperLoader, "unload", unloading)
        run("transcribe", BREAD, "--model", models.alpha, "--model", models.beta)
        assert done == ["load", "unload", "load", "unload"]

    def test_options_reach_the_model(
        self,
        run: Callable[..., Result],
        models: Models,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """
        All that were given, and none of which faster-whisper has a default of its own.
        """
        given: list[dict[str, object]] = []
        kind = class_over(WhisperModel)
        transcribe = kind.transcribe

        def noting(model: Any, audio: str, **options: Any) -> object:
            given.append(options)
            return transcribe(model, audio, **options)

        monkeypatch.setattr(kind, "transcribe", noting)
        options = ("--language", "de", "--task", "translate", "--beam-size", "2")
        run("transcribe", BREAD, "--model", models.alpha, *options, "--vad")
        run("transcribe", BREAD, "--model", models.alpha, "--batch-size", "3")
        usual = {"language": None, "task": "transcribe", "beam_size": 5}
        assert given == [
            {
                "language": "de",
                "task": "translate",
                "beam_size": 2,
                "batch_size": None,
                "vad_filter": True,
            },
            {**usual, "batch_size": 3},
        ]

    @pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
    def test_a_name_that_is_no_text_comes_out_whole(
        self, run: Callable[..., Result], models: Models, tmp_path: Path
    ) -> None:
        """
        Its bytes can be had back from the JSON, which is UTF-8 all the same.
        """
        name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.flac")
        Path(name).symlink_to(BREAD)
        options = ("--model", models.alpha, "--format", "json")
        result = run("transcribe", name, *options)
        assert json.loads(result.out)["file"] == name
        run("transcribe", name, *options, "--output-dir", str(tmp_path))
        (written,) = tmp_path.glob("*.json")
        assert json.loads(written.read_text(encoding="utf-8"))["file"] == name

    def test_files_of_one_name_do_not_overwrite_each_other(
        self, run: Callable[..., Result], models: Models, tmp_path: Path
    ) -> None:
        """
        Two inputs called talk and two models called alpha make four files.
        """
        for folder, clip in (("one", BREAD), ("two", GARDEN)):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "talk.flac").symlink_to(clip)
        other = str(build_micro(tmp_path / "alpha", "another alpha"))
        talks = [str(tmp_path / folder / "talk.flac") for folder in ("one", "two")]
        wanted = ("--model", models.alpha, "--model", other)
        texts = tmp_path / "texts" / "deep"
        result = run("transcribe", *talks, *wanted, "--output-dir", str(texts))
        assert (result.code, result.out) == (0, "")
        assert {path.name: path.read_text() for path in texts.iterdir()} == {
            "talk.alpha.txt": "alpha speaks\n",
            "talk-2.alpha.txt": "alpha speaks\n",
            "talk.alpha-2.txt": "another alpha\n",
            "talk-2.alpha-2.txt": "another alpha\n",
        }
        assert f"{talks[1]} · alpha: {texts / 'talk-2.alpha.txt'}" in result.err

    def test_a_file_that_fails_midway_leaves_nothing_behind(
        self,
        run: Callable[..., Result],
        models: Models,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """
        What was written before stays as it was, and half a file is no file.
        """

        def failing(_transcript: Transcript) -> Iterator[str]:
            yield "half"
            raise RuntimeError("CUDA\nfailed")

        (tmp_path / "en-bread.alpha.txt").write_text("before")
        monkeypatch.setattr(job, "FORMATS", {"txt": failing})
        options = ("--model", models.alpha, "--output-dir", str(tmp_path))
        result = run("transcribe", BREAD, *options)
        assert result == (2, "", "whispercache: error: CUDA failed\n")
        assert [path.name for path in tmp_path.iterdir()] == ["en-bread.alpha.txt"]
        assert (tmp_path / "en-bread.alpha.txt").read_text() == "before"

    def test_a_file_that_cannot_be_decoded_does_not_stop_the_others(
        self, run: Callable[..., Result], models: Models, tmp_path: Path
    ) -> None:
        """
        One line for each bad file, however many models; the others are done.
        """
        (tmp_path / "notes.wav").write_text("no audio")
        bad = [str(tmp_path / "notes.wav"), str(tmp_path / "none.wav"), str(tmp_path)]
        wanted = ("--model", models.alpha, "--model", models.beta)
        result = run("transcribe", *bad, BREAD, *wanted)
        assert result.code == 2
        assert result.out.count("speaks") == 2
        errors = result.err.splitlines()
        assert len(errors) == 3
        for path, line in zip(bad, errors, strict=True):
            assert line.startswith("whispercache: error: ")
            assert path in line

    @pytest.mark.process
    @pytest.mark.parametrize("command", ["models", "transcribe"])
    def test_a_reader_that_leaves_early_is_no_error(
        self, command: str, models: Models
    ) -> None:
        """
        As with ``| head``: no word about the broken pipe.
        """
        rest = () if command == "models" else (BREAD, "--model", models.alpha)
        reader, writer = os.pipe()
        os.close(reader)
        child = start(command, *rest, stdout=writer)
        os.close(writer)
        assert finish(child) == (141, "", "")

    @pytest.mark.process
    def test_ctrl_c_ends_it_at_once_and_quietly(self, models: Models) -> None:
        """
        In the middle of work that would take minutes.
        """
        # What a shell starts in the background inherits that Ctrl-C is ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            child = start("transcribe", *[BREAD] * 1000, "--model", models.alpha)
        finally:
            signal.signal(signal.SIGINT, before)
        assert child.stdout is not None
        first = child.stdout.readline()  # it is at work
        child.send_signal(signal.SIGINT)
        code, _, err = finish(child)
        assert (code, err) == (130, "")
        assert first


class TestProgress:
    """
    The line of progress.
    """

    @pytest.mark.process
    def test_a_terminal_shows_how_much_of_the_audio_is_done(
        self, models: Models
    ) -> None:
        """
        On stderr, while stdout has the transcript alone.
        """
        out, err = on_terminal("transcribe", BREAD, "--model", models.alpha)
        assert out == "alpha speaks\n"
        assert "en-bread.flac · alpha" in err
        assert "loading" in err
        percent = [int(number) for number in re.findall(r"(\d+)%", err)]
        assert max(percent) in range(50, 100)
        assert re.search(r"\d+:\d\d left", err)

    @pytest.mark.process
    def test_it_leaves_the_terminal_as_it_was(self, models: Models) -> None:
        """
        The last line is erased, and the cursor is shown again.
        """
        _, err = on_terminal("transcribe", BREAD, "none.wav", "--model", models.alpha)
        assert "whispercache: error: none.wav: No such file or directory" in err
        assert re.findall(r"\x1b\[\?25([hl])", err)[-1] == "h"
        assert err.endswith("\x1b[2K")

    def test_time_runs_down_between_segments(self) -> None:
        """
        A quarter done after 10 s leaves 30 s; 5 s later, without news, 25 s; never less
        than none.
        """
        assert remaining_s(0.25, 10.0, 10.0) == 30.0
        assert remaining_s(0.25, 10.0, 15.0) == 25.0
        assert remaining_s(0.25, 10.0, 100.0) == 0.0


def on_terminal(*arguments: str) -> tuple[str, str]:
    """
    What the command writes to stdout, a pipe, and to stderr, a terminal.
    """
    ours, theirs = pty.openpty()
    child = start(*arguments, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # how Linux says that nobody holds the other end
            break
    os.close(ours)
    return finish(child).out, shown.decode()


class TestErrors:
    """
    One line on stderr, exit code 2, no traceback, nothing on stdout.
    """

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--model", "tinny"), "did you mean 'tiny'"),
            (("--model", "{folder}"), "no model.bin"),
            (("--model", "{folder}/nowhere"), "no such directory"),
            (
                ("--model", "{alpha}", "--ram", "1MiB", "--device", "cpu"),
                "at most 1.0 MiB can be had",
            ),
            (("--model", "{alpha}", "--ram", "lots"), "ram must be an amount"),
            (("--model", "{alpha}", "--ram=-4GiB"), "ram must be an amount"),
            (("--model", "{alpha}", "--vram", "900%"), "vram as a fraction"),
            (("--model", "{alpha}", "--device", "tpu"), "not 'tpu'"),
            (("--model", "{alpha}", "--device", "cuda:99"), "cuda:99"),
            (("--model", "{alpha}", "--compute-type", "int4"), "int8_float32"),
            (("--model", "{alpha}", "--language", "klingon"), "klingon"),
            (("--model", "{alpha}", "--beam-size", "0"), "--beam-size"),
            (("--model", "{alpha}", "--batch-size", "x"), "--batch-size"),
            (("--model", "{alpha}", "--format", "doc"), "--format"),
            (("--model", "{alpha}", "--output-dir", BREAD), BREAD),
            ((), "--model; see 'whispercache transcribe --help'"),
            (
                ("--model", "{alpha}", "--devise", "cpu"),
                "(did you mean --device?); see 'whispercache transcribe --help'",
            ),
        ],
    )
    def test_nonsense_is_refused_in_one_line(
        self,
        run: Callable[..., Result],
        models: Models,
        tmp_path: Path,
        options: tuple[str, ...],
        said: str,
    ) -> None:
        """
        The line names what was wrong.
        """
        names = {"alpha": models.alpha, "folder": str(tmp_path)}
        result = run("transcribe", BREAD, *(text.format(**names) for text in options))
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("whispercache: error: ")
        assert result.err.count("\n") == 1
        assert said in result.err

    @pytest.mark.parametrize(
        ("command", "said"),
        [
            ("srve", "there is no command 'srve' (did you mean serve?)"),
            ("talk.wav", "there is no command 'talk.wav'; see 'whispercache --help'"),
        ],
    )
    def test_a_command_that_is_none_is_told_the_nearest(
        self, run: Callable[..., Result], command: str, said: str
    ) -> None:
        """
        In one line, as all nonsense.
        """
        result = run(command, "base")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert said in result.err

    def test_a_model_that_cannot_fit_is_refused_before_any_work(
        self, run: Callable[..., Result], models: Models
    ) -> None:
        """
        Though the first model fits, it does not begin: the second never would.
        """
        wanted = ("--model", models.alpha, "--model", "large-v3")
        result = run("transcribe", BREAD, *wanted, "--device", "cpu", "--ram", "1GiB")
        assert (result.code, result.out) == (2, "")
        assert "large-v3/cpu/float32 needs" in result.err

    @pytest.mark.process
    def test_a_child_fails_without_a_traceback(self) -> None:
        """
        The same through a process: code, one line, nothing on stdout.
        """
        result = finish(start("transcribe", BREAD, "--model", "tinny"))
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)

    @pytest.mark.parametrize("arguments", [(), ("frob",), ("models", "--frob")])
    def test_wrong_usage_is_one_line(
        self, run: Callable[..., Result], arguments: tuple[str, ...]
    ) -> None:
        """
        Instead of argparse's usage there is a word where to find it.
        """
        result = run(*arguments)
        assert (result.code, result.out) == (2, "")
        assert re.fullmatch(r"whispercache: error: .*--help'\n", result.err)


class TestStart:
    """
    What happens before a command is run.
    """

    @pytest.mark.process
    @pytest.mark.parametrize("option", ["--help", "--version"])
    def test_it_answers_without_heavy_imports(self, option: str) -> None:
        """
        Neither the libraries that run models nor rich are imported to show help.
        """
        code = f"""
import sys
from whispercache.cli.main import main
try:
    main([{option!r}])
except SystemExit as end:
    print(end.code, sorted(sys.modules))
"""
        child = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        *_, last = child.stdout.splitlines()
        assert last.startswith("0 ")
        heavy = ("faster_whisper", "ctranslate2", "numpy", "rich", "huggingface_hub")
        assert [name for name in heavy if f"'{name}'" in last] == []

    def test_it_knows_its_version(self, run: Callable[..., Result]) -> None:
        """
        The package's own.
        """
        assert run("--version") == (0, f"whispercache {__version__}\n", "")

    @pytest.mark.parametrize(
        ("command", "expected"),
        [
            (("transcribe", "gone.wav", "--model", "/gone"), [True]),
            (("transcribe", "gone.wav", "--model", "/gone", "--no-huge-pages"), []),
            (
                ("transcribe", "gone.wav", "--model", "/gone", "--batch-size", "2"),
                [False],
            ),
            (
                ("compare", "gone.wav", "--models", "/a,/b", "--out", "/dev/null/x"),
                [True],
            ),
            (("serve", "/gone", "--port", "0"), [False]),
            (("variants", "build", "/gone"), []),
        ],
    )
    def test_commands_that_load_models_use_huge_pages(
        self,
        run: Callable[..., Result],
        monkeypatch: pytest.MonkeyPatch,
        command: tuple[str, ...],
        expected: list[bool],
    ) -> None:
        """
        Unless they are told not to; and not where a program calls them, whose heap is
        its own. Those that end with their work keep what it frees, if not in batches.
        """
        asked: list[bool] = []
        monkeypatch.setattr(
            "whispercache.devices.heap.use_huge_pages",
            lambda *, keep: asked.append(keep),
        )
        assert run(*command).code == 2
        assert not asked
        monkeypatch.setattr(sys, "argv", ["whispercache", *command])
        assert main() == 2
        assert asked == expected


# Formats ------------------------------------------------------------------------------


def seconds(clock: str) -> float:
    """
    Seconds in a time as subtitles write it.
    """
    hours, minutes, rest = clock.replace(",", ".").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


def parse_srt(text: str) -> list[Cue]:
    """
    The cues of a SubRip file, read as players do: a blank line ends a cue.
    """
    cues = []
    for number, block in enumerate(text.removesuffix("\n\n").split("\n\n"), 1):
        if not block:
            continue
        first, span, *lines = block.split("\n")
        assert first == str(number)
        clock = r"(\d{2,}:\d\d:\d\d,\d{3})"
        match = re.fullmatch(f"{clock} --> {clock}", span)
        assert match
        assert lines
        assert not any("-->" in line for line in lines)
        cues.append(Cue(seconds(match[1]), seconds(match[2]), "\n".join(lines)))
    return cues


def parse_vtt(text: str) -> list[Cue]:
    """
    The cues of a WebVTT file; their text still has its escapes.
    """
    head, *blocks = text.removesuffix("\n\n").split("\n\n")
    assert head == "WEBVTT"
    cues = []
    for block in blocks:
        span, *lines = block.split("\n")
        clock = r"(\d{2,}:[0-5]\d:[0-5]\d\.\d{3})"
        match = re.fullmatch(f"{clock} --> {clock}", span)
        assert match
        assert lines
        assert not re.search(r"[<>]|&(?!amp;|lt;|gt;)", "".join(lines))
        cues.append(Cue(seconds(match[1]), seconds(match[2]), "\n".join(lines)))
    return cues


PARSERS = {"srt": parse_srt, "vtt": parse_vtt}


def written(name: str, *cues: Cue) -> str:
    """
    These cues in a format.
    """
    # No cue ends after the audio.
    duration_s = max([12.5, *(cue.end_s for cue in cues)])
    transcript = Transcript("talk.wav", "tiny/cpu/float32", "en", duration_s, cues)
    return "".join(FORMATS[name](transcript))


class TestFormats:
    """
    The formats by themselves.
    """

    @pytest.mark.parametrize("name", ["srt", "vtt"])
    @pytest.mark.parametrize(
        ("second", "clock"),
        [
            (0.0, "00:00:00.000"),
            (59.9996, "00:01:00.000"),
            (3599.9994, "00:59:59.999"),
            (3725.05, "01:02:05.050"),
            (360_000.0, "100:00:00.000"),
        ],
    )
    def test_times_have_hours_and_are_rounded(
        self, name: str, second: float, clock: str
    ) -> None:
        """
        Rounding carries over into minutes and hours.
        """
        text = written(name, Cue(second, second + 1, "text"))
        point = "," if name == "srt" else "."
        assert clock.replace(".", point) + " --> " in text

    def test_markup_survives_as_text(self) -> None:
        """
        WebVTT escapes it; SubRip, which has no escape, only bends the arrow.
        """
        cue = Cue(0, 1, " a --> <b> & c ")
        assert parse_vtt(written("vtt", cue))[0].text == "a --&gt; &lt;b&gt; &amp; c"
        assert parse_srt(written("srt", cue))[0].text == "a -> <b> & c"

    @pytest.mark.parametrize("name", ["srt", "vtt"])
    @given(
        cues=st.lists(
            st.builds(
                Cue,
                st.floats(0, 400_000),
                st.floats(0, 400_000),
                st.text(st.sampled_from("a <>&-\n\r\t\x85\u2028é")),
            )
        )
    )
    def test_whatever_was_heard_parses_back(self, name: str, cues: list[Cue]) -> None:
        """
        Each cue that says something is one cue, shown for at least a moment.
        """
        parsed = PARSERS[name](written(name, *cues))
        assert len(parsed) == sum(bool(cue.text.strip()) for cue in cues)
        assert all(cue.start_s < cue.end_s for cue in parsed)

    def test_text_is_a_line_a_segment(self) -> None:
        """
        Without the spaces and line breaks of the model.
        """
        cues = (Cue(0, 1, " one\n two "), Cue(1, 2, "  "), Cue(2, 3, " three"))
        assert written("txt", *cues) == "one two\nthree\n"

    def test_text_is_written_as_it_comes(self) -> None:
        """
        The first line is there before the second segment was computed.
        """

        def speak() -> Iterator[Cue]:
            yield Cue(0, 1, "first")
            raise AssertionError("the second was asked for too early")

        transcript = Transcript("talk.wav", "tiny", "en", 2.0, speak())
        assert next(FORMATS["txt"](transcript)) == "first\n"

    def test_json_keeps_every_letter(self) -> None:
        """
        Letters beyond ASCII stay readable, and line breaks do not break the line.
        """
        text = written("json", Cue(0, 1.23456, " año\nnuevo"))
        assert text.count("\n") == 1
        assert "año" in text
        segment = {"start": 0, "end": 1.235, "text": "año\nnuevo"}
        assert json.loads(text)["segments"] == [segment]


# models and doctor --------------------------------------------------------------------


@pytest.fixture(scope="session")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    The fake drivers, compiled once.
    """
    return build_drivers(tmp_path_factory.mktemp("cli-drivers"))


@pytest.fixture
def gpus(drivers: Path, tmp_path: Path) -> FakeGpus:
    """
    A machine whose GPUs the test describes.
    """
    return FakeGpus(tmp_path, drivers)


def on_machine(
    gpus: FakeGpus, state: str, *arguments: str, without: tuple[str, ...] = ()
) -> tuple[int, str]:
    """
    Exit code and stdout of the command on a machine with fake drivers.
    """
    gpus.set_state(state)
    code = f"""
import contextlib, io
from whispercache.cli.main import main
out = io.StringIO()
with contextlib.redirect_stdout(out):
    code = main({list(arguments)!r})
answer = [code, out.getvalue()]
"""
    answer = gpus.answer(code, without=without, COLUMNS="80")
    assert isinstance(answer, list)
    return answer[0], answer[1]


NO_DRIVERS = ("cuda", "nvml")


class TestModels:
    """
    ``whispercache models``.
    """

    def test_it_lists_every_size_with_its_bytes(
        self, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        As JSON: what `footprint` says, for each size and compute type.
        """
        loads: list[object] = []
        monkeypatch.setattr(FasterWhisperLoader, "load", loads.append)
        result = run("models", "--json", "--device", "cpu")
        document = json.loads(result.out)
        (place,) = document["devices"]
        sizes = {(one["model"], one["compute_type"]): one for one in document["models"]}
        assert {model for model, _ in sizes} == set(MODELS)
        tiny, expected = sizes["tiny", "int8_float32"], footprint("tiny", "int8")
        assert tiny["weights_bytes"] == expected.weights_bytes
        assert tiny["total_bytes"] == expected.total_bytes
        assert place["usable_bytes"] < place["free_bytes"] <= place["total_bytes"]
        assert not loads

    def test_a_model_fits_up_to_the_last_byte(self) -> None:
        """
        Free memory less headroom is compared with weights and the work of one call.
        """
        needed_bytes = footprint("small", "float16", "cuda").total_bytes
        headroom_bytes = 512 * MIB
        for less_bytes, fits in ((0, True), (1, False)):
            card_bytes = needed_bytes + headroom_bytes - less_bytes
            machine = FakeMachine({"cpu": "64GiB", "cuda:0": card_bytes})
            found = survey("cuda:0", "float16", FakeLoader(machine), machine)
            ((_, sizes),) = found
            assert {size.model: size.fits for size in sizes}["small"] is fits

    def test_the_way_to_the_card_counts_too(self) -> None:
        """
        Without host memory for the load, an empty card takes no model.
        """
        machine = FakeMachine({"cpu": "257MiB", "cuda:0": "80GiB"})
        ((_, sizes),) = survey("cuda:0", "float32", FakeLoader(machine), machine)
        assert not {size.model: size.fits for size in sizes}["large-v3"]

    @pytest.mark.process
    def test_without_a_gpu_the_cpu_alone_is_shown(self, gpus: FakeGpus) -> None:
        """
        In one table, with a row for each size.
        """
        code, out = on_machine(gpus, "", "models", without=NO_DRIVERS)
        assert code == 0
        assert "cuda:" not in out
        assert re.search(r"^cpu  \S", out)
        rows = [
            line.split()[0] for line in out.splitlines() if "✓" in line or "✗" in line
        ]
        assert [row for row in rows if row in MODELS] == list(MODELS)

    @pytest.mark.process
    def test_a_card_has_its_own_table_within_80_columns(self, gpus: FakeGpus) -> None:
        """
        Of 3 GiB free, large-v3 fits into none in float16, and small in all types.
        """
        code, out = on_machine(gpus, ONE_CARD, "models")
        assert code == 0
        card, cpu = out.split("\ncpu  ")
        assert "cuda:0  Alpha\n3.0 GiB of 8.0 GiB free, 2.5 GiB for models" in card
        assert "see whispercache doctor" in card
        assert "float16" not in cpu.partition("GiB. ")[0]
        marks = {
            line.split()[0]: re.findall("[✓✗]", line)
            for line in card.splitlines()
            if re.search("[✓✗]", line)
        }
        assert marks["small"] == ["✓", "✓", "✓"]
        assert marks["large-v2"] == ["✗", "✗", "✗"]
        assert marks["large-v3-turbo"] == ["✗", "✓", "✓"]
        assert max(map(len, out.splitlines())) <= 80

    def test_cuda_means_all_cards(self) -> None:
        """
        Each has its own table; without one, the error is that of the first.
        """
        machine = FakeMachine({"cpu": "8GiB", "cuda:0": "1GiB", "cuda:1": "2GiB"})
        found = survey("cuda", None, FakeLoader(machine), machine)
        assert [place.device for place, _ in found] == ["cuda:0", "cuda:1"]
        none = FakeMachine({"cpu": "8GiB"})
        with pytest.raises(DeviceUnavailable, match="cuda:0"):
            survey("cuda", None, FakeLoader(none), none)

    def test_one_compute_type_can_be_asked_for(
        self, run: Callable[..., Result]
    ) -> None:
        """
        Under the name of what it means there.
        """
        result = run("models", "--device", "cpu", "--compute-type", "int8")
        header = result.out.splitlines()[2]
        assert header.split() == ["int8_float32"]

    @pytest.mark.parametrize(
        ("option", "value"),
        [("--device", "cuda:99"), ("--device", "x"), ("--compute-type", "int4")],
    )
    def test_what_is_not_there_is_an_error(
        self, run: Callable[..., Result], option: str, value: str
    ) -> None:
        """
        In one line.
        """
        result = run("models", option, value)
        assert (result.code, result.out) == (2, "")
        assert result.err.count("\n") == 1
        assert value in result.err


class TestDoctor:
    """
    ``whispercache doctor``.
    """

    @pytest.mark.process
    def test_a_machine_without_a_gpu_is_healthy(self, gpus: FakeGpus) -> None:
        """
        It says so, with what was found, and ends with 0.
        """
        code, out = on_machine(gpus, "", "doctor", without=NO_DRIVERS)
        assert code == 0
        assert "All that is needed works: models run on the CPU." in out
        for subject in ("faster-whisper", "CTranslate2", "host memory", "hub cache"):
            assert re.search(rf"^✓  {subject} ", out, re.MULTILINE)
        assert re.search(r"^·  NVIDIA driver +none", out, re.MULTILINE)
        assert "float32, int8, int8_float32" in out

    @pytest.mark.process
    def test_a_card_that_ctranslate2_cannot_use_is_wrong(self, gpus: FakeGpus) -> None:
        """
        The driver and the card are shown, what is missing is marked; the code is 1.
        """
        code, out = on_machine(gpus, ONE_CARD, "doctor")
        assert code == 1
        assert re.search(r"^✓  NVIDIA driver +\d", out, re.MULTILINE)
        assert re.search(
            r"^✓  cuda:0 +Alpha, 3.0 GiB of 8.0 GiB free", out, re.MULTILINE
        )
        assert re.search(r"^✗  CUDA +CTranslate2 sees 0 of 1 GPUs", out, re.MULTILINE)
        assert "To mend: CUDA" in out

    @pytest.mark.process
    def test_a_driver_that_shows_no_card_is_wrong_unless_they_are_hidden(
        self, gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        An empty CUDA_VISIBLE_DEVICES is somebody's wish.
        """
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        nothing = "fail cuInit 100"
        code, out = on_machine(gpus, nothing, "doctor")
        assert (code, "✗  GPU" in out) == (1, True)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        code, out = on_machine(gpus, nothing, "doctor")
        assert (code, "·  GPU" in out) == (0, True)

    @pytest.mark.process
    def test_without_nvml_a_card_is_still_usable(self, gpus: FakeGpus) -> None:
        """
        That is worth a note, with what it costs.
        """
        _, out = on_machine(gpus, ONE_CARD, "doctor", without=("nvml",))
        assert re.search(r"^·  NVML +NVML cannot be used", out, re.MULTILINE)
        assert re.search(r"^✓  cuda:0 +Alpha", out, re.MULTILINE)

    @pytest.fixture
    def healthy(self, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
        """
        A machine with a card, and all that it needs.
        """
        # That of faster-whisper 1.2.1 is not, with PyAV 19.
        monkeypatch.setattr(faster_whisper, "decode_audio", lambda _: None)
        monkeypatch.setattr(doctor, "driver_version", lambda: "580.95.05")
        monkeypatch.setattr(doctor, "nvml_problem", lambda: None)
        monkeypatch.setattr(doctor, "cublas_problem", lambda: None)
        monkeypatch.setattr(doctor, "huge_pages_problem", lambda: "")
        return FakeMachine({"cpu": "8GiB", "cuda:0": "8GiB"})

    def found(self, machine: FakeMachine) -> dict[str, Finding]:
        """
        Findings by subject.
        """
        findings = examine(FakeLoader(machine), machine)
        return {finding.subject: finding for finding in findings}

    def test_a_machine_with_a_gpu_can_be_healthy(self, healthy: FakeMachine) -> None:
        """
        Then every line is a tick.
        """
        found = self.found(healthy)
        assert {finding.mark for finding in found.values()} == {"works"}
        assert "float16" in found["types, cuda:0"].text
        assert "fake cuda:0, 8.0 GiB of 8.0 GiB free" in found["cuda:0"].text

    @pytest.mark.parametrize(
        ("problem", "shown"),
        [
            ("", "models are loaded into them"),
            ("they need glibc", "none, since they need glibc; a change of models"),
            ("it says never: write madvise", "none, since it says never; a change"),
        ],
    )
    def test_huge_pages_are_shown_and_what_it_costs_to_have_none(
        self,
        healthy: FakeMachine,
        monkeypatch: pytest.MonkeyPatch,
        problem: str,
        shown: str,
    ) -> None:
        """
        That is no error: all works without them.
        """
        monkeypatch.setattr(doctor, "huge_pages_problem", lambda: problem)
        found = self.found(healthy)["huge pages"]
        assert found.mark == ("note" if problem else "works")
        assert found.text.startswith(shown)
        assert found.mend == problem.partition(": ")[2]

    def test_a_missing_cublas_is_wrong_and_can_be_mended(
        self, healthy: FakeMachine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        What is missing and what to do are two lines.
        """
        problem = "libcublas.so.12 was not found: pip install it"
        monkeypatch.setattr(doctor, "cublas_problem", lambda: problem)
        assert self.found(healthy)["cuBLAS"] == Finding(
            "wrong", "cuBLAS", "libcublas.so.12 was not found", "pip install it"
        )

    def test_an_old_driver_is_told_from_a_package_without_cuda(
        self, healthy: FakeMachine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Only where the driver is older than CUDA 12 is it to be updated.
        """
        monkeypatch.setattr(FakeLoader, "devices", lambda _: ("cpu",))
        assert "x86-64" in self.found(healthy)["CUDA"].mend
        monkeypatch.setattr(doctor, "driver_version", lambda: "470.82.01")
        assert "update the driver to 525" in self.found(healthy)["CUDA"].mend

    def test_a_lost_card_is_wrong(
        self, healthy: FakeMachine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        The line has the driver's reason.
        """
        error = DeviceUnavailable("cuda:0", "the GPU is lost; restart the machine")

        def lost(_machine: FakeMachine, _device: str) -> str:
            raise error

        monkeypatch.setattr(FakeMachine, "device_name", lost)
        card = self.found(healthy)["cuda:0"]
        assert (card.mark, card.text) == ("wrong", "the GPU is lost")
        assert card.mend == "restart the machine"

    def test_libraries_that_cannot_be_imported_are_wrong(
        self, healthy: FakeMachine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        What needs them is left out, and the rest is examined.
        """

        def broken() -> dict[str, str]:
            raise ImportError("libgomp.so.1: no such file", name="ctranslate2")

        monkeypatch.setattr(doctor, "versions", broken)
        found = self.found(healthy)
        assert found["ctranslate2"].mark == "wrong"
        assert "libgomp" in found["ctranslate2"].text
        assert "types, cpu" not in found
        assert found["cuda:0"].mark == "works"

    def test_an_audio_library_that_programs_cannot_use_is_worth_a_note(
        self, healthy: FakeMachine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        The cache can, so all that it needs works.
        """

        def refuse(_file: object) -> None:
            raise TypeError("open() got an unexpected argument 'metadata_errors'")

        monkeypatch.setattr(faster_whisper, "decode_audio", refuse)
        found = self.found(healthy)
        assert found["PyAV"].mark == "note"
        assert "the cache reads files, but faster-whisper's" in found["PyAV"].text
        assert "metadata_errors" in found["PyAV"].text
        assert found["PyAV"].mend.startswith("pip install 'av<19'")
        assert found["onnxruntime"].mark == "works"

    def test_without_an_audio_library_samples_can_be_heard(
        self, healthy: FakeMachine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        docs/gpu.md leaves it out.
        """

        def absent(name: str) -> str:
            if name == "av":
                raise PackageNotFoundError(name)
            return version(name)

        monkeypatch.setattr(doctor, "version", absent)
        found = self.found(healthy)["PyAV"]
        assert (found.mark, found.mend) == ("note", "pip install av")

    def test_two_packages_with_one_module_are_wrong(
        self, healthy: FakeMachine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        The files are those of the last one that was installed.
        """
        assert "packages" not in self.found(healthy)
        names = ["faster-whisper2", "faster-whisper", "faster-whisper"]
        monkeypatch.setattr(
            doctor,
            "packages_distributions",
            lambda: {"faster_whisper": names, "onnxruntime": ["onnxruntime"]},
        )
        found = self.found(healthy)["packages"]
        assert found.mark == "wrong"
        assert found.text.startswith("faster-whisper and faster-whisper2 are both")
        assert "pip uninstall faster-whisper faster-whisper2," in found.mend

    def test_a_full_disk_is_worth_a_note(
        self, healthy: FakeMachine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Large models would not fit into the cache of downloads.
        """
        monkeypatch.setattr(doctor, "SMALL_DISK_BYTES", 2**62)
        assert self.found(healthy)["hub cache"].mark == "note"

    def test_a_cache_that_cannot_be_written_is_wrong(
        self,
        healthy: FakeMachine,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        """
        Here a file is where the folder should be.
        """
        (tmp_path / "hub").write_text("")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", tmp_path / "hub")
        found = self.found(healthy)["hub cache"]
        assert (found.mark, "set HF_HOME" in found.mend) == ("wrong", True)

    def test_a_limit_of_the_control_group_is_told(self) -> None:
        """
        On a host of 8 GiB by the probe, the machine's own memory is named beside it.
        """
        machine = FakeMachine({"cpu": "512MiB"})
        text = self.found(machine)["host memory"].text
        assert text.startswith("512.0 MiB of 512.0 MiB free; a control group's limit")

    def test_it_takes_the_machine_it_runs_on(self, run: Callable[..., Result]) -> None:
        """
        Whatever is found here, memory and libraries are.
        """
        result = run("doctor")
        assert result.code in (0, 1)
        assert result.err == ""
        total = SystemProbe().read("cpu").total_bytes / GIB
        assert f"of {total:.1f} GiB free" in result.out
