"""Small drawings as inline SVG that take their colours from the page.

matplotlib draws with stand-in colours; these are then replaced by `currentColor` and the page's
`--series-…`, so that one drawing serves light and dark. No text of the user's enters a drawing.
`name` makes the ids of a drawing unique on the page; `title` is read by screen readers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

from .text import share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = 4  # as many colours as the style sheet has
_INK = "#010203"
_COLOURS = [f"#0a0b{i:02x}" for i in range(SERIES)]
_SIZE = (3.5, 2.15)  # inches; text of 9 points is legible where this fills a phone
_MARGINS = {"left": 0.15, "right": 0.98, "bottom": 0.21, "top": 0.96}  # shares of the drawing
_BINS = 400  # that a long series is reduced to


def lines(
    name: str,
    title: str,
    x: np.ndarray,
    series: Sequence[np.ndarray],
    x_label: str,
    *,
    log: bool = False,
    percent: bool = False,
    smooth: int = 0,
    floor: float = 0,
) -> Markup:
    """Each of `series` (n,) over the first n of x, not-a-numbers left out.

    Args:
        log: logarithmic values, where any is positive.
        percent: the values are shares, the axis starts at 0.
        smooth: rows of a moving average that is drawn thick over the raw values; 0 for none.
        floor: a broken line stands there, unless it is 0.
    """

    def draw(axes: Axes) -> None:
        for y, colour in zip(series, _COLOURS, strict=False):
            there = np.isfinite(y)
            points, y = x[: len(y)][there], y[there]
            if smooth:
                axes.plot(*reduced(points, y), color=colour, alpha=0.35, linewidth=0.7)
                y = moving_average(y, smooth)
            marker = "o" if len(y) <= 64 and (len(y) < 3 or not smooth) else ""
            axes.plot(*reduced(points, y), color=colour, linewidth=1.6, marker=marker, ms=2.7)
        if floor:
            axes.axhline(floor, color=_COLOURS[1], linewidth=1.2, linestyle=(0, (4, 3)))
        if log and any((y > 0).any() for y in series):
            _log_axis(axes)
        if percent:
            axes.set_ylim(0, max(1.05 * axes.dataLim.y1, 0.05))
            axes.yaxis.set_major_formatter(lambda value, _: share(value))

    return _svg(name, title, draw, x_label, whole_x=True)


def histogram(
    name: str, title: str, values: np.ndarray, marks: Sequence[float], x_label: str
) -> Markup:
    """How many of `values` (n,) fall into each of up to 40 bins, with vertical lines at `marks`."""

    def draw(axes: Axes) -> None:
        axes.hist(values, bins=int(min(40, 5 + len(values) ** 0.5)), color=_COLOURS[0], alpha=0.75)
        for mark, colour in zip(marks, _COLOURS[1:], strict=False):
            axes.axvline(mark, color=colour, linewidth=1.6)

    return _svg(name, title, draw, x_label)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of an odd number `window` of values around each of (n,), fewer at the ends."""
    kernel, half = np.ones(window), window // 2
    total, there = (np.convolve(x, kernel) for x in (values, np.ones(len(values))))
    return (total / there)[half : half + len(values)]


def reduced(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most 800 points of a series (n,) that keep its peaks: minimum and maximum of each bin."""
    if len(y) <= 2 * _BINS:
        return x, y
    bins = np.array_split(np.arange(len(y)), _BINS)
    chosen = [i for b in bins for i in sorted({b[y[b].argmin()], b[y[b].argmax()]})]
    return x[chosen], y[chosen]


def _log_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5 where its span is short."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    short = np.log10(high / low) < 2.5
    subs = (1.0, 2.0, 5.0) if short else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6 if short else 5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(
    name: str, title: str, draw: Callable[[Axes], None], x_label: str, whole_x: bool = False
) -> Markup:
    """The drawing as an `<svg>` that scales to the width it is given; `whole_x`: x counts."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": ascii(name + title), "font.family": "DejaVu Sans",
        "font.size": 9, "axes.labelsize": 9, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
        "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK,
        "xtick.color": _INK, "ytick.color": _INK, "axes.linewidth": 0.7, "axes.facecolor": "none",
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": _INK, "grid.alpha": 0.13, "grid.linewidth": 0.6, "axes.axisbelow": True,
    }  # fmt: skip
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what a user's matplotlibrc says: the same bytes everywhere
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=_SIZE)
        figure.patch.set_visible(False)
        # fixed margins: the axes of neighbours on the page are in line
        axes = figure.subplots(gridspec_kw=_MARGINS)
        draw(axes)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole_x))
        if axes.get_xlim()[1] >= 10_000:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _for_the_page(file.getvalue(), title)


def _for_the_page(svg: str, title: str) -> Markup:
    """matplotlib's file as an element of an HTML page."""
    svg = svg[svg.index("<svg") :]
    for useless in (
        r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->", r' xmlns(:\w+)?="[^"]*"',
        r'(?<=<g) id="[^"]*"', r"<defs>\s*</defs>",
    ):  # fmt: skip
        svg = re.sub(useless, "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href").replace(_INK, "currentColor")
    for i, colour in enumerate(_COLOURS, 1):
        svg = svg.replace(colour, f"var(--series-{i})")
    # two decimals in attributes, not in what stands as text
    svg = re.sub(r'="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg class="plot" role="img" aria-label="{escape(title)}" {view and view[0]}>'
    svg = re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)
    return Markup("\n".join(line.strip() for line in svg.splitlines() if line.strip()))
