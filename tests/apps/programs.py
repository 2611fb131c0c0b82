"""
Programs that other people wrote: each builds what it builds around a WhisperModel, by
its own code, and hears a clip with it.

None of them is imported before it is needed: most people have none of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from faster_whisper import BatchedInferencePipeline
from faster_whisper.audio import decode_audio
from hearing import (
    PLACE,
    Hear,
    Program,
    without_pyannote,
    without_torch,
    without_torchaudio,
)
from real import pcm
from servers import (
    faster_whisper_server,
    whisper_live,
    whisper_live_batch,
    whisper_live_socket,
    wyoming,
)

__all__ = ["PROGRAMS"]


# faster-whisper -----------------------------------------------------------------------


def faster_whisper_words(path: str) -> Hear:
    import faster_whisper

    model = faster_whisper.WhisperModel(path, **PLACE)

    def hear(clip: str, language: str | None) -> str:
        segments, _ = model.transcribe(
            clip, language=language, word_timestamps=True, vad_filter=True
        )
        return " ".join(f"{w.start:.2f}{w.word}" for s in segments for w in s.words)

    return hear


def faster_whisper_batched(path: str) -> Hear:
    import faster_whisper

    model = faster_whisper.WhisperModel(path, **PLACE)
    pipeline = BatchedInferencePipeline(model=model)

    def hear(clip: str, language: str | None) -> str:
        segments, _ = pipeline.transcribe(clip, language=language, batch_size=2)
        return "".join(segment.text for segment in segments)

    return hear


# stable-ts ----------------------------------------------------------------------------


def _stable(path: str) -> Any:
    without_torchaudio()
    import stable_whisper

    return stable_whisper.load_faster_whisper(path, **PLACE)


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
    without_torchaudio()

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


# whisperX -----------------------------------------------------------------------------


def whisperx(path: str) -> Hear:
    """
    Hears the halves of a clip as one batch. Its voice detectors are downloads; the one
    that stands for them finds two halves, whatever it hears.
    """
    without_pyannote()
    from whisperx import asr
    from whisperx.diarize import Segment
    from whisperx.vads import Vad

    class Halves(Vad):  # type: ignore[misc] # it is Any
        preprocess_audio = staticmethod(lambda audio: audio)

        def __call__(self, audio: dict[str, Any], **_: object) -> list[Any]:
            half_s = audio["waveform"].shape[-1] / audio["sample_rate"] / 2
            return [Segment(n * half_s, (n + 1) * half_s, "SPEECH") for n in range(2)]

    detector = Halves(vad_onset=0.5)
    quiet = contextlib.redirect_stdout(io.StringIO())
    with quiet:
        model = asr.load_model(path, vad_model=detector, **PLACE)

    def hear(clip: str, language: str | None) -> str:
        options = {"language": language, "batch_size": 2, "chunk_size": 1}
        result = model.transcribe(decode_audio(clip), **options)
        assert len(result["segments"]) == 2
        return str([result["language"], *(s["text"] for s in result["segments"])])

    return hear


# RealtimeSTT --------------------------------------------------------------------------


def realtimestt(path: str, batch_size: int = 0) -> Hear:
    from RealtimeSTT import transcription_engines as engines

    config = engines.TranscriptionEngineConfig(
        model=path, batch_size=batch_size, suppress_tokens=[-1], **PLACE
    )
    engine = engines.create_transcription_engine("faster_whisper", config)
    return lambda clip, language: str(
        engine.transcribe(decode_audio(clip), language=language).text
    )


def realtimestt_batched(path: str) -> Hear:
    return realtimestt(path, 2)


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
        backend.FasterWhisperModelConfig(path, **PLACE),
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
                audio, model=path, language=language, init_options=PLACE
            )
        )

    return hear


def langchain(path: str) -> Hear:
    without_torch()
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
    service = WhisperSTTService(settings=settings, **PLACE)

    async def nothing(*_: object, **__: object) -> None:
        pass

    # They need a pipeline around it.
    service.start_processing_metrics = service.stop_processing_metrics = nothing

    async def frames(clip: str) -> str:
        found = [frame async for frame in service.run_stt(pcm(clip))]
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
    Program(whisperx, "whisperx", needs_torch=True),
    Program(realtimestt, "RealtimeSTT"),
    Program(realtimestt_batched, "RealtimeSTT"),
    Program(wyoming, "wyoming-faster-whisper", is_process=True),
    Program(whisper_ctranslate2, "whisper-ctranslate2", is_process=True),
    Program(whisper_ctranslate2_batched, "whisper-ctranslate2", is_process=True),
    Program(whisper_streaming, "whisper-streaming"),
    Program(whisper_live, "whisper-live"),
    Program(whisper_live_batch, "whisper-live"),
    Program(whisper_live_socket, "whisper-live", is_raw=True, is_endless=True),
    Program(whisperlivekit, "whisperlivekit", needs_torch=True),
    Program(speech_recognition, "SpeechRecognition"),
    Program(langchain, "langchain-community"),
    Program(pipecat, "pipecat-ai"),
    Program(faster_whisper_server, "faster-whisper-server"),
    Program(ovos, "ovos-stt-plugin-fasterwhisper"),
]
