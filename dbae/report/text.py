"""Figures and names as text."""

from __future__ import annotations

import math

from .blocks import Cell
from .reading import Estimate, Node, number_of

NONE = "—"


def decimal(value: float | None, digits: int = 3) -> str:
    """A fixed number of digits, another form for the tiny and the huge; a dash for None."""
    if value is None:
        return NONE
    if value and not 10 ** (1 - digits) <= abs(value) < 1e7:
        return f"{value:.3g}"
    return f"{value:.{digits}f}"


def count(value: float) -> str:
    """12,345"""
    return f"{value:,.0f}"


def share(value: float) -> str:
    """0.25 → 25 %; one digit more where it would round to 0 or 100."""
    percent = 100 * value
    if 0 < percent < 0.1 or 99.9 < percent < 100:
        text = "<0.1" if percent < 1 else ">99.9"
    else:
        text = f"{percent:.{1 if 0 < percent < 1 or 99 < percent < 100 else 0}f}"
    return f"{text}\N{NO-BREAK SPACE}%"


def plain(node: Node | None) -> str:
    """A JSON scalar as text; a dash for anything else."""
    if node is None or isinstance(node.value, dict | list):
        return NONE
    if isinstance(node.value, bool):
        return "yes" if node.value else "no"
    return f"{node.value:g}" if isinstance(node.value, float) else str(node.value)


def whole(node: Node | None) -> str:
    """A count as text; a dash for None."""
    number = number_of(node)
    return NONE if number is None else count(number)


def interval(figure: Estimate) -> str:
    """[low, high], or nothing."""
    if figure.low is None or figure.high is None:
        return ""
    digits = _digits(figure)
    return f"[{figure.low:.{digits}f}, {figure.high:.{digits}f}]"


def figure_cell(figure: Estimate | None, best: bool = False) -> Cell:
    """A table's cell: the value, and its interval beside it."""
    if figure is None:
        return Cell(NONE, number=True)
    return Cell(f"{figure.value:.{_digits(figure)}f}", interval(figure), number=True, best=best)


def _digits(figure: Estimate) -> int:
    """Decimals of a figure and its interval: three, more where all of them are small."""
    largest = max(abs(x) for x in (figure.value, figure.low, figure.high) if x is not None)
    return 3 if largest >= 0.01 or not largest else min(9, 2 - math.floor(math.log10(largest)))


def name_cell(text: str, beside: str = "") -> Cell:
    """A table's cell of words."""
    return Cell(text, beside)


def number_cell(text: str) -> Cell:
    """A table's cell with a number that is text already."""
    return Cell(text, number=True)
