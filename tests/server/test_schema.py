"""
The server against all that can be sent to it: what its schema allows, what it does not,
broken audio, and requests that no honest client makes.
"""

from __future__ import annotations

import itertools
import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import pytest
from broken_audio import corpus
from caches import cache_of
from effort import tries
from real import MIB, child_environment, clip
from served import URL, A, B, micros, serving

from whispercache import ModelCache
from whispercache.devices.host import anonymous_bytes
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

pytestmark = [pytest.mark.process, pytest.mark.soak]

KEY = "s3cret"
LONGEST_S = 12.0

SOUND = ".snd\0\0\0\x18\0\0\x1f\x40\0\0\0\1\0\0\x1f\x40\0\0\0\1" + "hum, hum. " * 800
"""
A second of audio that is text, which schemathesis can send: Sun's format, 8 kHz.
"""

# Audio and models that exist, in most right requests: no schema can describe them.
_HOOKS = f"""
from itertools import count

import schemathesis

COUNT = count()


@schemathesis.hook
def before_call(context, case, kwargs):
    n = next(COUNT)
    if case.meta is None or case.meta.generation.mode.is_negative or n % 5 == 0:
        return
    name = {(A, B)!r}[n % 2]
    for each in case.path_parameters or ():
        case.path_parameters[each] = name
    for field in ("file", "audio_file"):
        if isinstance(case.body, dict) and field in case.body:
            case.body.update({{field: {SOUND!r}}})
    if isinstance(case.body, dict) and "file" in case.body:
        case.body.update(model=name)
    if "model" in (case.query or ()):
        case.query["model"] = name
"""

# Audio that fits the schema may yet be broken. And schemathesis does not know that
# models may have slashes in their names, so that DELETE is allowed for .../load, too.
_CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 401, 404]

[checks.allow_header_conformance]
enabled = false

[phases.stateful.generation]
max-examples = 20
"""

cache = cache_of(keep_alive=-1)


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    """
    A server for all hostile requests: the last is answered like the first.
    """
    with (
        ModelCache(keep_alive=-1) as cache,
        serving(cache, models=micros(), hosts=("127.0.0.1",)) as client,
    ):
        yield client


# The schema ---------------------------------------------------------------------------


@pytest.mark.skipif(
    find_spec("schemathesis") is None,
    reason="schemathesis, as it is used here, needs Python 3.11",
)
@pytest.mark.parametrize("keys", [(), (KEY,)], ids=["open", "with keys"])
def test_the_server_keeps_to_its_own_schema(
    cache: ModelCache, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    """
    Whatever schemathesis makes of it: right and wrong, one by one and in sequences,
    with a key, a wrong one, and none.
    """
    (tmp_path / "hooks.py").write_text(_HOOKS, encoding="utf-8")
    (tmp_path / "config.toml").write_text(_CONFIG, encoding="utf-8")
    with serving(cache, models=micros(), keys=keys) as client:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli"),
                *("--config-file", "config.toml", "run"),
                str(client.base_url.join("/openapi.json")),
                *(f"--header=Authorization: Bearer {key}" for key in keys),
                *(
                    "--mode=all",
                    f"--max-examples={tries(25)}",
                    "--generation-deterministic",
                ),
                *("--suppress-health-check=all", "--no-color"),
            ],
            cwd=tmp_path,
            env=child_environment({"SCHEMATHESIS_HOOKS": "hooks"}),
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        stats = cache.stats()
        # They were no mere refusals.
        assert stats.requests > 50
        assert stats.loads > 2
        wait_until(lambda: not cache.stats().leases, "the leases")


# Broken audio -------------------------------------------------------------------------


class Left(NamedTuple):
    """
    What a process holds that a leak would add to.
    """

    threads: int
    processes: int
    descriptors: int


def left() -> Left:
    """
    What this process holds now.
    """
    process = psutil.Process()
    children = len(process.children(recursive=True))
    return Left(threading.active_count(), children, process.num_fds())


def test_broken_audio_is_refused_and_leaves_nothing(
    cache: ModelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Whatever its name and its type claim: 400 or 413 in OpenAI's shape, and no file,
    lease, thread, process or memory more than before, however often it comes.
    """
    uploads, temporary = tmp_path / "uploads", tmp_path / "temporary"
    uploads.mkdir()
    temporary.mkdir()
    files, models = corpus(uploads), micros()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    statuses = {"decodes": 200, "refused": 400, "too long": 413}
    seen, grown = [], []
    with serving(cache, models=models, max_duration_s=LONGEST_S) as client:
        for i in range(3):
            for broken in files:
                content_type = (broken.content_type, "audio/wav", "x" * 300)[i]
                name = (broken.name, "../../a.wav", "\N{PILE OF POO}\r\n\0")[i]
                answer = client.post(
                    URL,
                    data={"model": A},
                    files={"file": (name, broken.path.read_bytes(), content_type)},
                )
                expected = statuses[broken.expectation]
                assert answer.status_code == expected, (broken.name, answer.text)
                if expected != 200:
                    assert error_of(answer)["param"] == "file", broken.name
                    assert str(tmp_path) not in answer.text
            wait_until(lambda: not cache.stats().leases, "the leases")
            assert not list(temporary.iterdir())
            seen.append(left())
            grown.append(anonymous_bytes() or 0)
        assert client.get("/api/ps").json()["waiting"] == []
    # The server's pool of threads grows by some as it likes; a leak is one a file.
    more = [after - before for before, after in zip(*seen[1:], strict=True)]
    assert max(more) < len(files) / 4, seen
    # Memory is noisy; were the uploads kept, it would grow by all of them each time.
    sent_bytes = sum(broken.path.stat().st_size for broken in files)
    assert sent_bytes > 12 * MIB
    least = min(after - before for before, after in itertools.pairwise(grown))
    assert least < sent_bytes / 2, grown


def error_of(answer: httpx.Response) -> dict[str, object]:
    """
    The error in an answer.
    """
    error: dict[str, object] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


# Hostile requests ---------------------------------------------------------------------


def part(
    name: str, value: bytes, file_name: str | None = None, head: str = ""
) -> bytes:
    """
    One part of a form; *head* is further header lines.
    """
    file = "" if file_name is None else f'; filename="{file_name}"'
    disposition = f'Content-Disposition: form-data; name="{name}"{file}\r\n{head}\r\n'
    return b"--x\r\n" + disposition.encode("utf-8", "surrogateescape") + value + b"\r\n"


AUDIO = Path(clip("en-bread")).read_bytes()
MODEL, FILE, END = (
    part("model", A.encode()),
    part("file", AUDIO, "a.flac"),
    b"--x--\r\n",
)
FORM = "multipart/form-data; boundary=x"


def head(line: str, *headers: str) -> bytes:
    """
    The beginning of a request; the connection ends with its answer.
    """
    lines = (f"{line} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", *headers, "")
    return "".join(f"{each}\r\n" for each in lines).encode("utf-8", "surrogateescape")


def form(*parts: bytes, kind: str = FORM, headers: tuple[str, ...] = ()) -> bytes:
    """
    A request for a transcription, with a body of *parts*.
    """
    body = b"".join(parts)
    told = (f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers)
    return head(f"POST {URL}", *told) + body


def chunked(*chunks: bytes) -> bytes:
    """
    The same in chunks, which are as they are given.
    """
    told = (f"Content-Type: {FORM}", "Transfer-Encoding: chunked")
    return head(f"POST {URL}", *told) + b"".join(chunks)


def answers(client: httpx.Client, request: bytes) -> list[tuple[int, bytes]]:
    """
    Status and body of all that comes back, until the server hangs up.
    """
    address = (client.base_url.host, client.base_url.port or 80)
    received = b""
    with socket.create_connection(address, timeout=30) as connection:
        try:
            connection.sendall(request)
            while piece := connection.recv(65_536):
                received += piece
        except ConnectionError:
            # It hung up on what it will not read; its answer came before.
            assert received
    pattern = rb"HTTP/1\.1 (\d{3}) [^\r]*\r\n(?:[^\r]+\r\n)*\r\n"
    found = list(re.finditer(pattern, received))
    ends = [*(each.start() for each in found[1:]), len(received)]
    return [
        (int(each[1]), received[each.end() : end])
        for each, end in zip(found, ends, strict=True)
    ]


BODY = MODEL + FILE + END
HEARD = {
    "a plain request": form(BODY),
    "a model twice": form(part("model", b"micro"), BODY),
    "a file without a name": form(MODEL, part("file", AUDIO, ""), END),
    "a path for a name": form(MODEL, part("file", AUDIO, "../../etc/passwd"), END),
    "a line break in a name": form(MODEL, part("file", AUDIO, "a\r\nX: y"), END),
    "an emoji for a name": form(MODEL, part("file", AUDIO, "\U0001f600.flac"), END),
    "a NUL in a name": form(MODEL, part("file", AUDIO, "a\0.flac"), END),
    "a name that is no UTF-8": form(MODEL, part("file", AUDIO, "\udcff\udcfe"), END),
    "a prompt that is no UTF-8": form(part("prompt", b"\xff\xfe"), BODY),
    "a prompt of control words": form(part("prompt", b"<|endoftext|>" * 9), BODY),
    "an unknown field": form(part("\udcff", b"\0"), BODY),
    "an unknown charset": form(BODY, kind=f"{FORM}; charset=nope"),
    "a false encoding": form(BODY, headers=("Content-Encoding: gzip",)),
    "a range": form(BODY, headers=("Range: bytes=0-1",)),
    "a header of 50 kB": form(BODY, headers=("X: " + "y" * 50_000,)),
    "something after the end": form(BODY, b"z" * 1000),
    "single bytes": chunked(*(b"1\r\n%c\r\n" % byte for byte in BODY), b"0\r\n\r\n"),
}
"""
Odd, and yet heard.
"""


@pytest.mark.parametrize("name", HEARD)
def test_odd_requests_are_answered(http: httpx.Client, name: str) -> None:
    """
    What is strange about them does not matter to the transcription.
    """
    ((status, body),) = answers(http, HEARD[name])
    assert status == 200, body
    assert b"micro a" in body


REFUSED = {
    "no boundary": form(BODY, kind="multipart/form-data"),
    "an empty boundary": form(BODY, kind="multipart/form-data; boundary="),
    "a boundary of 5 kB": form(BODY, kind=f"{FORM}{'x' * 5000}"),
    "a boundary that is no ASCII": form(BODY, kind=f"{FORM}\u20ac"),
    "another boundary": form(BODY, kind="multipart/form-data; boundary=y"),
    "another type": form(BODY, kind="application/json"),
    "mixed parts": form(BODY, kind="multipart/mixed; boundary=x"),
    "fields in the address's form": form(
        b"model=micro-a&file=%ff", kind="application/x-www-form-urlencoded"
    ),
    "nothing": form(),
    "no end": form(FILE, MODEL),
    "half a header": form(MODEL, b"--x\r\nContent-Dispo"),
    "a part without a name": form(b"--x\r\nX: y\r\n\r\nz\r\n", BODY),
    "a form in a form": form(
        MODEL,
        part("file", b"--y\r\n\r\n\r\n--y--", head="Content-Type: multipart/mixed\r\n"),
        END,
    ),
    "a file that is a field": form(MODEL, part("file", b"hello"), END),
    "a model that is a file": form(part("model", A.encode(), "a"), FILE, END),
    "a file twice": form(FILE, BODY),
    "10,000 fields": form(*(part(f"f{i}", b"") for i in range(10_000)), BODY),
    "10,000 files": form(*(part(f"f{i}", b"", "a") for i in range(10_000)), BODY),
    "10,000 headers of a part": form(part("a", b"", head="X: y\r\n" * 10_000), BODY),
    "a field of 2 MB": form(part("prompt", bytes(2 * MIB)), BODY),
    "a file name of 100 kB": form(MODEL, part("file", AUDIO, "a" * 100_000), END),
    "a language of NULs": form(part("language", bytes(9)), BODY),
    "temperatures of another script": form(part("temperature", "٣".encode()), BODY),
    "endless patience": form(part("keep_alive", b"9" * 5000), BODY),
    "a model of NULs": form(part("model", bytes(9)), FILE, END),
    "a model that is no UTF-8": form(part("model", b"\xff\xfe"), FILE, END),
    "half a surrogate for a model": form(part("model", b"\xed\xa0\x80"), FILE, END),
    "chunks without a size": chunked(b"zz\r\nabc\r\n0\r\n\r\n"),
    "chunks of negative size": chunked(b"-5\r\nabc\r\n0\r\n\r\n"),
    "a chunk of all there is": chunked(b"f" * 20 + b"\r\nabc"),
    "chunks that do not end": chunked(b"5\r\nabcdefgh\r\n0\r\n\r\n"),
    "a trailer of 100 kB": chunked(b"0\r\nX: " + b"y" * 100_000 + b"\r\n\r\n"),
    "two lengths": form(BODY, headers=("Content-Length: 3",)),
    "a length and chunks": form(BODY, headers=("Transfer-Encoding: chunked",)),
    "a negative length": head(f"POST {URL}", "Content-Length: -5"),
    "more than there is": head(f"POST {URL}", f"Content-Length: {10**30}"),
    "a handshake of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + bytes(99),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a tunnel": head("CONNECT example:443"),
    "half an address for a host": b"GET /v1/models HTTP/1.1\r\nHost: [::1\r\n\r\n",
    "no address for a host": b"GET /v1/models HTTP/1.1\r\nHost: [zz]:9\r\n\r\n",
    "half an address for an origin": head(
        f"POST /api/models/{A}/load", "Origin: http://[::1", "Content-Length: 0"
    ),
}
"""
Nothing that a transcription could be made of.
"""


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_requests_are_refused(http: httpx.Client, name: str) -> None:
    """
    As mistakes of the client, and the next request is answered as if nothing had been.
    """
    request = REFUSED[name]
    if b"Connection: close" not in request:
        request = request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    found = answers(http, request)
    assert found
    for status, body in found:
        assert 400 <= status < 500, body
        assert b"Traceback" not in body
    assert http.get("/v1/models").status_code == 200


def test_requests_in_one_go_are_answered_in_order(http: httpx.Client) -> None:
    """
    HTTP's pipelining: three at once on one connection.
    """
    kept = form(BODY).replace(b"Connection: close", b"Connection: keep-alive")
    other = form(part("model", B.encode()), FILE, END)
    found = answers(http, kept + kept + other)
    assert [status for status, _ in found] == [200] * 3
    texts = [re.search(rb'"text":"([^"]*)"', body) for _, body in found]
    assert [text and text[1] for text in texts] == [b"micro a", b"micro a", b"micro b"]


# Addresses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page/..%2fapp.py",
        "/page/%252e%252e/app.py",
        "/page/..\\app.py",
        "/page//etc/passwd",
        "/page/%00",
        "/page/%ff%fe",
        f"/page/{'a' * 5000}",
        "//etc/passwd",
        "/%2e%2e/",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/v1/models/micro%2Da%00",
        "/v1/models/micro%2Fa",
        "/v1/models/%ed%a0%80",
        f"/v1/models/{'a' * 50_000}",
        "http://elsewhere.example/v1/models",
    ],
)
def test_nothing_but_what_is_served_has_an_address(
    http: httpx.Client, path: str
) -> None:
    """
    No file of this machine, by whatever way it is asked for: 404 in OpenAI's shape.
    """
    ((status, body),) = answers(http, head(f"GET {path}"))
    assert status == 404, body
    assert body.startswith(b'{"error":{"message":')
    assert b"root:" not in body
    assert len(body) < 1000


def test_an_address_that_is_no_ascii_is_a_mistake(http: httpx.Client) -> None:
    """
    It has to be quoted; quoted, it is looked up.
    """
    assert [status for status, _ in answers(http, head("GET /v1/models/é"))] == [400]
    assert http.get("/v1/models/é").status_code == 404
    assert http.post("/api/models/é/load").status_code == 404


def test_names_with_a_slash_are_names_of_models(http: httpx.Client) -> None:
    """
    As hub repositories have them; quoted or not.
    """
    for name in ("a/b", "a%2Fb", "a/../b", "load/load", "a/pin/pin", "/"):
        for method, path in (("POST", f"{name}/load"), ("DELETE", name)):
            ((status, body),) = answers(http, head(f"{method} /api/models/{path}"))
            assert status == 404, (method, path)
            assert b"model_not_found" in body


def test_methods_that_nobody_offers_are_405_everywhere(http: httpx.Client) -> None:
    """
    With those that there are in ``Allow``.
    """
    schema = http.get("/openapi.json").json()
    for path, methods in schema["paths"].items():
        there = re.sub(r"\{\w+\}", A, path)
        for method in ("OPTIONS", "PATCH", "TRACE", "FOO"):
            answer = http.request(method, there)
            assert answer.status_code == 405, (method, there)
            assert error_of(answer)["code"] == "method_not_allowed"
            allowed = set(answer.headers["allow"].replace(" ", "").split(","))
            assert {each.upper() for each in methods} <= allowed, (there, allowed)


@pytest.mark.parametrize(
    "accepted",
    [
        "application/openmetrics-text; version=abc",
        "application/openmetrics-text; version=1.0.0; escaping=zzz",
        "text/plain; version=9.9.9; q=nan",
        ";;;,q=,*/*;q=x",
        "\u20ac",
    ],
)
def test_metrics_come_in_some_form_whatever_is_accepted(
    http: httpx.Client, accepted: str
) -> None:
    """
    Whoever accepts nothing that is known gets the plain one.
    """
    ((status, body),) = answers(http, head("GET /metrics", f"Accept: {accepted}"))
    assert status == 200, body
    assert b"whispercache_requests_total" in body


@contextmanager
def locked(cache: ModelCache) -> Iterator[httpx.Client]:
    """
    A server with a key.
    """
    with serving(cache, models=micros(), keys=(KEY,)) as client:
        yield client


def test_keys_that_nobody_has_are_wrong_keys(cache: ModelCache) -> None:
    """
    Whatever bytes they are made of.
    """
    with locked(cache) as client:
        for key in ("ключ\U0001f600", "\udcff\udcfe", KEY[:-1], KEY * 9000, f"{KEY}\0"):
            asked = head("GET /v1/models", f"Authorization: Bearer {key}")
            ((status, body),) = answers(client, asked)
            # A NUL is not HTTP.
            assert status == (400 if "\0" in key else 401), body
        asked = head("GET /v1/models", f"Authorization: bearer {KEY}")
        assert [status for status, _ in answers(client, asked)] == [200]
