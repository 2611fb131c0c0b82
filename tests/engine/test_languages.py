"""
The names of languages, and their refusal before a model is loaded.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from caches import cache_of
from faster_whisper.tokenizer import _LANGUAGE_CODES
from micro import build_micro
from real import SILENCE, clip, micro, micro_copy, model_of, packaged, plain_model
from starlette.testclient import TestClient

from whispercache import ModelCache, compare
from whispercache.cli.main import main
from whispercache.engine.calls.languages import (
    _THREE_LETTERS,
    LANGUAGES,
    _by_name,
    check_language,
    knowledge_of,
    language_code,
)
from whispercache.engine.files import ModelFiles, files_in
from whispercache.engine.naming import ModelSpec
from whispercache.engine.sizes.architecture import ARCHITECTURES
from whispercache.server import ServerOptions, create_app

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import MakeCache

    from whispercache.server.offers import Offer
    from whispercache.testing import FakeLoader

BREAD = clip("en-bread")

cache = cache_of(max_models=1, variants=False)


# Names --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (None, None),
        ("", None),
        ("auto", None),
        (" Auto ", None),
        ("null", None),
        ("None", None),
        ("und", None),
        ("de", "de"),
        (" DE ", "de"),
        ("German", "de"),
        ("haitian creole", "ht"),
        ("Haitian_Creole", "ht"),
        ("castilian", "es"),
        ("Mandarin", "zh"),
        ("en-US", "en"),
        ("pt-BR", "pt"),
        ("pt_BR", "pt"),
        ("zh-CN", "zh"),
        ("zh_CN", "zh"),
        ("zh-Hant", "zh"),
        ("zh-Hant-HK", "zh"),
        ("zh-yue", "yue"),
        ("yue-Hant-HK", "yue"),
        ("cmn-Hans-CN", "zh"),
        ("sr-Latn-RS", "sr"),
        ("es-419", "es"),
        ("de_DE.UTF-8", "de"),
        ("ca_ES@valencia", "ca"),
        ("nb-NO", "no"),
        ("nn-NO", "nn"),
        ("fil-PH", "tl"),
        ("iw", "he"),
        ("jv-ID", "jw"),
        ("haw", "haw"),
        ("haw-US", "haw"),
        ("eng", "en"),
        ("ENG-GB", "en"),
        ("deu", "de"),
        ("ger", "de"),
        ("zho", "zh"),
        ("fra-CA", "fr"),
        ("nob", "no"),
        ("jav", "jw"),
    ],
)
def test_languages_go_by_code_name_and_locale(
    said: str | None, code: str | None
) -> None:
    """
    As clients, desktops and speech services write them.
    """
    assert language_code(said) == code


@pytest.mark.parametrize(
    "said",
    [
        *("tlh", "klingon", "en-", "-en", "en--US", "english-US", "e", "x-en", "en/US"),
        *("C", "en US", "deutsch", "de-toolongasubtag", "xx-YY", "\0", "a" * 10_000),
        # Several languages, and none of Whisper's.
        *("hbs", "sgn", "mul", "tlh-US"),
    ],
)
def test_what_is_no_language_is_refused(said: str) -> None:
    """
    With an example of what is, and no more of it than fits a line.
    """
    with pytest.raises(ValueError, match="none that Whisper knows; give a code") as no:
        language_code(said)
    assert len(str(no.value)) < 160


@pytest.mark.parametrize("said", [5, True, b"de", ["de"]])
def test_what_is_no_text_is_refused(said: Any) -> None:
    """
    By its type.
    """
    with pytest.raises(TypeError, match="language must be a code such as 'en', not"):
        language_code(said)


def test_every_name_and_code_of_whisper_s_is_its_own() -> None:
    """
    None of the aliases takes the place of another language.
    """
    assert set(LANGUAGES) == set(_LANGUAGE_CODES)
    for code, name in LANGUAGES.items():
        assert language_code(code) == language_code(name) == code
        assert language_code(f"{code}-XX") == code


def test_every_language_has_a_code_of_three_letters() -> None:
    """
    Which is that of no other one.
    """
    three = _by_name(_THREE_LETTERS)
    assert {len(code) for code in three} == {3}
    assert not set(three) & set(LANGUAGES)
    assert {*three.values(), "haw", "yue"} == set(LANGUAGES)
    # None was written down twice.
    assert len(three) == _THREE_LETTERS.count(";") + 1


# What a model knows -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "count", "knows_cantonese"),
    [
        ("tiny", 99, False),
        ("large-v2", 99, False),
        ("large-v3", 100, True),
        ("large-v3-turbo", 100, True),
        ("tiny.en", 1, False),
        ("distil-small.en", 1, False),
    ],
)
def test_known_sizes_are_told_by_their_vocabulary(
    size: str, count: int, *, knows_cantonese: bool
) -> None:
    """
    Without any file.
    """
    known = knowledge_of(ModelFiles("", "float16", source=ARCHITECTURES[size]))
    assert known is not None
    assert len(known.languages) == count
    assert known.is_multilingual is (count > 1)
    assert ("yue" in known.languages) is knows_cantonese


@pytest.mark.parametrize("english", [True, False])
def test_files_tell_what_the_model_itself_would(*, english: bool) -> None:
    """
    A vocabulary of a size that no model of OpenAI's has.
    """
    directory = micro(english=english)
    known, plain = knowledge_of(files_in(str(directory))), plain_model(directory)
    assert known is not None
    assert known.is_multilingual is plain.model.is_multilingual is not english
    tokens = plain.hf_tokenizer.get_vocab(with_added_tokens=True)
    spoken = [code for code in LANGUAGES if f"<|{code}|>" in tokens]
    assert list(known.languages) == (["en"] if english else spoken)
    assert known.n_tokens >= plain.hf_tokenizer.get_vocab_size()


@pytest.mark.parametrize("name", ["tiny.en", "base"])
def test_files_of_real_models_tell_it_too(name: str) -> None:
    """
    One has vocabulary.txt, whose last line has an end, and tokens of all languages in
    its tokenizer though it knows one.
    """
    known = knowledge_of(files_in(str(packaged(name))))
    size = knowledge_of(ModelFiles("", "float16", source=ARCHITECTURES[name]))
    assert known == size


def test_a_model_knows_the_languages_that_it_has_tokens_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: ModelCache
) -> None:
    """
    Fine-tunes may have fewer than OpenAI's models, or others.
    """
    monkeypatch.setattr("micro._LANGUAGES", ["de", "en", "yue"])
    directory = build_micro(tmp_path / "few", "few words")
    files = files_in(str(directory))
    assert spoken(files) == ("de", "en", "yue")
    variant = replace(files, directory=str(tmp_path / "copy"), original=files)
    assert spoken(variant) == ("de", "en", "yue")
    model = model_of(cache, directory)
    assert model.supported_languages == ["de", "en", "yue"]
    with pytest.raises(ValueError, match=r"does not know French \('fr'\)"):
        model.transcribe(SILENCE, language="fr")
    assert model.transcribe(SILENCE, language="yue")[1].language == "yue"


def spoken(files: ModelFiles) -> tuple[str, ...]:
    """
    The languages of a model.
    """
    known = knowledge_of(files)
    assert known is not None
    return known.languages


def test_the_refusal_says_what_to_do() -> None:
    """
    Cantonese came late; an English-only model is left to faster-whisper, which warns.
    """
    base = knowledge_of(ModelFiles("", "float16", source=ARCHITECTURES["base"]))
    english = knowledge_of(ModelFiles("", "float16", source=ARCHITECTURES["base.en"]))
    with pytest.raises(ValueError, match=r"base does not know Cantonese .*large-v3"):
        check_language("base", "yue", base)
    for known, code in ((base, "de"), (base, None), (english, "de"), (None, "yue")):
        check_language("base", code, known)


# The library --------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_language_that_a_model_does_not_know_swaps_none(
    cache: ModelCache, batch_size: int | None
) -> None:
    """
    Neither is another evicted, nor the audio looked at.
    """
    cache.preload(micro("micro a"), "cpu", cpu_threads=1)
    model = model_of(cache, micro())
    before = cache.stats().requests
    for language in ("yue", "Cantonese", "zh-yue"):
        with pytest.raises(ValueError, match="does not know Cantonese"):
            model.transcribe("no such file", language=language, batch_size=batch_size)
    assert cache.stats().requests == before
    assert [info.key.model for info in cache.models()] == [str(micro("micro a"))]


def test_the_library_takes_the_names_that_the_server_takes(cache: ModelCache) -> None:
    """
    By position, too; empty text is no language.
    """
    model = model_of(cache, micro())
    for said, code in (("German", "de"), ("de-AT", "de"), ("castilian", "es")):
        assert model.transcribe(SILENCE, said)[1].language == code
    for said in ("", "auto"):
        segments, info = model.transcribe(SILENCE, language=said)
        assert info.all_language_probs is not None
        segments.close()


def test_an_english_model_warns_as_without_a_cache(
    cache: ModelCache, caplog: pytest.LogCaptureFixture
) -> None:
    """
    The library stays a drop-in there.
    """
    model = model_of(cache, micro(english=True))
    with caplog.at_level(logging.WARNING, "faster_whisper"):
        segments, info = model.transcribe(SILENCE, language="de-AT", task="translate")
    assert (info.language, len(list(segments))) == ("en", 1)
    assert "English-only but the language parameter is set to 'de'" in caplog.text


def test_a_hit_looks_at_no_file(
    cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    What a model in memory knows was read before.
    """
    model = model_of(cache, micro())
    list(model.transcribe(SILENCE, language="de")[0])

    def never(*_args: object, **_options: object) -> None:
        raise AssertionError("looked at the disk")

    with monkeypatch.context() as patch:
        patch.setattr("os.stat", never)
        patch.setattr(Path, "open", never)
        patch.setattr(Path, "read_bytes", never)
        list(model.transcribe(SILENCE, language="german")[0])
        with pytest.raises(ValueError, match="Cantonese"):
            model.transcribe(SILENCE, language="yue")


def test_known_sizes_need_no_files(make_cache: MakeCache, loader: FakeLoader) -> None:
    """
    Nothing is downloaded to find out.
    """
    loader.missing |= {"base", "large-v3"}
    cache = make_cache()
    with pytest.raises(ValueError, match=r"^base/cpu/.* does not know Cantonese"):
        cache.get_model("base", "cpu").transcribe("audio", language="yue")
    assert not loader.downloads
    segments, info = cache.get_model("large-v3", "cpu").transcribe("audio", "yue")
    assert info["language"] == "yue"
    segments.close()


def test_the_files_of_an_unknown_repository_are_looked_at_once_they_are_here(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    As the fake's tell nothing, the call goes on.
    """
    loader.missing.add("somebody/whisper-special")
    cache = make_cache()
    model = cache.get_model("somebody/whisper-special", "cpu")
    segments, _ = model.transcribe("audio", language="yue")
    assert loader.downloads["somebody/whisper-special"] == 1
    segments.close()


# Command line, comparisons ------------------------------------------------------------


def test_the_command_line_goes_by_the_same_rule(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    One line each, and nothing is loaded for a language that one of the models lacks.
    """
    monkeypatch.setenv("WHISPERCACHE_VARIANTS", "off")
    command = ["transcribe", BREAD, "--device", "cpu", "--model", str(micro())]
    with pytest.raises(SystemExit):
        main([*command, "--language", "klingon"])
    assert "'klingon' is none that Whisper knows" in capsys.readouterr().err
    assert main([*command, "--model", str(micro("a b")), "--language", "yue"]) == 2
    told = capsys.readouterr()
    assert "does not know Cantonese" in told.err.splitlines()[-1]
    assert not told.out
    assert main([*command, "--language", "de-AT", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["language"] == "de"


def test_comparisons_go_by_the_same_rule(cache: ModelCache) -> None:
    """
    Before anything is loaded; and other nonsense with it.
    """
    specs = [ModelSpec("one", str(micro("micro a"))), ModelSpec("two", str(micro()))]
    for options, said in (
        ({"language": "klingon"}, "none that Whisper knows"),
        ({"language": "yue"}, "one does not know Cantonese"),
        ({"chunk_length": 0}, "chunk_length must be"),
    ):
        with pytest.raises(ValueError, match=said):
            compare(BREAD, models=specs, cache=cache, device="cpu", **options)
    with pytest.raises(TypeError, match="no parameter 'batch_size'"):
        compare(BREAD, models=specs, cache=cache, device="cpu", batch_size=4)
    assert cache.stats().loads == 0
    found = compare(BREAD, models=specs, cache=cache, device="cpu", language="German")
    assert {result.language for result in found.results} == {"de"}


# The server ---------------------------------------------------------------------------


@pytest.fixture
def served(cache: ModelCache) -> Iterator[TestClient]:
    """
    A server of two models that take turns: one of many languages, one of English alone.
    """
    models = (
        ModelSpec("many", str(micro())),
        ModelSpec("english", str(micro("only english", english=True))),
    )
    app = create_app(ServerOptions(models=models, device="cpu"), cache)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


@pytest.mark.process
@pytest.mark.parametrize(
    "case",  # the model in memory, the one that is asked, for what, and the answer
    [
        ("many", "english", "de", "English only"),
        ("many", "english", "yue", "English only"),
        ("many", "english", "klingon", "none that Whisper knows"),
        ("english", "many", "yue", "many does not know Cantonese"),
        ("english", "many", "zh-yue", "many does not know Cantonese"),
        ("english", "many", "klingon", "none that Whisper knows"),
    ],
)
def test_a_refusal_swaps_no_model(
    served: TestClient, cache: ModelCache, case: tuple[str, str, str, str]
) -> None:
    """
    It is told at once, with the parameter to blame and no path of this machine.
    """
    here, asked, language, said = case
    served.post(f"/api/models/{here}/load")
    before = cache.stats().requests
    answer = ask(served, "transcriptions", asked, language=language)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "language")
    assert said in error["message"]
    assert str(micro()) not in error["message"]
    assert cache.stats().requests == before
    (model,) = served.get("/api/ps").json()["models"]
    assert model["name"] == here


@pytest.mark.process
def test_an_english_model_translates_nothing_and_loads_for_nothing(
    served: TestClient, cache: ModelCache
) -> None:
    """
    It would write nonsense.
    """
    answer = ask(served, "translations", "english")
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "model")
    assert cache.stats().requests == 0
    assert ask(served, "translations", "many").status_code == 200


@pytest.mark.process
def test_an_english_model_hears_english_of_all_places(served: TestClient) -> None:
    """
    By any of its names.
    """
    for language in ("en-US", "English", "en", "auto", ""):
        answer = ask(served, "transcriptions", "english", language=language)
        assert answer.json()["text"] == "only english", language


@pytest.mark.process
def test_a_language_is_told_by_its_name(served: TestClient) -> None:
    """
    However it was asked for.
    """
    fields = {"language": "pt-BR", "response_format": "verbose_json"}
    answer = ask(served, "transcriptions", "many", **fields)
    assert answer.json()["language"] == "portuguese"


@pytest.mark.process
def test_files_that_come_later_are_looked_at_before_a_load(
    cache: ModelCache, monkeypatch: pytest.MonkeyPatch, served: TestClient
) -> None:
    """
    What was not known at the door is known once the files are here.
    """
    from whispercache.server.local import LocalEngine

    real, answers = LocalEngine.knowledge, [None]

    async def late(engine: LocalEngine, offer: Offer) -> object:
        return answers.pop() if answers else await real(engine, offer)

    monkeypatch.setattr(LocalEngine, "knowledge", late)
    answer = ask(served, "transcriptions", "many", language="yue")
    assert (answer.status_code, answers) == (400, [])
    assert "Cantonese" in answer.json()["error"]["message"]
    assert cache.stats().loads == 0


@pytest.mark.process
def test_a_model_that_cannot_detect_a_language_wants_one(
    cache: ModelCache, tmp_path: Path
) -> None:
    """
    Before it is loaded: its config.json names none (``lang_ids``).
    """
    directory = micro_copy(tmp_path / "model")
    path = directory / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "lang_ids": []}), encoding="utf-8")
    models = (ModelSpec("tuned", str(directory)),)
    app = create_app(ServerOptions(models=models, device="cpu"), cache)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        for kind in ("transcriptions", "translations"):
            answer = ask(client, kind, "tuned")
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, "language")
            assert "cannot detect the language" in error["message"]
        assert cache.stats().loads == 0
        assert ask(client, "transcriptions", "tuned", language="de").status_code == 200


def ask(client: TestClient, kind: str, model: str, **fields: str) -> Any:
    """
    A request of OpenAI's API.
    """
    return client.post(
        f"/v1/audio/{kind}",
        data={"model": model, **fields},
        files={"file": ("a.flac", Path(BREAD).read_bytes())},
    )
