"""What a page is made of. `blocks.html.j2` has one macro for each of these.

A text may be `Markup` (HTML); a plain `str` is escaped by the template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from markupsafe import Markup

from .reading import Estimate


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a page."""

    @property
    def kind(self) -> str:
        """The name of the template's macro."""
        return type(self).__name__.lower()


@dataclasses.dataclass(frozen=True)
class Text(Block):
    """A paragraph; `tone` is "", "note" (small), "absent" or "problem"."""

    text: str
    tone: str = ""


@dataclasses.dataclass(frozen=True)
class Heading(Block):
    """A heading within a section, of level 3 or 4."""

    text: str
    level: int = 3


@dataclasses.dataclass(frozen=True)
class Facts(Block):
    """Terms and what they are here."""

    pairs: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table's cell; `beside` follows in small type (an interval, an error)."""

    text: str
    beside: str = ""
    number: bool = False
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Body:
    """Rows under one title. The first cell of a row is its header."""

    rows: Sequence[Sequence[Cell]]
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Table(Block):
    """`tone` "published" sets off figures that others measured."""

    caption: str
    head: Sequence[str]
    bodies: Sequence[Body]
    notes: Sequence[str] = ()
    tone: str = ""

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers, so that its title is set flush right like them."""
        return any(row[column].number for body in self.bodies for row in body.rows)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG as a data URI, `width` × `height` pixels, to be shown at most `shown` pixels wide."""

    uri: str
    alt: str
    width: int
    height: int
    shown: int
    caption: str = ""

    @property
    def pixelated(self) -> bool:
        """Whether it is enlarged, so that its pixels should stay sharp."""
        return self.shown > self.width


@dataclasses.dataclass(frozen=True)
class Figure(Block):
    """Pictures side by side over one caption; `labels`: rows of texts, each under its column."""

    caption: str
    pictures: Sequence[Picture]
    labels: Sequence[Sequence[str]] = ()


@dataclasses.dataclass(frozen=True)
class Plot:
    """A drawing (inline SVG), with the names of its series in order of their colours."""

    title: str
    svg: Markup
    series: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Plots(Block):
    """Small drawings side by side over one caption."""

    caption: str
    plots: Sequence[Plot]


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar with its interval and what knowing nothing would give."""

    name: str
    figure: Estimate
    base: float


@dataclasses.dataclass(frozen=True)
class Bars(Block):
    """Horizontal bars on an axis from `low` to `high`, with a mark at the base of each.

    `base_name` titles a column with the bases; empty where they are all the same.
    """

    caption: str
    measure: str
    base_name: str
    bars: Sequence[Bar]
    low: float
    high: float

    def place(self, value: float) -> str:
        """Where `value` lies on the axis, as a percentage for CSS."""
        share = (value - self.low) / (self.high - self.low)
        return f"{100 * min(max(share, 0), 1):.2f}%"


@dataclasses.dataclass(frozen=True)
class Fold(Block):
    """Blocks that show when their title is clicked; `tone` "protocol" stays shut on paper."""

    title: str
    blocks: Sequence[Block]
    tone: str = ""


@dataclasses.dataclass(frozen=True)
class Command(Block):
    """A part that is absent, and the command that makes it."""

    what: str
    command: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page that the navigation names; `present` is false where there is no result."""

    id: str
    title: str
    blocks: Sequence[Block]
    present: bool = True
