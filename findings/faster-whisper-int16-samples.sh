#!/bin/sh
# faster-whisper 1.2: samples as 16-bit integers, which most sources of audio give, are
# accepted without a word and taken as they are, not scaled to -1..1. The features then lie
# outside of the range on which Whisper was trained, and what is heard is nonsense.
#
# Seen: the largest feature of half a second of a tone is 1.4 as floats, and 3.7 as int16.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet faster-whisper==1.2.1 'av<19'
"$work/venv/bin/python" - <<'PYTHON'
import faster_whisper
import numpy as np
from faster_whisper.feature_extractor import FeatureExtractor

seconds = np.arange(8000) / 16000
floats = (0.5 * np.sin(2 * np.pi * 440 * seconds)).astype(np.float32)
integers = (floats * 32767).astype(np.int16)
extract = FeatureExtractor()
largest = [float(extract(samples).max()) for samples in (floats, integers)]
print("faster-whisper", faster_whisper.__version__, "largest feature:", largest)
assert largest[0] < 2, "the features of floats are not what they were"
assert largest[1] - largest[0] > 1, "16-bit samples are scaled now"
PYTHON
