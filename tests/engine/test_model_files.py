"""
The small files of a model, checked against model.bin before an engine sees them.

Nothing here is loaded: files that would harm the engine are only checked.
"""

from __future__ import annotations

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from forbidden import forbid
from micro import build_micro
from real import SILENCE, TEXT, micro, micro_copy, model_of, packaged, text_of
from tokenizers import Tokenizer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from byte_level import tokenizer, vocabulary

from whispercache import (
    CorruptModel,
    LoadFailed,
    ModelCache,
    ModelKey,
    WhisperCacheError,
)
from whispercache.devices.probe import SystemProbe
from whispercache.engine import claims as claims_module
from whispercache.engine import construct
from whispercache.engine.calls import languages
from whispercache.engine.claims import Claims, check_claims, read_vocabulary
from whispercache.engine.files import ModelFiles, claims_of, files_in
from whispercache.engine.kept import KeptModels
from whispercache.engine.loader import FasterWhisperLoader
from whispercache.engine.naming import canonical_model
from whispercache.engine.sizes.header import read_header

if TYPE_CHECKING:
    from collections.abc import Callable

    from whispercache.engine.sizes.header import ModelHeader

OLD = ("en", "de", "su")
NEW = (*OLD, "yue")
"""
Languages before large-v3, and since. The tasks come after them.
"""


@pytest.fixture
def loader() -> FasterWhisperLoader:
    """
    A loader of its own.
    """
    return FasterWhisperLoader(SystemProbe())


def tokens_of(
    languages: tuple[str, ...] = OLD, *, english: bool = False
) -> tuple[list[str], list[str]]:
    """
    All tokens of a model, and the special ones.
    """
    return vocabulary(["word"], languages, english=english)


def write_json(path: Path, content: object) -> None:
    """
    Write *content* as JSON.
    """
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_files(
    directory: Path, languages: tuple[str, ...] = OLD, *, english: bool = False
) -> ModelHeader:
    """
    Write the small files of a model, and return the header that fits them.
    """
    tokens, special = tokens_of(languages, english=english)
    write_json(directory / "vocabulary.json", tokens)
    write_json(directory / "tokenizer.json", tokenizer(tokens, special))
    config = {
        "alignment_heads": [[1, 0]],
        "lang_ids": [tokens.index(f"<|{code}|>") for code in languages],
        "suppress_ids": [],
        "suppress_ids_begin": [tokens.index("<|endoftext|>")],
    }
    write_json(directory / "config.json", config)
    return header_of(len(tokens))


def header_of(rows: int, *, mels: int = 80) -> ModelHeader:
    """
    The header of a model with so many tokens and mel bands.
    """
    header = read_header(micro())
    architecture = replace(header.architecture, vocabulary=rows, mels=mels)
    return replace(header, architecture=architecture)


def edit(path: Path, **changes: object) -> None:
    """
    Change what an object in a JSON file says; None to leave it out.
    """
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {name: value for name, value in content.items() if value is not None}
    write_json(path, kept)


def refusal(directory: Path, header: ModelHeader) -> str:
    """
    What is said of the files in *directory*, in one line that names them.
    """
    with pytest.raises(CorruptModel) as caught:
        check_claims(str(directory), header)
    text = str(caught.value)
    assert str(directory) in text
    assert len(text.splitlines()) == 1
    return text


class TestWhatIsRight:
    """
    Nothing that works is refused.
    """

    @pytest.mark.parametrize("name", ["tiny.en", "base"])
    def test_real_models_pass(self, name: str) -> None:
        """
        Those that are packaged: tokens in JSON and in lines, English and others.
        """
        directory = packaged(name)
        files_in(str(directory))
        header = read_header(directory)
        assert check_claims(str(directory), header).alignment_problem == ""
        found = read_vocabulary(str(directory))
        assert found.size == header.architecture.vocabulary
        assert found.is_multilingual is (name == "base")
        expected = {"tiny.en": "openai/whisper-tiny.en", "base": "openai/whisper-tiny"}
        assert found.tokenizer == expected[name]

    @pytest.mark.parametrize("english", [True, False])
    def test_made_up_models_pass(self, *, english: bool) -> None:
        """
        Those that the tests make.
        """
        files_in(str(micro(english=english)))

    @pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
    def test_tokens_may_be_lines(self, tmp_path: Path, ending: str) -> None:
        """
        As in older conversions; with the line ends of Windows, too.
        """
        header = write_files(tmp_path, NEW)
        (tmp_path / "vocabulary.json").unlink()
        tokens, _ = tokens_of(NEW)
        lines = (ending or "\n").join(tokens) + ending
        (tmp_path / "vocabulary.txt").write_bytes(lines.encode())
        check_claims(str(tmp_path), header)
        found = read_vocabulary(str(tmp_path))
        assert (found.file, found.size) == ("vocabulary.txt", len(tokens))
        assert found.special["<|translate|>"] == tokens.index("<|translate|>")
        assert found.is_multilingual

    def test_a_model_may_have_more_rows_than_tokens(self, tmp_path: Path) -> None:
        """
        Some are padded to a round number.
        """
        header = write_files(tmp_path)
        check_claims(str(tmp_path), header_of(header.architecture.vocabulary + 7))

    def test_fine_tunes_may_add_tokens(self, tmp_path: Path) -> None:
        """
        At the end, in one file or in both, whatever they look like.
        """
        header = write_files(tmp_path)
        tokens, special = tokens_of()
        content: Any = tokenizer(tokens, special)
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        extra = {"id": len(tokens), "content": "<|speaker|>", **flags, "special": True}
        content["added_tokens"].append(extra)
        write_json(tmp_path / "tokenizer.json", content)
        check_claims(str(tmp_path), header_of(header.architecture.vocabulary + 1))
        write_json(tmp_path / "vocabulary.json", [*tokens, "<|speaker|>"])
        check_claims(str(tmp_path), header_of(header.architecture.vocabulary + 1))

    def test_names_of_one_token_may_differ(self, tmp_path: Path) -> None:
        """
        "<|nospeech|>" was once called "<|nocaptions|>".
        """
        header = write_files(tmp_path)
        path = tmp_path / "tokenizer.json"
        text = path.read_text(encoding="utf-8").replace("nospeech", "nocaptions")
        path.write_text(text, encoding="utf-8")
        check_claims(str(tmp_path), header)

    @pytest.mark.parametrize("where", ["tokenizer", "vocabulary"])
    def test_a_token_may_be_in_the_place_of_a_timestamp(
        self, tmp_path: Path, where: str
    ) -> None:
        """
        One that was added to a tokenizer from before timestamps were in it: what the
        converter calls them comes one later then. faster-whisper never asks for them.
        """
        write_files(tmp_path)
        tokens, special = tokens_of()
        first = tokens.index("<|0.00|>")
        texts, times = tokens[:first], tokens[first:]
        more = ["<|more|>", *times]
        told, given = (more, times) if where == "tokenizer" else (times, more)
        content = tokenizer([*texts, *told], [*special, *told])
        write_json(tmp_path / "tokenizer.json", content)
        write_json(tmp_path / "vocabulary.json", [*texts, *given])
        check_claims(str(tmp_path), header_of(len(texts) + len(given)))

    def test_special_tokens_may_be_among_the_words(self, tmp_path: Path) -> None:
        """
        Some tokenizers add none.
        """
        header = write_files(tmp_path)
        tokens, _ = tokens_of()
        content: Any = tokenizer(tokens, [])
        content["model"]["vocab"] = {token: n for n, token in enumerate(tokens)}
        write_json(tmp_path / "tokenizer.json", content)
        check_claims(str(tmp_path), header)

    def test_parts_of_a_tokenizer_may_come_in_any_order(self, tmp_path: Path) -> None:
        """
        And a word may be called as its first part is.
        """
        header = write_files(tmp_path)
        tokens, special = tokens_of()
        content: Any = tokenizer(tokens, special)
        words = content["model"]["vocab"]
        words["added_tokens"] = words.pop("word")
        write_json(tmp_path / "tokenizer.json", dict(reversed(content.items())))
        check_claims(str(tmp_path), header)

    @pytest.mark.parametrize(
        "content",
        [
            None,
            {},
            {"feature_size": 80},
            {"feature_size": 80.0},
            {"feature_size": "80"},
        ],
    )
    def test_mel_bands_may_be_told_or_not(
        self, tmp_path: Path, content: dict[str, object] | None
    ) -> None:
        """
        In whatever way faster-whisper understands.
        """
        header = write_files(tmp_path)
        if content is not None:
            write_json(tmp_path / "preprocessor_config.json", content)
        check_claims(str(tmp_path), header)

    def test_a_feature_file_that_is_no_json_is_passed_over(
        self, tmp_path: Path
    ) -> None:
        """
        As by faster-whisper; the header tells what to take.
        """
        header = write_files(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text("{")
        check_claims(str(tmp_path), header)

    def test_an_english_model_needs_no_languages(self, tmp_path: Path) -> None:
        """
        Nor are they looked at: in real ones they are off by one.
        """
        header = write_files(tmp_path, english=True)
        edit(tmp_path / "config.json", lang_ids=[10**6])
        check_claims(str(tmp_path), header)
        edit(tmp_path / "config.json", lang_ids=None)
        check_claims(str(tmp_path), header)

    def test_lists_of_tokens_may_be_null(self, tmp_path: Path) -> None:
        """
        As the converter writes them where the original has none.
        """
        header = write_files(tmp_path)
        path = tmp_path / "config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**content, "suppress_ids": None, "suppress_ids_begin": None})
        check_claims(str(tmp_path), header)

    def test_equal_files_are_checked_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        A request looks at their times alone, until one has changed.
        """
        directory = str(micro_copy(tmp_path / "model"))
        files_in(directory)
        read: list[str] = []
        plain = claims_module._read

        def spy(where: str, name: str) -> bytes | None:
            read.append(name)
            return plain(where, name)

        monkeypatch.setattr(claims_module, "_read", spy)
        files_in(directory)
        assert read == []
        edit(tmp_path / "model" / "config.json", other=1)
        files_in(directory)
        assert "tokenizer.json" in read


class TestTokens:
    """
    A tokenizer and a vocabulary of different models.
    """

    def test_a_tokenizer_from_before_cantonese_is_refused(self, tmp_path: Path) -> None:
        """
        With it, "transcribe" would mean "translate": German would come back in English.
        """
        header = write_files(tmp_path, NEW)
        write_json(tmp_path / "tokenizer.json", tokenizer(*tokens_of(OLD)))
        told = refusal(tmp_path, header)
        assert "<|translate|> is " in told
        assert "openai/whisper-large-v3" in told

    def test_a_tokenizer_since_cantonese_is_refused_for_an_older_model(
        self, tmp_path: Path
    ) -> None:
        """
        The other way round.
        """
        header = write_files(tmp_path, OLD)
        write_json(tmp_path / "tokenizer.json", tokenizer(*tokens_of(NEW)))
        assert "openai/whisper-tiny's" in refusal(tmp_path, header)

    @pytest.mark.parametrize("english", [True, False])
    def test_english_and_many_languages_do_not_mix(
        self, tmp_path: Path, *, english: bool
    ) -> None:
        """
        All special tokens are off by one.
        """
        header = write_files(tmp_path, english=english)
        other = tokens_of(english=not english)
        write_json(tmp_path / "tokenizer.json", tokenizer(*other))
        assert "<|endoftext|> is " in refusal(tmp_path, header)

    def test_a_language_with_another_number_is_refused(self, tmp_path: Path) -> None:
        """
        Each that both files know counts.
        """
        header = write_files(tmp_path, ("en", "de", "fr"))
        shuffled = tokens_of(("en", "fr", "de"))
        write_json(tmp_path / "tokenizer.json", tokenizer(*shuffled))
        assert "<|de|> is " in refusal(tmp_path, header)

    @pytest.mark.parametrize("order", ["reversed", "with a gap"])
    def test_tokens_are_numbered_by_their_order(
        self, tmp_path: Path, order: str
    ) -> None:
        """
        Tokenizers goes by that, whatever numbers the file has.
        """
        header = write_files(tmp_path)
        content: Any = tokenizer(*tokens_of())
        added = content["added_tokens"]
        content["added_tokens"] = (
            added[::-1] if order == "reversed" else added[:2] + added[3:]
        )
        write_json(tmp_path / "tokenizer.json", content)
        told = refusal(tmp_path, header)
        path = str(tmp_path / "tokenizer.json")
        found = Tokenizer.from_file(path).token_to_id("<|transcribe|>")
        assert found != tokens_of()[0].index("<|transcribe|>")
        assert "so they are of different models" in told

    def test_numbers_that_nobody_reads_may_be_wrong(self, tmp_path: Path) -> None:
        """
        Tokenizers warns of them, and goes on with the right ones.
        """
        header = write_files(tmp_path)
        content: Any = tokenizer(*tokens_of())
        for token in content["added_tokens"]:
            token["id"] += 5
        write_json(tmp_path / "tokenizer.json", content)
        check_claims(str(tmp_path), header)

    def test_a_load_looks_at_the_tokenizer_itself(
        self, tmp_path: Path, loader: FasterWhisperLoader
    ) -> None:
        """
        Its words decide, too, where the numbers of its special tokens begin.
        """
        directory = micro_copy(tmp_path / "model")
        path = directory / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content["model"]["vocab"]["one more"] = len(content["model"]["vocab"])
        write_json(path, content)
        files = loader.locate(str(directory), {}, download=False)
        assert files is not None
        with pytest.raises(CorruptModel, match="so they are of different models"):
            loader.load(ModelKey(str(directory), "cpu", "float32"), files)

    @pytest.mark.parametrize(
        "token", ["<|startoftranscript|>", "<|notimestamps|>", "<|transcribe|>"]
    )
    def test_a_tokenizer_without_what_each_call_needs_is_refused(
        self, tmp_path: Path, token: str
    ) -> None:
        """
        That of another kind of model, for example.
        """
        header = write_files(tmp_path)
        tokens, special = tokens_of()
        special.remove(token)
        write_json(tmp_path / "tokenizer.json", tokenizer(tokens, special))
        assert f"tokenizer.json has no {token}" in refusal(tmp_path, header)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"model": 1}'])
    def test_what_is_no_tokenizer_is_refused(
        self, tmp_path: Path, content: bytes
    ) -> None:
        """
        Whatever it is.
        """
        header = write_files(tmp_path)
        (tmp_path / "tokenizer.json").write_bytes(content)
        assert "tokenizer.json" in refusal(tmp_path, header)

    @pytest.mark.parametrize(
        "content", [b"", b"{}", b'["a", 1]', b'{"a": 1}', b"[null]"]
    )
    def test_what_is_no_vocabulary_is_refused(
        self, tmp_path: Path, content: bytes
    ) -> None:
        """
        The order of a tokenizer's own vocabulary is not that of a list.
        """
        header = write_files(tmp_path)
        (tmp_path / "vocabulary.json").write_bytes(content)
        assert "vocabulary.json" in refusal(tmp_path, header)

    def test_a_model_without_vocabulary_is_refused(self, tmp_path: Path) -> None:
        """
        The error names the files that would do.
        """
        header = write_files(tmp_path)
        (tmp_path / "vocabulary.json").unlink()
        assert "vocabulary.json or vocabulary.txt is miss" in refusal(tmp_path, header)

    def test_more_tokens_than_rows_are_refused(self, tmp_path: Path) -> None:
        """
        The last ones would be looked up behind the end of the embeddings.
        """
        header = write_files(tmp_path)
        rows = header.architecture.vocabulary - 1
        assert f"and model.bin {rows}" in refusal(tmp_path, header_of(rows))


class TestTokenizerOfAnother:
    """
    A model that brings no tokenizer gets OpenAI's.
    """

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """
        The repositories that were asked for; each has the tokens of before large-v3.
        """
        repositories: list[str] = []

        class Offered:
            @classmethod
            def from_pretrained(cls, repository: str) -> Offered:
                repositories.append(repository)
                return cls()

            def token_to_id(self, token: str) -> int | None:
                tokens, _ = tokens_of(OLD)
                return tokens.index(token) if token in tokens else None

        monkeypatch.setattr("tokenizers.Tokenizer", Offered)
        return repositories

    @pytest.mark.parametrize(
        ("languages", "english", "repository"),
        [
            (OLD, False, "openai/whisper-tiny"),
            (OLD, True, "openai/whisper-tiny.en"),
            (NEW, False, "openai/whisper-large-v3"),
        ],
    )
    def test_the_vocabulary_tells_whose_it_needs(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        asked: list[str],
        *,
        languages: tuple[str, ...],
        repository: str,
        english: bool,
    ) -> None:
        """
        faster-whisper takes that of tiny whatever the model is.
        """
        write_files(tmp_path, languages, english=english)
        known = Claims(read_vocabulary(str(tmp_path)), "", tells_words=True)
        monkeypatch.setattr(construct, "claims_of", lambda _: known)
        (tmp_path / "tokenizer.json").unlink()
        files = ModelFiles(str(tmp_path), "float16")
        if repository == "openai/whisper-tiny":
            construct._tokenizer_of(files, KeptModels())
        else:  # one that has other tokens after all is not taken
            with pytest.raises(CorruptModel, match=repository):
                construct._tokenizer_of(files, KeptModels())
        assert asked == [repository]

    def test_without_network_the_error_names_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        So that somebody can fetch it by hand.
        """

        class Away:
            @staticmethod
            def from_pretrained(_repository: str) -> None:
                raise OSError("no network")

        monkeypatch.setattr("tokenizers.Tokenizer", Away)
        with pytest.raises(
            LoadFailed, match=r"tokenizer\.json of openai/whisper-large"
        ):
            construct._tokenizer_from_hub("/models/mine", "openai/whisper-large-v3")


class TestConfig:
    """
    A config.json that is not CTranslate2's, or not of this model.
    """

    def test_that_of_transformers_is_told_apart(self, tmp_path: Path) -> None:
        """
        It has the same name, and lies in the same folder of many repositories.
        """
        header = write_files(tmp_path)
        content = {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "decoder_layers": 4,
            "vocab_size": header.architecture.vocabulary,
        }
        write_json(tmp_path / "config.json", content)
        told = refusal(tmp_path, header)
        assert "is that of Transformers, not of CTranslate2" in told
        assert "ct2-transformers-converter" in told

    def test_one_that_is_both_passes(self, tmp_path: Path) -> None:
        """
        Only what is missing counts.
        """
        header = write_files(tmp_path)
        edit(tmp_path / "config.json", model_type="whisper")
        check_claims(str(tmp_path), header)

    @pytest.mark.parametrize("name", ["suppress_ids_begin", "lang_ids"])
    def test_what_each_call_reads_must_be_there(
        self, tmp_path: Path, name: str
    ) -> None:
        """
        CTranslate2 does not look whether it is.
        """
        header = write_files(tmp_path)
        edit(tmp_path / "config.json", **{name: None})
        assert f"has no {name}" in refusal(tmp_path, header)

    @pytest.mark.parametrize("name", ["suppress_ids_begin", "lang_ids"])
    @pytest.mark.parametrize("ids", [[-1], [10**6], [1.5], ["1"], {"a": 1}, [True], 7])
    def test_tokens_must_be_those_of_the_model(
        self, tmp_path: Path, name: str, ids: object
    ) -> None:
        """
        Others would be read, or written, behind the end of its scores.
        """
        header = write_files(tmp_path)
        edit(tmp_path / "config.json", **{name: ids})
        assert name in refusal(tmp_path, header)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
    def test_what_is_no_object_is_refused(self, tmp_path: Path, content: bytes) -> None:
        """
        It says which file.
        """
        header = write_files(tmp_path)
        (tmp_path / "config.json").write_bytes(content)
        assert "config.json" in refusal(tmp_path, header)


class TestMels:
    """
    Features in another number of bands than the encoder takes.
    """

    @pytest.mark.parametrize("told", [128, "128", None, 80.5, [80], "many", True])
    def test_a_contradiction_is_refused(self, tmp_path: Path, told: object) -> None:
        """
        Every call would fail.
        """
        header = write_files(tmp_path)
        write_json(tmp_path / "preprocessor_config.json", {"feature_size": told})
        assert f"says {told} mel bands" in refusal(tmp_path, header)

    @pytest.mark.parametrize("content", [b"[]", b"7", b'{"a": "\xff"}'])
    def test_what_faster_whisper_cannot_read_is_refused(
        self, tmp_path: Path, content: bytes
    ) -> None:
        """
        What is no JSON, it passes over; this it does not.
        """
        header = write_files(tmp_path)
        (tmp_path / "preprocessor_config.json").write_bytes(content)
        assert "preprocessor_config.json" in refusal(tmp_path, header)

    @pytest.mark.parametrize("mels", [80, 128])
    def test_the_header_tells_where_no_file_does(
        self, tmp_path: Path, mels: int
    ) -> None:
        """
        faster-whisper would take 80 for a fine-tuned large-v3, and fail at each call.
        """
        directory = build_micro(tmp_path / "model", TEXT.strip(), mels=mels)
        assert not (directory / "preprocessor_config.json").exists()
        with ModelCache() as cache:
            model = model_of(cache, directory)
            with model.lease() as whisper:
                assert len(whisper.feature_extractor.mel_filters) == mels
            assert text_of(model.transcribe(SILENCE)[0]) == TEXT


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("ids", [[], None])
def test_a_model_that_names_no_languages_wants_one(
    tmp_path: Path, ids: object, batch_size: int | None
) -> None:
    """
    The converter has none for some fine-tunes. With a language named it is a whole
    model; faster-whisper says "list index out of range" without.
    """
    directory = micro_copy(tmp_path / "model")
    content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    write_json(directory / "config.json", {**content, "lang_ids": ids})
    options: dict[str, Any] = {"batch_size": batch_size} if batch_size else {}
    with ModelCache() as cache:
        model = model_of(cache, directory)
        with pytest.raises(CorruptModel, match=r"no lang_ids; name the language"):
            list(model.transcribe(SILENCE, **options)[0])
        with pytest.raises(CorruptModel, match=r"no lang_ids; name the language"):
            model.detect_language(SILENCE)
        if not batch_size:
            assert text_of(model.transcribe(SILENCE, language="de")[0]) == TEXT


class TestHeads:
    """
    Heads of the decoder that word timestamps are read from.
    """

    @pytest.mark.parametrize("heads", [[[0, 0]], [[1, 0], [0, 0]]])
    def test_heads_that_are_there_are_fine(self, tmp_path: Path, heads: object) -> None:
        """
        Layers and heads are counted from 0.
        """
        header = write_files(tmp_path)
        edit(tmp_path / "config.json", alignment_heads=heads)
        assert check_claims(str(tmp_path), header).alignment_problem == ""

    def test_without_any_ctranslate2_says_so(self, tmp_path: Path) -> None:
        """
        That is no lie.
        """
        header = write_files(tmp_path)
        edit(tmp_path / "config.json", alignment_heads=None)
        assert check_claims(str(tmp_path), header).alignment_problem == ""

    @pytest.mark.parametrize(
        "heads",
        [
            [[2, 0]],
            [[0, 1]],
            [[0, 0], [7, 0]],
            [[-1, 0]],
            [[0, -1]],
            [[0]],
            [[0, 0, 0]],
            [0, 0],
            [["0", "0"]],
            [[0.0, 0]],
            [[True, 0]],
            [{"layer": 0}],
            [],
            {},
            "all",
            7,
        ],
    )
    def test_heads_that_are_not_there_are_told(
        self, tmp_path: Path, heads: object
    ) -> None:
        """
        The model is none the less taken: well-known ones have such heads.
        """
        header = write_files(tmp_path)
        edit(tmp_path / "config.json", alignment_heads=heads)
        told = check_claims(str(tmp_path), header).alignment_problem
        assert "alignment_heads" in told

    def test_the_error_says_which_and_how_many_there_are(self, tmp_path: Path) -> None:
        """
        A distilled model has fewer layers than the one whose heads it names.
        """
        header = write_files(tmp_path)
        edit(tmp_path / "config.json", alignment_heads=[[1, 0], [25, 6]])
        told = check_claims(str(tmp_path), header).alignment_problem
        assert "[25, 6]" in told
        assert "2 layers of 1 heads" in told

    def test_decoders_may_have_other_heads_than_encoders(self) -> None:
        """
        Theirs count.
        """
        header = read_header(packaged("base"))
        assert (header.architecture.heads, header.decoder_heads) == (8, 8)

    @pytest.mark.parametrize("batch_size", [None, 2])
    def test_words_are_refused_before_the_engine_sees_them(
        self, monkeypatch: pytest.MonkeyPatch, batch_size: int | None
    ) -> None:
        """
        By an error of this package, again and again; all else goes on.
        """
        plain = claims_of
        monkeypatch.setattr(
            construct,
            "claims_of",
            lambda files: replace(
                plain(files), alignment_problem="there are no such heads"
            ),
        )
        options: dict[str, Any] = {"batch_size": batch_size} if batch_size else {}
        if batch_size:
            options["clip_timestamps"] = [{"start": 0, "end": 1}]
        with ModelCache() as cache:
            model = model_of(cache, micro())
            for _ in range(2):
                with pytest.raises(CorruptModel, match="no such heads") as caught:
                    list(model.transcribe(SILENCE, word_timestamps=True, **options)[0])
                assert "all but word timestamps works" in str(caught.value)
            assert text_of(model.transcribe(SILENCE)[0]) == TEXT
            assert cache.stats().loads == 1

    @pytest.mark.parametrize("asked", [True, 1])
    def test_words_are_refused_before_a_lease(
        self, monkeypatch: pytest.MonkeyPatch, asked: object
    ) -> None:
        """
        Nothing is loaded, nor leaves, for a call that cannot be.
        """
        monkeypatch.setattr(
            languages,
            "claims_of",
            lambda files: replace(
                claims_of(files), alignment_problem="there are no such heads"
            ),
        )
        with ModelCache() as cache:
            model = model_of(cache, micro())
            with pytest.raises(CorruptModel, match="no such heads"):
                model.transcribe(SILENCE, word_timestamps=asked)
            assert cache.stats().loads == 0
            assert text_of(model.transcribe(SILENCE, word_timestamps=False)[0]) == TEXT


class TestWhenItIsTold:
    """
    A lie is found before anything is loaded, or leaves for it.
    """

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("config.json", {"suppress_ids_begin": None}),
            ("config.json", {"lang_ids": [10**6]}),
            ("preprocessor_config.json", {"feature_size": 128}),
            ("tokenizer.json", {"added_tokens": []}),
        ],
    )
    def test_the_model_is_refused_when_it_is_asked_for(
        self, tmp_path: Path, name: str, change: dict[str, object]
    ) -> None:
        """
        Not by its first call; and another model stays where it is.
        """
        directory = micro_copy(tmp_path / "model")
        if not (directory / name).exists():
            write_json(directory / name, {})
        with ModelCache(max_models=1) as cache:
            model_of(cache, micro()).lease().release()
            edit(directory / name, **change)
            with pytest.raises(CorruptModel, match=name):
                model_of(cache, directory)
            with pytest.raises(CorruptModel, match=name):
                cache.preload(directory, "cpu")
            assert [info.state for info in cache.models()] == ["resident"]
            assert cache.stats().evictions == 0

    def test_a_mended_model_is_taken(self, tmp_path: Path) -> None:
        """
        A refusal is not remembered.
        """
        directory = micro_copy(tmp_path / "model")
        write_json(directory / "preprocessor_config.json", {"feature_size": 128})
        with pytest.raises(CorruptModel):
            files_in(str(directory))
        (directory / "preprocessor_config.json").unlink()
        files_in(str(directory))

    def test_the_error_survives_pickling(self) -> None:
        """
        With what to do.
        """
        error = CorruptModel("/models/mine", "a reason", 2.0, cure="mend it")
        again = pickle.loads(pickle.dumps(error))
        assert str(again) == str(error)
        assert (again.cure, again.retry_in_s) == ("mend it", 2.0)


@pytest.mark.parametrize(
    "look",
    [
        lambda path: files_in(str(path)),
        read_header,
        lambda path: read_vocabulary(str(path)),
        canonical_model,
    ],
)
def test_what_cannot_be_read_is_an_error_of_this_package(
    look: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    It says that it is permissions, and not that there is no model.
    """
    directory = micro_copy(tmp_path / "model")
    forbid(directory, monkeypatch)
    with pytest.raises(WhisperCacheError) as caught:
        look(directory)
    assert "Permission denied" in str(caught.value)
    assert "check its permissions" in str(caught.value)
