"""
The detection of speech in audio, in blocks.

faster-whisper's voice activity detection (VAD) takes a few hundred MiB beside long
audio. Here its model sees a block at a time, and what it found is not copied again: the
result is the same to the last bit.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Protocol

from whispercache.engine.rebound import rebound

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    Samples = NDArray[np.float32]
    Clip = Mapping[str, int]

# Windows of 32 ms that the model looks at in one go. Source: onnxruntime 1.32, 12
# minutes of speech: resident memory grew by 14 MiB in blocks of 500 windows, by 26 in
# 1000, by 182 in 10000 (faster-whisper's), in the same time and with the same result to
# the last bit.
BLOCK_WINDOWS = 500

_RATE_HZ = 16_000
_INPUTS = {"input", "h", "c"}

# Building the model twice at its first use would do no harm but take twice as long.
_building = threading.Lock()


class _Session(Protocol):
    def run(
        self, outputs: None, inputs: Mapping[str, NDArray[np.float32]]
    ) -> Sequence[NDArray[np.float32]]: ...


def bounded_names(
    get_speech_timestamps: Callable[..., object],
    get_vad_model: Callable[[], object],
    collect_chunks: Callable[..., object],
    vad_options: Callable[..., object],
) -> dict[str, Callable[..., object]]:
    """
    Returns replacements, by name, of faster-whisper's functions whose memory grows with
    the audio; see `rebound.swapped`.
    """
    bounded_model = partial(_bounded_model, get_vad_model)

    def timestamps(audio: Samples, options: object = None, **more: object) -> object:
        # As a mapping, ``detect_language`` passes them on as they are.
        if isinstance(options, dict):
            options = vad_options(**options)
        in_blocks = rebound(get_speech_timestamps, get_vad_model=bounded_model)
        return in_blocks(audio, options, **more)

    # Copies what it has so far for no chunk.
    def bounded_chunks(
        audio: Samples,
        chunks: Sequence[Clip],
        sampling_rate: int = _RATE_HZ,
        max_duration: float = float("inf"),
    ) -> object:
        if not chunks or max_duration != float("inf"):
            return collect_chunks(audio, chunks, sampling_rate, max_duration)
        # Views, which the caller joins.
        parts = [audio[each["start"] : each["end"]] for each in chunks]
        n_samples = sum(map(len, parts))
        whole = {
            "offset": 0.0,
            "duration": n_samples / sampling_rate,
            "segments": list(chunks),
        }
        return parts, [whole]

    return {"get_speech_timestamps": timestamps, "collect_chunks": bounded_chunks}


def _bounded_model(get_vad_model: Callable[[], object]) -> object:
    with _building:
        model = get_vad_model()
    session = getattr(model, "session", None)
    if session is None or {each.name for each in session.get_inputs()} != _INPUTS:
        return model  # of a version that is not known here
    return InBlocks(session)


class InBlocks:
    """
    The model of Silero VAD, version 6 as faster-whisper has it, block by block.

    Source: faster_whisper/vad.py, ``SileroVADModel.__call__``, 1.2.1.
    """

    def __init__(self, session: _Session) -> None:
        self._session = session

    def __call__(
        self, audio: Samples, num_samples: int = 512, context_size_samples: int = 64
    ) -> Samples:
        """
        Returns the probability of speech in each window: float32 (windows, 1). The end
        of *audio*, float32 (windows × *num_samples*,), is silenced.
        """
        import numpy as np

        # As faster-whisper does, whose result this must equal.
        audio[-context_size_samples:] = 0
        windows = audio.reshape(-1, num_samples)
        state = np.zeros((1, 1, 128), np.float32)
        inputs = {"h": state, "c": state}
        width = context_size_samples + num_samples
        block = np.empty((min(BLOCK_WINDOWS, len(windows)), width), np.float32)
        context = np.zeros(context_size_samples, np.float32)
        found = []
        for first in range(0, len(windows), BLOCK_WINDOWS):
            seen = windows[first : first + BLOCK_WINDOWS]
            now = block[: len(seen)]
            now[:, context_size_samples:] = seen
            now[0, :context_size_samples] = context
            now[1:, :context_size_samples] = seen[:-1, -context_size_samples:]
            context = seen[-1, -context_size_samples:]
            output, inputs["h"], inputs["c"] = self._session.run(
                None, {"input": now, **inputs}
            )
            found.append(output)
        return np.concatenate(found)
