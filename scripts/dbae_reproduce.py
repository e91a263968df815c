"""Run the paper's Tables 1 and 2 with released checkpoints, and print ours beside theirs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dbae import UserError, cli
from dbae.evaluation import reproduce
from dbae.files import write_text

_ROOT = Path(__file__).resolve().parents[1]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.parser(__doc__ or "")
    parser.add_argument("checkpoints", type=Path, help="folder of the released checkpoints")
    for name in ("celeba", "celebahq", "lfw"):
        parser.add_argument(
            f"--{name}_dir", type=Path, required=True, help=f"data root of {name} (see args.sh)"
        )
    parser.add_argument("--weights_dir", help="folder with alexnet-owt-7be5be79.pth for LPIPS")
    parser.add_argument(
        "--limit", type=int, default=0,
        help="a trial: only the first so many images of each part (default: 0, all)",
    )  # fmt: skip
    parser.add_argument(
        "--dry_run", action="store_true", help="print what is missing and the commands, run none"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.limit < 0:
        raise UserError(f"--limit {options.limit} must not be negative")
    roots = {name: getattr(options, f"{name}_dir") for name in ("celeba", "celebahq", "lfw")}
    models, missing_models = reproduce.find_models(options.checkpoints)
    missing = reproduce.missing_data(roots)
    for what in (
        *(f"checkpoint of {line}" for line in missing_models),
        *missing.values(),
        *filter(None, [reproduce.missing_lpips(options.weights_dir)]),
    ):
        print(f"missing: {what}")
    runs = list(reproduce.plan(models, options.limit))
    results: dict[tuple[str, str], dict[str, Any] | str] = {}
    for run in runs:
        results[run.model.title, run.kind] = _result(run, missing, roots, options)
    if options.dry_run:
        return 0
    text = reproduce.tables(results, options.limit)
    print(f"\n{text}\n")
    summary = reproduce.summary_json(runs, results)
    stem = reproduce.trial_name("reproduction", options.limit)
    for name, content in (
        (f"{stem}.txt", text + "\n"),
        (f"{stem}.json", json.dumps(summary, indent=1) + "\n"),
    ):
        write_text(options.checkpoints / name, content)
        print(options.checkpoints / name)
    failed = any(result == _FAILED for result in results.values())
    nothing = not any(isinstance(result, dict) for result in results.values())
    return 1 if failed or nothing else 0


_FAILED = "the command failed; its error stands above"


def _result(
    run: reproduce.Run,
    missing: Mapping[str, str],
    roots: Mapping[str, Path],
    options: argparse.Namespace,
) -> dict[str, Any] | str:
    """The metrics of a run that is made now, or was made before, or why there are none."""
    if run.data in missing:
        return f"missing {missing[run.data]}"
    words = [*run.words, "--data_dir", str(roots[run.data]), "--output_dir", str(run.folder)]
    if run.kind.startswith("reconstruction") and options.weights_dir:
        words += ["--weights_dir", options.weights_dir]
    print(f"\n== {run.model.title}: {run.kind}\n   bash {' '.join(words)}", flush=True)
    if options.dry_run:
        return "not run"
    found = run.done(words)
    if found is not None:
        print(f"   done before: {run.metrics}")
        return found
    command = ["bash", str(_ROOT / words[0]), *words[1:]]
    if subprocess.run(command, env={**os.environ, "DRY_RUN": "0"}).returncode != 0:
        return _FAILED
    run.mark_done(words)
    return run.done(words) or _FAILED


if __name__ == "__main__":
    cli.run(main)
