"""
Amounts as people write them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whispercache.units import Limit, parse_duration, parse_limit, parse_seconds

MIB = 1024**2
GIB = 1024**3

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**30),
    st.floats(),
    st.text(),
    st.binary(),
    st.lists(st.integers()),
    st.from_regex(r"[-+]?[0-9.]{1,30} ?[A-Za-z%µ]{0,4}", fullmatch=True),
)


def check_message(text: str, name: str) -> None:
    """
    An error is one line that begins with the parameter's name.
    """
    assert text.startswith(name)
    assert len(text.splitlines()) == 1


class TestLimit:
    """
    Memory limits.
    """

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (None, Limit()),
            ("auto", Limit()),
            (" AUTO ", Limit()),
            (10 * GIB, Limit(n_bytes=10 * GIB)),
            (MIB, Limit(n_bytes=MIB)),
            (np.int64(2 * GIB), Limit(n_bytes=2 * GIB)),
            (0.8, Limit(fraction=0.8)),
            (1.0, Limit(fraction=1.0)),
            ("10GiB", Limit(n_bytes=10 * GIB)),
            ("512MiB", Limit(n_bytes=512 * MIB)),
            ("10GB", Limit(n_bytes=10**10)),
            ("3kB", Limit(n_bytes=3000)),
            ("1 TiB", Limit(n_bytes=1024 * GIB)),
            ("1TB", Limit(n_bytes=10**12)),
            ("1.5 GiB", Limit(n_bytes=1536 * MIB)),
            ("8g", Limit(n_bytes=8 * GIB)),
            ("512M", Limit(n_bytes=512 * MIB)),
            ("8Gi", Limit(n_bytes=8 * GIB)),
            ("100B", Limit(n_bytes=100)),
            ("80%", Limit(fraction=0.8)),
            ("100 %", Limit(fraction=1.0)),
            ("0.8", Limit(fraction=0.8)),
            ("1.0", Limit(fraction=1.0)),
            ("10737418240", Limit(n_bytes=10 * GIB)),
        ],
    )
    def test_each_way_to_write_a_limit_is_read(
        self, value: float | str | None, expected: Limit
    ) -> None:
        """
        Bytes, fractions and text with binary, decimal and no units.
        """
        assert parse_limit(value, "vram") == expected

    @pytest.mark.parametrize(
        "value",
        [
            *(0, 1, -1, 80, MIB - 1, -(10**30)),
            *(0.0, -0.5, 1.0001, 8e9, math.nan, math.inf, -math.inf),
            *("", " ", "lots", "GiB", "-1GiB", "0", "1", "0GiB", "0.1B", "1,5 GiB"),
            *("10 PiB", "1e9", "0%", "101%", "nan", "inf", "1.5", "1.0.0GiB", "٣GiB"),
            *("9" * 40, "1 G iB", "0x10GiB", "1_000MB"),
        ],
    )
    def test_nonsense_is_refused_in_one_line_that_names_the_parameter(
        self, value: float | str
    ) -> None:
        """
        A value that is not positive, too small, or unreadable is a ValueError.
        """
        with pytest.raises(ValueError, match=r"^vram\b") as caught:
            parse_limit(value, "vram")
        assert "\n" not in str(caught.value)
        assert "GiB'" in str(caught.value) or "byte" in str(caught.value)

    def test_a_number_too_long_to_print_is_refused_without_printing_it(self) -> None:
        """
        The interpreter itself refuses to write out so many digits.
        """
        with pytest.raises(ValueError, match=r"^vram=a huge number would be"):
            parse_limit(-(10**5000), "vram")

    @pytest.mark.parametrize("value", [True, False, b"10GiB", [1], {}, object()])
    def test_other_types_are_refused(self, value: Any) -> None:
        """
        A bool is no number here, and bytes are no text.
        """
        with pytest.raises(TypeError, match=r"^ram must be a number or text, not \w+$"):
            parse_limit(value, "ram")

    def test_a_misplaced_whole_number_is_told_what_to_write(self) -> None:
        """
        ``vram=1`` means one byte, which is never meant.
        """
        with pytest.raises(
            ValueError,
            match=r"give bytes, e\.g\. '10GiB', or a fraction such as 0\.8",
        ):
            parse_limit(1, "vram")

    def test_a_limit_in_bytes_holds_whatever_the_device_has(self) -> None:
        """
        It is not clipped, and a fraction is a fraction of the device.
        """
        assert parse_limit("10GiB").of(8 * GIB) == 10 * GIB
        assert parse_limit(0.5).of(8 * GIB) == 4 * GIB
        assert Limit(fraction=0.25).of(8 * GIB) == 2 * GIB
        assert parse_limit("auto").of(8 * GIB) is None

    @given(
        st.integers(1, 10**15),
        st.sampled_from(["KiB", "MiB", "GiB", "TiB", "kB", "MB", "GB", "TB", "B"]),
    )
    def test_whole_amounts_are_exact(self, amount: int, unit: str) -> None:
        """
        No rounding, however large the number.
        """
        power = " kmgt".index(unit[0].lower()) if unit != "B" else 0
        base = 1024 if "i" in unit else 1000
        assert parse_limit(f"{amount}{unit}").n_bytes == amount * base**power

    @given(st.integers(1, 10**6), st.integers(0, 10**6 - 1))
    def test_decimal_amounts_are_exact(self, whole: int, millionths: int) -> None:
        """
        The parts behind the point are counted in whole bytes, rounded down.
        """
        expected = (whole * 10**6 + millionths) * GIB // 10**6
        assert parse_limit(f"{whole}.{millionths:06}GiB").n_bytes == expected

    @given(st.floats(min_value=0, max_value=1, exclude_min=True), st.integers(0, 2**40))
    def test_a_fraction_is_never_more_than_the_device(
        self, fraction: float, total_bytes: int
    ) -> None:
        """
        Rounding never gives a byte that is not there.
        """
        found = parse_limit(fraction).of(total_bytes)
        assert found is not None
        assert 0 <= found <= total_bytes

    @given(anything)
    def test_whatever_is_given_the_limit_is_sound_or_refused(self, value: Any) -> None:
        """
        A Limit with one of its fields at the most, a ValueError or a TypeError.
        """
        try:
            limit = parse_limit(value, "vram")
        except (ValueError, TypeError) as error:
            check_message(str(error), "vram")
            return
        assert limit.n_bytes is None or limit.n_bytes >= 1
        assert limit.fraction is None or 0 < limit.fraction <= 1
        assert None in (limit.n_bytes, limit.fraction)


class TestDuration:
    """
    Durations, in Ollama's words.
    """

    @pytest.mark.parametrize(
        ("value", "seconds"),
        [
            *((300, 300.0), (0, 0.0), (2.5, 2.5), (-0.0, 0.0), (np.int32(7), 7.0)),
            *((-1, math.inf), (-0.1, math.inf), (math.inf, math.inf)),
            *((-math.inf, math.inf), (10**400, math.inf), (-(10**400), math.inf)),
            *(("300", 300.0), ("0", 0.0), ("2.5", 2.5), ("-1", math.inf)),
            *(("5m", 300.0), ("1h30m", 5400.0), ("1.5h", 5400.0), ("+10s", 10.0)),
            *(("250ms", 0.25), ("3us", 3e-6), ("3µs", 3e-6), ("3μs", 3e-6)),
            *(("4ns", 4e-9), ("-1m", math.inf), ("-0s", 0.0), (" 5m ", 300.0)),
            *(("2h0m1s", 7201.0), ("1m1m", 120.0)),
        ],
    )
    def test_each_way_to_write_a_duration_is_read(
        self, value: float | str, seconds: float
    ) -> None:
        """
        Numbers, numbers as text, Go's notation, and anything negative for never.
        """
        found = parse_duration(value, "keep_alive")
        assert found == pytest.approx(seconds)
        assert math.copysign(1, found) == 1

    @pytest.mark.parametrize(
        "value",
        [
            *("", "-", "soon", "5 m", "5x", "1d", "m", "1h-30m", "1e3", "nan", "inf"),
            *("5m\n3", "1..5s", "9" * 40, "--1", "٣s", math.nan),
        ],
    )
    def test_nonsense_is_refused_in_one_line_that_names_the_parameter(
        self, value: float | str
    ) -> None:
        """
        A value that cannot be read, or is no number, is a ValueError.
        """
        with pytest.raises(ValueError, match=r"^keep_alive must be ") as caught:
            parse_duration(value, "keep_alive")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("value", [None, True, b"5m", [5], object()])
    def test_other_types_are_refused(self, value: Any) -> None:
        """
        None too: -1 means no limit.
        """
        with pytest.raises(TypeError, match=r"^keep_alive must be a number or text"):
            parse_duration(value, "keep_alive")

    @given(st.integers(0, 10**6), st.integers(0, 59), st.integers(0, 59))
    def test_what_is_written_out_is_read_back(
        self, hours: int, minutes: int, seconds: int
    ) -> None:
        """
        Hours, minutes and seconds add up.
        """
        expected = hours * 3600 + minutes * 60 + seconds
        assert parse_duration(f"{hours}h{minutes}m{seconds}s") == expected
        assert parse_duration(str(expected)) == expected
        assert parse_duration(expected) == expected

    @given(anything)
    def test_whatever_is_given_the_duration_is_sound_or_refused(
        self, value: Any
    ) -> None:
        """
        Seconds of zero or more, a ValueError or a TypeError.
        """
        try:
            seconds = parse_duration(value, "keep_alive")
        except (ValueError, TypeError) as error:
            check_message(str(error), "keep_alive")
            return
        assert seconds >= 0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(0, 0.0), (2.5, 2.5), ("5s", 5.0), ("1m30s", 90.0), (math.inf, math.inf)],
)
def test_seconds_are_numbers_or_text(value: Any, seconds: float) -> None:
    """
    As durations are.
    """
    assert parse_seconds(value, "patience_s") == seconds


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (-1, ValueError),
        (-0.5, ValueError),
        ("-5m", ValueError),
        (math.nan, ValueError),
        ("soon", ValueError),
        (None, TypeError),
        (True, TypeError),
    ],
)
def test_what_is_negative_is_no_time(value: Any, kind: type[Exception]) -> None:
    """
    Where it would not mean for ever.
    """
    with pytest.raises(kind, match=r"^patience_s must be "):
        parse_seconds(value, "patience_s")
