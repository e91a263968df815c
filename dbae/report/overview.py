"""The head of the page: what the run is, and its best figures in a paragraph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup

from . import probes, reconstruction
from .folder import Result, Run
from .page import Page
from .text import (
    NONE,
    checkpoint_of,
    count,
    data_of,
    decimal,
    estimate,
    figure,
    plain,
    sampler_of,
    seen_of,
)


def facts(page: Page) -> list[tuple[str, str]]:
    """What the run is, as far as its configuration or its results tell."""
    run = page.run
    models = [("config.json", run.config), *((r.label, r.protocol) for r in run.results)]
    source, model = next(((f, c["model"]) for f, c in models if c.get("model")), ("", {}))
    found: list[tuple[str, str]] = []
    for file, make in (
        ("config.json", partial(_data, run)), (source, partial(_model, model)),
        ("config.json", partial(_course, run)),
    ):  # fmt: skip
        made = page.attempt(file, "the description", make)
        found += made if isinstance(made, list) else []
    return [(term, text) for term, text in found if text not in ("", NONE)]


def _data(run: Run) -> list[tuple[str, str]]:
    if data := run.config.get("data"):
        text = f"{data_of({'dataset': data})}, {count(data.get('n'))} images"
    else:
        text = plain(run.setting("train", "dataset"))
    return [("Training data", text)]


def _model(model: dict[str, Any]) -> list[tuple[str, str]]:
    size, dim, schedule = (plain(model.get(k)) for k in ("image_size", "latent_dim", "schedule"))
    kinds = {True: ", stochastic encoder (DBAE)", False: ", deterministic encoder (DBAE-d)"}
    kind, end = kinds.get(model.get("stochastic"), ""), model.get("end_data")
    return [
        ("Images", NONE if size == NONE else f"{size}×{size} pixels, RGB"),
        ("Latent z", NONE if dim == NONE else f"{dim} numbers{kind}"),
        ("Bridge", schedule + (f", σ_T {plain(end)}" if end is not None else "")),
    ]


def _course(run: Run) -> list[tuple[str, str]]:
    most, batch, rate, ema = (
        run.setting("train", key) for key in ("max_steps", "batch_size", "lr", "ema_rate")
    )
    steps = ""
    if run.progress:
        images = run.progress.get("images", np.array([np.nan]))[-1]
        steps = count(run.progress["step"][-1]) + (f" of {count(most)}" if most else "")
        steps += f", {count(images)} images" if np.isfinite(images) else ""
    world = run.setting("environment", "world_size") or 1
    processes = f" × {plain(world)} processes" if world != 1 else ""
    speed = f", learning rate {plain(rate)}" if rate else ""
    return [
        ("Steps", steps),
        ("Batch", f"{count(batch)} images{processes}{speed}" if batch else ""),
        ("Evaluated", _evaluated(run)),
        ("EMA decay", plain(ema)),
    ]


def _evaluated(run: Run) -> str:
    """The checkpoints that the results are of, the newest first."""
    order = sorted(run.results, key=lambda result: (-result.step, result.checkpoint))
    names = dict.fromkeys(
        checkpoint_of(result.protocol) for result in order if result.protocol.get("checkpoint")
    )
    newest, *older = names or [""]
    return newest + (f", and {len(older)} more" if older else "")


# Summary --------------------------------------------------------------------------------------


def summary(run: Run) -> Markup:
    """The best figures of the newest checkpoint that has each, with links to their sections."""
    sentences = []
    for kind, title, make in (
        ("reconstruction", "Reconstruction", _reconstruction),
        ("classification", "Classification probe", partial(_probe, probes.CLASSIFICATION)),
        ("regression", "Regression probe", partial(_probe, probes.REGRESSION)),
        ("latents", "The latent z", _latents),
    ):
        for checkpoint, results in run.of_kind(kind).items():
            if found := _readable(results, make):
                sentence = Markup('<a href="#{}">{}</a> ({}): {}.')
                sentences.append(sentence.format(kind, title, checkpoint, min(found)[1]))
                break
    if not sentences:
        return Markup("Nothing is evaluated yet; the sections below say which command does it.")
    return Markup(" ").join(sentences)


def _readable(
    results: Sequence[Result], make: Callable[[Result], tuple[float, str]]
) -> list[tuple[float, str]]:
    """(rank, text) of each result that is not damaged; the lowest rank is the best."""
    found = []
    for result in results:
        with contextlib.suppress(Exception):  # its section says what is wrong
            found.append(make(result))
    return found


def _reconstruction(result: Result) -> tuple[float, str]:
    """Ranked by: counted rightly, images not trained on, then MSE."""
    scored, protocol = reconstruction.read(result), result.protocol
    figures = ", ".join(
        f"{metric.upper()} {reconstruction.mean_text(metric, mean)}"
        for metric, (mean, _) in scored.own.scores.items()
    )
    rivals = ", ".join(
        f"{reconstruction.mean_text('mse', row.scores['mse'][0])} ({row.method})"
        for row in scored.others
        if "mse" in row.scores
    )
    text = (
        f"{count(scored.own.n)} images, {data_of(protocol)} ({seen_of(protocol)}), are rebuilt "
        f"with {figures} ({sampler_of(protocol)}, {count(protocol.get('nfe'))} NFE)"
    )
    rank = scored.own.scores["mse"][0] + 2 * (protocol.get("seen_in_training") is True)
    return rank + 4 * scored.compat, text + (f", against an MSE of {rivals}" if rivals else "")


def _probe(task: probes.Task, result: Result) -> tuple[float, str]:
    """Ranked by the task's first measure."""
    rows, measure = result.content["rows"], task.measures[0]
    main = probes.main_row(rows)
    text = (
        f"a linear map of z reaches a mean {measure.name} of {figure(main[measure.key]).striptags()} "
        f"on {count(main.get('n_test'))} test images, {data_of(result.protocol)} "
        f"({main.get('probe')} probe)"
    )
    rivals = [
        (estimate(row[measure.key])[0], row["method"])
        for row in rows
        if row.get("probe") == main.get("probe") and row["method"] != main["method"]
    ]
    against = [f"{decimal(value)} ({method})" for value, method in sorted(rivals)[-1:]]
    base = estimate((result.content.get("base_rate") or {}).get(measure.key))[0]
    if base is not None:
        against.append(f"{decimal(base)} (knowing nothing)")
    return -estimate(main[measure.key])[0], text + (
        f", against {' and '.join(against)}" if against else ""
    )


def _latents(result: Result) -> tuple[float, str]:
    """Ranked by the effective rank."""
    z = result.content["z"]
    rank = z["effective_rank"]
    text = (
        f"over {count(result.content.get('n'))} images, {data_of(result.protocol)}, it has an "
        f"effective rank of {decimal(rank, 1)}, and {len(z.get('dead') or [])} of its "
        f"{len(z['std'])} dimensions are dead"
    )
    return -rank, text
