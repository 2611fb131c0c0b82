#!/bin/sh
# CTranslate2 4.8: a mapping of compute types by device is looked up by the word that was
# given for the device, not by the device that "auto" stands for. So device="auto" with
# {"cpu": "int8", "cuda": "float16"} on a machine without a GPU computes in the type of the
# file, without a warning; the key "auto" is what takes effect there.
#
# Seen: device "cpu" in both; float32 with the key "cpu", int8_float32 with the key "auto".
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet ctranslate2==4.8.1 numpy
"$work/venv/bin/python" - "$work/model" <<'PYTHON'
import os
import sys

import ctranslate2
import numpy as np

WIDTH, INNER, WORDS = 8, 16, ["<unk>", "<s>", "</s>", "a"]
dice = np.random.default_rng(0)


def fill(layer, width, out):
    layer.weight = dice.normal(size=(out, width)).astype(np.float32)
    layer.bias = np.zeros(out, np.float32)


def norm(layer):
    layer.gamma, layer.beta = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)


spec = ctranslate2.specs.TransformerSpec.from_config(1, 2)
for part in (spec.encoder, spec.decoder):
    tables = part.embeddings if isinstance(part.embeddings, list) else [part.embeddings]
    for table in tables:
        table.weight = dice.normal(size=(len(WORDS), WIDTH)).astype(np.float32)
    norm(part.layer_norm)
    for layer in part.layer:
        attentions = [(layer.self_attention, (3 * WIDTH, WIDTH))]
        if part is spec.decoder:
            attentions.append((layer.attention, (WIDTH, 2 * WIDTH, WIDTH)))
        for attention, sizes in attentions:
            norm(attention.layer_norm)
            for linear, size in zip(attention.linear, sizes):
                fill(linear, WIDTH, size)
        norm(layer.ffn.layer_norm)
        fill(layer.ffn.linear_0, WIDTH, INNER)
        fill(layer.ffn.linear_1, INNER, WIDTH)
fill(spec.decoder.projection, WIDTH, len(WORDS))
spec.register_source_vocabulary(WORDS)
spec.register_target_vocabulary(WORDS)
os.mkdir(sys.argv[1])
spec.validate()
spec.save(sys.argv[1])

used = {}
for key in ("cpu", "auto"):
    types = {key: "int8", "cuda": "float16"}
    model = ctranslate2.Translator(sys.argv[1], device="auto", compute_type=types)
    used[key] = model.device, model.compute_type
print("ctranslate2", ctranslate2.__version__, used)
if used["cpu"][0] != "cpu":
    raise SystemExit("this needs a machine without a GPU that CTranslate2 can use")
assert used["cpu"][1] == "float32", "the type for the CPU takes effect now"
assert used["auto"][1].startswith("int8"), "the key 'auto' takes no effect any more"
PYTHON
