"""Pictures as data URIs, within a limit for the whole page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from .blocks import Picture
from .folder import Run
from .reading import Malformed

_BUDGET = 4_200_000  # bytes of PNG on a page, 4/3 of it as text
_BEYOND = 1_000_000  # more of these, all for small pictures, before the page is full
_AT_LEAST = 12_000  # of one picture, however many stand before it
_WIDEST = 1600  # pixels
_MOST_PIXELS = 50_000_000  # of a file that is opened at all


class Album:
    """Makes the pictures of one page.

    Each may take an eighth of what is left of the page's limit, so that the first, which are of
    the newest checkpoint, are the finest; what is larger is scaled down.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._left = _BUDGET

    def load(self, path: Path, alt: str, caption: str = "") -> Picture:
        """A PNG file of the run's folder. Malformed where it is none or lies elsewhere."""
        real = self._run.inside(path)
        try:
            with Image.open(real, formats=["PNG"]) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise Malformed(f"{path.name} has {image.width}×{image.height} pixels")
                return self.picture(image.convert("RGB"), alt, caption)
        except Malformed:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error
            reason = "not a PNG" if isinstance(error, Image.UnidentifiedImageError) else error
            raise Malformed(f"{path.name} cannot be read ({reason})") from error

    def picture(self, image: Image.Image, alt: str, caption: str = "") -> Picture:
        """An RGB image; Malformed where the page is full."""
        if self._left < -_BEYOND:
            raise Malformed("the page's limit for pictures is reached")
        width, height = image.size
        limit = max(self._left // 8, _AT_LEAST)
        scale = min(1, _WIDEST / width)
        data = _png(image, scale)
        while len(data) > limit:
            scale *= max(0.5, min(0.95, (limit / len(data)) ** 0.5))
            data = _png(image, scale)
        self._left -= len(data)
        uri = "data:image/png;base64," + base64.b64encode(data).decode()
        shown = width * min(4, max(1, 960 // width))
        return Picture(uri, alt, width, height, shown, caption)


def _png(image: Image.Image, scale: float) -> bytes:
    if scale < 1:
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
