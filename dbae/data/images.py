"""Bytes ↔ pixels ↔ the model's range: the one place for these conversions.

Pixels are uint8 tensors, channels first; the networks see float32 in [-1, 1].
"""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import UserError

# What Pillow may take bytes for. Others of its formats start programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
FITS = ("stretch", "center", "enlarge")
_ENLARGED = 1.1  # sides before the cut of fit "enlarge", relative to those after
_SPARE = 3  # how much larger than wanted a JPEG's scaled decoding must be: closer, errors grow
_PADDING = 2  # pixels between and around the images of a grid


class BadImage(UserError):
    """One image cannot be used; the message is one line naming it and the reason."""


def bad_image(name: str, reason: object) -> BadImage:
    """The `BadImage` for image `name`."""
    return BadImage(f"image {name}: {reason}")


def decode(data: bytes, name: str, wanted: int | None = None) -> Image.Image:
    """The encoded image `data` (one of `FORMATS`, any mode) → RGB, 8 bits a channel.

    Of several frames the first is taken. The EXIF orientation is applied, transparency is laid on
    white, 16-bit and 32-bit grey is divided by 257, floating-point grey is scaled from [0, 1],
    [0, 255] or [0, 65535], whichever its maximum fits. With `wanted`, the side that it will be
    resized to, a JPEG may come at 1/2, 1/4 or 1/8 of its size (see `_draft`).

    Raises BadImage, naming `name`, for what is empty, truncated, not an image, or so large (above
    179 million pixels, by its header) that it must be a decompression bomb.
    """
    if not data:
        raise bad_image(name, "the file is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if wanted is not None:
            _draft(image, wanted)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # a copy of a large picture takes its time
        return _to_rgb(image)
    except UnidentifiedImageError:
        raise bad_image(name, f"not an image in one of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, …
        reason = str(error) or type(error).__name__
        raise bad_image(name, f"cannot be decoded ({reason})") from error


def _draft(image: Image.Image, wanted: int) -> None:
    """Let a JPEG be decoded to a part of its size, which skips much of the work.

    The part is the smallest of 1/2, 1/4, 1/8 that leaves `_SPARE` times the wanted pixels a side,
    and that puts the edges of the picture and of its centred square between pixels.
    """
    width, height = image.size
    for part in (8, 4, 2):
        whole = not (width % part or height % part or (width - height) % (2 * part))
        if whole and min(width, height) >= part * _SPARE * wanted:
            image.draft(None, (width // part, height // part))
            return


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # Pillow's own conversion would clip
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Grey levels of 16 bits, of 32 bits or in floating point → uint8 of the same shape."""
    if values.dtype.kind != "f":
        scale = 1 / 257
    elif not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    else:
        top = values.max()
        scale = 255 if top <= 1 else 1 if top <= 255 else 1 / 257
    return np.rint(values.astype(np.float64) * scale).clip(0, 255).astype(np.uint8)


def fit_square(image: Image.Image, size: int, fit: str) -> Image.Image:
    """`image` as (size, size): bilinear with antialiasing, as Pillow resizes.

    `fit` "stretch" resizes the whole image, "center" first cuts the centred square, "enlarge"
    resizes the whole to int(1.1 · size) a side and then cuts the centred square (LFW).
    """
    if fit == "enlarge":
        return _centred_square(_resized(image, int(_ENLARGED * size)), size)
    if fit == "center":
        image = _centred_square(image, min(image.size))
    return _resized(image, size)


def _centred_square(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _resized(image: Image.Image, side: int) -> Image.Image:
    if image.size == (side, side):
        return image
    return image.resize((side, side), Image.Resampling.BILINEAR)


def transform(
    image: Image.Image,
    size: int,
    crop: tuple[int, int, int, int] | None = None,
    fit: str = "stretch",
    name: str = "given",
) -> Tensor:
    """An RGB image → uint8 (3, size, size): crop (top, left, height, width), then `fit_square`.

    Raises BadImage when the image does not contain the crop box, or has its final size already
    although a crop is due: then it is not the aligned CelebA image that the box was made for.
    """
    if crop is not None:
        top, left, height, width = crop
        already = image.size == (size, size)
        if already or image.width < left + width or image.height < top + height:
            raise bad_image(
                name,
                f"is {image.width}×{image.height} pixels; expected an aligned 178×218 CelebA "
                f"image, of which {width}×{height} pixels at left {left}, top {top} are kept "
                "(for images cut already use the data set `folder`)",
            )
        image = image.crop((left, top, left + width, top + height))
    if image.size == (2 * size, 2 * size) and fit != "enlarge":
        return _halved(image)
    return _channels_first(np.asarray(fit_square(image, size, fit)))


def _halved(image: Image.Image) -> Tensor:
    """A square image at half its side: the pixels of `fit_square`, for a third of the time.

    That is torch's own integer resize. It rounds its weights more coarsely than Pillow, which
    shows in no pixel where they are 1, 3, 3, 1 eighths (sevenths without the first at the border).
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    side = image.width // 2
    half = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
    return _channels_first(half[0].permute(1, 2, 0).numpy())


def _channels_first(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) → a tensor of its own, (3, H, W); numpy does it faster than torch."""
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 in 0..255, any shape → float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1], any shape → uint8, rounded and clamped; undoes `to_model_range`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def image_grid(images: Tensor, columns: int) -> Image.Image:
    """uint8 (N, 3, H, W) → one picture, `columns` images a row, row by row, on white."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    down, right = height + _PADDING, width + _PADDING
    canvas = np.full((rows * down + _PADDING, columns * right + _PADDING, 3), 255, np.uint8)
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = i // columns * down + _PADDING, i % columns * right + _PADDING
        canvas[top : top + height, left : left + width] = pixels
    return Image.fromarray(canvas)
