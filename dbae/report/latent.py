"""The sections on z and its use: interpolation, manipulation, z itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup

from ..encoder import DEAD_STD
from . import plots, text
from .folder import Result
from .page import Page

_LISTED = 20  # indices of dead dimensions that are named
# Figures of an edit: (key, title, how a number is written).
_MEASURED = (
    ("target", "Target", None), ("others", "Others", None),
    ("flipped_before", "Wanted answer, before", text.share),
    ("flipped", "Wanted answer, after", text.share),
    ("orthogonal", "Moved aside", None), ("pixel_mse", "Pixel MSE", None),
)  # fmt: skip


def _how(protocol: Mapping[str, Any]) -> str:
    nfe, latent = protocol.get("nfe"), protocol.get("latent")
    parts = text.sampler_of(protocol), nfe and f"{nfe} NFE", text.checkpoint_of(protocol)
    return ", ".join(filter(None, (*parts, latent and f"z: {latent}")))


def interpolation(page: Page, result: Result) -> Markup:
    """Strips of images between two or more, and how smooth the way is."""
    shown = Markup()
    for file, caption in (
        ("interpolation_x0.png", f"Between {_way(result)}"),
        ("interpolation_xT.png", "x_T of these: where each of them starts."),
    ):
        strip = partial(page.strip, result.folder / file, caption)
        shown += page.attempt(result.label, "the strip", strip)
    return shown + page.parts(result, [("smoothness", _smoothness)], ("protocol", "smoothness"))


def _way(result: Result) -> str:
    protocol = result.protocol
    mode, points = text.plain(protocol.get("mode")), text.count(protocol.get("points"))
    how = text.sentence(f"{mode} in z, {points} points; {_how(protocol)}")
    return f"{_ends(result)}. {how}"


def _ends(result: Result) -> str:
    return " and ".join(map(str, result.content.get("images") or ["two images"]))


def _smoothness(page: Page, result: Result) -> Markup:
    """Figures of the whole way and, where it has several, of its parts."""
    whole, segments = result.content["smoothness"], result.content.get("segments") or []
    ways = [(f"{part['from']} to {part['to']}", part) for part in segments]
    ways = [*ways * (len(ways) > 1), (_ends(result), whole)]
    titles = {
        "path_length": "Length of the way", "direct": "Direct distance",
        "straightness": "Straightness", "largest_step": "Largest step",
    }  # fmt: skip
    rows = [[name, *(text.decimal(way.get(key), 4) for key in titles)] for name, way in ways]
    note = (
        f"Distances: {whole.get('unit') or 'unit not recorded'}. Straightness: direct distance "
        "over length (a cross-fade has 1). Largest step: over the mean step (1: all are equal). "
        "n = 1 way."
    )
    caption = f"Smoothness of the way between {_way(result)}"
    return page.html.table(caption, ("Way", *titles.values()), rows, [note])


def manipulation(page: Page, result: Result) -> Markup:
    """Strips of edited images, and what edits do on many images."""
    parts = ("edits", _edits), ("measured", _measured), ("protocol", _judge)
    return page.parts(result, parts, ("protocol", "edits"))


def _edits(page: Page, result: Result) -> Markup:
    return Markup().join(
        page.attempt(result.label, "an edit", partial(_edit, page, result, edit))
        for edit in result.content["edits"]
    )


def _edit(page: Page, result: Result, edit: Mapping[str, Any]) -> Markup:
    """The edited images, with scale and probability under each; x_T below where it was kept."""
    what = f"“{edit['attribute']}” of {edit['image']}"
    labels = [[f"{scale:+g}" if scale else "0" for scale in edit["scales"]]]
    caption = f"{what}: scale under each image"
    if edit.get("probability"):
        labels.append([text.share(p) for p in edit["probability"]])
        caption += f", then the classifier's probability of “{edit['attribute']}”"
    x_T_of = f", x_T {result.protocol['x_T']}" if result.protocol.get("x_T") else ""
    caption = f"{caption}. {_how(result.protocol)}{x_T_of}."
    shown = page.strip(result.folder / edit["file"], caption, labels)
    if edit.get("x_T_file"):
        x_T = partial(page.strip, result.folder / edit["x_T_file"], f"{what}: x_T of these.")
        shown += page.attempt(result.label, "an edit's x_T", x_T)
    return shown


def _measured(page: Page, result: Result) -> Markup:
    """What edits do, measured on many images."""
    measured, protocol = result.content["measured"], result.protocol
    if not measured:
        return Markup()
    rows = [
        [row["attribute"], f"{row['scale']:+g}"]
        + [text.figure(row.get(key), form) for key, _, form in _MEASURED]
        for row in measured["rows"]
    ]
    note = (
        "Target: change of the edited attribute's score, in standard deviations of that score over "
        "images. Others: mean absolute change of all other attributes' scores, same unit. Wanted "
        "answer: share of images that the classifier predicts as wanted. Moved aside: distance "
        "moved in z orthogonally to the direction, as a share of the mean distance between two "
        "images."
    )
    caption = (
        f"Edits measured on n = {text.count(measured.get('n'))} images, {text.data_of(protocol)} "
        f"({text.seen_of(protocol)}); 95 % intervals in brackets. {_how(protocol)}."
    )
    head = ("Attribute", "Scale", *(title for _, title, _ in _MEASURED))
    return page.html.table(caption, head, rows, [note])


def _judge(page: Page, result: Result) -> Markup:
    judge = result.protocol.get("judge")
    return page.html.text(f"Judge: {judge}.", "note") if judge else Markup()


def latents(page: Page, result: Result) -> Markup:
    """Variances, dead dimensions, effective rank and neighbours of a set of latents."""
    parts = ("z", _statistics), ("neighbours", _neighbours)
    return page.parts(result, parts, ("protocol", "z", "neighbours"))


def _statistics(page: Page, result: Result) -> Markup:
    z = result.content["z"]
    std, spectrum = (np.array(z[key], dtype=np.float64) for key in ("std", "spectrum"))
    dead = z.get("dead") or []
    listed = ", ".join(map(text.count, dead[:_LISTED])) + " …" * (len(dead) > _LISTED)
    total = spectrum.sum()
    tenth = spectrum[: max(1, len(spectrum) // 10)].sum() / total if total > 0 else math.nan
    facts = [
        ("Numbers in z", str(len(std))),
        ("Effective rank", text.decimal(z.get("effective_rank"), 1)),
        ("Dead dimensions", f"{len(dead)}{f' (of index {listed})' if dead else ''}"),
        ("Variance in the first tenth", text.share(tenth) if total > 0 else text.NONE),
    ]
    numbers = np.arange(max(len(std), len(spectrum)))
    along = plots.lines(
        result.label, "Eigenvalues of the covariance of z, falling", numbers + 1, [spectrum],
        "principal direction", log=True,
    )  # fmt: skip
    each = plots.lines(
        result.label, "Standard deviation of each dimension of z", numbers, [std],
        "index of the dimension", log=True, floor=DEAD_STD,
    )  # fmt: skip
    drawn = [
        ("Variance along principal directions", along, ()),
        ("Standard deviation of each dimension", each, ("std", f"dead below {DEAD_STD:g}")),
    ]
    caption = (
        f"z of {text.count(result.content.get('n'))} images. {text.essentials(result.protocol)} "
        "Effective rank: exp of the entropy of the normalised spectrum. Variance in the first "
        "tenth: share of the largest tenth of the principal directions."
    )
    return page.html.facts(facts) + page.html.plots(drawn, caption)


def _neighbours(page: Page, result: Result) -> Markup:
    found, n = result.content["neighbours"], text.count(result.content.get("n"))
    how = f" ({found['distance']})" if found.get("distance") else ""
    caption = (
        f"Left: {len(found['queries'])} images; beside each, its nearest in z among {n} "
        f"images{how}."
    )
    near = map(", ".join, found["neighbours"])
    rows = [list(row) for row in zip(found["queries"], near, strict=False)]
    title = "Names of these images"
    names = page.html.table(f"{title}.", ("Image", "Nearest in z"), rows, words=(0, 1))
    strip = page.strip(result.folder / found["file"], caption)
    return strip + page.html.fold(title, names)
