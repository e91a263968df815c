"""The section on reconstruction: tables, published rows, pictures, error per image."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
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
from . import plots, text
from .folder import Result
from .page import Page

_EXAMPLES = 4  # images shown of the best, of the median and of the worst
_SMALL = 128  # pixels of an image that is shown by itself
_LOWER_IS_BETTER = {"mse": True, "ssim": False, "lpips": True}
_HEAD = ("Method", "MSE\N{NO-BREAK SPACE}↓", "SSIM\N{NO-BREAK SPACE}↑", "LPIPS\N{NO-BREAK SPACE}↓")


class Row(NamedTuple):
    """One method's figures."""

    method: str
    scores: Mapping[str, tuple[float, float | None]]  # metric → mean, standard error
    about: Sequence[str]  # n, sampler, NFE, seed, z
    note: str = ""


class Scored(NamedTuple):
    """A result, its own row, and those of other methods on the same images."""

    result: Result
    own: Row
    others: Sequence[Row]
    compat: bool  # counted as the published script does
    images: Any  # what results of one table have in common: images, counting, weights


def read(result: Result) -> Scored:
    """The rows of a result; any exception where its file is damaged."""
    content, protocol = result.content, result.protocol
    compat = _is_compat(content)
    how = (text.sampler_of(protocol), *_about(protocol), text.plain(protocol.get("latent")))
    own = _row("DBAE, counted as published" if compat else "DBAE", content, how)
    others = []
    if standard := content.get("standard"):
        rightly = {**standard, "lpips": content.get("lpips")}
        others.append(_row("DBAE, counted rightly", rightly, how))
    for name, found in (content.get("baselines") or {}).items():
        label = str(found.get("label", name))
        if reason := found.get("reason"):
            others.append(Row(label, {}, [text.NONE] * 5, reason))
        elif _is_compat(found) == compat:
            how = (text.NONE, *_about(found), text.NONE)
            others.append(_row(label, found, how, found.get("note") or ""))
    same = (
        text.plain((protocol.get("dataset") or {}).get("fingerprint")), text.data_of(protocol),
        text.seen_of(protocol), own.about[0], compat, text.checkpoint_of(protocol),
    )  # fmt: skip
    return Scored(result, own, others, compat, same)


def _is_compat(content: Mapping[str, Any]) -> bool:
    return (content.get("protocol") or content).get("reference_compat") is True


def _about(found: Mapping[str, Any]) -> tuple[str, str]:
    return text.count(found.get("nfe")), text.plain(found.get("seed"))


def _row(method: str, figures: Mapping[str, Any], how: Sequence[str], note: str = "") -> Row:
    scores = {}
    for metric in _LOWER_IS_BETTER:
        if score := figures.get(metric):
            error = score.get("stderr")
            scores[metric] = float(score["mean"]), None if error is None else float(error)
    return Row(method, scores, (text.count(figures["mse"]["n"]), *how), note)


def make(page: Page) -> Markup:
    """Tables, published rows and pictures of every sampler run."""
    shown = page.by_checkpoint("reconstruction", partial(_of_checkpoint, page))
    return shown + _published(page) if shown else shown


def _of_checkpoint(page: Page, results: Sequence[Result]) -> Markup:
    shown = Markup()
    sets: dict[Any, list[Scored]] = {}
    for result in results:
        scored = page.attempt(result.label, "", partial(read, result))
        if isinstance(scored, Markup):
            shown += scored
        else:
            sets.setdefault(scored.images, []).append(scored)
    for same in sets.values():
        same.sort(key=lambda scored: scored.own.scores["mse"][0])
        shown += page.attempt(same[0].result.label, "the table", partial(_table, page, same))
        for result in (scored.result for scored in same):
            sampler, pictures = text.sampler_of(result.protocol), _pictures(page, result)
            if result is same[0].result:
                shown += page.html.heading(sampler, 4) + pictures
            else:
                shown += page.html.fold(f"Pictures and error per image: {sampler}", pictures)
    return shown


# Tables ---------------------------------------------------------------------------------------


def _table(page: Page, same: Sequence[Scored]) -> Markup:
    """All sampler runs on the same images, then what they are to be compared with."""
    own = [scored.own for scored in same]
    others = list({repr(row): row for scored in same for row in scored.others}.values())
    best = {}
    for metric, lower in _LOWER_IS_BETTER.items():
        means = [row.scores[metric][0] for row in [*own, *others] if metric in row.scores]
        best[metric] = text.best_of(means, lower)
    rows: list[Any] = [_cells(row, best) for row in own]
    if others:
        rows += ["For comparison, same images", *(_cells(row, best) for row in others)]
    head = (*_HEAD, "n", "Sampler", "NFE", "Seed", "z")
    return page.html.table(_caption(same), head, rows, _notes(same, others), words=(0, 5, 8))


def _cells(row: Row, best: Mapping[str, float | None]) -> list[str]:
    cells = [row.method]
    for metric, top in best.items():
        mean, error = row.scores.get(metric, (None, None))
        if mean is None:
            cells.append(text.NONE)
        else:
            small = None if error is None else f"± {error:.{_digits(metric, mean)}f}"
            cells.append(text.with_small(mean_text(metric, mean), small, bold=mean == top))
    return [*cells, *row.about]


def mean_text(metric: str, mean: float) -> str:
    """The mean with as many digits as the metric calls for."""
    return f"{mean:.{_digits(metric, mean)}f}"


def _digits(metric: str, mean: float) -> int:
    return 4 if metric != "mse" else 7 if abs(mean) < 1e-3 else 5


def _caption(same: Sequence[Scored]) -> str:
    protocol = same[0].result.protocol
    weights = ", ".join(dict.fromkeys(text.checkpoint_of(s.result.protocol) for s in same))
    size = (protocol.get("model") or {}).get("image_size")
    which = "; ".join(filter(None, (text.seen_of(protocol), protocol.get("selection"))))
    return (
        f"Reconstruction of {same[0].own.about[0]} images, {text.data_of(protocol)} ({which})"
        f"{f', {size}×{size} pixels' if size else ''}, by {weights}. Mean ± standard error over "
        "images; best of each column in bold."
    )


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
    same, larger = f"Code of {code} numbers", "Larger codes"
    cells: dict[str, list[list[str]]] = {same: [], larger: []}
    for row in published.RECONSTRUCTIONS:
        figures = map(text.decimal, (row.mse, row.ssim, row.lpips))
        title = same if row.latent_dim == code else larger
        cells[title].append([row.method, *figures, text.count(row.latent_dim)])
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
    rows = [same, *cells[same], larger, *cells[larger]]
    head = (*_HEAD, "Numbers per image")
    return page.html.table(caption, head, rows, [note], tone="published")


# Pictures and error per image -----------------------------------------------------------------


def _pictures(page: Page, result: Result) -> Markup:
    """What there is to see of one sampler run."""
    sampler = text.sampler_of(result.protocol)
    caption = f"Originals, x_T and reconstructions: the first images scored ({sampler})."
    strip = partial(page.strip, result.folder / "comparison.png", caption)
    shown = page.attempt(result.label, "the comparison", strip)
    parts = ("per_image", _histograms), ("per_image", _examples)
    return shown + page.parts(result, parts, ("protocol", "baselines", "per_image"))


def _histograms(page: Page, result: Result) -> Markup:
    """How each metric is spread over the images."""
    per_image = result.content["per_image"]
    drawn, ranges = [], []
    for metric in _LOWER_IS_BETTER:
        if per_image.get(metric):
            values, name = np.array(per_image[metric], dtype=np.float64), metric.upper()
            marks = float(np.median(values)), float(values.mean())
            title, axis = f"Histogram of {name}", f"{name} of an image"
            svg = plots.histogram(result.label, title, values, marks, axis)
            drawn.append((f"{name}: number of images", svg, ("images", "median", "mean")))
            texts = [text.decimal(float(v), 4) for v in (*marks, values.min(), values.max())]
            ranges.append("{} median {}, mean {}, from {} to {}".format(name, *texts))
    n, sampler = text.count(len(per_image["mse"])), text.sampler_of(result.protocol)
    return page.html.plots(drawn, f"Each of {n} images ({sampler}): {'; '.join(ranges)}.")


def _examples(page: Page, result: Result) -> Markup:
    """The best, median and worst images, each beside its reconstruction."""
    if not any(result.folder.glob("*_real_sample_*.npz")):
        line = "Best, median and worst images are not shown: the arrays are not in the folder."
        return page.html.text(line, "note")
    per_image, compat = result.content["per_image"], _is_compat(result.content)
    errors = np.array(per_image["mse"], dtype=np.float64)
    names = per_image.get("name") or [f"image {i}" for i in range(len(errors))]
    read_pair = _reader(page, result.folder, len(errors))
    order = np.argsort(errors, kind="stable")
    k = min(_EXAMPLES, max(1, len(order) // 3))
    middle = (len(order) - k) // 2
    chosen = {
        "Best": order[:k],
        "Median": order[middle : middle + k],
        "Worst": order[: -k - 1 : -1],
    }
    shown = Markup()
    for title, positions in chosen.items():
        pictures = []
        for i in positions.tolist():
            pair = read_pair(i)
            measured = float(mse(*(image[None] for image in pair)))
            if not compat and not np.isclose(measured, errors[i], rtol=1e-4, atol=1e-6):
                raise ValueError(
                    f"the arrays do not belong to metrics.json: image {i} has MSE {measured:.6g} "
                    f"there and {errors[i]:.6g} here; score the folder again with "
                    "eval_reconstruction.py"
                )
            alt = f"Original and reconstruction of {names[i]}"
            picture = page.picture(_side_by_side(*pair), alt)
            pictures.append((picture, text.decimal(errors[i], 5), names[i]))
        caption = f"{title}: original and reconstruction, with their MSE."
        shown += page.html.pictures(pictures, caption)
    return shown


def _reader(page: Page, folder: Path, n: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Reads an original and its reconstruction, uint8 (3, H, W), by their place among n images."""
    files = find_pairs(folder)
    lengths = np.array([[_length(page.file(path)) for path in pair] for pair in files])
    reals, fakes = lengths.sum(0)
    if (lengths[:, 0] != lengths[:, 1]).any() or reals != n:
        found = f"{reals} originals and {fakes} reconstructions"
        raise ValueError(f"the arrays hold {found}, metrics.json scores {n}")
    ends = lengths[:, 0].cumsum()

    def read_pair(position: int) -> tuple[Tensor, Tensor]:
        i = int(np.searchsorted(ends, position, side="right"))
        real, fake = (read_samples(path)[position - ends[i]] for path in files[i])
        if real.shape != fake.shape:
            raise ValueError(f"originals and reconstructions of batch {i} differ in size")
        return real, fake

    return read_pair


def _length(path: Path) -> int:
    """The number of images in an npz, from its header: all of them may be more than memory."""
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
