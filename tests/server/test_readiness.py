"""
The start of a server, its options and names, and its readiness.
"""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from caches import cache_of
from real import micro, micro_copy
from served import (
    A,
    command,
    error_of,
    micros,
    running,
    serving,
    transcribe,
)

from whispercache.engine.naming import ModelSpec, parse_spec
from whispercache.server import ServerOptions, create_app, service
from whispercache.server.offers import Offers
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from whispercache import ModelCache

pytestmark = pytest.mark.process

cache = cache_of(max_models=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ()}, "at least one model"),
        ({"models": (parse_spec("base"), parse_spec("base=tiny"))}, "one name"),
        ({"preload": ("tiny",)}, "tiny is not among"),
        ({"pin": ("tiny",)}, "tiny is not among"),
        ({"keys": ("a", " ")}, "everybody"),
        ({"parallel": 0}, "parallel"),
        ({"origins": ("https://*.example",)}, "no origin"),
        ({"origins": ("https://app.example/",)}, "no origin"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"max_duration_s": float("nan")}, "max_duration_s"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict[str, Any], message: str
) -> None:
    """
    When they are made, not at the first request.
    """
    with pytest.raises(ValueError, match=message):
        ServerOptions(**{"models": (parse_spec("base"),), **options})


@pytest.mark.parametrize(
    "name",
    [
        *("max_duration_s", "max_audio_s", "upload_timeout_s", "decode_timeout_s"),
        *("timeout_s", "drain_s", "max_waiting", "parallel", "decoders"),
    ],
)
def test_every_time_and_count_is_looked_at(name: str) -> None:
    """
    Text is a time as elsewhere; what is none is refused by name.
    """
    refused: list[object] = ["soon", True, [], -1, "-1", float("nan")]
    # Of the longest audio of all at once it says that there is no other limit.
    refused += [None] * (name != "max_audio_s")
    for value in refused:
        given: dict[str, Any] = {name: value}
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be "):
            ServerOptions(models=("base",), **given)
    if name.endswith("_s"):
        timed: dict[str, Any] = {name: "1m"}
        assert getattr(ServerOptions(models=("base",), **timed), name) == 60


def test_models_are_named_as_on_the_command_line() -> None:
    """
    Texts will do; a single text would be a list of letters.
    """
    options = ServerOptions(models=("base:int8", "mine=tiny"))
    assert options.offered == (parse_spec("base:int8"), parse_spec("mine=tiny"))
    assert [spec.name for spec in options.offered] == ["base:int8", "mine"]
    with pytest.raises(TypeError, match="a tuple of models"):
        ServerOptions(models="base")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no compute type"):
        ServerOptions(models=("base:int7",))


def test_known_sizes_answer_to_all_their_names() -> None:
    """
    In whatever type they are served, unless one is named.
    """
    specs = [parse_spec(text) for text in ("large:int8", "base", "mine=tiny")]
    offers = Offers(specs, "cpu")
    for name, found in (
        ("large:int8", "large:int8"),
        ("large-v3:int8", "large:int8"),
        ("Systran/faster-whisper-base", "base"),
        ("whisper-1", "large:int8"),
        ("tiny", "mine"),
        ("mine", "mine"),
        ("base:int8", None),
        ("large", "large:int8"),
        ("small", None),
        ("whisper-small", None),
    ):
        offer = offers.find(name)
        assert (offer.name if offer else None) == found, name


def test_it_is_ready_once_all_is_loaded_that_should_be(
    cache: ModelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A model that cannot be loaded is tried again, and the reason told.
    """
    monkeypatch.setattr(service, "RETRY_S", 0.05)
    directory = micro_copy(tmp_path / "model")
    whole = (directory / "tokenizer.json").read_bytes()
    (directory / "tokenizer.json").write_bytes(whole[:-10])  # seen by the load alone
    specs = (ModelSpec("mine", str(directory)),)
    with serving(cache, models=specs, pin=("mine",)) as client:
        assert client.get("/healthz").json()["status"] == "alive"
        wait_until(
            lambda: client.get("/readyz").json()["pending"] == {"mine": "LoadFailed"},
            "the reason",
        )
        assert client.get("/readyz").status_code == 503
        answer = transcribe(client, "mine")
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        assert str(tmp_path) not in answer.text
        (directory / "tokenizer.json").write_bytes(whole)
        wait_until(lambda: client.get("/readyz").status_code == 200, "it to be ready")
        (model,) = client.get("/api/ps").json()["models"]
        assert model["pinned"] is True


def test_it_is_not_ready_when_it_takes_no_more_work(cache: ModelCache) -> None:
    """
    The cache under it was closed.
    """
    with serving(cache, models=micros(), preload=(A,)) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200, "it to be ready")
        cache.close()
        assert client.get("/readyz").status_code == 503
        assert client.get("/readyz").json()["status"] == "closing"
        answer = transcribe(client, A)
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "shutting_down"


def test_an_application_can_be_started_again(cache: ModelCache) -> None:
    """
    As test clients do, whatever was refused at its end.
    """
    app = create_app(ServerOptions(models=micros(), device="cpu"), cache)
    service = app.state.service
    for _ in range(2):
        with running(app) as url, httpx.Client(base_url=url) as client:
            assert transcribe(client, A).json()["text"] == "micro a"
        # As `drain.Server` does.
        service.gate.close()
        service.arrivals.close()


def test_a_cache_of_its_own_is_closed_and_a_given_one_is_not(cache: ModelCache) -> None:
    """
    Whoever made it closes it.
    """
    with serving(cache, models=micros()) as client:
        transcribe(client, A)
    assert [info.state for info in cache.models()] == ["resident"]
    app = create_app(ServerOptions(models=micros(), device="cpu"))
    own = app.state.service.engine.cache.cache
    with running(app) as url, httpx.Client(base_url=url) as client:
        transcribe(client, A)
    assert own._core.is_closed


HANGING = """
import time
from whispercache.engine.loader import FasterWhisperLoader
from whispercache.cli import main as cli

if __name__ == "__main__":
    locate = FasterWhisperLoader.locate

    def hang(*args, download, **options):
        if download:
            time.sleep(1000)
        return locate(*args, download=download, **options)

    FasterWhisperLoader.locate = hang
    cli.EXIT_S = 0.5
    cli.script()
"""


def test_a_download_that_never_ends_holds_up_nobody(tmp_path: Path) -> None:
    """
    Neither the request, beyond its time limit, nor the end of the server.
    """
    program = tmp_path / "hanging.py"
    program.write_text(HANGING, encoding="utf-8")
    place = (f"m={micro('micro a')}", "--device", "cpu", "--timeout", "200ms")
    with command(*place, program=str(program)) as (process, client):
        with ThreadPoolExecutor(70) as pool:
            asked = [
                pool.submit(client.post, "/api/models/m/load", timeout=60)
                for _ in range(70)
            ]
            codes = [error_of(each.result())["code"] for each in asked]
        assert set(codes) == {"model_busy"}
        assert psutil.Process(process.pid).num_threads() < 50
        assert transcribe(client, "m").status_code == 503
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in log
