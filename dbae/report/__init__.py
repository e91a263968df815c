"""A run's report: one HTML file with its curves, figures and pictures, to keep or to hand on."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..files import write_text

REPORT = "report.html"


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write the report of a training run's folder, or of a folder with results of evaluations.

    The page holds everything that it shows and needs neither network nor script. The same files
    give the same bytes. Files that are broken or lack something become lines in the report.

    Args:
        run_dir: with config.json, progress.csv, samples/ and sample_STEP/, or any part of these.
        output: the HTML file; report.html in `run_dir` where it is None.

    Returns:
        The file that was written.

    Raises:
        UserError: no such folder, nothing in it to report, or the file cannot be written.
    """
    from .folder import read_run
    from .render import render

    target = run_dir / REPORT if output is None else output
    run = read_run(run_dir)
    if target.is_dir():
        raise UserError(f"--output {target} is a folder; expected the name of an HTML file")
    write_text(target, render(run))
    return target
