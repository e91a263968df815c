"""The head of the page: what the run is, and its best figures in a paragraph."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from markupsafe import Markup

from . import probes, reconstruction, text
from .folder import Result, Run


def facts(run: Run) -> list[tuple[str, str]]:
    """What the run is, as far as its configuration or its results tell."""
    found = {
        "Training data": _data(run), **_model(run), "Steps": _steps(run), "Batch": _batch(run),
        "Evaluated": _evaluated(run), "EMA decay": text.plain(run.setting("train", "ema_rate")),
    }  # fmt: skip
    return [(term, what) for term, what in found.items() if what not in ("", text.NONE)]


def _data(run: Run) -> str:
    data = run.config.get("data")
    if not data:
        return text.plain(run.setting("train", "dataset"))
    return f"{text.data_of({'dataset': data})}, {text.count(data.get('n'))} images"


def _model(run: Run) -> dict[str, str]:
    files = [run.config, *(result.protocol for result in run.results)]
    model: dict[str, Any] = next((file["model"] for file in files if file.get("model")), {})
    size, dim, schedule, end = (
        text.plain(model.get(key)) for key in ("image_size", "latent_dim", "schedule", "end_data")
    )
    kind = {
        "yes": ", stochastic encoder (DBAE)", "no": ", deterministic encoder (DBAE-d)",
    }.get(text.plain(model.get("stochastic")), "")  # fmt: skip
    return {
        "Images": f"{size}×{size} pixels, RGB" if size != text.NONE else "",
        "Latent z": f"{dim} numbers{kind}" if dim != text.NONE else "",
        "Bridge": schedule + (f", σ_T {end}" if end != text.NONE else ""),
    }


def _steps(run: Run) -> str:
    if not run.progress:
        return ""
    most = run.setting("train", "max_steps")
    images = run.progress.get("images", np.array([np.nan]))[-1]
    said = text.count(run.progress["step"][-1]) + (f" of {text.count(most)}" if most else "")
    return said + (f", {text.count(images)} images" if np.isfinite(images) else "")


def _batch(run: Run) -> str:
    batch, rate = run.setting("train", "batch_size"), run.setting("train", "lr")
    processes = run.setting("environment", "world_size") or 1
    if not batch:
        return ""
    said = f"{text.count(batch)} images" + (f" × {processes} processes" if processes != 1 else "")
    return said + (f", learning rate {text.plain(rate)}" if rate else "")


def _evaluated(run: Run) -> str:
    """The checkpoints that the results are of, the newest first."""
    order = sorted(run.results, key=lambda result: (-result.step, result.checkpoint))
    protocols = [result.protocol for result in order if result.protocol.get("checkpoint")]
    newest, *older = dict.fromkeys(map(text.checkpoint_of, protocols)) or [""]
    return newest + (f", and {len(older)} more" if older else "")


# Summary --------------------------------------------------------------------------------------


def summary(run: Run) -> Markup:
    """The best figures of the newest checkpoint that has each, with links to their sections."""
    sentences = []
    for kind, title, make in (
        ("reconstruction", "Reconstruction", _reconstruction),
        ("classification", "Classification probe", _probe),
        ("regression", "Regression probe", _probe),
        ("latents", "The latent z", _latents),
    ):
        for checkpoint, results in run.of_kind(kind).items():
            found = []
            for result in results:
                with contextlib.suppress(Exception):  # its section says what is wrong
                    found.append(make(result))
            if found:
                sentence = Markup('<a href="#{}">{}</a> ({}): {}.')
                sentences.append(sentence.format(kind, title, checkpoint, min(found)[1]))
                break
    if not sentences:
        return Markup("Nothing is evaluated yet; the sections below say which command does it.")
    return Markup(" ").join(sentences)


# Each gives (rank, text) of a result; the lowest rank is the best.


def _reconstruction(result: Result) -> tuple[float, str]:
    """Ranked by: counted rightly, images not trained on, then MSE."""
    scored, protocol = reconstruction.read(result), result.protocol
    error, _ = scored.own.scores["mse"]
    figures = ", ".join(
        f"{metric.upper()} {reconstruction.mean_text(metric, mean)}"
        for metric, (mean, _) in scored.own.scores.items()
    )
    rivals = ", ".join(
        f"{reconstruction.mean_text('mse', row.scores['mse'][0])} ({row.method})"
        for row in scored.others
        if row.scores
    )
    said = (
        f"{scored.own.about[0]} images, {text.data_of(protocol)} ({text.seen_of(protocol)}), "
        f"are rebuilt with {figures} ({text.sampler_of(protocol)}, "
        f"{text.count(protocol.get('nfe'))} NFE)"
    )
    said += f", against an MSE of {rivals}" if rivals else ""
    return error + 2 * bool(protocol.get("seen_in_training")) + 4 * scored.compat, said


def _probe(result: Result) -> tuple[float, str]:
    """Ranked by the first of the kind's figures."""
    rows, (key, title) = result.content["rows"], probes.first_figure(result)
    main = probes.main_row(rows)
    value, *_ = text.estimate(main[key])
    if value is None:
        raise ValueError("the mean is undefined")
    rivals = [
        (rival, row["method"])
        for row in rows
        if row.get("probe") == main.get("probe") and row["method"] != main["method"]
        if (rival := text.estimate(row[key])[0]) is not None
    ]
    said = (
        f"a linear map of z reaches a mean {title} of {text.figure(main[key]).striptags()} on "
        f"{text.count(main.get('n_test'))} test images, {text.data_of(result.protocol)} "
        f"({main.get('probe')} probe)"
    )
    against = [f"{text.decimal(figure)} ({method})" for figure, method in sorted(rivals)[-1:]]
    base = text.decimal((result.content.get("base_rate") or {}).get(key))
    against += [f"{base} (knowing nothing)"] if base != text.NONE else []
    return -value, said + (f", against {' and '.join(against)}" * bool(against))


def _latents(result: Result) -> tuple[float, str]:
    """Ranked by the effective rank."""
    z, n = result.content["z"], text.count(result.content.get("n"))
    dead, rank = len(z.get("dead") or []), z["effective_rank"]
    return -rank, (
        f"over {n} images, {text.data_of(result.protocol)}, it has an effective rank of "
        f"{text.decimal(rank, 1)}, and {dead} of its {len(z['std'])} dimensions are dead"
    )
