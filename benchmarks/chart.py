"""
Bar charts of results, for the README.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from report import RESULTS, today

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

# Okabe and Ito's greys and blues: told apart by lightness, too. For light pages, and
# for dark ones.
COLOURS = {
    False: ("#999999", "#cccccc", "#56b4e9", "#0072b2", "#003366"),
    True: ("#888888", "#555555", "#0072b2", "#56b4e9", "#cfe8fa"),
}
INK = {False: "#333333", True: "#dddddd"}
WIDTH_INCHES, ROW_INCHES = 8.0, 2.6
PAD_INCHES = 0.1
DOTS_PER_INCH = 200


class Panel(NamedTuple):
    """
    One group of bars for each of *groups*.

    Attributes:
        title: What all of them have in common.
        groups: What stands below each group.
        bars: A bar's name and its length in each group.
    """

    title: str
    groups: Sequence[str]
    bars: Mapping[str, Sequence[float]]


def draw(name: str, title: str, rows: Sequence[Sequence[Panel]]) -> list[Path]:
    """
    Draw panels with one scale, the same bars in each, and keep them as two PNGs under
    ``results/``, for light and for dark pages; their paths.
    """
    return [_draw(name, title, rows, dark=dark) for dark in (False, True)]


def _draw(
    name: str, title: str, rows: Sequence[Sequence[Panel]], *, dark: bool
) -> Path:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    style = {"font.size": 10, "text.color": INK[dark], "axes.labelcolor": INK[dark]}
    with plt.style.context(["dark_background" if dark else "default", style]):
        figure, grid = plt.subplots(
            len(rows),
            len(rows[0]),
            figsize=(WIDTH_INCHES, ROW_INCHES * len(rows) + 0.7),
            sharey=True,
            squeeze=False,
        )
        figure.set_layout_engine("constrained", w_pad=PAD_INCHES, h_pad=PAD_INCHES)
        for line, panels in zip(grid, rows, strict=True):
            for axes, panel in zip(line, panels, strict=True):
                _panel(axes, panel, dark=dark)
        top = max(max(each) for row in rows for p in row for each in p.bars.values())
        grid[0][0].set_ylim(0, 1.12 * top)
        figure.legend(
            *grid[0][0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=3,
            frameon=False,
            handlelength=1.0,
            columnspacing=1.4,
        )
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}-{today()}{'-dark' if dark else ''}.png"
        figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)
    return path


def _panel(axes: Axes, panel: Panel, *, dark: bool) -> None:
    width = 0.86 / len(panel.bars)
    for place, (name, lengths) in enumerate(panel.bars.items()):
        shift = width * (place - (len(panel.bars) - 1) / 2)
        drawn = axes.bar(
            [group + shift for group in range(len(panel.groups))],
            lengths,
            width * 0.94,
            label=name,
            color=COLOURS[dark][place],
        )
        axes.bar_label(drawn, fmt="%.2f", fontsize=8.5, padding=1.5, color=INK[dark])
    axes.set_xticks(range(len(panel.groups)), panel.groups)
    axes.set_title(panel.title, fontsize=10.5, loc="left")
    axes.tick_params(length=0, colors=INK[dark])
    axes.yaxis.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
