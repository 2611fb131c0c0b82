"""
Clients that other people wrote, as they are, of the command ``whispercache serve``.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from real import clip, packaged, reference
from served import command
from ways import CLIP, WAYS, Server, Way, in_node, openai_of
from wyoming_client import described

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.clients,
    pytest.mark.process,
    pytest.mark.slow,
    # Theirs are none of our business.
    pytest.mark.filterwarnings("default"),
]

# Of the words, what may be misheard: some clients send other samples than they have.
_MOST_WRONG = 0.2


@pytest.fixture(autouse=True, scope="module")
def _installed() -> None:
    # Else this is no environment for them; tests/server tries these two itself.
    others = (way for way in WAYS if way.distribution not in ("openai", "wyoming"))
    if all(way.missing for way in others):
        pytest.skip("no client of these is installed: see `make clients`")


@pytest.fixture(scope="module")
def server(_installed: None) -> Iterator[Server]:
    """
    A server of tiny.en, which is the default, and base, both in memory.
    """
    models = [f"{name}={packaged(name)}" for name in ("tiny.en", "base")]
    options = ["--keep-alive=-1", "--device", "cpu", "--no-variants"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        wyoming = f"127.0.0.1:{free.getsockname()[1]}"
    options += ["--wyoming", wyoming]
    with command(*models, *options) as (process, client):
        assert process.poll() is None, process.stderr.read()
        # Not by --preload: who asks again and again until then fills its log, a pipe.
        for name in ("tiny.en", "base"):
            client.post(f"/api/models/{name}/load").raise_for_status()
        yield Server(str(client.base_url), f"tcp://{wyoming}")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.hear.__name__)
def test_it_hears_what_was_said(way: Way, server: Server) -> None:
    """
    By the default model, which its own name of one is taken for.
    """
    if way.missing:
        pytest.skip(way.missing)
    if way.distribution == "langchain-community" and shutil.which("ffmpeg") is None:
        pytest.skip("langchain-community needs the command ffmpeg")
    heard = way.hear(server)
    assert wrong(heard) <= _MOST_WRONG, heard


def wrong(heard: str) -> float:
    """
    The part of the words that was misheard.
    """
    from jiwer import wer
    from whisper_normalizer.english import EnglishTextNormalizer

    normal = EnglishTextNormalizer()
    return float(wer(normal(reference(CLIP)), normal(heard)))


def test_models_are_found_by_openais_names(server: Server) -> None:
    """
    The list has what is served; a name of OpenAI's is one of them.
    """
    with openai_of(server) as client:
        assert {"tiny.en", "base"} <= {model.id for model in client.models.list()}
        assert client.models.retrieve("whisper-1").id
    found = in_node("openai_client.mjs", server, "models", "gpt-4o-transcribe")
    assert {"tiny.en", "base"} <= set(found["names"])
    assert found["one"]


def test_the_wyoming_endpoint_tells_its_models(server: Server) -> None:
    """
    Home Assistant shows them before anybody speaks.
    """
    info = asyncio.run(described(server.wyoming))
    models = {model.name: model for program in info.asr for model in program.models}
    assert {"tiny.en", "base"} <= models.keys()
    assert models["tiny.en"].languages == ["en"]
    assert "es" in models["base"].languages


def test_translations_are_the_same_in_both_languages(server: Server) -> None:
    """
    Of a Spanish clip, by OpenAI's clients for Python and for Node.
    """
    with Path(clip("es-casa")).open("rb") as file, openai_of(server) as client:
        python = client.audio.translations.create(model="base", file=file)
    node = in_node("openai_client.mjs", server, "translation", "base", of="es-casa")
    assert "family" in python.text.lower()
    assert node["text"] == python.text
