"""Reconstruction error against denoiser calls (NFE), sampler by sampler, on the same images.

    python3 benchmarks/quality_nfe.py assets/demo_model.pt --output quality_nfe.png

Prints the protocol, a table and the fewest calls with which each sampler is as good as the goal,
Euler with many calls; draws both errors over NFE. x_T itself, the endpoint decoder's picture, is
the point of 0 NFE. A sampler takes as many steps as a number of calls allows. Columns:

- MSE, SSIM, and LPIPS where its weights are there, against the original; Δ is the difference to
  the goal, mean ± standard error over images (each image is compared with itself).
- detail: squared differences of neighbouring pixels, as a share of the originals'. MSE alone
  rewards blur, and a step too long blurs.
- to limit: mean squared distance to the same sampler's result with many calls (colours in [0, 1]).
  Deterministic samplers from x_T have one limit, DBIM with η 0 one for its noise at the start,
  which is the same for every number of calls. The others draw noise in each step: none.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dbae import DBAE, cli, load_model
from dbae.data import open_dataset, to_model_range, to_uint8
from dbae.data.loader import in_batches
from dbae.errors import UserError
from dbae.evaluation.metrics import load_lpips, summary
from dbae.evaluation.protocol import sampler_text, sampling_facts, text_table
from dbae.evaluation.reconstruction import ReconstructionConfig, encode, sample_images
from dbae.evaluation.results import Scorer, Scores, concatenate
from dbae.files import atomic_file, write_text
from dbae.sampling import reads

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """A sampler's options; its calls with N steps are `per_step` N + `more`."""

    options: dict[str, Any]
    per_step: int
    more: int
    limit: str | None  # the name of one of LIMITS

    def steps(self, calls: int) -> int:
        """As many as this number of calls allows, at least 1."""
        return max((calls - self.more) // self.per_step, 1)


LIMITS: dict[str, dict[str, Any]] = {  # the most exact known sampler of each kind
    "from x_T": {"sampler": "exp"},
    "from DBIM's start": {"sampler": "dbim", "order": 2, "rho": 3.0},
}
METHODS = {
    "Exp": Method({"sampler": "exp"}, 1, 0, "from x_T"),
    "Euler": Method({"sampler": "euler"}, 1, 0, "from x_T"),
    "Heun": Method({"sampler": "heun"}, 2, -1, "from x_T"),
    "Euler, churn 0.33": Method({"sampler": "euler", "churn": 0.33}, 2, 0, None),
    "Heun, churn 0.33": Method({"sampler": "heun", "churn": 0.33}, 3, -1, None),
    "DBIM-1, η 0": Method({"sampler": "dbim", "order": 1}, 1, 1, "from DBIM's start"),
    "DBIM-1, η 1": Method({"sampler": "dbim", "order": 1, "eta": 1.0}, 1, 1, None),
    "DBIM-2": Method({"sampler": "dbim", "order": 2}, 1, 1, "from DBIM's start"),
    "DBIM-3": Method({"sampler": "dbim", "order": 3}, 1, 1, "from DBIM's start"),
}


def main() -> None:
    parser = cli.parser((__doc__ or "").split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dataset", default="demo", help="(default: demo)")
    parser.add_argument("--data_dir", help="folder, zip or LMDB with the images")
    parser.add_argument("--split", default="test", help="(default: test)")
    parser.add_argument("--first", type=int, default=0, help="images to skip (default: 0)")
    parser.add_argument("--num_samples", type=int, default=48, help="(default: 48)")
    parser.add_argument("--batch_size", type=int, default=16, help="(default: 16)")
    parser.add_argument("--nfe", default="3,5,10,20", help="(default: 3,5,10,20)")
    parser.add_argument(
        "--rho", default="1,7", help="grids, e.g. 1,3,7; 1 is uniform (default: 1,7)"
    )
    parser.add_argument("--goal", type=int, default=100, help="Euler's calls (default: 100)")
    parser.add_argument("--limit", type=int, default=40, help="a limit's calls (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--weights_dir", help="folder with AlexNet's weights, for LPIPS")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--output", type=Path, default=Path("quality_nfe.png"))
    parser.add_argument("--json", type=Path, help="write all figures to this file, too")
    options = parser.parse_args()
    budgets = [int(word) for word in options.nfe.split(",")]
    if min(budgets) < 2:
        raise UserError(f"--nfe {options.nfe}: every sampler needs at least 2 calls")

    model = load_model(options.checkpoint, options.device)
    dataset = open_dataset(
        options.dataset, options.data_dir, model.config.image_size, options.split
    )
    wanted = range(options.first, min(options.first + options.num_samples, len(dataset)))
    if not wanted:
        raise UserError(f"--first {options.first}: the split has {len(dataset)} images")
    lpips, reason = load_lpips(options.weights_dir, options.device)
    base = ReconstructionConfig(
        batch_size=options.batch_size, seed=options.seed, latent="mean", rho=7.0
    )
    facts = sampling_facts(model, base, options.checkpoint)
    protocol = (
        f"{facts['checkpoint']} (sha256 {facts['checkpoint_sha256'][:12]}), z: {facts['latent']}; "
        f"images {wanted[0]} to {wanted[-1]} of {options.dataset} {options.split}; "
        f"seed {options.seed}; {platform.machine()}, {os.cpu_count()} cores, {options.device}, "
        f"torch {torch.__version__}"
    )
    print(protocol)
    if reason:
        print(f"LPIPS not computed: {reason}")

    images = torch.stack([dataset[i].image for i in wanted])
    curve = Curve(model, images, list(wanted), base, Scorer(lpips, reason, False), options.limit)
    curve.add("x_T", 0, "-", curve.x_T, curve.limits["from x_T"])
    curve.sample("Euler, ρ 7", METHODS["Euler"], {"rho": 7.0}, options.goal)
    goal = curve.rows[-1]
    for name, method in METHODS.items():
        for rho in map(float, options.rho.split(",")):
            if "rho" not in reads(method.options["sampler"]):
                for steps in sorted({method.steps(calls) for calls in budgets}):
                    curve.sample(name, method, {}, steps)
                break
            for steps in sorted({method.steps(calls) for calls in budgets}):
                curve.sample(f"{name}, ρ {rho:g}", method, {"rho": rho}, steps)
    for row in curve.rows:
        row["to_goal"] = {
            measure: summary(
                [a - b for a, b in zip(values, goal["per_image"][measure], strict=True)]
            )
            for measure, values in row["per_image"].items()
        }
    print_table(curve.rows, goal)
    if options.json:
        content = {"protocol": protocol, "facts": facts, "rows": curve.rows}
        write_text(options.json, json.dumps(content, indent=1) + "\n")
    plot(curve.rows, options.output)
    print(options.output)


class Curve:
    """Samples the same images with one sampler after the other, and collects the rows."""

    def __init__(
        self,
        model: DBAE,
        images: Tensor,
        positions: list[int],
        base: ReconstructionConfig,
        scorer: Scorer,
        limit: int,
    ) -> None:
        self.model, self.base, self.scorer, self.rows = model, base, scorer, list[Row]()
        self.device = next(model.parameters()).device
        self.real = to_uint8(to_model_range(images))
        self.batches = []
        for part in in_batches(range(len(images)), base.batch_size):
            at = [positions[i] for i in part]
            x0 = to_model_range(images[list(part)]).to(self.device)
            with torch.no_grad():
                z = encode(model, x0, base, at)
                self.batches.append((at, z, model.endpoint(z).float()))
        self.x_T = torch.cat([x_T for _, _, x_T in self.batches]).cpu()
        self.limits = {name: self._run(chosen, limit)[0] for name, chosen in LIMITS.items()}

    def sample(self, name: str, method: Method, grid: dict[str, float], steps: int) -> None:
        """Add the row of this method with so many steps."""
        config = self._config(method.options | grid, steps)
        images, nfe = self._run(method.options | grid, steps)
        text = sampler_text(sampling_facts(self.model, config, None))
        self.add(name, nfe, text, images, self.limits[method.limit] if method.limit else None)

    def add(self, name: str, nfe: int, sampler: str, images: Tensor, limit: Tensor | None) -> None:
        """Add the row of these images (N, 3, S, S) in [-1, 1]; `limit` has the same shape."""
        found = to_uint8(images)
        pairs = zip(
            self.real.split(self.base.batch_size), found.split(self.base.batch_size), strict=True
        )
        scores: Scores = concatenate(self.scorer(real, fake) for real, fake in pairs)
        self.rows.append(
            {
                "method": name,
                "nfe": nfe,
                "sampler": sampler,
                **self.scorer.row(scores),
                "detail": detail(found) / detail(self.real),
                "to_limit": None
                if limit is None
                else float((images.clamp(-1, 1) - limit).square().mean() / 4),
                "per_image": scores,
            }
        )
        print(f"  {name}, {nfe} NFE", file=sys.stderr, flush=True)

    def _config(self, chosen: dict[str, Any], steps: int) -> ReconstructionConfig:
        return dataclasses.replace(self.base, **chosen, steps=steps)

    def _run(self, chosen: dict[str, Any], steps: int) -> tuple[Tensor, int]:
        config = self._config(chosen, steps)
        runs = [sample_images(self.model, z, x_T, config, at) for at, z, x_T in self.batches]
        return torch.cat([out.images.cpu() for out in runs]), runs[0].nfe


def detail(images: Tensor) -> float:
    """Mean squared difference of neighbouring pixels of uint8 images (N, 3, S, S)."""
    values = images.double()
    return float(values.diff(dim=2).square().mean() + values.diff(dim=3).square().mean())


# What counts as good: measure → +1 where less is better, −1 where more is.
MEASURES = {"mse": 1, "ssim": -1, "lpips": 1}


def print_table(rows: list[Row], goal: Row) -> None:
    """All rows; then for each method the fewest calls that reach the goal, measure by measure."""
    measures = {name: sign for name, sign in MEASURES.items() if rows[0][name]}
    head = ["method", "NFE", "sampler"]
    for name in measures:
        head += [name.upper(), f"Δ {name.upper()} ± s.e."]
    table = [[*head, "detail", "to limit"]]
    for row in rows:
        cells = [row["method"], row["nfe"], row["sampler"]]
        for name in measures:
            change = row["to_goal"][name]
            cells += [
                f"{row[name]['mean']:.5f}",
                f"{change['mean']:+.5f} ± {change['stderr'] or 0:.5f}",
            ]
        limit = "-" if row["to_limit"] is None else f"{row['to_limit']:.6f}"
        table.append([*cells, f"{row['detail']:.3f}", limit])
    print(f"\n{text_table(table)}\n")

    title = f"Fewest calls that are as good as {goal['method']} with {goal['nfe']} NFE"
    table = [[title, *map(str.upper, measures), "to limit"]]
    for method in dict.fromkeys(row["method"] for row in rows if row is not goal):
        mine = [row for row in rows if row["method"] == method and row is not goal]
        reached = [
            [row["nfe"] for row in mine if sign * row["to_goal"][name]["mean"] <= 0]
            for name, sign in measures.items()
        ]
        reached.append(
            [
                row["nfe"]
                for row in mine
                if row["to_limit"] is not None and row["to_limit"] <= goal["to_limit"]
            ]
        )
        table.append([method, *(str(min(calls)) if calls else "-" for calls in reached)])
    print(text_table(table))


def plot(rows: list[Row], path: Path) -> None:
    """MSE and the distance to the limit over NFE; a colour a sampler, a line style a grid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [name for name in dict.fromkeys(row["method"] for row in rows) if name != "x_T"]
    colours = {name: f"C{i}" for i, name in enumerate(METHODS)}
    grids = dict.fromkeys(_rho(name) for name in names)
    styles = dict(zip(grids, itertools.cycle(("-", "--", ":", "-.")), strict=False))
    for axes, title in ((left, "MSE to the original"), (right, "MSE to the sampler's limit")):
        for name in names:
            figures = [
                (row["nfe"], row["mse"]["mean"] if axes is left else row["to_limit"])
                for row in sorted(rows, key=lambda row: row["nfe"])
                if row["method"] == name and row["to_limit" if axes is right else "mse"] is not None
            ]
            if figures:
                axes.plot(
                    *zip(*figures, strict=True),
                    color=colours[name.split(", ρ")[0]],
                    linestyle=styles[_rho(name)],
                    marker=".",
                    label=name,
                )
        axes.set(xscale="log", yscale="log", xlabel="denoiser calls (NFE)", title=title)
        axes.set_xticks([2, 3, 5, 10, 20, 50, 100])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    left.axhline(rows[0]["mse"]["mean"], color="grey", label="x_T (0 NFE)")
    left.set_ylim(top=1.5 * rows[0]["mse"]["mean"])  # what is worse than no denoising is cut off
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _rho(name: str) -> str:
    return name.partition(", ρ ")[2]


if __name__ == "__main__":
    cli.run(lambda _: main())
