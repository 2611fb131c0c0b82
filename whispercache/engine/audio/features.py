"""
The features of audio: its log-Mel spectrogram, which is the input of a model.

faster-whisper computes it for a whole file at once, which takes 0.9 MiB of memory for
each second of audio. Long audio is processed in blocks here, so that only the result, a
thirtieth of that, grows with it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from faster_whisper.feature_extractor import FeatureExtractor
    from numpy.typing import NDArray
    from typing_extensions import Self

# Seconds of audio that are a block, and above which audio is taken in blocks.
BLOCK_S = 30
LONG_S = 60
# Powers of ten that the spectrogram spans; what is fainter is cut off. Source:
# openai/whisper, audio.py, ``log_mel_spectrogram``; with the two lines after it.
_RANGE = 8.0


class _Extractor(Protocol):
    """
    The part of faster-whisper's feature extractor that is used here.
    """

    n_fft: int
    hop_length: int
    sampling_rate: int
    mel_filters: NDArray[np.float32]

    def stft(
        self,
        samples: NDArray[np.float32],
        n_fft: int,
        hop_length: int,
        *,
        window: NDArray[np.float32],
        center: bool,
        return_complex: bool,
    ) -> NDArray[np.complexfloating]: ...


class InBlocks:
    """
    A feature extractor that processes long audio in blocks, and else is the one of
    faster-whisper: a base of classes over that.

    The length of a window is kept for the next call: views of a model have copies
    (``copy.copy``) with a length of their own.
    """

    def __copy__(self) -> Self:
        # copy.copy() does the same in five calls, for each transcription.
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __reduce_ex__(self, _protocol: object) -> tuple[object, ...]:
        # Programs find faster-whisper's class under the name of this one.
        order = type(self).__mro__
        return _restored, (order[order.index(InBlocks) + 1],), vars(self)

    def __call__(
        self,
        waveform: NDArray[np.float32],
        padding: int = 160,
        chunk_length: int | None = None,
    ) -> NDArray[np.float32]:
        """
        Returns the log-Mel spectrogram of *waveform*, float32 (samples,), with
        *padding* samples of silence: float32 (mels, frames), 100 frames a second; that
        of faster-whisper, up to the rounding of float32. *chunk_length* is in seconds.
        """
        extractor: Any = self
        # Short audio costs little, and is the common case.
        if len(waveform) <= LONG_S * extractor.sampling_rate:
            plain: Callable[..., NDArray[np.float32]]
            plain = super().__call__  # type: ignore[misc]
            return plain(waveform, padding=padding, chunk_length=chunk_length)
        # As faster-whisper does it, for the next call.
        if chunk_length is not None:
            extractor.n_samples = chunk_length * extractor.sampling_rate
            extractor.nb_max_frames = extractor.n_samples // extractor.hop_length
        return _log_mel(extractor, waveform, padding)


@functools.cache
def in_blocks(base: type[FeatureExtractor]) -> type[FeatureExtractor]:
    """
    Returns the class over faster-whisper's *base* that processes long audio in blocks.
    """
    names = ("__doc__", "__module__", "__qualname__")
    attributes = {name: getattr(base, name) for name in names}
    made = type(base.__name__, (InBlocks, base), attributes)
    return cast("type[FeatureExtractor]", made)


def _restored(base: Any) -> object:  # noqa: ANN401 - a class
    return object.__new__(in_blocks(base))


def _log_mel(
    extractor: _Extractor, waveform: NDArray[np.float32], padding: int
) -> NDArray[np.float32]:
    import numpy as np

    hop = extractor.hop_length
    n_frames = (len(waveform) + padding) // hop
    block = BLOCK_S * extractor.sampling_rate // hop
    mels = len(extractor.mel_filters)
    # The only array that is as long as the audio.
    spectrogram = np.empty((mels, n_frames), np.float32)
    window = np.hanning(extractor.n_fft + 1)[:-1].astype(np.float32)
    for first in range(0, n_frames, block):
        last = min(first + block, n_frames)
        samples = _around(waveform, padding, first * hop, last * hop, extractor)
        stft = extractor.stft(
            samples,
            extractor.n_fft,
            hop,
            window=window,
            center=False,
            return_complex=True,
        ).astype(np.complex64)
        power = extractor.mel_filters @ (np.abs(stft) ** 2)
        np.clip(power, 1e-10, None, out=power)
        np.log10(power, out=spectrogram[:, first:last])
    # Relative to the loudest frame of all blocks, hence after the loop.
    np.maximum(spectrogram, spectrogram.max() - _RANGE, out=spectrogram)
    # In place: a copy would double the peak.
    spectrogram += 4.0
    spectrogram /= 4.0
    return spectrogram


def _around(
    waveform: NDArray[np.float32],
    padding: int,
    start: int,
    stop: int,
    extractor: _Extractor,
) -> NDArray[np.float32]:
    """
    Returns the samples of the frames from *start* to *stop*; each frame is centred on
    its sample. Before its beginning and after its end, audio is its mirror image.
    """
    import numpy as np

    half = extractor.n_fft // 2
    end = len(waveform) + padding - 1
    places = np.arange(start - half, stop - extractor.hop_length + half)
    places = np.abs(places)
    places = np.where(places > end, 2 * end - places, places)
    samples = np.zeros(len(places), np.float32)
    is_heard = places < len(waveform)
    samples[is_heard] = waveform[places[is_heard]]
    return samples
