"""
Comparisons of models on files, as a program asks for them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from compared import ONE_THREAD, compared, files_of_noise, specs_of
from real import (
    child,
    clip,
    packaged,
    reference,
)

from whispercache import ModelCache, UnknownModel
from whispercache.comparison import (
    Edit,
    Progress,
    Reference,
    Tally,
    compare,
    run,
)
from whispercache.comparison.report import REPORTS
from whispercache.engine.naming import ModelSpec
from whispercache.events import Event, ModelLoaded, ModelStillReferenced

files = files_of_noise()
specs = specs_of("alpha speaks english", "beta speaks")


class TestRun:
    """
    Models on files, with micro models.
    """

    def test_each_model_is_loaded_once_and_leaves(
        self, files: list[str], specs: list[ModelSpec]
    ) -> None:
        """
        Model by model: two loads where file by file would have taken six.
        """
        events: list[Event] = []
        with ModelCache() as cache:
            cache.subscribe(events.append)
            found = compared(files, specs, cache=cache)
            assert not cache.models()
        loaded = [event for event in events if isinstance(event, ModelLoaded)]
        assert len(loaded) == found.loads == 2
        assert not any(isinstance(event, ModelStillReferenced) for event in events)
        assert found.loads_saved == 4
        assert [each.loads for each in found.models] == [1, 1]
        names = [(each.model, Path(each.file).stem) for each in found.results]
        assert names == [(m, f) for m in ("alpha", "beta") for f in ("0", "1", "2")]
        assert {each.text for each in found.results if each.model == "beta"} == {
            "beta speaks"
        }

    @pytest.mark.slow
    def test_the_figures_are_those_of_the_work(
        self, files: list[str], specs: list[ModelSpec]
    ) -> None:
        """
        Times go into each other, and rates are the quotients that they claim to be.
        """
        found = compared(files, specs)
        for each in found.results:
            assert each.latency_s is not None
            assert 0 < each.latency_s <= each.work_s
            assert each.duration_s == pytest.approx(0.5)
            assert each.real_time_factor == pytest.approx(each.work_s / 0.5)
            assert not each.is_kept
        for model in found.models:
            mine = [each for each in found.results if each.model == model.name]
            assert model.work_s == pytest.approx(sum(each.work_s for each in mine))
            assert model.load_s > 0
            assert model.warm_up_s > 0
            assert model.weights_bytes > 0
            assert model.files == 3
            assert model.peak_bytes is not None
            assert model.peak_bytes >= max(each.peak_bytes or 0 for each in mine)

    def test_errors_are_pooled_over_the_files(
        self, files: list[str], specs: list[ModelSpec]
    ) -> None:
        """
        As a share of all words said; what is heard in silence counts too.
        """
        said: dict[str, Reference | str] = {
            files[0]: "Alpha speaks English!",
            files[1]: "alpha",
            files[2]: Reference("", "en"),
        }
        alpha, beta = compared(files, specs, references=said).models
        assert alpha.words == Tally(hits=4, insertions=5)
        assert alpha.wer == pytest.approx(5 / 4)
        assert beta.words == Tally(1, 2, 1, 3)

    @pytest.mark.slow
    def test_models_agree_as_far_as_they_share_words(
        self, files: list[str], specs: list[ModelSpec]
    ) -> None:
        """
        "alpha speaks english" and "beta speaks" share one word of three; no reference
        is needed, and without one there is no rate.
        """
        found = compared(files, [*specs, ModelSpec("again", specs[1].model, "float32")])
        assert [round(each.share or 0, 3) for each in found.agreements] == [0.333]
        back = compared(files, specs[::-1]).agreements
        assert [each.share for each in back] == [
            each.share for each in found.agreements
        ]
        assert not found.differences
        assert {each.wer for each in found.results} == {None}
        assert found.models[0].wer_interval is None

    def test_a_model_named_twice_is_run_once(
        self, files: list[str], specs: list[ModelSpec]
    ) -> None:
        """
        And the reader is told.
        """
        found = compared(files[:1], [specs[0], ModelSpec("twin", specs[0].model)])
        assert [each.name for each in found.models] == ["alpha"]
        assert found.notes[0].startswith("twin is the same model as alpha")

    def test_models_of_one_name_are_told_apart(
        self, files: list[str], specs: list[ModelSpec]
    ) -> None:
        """
        By a number.
        """
        found = compared(files[:1], [ModelSpec("m", each.model) for each in specs])
        assert [each.model for each in found.results] == ["m", "m-2"]

    def test_a_file_that_cannot_be_decoded_is_passed_over(
        self, files: list[str], specs: list[ModelSpec], tmp_path: Path
    ) -> None:
        """
        It is named once, and the others are compared.
        """
        bad = tmp_path / "bad.wav"
        bad.write_text("no audio")
        asked = [str(bad), str(tmp_path / "none.wav"), files[0]]
        found = compared(asked, specs, out=tmp_path / "out")
        assert sorted(each.file for each in found.failures) == sorted(asked[:2])
        assert [each.file for each in found.results] == [files[0]] * 2
        assert (tmp_path / "out" / "report.html").exists()

    def test_with_no_file_left_there_is_still_a_report(
        self, specs: list[ModelSpec], tmp_path: Path
    ) -> None:
        """
        That says why, without a load.
        """
        found = compared([str(tmp_path / "none.wav")], specs, out=tmp_path)
        assert (found.loads, found.results) == (0, ())
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert "Nothing was heard." in page
        assert "none.wav was passed over: No such file or directory" in page

    def test_a_model_that_cannot_be_had_stops_it_before_the_first_load(
        self, files: list[str], specs: list[ModelSpec]
    ) -> None:
        """
        Not after an hour with the others.
        """
        seen: list[Progress] = []
        with pytest.raises(UnknownModel):
            compared(files, [*specs, "tiny.xx"], progress=seen.append)
        assert not seen

    @pytest.mark.parametrize(
        ("files", "models", "error"),
        [
            ([], ["base"], ValueError),
            (["a.wav"], [], ValueError),
            (["a.wav"], "base", TypeError),
            (["a.wav"], ["base:int99"], ValueError),
        ],
    )
    def test_nonsense_is_refused(
        self, files: list[str], models: list[str], error: type[Exception]
    ) -> None:
        """
        At once.
        """
        with pytest.raises(error):
            compare(files, models=models)

    def test_a_missing_extra_is_named(
        self, files: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        With how to install it, before anything is run.
        """
        monkeypatch.setattr(run, "find_spec", lambda _name: None)
        with pytest.raises(ModuleNotFoundError, match=r"whispercache\[compare\]"):
            compare(files, models=["base"])

    @pytest.mark.process
    def test_importing_it_brings_none_of_its_libraries(self) -> None:
        """
        Neither what scores nor what draws nor what runs models.
        """
        heavy = "jiwer scipy numpy jinja2 whisper_normalizer rich faster_whisper"
        code = "import sys, whispercache.comparison.command\nprint(*sys.modules)"
        result = child(code)
        assert result.stderr == ""
        assert not {*heavy.split()} & {*result.stdout.split()}


@pytest.mark.process
class TestReal:
    """
    Real models on real speech.
    """

    def test_two_models_on_two_clips(self, tmp_path: Path) -> None:
        """
        Both understand the bread; on two voices tiny.en takes bread for red.
        """
        clips = [clip("en-bread"), clip("en-two-voices")]
        found = compare(
            clips,
            models=[
                f"tiny.en={packaged('tiny.en')}",
                f"base={packaged('base')}:int8",
            ],
            references=Path(clips[0]).parent / "references.tsv",
            device="cpu",
            load_options=ONE_THREAD,
            out=tmp_path,
            resamples=200,
        )
        assert [each.wer for each in found.results] == [0, pytest.approx(1 / 19), 0, 0]
        assert found.results[0].text == reference("en-bread")
        assert Edit("substitute", "bread", "red") in found.results[1].edits
        tiny, base = found.models
        assert (tiny.compute_type, base.compute_type) == ("float32", "int8_float32")
        assert base.cer == 0
        assert tiny.real_time_factor is not None
        # What the kernel says that the process grew by is near what the cache counts.
        for model in found.models:
            assert model.peak_bytes is not None
            assert model.peak_bytes > 0.5 * model.weights_bytes
        (difference,) = found.differences
        assert difference.better is None
        assert difference.wer == pytest.approx(1 / 26)
        assert "2 files are too few" in difference.verdict
        (agreement,) = found.agreements
        assert agreement.share == pytest.approx(25 / 26)
        assert [each.language for each in found.files] == ["en", "en"]
        assert {*map(str, REPORTS)} < {each.name for each in tmp_path.iterdir()}
