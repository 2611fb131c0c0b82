"""
Blackwell: cards that a cuBLAS before 12.8 does not know, over the fake drivers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fakes import ONE_CARD, FakeGpus, build_library, needs_linux, run_child
from real import TEXT, micro
from standin import NOT_SUPPORTED, run_on_cards

from whispercache.cli import doctor
from whispercache.devices import release
from whispercache.testing import FakeLoader, FakeMachine

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_linux

INT8 = ("int8", "int8_float32", "int8_float16", "int8_bfloat16")

_PROLOGUE = """
from standin.child import *
from whispercache import events
from whispercache.devices import release
from whispercache.errors import LoadFailed
MODEL = os.environ["MODEL"]
release.cublas_version = lambda: (12, 4)
answer = {}
"""

# A library that says that it is 12.4.5.
_TINY = """
int cublasGetProperty(int kind, int *value) {
    *value = kind == 0 ? 12 : kind == 1 ? 4 : 5;
    return kind > 2;
}
"""


def _run(gpus: FakeGpus, code: str, **conduct: Any) -> dict[str, Any]:
    """
    What *code* put into ``answer``, on a card of Blackwell's.
    """
    gpus.set_state(f"{ONE_CARD}\ncapability 0 12 0")
    model = str(micro())
    answer = run_on_cards(gpus, _PROLOGUE + code, conduct=conduct, MODEL=model)
    assert isinstance(answer, dict)
    return answer


@pytest.mark.process
class TestLoads:
    """
    A load in int8 says what is too old, before weights are read; float16 works.
    """

    def test_the_error_has_both_cures_and_the_ladder_goes_on(
        self, gpus: FakeGpus
    ) -> None:
        """
        Refused, and then, in place of it, what was asked for next, with an event that
        says why.
        """
        answer = _run(
            gpus,
            """
with open_cache() as cache:
    try:
        cache.get_model(MODEL, "cuda", "int8_float16").transcribe(SILENCE)
    except LoadFailed as error:
        answer["error"] = str(error)
    answer["read"] = done("load")
    model = cache.get_model(MODEL, "cuda", "int8_float16", fallback=["float16"])
    segments, _ = model.transcribe(SILENCE)
    answer["text"] = "".join(segment.text for segment in segments)
    answer["served by"] = model.served_by.compute_type
    answer["reason"] = last(events.FellBack).reason
    check(cache)
""",
            refused_types=INT8,
        )
        assert "int8_float16" in answer["error"]
        assert NOT_SUPPORTED in answer["error"]
        assert "cuBLAS 12.4 is older than Alpha (sm_120)" in answer["error"]
        assert "needs 12.8 or later" in answer["error"]
        assert "pip install -U nvidia-cublas-cu12" in answer["error"]
        assert "compute_type='float16'" in answer["error"]
        assert "\n" not in answer["error"]
        assert answer["read"] == []
        assert answer["served by"] == "float16"
        assert answer["text"] == TEXT
        assert "cuBLAS 12.4 is older" in answer["reason"]

    def test_what_only_the_model_itself_shows_is_explained_and_freed(
        self, gpus: FakeGpus
    ) -> None:
        """
        The primer passed, the model's first window does not: nothing of it stays.
        """
        answer = _run(
            gpus,
            """
with open_cache() as cache:
    cache.get_model(MODEL, "cuda", "int8_float16").detect_language(SILENCE)
    cache.evict(MODEL)
    settle(cache)
    standin.behave(refused_types=["int8_float16"])
    try:
        cache.get_model(MODEL, "cuda", "int8_float16").detect_language(SILENCE)
    except LoadFailed as error:
        answer["error"] = str(error)
        answer["books"] = standin.books().used
    check(cache)
""",
        )
        assert "cuBLAS 12.4 is older than Alpha (sm_120)" in answer["error"]
        assert answer["books"] == 0

    def test_with_a_new_library_both_are_to_be_updated(self, gpus: FakeGpus) -> None:
        """
        CTranslate2 before 4.7 failed with any. In float16 another device is advised.
        """
        answer = _run(
            gpus,
            """
release.cublas_version = lambda: (12, 9)
with open_cache() as cache:
    for compute_type in ("int8", "float16"):
        try:
            cache.get_model(MODEL, "cuda", compute_type).transcribe(SILENCE)
        except LoadFailed as error:
            answer[compute_type] = str(error)
""",
            refused_types=(*INT8, "float16"),
        )
        update = "pip install -U nvidia-cublas-cu12 ctranslate2, or take"
        assert f"{update} compute_type='float16'" in answer["int8"]
        assert f"{update} another device, such as 'cpu'" in answer["float16"]
        assert "is older than" not in answer["int8"]


class TestVersion:
    """
    The version of cuBLAS, and what it means for a card.
    """

    @pytest.mark.process
    def test_the_library_is_asked_itself(self, tmp_path: Path) -> None:
        """
        Without a card, and without a toolkit.
        """
        source = tmp_path / "tiny.c"
        source.write_text(_TINY)
        build_library(tmp_path / "libcublas.so.12", source)
        child = run_child(
            "from whispercache.devices.cublas import cublas_version\n"
            "print(cublas_version())",
            LD_LIBRARY_PATH=str(tmp_path),
        )
        assert (child.stdout, child.stderr) == ("(12, 4)\n", "")

    @pytest.mark.process
    @pytest.mark.parametrize("text", ["int other(void) { return 0; }\n", None])
    def test_one_that_does_not_tell_or_is_missing_has_none(
        self, tmp_path: Path, text: str | None
    ) -> None:
        """
        No error: that it is missing is told elsewhere.
        """
        if text is not None:
            source = tmp_path / "tiny.c"
            source.write_text(text)
            build_library(tmp_path / "libcublas.so.12", source)
        child = run_child(
            """
            from whispercache.devices import cublas
            cublas._packaged_folder = lambda: None
            print(cublas.cublas_version())
            """,
            LD_LIBRARY_PATH=str(tmp_path),
        )
        assert (child.stdout, child.stderr) == ("None\n", "")

    @pytest.mark.parametrize(
        ("capability", "version", "is_too_old"),
        [
            ((12, 0), (12, 4), True),
            ((10, 0), (12, 7), True),
            ((12, 1), (12, 8), False),
            ((12, 0), (13, 0), False),
            ((12, 0), None, False),
            ((9, 0), (12, 0), False),
            ((8, 6), (11, 0), False),
        ],
    )
    def test_only_new_cards_need_a_new_library(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capability: tuple[int, int],
        version: tuple[int, int] | None,
        is_too_old: bool,  # noqa: FBT001
    ) -> None:
        """
        From compute capability 10 on, 12.8.
        """
        card = _Card(capability)
        monkeypatch.setattr(release, "_find", lambda _device: (card, 0))
        monkeypatch.setattr(release, "cublas_version", lambda: version)
        reason = release.cublas_reason("cuda:0")
        assert bool(reason) is is_too_old
        if is_too_old:
            major, minor = capability
            assert f"Alpha (sm_{major}{minor}), which needs 12.8 or later" in reason

    def test_without_a_driver_nothing_is_said(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        As on ROCm.
        """
        monkeypatch.setattr(release, "_find", lambda _device: None)
        assert release.cublas_reason("cuda:0") == ""


class _Card:
    """
    A driver with one card of a compute capability.
    """

    def __init__(self, capability: tuple[int, int]) -> None:
        self._capability = capability

    def compute_capability(self, _ordinal: int) -> tuple[int, int]:
        """
        The same for all.
        """
        return self._capability

    def name(self, _ordinal: int) -> str:
        """
        Likewise.
        """
        return "Alpha"


class TestDoctor:
    """
    ``whispercache doctor`` knows it before a model fails.
    """

    @pytest.fixture(autouse=True)
    def _healthy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "driver_version", lambda: "580.95.05")
        monkeypatch.setattr(doctor, "nvml_problem", lambda: None)
        monkeypatch.setattr(doctor, "cublas_problem", lambda: None)

    def found(self) -> list[doctor.Finding]:
        """
        What it says of cuBLAS, on a machine with two cards.
        """
        machine = FakeMachine({"cpu": "8GiB", "cuda:0": "8GiB", "cuda:1": "8GiB"})
        findings = doctor.examine(FakeLoader(machine), machine)
        return [each for each in findings if each.subject == "cuBLAS"]

    def test_one_that_is_too_old_is_wrong(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Once for all cards of a kind, with the line that mends it.
        """
        reason = "cuBLAS 12.4 is older than Alpha (sm_120), which needs 12.8 or later"
        monkeypatch.setattr(doctor, "cublas_reason", lambda _device: reason)
        (found,) = self.found()
        assert found.mark == "wrong"
        assert found.text.startswith(reason)
        assert found.mend.startswith("pip install -U nvidia-cublas-cu12")
        assert "float16" in found.mend

    @pytest.mark.parametrize(
        ("version", "text"), [((12, 9), "version 12.9"), (None, "version 12 ")]
    )
    def test_one_that_will_do_is_told_with_its_version(
        self,
        monkeypatch: pytest.MonkeyPatch,
        version: tuple[int, int] | None,
        text: str,
    ) -> None:
        """
        As far as it tells it.
        """
        monkeypatch.setattr(doctor, "cublas_reason", lambda _device: "")
        monkeypatch.setattr(doctor, "cublas_version", lambda: version)
        (found,) = self.found()
        assert found.mark == "works"
        assert text in found.text
