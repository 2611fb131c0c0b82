"""
Programs that other people wrote: each builds what it builds around a WhisperModel, by
its own code, and hears a clip with it.

None of them is imported before it is needed: most people have none of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import io
import socket
import sys
import tempfile
import threading
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from unittest.mock import patch

import numpy as np
from faster_whisper import BatchedInferencePipeline
from faster_whisper.audio import decode_audio

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PROGRAMS", "Hear", "Program"]

# A function of a clip's path and its language, if that is to be told.
Hear: TypeAlias = "Callable[[str, str | None], str]"

# Before anything stands for it.
_HAS_TORCH = importlib.util.find_spec("torch") is not None
_PLACE: Any = {"device": "cpu", "compute_type": "int8"}


@dataclass(frozen=True)
class Program:
    """
    A program, or one way to use it.

    Attributes:
        build: Makes what hears with the model of a directory.
        distribution: What it is called in package indexes.
        needs_torch: True if it computes with torch.
        is_process: True if it has a process for itself: its command line, say.
        is_real: True if it asks of a model what a micro model has not.
    """

    build: Callable[[str], Hear]
    distribution: str
    needs_torch: bool = False
    is_process: bool = False
    is_real: bool = False

    @property
    def missing(self) -> str | None:
        """
        What is not installed of it, in words.
        """
        try:
            importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.distribution} is not installed: see `make apps`"
        if self.needs_torch and not _HAS_TORCH:
            return f"{self.distribution} needs torch: see `make apps TORCH=1`"
        return None


def _pcm(clip: str) -> bytes:
    samples: Any = decode_audio(clip)
    return bytes((samples * 32767).astype(np.int16).tobytes())


def _without_torch() -> None:
    """
    Stands for torch, of programs that only ask it for a card.
    """
    if not _HAS_TORCH:
        torch = types.ModuleType("torch")
        torch.cuda = types.SimpleNamespace(is_available=lambda: False)  # type: ignore[attr-defined]
        torch.__spec__ = importlib.util.spec_from_loader("torch", None)
        sys.modules["torch"] = torch


# faster-whisper -----------------------------------------------------------------------


def faster_whisper_words(path: str) -> Hear:
    import faster_whisper

    model = faster_whisper.WhisperModel(path, **_PLACE)

    def hear(clip: str, language: str | None) -> str:
        segments, _ = model.transcribe(
            clip, language=language, word_timestamps=True, vad_filter=True
        )
        return " ".join(f"{w.start:.2f}{w.word}" for s in segments for w in s.words)

    return hear


def faster_whisper_batched(path: str) -> Hear:
    import faster_whisper

    model = faster_whisper.WhisperModel(path, **_PLACE)
    pipeline = BatchedInferencePipeline(model=model)

    def hear(clip: str, language: str | None) -> str:
        segments, _ = pipeline.transcribe(clip, language=language, batch_size=2)
        return "".join(segment.text for segment in segments)

    return hear


# stable-ts ----------------------------------------------------------------------------


def _stable(path: str) -> Any:
    import stable_whisper

    return stable_whisper.load_faster_whisper(path, **_PLACE)


def stable_ts(path: str) -> Hear:
    model = _stable(path)

    def hear(clip: str, language: str | None) -> str:
        result = model.transcribe(clip, language=language, verbose=None)
        return " ".join(f"{w.start:.2f}{w.word}" for w in result.all_words())

    return hear


def stable_ts_batched(path: str) -> Hear:
    model = _stable(path)

    def hear(clip: str, language: str | None) -> str:
        options: Any = {"language": language, "verbose": None, "batch_size": 2}
        return str(model.transcribe(clip, **options).text)

    return hear


def stable_ts_aligned(path: str) -> Hear:
    model = _stable(path)

    def hear(clip: str, language: str | None) -> str:
        audio: Any = decode_audio(clip)
        result = model.transcribe(audio, language=language, verbose=None)
        aligned = model.align(
            audio, result.text, language=result.language, verbose=None
        )
        before = " ".join(f"{w.start:.2f}{w.word}" for w in aligned.all_words())
        model.refine(audio, aligned, verbose=None)
        return before + " ".join(f" {w.start:.3f}" for w in aligned.all_words())

    return hear


def stable_ts_command(path: str) -> Hear:
    def hear(clip: str, language: str | None) -> str:
        from stable_whisper.whisper_word_level import cli

        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "out.srt")
            options = ["-o", str(output), "--model", path, "--device", "cpu", "-fw"]
            told = ["--language", language] if language else []
            with patch.object(sys, "argv", ["stable-ts", clip, *options, *told, "-y"]):
                cli()
            return output.read_text("utf-8")

    return hear


# Servers ------------------------------------------------------------------------------


def realtimestt(path: str, batch_size: int = 0) -> Hear:
    from RealtimeSTT import transcription_engines as engines

    config = engines.TranscriptionEngineConfig(
        model=path, batch_size=batch_size, suppress_tokens=[-1], **_PLACE
    )
    engine = engines.create_transcription_engine("faster_whisper", config)
    return lambda clip, language: str(
        engine.transcribe(decode_audio(clip), language=language).text
    )


def realtimestt_batched(path: str) -> Hear:
    return realtimestt(path, 2)


def wyoming(path: str) -> Hear:
    """
    Runs its server, and asks it over TCP as Home Assistant does.
    """
    from wyoming_faster_whisper import __main__ as server

    uri = asyncio.run(_run_wyoming(server, path))
    return lambda clip, language: asyncio.run(_ask_wyoming(uri, clip, language))


async def _run_wyoming(server: Any, path: str) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    options = ["--model", path, "--uri", uri, "--data-dir", tempfile.gettempdir()]
    words = ["wyoming", *options, "--compute-type", "int8", "--cpu-threads", "1"]
    # It has no other end than that of the process.
    thread = threading.Thread(target=lambda: asyncio.run(server.main()), daemon=True)
    with patch.object(sys, "argv", words):
        thread.start()
        while not await _answers(uri):
            assert thread.is_alive()
            await asyncio.sleep(0.05)
    return uri


async def _answers(uri: str) -> bool:
    from wyoming.client import AsyncClient
    from wyoming.info import Describe, Info

    with contextlib.suppress(ConnectionRefusedError):
        async with AsyncClient.from_uri(uri) as client:
            await client.write_event(Describe().event())
            event = await client.read_event()
            return event is not None and Info.is_type(event.type)
    return False


async def _ask_wyoming(uri: str, clip: str, language: str | None) -> str:
    from wyoming.asr import Transcribe, Transcript
    from wyoming.audio import AudioChunk, AudioStart, AudioStop
    from wyoming.client import AsyncClient

    sound: Any = {"rate": 16_000, "width": 2, "channels": 1}
    audio = _pcm(clip)
    async with AsyncClient.from_uri(uri) as client:
        await client.write_event(Transcribe(language=language).event())
        await client.write_event(AudioStart(**sound).event())
        for start in range(0, len(audio), 32_000):
            part = audio[start : start + 32_000]
            await client.write_event(AudioChunk(audio=part, **sound).event())
        await client.write_event(AudioStop().event())
        while event := await client.read_event():
            if Transcript.is_type(event.type):
                return str(Transcript.from_event(event).text)
    raise ConnectionError("the server hung up")


def whisper_live(path: str) -> Hear:
    """
    Has the model that its REST interface hears with.
    """
    _without_torch()
    from whisper_live.server import TranscriptionServer

    server = TranscriptionServer()

    def hear(clip: str, language: str | None) -> str:
        model = server._get_rest_model(path)
        segments, _ = model.transcribe(clip, language=language, vad_filter=False)
        return " ".join(segment.text for segment in segments)

    return hear


def whisper_live_batch(path: str) -> Hear:
    """
    Hears with its worker, which encodes and generates for two requests at once.
    """
    _without_torch()
    from whisper_live.batch_inference import BatchInferenceWorker, BatchRequest
    from whisper_live.server import TranscriptionServer

    model = TranscriptionServer()._get_rest_model(path)
    worker = BatchInferenceWorker(model, max_batch_size=2)

    def hear(clip: str, language: str | None) -> str:
        requests = [
            BatchRequest(
                audio=decode_audio(clip),
                language=language,
                task="transcribe",
                initial_prompt=None,
                use_vad=False,
                vad_parameters=None,
                word_timestamps=False,
                hotwords=None,
                client_uid=str(number),
            )
            for number in range(2)
        ]
        worker._process_batch(requests)
        for request in requests:
            if request.error:
                raise request.error
        return str(["".join(s.text for s in each.result) for each in requests])

    return hear


def faster_whisper_server(path: str) -> Hear:
    """
    Asks its application, which has a file of models, for a transcription.
    """
    from fastapi.testclient import TestClient
    from faster_whisper_server import api, models

    config = types.SimpleNamespace(
        name=path,
        path=path,
        batch_size=2,
        model_options=_PLACE,
        transcribe_options={},
        translate_options={},
    )
    models._config_mode = True
    # Those of a run before.
    models._models.pop(path, None)
    models._batched_pipelines.pop(path, None)
    models._model_configs[path] = config
    client = TestClient(api.app)

    def hear(clip: str, language: str | None) -> str:
        data = {"model_name": path, **({"language": language} if language else {})}
        files = {"file": Path(clip).read_bytes()}
        answer = client.post("/v1/audio/transcriptions", data=data, files=files)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["text"])

    return hear


# Commands -----------------------------------------------------------------------------


def whisper_ctranslate2(path: str, *more: str) -> Hear:
    def hear(clip: str, language: str | None) -> str:
        from whisper_ctranslate2.whisper_ctranslate2 import main

        with tempfile.TemporaryDirectory() as folder:
            options = ["--model_directory", path, "--device", "cpu", *more]
            output = ["--compute_type", "int8", "--output_dir", folder]
            told = ["--language", language] if language else []
            words = ["whisper-ctranslate2", clip, *options, *output, *told]
            quiet = contextlib.redirect_stdout(io.StringIO())
            with patch.object(sys, "argv", words), quiet:
                main()
            return Path(folder, Path(clip).stem + ".srt").read_text("utf-8")

    return hear


def whisper_ctranslate2_batched(path: str) -> Hear:
    return whisper_ctranslate2(path, "--batched", "True", "--batch_size", "2")


# Libraries ----------------------------------------------------------------------------


def whisper_streaming(path: str) -> Hear:
    from whisper_streaming.backend import faster_whisper_backend as backend

    asr = backend.FasterWhisperASR(
        backend.FasterWhisperModelConfig(path, **_PLACE),
        backend.FasterWhisperTranscribeConfig(),
        backend.FasterWhisperFeatureExtractorConfig(),
        16_000,
        "en",
    )

    def hear(clip: str, _: str | None) -> str:
        segments, _language = asr.transcribe(decode_audio(clip), "")
        return "".join(word.word for word in asr.segments_to_words(segments))

    return hear


def whisperlivekit(path: str) -> Hear:
    from whisperlivekit.local_agreement.backends import FasterWhisperASR

    asr = FasterWhisperASR("en", model_dir=path)
    return lambda clip, _: str(
        [t.text for t in asr.ts_words(asr.transcribe(decode_audio(clip)))]
    )


def speech_recognition(path: str) -> Hear:
    import speech_recognition as recognition

    def hear(clip: str, language: str | None) -> str:
        recognizer = recognition.Recognizer()
        with recognition.AudioFile(clip) as source:
            audio = recognizer.record(source)
        return str(
            recognizer.recognize_faster_whisper(
                audio, model=path, language=language, init_options=_PLACE
            )
        )

    return hear


def langchain(path: str) -> Hear:
    _without_torch()
    from langchain_community.document_loaders.blob_loaders import Blob
    from langchain_community.document_loaders.parsers.audio import FasterWhisperParser

    parser = FasterWhisperParser(device="cpu")
    # It takes the names of four models only.
    parser.model_size = path
    return lambda clip, _: "".join(
        document.page_content for document in parser.lazy_parse(Blob.from_path(clip))
    )


def pipecat(path: str) -> Hear:
    from pipecat.services.whisper.stt import WhisperSTTService

    settings = WhisperSTTService.Settings(
        model=path, language="en", no_speech_prob=0.99
    )
    service = WhisperSTTService(settings=settings, **_PLACE)

    async def nothing(*_: object, **__: object) -> None:
        pass

    # They need a pipeline around it.
    service.start_processing_metrics = service.stop_processing_metrics = nothing

    async def frames(clip: str) -> str:
        found = [frame async for frame in service.run_stt(_pcm(clip))]
        return "".join(frame.text for frame in found)

    return lambda clip, _: asyncio.run(frames(clip))


def ovos(path: str) -> Hear:
    import speech_recognition as recognition
    from ovos_stt_plugin_fasterwhisper import FasterWhisperSTT

    config = {"model": path, "compute_type": "int8", "cpu_threads": 1, "lang": "auto"}
    stt = FasterWhisperSTT(config=config)

    def hear(clip: str, _: str | None) -> str:
        with recognition.AudioFile(clip) as source:
            audio = recognition.Recognizer().record(source)
        return f"{stt.detect_language(audio)} {stt.execute(audio, 'auto')}"

    return hear


PROGRAMS = [
    Program(faster_whisper_words, "faster-whisper"),
    Program(faster_whisper_batched, "faster-whisper"),
    Program(stable_ts, "stable-ts", needs_torch=True),
    Program(stable_ts_batched, "stable-ts", needs_torch=True),
    Program(stable_ts_aligned, "stable-ts", needs_torch=True, is_real=True),
    Program(stable_ts_command, "stable-ts", needs_torch=True, is_process=True),
    Program(realtimestt, "RealtimeSTT"),
    Program(realtimestt_batched, "RealtimeSTT"),
    Program(wyoming, "wyoming-faster-whisper", is_process=True),
    Program(whisper_ctranslate2, "whisper-ctranslate2", is_process=True),
    Program(whisper_ctranslate2_batched, "whisper-ctranslate2", is_process=True),
    Program(whisper_streaming, "whisper-streaming"),
    Program(whisper_live, "whisper-live"),
    Program(whisper_live_batch, "whisper-live"),
    Program(whisperlivekit, "whisperlivekit", needs_torch=True),
    Program(speech_recognition, "SpeechRecognition"),
    Program(langchain, "langchain-community"),
    Program(pipecat, "pipecat-ai"),
    Program(faster_whisper_server, "faster-whisper-server"),
    Program(ovos, "ovos-stt-plugin-fasterwhisper"),
]
