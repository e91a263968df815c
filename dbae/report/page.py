"""A page in the making: its elements, its pictures, and lines for what cannot be shown."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from markupsafe import Markup
from PIL import Image

from . import text
from .folder import Result, Run

T = TypeVar("T")
_BUDGET = 4_200_000  # bytes of PNG on a page, 4/3 of it as text
_BEYOND = 1_000_000  # more of these, all for small pictures, before the page is full
_AT_LEAST = 12_000  # of one picture, however many stand before it
_WIDEST = 1600  # pixels


def environment() -> jinja2.Environment:
    """The templates of this package, which escape all that is no Markup."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("dbae", "report"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


class Page:
    """What sections make their HTML with. `html` has the macros of elements.html.j2."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.html: Any = environment().get_template("elements.html.j2").module
        self._left = _BUDGET

    def problem(self, file: str, what: str) -> Markup:
        """Note a problem; returns the line that stands where the part would be."""
        what = " ".join(what.replace(f"{self.run.root}{os.sep}", "").split())
        self.run.problems.append((file, what))
        return self.html.text(f"{file}: {what}", "problem")

    def attempt(self, file: str, part: str, make: Callable[[], T]) -> T | Markup:
        """What `make` returns; where it fails, a line that names file, part (or "") and reason."""
        try:
            return make()
        except KeyError as error:
            return self.problem(file, f"{part} lacks {error.args[0]}")
        except Exception as error:  # a damaged file makes decoders and drawing raise anything
            return self.problem(file, f"{part} cannot be shown ({error})")

    def by_checkpoint(self, kind: str, make: Callable[[Sequence[Result]], Markup]) -> Markup:
        """Results of a kind: those of the newest checkpoint, then older ones, each in a fold."""
        shown = Markup()
        for checkpoint, results in self.run.of_kind(kind).items():
            if made := make(results):
                title = f"Checkpoint: {checkpoint}"
                shown += self.html.fold(title, made) if shown else self.html.heading(title) + made
        return shown

    def each(self, kind: str, make: Callable[[Page, Result], Markup]) -> Markup:
        """`by_checkpoint` for results that have nothing to do with each other."""

        def one(result: Result) -> Markup:
            return self.attempt(result.label, "", partial(make, self, result))

        return self.by_checkpoint(kind, lambda results: Markup().join(map(one, results)))

    def parts(
        self,
        result: Result,
        parts: Iterable[tuple[str, Callable[[Page, Result], Markup]]],
        expected: Sequence[str],
    ) -> Markup:
        """What `parts` make of the members that the file has, by their keys; then its protocol.

        Lines name those of the `expected` members that the file lacks, and those that cannot be
        shown.
        """
        shown = []
        if absent := [key for key in expected if result.content.get(key) is None]:
            shown.append(self.problem(result.label, f"lacks {', '.join(absent)}"))
        shown += [
            self.attempt(result.label, key, partial(make, self, result))
            for key, make in parts
            if result.content.get(key) is not None
        ]
        protocol = self.html.protocol(f"Protocol of {result.label}", text.flat(result.protocol))
        # several parts of one member that is malformed give one line
        return Markup().join([*dict.fromkeys(shown), protocol])

    def file(self, path: Path) -> Path:
        """`path` itself, where it is a file of the run's folder; ValueError where it is not."""
        real = path.resolve()
        if not (real.is_relative_to(self.run.root) and real.is_file()):
            raise ValueError(f"{path.name} is no file of the run's folder")
        return real

    def strip(self, path: Path, caption: str, labels: Sequence[Sequence[str]] = ()) -> Markup:
        """A PNG file of the run's folder; `labels`: rows of texts, each under its column."""
        with Image.open(self.file(path), formats=["PNG"]) as image:
            picture = self.picture(image.convert("RGB"), caption)
        return self.html.strip(picture, caption, labels)

    def picture(self, image: Image.Image, alt: str) -> dict[str, Any]:
        """An RGB image for the macros; ValueError where the page is full.

        Each may take an eighth of what is left of the page's limit, so that the first, which are
        of the newest checkpoint, are the finest; what is larger is scaled down.
        """
        if self._left < -_BEYOND:
            raise ValueError("the page's limit for pictures is reached")
        width, height = image.size
        limit = max(self._left // 8, _AT_LEAST)
        data = _png(image, scale := min(1, _WIDEST / width))
        while len(data) > limit:
            data = _png(image, scale := scale * max(0.5, min(0.95, (limit / len(data)) ** 0.5)))
        self._left -= len(data)
        uri = "data:image/png;base64," + base64.b64encode(data).decode()
        shown = width * min(4, max(1, 960 // width))  # at most so many pixels wide
        return {"uri": uri, "alt": alt, "width": width, "height": height, "shown": shown}


def _png(image: Image.Image, scale: float) -> bytes:
    if scale < 1:
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
