"""
The names that clients have for models, without a server.
"""

from __future__ import annotations

import pytest

from whispercache.engine.naming import parse_spec
from whispercache.keys import ALIASES, MODELS, OTHER_NAMES
from whispercache.server import ServerOptions
from whispercache.server.names import is_openais, size_of
from whispercache.server.offers import Offers


@pytest.mark.parametrize(
    "name",
    [
        *("whisper-1", "whisper", "Whisper-1", "openai/whisper-1", "whisper-2"),
        *("gpt-transcribe", "gpt-4o-transcribe", "gpt-4o-mini-transcribe"),
        *("gpt-4o-mini-transcribe-2025-12-15", "gpt-4o-transcribe-diarize"),
        *("openai/gpt-4o-transcribe", "gpt-5.5-transcribe", "gpt-4o-transcribe-latest"),
    ],
)
def test_openais_names_are_known_with_those_to_come(name: str) -> None:
    """
    As clients have them for defaults; none of them is a size.
    """
    assert is_openais(name)
    assert size_of(name) is None


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "gpt-4o",
            "gpt-transcriber",
            "gpt-4o-audio-preview",
            "tts-1",
            "whisper-x",
        ),
        *("acme/whisper-1", "whisper-1/x", "my-gpt-transcribe", "whisper-1 "),
    ],
)
def test_other_models_are_not_openais(name: str) -> None:
    """
    They are found on the list, or nowhere.
    """
    assert not is_openais(name)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("small", "small"),
        ("Whisper-Small", "small"),
        ("openai/whisper-small", "small"),
        ("openai/whisper-small.en", "small.en"),
        ("Systran/faster-whisper-small", "small"),
        ("guillaumekln/faster-whisper-small", "small"),
        ("faster-whisper-small", "small"),
        ("Xenova/whisper-small", "small"),
        ("mlx-community/whisper-small-mlx", "small"),
        ("mlx-community/whisper-large-v3-mlx-4bit", "large-v3"),
        ("ggml-small.bin", "small"),
        ("ggml-base.en-q5_1.bin", "base.en"),
        ("ggml-large-v3-turbo-q5_0", "large-v3-turbo"),
        ("whisper-large-v3-turbo", "large-v3-turbo"),
        ("large_v3", "large-v3"),
        ("turbo", "large-v3-turbo"),
        ("deepdml/faster-whisper-large-v3-turbo-ct2", "large-v3-turbo"),
        ("mobiuslabsgmbh/faster-whisper-large-v3-turbo", "large-v3-turbo"),
        ("distil-whisper/distil-large-v3", "distil-large-v3"),
        ("distil-whisper/distil-large-v3-ct2", "distil-large-v3"),
        ("distil-whisper-large-v3-en", "distil-large-v3"),
        ("Systran/faster-distil-whisper-medium.en", "distil-medium.en"),
        ("openai/whisper-large", "large-v1"),
    ],
)
def test_sizes_go_by_all_their_spellings(name: str, size: str) -> None:
    """
    Of whoever publishes them, in whatever format.
    """
    assert size_of(name) == size


def test_every_name_of_the_library_is_one_here() -> None:
    """
    And means the same.
    """
    assert {size_of(name) for name in MODELS} == set(MODELS)
    for names in (ALIASES, OTHER_NAMES):
        for name, size in names.items():
            assert size_of(name) == size, name


@pytest.mark.parametrize(
    "name",
    [
        *("acme/whisper-small", "openai/whisper-small-de", "whisper-small-de", "smal"),
        *(
            "/small",
            "./small",
            "../small",
            "/models/small",
            "small/",
            "ggml-",
            "",
            "-en",
        ),
        *("openai/acme/whisper-small", "whisper-base-en", "my-whisper-base"),
    ],
)
def test_models_of_others_are_no_sizes(name: str) -> None:
    """
    A fine-tune may be called anything; and no path is a name.
    """
    assert size_of(name) is None


def found(name: str, *specs: str, strict: bool = False, default: str = "") -> str:
    """
    The offer that a name means; empty if none.
    """
    offers = Offers(
        [parse_spec(text) for text in specs], "cpu", default or None, strict=strict
    )
    offer = offers.find(name)
    return offer.name if offer else ""


def test_a_type_is_one_in_any_case() -> None:
    """
    As the size before it.
    """
    assert found("Base:INT8", "base", "base:int8") == "base:int8"


def test_an_exact_offer_comes_first() -> None:
    """
    Also where it has the name of something else.
    """
    assert found("whisper-1", "base", "whisper-1=tiny") == "whisper-1"
    assert found("whisper-small", "small", "whisper-small=tiny") == "whisper-small"
    assert found("small", "mine=small", "small=tiny") == "small"
    # And so do all spellings of its name.
    assert found("openai/whisper-base", "base:int8", "base") == "base:int8"
    assert found("openai/whisper-base:int8", "base", "base:int8") == "base:int8"


def test_openais_names_are_the_default() -> None:
    """
    The first one, unless another was said.
    """
    for name in ("whisper-1", "gpt-transcribe", "gpt-4o-mini-transcribe"):
        assert found(name, "base", "small:int8") == "base"
        assert found(name, "base", "small:int8", default="small:int8") == "small:int8"


def test_strict_names_are_those_of_the_list() -> None:
    """
    Nothing else, not even the usual ones.
    """
    for name in ("whisper-1", "whisper-base", "openai/whisper-base", "tiny"):
        assert not found(name, "base", "mine=tiny", strict=True)
    assert found("base", "base", strict=True) == "base"


def test_a_default_is_on_the_list() -> None:
    """
    Or the server does not start.
    """
    assert ServerOptions(models=("base", "tiny"), default="tiny").default == "tiny"
    with pytest.raises(ValueError, match="the default whisper-1 is not among"):
        ServerOptions(models=("base", "tiny"), default="whisper-1")
