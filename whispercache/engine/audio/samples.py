"""
The samples of whatever a caller gives as audio.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import TYPE_CHECKING, Any, cast

from whispercache.engine.rebound import rebound
from whispercache.errors import AudioError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from typing import BinaryIO

    import numpy as np
    from numpy.typing import NDArray

    from whispercache.engine.api import AudioInput

_log = logging.getLogger("whispercache")

_RATE_HZ = 16_000


def samples_of(audio: AudioInput) -> NDArray[np.float32]:
    """
    Returns the samples of a file, a binary stream, or an array that has them already:
    float32 (samples,), mono, 16 kHz.

    Blocks: for decoding. Damage is logged.

    Raises:
        AudioError: it cannot be decoded, or the array holds no samples.
        OSError: it cannot be opened.
    """
    # There is no array without it, and to import it again costs each call more.
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(audio, numpy.ndarray):
        array: Any = audio
        # The usual case first.
        if array.ndim == 1 and array.dtype.char == "f" and array.dtype.isnative:
            samples: NDArray[np.float32] = array
            return samples
        return _converted(array)
    # Imported late: PyAV takes longer than all else here.
    from .decoder import name_of, read_audio

    heard = read_audio(cast("str | os.PathLike[str] | BinaryIO", audio))
    if heard.damage is not None:
        _log.warning("%s is damaged: %s", name_of(audio), heard.damage)
    return heard.samples


def _converted(array: NDArray[Any]) -> NDArray[np.float32]:
    kind = array.dtype.kind if array.ndim == 1 else ""
    if kind == "f":
        return array.astype("float32", copy=False)
    # What microphones and the module wave have. Other integers are seldom samples.
    if kind == "i" and array.dtype.itemsize == 2:  # noqa: PLR2004
        samples: NDArray[np.float32] = array.astype("float32")
        samples /= 32768
        return samples
    reason = "samples are floats in one dimension"
    if kind == "i":
        full = 2 ** (8 * array.dtype.itemsize - 1)
        reason = f"samples are floats in ±1: take audio.astype('float32') / {full}"
    raise AudioError(f"an array of {array.dtype}, shape {array.shape}", reason)


def in_place_of(plain: Callable[..., object]) -> Callable[..., object]:
    """
    Returns what is called for *plain*, which is faster-whisper's ``decode_audio``: the
    same of `samples_of`, since faster-whisper 1.2.1 cannot open a file with PyAV 19. It
    still decodes to other rates, and to stereo.
    """

    @functools.wraps(plain)
    def decode_audio(
        input_file: AudioInput, sampling_rate: int = _RATE_HZ, **options: object
    ) -> object:
        if sampling_rate == _RATE_HZ and not any(options.values()):
            return samples_of(input_file)
        return _tolerant(plain)(input_file, sampling_rate, **options)

    return decode_audio


def _tolerant(plain: Callable[..., object]) -> Callable[..., object]:
    # PyAV 19 has no such option, and behaves as if it were given.
    from .decoder import OPENING

    return plain if "metadata_errors" in OPENING else rebound(plain, av=_PyAV())


class _PyAV:
    """
    PyAV, whose ``open`` passes over an option that it no longer has.
    """

    def __getattr__(self, name: str) -> object:
        import av

        return getattr(av, name)

    def open(self, *args: Any, metadata_errors: str = "", **options: Any) -> object:  # noqa: ANN401 - as there
        import av

        del metadata_errors
        return av.open(*args, **options)
