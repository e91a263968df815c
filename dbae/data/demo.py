"""The built-in demo set: cartoon portraits drawn on the fly from an index, no files needed.

Every picture is a pure function of its index. What it shows is known exactly: `ATTRIBUTES` are
independent fair coins (yes or no), `FACTORS` independent continuous quantities in [-1, 1]:
the labels of the data set. Shapes are signed distances turned into analytic pixel
coverage, so any size looks smooth, and nothing random is left once the labels are drawn.
"""

from __future__ import annotations

import colorsys
import functools
import math

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.float32]  # (size, size): a coordinate, a signed distance or a coverage
Colour = tuple[float, float, float]  # red, green, blue in [0, 1]

ATTRIBUTES: tuple[str, ...] = (
    "glasses",
    "hat",
    "smile",
    "mouth_open",
    "beard",
    "long_hair",
    "square_head",
    "dark_background",
    "blush",
    "earrings",
    "raised_eyebrows",
)
FACTORS: tuple[str, ...] = (
    "background_hue",
    "background_brightness",
    "skin_tone",
    "hair_colour",
    "outfit_hue",
    "head_x",
    "head_y",
    "head_width",
    "head_tilt",
    "eye_size",
    "gaze",
    "mouth_width",
)

_SEED = 0xDBAE  # part of the data set's identity: another value is another data set

_SKIN = ((1.00, 0.88, 0.80), (0.93, 0.72, 0.58), (0.55, 0.36, 0.27))
_HAIR = ((0.12, 0.10, 0.13), (0.36, 0.18, 0.09), (0.80, 0.28, 0.07), (1.00, 0.84, 0.30))
_INK = (0.10, 0.08, 0.12)
_WHITE = (1.0, 1.0, 1.0)
_GOLD = (1.0, 0.80, 0.16)
_ROSE = (0.96, 0.36, 0.42)
_MOUTH = (0.58, 0.10, 0.14)


def _labels(index: int) -> tuple[list[bool], list[float]]:
    """The attributes and factors of picture `index`, in the order of the two tuples of names."""
    if index < 0:
        raise IndexError(f"demo picture {index}: an index starts at 0")
    seeds = np.random.SeedSequence((_SEED, index))
    numbers = np.random.Generator(np.random.PCG64(seeds)).random(len(ATTRIBUTES) + len(FACTORS))
    coins = numbers[: len(ATTRIBUTES)] < 0.5
    return coins.tolist(), (2.0 * numbers[len(ATTRIBUTES) :] - 1.0).tolist()


def attributes(index: int) -> dict[str, bool]:
    """The known yes/no properties of picture `index`: `ATTRIBUTES` → bool, each true for half."""
    return dict(zip(ATTRIBUTES, _labels(index)[0], strict=True))


def factors(index: int) -> dict[str, float]:
    """The known continuous properties of picture `index`: `FACTORS` → number in [-1, 1]."""
    return dict(zip(FACTORS, _labels(index)[1], strict=True))


@functools.lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Plane, Plane]:
    """x and y of the pixel centres: (size, size) each, in (-1, 1), y growing downwards."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(2.0 / size) - np.float32(1.0)
    x, y = np.meshgrid(axis, axis)
    x.setflags(write=False)
    y.setflags(write=False)
    return x, y


def _palette(stops: tuple[Colour, ...], value: float) -> Colour:
    """The colour at `value` in [-1, 1] on the broken line through `stops`."""
    at = (value + 1.0) / 2.0 * (len(stops) - 1)
    low = min(int(at), len(stops) - 2)
    share = at - low
    red, green, blue = (
        a + (b - a) * share for a, b in zip(stops[low], stops[low + 1], strict=True)
    )
    return red, green, blue


def _hue(value: float) -> float:
    """From rose over yellow, green and blue to violet: not the whole circle, so that the ends of
    [-1, 1] look different and the colour tells the value."""
    return (0.95 + 0.4 * (value + 1.0)) % 1.0


def _shade(colour: Colour, by: float) -> Colour:
    """`colour` darkened by a factor below 1."""
    return colour[0] * by, colour[1] * by, colour[2] * by


def _disc(x: Plane, y: Plane, radius: float) -> Plane:
    """Signed distance to a disc around the origin of (x, y)."""
    return np.sqrt(x * x + y * y) - np.float32(radius)


def _box(across: Plane, y: Plane, width: float, height: float, radius: float) -> Plane:
    """Signed distance to a rounded box with these half sides; `across` is |x|."""
    right = across - np.float32(width - radius)
    down = np.abs(y) - np.float32(height - radius)
    outside = np.hypot(np.maximum(right, 0), np.maximum(down, 0))
    return outside + np.minimum(np.maximum(right, down), 0) - np.float32(radius)


class _Canvas:
    """A picture under construction, painted back to front: (3, size, size) in [0, 1]."""

    def __init__(self, size: int) -> None:
        self.pixels = np.empty((3, size, size), dtype=np.float32)
        self._scale = np.float32(size / 2.0)  # pixels per unit of distance

    def paint(self, distance: Plane, colour: Colour, opacity: float = 1.0) -> None:
        """Fill where `distance` < 0, with a one-pixel smooth edge."""
        coverage = np.clip(np.float32(0.5) - distance * self._scale, 0, 1)
        if opacity < 1.0:
            coverage *= np.float32(opacity)
        for plane, value in zip(self.pixels, colour, strict=True):
            plane += (np.float32(value) - plane) * coverage


def draw(index: int, size: int = 32) -> npt.NDArray[np.uint8]:
    """Picture `index` of the demo set: uint8 (size, size, 3), RGB; the same everywhere, up to
    the last bit of floating-point arithmetic.

    Raises IndexError for a negative index.
    """
    yes, number = _labels(index)
    glasses, hat, smile, mouth_open, beard, long_hair, square, dark, blush, earrings, raised = yes
    (back_hue, back_light, skin_tone, hair_colour, outfit_hue,
     head_x, head_y, head_width, tilt, eye_size, gaze, mouth_width) = number  # fmt: skip

    skin = _palette(_SKIN, skin_tone)
    hair = _palette(_HAIR, hair_colour)
    outfit = colorsys.hsv_to_rgb(_hue(outfit_hue), 0.72, 0.88)
    light = (0.22 if dark else 0.88) + 0.11 * back_light
    back = colorsys.hsv_to_rgb(_hue(back_hue), 0.50 if dark else 0.38, light)

    # The head's own coordinates: origin between the ears, turned by the tilt.
    x, y = _grid(size)
    centre_x, centre_y = 0.15 * head_x, 0.06 + 0.09 * head_y
    cos, sin = np.float32(math.cos(0.11 * tilt)), np.float32(math.sin(0.11 * tilt))
    right, down = x - np.float32(centre_x), y - np.float32(centre_y)
    u = right * cos + down * sin
    v = down * cos - right * sin
    side = np.abs(u)
    wide, tall = 0.47 + 0.07 * head_width, 0.53
    corner = 0.20 if square else wide
    head = _box(side, v, wide, tall, corner)

    canvas = _Canvas(size)
    for plane, value in zip(canvas.pixels, back, strict=True):
        plane[...] = value
    if long_hair:
        canvas.paint(_box(side, v - np.float32(0.16), wide + 0.15, 0.72, 0.34), hair)
    shoulders = _box(np.abs(x - np.float32(0.5 * centre_x)), y - np.float32(1.12), 0.66, 0.40, 0.3)
    canvas.paint(shoulders, outfit)
    canvas.paint(_box(side, v - np.float32(tall), 0.17, 0.2, 0.1), _shade(skin, 0.82))
    canvas.paint(_disc(side - np.float32(wide), v - np.float32(0.04), 0.12), _shade(skin, 0.88))
    canvas.paint(head, skin)

    square_of_side = side * side
    if beard:
        jaw = np.float32(0.21) - np.float32(0.45) * square_of_side - v
        canvas.paint(np.maximum(head - np.float32(0.04), jaw), _shade(hair, 0.85))
    if blush:
        canvas.paint(
            _disc(side - np.float32(0.74 * wide), v - np.float32(0.20), 0.105), _ROSE, 0.65
        )
    fringe = v + np.float32(0.29) - np.float32(0.6) * square_of_side
    canvas.paint(np.maximum(head - np.float32(0.07), fringe), hair)

    half = 0.17 + 0.05 * mouth_width
    bow = square_of_side * np.float32(half**-2)
    middle = v - np.float32(0.34) + (bow - 0.5) * np.float32(0.10 if smile else -0.08)
    thick = np.float32(0.03) + np.float32(0.08 if mouth_open else 0.0) * np.maximum(1 - bow, 0)
    canvas.paint(np.maximum(np.abs(middle) - thick, side - np.float32(half)), _MOUTH)

    eye_x, eye_v = 0.42 * wide + 0.02, v - np.float32(0.01)
    from_eye = side - np.float32(eye_x)
    canvas.paint(_disc(from_eye, eye_v, 0.125 + 0.03 * eye_size), _WHITE)
    look = np.where(u < 0, np.float32(-0.06 * gaze), np.float32(0.06 * gaze))
    canvas.paint(_disc(from_eye - look, eye_v, 0.075), _INK)
    if glasses:
        rims = np.abs(_disc(from_eye, eye_v, 0.19)) - np.float32(0.035)
        bridge = _box(side, eye_v, eye_x - 0.18, 0.03, 0.02)
        canvas.paint(np.minimum(rims, bridge), _INK)
    brow = v + np.float32(0.27 if raised else 0.14)
    canvas.paint(_box(np.abs(from_eye), brow, 0.13, 0.035, 0.03), _shade(hair, 0.5))
    if earrings:
        canvas.paint(_disc(side - np.float32(wide + 0.03), v - np.float32(0.24), 0.085), _GOLD)
    if hat:
        canvas.paint(_box(side, v + np.float32(0.64), 0.92 * wide, 0.32, 0.24), outfit)
        brim = _box(side, v + np.float32(0.41), wide + 0.16, 0.065, 0.06)
        canvas.paint(brim, _shade(outfit, 0.7))
    return np.rint(canvas.pixels.transpose(1, 2, 0) * np.float32(255)).astype(np.uint8)
