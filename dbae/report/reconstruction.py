"""The section on reconstruction: tables, published rows, pictures, error per image."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..evaluation import published
from ..evaluation.metrics import mse
from ..evaluation.results import find_pairs, read_samples
from . import plots
from .blocks import (
    Block,
    Body,
    Cell,
    Figure,
    Fold,
    Heading,
    Picture,
    Plot,
    Plots,
    Section,
    Table,
    Text,
)
from .folder import Result, Run
from .parts import (
    by_checkpoint,
    checkpoint_of,
    command,
    data_of,
    lacking,
    protocol_fold,
    sampler_of,
    section,
    seen_of,
    text_or,
    weights_of,
)
from .pictures import Album
from .reading import Malformed, Node, number_of
from .text import NONE, count, decimal, name_cell, number_cell, plain, whole

_EXAMPLES = 4  # images shown of the best, of the median and of the worst
_MOST_BYTES = 2**30  # of an array that is read
_SMALL = 128  # pixels of an image that is shown by itself
_COMPARISON = "comparison.png"
_METRICS = ("mse", "ssim", "lpips")
_HEAD = ("Method", "MSE\N{NO-BREAK SPACE}↓", "SSIM\N{NO-BREAK SPACE}↑", "LPIPS\N{NO-BREAK SPACE}↓")
_LOWER_IS_BETTER = ("mse", "lpips")


@dataclasses.dataclass(frozen=True)
class Score:
    """A mean over images."""

    mean: float
    stderr: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One method's figures. `scores`: by metric, None where it was not computed."""

    method: str
    scores: dict[str, Score | None]
    about: tuple[str, ...]  # sampler, NFE, seed, z, weights
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Scored:
    """A result with its rows, read."""

    result: Result
    mse: Score
    own: Row
    others: tuple[Row, ...]
    problems: tuple[str, ...]  # rows that could not be read

    @property
    def compat(self) -> bool:
        """Whether it is counted as the published script does."""
        return _is_compat(self.result.content)

    @property
    def same_images(self) -> tuple[str, ...]:
        """Results that agree in this stand in one table."""
        protocol = self.result.protocol
        fingerprint = plain(protocol.find("dataset", "fingerprint"))
        n, compat = str(self.mse.n), str(self.compat)
        return fingerprint, data_of(protocol), seen_of(protocol), n, compat


def read(result: Result) -> Scored:
    """The figures of a result. Malformed where its own MSE is missing."""
    content, protocol = result.content, result.protocol
    about = (
        sampler_of(protocol), whole(protocol.find("nfe")), plain(protocol.find("seed")),
        plain(protocol.find("latent")), weights_of(protocol),
    )  # fmt: skip
    compat = _is_compat(content)
    own = Row("DBAE, counted as published" if compat else "DBAE", _scores(content), about)
    others: list[Row] = []
    problems: list[str] = []
    if standard := content.get("standard"):
        scores = {**_scores(standard), "lpips": own.scores["lpips"]}
        others.append(Row("DBAE, counted rightly", scores, about))
    baselines = content.get("baselines")
    for name, node in baselines.members() if baselines else []:
        try:
            if node.get("reason") or _is_compat(node) == compat:
                others.append(_baseline(name, node))
        except Malformed as error:
            problems.append(str(error))
    return Scored(result, _score(content["mse"]), own, tuple(others), tuple(problems))


def _baseline(name: str, node: Node) -> Row:
    """Another method's row, or the reason why it has none."""
    label = text_or(node.get("label"), name)
    if reason := node.get("reason"):
        return Row(label, dict.fromkeys(_METRICS), (NONE,) * 5, reason.text())
    how = (NONE, whole(node.get("nfe")), plain(node.get("seed")), NONE, NONE)
    return Row(label, _scores(node), how, text_or(node.get("note"), ""))


def _is_compat(node: Node) -> bool:
    stated = node.find("protocol", "reference_compat") or node.find("reference_compat")
    return stated is not None and stated.value is True


def _scores(node: Node) -> dict[str, Score | None]:
    node["mse"]  # the one figure without which there is no row
    return {name: _score(found) if (found := node.get(name)) else None for name in _METRICS}


def _score(node: Node) -> Score:
    return Score(node["mean"].number(), number_of(node.get("stderr")), node["n"].whole())


def make(run: Run, album: Album) -> Section:
    """Tables, published rows and pictures of every sampler run."""
    absent = command(
        run,
        "No reconstruction scored",
        "bash recon_dbae.sh DATASET SCHEDULE CKPT 0 1 test 7 euler 100 STO",
    )
    found = by_checkpoint(run, "reconstruction", partial(_of_checkpoint, run, album))
    return section("reconstruction", "Reconstruction", absent, [*found, _published()] * bool(found))


def _of_checkpoint(run: Run, album: Album, results: Sequence[Result]) -> list[Block]:
    sets: dict[tuple[str, ...], list[Scored]] = {}
    blocks: list[Block] = []
    for result in results:
        try:
            scored = read(result)
        except Malformed as error:
            blocks.append(run.report(result.label, str(error)))
            continue
        blocks += [run.report(result.label, problem) for problem in scored.problems]
        blocks += lacking(run, result, "protocol", "baselines", "per_image")
        sets.setdefault(scored.same_images, []).append(scored)
    for same in sets.values():
        same.sort(key=lambda scored: (scored.mse.mean, scored.result.label))
        blocks.append(_table(same))
        first, *more = same
        blocks += [Heading(first.own.about[0], 4), *_run_blocks(run, album, first)]
        for scored in more:
            title = f"Pictures and error per image: {scored.own.about[0]}"
            blocks.append(Fold(title, _run_blocks(run, album, scored)))
        blocks += [protocol_fold(scored.result) for scored in same]
    return blocks


# Tables ---------------------------------------------------------------------------------------


def _table(same: Sequence[Scored]) -> Table:
    """All sampler runs on the same images, then what they are to be compared with."""
    own = [scored.own for scored in same]
    others = list({repr(row): row for s in same for row in s.others}.values())
    best = {name: _best(name, [*own, *others]) for name in _METRICS}
    protocol = same[0].result.protocol
    weights = _distinct([checkpoint_of(scored.result.protocol) for scored in same])
    size = protocol.find("model", "image_size")
    selection = protocol.find("selection")
    caption = (
        f"Reconstruction of {count(same[0].mse.n)} images, {data_of(protocol)}"
        f" ({seen_of(protocol)}{f'; {plain(selection)}' if selection else ''})"
        f"{f', {plain(size)}×{plain(size)} pixels' if size else ''}, by {', '.join(weights)}."
        " Mean ± standard error over images; best of each column in bold."
    )
    bodies = [Body([_row(row, best) for row in own])]
    if others:
        bodies.append(Body([_row(row, best) for row in others], "For comparison, same images"))
    head = (*_HEAD, "n", "Sampler", "NFE", "Seed", "z", "Weights")
    return Table(caption, head, bodies, _notes(same, others))


def _notes(same: Sequence[Scored], others: Sequence[Row]) -> list[str]:
    contents = [scored.result.content for scored in same]
    reasons = [text_or(c.get("lpips_reason"), "") for c in contents if c.get("lpips") is None]
    notes = [f"LPIPS not computed: {reason or 'no reason given'}." for reason in _distinct(reasons)]
    if any(scored.compat for scored in same):
        notes.append(
            "Counted as the published script does (--reference_compat): comparable with published "
            "figures only."
        )
    about: dict[str, list[str]] = {}
    for row in others:
        if row.note:
            about.setdefault(row.note, []).append(row.method)
    notes += [f"{'; '.join(_distinct(methods))}: {note}." for note, methods in about.items()]
    if any(row.method == "x_T" for row in others):
        notes.append("x_T: the endpoint decoded from z, without any denoising.")
    return notes


def _distinct(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _best(metric: str, rows: Sequence[Row]) -> float | None:
    means = [score.mean for row in rows if (score := row.scores[metric])]
    if len(means) < 2:
        return None
    return min(means) if metric in _LOWER_IS_BETTER else max(means)


def _row(row: Row, best: dict[str, float | None]) -> list[Cell]:
    sampler, nfe, seed, latent, weights = row.about
    figures = [_score_cell(name, row.scores[name], best[name]) for name in _METRICS]
    n = {count(score.n) for score in row.scores.values() if score}
    return [
        name_cell(row.method), *figures, number_cell(" / ".join(sorted(n)) or NONE),
        name_cell(sampler), number_cell(nfe), number_cell(seed), name_cell(latent),
        name_cell(weights),
    ]  # fmt: skip


def _score_cell(metric: str, score: Score | None, best: float | None) -> Cell:
    """Mean and standard error."""
    if score is None:
        return number_cell(NONE)
    digits = _digits(metric, score)
    error = "" if score.stderr is None else f"± {score.stderr:.{digits}f}"
    return Cell(mean_text(metric, score), error, number=True, best=score.mean == best)


def mean_text(metric: str, score: Score) -> str:
    """The mean with as many digits as the metric calls for."""
    return f"{score.mean:.{_digits(metric, score)}f}"


def _digits(metric: str, score: Score) -> int:
    if metric != "mse":
        return 4
    return 7 if abs(score.mean) < 1e-3 else 5


def _published() -> Table:
    rows = published.RECONSTRUCTIONS
    code = min(row.latent_dim for row in rows)

    def body(title: str, larger: bool) -> Body:
        cells = [
            [
                name_cell(row.method), number_cell(decimal(row.mse, 3)),
                number_cell(decimal(row.ssim)), number_cell(decimal(row.lpips)),
                number_cell(count(row.latent_dim)),
            ]
            for row in rows
            if (row.latent_dim > code) == larger
        ]  # fmt: skip
        return Body(cells, title)

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
    bodies = [body(f"Code of {code} numbers", False), body("Larger codes", True)]
    return Table(caption, head, bodies, [note], tone="published")


# Pictures and error per image -----------------------------------------------------------------


def _run_blocks(run: Run, album: Album, scored: Scored) -> list[Block]:
    """What there is to see of one sampler run."""
    result, sampler = scored.result, scored.own.about[0]

    def comparison() -> list[Block]:
        caption = f"Originals, x_T and reconstructions: the first images scored ({sampler})."
        return [Figure(caption, [album.load(result.folder / _COMPARISON, caption)])]

    blocks = run.attempt(result.label, comparison)
    if result.content.get("per_image"):
        blocks += run.attempt(result.label, partial(_per_image, run, album, scored))
    return blocks


def _per_image(run: Run, album: Album, scored: Scored) -> list[Block]:
    content = scored.result.content["per_image"]
    errors = np.asarray(content["mse"].numbers())
    if not len(errors):
        raise Malformed("per_image.mse is empty")
    names = content.get("name")
    texts = names.texts() if names else [f"image {i}" for i in range(len(errors))]
    if len(texts) != len(errors):
        raise Malformed(f"per_image has {len(texts)} names for {len(errors)} images")
    drawn = _histograms(scored, content)
    if not any(scored.result.folder.glob("*_real_sample_*.npz")):
        line = "Best, median and worst images are not shown: the arrays are not in the folder."
        return [drawn, Text(line, "note")]
    examples = partial(_examples, run, album, scored, errors, texts)
    return [drawn, *run.attempt(scored.result.label, examples)]


def _histograms(scored: Scored, per_image: Node) -> Plots:
    """How each metric is spread over the images."""
    drawn, ranges = [], []
    for metric in _METRICS:
        if not (node := per_image.get(metric)) or not node.items():
            continue
        values, name = np.asarray(node.numbers()), metric.upper()
        median, mean = float(np.median(values)), float(values.mean())
        id = f"histogram{metric}{scored.result.id}"
        svg = plots.histogram(
            id, f"Histogram of {name}", values, (median, mean), f"{name} of an image"
        )
        drawn.append(Plot(f"{name}: number of images", svg, ("images", "median", "mean")))
        texts = [decimal(float(v), 4) for v in (median, mean, values.min(), values.max())]
        ranges.append("{} median {}, mean {}, from {} to {}".format(name, *texts))
    n = len(per_image["mse"].items())
    caption = f"Each of {count(n)} images ({scored.own.about[0]}): {'; '.join(ranges)}."
    return Plots(caption, drawn)


def _examples(
    run: Run, album: Album, scored: Scored, errors: np.ndarray, names: Sequence[str]
) -> list[Block]:
    """The best, median and worst images, each beside its reconstruction."""
    order = np.argsort(errors, kind="stable")
    k = min(_EXAMPLES, max(1, len(order) // 3))
    middle = (len(order) - k) // 2
    chosen = {
        "Best": order[:k],
        "Median": order[middle : middle + k],
        "Worst": order[-k:][::-1],
    }
    pairs = _Pairs(run, scored.result.folder, len(errors))
    figures: list[Block] = []
    for title, positions in chosen.items():
        pictures = [
            _pair(album, pairs, int(i), errors, names[i], check=not scored.compat)
            for i in positions
        ]
        figures.append(Figure(f"{title}: original and reconstruction, with their MSE.", pictures))
    return figures


def _pair(
    album: Album, pairs: _Pairs, position: int, errors: np.ndarray, name: str, check: bool
) -> Picture:
    """An original and its reconstruction side by side."""
    images = pairs.read(position)
    stated = float(errors[position])
    measured = float(mse(*(image[None] for image in images)))
    if check and abs(measured - stated) > 1e-6 + 1e-4 * stated:
        raise Malformed(
            f"the arrays do not belong to metrics.json: image {position} has MSE {measured:.6g} "
            f"there and {stated:.6g} here; score the folder again with eval_reconstruction.py"
        )
    size = min(images[0].shape[2], _SMALL)
    canvas = Image.new("RGB", (2 * size, round(size * images[0].shape[1] / images[0].shape[2])))
    for i, image in enumerate(images):
        tile = Image.fromarray(image.permute(1, 2, 0).numpy())
        canvas.paste(tile.resize((size, canvas.height), Image.Resampling.BOX), (i * size, 0))
    caption = Markup("<b>{}</b> <bdi>{}</bdi>").format(decimal(stated, 5), name)
    return album.picture(canvas, f"Original and reconstruction of {name}", caption)


class _Pairs:
    """The originals and reconstructions of a folder, by their place among its scored images."""

    def __init__(self, run: Run, folder: Path, n: int) -> None:
        self._root = run.root
        try:
            self._files = find_pairs(folder)
        except UserError as error:
            raise self._malformed(error) from error
        lengths = [_length(run.inside(path)) for pair in self._files for path in pair]
        self._ends = np.cumsum(lengths[::2])
        if lengths[::2] != lengths[1::2] or self._ends[-1] != n:
            raise Malformed(
                f"the arrays hold {sum(lengths[::2])} originals and {sum(lengths[1::2])} "
                f"reconstructions, metrics.json scores {n}"
            )

    def read(self, position: int) -> tuple[Tensor, Tensor]:
        """Original and reconstruction, each uint8 (3, H, W)."""
        i = int(np.searchsorted(self._ends, position, side="right"))
        try:
            real, fake = (read_samples(path) for path in self._files[i])
        except Exception as error:  # damaged archives make numpy and zipfile raise many kinds
            raise self._malformed(error) from error
        if real.shape != fake.shape:
            raise Malformed(f"originals and reconstructions of batch {i} differ in size")
        row = position - int(self._ends[i])  # counted from the end of its file
        return real[row], fake[row]

    def _malformed(self, error: Exception) -> Malformed:
        """With paths as within the run's folder: the page is the same wherever that lies."""
        return Malformed(str(error).replace(f"{self._root}{os.sep}", ""))


def _length(path: Path) -> int:
    """The number of images in an npz, from its header."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("samples.npy") as entry:
            np.lib.format.read_magic(entry)
            shape, _, dtype = np.lib.format.read_array_header_1_0(entry)
    except Exception as error:  # damaged archives make numpy and zipfile raise many kinds
        raise Malformed(f"{path.name} is not a readable file of images ({error})") from error
    if len(shape) != 4 or np.prod(shape, dtype=float) * dtype.itemsize > _MOST_BYTES:
        raise Malformed(f"{path.name} holds an array of shape {shape}, expected images")
    return int(shape[0])
