"""From a run's folder to the page."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib import resources

import jinja2
from markupsafe import Markup, escape

from . import edits, latents, overview, probes, reconstruction, training
from .blocks import Block, Fold, Section
from .folder import Run
from .parts import command, flat_table, section
from .pictures import Album
from .reading import Node

# What no page should contain: control characters, halves of surrogates, and signs that turn the
# direction of the text that follows, any of which a file's name may hold.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def render(run: Run) -> str:
    """The page of a run: HTML that refers to no other file. The same run gives the same text."""
    album = Album(run)
    sections = [
        training.make(run, album),
        reconstruction.make(run, album),
        probes.make(run, probes.CLASSIFICATION),
        probes.make(run, probes.REGRESSION),
        probes.disentanglement(run),
        edits.interpolation(run, album),
        edits.manipulation(run, album),
        latents.make(run, album),
        _configuration(run),
    ]
    files = resources.files(__package__)
    script = files.joinpath("report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: files.joinpath(name).read_text(encoding="utf-8")),
    )  # fmt: skip
    environment.filters["breakable"] = _breakable
    html = environment.get_template("template.html.j2").render(
        name=run.name,
        facts=overview.facts(run),
        summary=overview.summary(run),
        problems=list(dict.fromkeys(run.problems)),
        sections=sections,
        style=Markup(files.joinpath("report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_sha256=digest,
    )
    return _UNPRINTABLE.sub("\ufffd", html)


def _breakable(text: str) -> Markup:
    """A name or path that may be broken after an underscore or slash."""
    return escape(text).replace("_", Markup("_<wbr>")).replace("/", Markup("/<wbr>"))


def _configuration(run: Run) -> Section:
    """config.json, folded by its parts."""
    absent = command(run, "No config.json", "bash train_dbae.sh DATASET SCHEDULE STO")
    config = run.config
    found = run.attempt("config.json", lambda: _config_folds(run)) if config else []
    return section("configuration", "Configuration", absent, found)


def _config_folds(run: Run) -> Sequence[Block]:
    members = run.config.members() if run.config else []
    return [Fold(key, [flat_table(Node({key: n.value}))], "protocol") for key, n in members]
