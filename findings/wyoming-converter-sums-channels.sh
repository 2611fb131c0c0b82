#!/bin/sh
# wyoming 1.10: its AudioChunkConverter, which satellites and servers of Home Assistant use,
# makes mono of stereo by adding the channels, not by their mean. Speech that is in both, as
# from most microphones with two, is twice as loud, and clipped as soon as it is above half of
# the scale.
#
# Seen: 20000 in both channels becomes 32767, where the mean is 20000.
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
stereo = np.full((1600, 2), 20_000, np.int16)
chunk = AudioChunk(rate=16_000, width=2, channels=2, audio=stereo.tobytes())
mono = AudioChunkConverter(rate=16_000, width=2, channels=1).convert(chunk)
samples = np.frombuffer(mono.audio, np.int16)
print("both channels 20000, mono:", sorted(set(samples.tolist())))
assert (samples == 32_767).all(), "the channels are no longer added"
PYTHON
