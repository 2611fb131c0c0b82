"""
Runs that were interrupted, and what a later one need not do again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from compared import compared, files_of_noise, noise, specs_of
from hypothesis import given
from hypothesis import strategies as st
from real import (
    micro_copy,
)

from whispercache.comparison import (
    Progress,
    Reference,
    run,
)
from whispercache.comparison.store import Store
from whispercache.engine.naming import ModelSpec

files = files_of_noise()
specs = specs_of("alpha speaks english", "beta speaks")


class TestResume:
    """
    What an earlier run has kept.
    """

    def test_an_interrupted_run_goes_on_where_it_stopped(
        self, files: list[str], specs: list[ModelSpec], tmp_path: Path
    ) -> None:
        """
        Only what is missing is run, and only models that miss something are loaded.
        """

        def stop(progress: Progress) -> None:
            if progress.done == 4 and progress.stage == "done":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compared(files, specs, out=tmp_path, progress=stop)
        assert not (tmp_path / "report.html").exists()
        steps: list[Progress] = []
        found = compared(files, specs, out=tmp_path, progress=steps.append)
        assert [each.is_kept for each in found.results] == [True] * 4 + [False] * 2
        assert [each.loads for each in found.models] == [0, 1]
        assert (found.loads, found.loads_saved) == (1, 0)
        assert found.models[0].load_s > 0
        assert [each.done for each in steps if each.stage == "done"] == [5, 6]
        assert steps[-1].fraction == 1
        assert "4 of 6 results" in found.notes[-1]

    def test_nothing_is_run_again_without_need(
        self, files: list[str], specs: list[ModelSpec], tmp_path: Path
    ) -> None:
        """
        A file under another name is the same file; new references are scored at once.
        """
        before = compared(files, specs, out=tmp_path)
        moved = Path(files[0]).rename(tmp_path / "moved.wav")
        said: dict[str, Reference | str] = {"moved.wav": "beta speaks"}
        after = compared([str(moved)], specs, references=said, out=tmp_path)
        assert after.loads == 0
        assert [each.wer for each in after.results] == [1.0, 0.0]
        assert [each.text for each in after.results] == [
            each.text for each in before.results if each.file == files[0]
        ]

    @pytest.mark.slow
    def test_what_has_changed_is_run_again(
        self, files: list[str], tmp_path: Path
    ) -> None:
        """
        Other audio, other options, other weights, or because it was asked for.
        """
        model = micro_copy(tmp_path / "model", "old words")
        chosen = [ModelSpec("mine", str(model))]

        def again(*, beam_size: int = 1, resume: bool = True) -> list[bool]:
            found = compared(
                files, chosen, out=tmp_path, beam_size=beam_size, resume=resume
            )
            return [not each.is_kept for each in found.results]

        assert again() == [True, True, True]
        assert again() == [False, False, False]
        noise(Path(files[1]), 99)
        assert again() == [False, True, False]
        assert again(beam_size=2) == [True, True, True]
        micro_copy(model, "new words")
        assert again() == [True, True, True]
        assert again() == [False, False, False]
        assert again(resume=False) == [True, True, True]

    def test_a_torn_line_costs_one_result(
        self, files: list[str], specs: list[ModelSpec], tmp_path: Path
    ) -> None:
        """
        The next one begins a line of its own.
        """
        compared(files, specs[:1], out=tmp_path)
        kept = tmp_path / run.RESULTS
        whole = kept.read_bytes()
        kept.write_bytes(whole[:-20])
        second = compared(files, specs[:1], out=tmp_path)
        assert [each.is_kept for each in second.results] == [True, True, False]
        third = compared(files, specs[:1], out=tmp_path)
        assert all(each.is_kept for each in third.results)
        assert third.models[0].load_s == second.models[0].load_s

    @given(
        st.binary(max_size=60)
        | st.from_regex(r'\{"(result|load)": .*\}').map(str.encode)
    )
    def test_a_file_of_anything_does_not_stop_it(self, rubbish: bytes) -> None:
        """
        It counts as not there.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "results.jsonl")
            path.write_bytes(rubbish)
            assert Store(path, resume=True).results.get("x") is None
