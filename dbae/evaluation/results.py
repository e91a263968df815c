"""A folder of reconstructions: its file names, its scores and its table.

Batch i, done by rank r, has the files `{r}_real_sample_{i}.npz` and `{r}_fake_sample_{i}.npz`
(array `samples`, uint8 NHWC) and the grids `{r}_x_{i}.png`, `{r}_sample_{i}.png` and
`{r}_x_T_sample_{i}.png` (`x_T_sample_{i}.png` where there is one rank). i counts the batches of
all ranks together: it is dataset order.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files import atomic_file, write_text
from .metrics import Lpips, mse, reference_mse, reference_ssim, ssim, summary
from .protocol import sampler_text, text_table, versions
from .published import reconstruction_of

METRICS_FILE = "metrics.json"
UNFINISHED = "unfinished"  # a run writes to this folder until it is complete
_PART = re.compile(r"(\d+)_(real|fake)_sample_(\d+)\.npz")
FILES = re.compile(  # that a run writes
    r"\d+_(real|fake)_sample_\d+\.npz|\d+_(sample|x)_\d+\.png|(\d+_)?x_T_sample_\d+\.png"
    r"|samples_\d+x\d+x\d+x3_nfe\d+\.npz|metrics\.json|comparison\.png"
)
_FOLDER = re.compile(
    r"(euler|heun|dbim|exp)_([\d.e+-]+)_(\d+)_w=([\d.e+-]+)_churn=([\d.e+-]+)"
    r"(?:_eta=([\d.e+-]+)_order=(\d))?"
)
Scores = dict[str, list[float]]  # metric → one figure per image


def part_paths(folder: Path, rank: int, batch: int) -> tuple[Path, Path]:
    """The npz files of one batch's originals and reconstructions."""
    return (
        folder / f"{rank}_real_sample_{batch}.npz",
        folder / f"{rank}_fake_sample_{batch}.npz",
    )


def write_samples(path: Path, images: Tensor) -> None:
    """uint8 (N, 3, H, W) → npz with the array `samples`, NHWC."""
    array = images.permute(0, 2, 3, 1).contiguous().numpy()
    with atomic_file(path) as file:
        np.savez(file, samples=array)


def read_samples(path: Path) -> Tensor:
    """The images of an npz with the array `samples`: uint8 (N, 3, H, W). UserError if it is not."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            array = archive["samples"]
    except KeyError:
        raise UserError(f"{path} has no array named samples") from None
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable .npz file: {error}") from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
        raise UserError(
            f"{path}: expected uint8 images (N, H, W, 3), found {array.dtype} {array.shape}"
        )
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def merge(folder: Path, parts: Sequence[Path], nfe: int) -> Path:
    """Join the parts, in this order, into `samples_{N}x{H}x{W}x3_nfe{nfe}.npz` (array `arr_0`).

    Reads one part at a time, so that memory does not grow with N. Returns the new file's path.
    """
    sizes = [tuple(read_samples(part).shape) for part in parts]
    shape = (sum(size[0] for size in sizes), *sizes[0][2:], 3)
    target = folder / f"samples_{'x'.join(map(str, shape))}_nfe{nfe}.npz"
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}

    with (
        atomic_file(target) as file,
        zipfile.ZipFile(file, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as entry,
    ):
        np.lib.format.write_array_header_1_0(entry, header)
        for part in parts:
            entry.write(read_samples(part).permute(0, 2, 3, 1).contiguous().numpy().data)
    return target


def find_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """All (real, fake) files of a folder, by batch and then rank. UserError if none or unpaired.

    This is dataset order for our folders, where batches are numbered over all ranks, and for
    those of one rank; in a folder of several ranks of the reference it is merely a fixed order.
    """
    if not folder.is_dir():
        raise UserError(f"--sample_path {folder} is not a folder")
    found: dict[tuple[int, int], dict[str, Path]] = {}
    for path in folder.iterdir():
        if match := _PART.fullmatch(path.name):
            key = (int(match[3]), int(match[1]))
            found.setdefault(key, {})[match[2]] = path
    if not found:
        raise UserError(
            f"{folder} has no files *_real_sample_*.npz and *_fake_sample_*.npz; expected a folder "
            "written by recon_dbae.sh (…/sample_STEP/SAMPLER_…)"
        )
    for _, pair in sorted(found.items()):
        for kind, other in (("real", "fake"), ("fake", "real")):
            if kind not in pair:
                name = pair[other].name
                partner = name.replace(f"_{other}_", f"_{kind}_")
                raise UserError(f"{folder}: {name} has no partner {partner}")
    return [(pair["real"], pair["fake"]) for _, pair in sorted(found.items())]


class Scorer:
    """The three figures of each image, counted in the right way or in the published script's.

    `lpips` is None where it cannot be computed, for the reason given. With `reference_compat` the
    columns mse and ssim hold the published script's figures, and standard_mse and standard_ssim
    the right ones.
    """

    def __init__(self, lpips: Lpips | None, reason: str | None, reference_compat: bool) -> None:
        self.lpips = lpips
        self.reason = reason
        self.reference_compat = reference_compat

    def __call__(self, real: Tensor, fake: Tensor) -> Scores:
        """Scores of uint8 (N, 3, H, W) against uint8 of the same shape, on the CPU."""
        columns = {"mse": mse(real, fake), "ssim": ssim(real, fake)}
        if self.reference_compat:
            columns = {
                "mse": reference_mse(real, fake),
                "ssim": reference_ssim(real, fake),
                "standard_mse": columns["mse"],
                "standard_ssim": columns["ssim"],
            }
        if self.lpips is not None:
            columns["lpips"] = self.lpips(real, fake)
        return {name: values.tolist() for name, values in columns.items()}

    def row(self, scores: Scores) -> dict[str, Any]:
        """Mean ± standard error of the columns, in the form of metrics.json."""
        row: dict[str, Any] = {name: summary(scores[name]) for name in ("mse", "ssim")}
        row["lpips"] = summary(scores["lpips"]) if self.lpips else None
        if self.lpips is None:
            row["lpips_reason"] = self.reason
        if self.reference_compat:
            row["standard"] = {
                name: summary(scores[f"standard_{name}"]) for name in ("mse", "ssim")
            }
        return row

    def baseline(self, label: str, scores: Scores, **about: Any) -> dict[str, Any]:
        """The row of another method, with what the table and the reader need to know about it."""
        row = {"label": label, **self.row(scores), **about}
        row.pop("lpips_reason", None)  # the file gives it once
        return {**row, "reference_compat": self.reference_compat}

    def protocol(self) -> dict[str, Any]:
        """How the figures are counted and by which versions."""
        standard = {
            "mse": "mean over all values of an image, 8-bit values scaled to [0, 1]",
            "ssim": "11x11 Gaussian window, sigma 1.5, zero padding, C1 = 0.01^2, C2 = 0.03^2, "
            "mean over channels and pixels, on [0, 1]",
        }
        compat = {
            "mse": "sum of squared errors of an image / (128*128*3), on [0, 1]",
            "ssim": "as the published script: NHWC arrays read as NCHW, window over (W, colour)",
        }
        counted: dict[str, Any] = {
            **(compat if self.reference_compat else standard),
            "lpips": "AlexNet, version 0.1, on [-1, 1]",
            "stderr": "sample standard deviation / sqrt(n)",
        }
        if self.reference_compat:
            counted["standard"] = standard
        return {
            "reference_compat": self.reference_compat,
            "metrics": counted,
            "versions": versions("lpips"),
        }


def concatenate(parts: Iterable[Scores]) -> Scores:
    """The scores of several batches as one."""
    total: Scores = {}
    for part in parts:
        for name, values in part.items():
            total.setdefault(name, []).extend(values)
    return total


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """metrics.json; NaN and infinity are not JSON and raise ValueError."""
    # ASCII, since file names that are not valid UTF-8 could not be encoded otherwise
    write_text(folder / METRICS_FILE, json.dumps(metrics, indent=1, allow_nan=False) + "\n")


def rescore(folder: Path, scorer: Scorer, batch_size: int) -> dict[str, Any]:
    """Score a folder's pairs anew and write its metrics.json; the new content is returned.

    What an earlier metrics.json says about the run (protocol, baselines, image indices and names)
    is kept; what describes the counting is replaced. Raises UserError for a folder without pairs,
    unpaired or unreadable files and shapes that differ.
    """
    pairs = find_pairs(folder)
    old = _read_metrics(folder / METRICS_FILE)
    scores = concatenate(
        scorer(real, fake)
        for pair in _read_pairs(folder, pairs)
        for real, fake in zip(*(images.split(batch_size) for images in pair), strict=True)
    )
    n = len(scores["mse"])
    per_image = old.get("per_image", {})
    if len(per_image.get("index", [])) != n:
        per_image = {"index": list(range(n))}
    per_image = {key: per_image[key] for key in ("index", "name") if key in per_image}
    protocol = old.get("protocol") or _protocol_from_names(folder)
    if "versions" in protocol and "versions_of_run" not in protocol:
        protocol["versions_of_run"] = protocol["versions"]
    metrics = {
        "kind": "reconstruction",
        **scorer.row(scores),
        "protocol": {**protocol, "n": n, **scorer.protocol()},
        "baselines": old.get("baselines", {}),
        "per_image": {**per_image, **scores},
    }
    write_metrics(folder, metrics)
    return metrics


def table(metrics: dict[str, Any]) -> str:
    """The content of metrics.json as a table for the terminal: method × figures, with notes."""
    protocol = metrics["protocol"]
    how = [sampler_text(protocol), protocol.get("nfe", "?")]
    seed = protocol.get("seed", "?")
    head = ["method", "MSE", "SSIM", "LPIPS", "n", "sampler", "NFE", "seed"]
    rows = [head, ["DBAE", *_figures(metrics), *how, seed]]
    notes = []
    if metrics.get("lpips_reason"):
        notes.append(f"LPIPS not computed: {metrics['lpips_reason']}")
    if protocol["reference_compat"]:
        notes.append("counted as the published script does; only comparable with its figures")
        standard = {**metrics["standard"], "lpips": metrics["lpips"]}
        rows.append(["DBAE, counted rightly", *_figures(standard), *how, seed])
    about: dict[str, list[str]] = {}  # note → the rows that it is about
    for row in metrics["baselines"].values():
        if "reason" in row:
            about.setdefault(row["reason"], []).append(row["label"])
        elif row["reference_compat"] == protocol["reference_compat"]:
            rows.append([row["label"], *_figures(row), "-", row.get("nfe", "-"), row["seed"]])
            if "note" in row:
                about.setdefault(row["note"], []).append(row["label"])
    notes += [f"{'; '.join(labels)}: {note}" for note, labels in about.items()]
    dataset, model = protocol.get("dataset", {}), protocol.get("model", {})
    if (dataset.get("dataset"), model.get("image_size")) == ("celebahq", 128):
        notes.append(_published())
    return "\n".join([text_table(rows), *notes])


def _published() -> str:
    """The paper's figures for DBAE, as a note under one's own on the same images."""
    rows = map(reconstruction_of, ("DBAE", "DBAE-d"))
    figures = "; ".join(
        f"{row.method} MSE {row.mse:.5f}, SSIM {row.ssim:.3f}, LPIPS {row.lpips:.3f}"
        for row in rows
    )
    return (
        "published (FFHQ model, CelebA-HQ at 128 pixels, latent 512; MSE and SSIM of Euler-100, "
        f"LPIPS of the churned SDE, counted by the published script): {figures}"
    )


def _figures(row: dict[str, Any]) -> list[str]:
    """MSE, SSIM, LPIPS and n of a row as text."""
    texts = []
    for name, digits in (("mse", 5), ("ssim", 4), ("lpips", 4)):
        figure = row[name]
        if figure is None:
            texts.append("n/a")
            continue
        if name == "mse" and figure["mean"] < 1e-3:
            digits = 7
        error = "" if figure["stderr"] is None else f" ± {figure['stderr']:.{digits}f}"
        texts.append(f"{figure['mean']:.{digits}f}{error}")
    return [*texts, str(row["mse"]["n"])]


def _read_pairs(
    folder: Path, pairs: Sequence[tuple[Path, Path]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(real, fake) of each pair of files; UserError where any differs in size or number."""
    size = None
    for paths in pairs:
        real, fake = map(read_samples, paths)
        size = size or real.shape[2:]
        for path, images in zip(paths, (real, fake), strict=True):
            if len(images) != len(real) or images.shape[2:] != size:
                raise UserError(
                    f"{folder}: {path.name} has {len(images)} images of {_by(images.shape[2:])} "
                    f"pixels, expected {len(real)} of {_by(size)} as in the other files"
                )
        yield real, fake


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _read_metrics(path: Path) -> dict[str, Any]:
    """An earlier metrics.json, {} where there is none; UserError for what is not one."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); move it away to rescore") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a metrics file; move it away to rescore")
    return content


def _protocol_from_names(folder: Path) -> dict[str, Any]:
    """What file names tell of a run that left no metrics.json (the reference's)."""
    protocol: dict[str, Any] = {"source": "file names"}
    if match := _FOLDER.fullmatch(folder.resolve().name):
        protocol |= {"sampler": match[1], "rho": float(match[2]), "steps": int(match[3])}
        protocol |= {"guidance": float(match[4]), "churn": float(match[5])}
        if match[6]:
            protocol |= {"eta": float(match[6]), "order": int(match[7])}
    nfes = {re.sub(r".*_nfe(\d+)\.npz", r"\1", p.name) for p in folder.glob("samples_*_nfe*.npz")}
    if len(nfes) == 1 and (nfe := nfes.pop()).isdigit():
        protocol["nfe"] = int(nfe)
    return protocol
