"""
whispercache run: programs as they are, but for where their models come from.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from real import TEXT, child_environment, micro

from whispercache.cli.main import main
from whispercache.devices.heap import huge_pages_problem

if TYPE_CHECKING:
    from pathlib import Path

PROCESS = pytest.mark.process
PYTHON = sys.executable

# A program that knows nothing of whispercache. Its model is the first argument.
PROGRAM = """\
import json, sys
from faster_whisper import WhisperModel
import numpy as np

def told():
    model = WhisperModel(sys.argv[1], "cpu", cpu_threads=1)
    segments, _ = model.transcribe(np.zeros(16000, np.float32))
    return type(model.model).__name__, "".join(each.text for each in segments)

if __name__ == "__main__":
    print(json.dumps(told()))
"""
LEASED = ["LeasedWhisper", TEXT]


def run(
    *arguments: str | Path,
    environment: dict[str, str | Path] | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """
    Run the command with *arguments*, to its end.
    """
    command = [PYTHON, "-m", "whispercache", "run", *map(str, arguments)]
    return subprocess.run(
        command,
        env=child_environment(environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """
    The program, as a file.
    """
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def beside(folder: Path) -> list[str]:
    """
    The start of a command that gives Python another folder to import from.
    """
    return ["sh", "-c", 'PYTHONPATH="$PYTHONPATH:$0" exec "$@"', str(folder)]


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    """
    The JSON that a program wrote.
    """
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Models -------------------------------------------------------------------------------


@PROCESS
def test_a_program_s_models_are_leased(program: Path) -> None:
    """
    As a file or a module; without the command they are not.
    """
    assert answer(run("--", PYTHON, program, micro())) == LEASED
    found = answer(run("-m", program.stem, micro(), cwd=program.parent))
    assert found == LEASED
    plain = subprocess.run(
        [PYTHON, program, micro()],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert answer(plain) == ["Whisper", TEXT]


@PROCESS
def test_its_children_are_reached_too(program: Path) -> None:
    """
    Those that multiprocessing spawns, and another Python.
    """
    code = f"""
import json, multiprocessing, subprocess, sys
sys.path.insert(0, {str(program.parent)!r})
import program

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        spawned = pool.apply(program.told)
    command = ["sh", "-c", "exec " + sys.executable + ' "$0" "$1"']
    command += [program.__file__, sys.argv[1]]
    done = subprocess.run(command, check=True, capture_output=True)
    print(json.dumps([spawned, json.loads(done.stdout)]))
"""
    path = program.parent / "parent.py"
    path.write_text(code)
    assert answer(run(PYTHON, path, micro())) == [LEASED, LEASED]


@PROCESS
def test_settings_reach_the_program(tmp_path: Path) -> None:
    """
    Options over variables over the file; switches, lists and cards, too.
    """
    (tmp_path / "mine.toml").write_text('ram = "3GiB"\nmax_models = 3\npolicy = "gap"')
    code = """
import json
from whispercache.settings.sources import settle
held = settle()
names = "vram ram max_models keep_alive policy fallback coordinate variants park"
print(json.dumps([held[name].value for name in names.split()]))
"""
    done = run(
        *("--config", "mine.toml", "--ram", "2GiB", "--vram", "cuda:0=1GiB,cuda:1=50%"),
        *("--fallback", "int8", "--fallback", "cpu", "--coordinate", "--no-variants"),
        *("--keep-alive", "1m", PYTHON, "-c", code),
        environment={"WHISPERCACHE_MAX_MODELS": "2", "WHISPERCACHE_RAM": "1GiB"},
        cwd=tmp_path,
    )
    assert answer(done) == [
        *({"cuda:0": "1GiB", "cuda:1": "50%"}, "2GiB", 2, "1m", "gap"),
        *(["int8", "cpu"], True, False, False),
    ]


@PROCESS
def test_limits_hold_and_preload_fails_where_the_model_is_made(program: Path) -> None:
    """
    The error is the cache's.
    """
    done = run("--ram", "1MiB", "--preload", PYTHON, program, micro())
    assert done.returncode == 1
    assert "ModelTooLarge" in done.stderr
    assert re.search(r"in told\s+model = WhisperModel\(", done.stderr)


@PROCESS
@pytest.mark.parametrize("first", ["ctranslate2", "faster_whisper", "whispercache"])
def test_ctranslate2_s_own_class_on_request(first: str) -> None:
    """
    Whichever is imported first; the cache itself keeps the plain one.
    """
    code = f"""
import {first}, json, sys
import ctranslate2, numpy as np, whispercache
model = ctranslate2.models.Whisper(sys.argv[1], intra_threads=1)
features = ctranslate2.StorageView.from_array(np.zeros((1, 80, 100), np.float32))
found = model.encode(features).shape[0]
stats = whispercache.default_cache().stats()
print(json.dumps([type(model).__name__, found, stats.loads, stats.leases]))
"""
    done = run("--ctranslate2", PYTHON, "-c", code, micro())
    assert answer(done) == ["InPlaceWhisper", 1, 1, 0]


@PROCESS
@pytest.mark.parametrize("options", [[], ["--no-huge-pages"]])
def test_models_are_loaded_into_huge_pages(program: Path, options: list[str]) -> None:
    """
    As by the other commands, where there are some; in no program without models.
    """
    code = """
import sys
before = "whispercache.devices.heap" in sys.modules
import json, faster_whisper
from whispercache.devices import heap
print(json.dumps([before, heap.is_shared()]))
"""
    expected = not options and not huge_pages_problem()
    assert answer(run(*options, PYTHON, "-c", code)) == [False, expected]
    assert answer(run(*options, PYTHON, program, micro())) == LEASED


@PROCESS
def test_a_python_without_whispercache_says_so(program: Path, tmp_path: Path) -> None:
    """
    Its models are plain.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.modules['whispercache'] = None"
    )
    done = run(*beside(tmp_path), PYTHON, program, micro())
    assert answer(done) == ["Whisper", TEXT]
    (line,) = (line for line in done.stderr.splitlines() if "install it" in line)
    assert PYTHON in line
    assert line.startswith("whispercache: faster_whisper is as it always was")


# The start of Python ------------------------------------------------------------------


@PROCESS
def test_other_programs_import_nothing_more() -> None:
    """
    And see no change of their paths, of which an empty one is the working directory.
    """
    given = f"{child_environment()['PYTHONPATH']}{os.pathsep}"
    code = "import sys; print(*sorted(sys.modules)); print(sys.path)"
    plain = subprocess.run(
        [PYTHON, "-c", code],
        env=child_environment({"PYTHONPATH": given}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    modules, path = plain.stdout.splitlines()
    done = run("--", PYTHON, "-c", code, environment={"PYTHONPATH": given})
    found, same = done.stdout.splitlines()
    assert same == path
    assert set(found.split()) - set(modules.split()) <= {"sitecustomize"}


@PROCESS
@pytest.mark.parametrize("text", ["print('site was here')", "raise KeyError('own')"])
def test_another_sitecustomize_runs_as_without(tmp_path: Path, text: str) -> None:
    """
    Its output and its errors; it is the module of that name.
    """
    (tmp_path / "sitecustomize.py").write_text(text)
    code = "import sys; print(sys.modules.get('sitecustomize'))"
    command = [*beside(tmp_path), PYTHON, "-c", code]
    plain = subprocess.run(
        command,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    done = run("--", *command)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == (plain.stdout, plain.stderr)
    assert "site was here" in done.stdout or "own" in done.stderr


@PROCESS
def test_who_looks_for_the_module_finds_the_real_one() -> None:
    """
    Before and after it is imported; a module that is not there is not found.
    """
    code = """
import importlib.util, json, sys
before = importlib.util.find_spec("faster_whisper").origin
import faster_whisper
import importlib.resources
files = importlib.resources.files("faster_whisper")
assert (files / "transcribe.py").is_file()
loader = type(faster_whisper.__loader__).__name__
assert faster_whisper.__spec__.loader is faster_whisper.__loader__
sys.path[:] = []
del sys.modules["faster_whisper"]
gone = importlib.util.find_spec("faster_whisper")
print(json.dumps([before == faster_whisper.__file__, loader, gone]))
"""
    assert answer(run("--", PYTHON, "-c", code)) == [True, "SourceFileLoader", None]


# The process --------------------------------------------------------------------------


@PROCESS
def test_arguments_streams_and_exit_code_are_the_program_s() -> None:
    """
    Options after the program are its own, and so is another --.
    """
    code = "import sys; print(sys.argv[1:], sys.stdin.read()); sys.exit(7)"
    words = ["--ram", "--", "-m", "--help", "", "a b"]
    done = run(PYTHON, "-c", code, *words, input="from stdin")
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == f"{words} from stdin\n"
    done = run("--ram", "1GiB", "--", PYTHON, "-c", code, *words, input="")
    assert (done.returncode, done.stdout) == (7, f"{words} \n")


@PROCESS
def test_it_becomes_the_program() -> None:
    """
    The process id is the same; signals reach it, and end it as without the command.
    """
    with subprocess.Popen(
        [PYTHON, "-m", "whispercache", "run", "sh", "-c", "echo $$; read line"],
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM


@PROCESS
@pytest.mark.parametrize(
    ("words", "code"),
    [("run --top - -- sh -c 'exit 7'", 7), ("run -- no-such", 127), ("config", 0)],
)
def test_a_command_starts_without_streams(words: str, code: int) -> None:
    """
    As supervisors start some; the program of `run` has none either.
    """
    command = ["sh", "-c", f'"$0" -m whispercache {words} <&- >&- 2>&-', PYTHON]
    done = subprocess.run(
        command,
        env=child_environment(),
        timeout=60,
        check=False,
    )
    assert done.returncode == code


@PROCESS
def test_a_relative_file_of_settings_is_that_of_the_start(tmp_path: Path) -> None:
    """
    That of the variable as well as that of the option.
    """
    (tmp_path / "mine.toml").write_text("max_models = 3")
    code = """
import json, os
os.chdir("/")
from whispercache.settings.sources import settle
print(json.dumps(settle()["max_models"].value))
"""
    done = run(
        *(PYTHON, "-c", code),
        environment={"WHISPERCACHE_CONFIG": "mine.toml"},
        cwd=tmp_path,
    )
    assert answer(done) == 3


@PROCESS
@pytest.mark.parametrize("name", ["SIGPIPE", "SIGINT", "SIGHUP"])
def test_signals_do_what_they_did(name: str) -> None:
    """
    Python itself ignores some, which a program would inherit.
    """
    number = getattr(signal, name)
    done = run("--", "sh", "-c", f"kill -{int(number)} $$; echo alive")
    assert (done.returncode, done.stdout) == (-number, "")


@PROCESS
@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ((), 2, "name the program to run; see 'whispercache run --help'"),
        (("--",), 2, "name the program to run"),
        (("--ram", "lots", "true"), 2, "--ram"),
        (("--rma", "1GiB", "true"), 2, "--rma"),
        (("no-such-program",), 127, "no-such-program: No such file or directory"),
        (("/",), 126, "/: Permission denied"),
        (("--top", "/no/such/folder", "true"), 2, "/no/such/folder: No such file"),
        (("--config", "/no/file", "true"), 2, "/no/file: No such file"),
    ],
)
def test_what_cannot_be_run_is_told_in_one_line(
    arguments: tuple[str, ...], code: int, text: str
) -> None:
    """
    With the exit codes of shells where the program does not start.
    """
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("whispercache: error: ")
    assert text in line


def test_help_tells_how(capsys: pytest.CaptureFixture[str]) -> None:
    """
    Both ways to name a program.
    """
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    shown = capsys.readouterr().out
    assert "run [OPTIONS] [--] PROGRAM" in shown
    assert "run [OPTIONS] -m MODULE" in shown
    assert "--ctranslate2" in shown


# Events -------------------------------------------------------------------------------

LINE = re.compile(r"\d\d:\d\d:\d\d whispercache\[(\d+)\] (.*)")


@PROCESS
def test_events_go_to_the_terminal_at_the_end(program: Path) -> None:
    """
    Loads and evictions as they were, and the sums; after all that the program said.
    """
    done = run("--top", "-", PYTHON, program, micro())
    assert answer(done) == LEASED
    found = [LINE.fullmatch(line) for line in done.stderr.splitlines()[-2:]]
    loaded, sums = (each[2] for each in found if each)
    assert re.fullmatch(rf"{micro().name}:float32 loaded in .* s: .* MiB", loaded)
    assert re.fullmatch(
        r"calls: 1, loads: 1 in .* s, evictions: 0, peak on cpu .* MiB", sums
    )


@PROCESS
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_events_of_children_are_told_at_their_end(program: Path, method: str) -> None:
    """
    A forked one ends without the interpreter's own end.
    """
    code = f"""
import multiprocessing, sys
sys.path.insert(0, {str(program.parent)!r})
import program

if __name__ == "__main__":
    child = multiprocessing.get_context({method!r}).Process(target=program.told)
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""
    path = program.parent / "parent.py"
    path.write_text(code)
    done = run("--top", "-", PYTHON, path, micro())
    assert done.returncode == 0, done.stderr
    found = [LINE.fullmatch(line) for line in done.stderr.splitlines()]
    loaded, sums = (each[2] for each in found if each)
    assert " loaded in " in loaded
    assert sums.startswith("calls: 1, loads: 1 in ")


@PROCESS
def test_a_file_of_events_that_cannot_be_written_is_told_once(program: Path) -> None:
    """
    And the program goes on.
    """
    done = run("--top", "/dev/full", PYTHON, program, micro())
    assert answer(done) == LEASED
    (line,) = done.stderr.splitlines()
    assert line.startswith("events are not written: [Errno 28]")


@PROCESS
def test_events_go_to_a_file_when_they_happen(program: Path, tmp_path: Path) -> None:
    """
    After what is in it; of all processes, also of one that is killed, and of none
    without a model.
    """
    log = tmp_path / "events.log"
    log.write_text("kept\n")
    code = f"""
import os, signal, subprocess, sys
sys.path.insert(0, {str(program.parent)!r})
subprocess.run([sys.executable, "-c", "pass"], check=True)
subprocess.run([sys.executable, {str(program)!r}, sys.argv[1]], check=True)
import program
program.told()
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run(
        *("--top", "events.log", "--", PYTHON, "-c", code, micro()), cwd=tmp_path
    )
    assert done.returncode == -signal.SIGKILL
    kept, *lines = log.read_text().splitlines()
    found = [LINE.fullmatch(line) for line in lines]
    assert kept == "kept"
    assert all(found)
    pids = [each[1] for each in found if each]
    texts = [each[2] for each in found if each]
    assert ["loaded" in text.split() for text in texts] == [True, False, True]
    assert texts[1].startswith("calls: 1, ")
    assert pids[0] == pids[1] != pids[2]
    assert str(os.getpid()) not in pids


def keeping(file: Path) -> str:
    """
    A hook's command that adds what it is told to *file*.
    """
    return f"sh -c 'cat >> {file}'"


@PROCESS
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_hooks_are_for_the_program_and_its_children(
    program: Path, tmp_path: Path, method: str
) -> None:
    """
    What the child has loaded is told by its end; the last word of the parent, too.
    """
    code = f"""
import multiprocessing, sys
sys.path.insert(0, {str(program.parent)!r})
import program

if __name__ == "__main__":
    child = multiprocessing.get_context({method!r}).Process(target=program.told)
    child.start()
    child.join()
    program.told()
    sys.exit(child.exitcode)
"""
    path = program.parent / "parent.py"
    path.write_text(code)
    told = tmp_path / "told"
    hook = ("--on", "ModelLoaded", keeping(told))
    done = run(*hook, *("--on", "NoRoom", "false"), "--", PYTHON, path, micro())
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in told.read_text().splitlines()]
    assert [(each["event"], each["model"]) for each in found] == [
        ("ModelLoaded", micro().name),
        ("ModelLoaded", micro().name),
    ]


@PROCESS
@pytest.mark.parametrize(
    ("event", "command", "text"),
    [
        ("ModelLoad", "true", "--on: there is no event ModelLoad; did you mean"),
        ("ModelLoaded", "sh -c 'a\nb'", "has several lines; make it a script"),
    ],
)
def test_a_hook_that_is_none_is_told_before_the_program_starts(
    event: str, command: str, text: str
) -> None:
    """
    In one line.
    """
    done = run("--on", event, command, "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert text in line
