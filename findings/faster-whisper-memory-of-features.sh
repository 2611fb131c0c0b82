#!/bin/sh
# faster-whisper 1.2.1: the features of a whole recording are computed at once, before the first
# segment, though the model looks at windows of 30 s. All its frames and their spectrum
# are held at that time, so that host memory grows with the length: some 3 GB for each hour,
# whatever the model and the device.
#
# Seen above the samples: 58 MB of features and 1.5 GB at the peak for half an hour; for a tenth
# of that a tenth.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet faster-whisper==1.2.1 ctranslate2==4.8.5 "av==18.1.0"
for minutes in 3 30; do
    "$work/venv/bin/python" - "$minutes" <<'PYTHON'
import importlib.metadata
import resource
import sys

import numpy as np
from faster_whisper.feature_extractor import FeatureExtractor


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


minutes = int(sys.argv[1])
extract = FeatureExtractor()
extract(np.zeros(16_000, np.float32))
audio = np.full(minutes * 60 * 16_000, 0.1, np.float32)
before = peak_mb()
features = extract(audio)
above = peak_mb() - before
print(
    f"faster-whisper {importlib.metadata.version('faster-whisper')}, {minutes} min:",
    f"{features.nbytes / 1e6:.0f} MB of features, {above:.0f} MB at the peak",
)
assert above > 30 * minutes, "it takes less memory now"
assert above > 15 * features.nbytes / 1e6, "it takes less memory now"
PYTHON
done
