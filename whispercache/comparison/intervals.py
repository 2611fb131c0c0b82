"""
Confidence intervals of differences, by the bootstrap over files.

Files are drawn with replacement, as often as there are files, and the rate is computed
again: errors in all drawn files as a share of the words in them. What is drawn is the
same for all models, so two models are compared on the same files.

Source: Bisani and Ney, Bootstrap Estimates for Confidence Intervals in ASR Performance
Evaluation, ICASSP 2004.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .values import Difference, Interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

CONFIDENCE = 0.95
SEED = 0
FEW_FILES = 6
"""
Fewest files on which a model is called better.

Source: of n files all may favour one model by chance, with probability 2 / 2**n; that
is below 5 % from 6 on.
"""

_LEAST_FILES = 2
_BATCH = 4_000_000


@dataclass(frozen=True, slots=True)
class Count:
    """
    A file: its words, and the errors of one model or of two.
    """

    words: int
    first: int
    second: int = 0


def bootstrap(counts: Sequence[Count], resamples: int) -> Interval | None:
    """
    Returns the interval of the first model's error rate less the second's; None if
    words were said in fewer than two files. The same seed each time, so equal files
    have equal intervals.

    Source: percentiles, moved outwards for few files by Hesterberg's rule (What
    Teachers Should Know About the Bootstrap, The American Statistician, 2015).
    """
    if sum(count.words > 0 for count in counts) < _LEAST_FILES:
        return None
    import numpy as np
    from scipy import stats

    def rate(
        errors: NDArray[np.int64], words: NDArray[np.int64], axis: int = -1
    ) -> NDArray[np.float64]:
        said = words.sum(axis=axis)
        share = np.full(np.shape(said), np.nan)
        # A draw of silent files has no rate.
        np.divide(errors.sum(axis=axis), said, out=share, where=said > 0)
        return share

    errors = np.array([count.first - count.second for count in counts])
    words = np.array([count.words for count in counts])
    with warnings.catch_warnings():
        # Draws without a rate, which `nanquantile` leaves out.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        drawn = stats.bootstrap(
            (errors, words),
            rate,
            n_resamples=resamples,
            # Memory for the draws stays bounded with many files.
            batch=max(1, _BATCH // len(counts)),
            paired=True,
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(SEED),
        ).bootstrap_distribution
    # Plain percentiles are too narrow with few files.
    tail = _tail(len(counts))
    low, high = np.nanquantile(drawn, (tail, 1 - tail))
    return Interval(float(low), float(high))


def _tail(n_files: int) -> float:
    """
    Returns the share of the draws to cut off at each end.
    """
    from scipy import stats

    t = stats.t.ppf((1 + CONFIDENCE) / 2, n_files - 1)
    return float(stats.norm.cdf(-math.sqrt(n_files / (n_files - 1)) * t))


def tell_apart(
    first: str, second: str, counts: Sequence[Count], resamples: int
) -> Difference:
    """
    Returns the difference of two models, and names the better one if there is one.
    """
    words = sum(count.words for count in counts)
    n_files = sum(count.words > 0 for count in counts)
    if not words:
        verdict = f"{first} and {second}: nothing was said in these files."
        return Difference(first, second, len(counts), None, None, None, verdict)
    # Pooled, as the models' own rates are.
    wer = sum(count.first - count.second for count in counts) / words
    interval = bootstrap(counts, resamples)
    ahead, behind = (second, first) if wer > 0 else (first, second)
    is_clear = interval is not None and not interval.low <= 0 <= interval.high
    # Both tests: with very few files an interval may exclude zero by chance.
    better = ahead if is_clear and n_files >= FEW_FILES else None
    if all(count.first == count.second for count in counts):
        where = " in each file" if n_files > 1 else ""
        verdict = f"{first} and {second} made equally many word errors{where}"
    elif better:
        verdict = f"{better} is better than {behind}: {_points(wer)} fewer word errors"
    elif wer:
        verdict = f"{ahead} made {_points(wer)} fewer word errors than {behind}"
    else:
        verdict = f"{first} and {second} made equally many word errors in all"
    if interval and interval.low < interval.high:
        verdict += f", 95 % interval {_span(interval, wer)}"
    if interval and wer and not better:
        verdict = f"No clear difference: {verdict}"
    if n_files < FEW_FILES:
        verdict += f"; {_too_few(n_files)}"
    return Difference(first, second, len(counts), wer, interval, better, f"{verdict}.")


def _points(share: float) -> str:
    """
    Returns a difference of rates: ``"3.1 points"``, in hundredths of what was said.
    """
    text = f"{abs(share) * 100:.1f} points"
    return "under 0.1 points" if text == "0.0 points" else text


def _span(interval: Interval, wer: float) -> str:
    """
    Returns an interval from the better model's view.
    """
    low, high = interval.low, interval.high
    if wer <= 0:
        low, high = -high, -low
    if low >= 0:
        return f"{low * 100:.1f} to {high * 100:.1f}"
    return f"from {-low * 100:.1f} more to {high * 100:.1f} fewer"


def _too_few(n_files: int) -> str:
    if n_files < _LEAST_FILES:
        return "one file tells nothing of chance"
    return f"{n_files} files are too few to tell it from chance"
