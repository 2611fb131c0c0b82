"""
Servers that other people wrote, each asked by a client of its protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import sys
import tempfile
import threading
import time
import types
import uuid
from pathlib import Path
from typing import Any
from unittest.mock import patch

from faster_whisper.audio import decode_audio
from hearing import PLACE, Hear, without_torch
from real import pcm
from wyoming_client import asked, described

__all__ = [
    "faster_whisper_server",
    "whisper_live",
    "whisper_live_batch",
    "whisper_live_socket",
    "wyoming",
]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def wyoming(path: str) -> Hear:
    """
    Runs its server, and asks it over TCP as Home Assistant does.
    """
    from wyoming_faster_whisper import __main__ as server

    uri = asyncio.run(_run_wyoming(server, path))
    return lambda clip, language: asyncio.run(asked(uri, pcm(clip), language))


async def _run_wyoming(server: Any, path: str) -> str:
    uri = f"tcp://127.0.0.1:{_free_port()}"
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
    with contextlib.suppress(ConnectionRefusedError):
        return await described(uri) is not None
    return False


def whisper_live(path: str) -> Hear:
    """
    Has the model that its REST interface hears with.
    """
    without_torch()
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
    without_torch()
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


def whisper_live_socket(path: str) -> Hear:
    """
    Runs its server, and sends a clip over a WebSocket, in one piece. Each client has a
    model of its own there, made of CTranslate2's Whisper without faster-whisper's.
    """
    without_torch()
    return lambda clip, language: _ask_whisper_live(path, clip, language)


@functools.cache
def _whisper_live_server() -> tuple[Any, str]:
    from whisper_live.server import TranscriptionServer

    server, port = TranscriptionServer(), _free_port()
    # It has no other end than that of the process.
    threading.Thread(
        target=server.run,
        args=("127.0.0.1", port),
        kwargs={"backend": "faster_whisper"},
        daemon=True,
    ).start()
    return server, f"ws://127.0.0.1:{port}"


def _ask_whisper_live(path: str, clip: str, language: str | None) -> str:
    server, url = _whisper_live_server()
    uid = str(uuid.uuid4())
    options = {"uid": uid, "model": path, "language": language, "task": "transcribe"}
    with _whisper_live_client(url) as client:
        client.send(json.dumps({**options, "use_vad": True, "audio_format": "int16"}))
        said = json.loads(client.recv(60))
        assert said.get("message") == "SERVER_READY", said
        client.send(pcm(clip))
        while "segments" not in said:
            said = json.loads(client.recv(60))
        found = list(server.client_manager.clients.values())
        (hearing,) = (each for each in found if each.client_uid == uid)
        client.send(b"END_OF_AUDIO")
    # It has heard it again meanwhile.
    hearing.trans_thread.join(60)
    return str([segment["text"] for segment in said["segments"]])


def _whisper_live_client(url: str) -> Any:
    from websockets.sync.client import connect

    for _ in range(200):
        with contextlib.suppress(ConnectionRefusedError):
            return connect(url)
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens at {url}")


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
        model_options=PLACE,
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
