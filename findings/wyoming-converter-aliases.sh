#!/bin/sh
# wyoming 1.10: its AudioChunkConverter changes the rate without a filter, so that all above
# half of the new rate is folded into what speech recognition hears. 48 kHz is what sound
# cards give, and 16 kHz what Whisper takes: hiss above 8 kHz becomes noise below it.
#
# Seen: a tone of 10 kHz at 48 kHz comes out as one of 6 kHz at 16 kHz, as loud as it was; a
# resampler leaves nothing of it.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet wyoming==1.10.2 numpy
"$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata

import numpy as np
from wyoming.audio import AudioChunk, AudioChunkConverter

print("wyoming", importlib.metadata.version("wyoming"))
seconds = np.arange(48_000) / 48_000
tone = (10_000 * np.sin(2 * np.pi * 10_000 * seconds)).astype(np.int16)
chunk = AudioChunk(rate=48_000, width=2, channels=1, audio=tone.tobytes())
made = AudioChunkConverter(rate=16_000, width=2, channels=1).convert(chunk)
heard = np.frombuffer(made.audio, np.int16).astype(float)
spectrum = np.abs(np.fft.rfft(heard))
loudest_hz = np.argmax(spectrum) * 16_000 / len(heard)
ratio = np.sqrt((heard**2).mean() / (tone.astype(float) ** 2).mean())
print(f"10 kHz at 48 kHz, heard at 16 kHz: {loudest_hz:.0f} Hz, {ratio:.2f} as loud")
assert abs(loudest_hz - 6_000) < 20, "the tone is somewhere else now"
assert ratio > 0.9, "there is a filter now"
PYTHON
