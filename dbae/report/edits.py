"""The sections on what z can be used for: interpolation and manipulation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from .blocks import Block, Body, Cell, Figure, Section, Table, Text
from .folder import Result, Run
from .parts import (
    by_checkpoint,
    checkpoint_of,
    command,
    data_of,
    each,
    lacking,
    protocol_fold,
    sampler_of,
    section,
    seen_of,
    sentence,
    text_or,
)
from .pictures import Album
from .reading import Malformed, Node, estimate, number_of
from .text import decimal, figure_cell, name_cell, number_cell, plain, share, whole

# Measured figures of an edit: (key, title, is it a share?).
_MEASURED = (
    ("target", "Target", False),
    ("others", "Others", False),
    ("flipped_before", "Wanted answer, before", True),
    ("flipped", "Wanted answer, after", True),
    ("orthogonal", "Moved aside", False),
    ("pixel_mse", "Pixel MSE", False),
)


def interpolation(run: Run, album: Album) -> Section:
    """Strips of images between two, and how smooth the way is."""
    absent = command(
        run, "No interpolation",
        "bash interpol_dbae.sh DATASET SCHEDULE CKPT 0.33 1 train 7 heun 167 STO",
    )  # fmt: skip
    found = by_checkpoint(run, "interpolation", each(run, partial(_interpolation, run, album)))
    return section("interpolation", "Interpolation", absent, found)


def _interpolation(run: Run, album: Album, result: Result) -> list[Block]:
    protocol = result.protocol
    names = result.content.get("images")
    between = " and ".join(names.texts()) if names else "two images"
    how = (
        f"{plain(protocol.find('mode'))} in z, {whole(protocol.find('points'))} points; "
        f"{_how(protocol)}"
    )
    blocks = lacking(run, result, "protocol", "smoothness")
    for file, caption in (
        ("interpolation_x0.png", f"Between {between}. {sentence(how)}"),
        ("interpolation_xT.png", "x_T of these: where each of them starts."),
    ):
        blocks += run.attempt(result.label, partial(_picture, album, result, file, caption))
    if result.content.get("smoothness"):
        blocks += run.attempt(result.label, partial(_smoothness, result.content, between, how))
    return [*blocks, protocol_fold(result)]


def _picture(album: Album, result: Result, file: str, caption: str) -> list[Block]:
    return [Figure(caption, [album.load(result.folder / file, caption)])]


def _how(protocol: Node) -> str:
    nfe = protocol.find("nfe")
    return ", ".join(
        part
        for part in (
            sampler_of(protocol), f"{whole(nfe)} NFE" if nfe else "", checkpoint_of(protocol),
            f"z: {plain(protocol.find('latent'))}" if protocol.find("latent") else "",
        )
        if part
    )  # fmt: skip


def _smoothness(content: Node, between: str, how: str) -> list[Block]:
    """Figures of the whole way and, where it has several, of its parts."""
    titles = {
        "path_length": "Length of the way", "direct": "Direct distance",
        "straightness": "Straightness", "largest_step": "Largest step",
    }  # fmt: skip
    whole_way = content["smoothness"]
    segments = content.get("segments")
    parts = segments.items() if segments else []
    ways = [
        *((f"{part['from'].text()} to {part['to'].text()}", part) for part in parts),
        (between, whole_way),
    ][-1 if len(parts) == 1 else 0 :]  # a single part is the whole way
    rows = [
        [name_cell(name), *(number_cell(decimal(number_of(way.get(key)), 4)) for key in titles)]
        for name, way in ways
    ]
    notes = [
        f"Distances: {text_or(whole_way.get('unit'), 'unit not recorded')}. Straightness: direct "
        "distance over length (a cross-fade has 1). Largest step: over the mean step (1: all are "
        "equal). n = 1 way."
    ]
    caption = f"Smoothness of the way between {between}. {sentence(how)}"
    return [Table(caption, ("Way", *titles.values()), [Body(rows)], notes)]


def manipulation(run: Run, album: Album) -> Section:
    """Strips of edited images, and what edits do on many images."""
    absent = command(
        run, "No manipulation",
        "bash manipul_dbae.sh DATASET SCHEDULE CKPT 0.33 1 train 7 heun 167 STO",
    )  # fmt: skip
    found = by_checkpoint(run, "manipulation", each(run, partial(_manipulation, run, album)))
    return section("manipulation", "Manipulation", absent, found)


def _manipulation(run: Run, album: Album, result: Result) -> list[Block]:
    blocks = lacking(run, result, "protocol")
    edits = result.content.get("edits")
    for edit in edits.items() if edits else []:
        blocks += run.attempt(result.label, partial(_edit, run, album, result, edit))
    if measured := result.content.get("measured"):
        blocks += run.attempt(result.label, partial(_measured, result, measured))
    if not blocks:
        raise Malformed("lacks edits and measured")
    if judge := result.protocol.find("judge"):
        blocks.append(Text(f"Judge: {text_or(judge, 'not recorded')}.", "note"))
    return [*blocks, protocol_fold(result)]


def _edit(run: Run, album: Album, result: Result, edit: Node) -> list[Block]:
    """The edited images, with scale and probability under each; x_T below where it was kept."""
    attribute, image = edit["attribute"].text(), edit["image"].text()
    scales = edit["scales"].numbers()
    labels = [[f"{scale:+g}" if scale else "0" for scale in scales]]
    caption = f"“{attribute}” of {image}: scale under each image"
    if (probability := edit.get("probability")) and len(probability.numbers()) == len(scales):
        labels.append([share(p) for p in probability.numbers()])
        caption += f", then the classifier's probability of “{attribute}”"
    alt = f"{image} edited towards {attribute} at scales {', '.join(labels[0])}"
    picture = album.load(result.folder / edit["file"].text(), alt)
    blocks: list[Block] = [Figure(f"{caption}. {_how(result.protocol)}.", [picture], labels)]
    if file := edit.get("x_T_file"):
        caption = f"“{attribute}” of {image}: x_T of these."
        blocks += run.attempt(result.label, lambda: _picture(album, result, file.text(), caption))
    return blocks


def _measured(result: Result, measured: Node) -> list[Block]:
    """What edits do, measured on many images."""
    rows = [[*_names(row), *_figures(row)] for row in measured["rows"].items()]
    notes = [
        "Target: change of the edited attribute's score, in standard deviations of that score over "
        "images. Others: mean absolute change of all other attributes' scores, same unit. Wanted "
        "answer: share of images that the classifier predicts as wanted. Moved aside: distance "
        "moved in z orthogonally to the direction, as a share of the mean distance between two "
        "images."
    ]
    caption = (
        f"Edits measured on n = {whole(measured.get('n'))} images, "
        f"{data_of(result.protocol)} ({seen_of(result.protocol)}); 95 % intervals in brackets. "
        f"{_how(result.protocol)}."
    )
    head = ("Attribute", "Scale", *(title for _, title, _ in _MEASURED))
    return [Table(caption, head, [Body(rows)], notes)]


def _names(row: Node) -> Sequence[Cell]:
    return [name_cell(row["attribute"].text()), number_cell(f"{row['scale'].number():+g}")]


def _figures(row: Node) -> list[Cell]:
    cells = []
    for key, _, is_share in _MEASURED:
        figure = estimate(row.get(key))
        if figure and is_share and figure.low is not None and figure.high is not None:
            bounds = f"[{share(figure.low)}, {share(figure.high)}]"
            cells.append(Cell(share(figure.value), bounds, number=True))
        elif figure and is_share:
            cells.append(number_cell(share(figure.value)))
        else:
            cells.append(figure_cell(figure))
    return cells
