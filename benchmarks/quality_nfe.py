"""Reconstruction error against denoiser calls (NFE), sampler by sampler, on the same images.

    python3 benchmarks/quality_nfe.py assets/demo_model.pt --output quality_nfe.png

Prints the protocol, a table (mean ± standard error of MSE and SSIM, and of LPIPS where its weights
are there) and the fewest calls with which each sampler is as good as Euler with the most calls;
draws MSE over NFE. A sampler takes as many steps as a number of calls allows. x_T itself, the
endpoint decoder's picture, is the point of 0 NFE.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dbae import cli, load_model
from dbae.data import open_dataset, to_model_range, to_uint8
from dbae.data.loader import in_batches
from dbae.errors import UserError
from dbae.evaluation.metrics import load_lpips
from dbae.evaluation.protocol import sampler_text, sampling_facts, text_table
from dbae.evaluation.reconstruction import ReconstructionConfig, encode, sample_images
from dbae.evaluation.results import Scorer, Scores, concatenate
from dbae.files import atomic_file

Row = dict[str, Any]

# Name → options of the sampler, and p and q of NFE = p N + q, which finds N for a number of calls.
METHODS: dict[str, tuple[dict[str, Any], int, int]] = {
    "Euler": ({"sampler": "euler"}, 1, 0),
    "Heun": ({"sampler": "heun"}, 2, -1),
    "Euler, churn 0.33": ({"sampler": "euler", "churn": 0.33}, 2, 0),
    "Heun, churn 0.33": ({"sampler": "heun", "churn": 0.33}, 3, -1),
    "DBIM-1, η 0": ({"sampler": "dbim", "order": 1}, 1, 1),
    "DBIM-1, η 1": ({"sampler": "dbim", "order": 1, "eta": 1.0}, 1, 1),
    "DBIM-2": ({"sampler": "dbim", "order": 2}, 1, 1),
    "DBIM-3": ({"sampler": "dbim", "order": 3}, 1, 1),
}


def main() -> None:
    parser = cli.parser((__doc__ or "").split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dataset", default="demo", help="(default: demo)")
    parser.add_argument("--data_dir", help="folder, zip or LMDB with the images")
    parser.add_argument("--split", default="test", help="(default: test)")
    parser.add_argument("--num_samples", type=int, default=16, help="(default: 16)")
    parser.add_argument("--batch_size", type=int, default=16, help="(default: 16)")
    parser.add_argument("--nfe", default="3,5,10,20,50,100", help="(default: 3,5,10,20,50,100)")
    parser.add_argument("--rho", default="7", help="grids, e.g. 1,3,7; 1 is uniform (default: 7)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--weights_dir", help="folder with AlexNet's weights, for LPIPS")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--output", type=Path, default=Path("quality_nfe.png"))
    options = parser.parse_args()
    budgets = [int(word) for word in options.nfe.split(",")]
    if min(budgets) < 2:
        raise UserError(f"--nfe {options.nfe}: every sampler needs at least 2 calls")
    grids = [float(word) for word in options.rho.split(",")]

    model = load_model(options.checkpoint, options.device)
    dataset = open_dataset(
        options.dataset, options.data_dir, model.config.image_size, options.split
    )
    count = min(options.num_samples, len(dataset))
    lpips, reason = load_lpips(options.weights_dir, options.device)
    scorer = Scorer(lpips, reason, False)
    base = ReconstructionConfig(
        batch_size=options.batch_size, seed=options.seed, latent="mean", num_samples=count
    )
    facts = sampling_facts(model, base, options.checkpoint)
    print(
        f"{facts['checkpoint']} (sha256 {facts['checkpoint_sha256'][:12]}), z: {facts['latent']}; "
        f"the first {count} images of {options.dataset} {options.split}; seed {options.seed}; "
        f"{platform.machine()}, {os.cpu_count()} cores, {options.device}, torch {torch.__version__}"
    )
    if reason:
        print(f"LPIPS not computed: {reason}")

    batches = []
    for positions in in_batches(range(count), options.batch_size):
        x0 = to_model_range(torch.stack([dataset[i].image for i in positions]))
        x0 = x0.to(options.device)
        with torch.no_grad():
            z = encode(model, x0, base, positions)
            batches.append((positions, to_uint8(x0.cpu()), z, model.endpoint(z)))

    def score(config: ReconstructionConfig) -> tuple[int, Scores]:
        parts, nfe = [], 0
        for at, real, z, x_T in batches:
            out = sample_images(model, z, x_T, config, at)
            parts.append(scorer(real, to_uint8(out.images.cpu())))
            nfe = out.nfe
        return nfe, concatenate(parts)

    start = concatenate(scorer(real, to_uint8(x_T.float().cpu())) for _, real, _, x_T in batches)
    rows = [{"method": "x_T", "nfe": 0, "sampler": "-", **scorer.row(start)}]
    for rho in grids:
        for name, (chosen, per_step, more) in METHODS.items():
            for steps in sorted({(budget - more) // per_step for budget in budgets}):
                config = ReconstructionConfig(**vars(base) | chosen | {"steps": steps, "rho": rho})
                nfe, scores = score(config)
                rows.append(
                    {
                        "method": name if len(grids) == 1 else f"{name}, ρ {rho:g}",
                        "nfe": nfe,
                        "sampler": sampler_text(sampling_facts(model, config, None)),
                        **scorer.row(scores),
                    }
                )
                print(f"  {rows[-1]['method']}, {rows[-1]['nfe']} NFE", file=sys.stderr, flush=True)
    print_table(rows)
    plot(rows, options.output)
    print(options.output)


def print_table(rows: list[Row]) -> None:
    """All rows; then for each method the fewest calls that reach Euler's last."""
    measures = [name for name in ("mse", "ssim", "lpips") if rows[0][name]]

    def figure(value: dict[str, Any]) -> str:
        return f"{value['mean']:.5f} ± {value['stderr'] or 0:.5f}"

    head = ["method", "NFE", "sampler", *map(str.upper, measures)]
    table = [[r["method"], r["nfe"], r["sampler"], *(figure(r[m]) for m in measures)] for r in rows]
    print(f"\n{text_table([head, *table])}\n")
    goal = max((r for r in rows if r["method"].startswith("Euler")), key=lambda r: r["nfe"])
    print(f"MSE of {goal['method']} with {goal['nfe']} NFE ({goal['mse']['mean']:.5f}) or less:")
    for method in dict.fromkeys(row["method"] for row in rows):
        reached = [
            row["nfe"]
            for row in rows
            if row["method"] == method and row["mse"]["mean"] <= goal["mse"]["mean"]
        ]
        print(f"  {method}: {min(reached) if reached else 'never'}")


def plot(rows: list[Row], path: Path) -> None:
    """MSE over NFE, both logarithmic; x_T as a broken line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(rows[0]["mse"]["mean"], color="grey", linestyle="--", label="x_T (0 NFE)")
    for method in dict.fromkeys(row["method"] for row in rows[1:]):
        points = [(row["nfe"], row["mse"]["mean"]) for row in rows if row["method"] == method]
        axes.plot(*zip(*points, strict=True), marker="o", label=method)
    axes.set(xscale="log", yscale="log", xlabel="denoiser calls (NFE)", ylabel="MSE")
    axes.legend(fontsize="small")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


if __name__ == "__main__":
    cli.run(lambda _: main())
