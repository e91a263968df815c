"""Attributes of an image changed through z, along a linear classifier's weights.

z' = z + s · √latent_dim · w/‖w‖ with w the weights of an attribute (as DiffAE,
arXiv 2111.15640, does). Pictures show it; `measure` tells how much of the attribute, and of
everything else, arrives in the image.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import random
from ..cli import option
from ..data import CELEBA_ATTRIBUTES, ImageDataset, to_model_range
from ..errors import UserError
from ..model import DBAE
from . import pictures, results
from .classifier import AttributeClassifier
from .metrics import mse, summary
from .pictures import Made, Picture, PictureConfig, file_word
from .progress import Progress
from .protocol import (
    require_at_least,
    sampling_facts,
    sampling_line,
    seen_in_training,
    sha256,
    text_table,
    versions,
    write_png,
)
from .reconstruction import encode

CONTROL = "random direction (control)"
_SHARES = (-1.0, -0.5, 0.0, 0.5, 1.0)  # of the scale: the steps of a strip
_SCALE = 0.3
_CELEBA = (("Male", 0.3), ("Young", 0.2))  # the published edits
_Z95 = 1.959964  # of the standard normal distribution: 95 % lie within


@dataclasses.dataclass(frozen=True)
class ManipulationConfig(PictureConfig):
    """What is edited, how, and on how many images that is measured. Each field is a flag."""

    classifier: str | None = option(
        None, "weights of a linear classifier of z (default: best.pt of infer_class_dbae.sh)"
    )
    attributes: tuple[str, ...] = option(
        (), "names or numbers, comma-separated: one per image, or one for all (none: the "
        "published Male and Young for CelebA's 40, else the first two)",
    )  # fmt: skip
    scales: tuple[float, ...] = option(
        (), "longest step in z each way / sqrt(latent_dim): one per image, or one for all "
        "(none: 0.3; 0.2 for the published Young)",
    )  # fmt: skip
    recompute_x_T: bool = option(False, "decode x_T from the edited z; otherwise it is kept")
    num_measured: int = option(
        0, "also measure the edits on the first so many images of the split (0: on none)"
    )

    folder_prefix: ClassVar[str] = "manipulation_"
    default_images: ClassVar[tuple[str, ...]] = ("assets/img3.png", "assets/img4.png")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, num_measured=0)
        if self.num_measured == 1:
            raise UserError("--num_measured 1 must be 0 or at least 2, as it compares images")
        for scale in self.scales:
            if not (scale > 0 and math.isfinite(scale)):
                raise UserError(f"--scales {scale} must be positive")


class Edit(NamedTuple):
    """One strip: which input, which attribute (a row of the classifier), how far each way."""

    picture: int
    attribute: int
    scale: float

    def scales(self) -> list[float]:
        """The steps of the strip; the middle one is 0."""
        return [share * self.scale for share in _SHARES]


@dataclasses.dataclass(frozen=True)
class Strip:
    """A finished edit: images and x_T, uint8 (5, 3, S, S), and the files that they go to."""

    images: Tensor
    x_T: Tensor
    file: str
    x_T_file: str


@dataclasses.dataclass(frozen=True)
class Manipulation:
    """The strips, what metrics.json says, and its figures as a table."""

    strips: list[Strip]
    metrics: dict[str, Any]
    table: str


def edited(z: Tensor, direction: Tensor, scale: float | Tensor) -> Tensor:
    """z' = z + s · √latent_dim · direction.

    z: (…, latent_dim); direction: unit vectors that broadcast to it; scale: s, a number or a
    tensor that broadcasts to z. √latent_dim is the length of a z whose numbers have variance 1.
    """
    return z + scale * math.sqrt(z.shape[-1]) * direction


def plan(
    config: ManipulationConfig, inputs: int, classifier: AttributeClassifier
) -> tuple[list[Edit], str | None]:
    """Which edits the config asks for, and a line for the user where it leaves that open.

    Images, attributes and scales: a single one is used for all. Raises UserError where their
    numbers do not fit, and for an unknown attribute.
    """
    note = None
    attributes, scales = list(config.attributes), list(config.scales)
    if not attributes:
        published = classifier.names == CELEBA_ATTRIBUTES
        defaults = list(_CELEBA) if published else [(name, _SCALE) for name in classifier.names[:2]]
        defaults = defaults[:1] if inputs > 2 else defaults
        attributes = [name for name, _ in defaults]
        scales = scales or [scale for _, scale in defaults]
        if not published:
            steps = " and ".join(f"±{scale}" for scale in dict.fromkeys(scales))
            note = (
                f"no --attributes given: {' and '.join(attributes)}, the first of the "
                f"classifier's {len(classifier.names)}, by {steps}"
            )
    scales = scales or [_SCALE]
    count = max(inputs, len(attributes), len(scales))
    for flag, length in (
        ("image", inputs), ("attribute", len(attributes)), ("scale", len(scales))
    ):  # fmt: skip
        if length not in (1, count):
            raise UserError(f"{length} {flag}s for {count} edits: give one, or {count}")
    of = [range(inputs), [classifier.index(name) for name in attributes], scales]
    columns = (list(values) * (count if len(values) == 1 else 1) for values in of)
    return [Edit(*row) for row in zip(*columns, strict=True)], note


def manipulate(
    model: DBAE,
    inputs: Sequence[Picture],
    classifier: AttributeClassifier,
    edits: Sequence[Edit],
    config: ManipulationConfig,
    *,
    dataset: ImageDataset | None = None,
    checkpoint: Path | None = None,
    classifier_file: Path | None = None,
    progress: bool = True,
) -> Manipulation:
    """Edit the inputs, and measure the same edits on `config.num_measured` images of `dataset`.

    All images of a strip have the noise of their input (z noise of a stochastic encoder, churn).

    Args:
        model: in eval mode.
        inputs: the images that `edits` number.
        classifier: of this model's z.
        dataset: a split with images to be measured; needed where num_measured > 0.
        checkpoint, classifier_file: to be named in the protocol.
        progress: show it.

    Raises:
        UserError: an attribute without direction or whose score is the same for all measured
            images; fewer than two of these; an unreadable image; output that is not finite.
    """
    made = _make_strips(model, inputs, classifier, edits, config, progress)
    strips = [
        Strip(images, x_T, *files)
        for images, x_T, files in zip(
            made.images.split(len(_SHARES)),
            made.x_T.split(len(_SHARES)),
            _files(edits, inputs, classifier),
            strict=True,
        )
    ]
    measured: dict[str, Any] | None = None
    about: dict[str, Any] = {}
    if config.num_measured:
        if dataset is None:
            raise ValueError("measuring needs a data set")
        measured, about = measure(model, classifier, edits, dataset, config, progress)
    described = dataset.describe() if dataset else None
    metrics = {
        "kind": "manipulation",
        "protocol": {
            "edit": "z' = z + scale * sqrt(latent_dim) * w / ||w||, w the classifier's weights",
            "x_T": "decoded from z'" if config.recompute_x_T else "decoded from z, kept",
            "classifier": {
                "file": classifier_file.name if classifier_file else None,
                "sha256": sha256(classifier_file) if classifier_file else None,
                "attributes": list(classifier.names),
            },
            "dataset": described,
            "seen_in_training": seen_in_training(model, described) if described else None,
            "inputs": [given.facts for given in inputs],
            **sampling_facts(model, config, checkpoint),
            "num_measured": config.num_measured,
            "nfe": made.nfe,
            "noise": "all images of one input have the same",
            "judge": "the classifier whose weights are followed, on the same encoder's z of the "
            "made image (the mean of a stochastic encoder): it tells whether the change can be "
            "read from the image again, not whether a person, or another network, sees it",
            "probability": "of the attribute, by the judge, for each image of a strip",
            "change": "of the judge's score against the unedited image, in its standard "
            "deviations over the classifier's test images",
            **about,
            "versions": versions("pillow"),
        },
        "edits": [
            {
                "image": inputs[edit.picture].name,
                "attribute": classifier.names[edit.attribute],
                "scales": edit.scales(),
                "file": strip.file,
                "x_T_file": strip.x_T_file,
                **_answers(classifier, edit.attribute, reencode(model, strip.images, config)),
            }
            for edit, strip in zip(edits, strips, strict=True)
        ],
        "measured": measured,
    }
    return Manipulation(strips, metrics, _table(metrics))


def _make_strips(
    model: DBAE,
    inputs: Sequence[Picture],
    classifier: AttributeClassifier,
    edits: Sequence[Edit],
    config: ManipulationConfig,
    progress: bool,
) -> Made:
    """The images of all edits, five each, in their order."""
    z = encode(model, pictures.to_batch(inputs, model), config, range(len(inputs)))
    numbers = [edit.picture for edit in edits for _ in _SHARES]
    z = z[numbers]
    directions = [classifier.direction(edit.attribute) for edit in edits for _ in _SHARES]
    scales = torch.tensor([s for edit in edits for s in edit.scales()])[:, None]
    moved = edited(z, torch.stack(directions).to(z), scales.to(z))
    shown = Progress(
        "made", pictures.batches(len(z), config), len(z), config.steps, active=progress
    )
    endpoint_z = moved if config.recompute_x_T else z
    made = pictures.make_images(model, moved, config, numbers, shown, endpoint_z)
    shown.close()
    return made


@torch.no_grad()
def reencode(model: DBAE, images: Tensor, config: ManipulationConfig) -> Tensor:
    """uint8 images (n, 3, S, S) → z (n, latent_dim), of a stochastic encoder its mean.

    float64 on the CPU, where the figures are computed.
    """
    device = next(model.parameters()).device
    parts = images.split(config.batch_size)
    z = [model.encode(to_model_range(part.to(device)), mean=True).cpu() for part in parts]
    return torch.cat(z).double()


def _answers(classifier: AttributeClassifier, k: int, z: Tensor) -> dict[str, Any]:
    """What the classifier says of a strip's images; the change where it knows its unit."""
    scores = classifier.scores(z)[:, k]
    change = None
    if classifier.score_std is not None and classifier.score_std[k] > 0:
        change = ((scores - scores[len(scores) // 2]) / classifier.score_std[k]).tolist()
    return {"probability": scores.sigmoid().tolist(), "change": change}


def _files(
    edits: Sequence[Edit], inputs: Sequence[Picture], classifier: AttributeClassifier
) -> list[tuple[str, str]]:
    """Names for the strips of images and of x_T: the input's, where several have that also the
    attribute's, where several have both also a number."""
    names = [inputs[edit.picture].stem for edit in edits]
    attributes = [file_word(classifier.names[edit.attribute]) for edit in edits]
    for words in (attributes, range(len(edits))):
        often = Counter(names)
        names = [
            f"{name}_{word}" if often[name] > 1 else name
            for name, word in zip(names, words, strict=True)
        ]
    return [(f"{name}_manipulated_x0.png", f"{name}_manipulated_xT.png") for name in names]


# Measured edits -----------------------------------------------------------------------------


def measure(
    model: DBAE,
    classifier: AttributeClassifier,
    edits: Sequence[Edit],
    dataset: ImageDataset,
    config: ManipulationConfig,
    progress: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Edit the first images of a split, each way, and compare with their reconstructions.

    Besides each edit there is a control: the same step along a random direction, another one for
    each image, judged as the first edit is.

    Returns ({"n", "rows"}, facts for the protocol), in the form of metrics.json.
    """
    n = min(config.num_measured, len(dataset))
    if n < 2:
        raise UserError(
            f"split {dataset.split} has only {n} image: measuring compares at least two, so choose "
            "another --split or leave out --num_measured"
        )
    z, replaced = _encode_first(model, dataset, config, n)
    ours = z.cpu().double()
    std = classifier.scores(ours).std(0)
    if flat := [name for name, s in zip(classifier.names, std, strict=True) if not s > 0]:
        raise UserError(
            f"the classifier's score of {', '.join(flat)} is the same for all {n} images, so that "
            "its changes have no unit; measure other images, or mend the classifier"
        )
    distance = mean_distance(ours)
    variants = _variants(edits, classifier)
    runs = 1 + len(variants)
    shown = Progress(
        "made",
        runs * pictures.batches(n, config),
        runs * n,
        config.steps,
        active=progress,
    )
    unedited = pictures.make_images(model, z, config, range(n), shown).images
    before = reencode(model, unedited, config)
    rows = []
    for variant in variants:
        directions = (
            random_directions(z, config.seed)
            if variant.random
            else classifier.direction(variant.attribute).to(z)
        )
        moved = edited(z, directions, variant.scale)
        endpoint_z = moved if config.recompute_x_T else z
        images = pictures.make_images(model, moved, config, range(n), shown, endpoint_z).images
        found = effects(
            classifier,
            variant.attribute,
            math.copysign(1, variant.scale),
            directions.cpu().double(),
            before,
            reencode(model, images, config),
            std,
        )
        pairs = zip(images.split(config.batch_size), unedited.split(config.batch_size), strict=True)
        rows.append(
            {
                "attribute": CONTROL if variant.random else classifier.names[variant.attribute],
                "judged": classifier.names[variant.attribute],
                "scale": variant.scale,
                "target": _mean(found.target),
                "others": None if found.others is None else _mean(found.others),
                "flipped": _share(found.flipped),
                "flipped_before": _share(found.flipped_before),
                "orthogonal": _mean(found.orthogonal / distance),
                "pixel_mse": _mean(torch.cat([mse(*pair) for pair in pairs])),
            }
        )
    shown.close()
    about = {
        "selection": "the first n images of the split, in its order",
        "replaced": replaced,
        "measured": {
            "target": "change of the judged score against the reconstruction's, in the wanted "
            "direction, in standard deviations of that score over the n images' z",
            "others": "mean absolute change of all other scores, each in its own such unit",
            "flipped": "share of made images that the classifier answers as wanted; before: of "
            "the reconstructions",
            "orthogonal": "distance in z from reconstruction to edit, orthogonal to the step, / "
            "mean distance between the z of two of the n images",
            "pixel_mse": "edit against reconstruction, 8-bit values scaled to [0, 1]",
            "control": "a step of the same length along a random direction, another for each image",
            "interval": "95 %: mean ± 1.96 standard errors over images; shares: Wilson's",
        },
    }
    return {"n": n, "rows": rows}, about


class _Variant(NamedTuple):
    """A row of the measurement."""

    attribute: int
    scale: float  # with the sign of the wanted direction
    random: bool  # a control: in place of the attribute's direction another one for each image


def _variants(edits: Sequence[Edit], classifier: AttributeClassifier) -> list[_Variant]:
    """Each edit once, and the control of the first, both ways."""
    wanted = list(dict.fromkeys((edit.attribute, edit.scale) for edit in edits))
    return [
        _Variant(k, sign * scale, control)
        for control, steps in ((False, wanted), (True, wanted[:1]))
        for k, scale in steps
        for sign in (1, -1)
    ]


def random_directions(z: Tensor, seed: int) -> Tensor:
    """Unit vectors like z (n, latent_dim), uniform over directions; row i depends on seed and i."""
    noise = random.normal(seed, "control", range(len(z)), (z.shape[1],), z.device)
    return noise / noise.norm(dim=1, keepdim=True)


def _encode_first(
    model: DBAE, dataset: ImageDataset, config: ManipulationConfig, n: int
) -> tuple[Tensor, list[str]]:
    """z (n, latent_dim) of the first n images, and the names of those that could not be read."""
    z, replaced = [], []
    device = next(model.parameters()).device
    for part in torch.arange(n).split(config.batch_size):
        positions = part.tolist()
        items = [dataset[position] for position in positions]
        x0 = to_model_range(torch.stack([item.image for item in items]))
        z.append(encode(model, x0.to(device), config, positions))
        replaced += [dataset.image_name(item.index) for item in items if item.replaced]
    return torch.cat(z), replaced


class Effects(NamedTuple):
    """What a step did to each of n images; see `effects`."""

    target: Tensor
    others: Tensor | None
    flipped: Tensor
    flipped_before: Tensor
    orthogonal: Tensor


def effects(
    classifier: AttributeClassifier,
    attribute: int,
    sign: float,
    direction: Tensor,
    before: Tensor,
    after: Tensor,
    std: Tensor,
) -> Effects:
    """Compare z of edited images with z of the unedited ones.

    Args:
        classifier: the judge, of k attributes.
        attribute: the wanted one, more of it (sign 1) or less (sign −1).
        direction: unit vector (latent_dim,), or (n, latent_dim), along which z was moved.
        before, after: z (n, latent_dim) of the images made without and with the step.
        std: (k,) the unit of each score.

    Returns:
        target: (n,) change of the wanted score, in the wanted direction, in std.
        others: (n,) mean |change| of the other scores, in their std; None where there are none.
        flipped, flipped_before: (n,) bool, whether the answer is the wanted one.
        orthogonal: (n,) length of the part of after − before that is orthogonal to `direction`.
    """
    scores = classifier.scores(after)
    change = (scores - classifier.scores(before)) / std
    rest = torch.arange(len(std)) != attribute
    moved = after - before
    along = (moved * direction).sum(1, keepdim=True) * direction
    return Effects(
        target=sign * change[:, attribute],
        others=change[:, rest].abs().mean(1) if rest.any() else None,
        flipped=sign * scores[:, attribute] > 0,
        flipped_before=sign * classifier.scores(before)[:, attribute] > 0,
        orthogonal=(moved - along).norm(dim=1),
    )


def mean_distance(z: Tensor) -> float:
    """Mean Euclidean distance between two different rows of z (n, d), n ≥ 2."""
    exact = "donot_use_mm_for_euclid_dist"
    total = sum(float(torch.cdist(rows, z, compute_mode=exact).sum()) for rows in z.split(256))
    return total / (len(z) * (len(z) - 1))


def _mean(values: Tensor) -> dict[str, float | None]:
    """The mean with its normal-theory 95 % interval."""
    found = summary(values.tolist())
    mean, stderr = found["mean"], found["stderr"]
    return {"value": mean, "low": mean - _Z95 * stderr, "high": mean + _Z95 * stderr}


def _share(hits: Tensor) -> dict[str, float | None]:
    """The share of True with Wilson's 95 % interval, which stays in [0, 1] and has a width
    where all answers are alike."""
    n, share = len(hits), float(hits.double().mean())
    square = _Z95**2 / n
    centre = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    # At a share of 0 or 1 the interval ends there, but not to the last bit of the arithmetic.
    low = 0.0 if share == 0 else centre - half
    high = 1.0 if share == 1 else centre + half
    return {"value": share, "low": low, "high": high}


# Files --------------------------------------------------------------------------------------


def write(result: Manipulation, folder: Path) -> list[Path]:
    """Write the strips and metrics.json; returns what was written.

    Raises UserError where the folder cannot be written.
    """
    pictures.prepare(folder, ["*_manipulated_x0.png", "*_manipulated_xT.png"])
    written = []
    for strip in result.strips:
        for name, images in ((strip.file, strip.images), (strip.x_T_file, strip.x_T)):
            write_png(folder / name, pictures.strip(images))
            written.append(folder / name)
    results.write_metrics(folder, result.metrics)
    return [*written, folder / results.METRICS_FILE]


def _table(metrics: dict[str, Any]) -> str:
    rows = [["image", "attribute", "scale", "probability, by the classifier on each image"]]
    for edit in metrics["edits"]:
        answers = "  ".join(f"{p:.3f}" for p in edit["probability"])
        rows.append([edit["image"], edit["attribute"], f"±{edit['scales'][-1]}", answers])
    protocol = metrics["protocol"]
    text = f"{text_table(rows)}\nx_T {protocol['x_T']}; {sampling_line(protocol)}"
    if metrics["measured"]:
        text += f"\n\n{_measured_table(metrics['measured'])}"
        if metrics["measured"]["n"] < metrics["protocol"]["num_measured"]:
            text += "\nnote: the split has no more images"
        if metrics["protocol"]["seen_in_training"]:
            text += "\nnote: the model was trained on images of this split too"
    return text


def _measured_table(measured: dict[str, Any]) -> str:
    def interval(figure: dict[str, float] | None) -> str:
        if figure is None:
            return "-"
        return f"{figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"

    head = "attribute|scale|target|others|before|flipped|orthogonal|pixel MSE".split("|")
    rows = [
        [
            row["attribute"],
            f"{row['scale']:+}",
            interval(row["target"]),
            interval(row["others"]),
            f"{row['flipped_before']['value']:.2f}",
            interval(row["flipped"]),
            interval(row["orthogonal"]),
            f"{row['pixel_mse']['value']:.4f}",
        ]
        for row in measured["rows"]
    ]
    return (
        f"{text_table([head, *rows])}\n"
        f"{measured['n']} images, 95 % intervals. target, others: change of the classifier's "
        "scores, in standard deviations over images.\n"
        "before, flipped: share that the classifier answers as wanted, without and with the edit. "
        "orthogonal: distance in z\n"
        "beside the step / mean distance between images. The judge is the classifier that was "
        "followed, on the same encoder."
    )
