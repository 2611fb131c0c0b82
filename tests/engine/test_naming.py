"""
The names of models on command lines.
"""

from __future__ import annotations

import pytest

from whispercache.engine.naming import ModelSpec, parse_spec, short_name
from whispercache.keys import ModelKey


@pytest.mark.parametrize(
    ("text", "name", "model", "compute_type"),
    [
        ("base", "base", "base", "default"),
        (" base ", "base", "base", "default"),
        ("base:int8", "base:int8", "base", "int8"),
        ("fast=base:int8", "fast", "base", "int8"),
        ("fast = base:int8", "fast", "base", "int8"),
        ("whisper-1=large-v3", "whisper-1", "large-v3", "default"),
        ("/models/mine", "mine", "/models/mine", "default"),
        ("/models/mine/:int8", "mine:int8", "/models/mine/", "int8"),
        ("./mine", "mine", "./mine", "default"),
        ("m=/a=b/c:int8", "m", "/a=b/c", "int8"),
        ("/a=b/c", "c", "/a=b/c", "default"),
        ("C:\\models\\m", "C:\\models\\m", "C:\\models\\m", "default"),
        ("x=C:\\models\\m:float32", "x", "C:\\models\\m", "float32"),
        ("org/name:float16", "org/name:float16", "org/name", "float16"),
    ],
)
def test_a_spec_is_a_name_a_model_and_a_type(
    text: str, name: str, model: str, compute_type: str
) -> None:
    """
    Colons and equals signs in paths are part of the path.
    """
    assert parse_spec(text) == ModelSpec(name, model, compute_type)


@pytest.mark.parametrize(
    "text", ["", " ", "base:in8", "=x", "a=", ":int8", "a=:int8", "= x"]
)
def test_a_spec_with_a_part_missing_or_unknown_is_refused(text: str) -> None:
    """
    In one line that quotes it.
    """
    with pytest.raises(ValueError, match=f"^{text!r}.*") as caught:
        parse_spec(text)
    assert "\n" not in str(caught.value)


def test_a_key_has_a_short_name_without_its_path() -> None:
    """
    A directory's last part says enough, and the rest is nobody's business.
    """
    key = ModelKey("/home/me/models/mine", "cpu", "int8_float32")
    assert short_name(key) == "mine:int8_float32"
