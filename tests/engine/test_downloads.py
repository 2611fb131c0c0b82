"""
Downloads, against a model hub on this machine that serves micro models.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import struct
import threading
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pytest
from real import TEXT, at_once, child, micro

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.process

OTHER = " the second revision"
REPOSITORY = "someone/faster-whisper-micro"
TINY = "Systran/faster-whisper-tiny"

ASK = """
import json, sys, threading, time, traceback
import numpy as np
from concurrent.futures import ThreadPoolExecutor
from whispercache import ModelCache

model, threads, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
barrier = threading.Barrier(threads)

def ask(number):
    barrier.wait(30)
    started_s = time.monotonic()
    try:
        cached = cache.get_model(model, "cpu", cpu_threads=1, **options)
        segments, _ = cached.transcribe(np.zeros(16000, np.float32))
        return "".join(segment.text for segment in segments)
    except Exception as error:
        seconds.append(time.monotonic() - started_s)
        return [type(error).__name__, str(error)]

seconds = []
with ModelCache() as cache, ThreadPoolExecutor(threads) as pool:
    answers = list(pool.map(ask, range(threads)))
    cache._core.check()
    charged = sum(device.charged_bytes for device in cache.devices())
    models = len(cache.models())
    print(json.dumps([answers, cache.stats().loads, models, charged, seconds]))
"""

WATCH = """
import json, os, sys, threading, urllib.request
import numpy as np
from whispercache import ModelCache

def tell(word):
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/test/" + word).close()

with ModelCache() as cache:
    other = cache.get_model(sys.argv[2], "cpu", cpu_threads=1)
    thread = threading.Thread(target=cache.preload, args=(sys.argv[1], "cpu"))
    thread.start()
    tell("held")
    charged = [device.charged_bytes for device in cache.devices()]
    states = [info.state for info in cache.models()]
    other.lease().release()
    tell("go-on")
    thread.join()
    print(json.dumps([charged, states, len(cache.models())]))
"""


@dataclass
class Hub:
    """
    A model hub: repositories, and what was asked of it.
    """

    directory: Path
    repositories: dict[str, dict[str, Path]]
    requests: list[str] = field(default_factory=list)
    breaks: dict[str, str] = field(default_factory=dict)
    holds: str = ""
    held: threading.Event = field(default_factory=threading.Event)
    goes_on: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def ask(
        self, model: str, threads: int = 1, *, home: str = "home", **options: Any
    ) -> Answer:
        """
        Ask for *model* in a new process, by so many threads at once.
        """
        result = child(
            ASK,
            model,
            str(threads),
            json.dumps(options),
            environment=self.environment(home),
        )
        assert result.returncode == 0, result.stderr
        answers, loads, models, charged_bytes, failed_s = json.loads(result.stdout)
        return Answer(answers, loads, models, charged_bytes, failed_s, result.stderr)

    def environment(self, home: str = "home") -> dict[str, str | Path]:
        """
        Environment of a process that knows no other hub.
        """
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": self.directory / home,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "",
            "XDG_CACHE_HOME": self.directory / "xdg",
            "no_proxy": "127.0.0.1",
        }

    def downloads(self, name: str) -> int:
        """
        How often a file was asked for.
        """
        return sum(
            request.startswith("GET") and request.endswith(f"/{name}")
            for request in self.requests
        )


@dataclass(frozen=True)
class Answer:
    """
    What came of asking: a text, or the type and message of an error, for each thread.
    """

    answers: list[Any]
    loads: int
    models: int
    charged_bytes: int
    failed_s: list[float]
    stderr: str

    def error(self) -> str:
        """
        The one error that there was, as type and one line; nothing is left charged.
        """
        assert (self.loads, self.models, self.charged_bytes) == (0, 0, 0)
        ((kind, message),) = self.answers
        assert len(message.splitlines()) == 1, message
        return f"{kind}: {message}"


class Handler(BaseHTTPRequestHandler):
    """
    Answers like the hub: what is in a repository, and its files.
    """

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *_: object) -> None:
        """
        Say nothing.
        """

    def do_HEAD(self) -> None:
        """
        Tell of a file.
        """
        self.do_GET()

    def do_GET(self) -> None:
        """
        Tell of a repository, or send a file.
        """
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/test/"):
            self.control(path)
            return
        self.hub.requests.append(f"{self.command} {path}")
        place = path.removeprefix("/api/models/").strip("/").split("/")
        revisions = self.hub.repositories.get("/".join(place[:2]))
        if revisions is None:
            self.refuse("RepoNotFound")
            return
        word, revision, *name = [*place[2:], "revision", "main"][:5]
        names = {commit_of(each): each for each in revisions}
        revision = names.get(revision, revision)
        if revision not in revisions:
            self.refuse("RevisionNotFound")
        elif word == "resolve":
            self.send_file(revisions[revision], revision, "/".join(name[:1]))
        else:
            self.describe(word, revisions[revision], revision)

    def control(self, path: str) -> None:
        """
        Let a test know that a file is held, or let it go on.
        """
        if path == "/test/held":
            assert self.hub.held.wait(30)
        else:
            self.hub.goes_on.set()
        self.send(b"")

    def describe(self, word: str, directory: Path, revision: str) -> None:
        """
        List the files of a repository.
        """
        files = sorted(directory.iterdir())
        tree = [
            {
                "type": "file",
                "path": path.name,
                "size": path.stat().st_size,
                "oid": etag_of(path),
            }
            for path in files
        ]
        siblings = [{"rfilename": path.name} for path in files]
        info = {"id": "x/y", "sha": commit_of(revision), "siblings": siblings}
        content = json.dumps(tree if word == "tree" else info).encode()
        self.send(content, {"Content-Type": "application/json"})

    def send_file(self, directory: Path, revision: str, name: str) -> None:
        """
        Send a file, or what breaks off before its end.
        """
        path = directory / name
        if not path.is_file():
            self.refuse("EntryNotFound")
            return
        headers = {"ETag": f'"{etag_of(path)}"', "X-Repo-Commit": commit_of(revision)}
        content = path.read_bytes()
        if self.command == "GET" and self.hub.holds == name:
            self.hub.held.set()
            assert self.hub.goes_on.wait(30)
        breaks = self.hub.breaks.get(name) if self.command == "GET" else None
        if breaks == "error":
            self.send(b"", status=HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        self.send(content, headers, most_bytes=len(content) // 2 if breaks else None)
        if breaks == "reset":
            # Closes without a farewell, as a cable does that is pulled.
            at_once_off = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once_off)
            self.connection.close()

    def refuse(self, code: str) -> None:
        """
        Answer that there is no such thing.
        """
        self.send(b"", {"X-Error-Code": code}, status=HTTPStatus.NOT_FOUND)

    def send(
        self,
        content: bytes,
        headers: dict[str, str] | None = None,
        *,
        status: HTTPStatus = HTTPStatus.OK,
        most_bytes: int | None = None,
    ) -> None:
        """
        Send a response, the whole of it unless told otherwise.
        """
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:most_bytes])
            self.wfile.flush()
        self.close_connection = most_bytes is not None


def commit_of(revision: str) -> str:
    """
    The commit that a branch stands for.
    """
    return hashlib.sha1(revision.encode(), usedforsecurity=False).hexdigest()


def etag_of(path: Path) -> str:
    """
    What tells one content from another.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """
    A hub with two repositories, one of them with two revisions.
    """
    repositories = {
        REPOSITORY: {"main": micro(), "second": micro(OTHER.strip())},
        TINY: {"main": micro()},
    }
    made = Hub(tmp_path, repositories)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, made)) as server:
        server.daemon_threads = True
        made.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield made
        server.shutdown()
        thread.join(10)


@pytest.mark.parametrize("model", ["tiny", REPOSITORY])
def test_the_first_use_downloads_once_for_all(hub: Hub, model: str) -> None:
    """
    However many threads ask; and it shows how far it is.
    """
    answer = hub.ask(model, threads=6)
    assert answer.answers == [TEXT] * 6
    assert answer.loads == 1
    for name in ("model.bin", "config.json", "tokenizer.json", "vocabulary.json"):
        assert hub.downloads(name) == 1
    asked = [request for request in hub.requests if "/api/models/" in request]
    assert len([request for request in asked if "/tree/" not in request]) == 1
    assert "100%" in answer.stderr
    assert "model.bin" in answer.stderr or "Fetching" in answer.stderr


def test_a_second_process_asks_the_hub_for_nothing(hub: Hub) -> None:
    """
    Not even whether there is something newer; and it shows no progress.
    """
    assert hub.ask("tiny").answers == [TEXT]
    hub.requests.clear()
    answer = hub.ask("tiny")
    assert answer.answers == [TEXT]
    assert hub.requests == []
    assert "%" not in answer.stderr


def test_two_processes_download_at_the_same_time(hub: Hub) -> None:
    """
    They do not break each other's files.
    """
    answers = at_once([partial(hub.ask, "tiny")] * 2)
    assert [answer.answers for answer in answers] == [[TEXT]] * 2


def test_local_files_only_asks_the_hub_for_nothing(hub: Hub) -> None:
    """
    It fails if the model is not here, and works once it is.
    """
    error = hub.ask(REPOSITORY, local_files_only=True).error()
    assert error.startswith("LoadFailed")
    assert "local_files_only" in error
    assert hub.requests == []
    hub.ask(REPOSITORY)
    hub.requests.clear()
    assert hub.ask(REPOSITORY, local_files_only=True).answers == [TEXT]
    assert hub.requests == []


def test_download_root_is_where_the_files_go(hub: Hub) -> None:
    """
    Nothing is written to the hub's own cache.
    """
    root = hub.directory / "models here"
    assert hub.ask("tiny", download_root=str(root)).answers == [TEXT]
    assert list(root.rglob("model.bin"))
    assert not list((hub.directory / "home").rglob("model.bin"))
    hub.requests.clear()
    assert hub.ask("tiny", download_root=str(root)).answers == [TEXT]
    assert hub.requests == []


def test_a_revision_is_another_model(hub: Hub) -> None:
    """
    By its branch or its commit, beside the one that is here already.
    """
    assert hub.ask(REPOSITORY).answers == [TEXT]
    assert hub.ask(REPOSITORY, revision="second").answers == [OTHER]
    assert hub.ask(REPOSITORY, revision=commit_of("second")).answers == [OTHER]


@pytest.mark.parametrize(
    ("model", "options"),
    [("nobody/has-this", {}), (REPOSITORY, {"revision": "third"}), ("base", {})],
)
def test_what_the_hub_does_not_have_is_unknown(
    hub: Hub, model: str, options: dict[str, Any]
) -> None:
    """
    A repository or a revision.
    """
    error = hub.ask(model, **options).error()
    assert error.startswith("UnknownModel")
    assert model in error


def test_a_repository_without_a_ctranslate2_model_is_unknown(
    hub: Hub, tmp_path: Path
) -> None:
    """
    Most repositories on the hub are for other libraries.
    """
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "config.json").write_text("{}")
    hub.repositories["someone/whisper-mine"] = {"main": tmp_path / "torch"}
    error = hub.ask("someone/whisper-mine").error()
    assert error.startswith("UnknownModel")
    assert "no model.bin" in error
    assert "ct2-transformers-converter" in error


def test_openai_s_repository_means_the_one_that_was_converted(hub: Hub) -> None:
    """
    Its own weights are nothing for CTranslate2.
    """
    assert hub.ask("openai/whisper-tiny").answers == [TEXT]
    assert not [each for each in hub.requests if "openai" in each]


def test_a_hub_that_cannot_be_reached_fails_the_load(hub: Hub) -> None:
    """
    Soon, and the error says what to do without it.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        hub.url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        answer = hub.ask("tiny")
    assert answer.error().startswith("LoadFailed")
    assert "the download failed" in answer.error()
    assert "give the directory of a model" in answer.error()
    assert max(answer.failed_s) < 20


def test_a_model_that_is_here_needs_no_hub(hub: Hub) -> None:
    """
    Once downloaded, it works without a network.
    """
    assert hub.ask("tiny").answers == [TEXT]
    hub.url = "http://127.0.0.1:9"
    assert hub.ask("tiny").answers == [TEXT]


@pytest.mark.parametrize(
    ("name", "breaks"),
    [
        ("model.bin", "reset"),
        ("model.bin", "short"),
        ("tokenizer.json", "reset"),
        ("vocabulary.json", "error"),
    ],
)
def test_a_broken_download_is_completed_by_the_next_try(
    hub: Hub, name: str, breaks: str
) -> None:
    """
    It fails as a load does, and leaves nothing that would be taken for a model.
    """
    hub.breaks[name] = breaks
    error = hub.ask("tiny").error()
    assert error.startswith("LoadFailed")
    assert "the download failed" in error
    if name == "model.bin":
        assert "its download is not whole: model.bin is missing" in error
    hub.breaks.clear()
    assert hub.ask("tiny").answers == [TEXT]


def test_nothing_is_reserved_while_files_are_on_their_way(hub: Hub) -> None:
    """
    Memory is for models; others load and run meanwhile.
    """
    hub.holds = "model.bin"
    result = child(WATCH, "tiny", micro(), environment=hub.environment())
    assert result.returncode == 0, result.stderr
    charged_bytes, states, models = json.loads(result.stdout)
    assert sum(charged_bytes) == 0
    assert states == []
    assert models == 2


def test_a_repository_without_a_tokenizer_works_without_the_hub(
    hub: Hub, tmp_path: Path
) -> None:
    """
    What is here and may be incomplete is tried, if the hub cannot say more.

    faster-whisper takes the tokenizer of another repository then.
    """
    shutil.copytree(micro(), tmp_path / "bare")
    tokenizer = (tmp_path / "bare" / "tokenizer.json").rename(tmp_path / "tokenizer")
    hub.repositories[TINY] = {"main": tmp_path / "bare"}
    (tmp_path / "openai").mkdir()
    tokenizer.rename(tmp_path / "openai" / "tokenizer.json")
    hub.repositories["openai/whisper-tiny"] = {"main": tmp_path / "openai"}
    assert hub.ask("tiny").answers == [TEXT]
    hub.url = "http://127.0.0.1:9"
    assert hub.ask("tiny").answers == [TEXT]


def test_a_deleted_download_is_fetched_again(hub: Hub) -> None:
    """
    People clear the hub's cache.
    """
    assert hub.ask("tiny").answers == [TEXT]
    shutil.rmtree(hub.directory / "home")
    assert hub.ask("tiny").answers == [TEXT]
    assert hub.downloads("model.bin") == 2


@pytest.mark.parametrize("name", ["model.bin", "vocabulary.json"])
def test_a_link_that_leads_nowhere_is_mended(hub: Hub, name: str) -> None:
    """
    huggingface-hub fetches the file that it should lead to, and nothing else.
    """
    assert hub.ask("tiny").answers == [TEXT]
    (link,) = (hub.directory / "home").rglob(f"snapshots/*/{name}")
    link.resolve().unlink()
    assert hub.ask("tiny").answers == [TEXT]
    assert hub.downloads(name) == 2
    assert hub.downloads("config.json") == 1


def test_a_file_that_nobody_needs_is_not_missed_without_network(
    hub: Hub, tmp_path: Path
) -> None:
    """
    huggingface-hub 2 takes a snapshot for incomplete that lacks any file it listed.
    """
    shutil.copytree(micro(), tmp_path / "more")
    (tmp_path / "more" / "preprocessor_config.json").write_text("{}")
    hub.repositories[TINY] = {"main": tmp_path / "more"}
    assert hub.ask("tiny").answers == [TEXT]
    (link,) = (hub.directory / "home").rglob("snapshots/*/preprocessor_config.json")
    link.unlink()
    hub.url = "http://127.0.0.1:9"
    assert hub.ask("tiny").answers == [TEXT]
    assert hub.ask("tiny", local_files_only=True).answers == [TEXT]


def test_an_interrupted_download_says_so_without_network(hub: Hub) -> None:
    """
    Not that there is no model in the repository.
    """
    hub.breaks["model.bin"] = "reset"
    hub.ask("tiny").error()
    hub.url = "http://127.0.0.1:9"
    for local_files_only in (False, True):
        error = hub.ask("tiny", local_files_only=local_files_only).error()
        assert error.startswith("LoadFailed")
        assert "its download is not whole: model.bin is missing" in error
        assert "give the directory of a model" in error
