"""
Wyoming: Home Assistant's protocol, by its own client, and by clients that misbehave.
"""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from real import clip, decode_audio, micro, micro_copy, model_of, reference
from served import TINY, A, B, command, micros, offered, running

from whispercache import ModelCache
from whispercache.cli.main import main
from whispercache.engine.naming import ModelSpec
from whispercache.server import ServerOptions, create_app
from whispercache.server.requests import listed
from whispercache.testing import wait_until

pytest.importorskip("wyoming", reason="needs the extra [wyoming]")

from wyoming.asr import Transcribe, Transcript, TranscriptChunk, TranscriptStart
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient
from wyoming.error import Error
from wyoming.event import Event
from wyoming.info import Describe, Info, SelectProgram
from wyoming.ping import Ping, Pong

from whispercache.server.wyoming import session as session_module
from whispercache.server.wyoming.wire import (
    DATA_BYTES,
    LINE_BYTES,
    BrokenStream,
    read_frame,
    read_payload,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from numpy.typing import NDArray

pytestmark = pytest.mark.process

HELLO = ModelSpec("m", str(micro("micro says hello")))
ENGLISH = ModelSpec("m.en", str(micro("micro english", english=True)))


ROUTE = "WYOMING transcribe"


class Served:
    """
    A server that speaks Wyoming, its cache, and its addresses.
    """

    def __init__(self, url: str, port: int, cache: ModelCache, service: Any) -> None:
        self.url = url
        self.port = port
        self.cache = cache
        self.service = service

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncTcpClient]:
        """
        The protocol's own client.
        """
        async with AsyncTcpClient("127.0.0.1", self.port) as client:
            yield client

    def assert_all_is_let_go(self) -> None:
        """
        Nothing is leased, at work or waited for, and nobody is being talked to.
        """
        wait_until(lambda: self.cache.stats().leases == 0, "no lease is left")
        wait_until(lambda: not self.service.gate._visits, "no visit is left")
        wait_until(lambda: not self.service.endpoint._sessions, "nobody is there")


@contextmanager
def speaking(*models: ModelSpec, **options: Any) -> Iterator[Served]:
    """
    A server of some models on the CPU.
    """
    given = ServerOptions(
        models=models or (HELLO,),
        device="cpu",
        decoders=1,
        wyoming=("127.0.0.1", 0),
        **options,
    )
    with ModelCache() as cache:
        app = create_app(given, cache)
        with running(app) as url:
            service = app.state.service
            yield Served(url, service.endpoint.port, cache, service)


def pcm(
    audio: NDArray[np.float32], rate: int = 16_000, width: int = 2, channels: int = 1
) -> bytes:
    """
    Speech, 16 kHz and mono, as raw samples of another shape.
    """
    places = np.arange(0, len(audio), 16_000 / rate)
    line = np.interp(places, np.arange(len(audio)), audio)
    line = np.repeat(line[:, None], channels, axis=1).reshape(-1)
    whole: NDArray[Any]
    if width == 1:
        whole = ((line * 127) + 128).astype(np.uint8)
        return whole.tobytes()
    if width == 3:
        whole = (line * (2**23 - 1)).astype("<i4")
        return whole.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    whole = (line * (2 ** (8 * width - 1) - 1)).astype(f"<i{width}")
    return whole.tobytes()


async def say(
    client: AsyncTcpClient, raw: bytes, shape: tuple[int, int, int] = (16_000, 2, 1)
) -> None:
    """
    A recording, as Home Assistant sends it: in pieces, between a start and an end.
    """
    rate, width, channels = shape
    await client.write_event(AudioStart(rate, width, channels).event())
    for start in range(0, len(raw), 2048):
        piece = raw[start : start + 2048]
        await client.write_event(AudioChunk(rate, width, channels, piece).event())
    await client.write_event(AudioStop().event())


async def read(client: AsyncTcpClient) -> Event:
    """
    The next event, which is there.
    """
    event = await asyncio.wait_for(client.read_event(), 60)
    assert event is not None, "the connection was closed"
    return event


async def heard(client: AsyncTcpClient) -> Transcript:
    """
    The transcript that comes, whatever comes before.
    """
    while True:
        event = await read(client)
        assert not Error.is_type(event.type), event
        if Transcript.is_type(event.type):
            return Transcript.from_event(event)


async def refused(client: AsyncTcpClient) -> Error:
    """
    The error that comes next.
    """
    event = await read(client)
    assert Error.is_type(event.type), event
    return Error.from_event(event)


async def home_assistant(port: int, language: str, raw: bytes) -> str | None:
    """
    What Home Assistant hears; None for its error.

    Source: homeassistant/components/wyoming/stt.py: what is sent, in which order, and
    that all is passed over until there is a transcript or an end.
    """
    async with AsyncTcpClient("127.0.0.1", port) as client:
        await client.write_event(Transcribe(language=language).event())
        await say(client, raw)
        while True:
            event = await asyncio.wait_for(client.read_event(), 60)
            if event is None:
                return None
            if Transcript.is_type(event.type):
                text: str = Transcript.from_event(event).text
                return text


HELLO_AUDIO = pcm(decode_audio(clip("en-bread")))


# What is there ------------------------------------------------------------------------


def test_describe_tells_models_and_languages() -> None:
    """
    All that is served counts as installed, so that Home Assistant offers it.
    """

    async def ask(served: Served) -> Info:
        async with served.client() as client:
            await client.write_event(Describe().event())
            return Info.from_event(await read(client))

    with speaking(HELLO, ENGLISH) as served:
        info = asyncio.run(ask(served))
    [program] = info.asr
    assert program.installed
    assert program.supports_transcript_streaming
    assert [model.name for model in program.models] == ["m", "m.en"]
    assert all(model.installed for model in program.models)
    many, one = (model.languages for model in program.models)
    assert {"en", "de"} <= set(many)
    assert one == ["en"]


def test_a_model_that_is_yet_to_be_downloaded_is_described() -> None:
    """
    By what its name tells.
    """

    async def ask(served: Served) -> Info:
        async with served.client() as client:
            await client.write_event(Describe().event())
            return Info.from_event(await read(client))

    here = ModelSpec("a", "someone/unheard-of")
    with speaking(here, ModelSpec("b", "someone/unheard-of.en")) as served:
        [program] = asyncio.run(ask(served)).asr
    many, one = (model.languages for model in program.models)
    assert len(many) > 90
    assert one == ["en"]


def test_pings_and_programs_are_answered() -> None:
    """
    Unknown events are passed over, with their bytes.
    """

    async def talk(served: Served) -> None:
        async with served.client() as client:
            await client.write_event(Event("wonder", {"a": 1}, b"\n{}\n" * 50))
            await client.write_event(Ping("x").event())
            assert Pong.from_event(await read(client)).text == "x"
            await client.write_event(SelectProgram("whispercache").event())
            await client.write_event(SelectProgram("piper").event())
            assert "only program here is whispercache" in (await refused(client)).text

    with speaking() as served:
        asyncio.run(talk(served))


# What is heard ------------------------------------------------------------------------


@pytest.mark.slow
def test_home_assistant_hears_what_the_model_does() -> None:
    """
    Real speech, on a real model, and several at once.
    """
    names = ["en-bread", "en-garden", "en-bread", "en-garden"]
    (spec,) = offered(TINY)
    with speaking(spec) as served:
        model = model_of(served.cache, Path(spec.model))
        alone = {}
        for name in set(names):
            segments, _ = model.transcribe(clip(name), language="en", vad_filter=True)
            alone[name] = "".join(each.text for each in segments).strip()

        async def ask() -> list[str | None]:
            said = [pcm(decode_audio(clip(name))) for name in names]
            each = [home_assistant(served.port, "en", raw) for raw in said]
            return list(await asyncio.gather(*each))

        texts = asyncio.run(ask())
        assert texts == [alone[name] for name in names]
        assert len(set(texts)) == 2
        served.assert_all_is_let_go()


@pytest.mark.parametrize(
    "shape", [(48_000, 2, 2), (8_000, 1, 1), (44_100, 3, 1), (22_050, 4, 2)]
)
def test_samples_of_any_shape_are_converted(shape: tuple[int, int, int]) -> None:
    """
    The text is the same, and so is the length.
    """
    (spec,) = offered(TINY)
    audio = decode_audio(clip("en-bread"))

    async def ask(served: Served) -> tuple[Transcript, Transcript]:
        async with served.client() as client:
            await say(client, pcm(audio))
            plain = await heard(client)
            await read(client)
            await say(client, pcm(audio, *shape), shape)
            return plain, await heard(client)

    with speaking(spec) as served:
        plain, other = asyncio.run(ask(served))
    words = reference("en-bread").lower().split()
    assert other.language == plain.language == "en"
    said = {word.strip(".,").lower() for word in other.text.split()}
    assert len(said & {word.strip(".,") for word in words}) > len(words) / 2


def test_a_transcript_is_streamed_and_the_connection_goes_on() -> None:
    """
    Start, parts, the whole, and an end, each with the language or the client's context.
    """

    async def talk(served: Served) -> None:
        async with served.client() as client:
            for language in ("en", "de"):
                asked = Transcribe(language=language, context={"id": 7})
                await client.write_event(asked.event())
                await say(client, HELLO_AUDIO)
                start = TranscriptStart.from_event(await read(client))
                assert (start.language, start.context) == (language, {"id": 7})
                part = TranscriptChunk.from_event(await read(client))
                whole = Transcript.from_event(await read(client))
                assert part.text == whole.text == "micro says hello"
                assert (whole.language, whole.context) == (language, {"id": 7})
                assert (await read(client)).type == "transcript-stop"
            # What was asked for holds for one recording.
            await say(client, HELLO_AUDIO)
            assert (await heard(client)).context is None

    with speaking() as served:
        asyncio.run(talk(served))
        served.assert_all_is_let_go()


def test_silence_is_an_empty_transcript() -> None:
    """
    And so is nothing at all, for which no model is loaded.
    """

    async def ask(served: Served) -> None:
        async with served.client() as client:
            await say(client, b"")
            assert (await heard(client)).text == ""
            assert not served.cache.stats().requests
            await say(client, bytes(96_000))
            assert (await heard(client)).text == ""

    with speaking() as served:
        asyncio.run(ask(served))


def test_a_name_or_a_language_chooses_the_model() -> None:
    """
    Home Assistant has names for none; the first that knows the language listens.
    """

    async def ask(served: Served, **asked: Any) -> str:
        async with served.client() as client:
            await client.write_event(Transcribe(**asked).event())
            await say(client, HELLO_AUDIO)
            text: str = (await heard(client)).text
            return text

    with speaking(ENGLISH, *micros()) as served:
        for asked, text in (
            ({}, "micro english"),
            ({"language": "en-GB"}, "micro english"),
            ({"language": "de"}, "micro a"),
            ({"name": B}, "micro b"),
            ({"name": A, "language": "German"}, "micro a"),
        ):
            assert asyncio.run(ask(served, **asked)) == text
        served.assert_all_is_let_go()


def test_audio_without_a_start_or_a_wish_is_heard() -> None:
    """
    As the usual server for it does.
    """

    async def ask(served: Served) -> str:
        async with served.client() as client:
            chunk = AudioChunk(16_000, 2, 1, HELLO_AUDIO)
            await client.write_event(chunk.event())
            await client.write_event(AudioStop().event())
            text: str = (await heard(client)).text
            return text

    with speaking() as served:
        assert asyncio.run(ask(served)) == "micro says hello"


def test_names_to_listen_for_reach_the_model() -> None:
    """
    Names before terms; the transcript is the same with a model that follows no hint.
    """
    from whispercache.server.wyoming.asked import Asked

    data = {"transcript_terms": ["lamp"], "transcript_names": ["Grüner Salon", "Bad"]}
    options = Asked.of(data).options(vad=True)
    assert options["hotwords"] == "Grüner Salon, Bad, lamp"
    many = [f"lamp {number}" for number in range(999)]
    fitting = Asked.of({"transcript_names": many}).options(vad=True)["hotwords"]
    assert 700 < len(fitting) <= 800
    assert fitting.split(", ") == many[: fitting.count(",") + 1]

    async def ask(served: Served) -> str:
        async with served.client() as client:
            await client.write_event(Event("transcribe", data))
            await say(client, HELLO_AUDIO)
            text: str = (await heard(client)).text
            return text

    with speaking() as served:
        assert asyncio.run(ask(served)) == "micro says hello"


# Errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "code", "text"),
    [
        ({"name": "nobody"}, "model_not_found", "not served here"),
        ({"language": "klingon"}, "invalid_value", "none that Whisper knows"),
        ({"name": "m.en", "language": "de"}, "invalid_value", "English only"),
        ({"name": 7}, "invalid_value", "name of a model"),
        ({"language": [7]}, "invalid_value", "language"),
        ({"context": "so"}, "invalid_value", "an object"),
        ({"transcript_names": [7]}, "invalid_value", "list of texts"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(
    data: dict[str, Any], code: str, text: str
) -> None:
    """
    Once, before anything is said; what is said to it has no answer, and the next one
    is heard.
    """

    async def talk(served: Served) -> None:
        async with served.client() as client:
            await client.write_event(Event("transcribe", data))
            error = await refused(client)
            assert error.code == code
            assert text in error.text
            await say(client, HELLO_AUDIO)
            await client.write_event(Transcribe(name="m").event())
            await say(client, HELLO_AUDIO)
            assert (await heard(client)).text == "micro says hello"

    with speaking(HELLO, ENGLISH) as served:
        asyncio.run(talk(served))
        served.assert_all_is_let_go()


@pytest.mark.parametrize(
    "change",
    [{"rate": 0}, {"rate": "16000"}, {"width": 8}, {"channels": 99}, {"rate": None}],
)
def test_a_shape_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    """
    At the start, or in the middle.
    """
    shape = {"rate": 16_000, "width": 2, "channels": 1}

    async def talk(served: Served) -> None:
        async with served.client() as client:
            await client.write_event(Event("audio-start", {**shape, **change}))
            assert (await refused(client)).code == "invalid_value"
            await say(client, HELLO_AUDIO)
            assert (await heard(client)).text == "micro says hello"
            await read(client)
            await client.write_event(Event("audio-start", shape))
            chunk = Event("audio-chunk", {**shape, **change}, HELLO_AUDIO)
            await client.write_event(chunk)
            assert (await refused(client)).code == "invalid_value"
            await client.write_event(chunk)
            await client.write_event(AudioStop().event())
            await say(client, HELLO_AUDIO)
            assert (await heard(client)).text == "micro says hello"

    with speaking() as served:
        asyncio.run(talk(served))


def test_too_much_is_refused_when_it_is_too_much() -> None:
    """
    Seconds and bytes; the rest is passed over and kept nowhere.
    """

    async def talk(served: Served, code: str) -> None:
        async with served.client() as client:
            await say(client, bytes(2 * 16_000 * 3))
            assert (await refused(client)).code == code
            await say(client, HELLO_AUDIO[: 16_000 * 2])
            assert (await heard(client)).text == "micro says hello"

    for options in ({"max_duration_s": 2.0}, {"max_upload_bytes": 70_000}):
        with speaking(**options) as served:
            asyncio.run(talk(served, "audio_too_long"))
            served.assert_all_is_let_go()


def test_home_assistant_is_told_of_errors_by_the_end_of_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    It knows no error events, and would wait for ever.
    """
    monkeypatch.setattr(session_module, "AFTER_ERROR_S", 0.2)
    with speaking(ENGLISH) as served:
        found = asyncio.run(home_assistant(served.port, "de", HELLO_AUDIO))
        assert found is None
        served.assert_all_is_let_go()


def test_a_model_that_fails_is_told(tmp_path: Any) -> None:
    """
    By the code that HTTP has for it; other models are heard meanwhile.
    """
    broken = micro_copy(tmp_path / "broken", "micro a")

    async def talk(served: Served) -> None:
        async with served.client() as client:
            await client.write_event(Describe().event())
            await read(client)
            (broken / "model.bin").write_bytes(b"no model")
            await client.write_event(Transcribe(name="m").event())
            await say(client, HELLO_AUDIO)
            assert (await heard(client)).text == "micro says hello"
            await read(client)
            await client.write_event(Transcribe(name="broken").event())
            assert (await refused(client)).code == "model_unavailable"
            await client.write_event(Describe().event())
            [program] = Info.from_event(await read(client)).asr
            assert len(program.models) == 2

    with speaking(HELLO, ModelSpec("broken", str(broken))) as served:
        asyncio.run(talk(served))
        served.assert_all_is_let_go()


def test_a_full_disk_is_told_and_the_next_event_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Though the rest of a payload is still to come.
    """
    from whispercache.server.wyoming.recording import Recording

    async def talk(served: Served) -> None:
        async with served.client() as client:
            chunk = AudioChunk(16_000, 2, 1, bytes(600_000))
            with monkeypatch.context() as patched:

                def full(_recording: Recording) -> None:
                    raise OSError(errno.ENOSPC, "no space is left")

                patched.setattr(Recording, "_write", full)
                await client.write_event(chunk.event())
                assert (await refused(client)).code == "disk_full"
            await client.write_event(AudioStop().event())
            await say(client, HELLO_AUDIO)
            assert (await heard(client)).text == "micro says hello"

    with speaking() as served:
        asyncio.run(talk(served))
        served.assert_all_is_let_go()


# Clients that misbehave ---------------------------------------------------------------


BROKEN = {
    "no JSON": b"hello\n",
    "HTTP": b"POST / HTTP/1.1\r\n\r\n" + b'{"type": "describe"}\n',
    "no object": b"[]\n",
    "no type": b"{}\n",
    "a number for a type": b'{"type": 7}\n',
    "text for data": b'{"type": "describe", "data": "so"}\n',
    "nested": b"[" * 60_000 + b"\n",
    "not UTF-8": b'{"type": "\xff"}\n',
    "half a character": b'{"type": "ping", "data": {"text": "\\ud83d"}}\n',
    "a negative length": b'{"type": "describe", "data_length": -1}\n',
    "a length that is none": b'{"type": "describe", "payload_length": true}\n',
    "much data": f'{{"type": "describe", "data_length": {DATA_BYTES + 1}}}\n'.encode(),
    "a huge payload": b'{"type": "audio-chunk", "payload_length": 1000000000000}\n',
    "a long line": b" " * (4 * LINE_BYTES),
    "data that is none": b'{"type": "describe", "data_length": 2}\n[]',
}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(), each),
    max_leaves=5,
)
HEADS = st.dictionaries(
    st.sampled_from(["type", "data", "data_length", "payload_length", "version"]),
    VALUES | st.sampled_from(["ping", 0, 1, 7, -1]),
)
LINES = HEADS.map(lambda head: json.dumps(head).encode() + b"\n")


@given(st.lists(LINES | st.binary(max_size=50), max_size=6))
def test_whatever_is_sent_is_events_or_broken(pieces: list[bytes]) -> None:
    """
    Read to the end, or to what is none; never any other error.
    """

    async def read_all() -> None:
        reader = asyncio.StreamReader(LINE_BYTES)
        reader.feed_data(b"".join(pieces))
        reader.feed_eof()
        while (frame := await read_frame(reader)) is not None:
            n_bytes = 0
            async for piece in read_payload(reader, frame.payload_bytes):
                n_bytes += len(piece)
            assert n_bytes <= frame.payload_bytes

    with suppress(BrokenStream):
        asyncio.run(read_all())


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN)
def test_what_is_no_event_ends_the_connection_and_nothing_else(sent: bytes) -> None:
    """
    With an error. Nothing of what follows is taken for an event: a page that a browser
    shows could have sent it.
    """
    with speaking() as served:
        address = ("127.0.0.1", served.port)
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert b'"type": "error"' in answer
        assert b"broken_stream" in answer
        assert b'"type": "info"' not in answer
        assert asyncio.run(home_assistant(served.port, "en", HELLO_AUDIO))
        served.assert_all_is_let_go()


def test_a_huge_payload_takes_no_memory() -> None:
    """
    What is refused is read in pieces, and what is kept is on disk.
    """
    n_bytes = 90 * 1024**2
    head = {"type": "wonder", "payload_length": n_bytes}
    with speaking() as served:
        process = psutil.Process()
        before = process.memory_info().rss
        address = ("127.0.0.1", served.port)
        with socket.create_connection(address, timeout=60) as connection:
            connection.sendall(json.dumps(head).encode() + b"\n")
            for _ in range(90):
                connection.sendall(bytes(1024**2))
            connection.sendall(b'{"type": "ping"}\n')
            assert b"pong" in connection.recv(4096)
            assert process.memory_info().rss - before < n_bytes / 3


def test_who_hangs_up_leaves_nothing_behind() -> None:
    """
    In the middle of a line, of a payload, of a sentence, and while he is answered.
    """
    head = b'{"type": "audio-chunk", "data": {"rate": 16000, "width": 2, "channels": 1}'

    def send(port: int, sent: bytes) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(sent)

    (spec,) = offered(TINY)
    with speaking(spec) as served:
        send(served.port, b'{"type": "desc')
        send(served.port, b'{"type": "describe", "data_length": 7}\n{')
        send(served.port, head + b', "payload_length": 4096}\n' + bytes(100))
        send(served.port, head + b', "payload_length": 400}\n' + bytes(400))
        raw = pcm(decode_audio(clip("en-harbour-long")))
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            size = f', "payload_length": {len(raw)}}}\n'.encode()
            connection.sendall(head + size + raw + b'{"type": "audio-stop"}\n')
            wait_until(lambda: served.cache.stats().leases == 1, "it is answered")
        served.assert_all_is_let_go()


def test_many_talk_at_once_and_no_more_than_there_may_be() -> None:
    """
    One too many is told so; when others have left, there is room again.
    """

    async def talk(served: Served) -> None:
        most = served.service.most
        clients = [AsyncTcpClient("127.0.0.1", served.port) for _ in range(most)]
        for client in clients:
            await client.connect()
        wait = asyncio.get_running_loop().run_in_executor
        sessions = served.service.endpoint._sessions
        await wait(None, wait_until, lambda: len(sessions) == most, "all are there")
        async with served.client() as late:
            assert (await refused(late)).code == "too_many_requests"
            assert await late.read_event() is None
        # As many as may wait, and two at work.
        for client in clients[:8]:
            await say(client, HELLO_AUDIO)
        texts = await asyncio.gather(*map(heard, clients[:8]))
        assert {each.text for each in texts} == {"micro says hello"}
        for client in clients:
            await client.disconnect()

    with speaking(max_waiting=6) as served:
        asyncio.run(talk(served))
        served.assert_all_is_let_go()


def test_a_full_queue_is_told() -> None:
    """
    As by HTTP, and before anything is decoded.
    """

    async def ask(served: Served) -> Error:
        async with served.client() as client:
            await say(client, HELLO_AUDIO)
            return await refused(client)

    with (
        speaking(max_waiting=0, parallel=1) as served,
        served.service.gate.visit("m"),
    ):
        assert asyncio.run(ask(served)).code == "too_many_requests"


def test_conversations_are_listed_as_other_requests_are() -> None:
    """
    What was heard, refused, or not said to its end; with the code that was told.
    """

    async def talk(served: Served) -> None:
        async with served.client() as client:
            await say(client, HELLO_AUDIO)
            await heard(client)
            assert (await read(client)).type == "transcript-stop"
            await client.write_event(Transcribe(name="nobody").event())
            await refused(client)
            await client.write_event(Transcribe(name="m").event())
            with served.service.gate.visit("m"):
                await say(client, HELLO_AUDIO)
                await refused(client)
            await client.write_event(Transcribe(name="m").event())
            await client.write_event(AudioStart(16_000, 2, 1).event())
            await client.write_event(Ping().event())
            await read(client)
            [speaking] = listed(served.service.seen).under_way
            assert (speaking.phase, speaking.route) == ("arriving", ROUTE)

    with speaking(max_waiting=0, parallel=1) as served:
        asyncio.run(talk(served))
        served.assert_all_is_let_go()
        requests = httpx.get(f"{served.url}/api/requests").json()
    assert requests["under_way"] == []
    shown = ("outcome", "error", "model", "route", "status")
    assert [tuple(each[name] for name in shown) for each in requests["lately"]] == [
        ("left", None, "m", ROUTE, None),
        ("refused", "too_many_requests", "m", ROUTE, None),
        ("refused", "model_not_found", None, ROUTE, None),
        ("answered", None, "m", ROUTE, None),
    ]
    answered = requests["lately"][-1]
    assert answered["audio_s"] == pytest.approx(len(HELLO_AUDIO) / 32_000)
    assert answered["seconds"]["working"] > 0


def test_who_says_nothing_is_hung_up_on() -> None:
    """
    Before a sentence, and in the middle of one.
    """
    head = (
        b'{"type": "audio-start", "data": {"rate": 16000, "width": 2, "channels": 1}}'
    )
    with speaking(upload_timeout_s=0.3) as served:
        for sent in (b"", head + b"\n"):
            address = ("127.0.0.1", served.port)
            with socket.create_connection(address, timeout=30) as connection:
                connection.sendall(sent)
                assert connection.recv(4096) == b""
        served.assert_all_is_let_go()


# The end ------------------------------------------------------------------------------


def test_the_end_of_the_server_ends_conversations_in_order() -> None:
    """
    An answer that is under way is given; who still speaks is told; nobody new is heard.
    """
    (spec,) = offered(TINY)
    raw = pcm(decode_audio(clip("en-harbour-long")))

    async def talk(served: Served) -> tuple[str, Error]:
        loop = asyncio.get_running_loop()
        async with served.client() as first, served.client() as second:
            await second.write_event(AudioStart(16_000, 2, 1).event())
            await say(first, raw)
            stats = served.cache.stats
            await loop.run_in_executor(
                None, wait_until, lambda: stats().leases == 1, "it is answered"
            )
            closing = asyncio.wrap_future(
                asyncio.run_coroutine_threadsafe(
                    served.service.drain(), served.service._loop
                )
            )
            error = await refused(second)
            text = (await heard(first)).text
            await closing
            with pytest.raises(OSError, match=r"refused|Connect"):
                async with served.client():
                    pass
            return text, error

    with speaking(spec) as served:
        text, error = asyncio.run(talk(served))
        assert error.code == "shutting_down"
        assert len(text) > 100
        assert httpx.get(f"{served.url}/healthz").status_code == 200
    assert not served.service.endpoint._sessions


def test_what_is_not_answered_in_time_is_told_so() -> None:
    """
    The server ends all the same.
    """
    (spec,) = offered(TINY)
    raw = pcm(decode_audio(clip("en-harbour-long")))

    async def talk(served: Served) -> Error:
        loop = asyncio.get_running_loop()
        async with served.client() as client:
            await say(client, raw)
            stats = served.cache.stats
            await loop.run_in_executor(
                None, wait_until, lambda: stats().leases == 1, "it is answered"
            )
            asyncio.run_coroutine_threadsafe(
                served.service.drain(), served.service._loop
            )
            event = await read(client)
            while not Error.is_type(event.type):
                event = await read(client)
            return Error.from_event(event)

    with speaking(spec, drain_s=0.0) as served:
        assert asyncio.run(talk(served)).code == "shutting_down"
        served.assert_all_is_let_go()


def test_an_address_that_is_taken_ends_the_start() -> None:
    """
    Rather than a server without ears.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = ServerOptions(
            models=(HELLO,), device="cpu", wyoming=("127.0.0.1", port)
        )

        async def start(cache: ModelCache) -> None:
            app = create_app(options, cache)
            async with app.router.lifespan_context(app):
                pass

        with ModelCache() as cache, pytest.raises(OSError, match="in use"):
            asyncio.run(start(cache))


def test_the_command_speaks_it_and_ends_in_order(tmp_path: Path) -> None:
    """
    Beside HTTP, whose keys it does not know: that is told.
    """
    keys = tmp_path / "keys"
    keys.write_text("secret\n", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = (f"m={HELLO.model}", "--device", "cpu", "--key-file", str(keys))
    with command(*arguments, "--wyoming", f"127.0.0.1:{port}") as (process, client):
        assert client.get("/v1/models").status_code == 401
        text = asyncio.run(home_assistant(port, "en", HELLO_AUDIO))
        assert text == "micro says hello"
        with socket.create_connection(("127.0.0.1", port), timeout=30) as idle:
            process.terminate()
            told = b"".join(iter(lambda: idle.recv(4096), b""))
            assert b"shutting_down" in told
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0, log
    assert f"Wyoming on tcp://127.0.0.1:{port}" in log
    assert "warning: Wyoming knows no keys" in log
    assert "Traceback" not in log
    assert "leaked" not in log


@pytest.mark.parametrize(
    "text", ["10300", "localhost", ":10300", "localhost:99999", "h:x"]
)
def test_an_address_that_is_none_is_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    In one line.
    """
    assert main(["serve", "m=x", "--wyoming", text]) == 2
    assert "--wyoming" in capsys.readouterr().err
