#!/bin/sh
# whisper-normalizer 0.1.15, a copy of the normalizer with which Whisper's error rates are
# measured: the basic one, for all languages but English, cuts Turkish words in two. The small
# letter of "İ" is by Python's rules an "i" and a combining dot, and combining marks become
# spaces. A word counts as two, and never equals the same word in small letters. Only with
# remove_diacritics=True, which loses other letters, it stays whole.
#
# Seen: "İstanbul" is "i stanbul", "istanbul" stays.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet whisper-normalizer==0.1.15
"$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata

from whisper_normalizer.basic import BasicTextNormalizer

print("whisper-normalizer", importlib.metadata.version("whisper-normalizer"))
normalize, bare = BasicTextNormalizer(), BasicTextNormalizer(remove_diacritics=True)
made = [normalize(word).split() for word in ("İstanbul", "istanbul")]
print("by default:", *made, "without diacritics:", bare("İstanbul").split())
assert made == [["i", "stanbul"], ["istanbul"]], "words are left whole now"
assert bare("İstanbul").split() == ["istanbul"], "the other mode cuts them as well"
PYTHON
