#!/bin/sh
# whisper-normalizer 0.1.15, a copy of the normalizer with which Whisper's error rates are
# measured: its English rules for numbers change plain words, so that errors are counted where
# there are none, and real ones are not seen. "Point" before a small number is dropped, "Oh" is
# a nought, a decimal that begins with one is left half in words, and numbers of two sentences
# become one.
#
# Seen: "At this point one left" is "at this one left"; "Oh my God" is "0 my god"; "one point
# five" is "one.5" and "two point five" 2.5; "I saw one. Two left." is "i saw 12 left".
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet whisper-normalizer==0.1.15
"$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata

from whisper_normalizer.english import EnglishTextNormalizer

SEEN = {
    "At this point one left": "at this one left",
    "Oh my God": "0 my god",
    "one point five": "one.5",
    "two point five": "2.5",
    "I saw one. Two left.": "i saw 12 left",
    "one second": "12nd",
}
print("whisper-normalizer", importlib.metadata.version("whisper-normalizer"))
normalize = EnglishTextNormalizer()
made = {text: normalize(text).strip() for text in SEEN}
print(made)
assert made == SEEN, "the rules have changed"
assert normalize("At this point one left") == normalize("At this one left")
PYTHON
