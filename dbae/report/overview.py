"""The head of the page: what the run is, and its best figures in a paragraph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from markupsafe import Markup

from . import probes, reconstruction
from .folder import Checkpoint, Result, Run
from .parts import checkpoint_of, data_of, sampler_of, seen_of
from .reading import Malformed, Node, number_of
from .text import NONE, count, decimal, interval, plain, whole


def facts(run: Run) -> list[tuple[str, str]]:
    """What the run is, as far as its configuration or its results tell."""
    config = run.config or Node({})
    source, model = next(_models(run), ("", Node({})))
    found = []
    for term, file, text in (
        ("Training data", "config.json", partial(_data, config)),
        ("Images", source, partial(_images, model)),
        ("Latent z", source, partial(_latent, model)),
        ("Bridge", source, partial(_bridge, model)),
        ("Steps", "config.json", partial(_steps, run, config)),
        ("Batch", "config.json", partial(_batch, config)),
        ("Evaluated", "config.json", partial(_evaluated, run)),
        ("EMA decay", "config.json", partial(plain, config.find("train", "ema_rate"))),
    ):
        try:
            found.append((term, text()))
        except Malformed as error:
            run.report(file, str(error))
    return [(term, text) for term, text in found if text not in ("", NONE)]


def _models(run: Run) -> Iterator[tuple[str, Node]]:
    """Descriptions of the model, each with the file that has it."""
    if run.config and (model := run.config.find("model")):
        yield "config.json", model
    for result in run.results:
        if model := result.protocol.find("model"):
            yield result.label, model


def _data(config: Node) -> str:
    if config.find("data") is None:
        return plain(config.find("train", "dataset"))
    described = Node({"dataset": (config.find("data") or config).value})
    return f"{data_of(described)}, {whole(config.find('data', 'n'))} images"


def _images(model: Node) -> str:
    size = model.find("image_size")
    return f"{plain(size)}×{plain(size)} pixels, RGB" if size else ""


def _latent(model: Node) -> str:
    dim, stochastic = model.find("latent_dim"), model.find("stochastic")
    if dim is None:
        return ""
    kinds = {True: ", stochastic encoder (DBAE)", False: ", deterministic encoder (DBAE-d)"}
    kind = kinds[stochastic.value] if stochastic and isinstance(stochastic.value, bool) else ""
    return f"{whole(dim)} numbers{kind}"


def _bridge(model: Node) -> str:
    schedule, end_data = model.find("schedule"), model.find("end_data")
    if schedule is None:
        return ""
    return plain(schedule) + (f", σ_T {plain(end_data)}" if end_data else "")


def _steps(run: Run, config: Node) -> str:
    if not run.progress:
        return ""
    most = config.find("train", "max_steps")
    of = f" of {whole(most)}" if most else ""
    images = run.progress.get("images", np.array([np.nan]))[-1]
    seen = f", {count(images)} images" if np.isfinite(images) else ""
    return f"{count(run.progress['step'][-1])}{of}{seen}"


def _batch(config: Node) -> str:
    batch, rate = config.find("train", "batch_size"), config.find("train", "lr")
    world = config.find("environment", "world_size")
    if batch is None:
        return ""
    each = f" × {plain(world)} processes" if world and world.value != 1 else ""
    return f"{whole(batch)} images{each}" + (f", learning rate {plain(rate)}" if rate else "")


def _evaluated(run: Run) -> str:
    """The checkpoints that the results are of, the newest first."""
    order = sorted(run.results, key=lambda r: (-r.checkpoint.step, r.checkpoint.name, r.label))
    names = dict.fromkeys(
        checkpoint_of(result.protocol) for result in order if result.protocol.find("checkpoint")
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
        if best := _best(run, kind, make):
            checkpoint, text = best
            sentence = Markup('<a href="#{}">{}</a> ({}): {}.')
            sentences.append(sentence.format(kind, title, checkpoint.title, text))
    if not sentences:
        return Markup("Nothing is evaluated yet; the sections below say which command does it.")
    return Markup(" ").join(sentences)


def _best(
    run: Run, kind: str, make: Callable[[Result], tuple[float, str]]
) -> tuple[Checkpoint, str] | None:
    """The text of the lowest rank among the newest checkpoint's results that can be read."""
    for checkpoint, results in run.of_kind(kind):
        found = []
        for result in results:
            with contextlib.suppress(Malformed):  # its section says so
                found.append(make(result))
        if found:
            return checkpoint, min(found)[1]
    return None


def _reconstruction(result: Result) -> tuple[float, str]:
    """Ranked by: counted rightly, images not trained on, then MSE."""
    scored = reconstruction.read(result)
    scores, protocol = scored.own.scores, result.protocol
    figures = [
        f"{name.upper()} {reconstruction.mean_text(name, score)}"
        for name, score in scores.items()
        if score
    ]
    rivals = [
        f"{reconstruction.mean_text('mse', score)} ({row.method})"
        for row in scored.others
        if (score := row.scores["mse"])
    ]
    n = {score.n for score in scores.values() if score}
    text = (
        f"{' and '.join(map(count, sorted(n)))} images, {data_of(protocol)} ({seen_of(protocol)}), "
        f"are rebuilt with {', '.join(figures)} ({sampler_of(protocol)}, "
        f"{whole(protocol.find('nfe'))} NFE)"
    )
    if rivals:
        text += f", against an MSE of {', '.join(rivals)}"
    seen = protocol.find("seen_in_training")
    rank = scored.mse.mean + 2 * (seen is not None and seen.value is True) + 4 * scored.compat
    return rank, text


def _probe(task: probes.Task, result: Result) -> tuple[float, str]:
    """Ranked by the task's first measure."""
    rows = probes.read_rows(task, result.content)
    row = probes.main_row(rows)
    figure = row.figures[0]
    if figure is None:
        raise Malformed("the mean is undefined")
    text = (
        f"a linear map of z reaches a mean {task.measures[0].name} of {decimal(figure.value)} "
        f"{interval(figure)} on {whole(row.node.get('n_test'))} test images, "
        f"{data_of(result.protocol)} ({row.probe} probe)"
    )
    rivals = [other for other in rows if other.probe == row.probe and other.method != row.method]
    rival = max(rivals, key=lambda other: other.rank, default=None)
    if rival and rival.figures[0]:
        text += f", against {decimal(rival.rank)} ({rival.method})"
    base = number_of(result.content.find("base_rate", task.measures[0].key))
    if base is not None:
        text += f"{' and' if rival else ', against'} {decimal(base)} (knowing nothing)"
    return -figure.value, text


def _latents(result: Result) -> tuple[float, str]:
    """Ranked by the effective rank."""
    z = result.content["z"]
    rank, dimensions = z["effective_rank"].number(), len(z["std"].items())
    dead = z.get("dead")
    text = (
        f"over {whole(result.content.get('n'))} images, {data_of(result.protocol)}, it has an "
        f"effective rank of {decimal(rank, 1)}, and {len(dead.items()) if dead else 0} of its "
        f"{dimensions} dimensions are dead"
    )
    return -rank, text
