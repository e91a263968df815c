"""Small drawings as inline SVG that take their colours from the page.

matplotlib draws with stand-in colours; these are then replaced by `currentColor` and the page's
`--series-…`, so that one drawing serves light and dark. No text of the user's enters a drawing.
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
_POINTS = 400  # bins that a long series is reduced to


def lines(
    name: str,
    title: str,
    x: np.ndarray,
    series: Sequence[np.ndarray],
    *,
    x_label: str,
    log: bool = False,
    percent: bool = False,
    smooth: int = 0,
    markers: bool = False,
) -> Markup:
    """Each of `series` (n,) over x (n,), not-a-numbers left out.

    Args:
        name: makes the drawing's ids unique on the page.
        title: read by screen readers.
        log: logarithmic values, where all of them are positive.
        percent: the values are shares, the axis starts at 0.
        smooth: rows of a moving average that is drawn thick over the raw values; 0 for none.
        markers: mark every point.
    """
    finite = [np.isfinite(y) for y in series]

    def draw(axes: Axes) -> None:
        for y, there, colour in zip(series, finite, _COLOURS, strict=False):
            x_there, y_there = x[there], y[there]
            raw = reduced(x_there, y_there)
            if smooth:
                axes.plot(*raw, color=colour, alpha=0.35, linewidth=0.7)
                thick = x_there, moving_average(y_there, smooth)
                axes.plot(*thinned(*thick), color=colour, linewidth=1.6)
            else:
                axes.plot(*raw, color=colour, linewidth=1.6, marker="o" if markers else "", ms=3)
        if log and all((y[there] > 0).all() for y, there in zip(series, finite, strict=True)):
            _log_axis(axes)
        axes.set_xlabel(x_label)
        if percent:
            axes.set_ylim(0, max(1.05 * axes.dataLim.y1, 0.05))
            axes.yaxis.set_major_formatter(lambda value, _: share(value))

    return _svg(name, title, draw, whole_x=True)


def histogram(
    name: str, title: str, values: np.ndarray, marks: Sequence[float], x_label: str
) -> Markup:
    """How many of `values` (n,) fall into each of up to 40 bins, with vertical lines at `marks`."""

    def draw(axes: Axes) -> None:
        axes.hist(values, bins=int(min(40, 5 + len(values) ** 0.5)), color=_COLOURS[0], alpha=0.75)
        for mark, colour in zip(marks, _COLOURS[1:], strict=False):
            axes.axvline(mark, color=colour, linewidth=1.6)
        axes.set_xlabel(x_label)

    return _svg(name, title, draw)


def spectrum(
    name: str, title: str, values: np.ndarray, x_label: str, first: int, floor: float = 0
) -> Markup:
    """Positive `values` (d,) on a logarithmic axis over `first`, `first` + 1, …

    A broken line stands at `floor`.
    """

    def draw(axes: Axes) -> None:
        x = np.arange(first, first + len(values))
        mark = "o" if len(values) <= 64 else ""
        axes.plot(x, values, color=_COLOURS[0], linewidth=1.3, marker=mark, ms=2.5)
        if floor:
            axes.axhline(floor, color=_COLOURS[1], linewidth=1.2, linestyle=(0, (4, 3)))
        if (values > 0).any():
            _log_axis(axes)
        axes.set_xlabel(x_label)

    return _svg(name, title, draw, whole_x=True)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of an odd number `window` of values around each of (n,), fewer at the ends."""
    kernel, half = np.ones(window), window // 2
    total, there = (np.convolve(x, kernel) for x in (values, np.ones(len(values))))
    return (total / there)[half : half + len(values)]


def reduced(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most 800 points of a series (n,) that keep its peaks: minimum and maximum of each bin."""
    if len(y) <= 2 * _POINTS:
        return x, y
    bins = np.array_split(np.arange(len(y)), _POINTS)
    kept = [sorted({int(b[y[b].argmin()]), int(b[y[b].argmax()])}) for b in bins]
    chosen = np.concatenate(kept).astype(int)
    return x[chosen], y[chosen]


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Evenly chosen points of a smooth series (n,), its last included."""
    chosen = np.unique(np.linspace(0, max(len(y) - 1, 0), _POINTS).round().astype(int))[: len(y)]
    return x[chosen], y[chosen]


def _log_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5 where its span is short."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = np.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6 if decades < 2.5 else 5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(name: str, title: str, draw: Callable[[Axes], None], whole_x: bool = False) -> Markup:
    """The drawing as an `<svg>` that scales to the width it is given; `whole_x`: x counts."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "DejaVu Sans",
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
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole_x))
        if axes.get_xlim()[1] >= 10_000:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _for_the_page(file.getvalue(), title)


def _shorter(attribute: str) -> str:
    """Coordinates with two decimals."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", attribute)


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
    svg = re.sub(r'="[^"]*"', lambda found: _shorter(found[0]), svg)  # not what stands as text
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg class="plot" role="img" aria-label="{escape(title)}" {view and view[0]}>'
    svg = re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)
    return Markup("\n".join(line.strip() for line in svg.splitlines() if line.strip()))
