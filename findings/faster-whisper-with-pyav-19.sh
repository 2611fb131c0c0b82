#!/bin/sh
# faster-whisper 1.2.1 with PyAV 19, which its requirement (av>=11) takes: no file can be
# read. `decode_audio` passes `metadata_errors` to `av.open`, which has no such argument any
# more, so that each file raises a TypeError. Needs Python 3.12, as PyAV 19 does.
#
# Seen: TypeError from PyAV 19.0, the samples from PyAV 18.1.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in python3.14 python3.13 python3.12 none; do
    "$python" -c "" 2> /dev/null && break
done
test "$python" != none || { echo "this needs Python 3.12 or later" >&2; exit 2; }
for version in 18.1.0 19.0.0; do
    "$python" -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet faster-whisper==1.2.1 "av==$version"
    "$work/$version/bin/python" - "$(dirname "$0")/../examples/clips/en-bread.flac" <<'PYTHON'
import sys

import av
from faster_whisper import decode_audio

try:
    seen = len(decode_audio(sys.argv[1])) > 16_000
except TypeError as error:
    seen = "metadata_errors" not in str(error)
print("PyAV", av.__version__, "reads the file:", seen)
assert seen == (int(av.__version__.split(".")[0]) < 19), "this has changed"
PYTHON
done
