"""Score a folder of reconstructions again: MSE, SSIM, LPIPS, per image and in the mean.

python3 eval_reconstruction.py --sample_path=CKPT/sample_1020000/euler_7.0_100_w=1.0_churn=0.0
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from dbae import UserError, cli
from dbae.evaluation.metrics import load_lpips
from dbae.evaluation.results import METRICS_FILE, Scorer, rescore, table


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.parser((__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--sample_path",
        required=True,
        type=Path,
        help="folder with *_real_sample_*.npz and *_fake_sample_*.npz, as recon_dbae.sh writes it",
    )
    parser.add_argument(
        "--weights_dir",
        help="folder with alexnet-owt-7be5be79.pth for LPIPS (torch's cache is searched too)",
    )
    cli.add_switch(parser, "--reference_compat", "count MSE and SSIM as the published script does")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="images scored at once (default: 64)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.batch_size < 1:
        raise UserError(f"--batch_size {options.batch_size} must be at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorer = Scorer(*load_lpips(options.weights_dir, device), options.reference_compat)
    metrics = rescore(options.sample_path, scorer, options.batch_size)
    print(f"{table(metrics)}\n\n{options.sample_path / METRICS_FILE}")
    return 0


if __name__ == "__main__":
    cli.run(main)
