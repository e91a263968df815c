"""The section on z itself: variances, dead dimensions, effective rank, neighbours."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from ..encoder import DEAD_STD
from . import plots
from .blocks import Block, Body, Facts, Figure, Fold, Plot, Plots, Section, Table
from .folder import Result, Run
from .parts import by_checkpoint, command, each, essentials, lacking, protocol_fold, section
from .pictures import Album
from .reading import Malformed, Node, number_of
from .text import NONE, decimal, name_cell, share, whole

_LISTED = 20  # indices of dead dimensions that are named


def make(run: Run, album: Album) -> Section:
    """Diagnostics of every set of latents."""
    absent = command(
        run, "No latents encoded",
        "python3 scripts/dbae_encode.py --checkpoint CKPT --dataset DATASET",
    )  # fmt: skip
    found = by_checkpoint(run, "latents", each(run, partial(_result, run, album)))
    return section("latents", "The latent z", absent, found)


def _result(run: Run, album: Album, result: Result) -> list[Block]:
    content = result.content
    blocks = lacking(run, result, "protocol", "z", "neighbours")
    n = f"{whole(content.get('n'))} images"
    if z := content.get("z"):
        blocks += run.attempt(result.label, partial(_statistics, result, z, n))
    if neighbours := content.get("neighbours"):
        blocks += run.attempt(result.label, partial(_neighbours, album, result, neighbours, n))
    return [*blocks, protocol_fold(result)]


def _statistics(result: Result, z: Node, n: str) -> list[Block]:
    std, spectrum = np.asarray(z["std"].numbers()), np.asarray(z["spectrum"].numbers())
    if not len(std) or not len(spectrum):
        raise Malformed("z.std or z.spectrum is empty")
    dead, rank = z.get("dead"), number_of(z.get("effective_rank"))
    indices = dead.numbers() if dead else []
    listed = ", ".join(f"{i:g}" for i in indices[:_LISTED]) + " …" * (len(indices) > _LISTED)
    total = spectrum.sum()
    tenth = spectrum[: max(1, len(spectrum) // 10)].sum() / total if total > 0 else math.nan
    facts = [
        ("Numbers in z", str(len(std))),
        ("Effective rank", decimal(rank, 1)),
        ("Dead dimensions", f"{len(indices)}{f' (of index {listed})' if indices else ''}"),
        ("Variance in the first tenth", share(tenth) if math.isfinite(tenth) else NONE),
    ]
    id = result.id
    drawn = [
        Plot("Variance along principal directions",
             plots.spectrum(f"spectrum{id}", "Eigenvalues of the covariance of z, falling",
                            spectrum, "principal direction", first=1)),
        Plot("Standard deviation of each dimension",
             plots.spectrum(f"std{id}", "Standard deviation of each dimension of z", std,
                            "index of the dimension", first=0, floor=DEAD_STD),
             ("std", f"dead below {DEAD_STD:g}")),
    ]  # fmt: skip
    caption = (
        f"z of {n}. {essentials(result.protocol)} Effective rank: exp of the entropy of the "
        "normalised spectrum. Variance in the first tenth: share of the largest tenth of the "
        "principal directions."
    )
    return [Facts(facts), Plots(caption, drawn)]


def _neighbours(album: Album, result: Result, node: Node, n: str) -> list[Block]:
    queries, found = node["queries"].texts(), [row.texts() for row in node["neighbours"].items()]
    distance = node.get("distance")
    how = f" ({distance.text()})" if distance else ""
    caption = f"Left: {len(queries)} images; beside each, its nearest in z among {n}{how}."
    picture = album.load(result.folder / node["file"].text(), caption)
    rows = [
        [name_cell(query), name_cell(", ".join(nearest))]
        for query, nearest in zip(queries, found, strict=False)
    ]
    names = Table("Names of these images.", ("Image", "Nearest in z"), [Body(rows)])
    return [Figure(caption, [picture]), Fold("Names of these images", [names])]
