"""From a run's folder to the page."""

from __future__ import annotations

import json
import re
from functools import partial
from importlib import resources

from markupsafe import Markup

from . import latent, overview, probes, reconstruction, text, training
from .folder import Run
from .page import Page, environment

# What no page should contain: control characters, halves of surrogates, and signs that turn the
# direction of the text that follows, any of which a file's name may hold.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_SAMPLER = "0.33 1 train 7 heun 167"


def render(run: Run) -> str:
    """The page of a run: HTML that refers to no other file. The same run gives the same text."""
    page = Page(run)
    # (id, title, HTML; where there is none: what is absent, the command that makes it)
    sections = [
        ("training", "Training", training.make(page),
         "No training log", "bash train_dbae.sh DATASET SCHEDULE STO"),
        ("reconstruction", "Reconstruction", reconstruction.make(page),
         "No reconstruction scored",
         "bash recon_dbae.sh DATASET SCHEDULE CKPT 0 1 test 7 euler 100 STO"),
        ("classification", "Classification probes", page.each("classification", probes.make),
         "No classification probe", "bash infer_class_dbae.sh DATASET SCHEDULE CKPT STO"),
        ("regression", "Regression probes", page.each("regression", probes.make),
         "No regression probe", "bash infer_reg_dbae.sh DATASET SCHEDULE CKPT STO"),
        ("disentanglement", "Disentanglement",
         page.each("classification", probes.disentanglement),
         "No disentanglement (TAD) computed",
         "bash infer_class_dbae.sh DATASET SCHEDULE CKPT STO"),
        ("interpolation", "Interpolation", page.each("interpolation", latent.interpolation),
         "No interpolation", f"bash interpol_dbae.sh DATASET SCHEDULE CKPT {_SAMPLER} STO"),
        ("manipulation", "Manipulation", page.each("manipulation", latent.manipulation),
         "No manipulation", f"bash manipul_dbae.sh DATASET SCHEDULE CKPT {_SAMPLER} STO"),
        ("latents", "The latent z", page.each("latents", latent.latents),
         "No latents encoded",
         "python3 scripts/dbae_encode.py --checkpoint CKPT --dataset DATASET"),
        ("configuration", "Configuration",
         Markup().join(page.html.protocol(k, text.flat(v, k)) for k, v in run.config.items()),
         "No config.json", "bash train_dbae.sh DATASET SCHEDULE STO"),
    ]  # fmt: skip
    html = (
        environment()
        .get_template("page.html.j2")
        .render(
            name=run.root.name or str(run.root),
            facts=page.attempt("config.json", "", lambda: page.html.facts(overview.facts(run))),
            summary=overview.summary(run),
            problems=list(dict.fromkeys(run.problems)),
            sections=sections,
            command=partial(_filled_in, run),
            style=Markup(resources.files(__package__).joinpath("report.css").read_text("utf-8")),
        )
    )
    return _UNPRINTABLE.sub("\ufffd", html)


def _filled_in(run: Run, command: str) -> str:
    """DATASET, SCHEDULE and STO as far as the configuration tells them."""
    for word, part, key in (
        ("DATASET", "train", "dataset"), ("SCHEDULE", "model", "schedule"),
        ("STO", "model", "stochastic"),
    ):  # fmt: skip
        value = json.dumps(run.setting(part, key)).strip('"')
        if value != "null" and re.fullmatch(r"\w+", value):
            command = re.sub(rf"\b{word}\b", value, command)
    return command
