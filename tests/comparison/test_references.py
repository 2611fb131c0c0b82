"""
References: the table, and the file that each one belongs to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from compared import files_of_noise

from whispercache.comparison import (
    Reference,
)
from whispercache.comparison.references import match_references, read_references

if TYPE_CHECKING:
    from pathlib import Path

files = files_of_noise()


class TestReferences:
    """
    What is really said, from a table.
    """

    def test_columns_go_by_their_names(self, tmp_path: Path) -> None:
        """
        In any order; a byte order mark and empty lines mean nothing.
        """
        table = tmp_path / "refs.tsv"
        text = "\ufeffText\tfile\tlanguage\n\nHola.\tes.wav\tes\r\nHi.\ten.wav\t\n"
        table.write_text(text, encoding="utf-8", newline="")
        assert read_references(table) == {
            "es.wav": Reference("Hola.", "es"),
            "en.wav": Reference("Hi."),
        }

    @pytest.mark.parametrize("language", ["German", "de-AT", "de_DE.UTF-8", "DE"])
    def test_a_language_goes_by_name_and_locale_too(
        self, tmp_path: Path, language: str
    ) -> None:
        """
        As everywhere else; a reference that a program makes is no exception.
        """
        table = tmp_path / "refs.tsv"
        table.write_text(f"file\ttext\tlanguage\na.wav\tHallo.\t{language}\n")
        assert read_references(table) == {"a.wav": Reference("Hallo.", "de")}
        given = {"a.wav": Reference("Hallo.", language)}
        assert match_references(["a.wav"], given)["a.wav"].language == "de"

    def test_a_language_that_there_is_not_is_refused(self, tmp_path: Path) -> None:
        """
        With its line.
        """
        table = tmp_path / "refs.tsv"
        table.write_text("file\ttext\tlanguage\na.wav\tHallo.\tGermann\n")
        with pytest.raises(ValueError, match="line 2: language 'Germann' is none"):
            read_references(table)

    def test_without_names_it_is_file_and_text(self, tmp_path: Path) -> None:
        """
        Quotes belong to the text, and so does a line separator of Unicode.
        """
        table = tmp_path / "refs.tsv"
        table.write_text('a.wav\t"Go," she\u2028said.\nb.wav\n', encoding="utf-8")
        assert read_references(table) == {
            "a.wav": Reference('"Go," she\u2028said.'),
            "b.wav": Reference(""),
        }

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("a.wav\tone\na.wav\ttwo\n", "line 2: 'a.wav' is there twice"),
            ("a.wav\tone\ttwo\n", "line 1: 3 columns, not 2"),
            ("file\ttext\n\tone\n", "line 2: no file is named"),
            ("file\ttext\n", "no references in it"),
            ("", "no references in it"),
        ],
    )
    def test_a_wrong_table_is_refused_and_the_line_named(
        self, text: str, complaint: str, tmp_path: Path
    ) -> None:
        """
        In words that lead to the place.
        """
        table = tmp_path / "refs.tsv"
        table.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=complaint):
            read_references(table)

    def test_a_table_that_is_no_text_is_refused(self, tmp_path: Path) -> None:
        """
        Rather than read as something else.
        """
        (tmp_path / "refs.tsv").write_bytes(b"a.wav\t\xff\xfe\n")
        with pytest.raises(ValueError, match="not UTF-8"):
            read_references(tmp_path / "refs.tsv")

    def test_a_path_goes_before_a_name(self) -> None:
        """
        Two files of one name each get their own.
        """
        found = match_references(
            ["x/a.wav", "y/a.wav", "z/b.wav"],
            {"x/a.wav": "one", "y/./a.wav": "two", "b.wav": "three"},
        )
        assert {file: each.text for file, each in found.items()} == {
            "x/a.wav": "one",
            "y/a.wav": "two",
            "z/b.wav": "three",
        }

    @pytest.mark.parametrize(
        ("files", "references", "complaint"),
        [
            (["x/a.wav", "y/a.wav"], {"a.wav": "one"}, "give its path"),
            (["a.wav"], {"x/a.wav": "one", "y/a.wav": "two"}, "two references"),
            (["a.wav"], {"b.wav": "one"}, "none of the 1 references"),
        ],
    )
    def test_what_could_be_meant_otherwise_is_refused(
        self, files: list[str], references: dict[str, str], complaint: str
    ) -> None:
        """
        A wrong guess would look like errors of a model.
        """
        with pytest.raises(ValueError, match=complaint):
            match_references(files, references)
