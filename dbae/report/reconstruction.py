"""The section on reconstruction: tables, published rows, pictures, error per image."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from ..evaluation import published
from ..evaluation.metrics import mse
from ..evaluation.results import find_pairs, read_samples
from . import plots
from .folder import Result
from .page import Page
from .text import (
    NONE,
    best_of,
    checkpoint_of,
    count,
    data_of,
    decimal,
    plain,
    sampler_of,
    seen_of,
    weights_of,
    with_small,
)

_EXAMPLES = 4  # images shown of the best, of the median and of the worst
_SMALL = 128  # pixels of an image that is shown by itself
_LOWER_IS_BETTER = {"mse": True, "ssim": False, "lpips": True}
_HEAD = ("Method", "MSE\N{NO-BREAK SPACE}↓", "SSIM\N{NO-BREAK SPACE}↑", "LPIPS\N{NO-BREAK SPACE}↓")


class Row(NamedTuple):
    """One method's figures."""

    method: str
    scores: Mapping[str, tuple[float, float | None]]  # metric → mean, standard error
    n: int | None
    about: Sequence[str]  # sampler, NFE, seed, z, weights
    note: str


class Scored(NamedTuple):
    """A result's own row, and those of other methods on the same images."""

    result: Result
    sampler: str
    compat: bool  # counted as the published script does
    own: Row
    others: Sequence[Row]
    images: Sequence[str]  # what results on the same images have in common


def read(result: Result) -> Scored:
    """The rows of a result; any exception where its file is damaged."""
    content, protocol = result.content, result.protocol
    compat, sampler = _is_compat(content), sampler_of(protocol)
    about = (
        sampler, count(protocol.get("nfe")), plain(protocol.get("seed")),
        plain(protocol.get("latent")), weights_of(protocol),
    )  # fmt: skip
    own = _row("DBAE, counted as published" if compat else "DBAE", content, about)
    others = []
    if standard := content.get("standard"):
        rightly = {**standard, "lpips": content.get("lpips")}
        others.append(_row("DBAE, counted rightly", rightly, about))
    for name, found in (content.get("baselines") or {}).items():
        label = found.get("label", name)
        if reason := found.get("reason"):
            others.append(Row(label, {}, None, (NONE,) * 5, reason))
        elif _is_compat(found) == compat:
            how = (NONE, count(found.get("nfe")), plain(found.get("seed")), NONE, NONE)
            others.append(_row(label, found, how, found.get("note") or ""))
    fingerprint = plain((protocol.get("dataset") or {}).get("fingerprint"))
    images = (fingerprint, data_of(protocol), seen_of(protocol), count(own.n), str(compat))
    return Scored(result, sampler, compat, own, others, images)


def _is_compat(content: Mapping[str, Any]) -> bool:
    stated = (content.get("protocol") or content).get("reference_compat")
    return stated is True


def _row(method: str, figures: Mapping[str, Any], about: Sequence[str], note: str = "") -> Row:
    scores = {}
    for metric in _LOWER_IS_BETTER:
        if score := figures.get(metric):
            error = score.get("stderr")
            scores[metric] = float(score["mean"]), None if error is None else float(error)
    return Row(method, scores, int(figures["mse"]["n"]), about, note)


def make(page: Page) -> Markup:
    """Tables, published rows and pictures of every sampler run."""
    shown = page.by_checkpoint("reconstruction", partial(_of_checkpoint, page))
    return shown + _published(page) if shown else shown


def _of_checkpoint(page: Page, results: Sequence[Result]) -> Markup:
    shown = Markup()
    sets: dict[Sequence[str], list[Scored]] = {}
    for result in results:
        scored = page.attempt(result.label, "the scores", partial(read, result))
        if isinstance(scored, Scored):
            sets.setdefault(scored.images, []).append(scored)
        else:
            shown += scored
    for same in sets.values():
        same.sort(key=lambda scored: scored.own.scores["mse"][0])
        shown += _table(page, same)
        first, *more = same
        shown += page.html.heading(first.sampler, 4) + _pictures(page, first)
        for scored in more:
            title = f"Pictures and error per image: {scored.sampler}"
            shown += page.html.fold(title, _pictures(page, scored))
    return shown


# Tables ---------------------------------------------------------------------------------------


def _table(page: Page, same: Sequence[Scored]) -> Markup:
    """All sampler runs on the same images, then what they are to be compared with."""
    own = [scored.own for scored in same]
    others = list({repr(row): row for scored in same for row in scored.others}.values())
    best = {
        metric: best_of(
            [row.scores[metric][0] for row in [*own, *others] if metric in row.scores], lower
        )
        for metric, lower in _LOWER_IS_BETTER.items()
    }
    protocol = same[0].result.protocol
    weights = dict.fromkeys(checkpoint_of(scored.result.protocol) for scored in same)
    size = (protocol.get("model") or {}).get("image_size")
    selection = protocol.get("selection")
    caption = (
        f"Reconstruction of {count(own[0].n)} images, {data_of(protocol)}"
        f" ({seen_of(protocol)}{f'; {plain(selection)}' if selection else ''})"
        f"{f', {plain(size)}×{plain(size)} pixels' if size else ''}, by {', '.join(weights)}."
        " Mean ± standard error over images; best of each column in bold."
    )
    rows: list[Any] = [_cells(row, best) for row in own]
    if others:
        rows += ["For comparison, same images", *(_cells(row, best) for row in others)]
    head = (*_HEAD, "n", "Sampler", "NFE", "Seed", "z", "Weights")
    return page.html.table(caption, head, rows, _notes(same, others), words=(0, 5, 8, 9))


def _cells(row: Row, best: Mapping[str, float | None]) -> list[str]:
    cells = [row.method]
    for metric, top in best.items():
        mean, error = row.scores.get(metric, (None, None))
        if mean is None:
            cells.append(NONE)
        else:
            digits = len(mean_text(metric, mean).partition(".")[2])
            small = None if error is None else f"± {error:.{digits}f}"
            cells.append(with_small(mean_text(metric, mean), small, bold=mean == top))
    return [*cells, count(row.n), *row.about]


def mean_text(metric: str, mean: float) -> str:
    """The mean with as many digits as the metric calls for."""
    if metric != "mse":
        return f"{mean:.4f}"
    return f"{mean:.7f}" if abs(mean) < 1e-3 else f"{mean:.5f}"


def _notes(same: Sequence[Scored], others: Sequence[Row]) -> list[str]:
    contents = [scored.result.content for scored in same]
    reasons = [c.get("lpips_reason") for c in contents if c.get("lpips") is None]
    notes = [f"LPIPS not computed: {reason or 'no reason given'}." for reason in reasons]
    if same[0].compat:
        notes.append(
            "Counted as the published script does (--reference_compat): comparable with published "
            "figures only."
        )
    methods: dict[str, list[str]] = {}
    for row in others:
        methods.setdefault(row.note, []).append(row.method)
    notes += [f"{'; '.join(names)}: {note}." for note, names in methods.items() if note]
    if any(row.method == "x_T" for row in others):
        notes.append("x_T: the endpoint decoded from z, without any denoising.")
    return list(dict.fromkeys(notes))


def _published(page: Page) -> Markup:
    code = min(row.latent_dim for row in published.RECONSTRUCTIONS)

    def cells(rows: Iterable[published.Reconstruction]) -> list[list[str]]:
        return [
            [r.method, decimal(r.mse), decimal(r.ssim), decimal(r.lpips), count(r.latent_dim)]
            for r in rows
        ]

    rows = [
        f"Code of {code} numbers",
        *cells(row for row in published.RECONSTRUCTIONS if row.latent_dim == code),
        "Larger codes",
        *cells(row for row in published.RECONSTRUCTIONS if row.latent_dim > code),
    ]
    note = (
        "Published rows of DBAE mix two runs: MSE and SSIM of Euler with 100 steps, LPIPS of the "
        "churned SDE; counted by the published script. They stand beside the figures above only "
        "where these are of CelebA-HQ at 128 pixels by a model trained on FFHQ, counted with "
        "--reference_compat."
    )
    caption = (
        "Published, not measured here: Table 2 of the DBAE paper. Trained on FFHQ, tested on "
        "CelebA-HQ at 128 pixels."
    )
    head = (*_HEAD, "Numbers per image")
    return page.html.table(caption, head, rows, [note], tone="published")


# Pictures and error per image -----------------------------------------------------------------


def _pictures(page: Page, scored: Scored) -> Markup:
    """What there is to see of one sampler run."""
    result, sampler = scored.result, scored.sampler

    def comparison() -> Markup:
        caption = f"Originals, x_T and reconstructions: the first images scored ({sampler})."
        picture = page.picture(result.folder / "comparison.png", caption)
        return page.html.strip(picture, caption)

    shown = page.attempt(result.label, "the comparison", comparison)
    parts = [
        ("per_image", partial(_histograms, page, scored)),
        ("per_image", partial(_examples, page, scored)),
    ]
    return shown + page.parts(result, parts, ("baselines", "per_image"))


def _histograms(page: Page, scored: Scored) -> Markup:
    """How each metric is spread over the images."""
    per_image = scored.result.content["per_image"]
    drawn, ranges = [], []
    for metric in _LOWER_IS_BETTER:
        if per_image.get(metric):
            values, name = np.asarray(per_image[metric], dtype=np.float64), metric.upper()
            marks = float(np.median(values)), float(values.mean())
            svg = plots.histogram(
                scored.result.label, f"Histogram of {name}", values, marks, f"{name} of an image"
            )
            drawn.append((f"{name}: number of images", svg, ("images", "median", "mean")))
            texts = [decimal(float(v), 4) for v in (*marks, values.min(), values.max())]
            ranges.append("{} median {}, mean {}, from {} to {}".format(name, *texts))
    n = count(len(per_image["mse"]))
    return page.html.plots(drawn, f"Each of {n} images ({scored.sampler}): {'; '.join(ranges)}.")


def _examples(page: Page, scored: Scored) -> Markup:
    """The best, median and worst images, each beside its reconstruction."""
    folder, per_image = scored.result.folder, scored.result.content["per_image"]
    if not any(folder.glob("*_real_sample_*.npz")):
        line = "Best, median and worst images are not shown: the arrays are not in the folder."
        return page.html.text(line, "note")
    errors = np.asarray(per_image["mse"], dtype=np.float64)
    names = per_image.get("name") or [f"image {i}" for i in range(len(errors))]
    read = _reader(page, folder, len(errors))
    order = np.argsort(errors, kind="stable")
    k = min(_EXAMPLES, max(1, len(order) // 3))
    middle = (len(order) - k) // 2
    shown = Markup()
    for title, positions in (
        ("Best", order[:k]), ("Median", order[middle : middle + k]), ("Worst", order[-k:][::-1]),
    ):  # fmt: skip
        pictures = []
        for i in positions:
            real, fake = read(int(i))
            measured = float(mse(real[None], fake[None]))
            if not scored.compat and not np.isclose(measured, errors[i], rtol=1e-4, atol=1e-6):
                raise ValueError(
                    f"the arrays do not belong to metrics.json: image {i} has MSE {measured:.6g} "
                    f"there and {errors[i]:.6g} here; score the folder again with "
                    "eval_reconstruction.py"
                )
            text = Markup("<b>{}</b> <bdi>{}</bdi>").format(decimal(errors[i], 5), names[i])
            alt = f"Original and reconstruction of {names[i]}"
            pictures.append(page.image(_side_by_side(real, fake), alt, text))
        caption = f"{title}: original and reconstruction, with their MSE."
        shown += page.html.pictures(pictures, caption)
    return shown


def _reader(page: Page, folder: Path, n: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Reads an original and its reconstruction, uint8 (3, H, W), by their place among n images."""
    files = find_pairs(folder)
    lengths = np.array([[_length(page.file(path)) for path in pair] for pair in files])
    reals, fakes = lengths.sum(0)
    if (lengths[:, 0] != lengths[:, 1]).any() or reals != n:
        raise ValueError(
            f"the arrays hold {reals} originals and {fakes} reconstructions, metrics.json scores {n}"
        )
    ends = lengths[:, 0].cumsum()

    def read(position: int) -> tuple[Tensor, Tensor]:
        i = int(np.searchsorted(ends, position, side="right"))
        real, fake = (read_samples(path)[position - ends[i]] for path in files[i])
        if real.shape != fake.shape:
            raise ValueError(f"originals and reconstructions of batch {i} differ in size")
        return real, fake

    return read


def _length(path: Path) -> int:
    """The number of images in an npz, from its header: a test set may be larger than memory."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("samples.npy") as entry:
            np.lib.format.read_magic(entry)
            return int(np.lib.format.read_array_header_1_0(entry)[0][0])
    except Exception as error:  # damaged archives make numpy and zipfile raise many kinds
        raise ValueError(f"{path.name} is not a readable file of images ({error})") from error


def _side_by_side(real: Tensor, fake: Tensor) -> Image.Image:
    height, width = real.shape[1:]
    size = min(width, _SMALL), round(min(width, _SMALL) * height / width)
    canvas = Image.new("RGB", (2 * size[0], size[1]))
    for i, image in enumerate((real, fake)):
        tile = Image.fromarray(image.permute(1, 2, 0).numpy())
        canvas.paste(tile.resize(size, Image.Resampling.BOX), (i * size[0], 0))
    return canvas
