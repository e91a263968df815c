"""What sections share: the essentials of a protocol, folding by checkpoint, absent parts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .blocks import Block, Body, Command, Fold, Heading, Section, Table, Text
from .folder import Result, Run
from .reading import Malformed, Node
from .text import name_cell, plain, whole

_DEEPEST, _LONGEST = 6, 40  # levels and list members of a protocol that are shown

Make = Callable[[Result], Sequence[Block]]


def section(id: str, title: str, absent: Command, blocks: Sequence[Block]) -> Section:
    """A section, or the command that makes it where there are no blocks."""
    return Section(id, title, blocks or [absent], present=bool(blocks))


def by_checkpoint(
    run: Run, kind: str, make: Callable[[Sequence[Result]], Sequence[Block]]
) -> list[Block]:
    """The results of a kind: those of the newest checkpoint, then older ones, each in a fold."""
    blocks: list[Block] = []
    for checkpoint, results in run.of_kind(kind):
        title = f"Checkpoint: {checkpoint.title}"
        if made := make(results):
            blocks += [Fold(title, made)] if blocks else [Heading(title), *made]
    return blocks


def each(run: Run, make: Make) -> Callable[[Sequence[Result]], list[Block]]:
    """For `by_checkpoint`: every result on its own, a malformed one as a line."""

    def blocks(results: Sequence[Result]) -> list[Block]:
        made = (run.attempt(result.label, partial(make, result)) for result in results)
        return [block for of_result in made for block in of_result]

    return blocks


def command(run: Run, what: str, line: str) -> Command:
    """An absent part. DATASET, SCHEDULE and STO are filled in as far as the run tells them."""
    for word, keys in (
        ("DATASET", ("train", "dataset")), ("SCHEDULE", ("model", "schedule")),
        ("STO", ("model", "stochastic")),
    ):  # fmt: skip
        value = run.config.find(*keys) if run.config else None
        text = json.dumps(value.value).strip('"') if value else ""
        if re.fullmatch(r"\w+", text):
            line = re.sub(rf"\b{word}\b", text, line)
    return Command(what, line)


def lacking(run: Run, result: Result, *keys: str) -> list[Block]:
    """A line for keys that a result of this kind should have (older files lack some)."""
    absent = [key for key in keys if result.content.get(key) is None]
    return [run.report(result.label, f"lacks {', '.join(absent)}")] if absent else []


# Essentials of a protocol -------------------------------------------------------------------


def data_of(protocol: Node) -> str:
    """`split test of lfw64.zip`. Of a probe, what it is tested on."""
    described = protocol.find("dataset") or protocol.find("parts", "test") or Node({})
    name, split = described.find("dataset"), described.find("split") or protocol.find("split")
    if name and name.value == "folder":  # the user's own: its name is that of the files
        name = described.find("path") or name
    name = name or protocol.find("probe_data")
    parts = [f"split {plain(split)}" if split else "", plain(name) if name else ""]
    return " of ".join(part for part in parts if part) or "data not recorded"


def seen_of(protocol: Node) -> str:
    """Whether the images were trained on."""
    seen = protocol.find("seen_in_training")
    if seen is None or not isinstance(seen.value, bool):
        return "not recorded whether trained on"
    return "also trained on" if seen.value else "not trained on"


def weights_of(protocol: Node) -> str:
    """`EMA 0.9999`, `live`, or a dash."""
    ema = protocol.find("ema")
    if ema is None:
        return plain(None)
    return "live" if ema.value is False else f"EMA {plain(ema)}"


def checkpoint_of(protocol: Node) -> str:
    """`ema_0.9999_004500.pt (EMA 0.9999)`."""
    name, weights = protocol.find("checkpoint"), weights_of(protocol)
    if name is None:
        return "weights not recorded"
    return f"{plain(name)} ({weights})" if weights != plain(None) else plain(name)


def sampler_of(protocol: Node) -> str:
    """`Euler, 20 steps`, with churn and guidance where they are not the ODE's."""
    if protocol.find("sampler") is None:
        return "sampler not recorded"
    text = f"{plain(protocol.find('sampler')).capitalize()}, {whole(protocol.find('steps'))} steps"
    churn, guidance = protocol.find("churn"), protocol.find("guidance")
    if churn and churn.value:
        text += f", SDE churn {plain(churn)}"
    if guidance and guidance.value != 1:
        text += f", guidance {plain(guidance)}"
    return text


def essentials(protocol: Node) -> str:
    """One line of what every figure should be read with."""
    latent, seed = protocol.find("latent"), protocol.find("seed")
    facts = [
        f"{data_of(protocol)} ({seen_of(protocol)})",
        checkpoint_of(protocol),
        f"z: {plain(latent)}" if latent else "",
        f"seed {plain(seed)}" if seed else "",
    ]
    return sentence("; ".join(fact for fact in facts if fact))


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


# The whole of a protocol ----------------------------------------------------------------------


def protocol_fold(result: Result) -> Fold:
    """Everything that the file says about how it was made."""
    if result.content.find("protocol") is None:
        return Fold(f"Protocol of {result.label}", [Text("The file has none.", "note")], "protocol")
    return Fold(f"Protocol of {result.label}", [flat_table(result.protocol)], "protocol")


def flat_table(node: Node, caption: str = "") -> Table:
    """A nested object as a table of dotted names and values."""
    rows = [[name_cell(name), name_cell(value)] for name, value in _flat(node.value, "", 0)]
    return Table(caption, [], [Body(rows)], tone="protocol")


def _flat(value: Any, name: str, depth: int) -> list[tuple[str, str]]:
    if depth > _DEEPEST:
        return [(name, "…")]
    if isinstance(value, dict) and value:
        inner = [
            _flat(member, f"{name}.{key}" if name else key, depth + 1)
            for key, member in value.items()
        ]
        return [pair for pairs in inner for pair in pairs]
    if isinstance(value, list):
        if any(isinstance(member, dict | list) for member in value):
            return [(name, f"{len(value)} entries")]
        shown = [_scalar(member) for member in value[:_LONGEST]]
        more = f" … ({len(value)} in all)" if len(value) > _LONGEST else ""
        return [(name, (", ".join(shown) or "none") + more)]
    return [(name, _scalar(value))]


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def text_or(node: Node | None, default: str) -> str:
    """The node's text, or `default` where there is none."""
    try:
        return default if node is None else node.text()
    except Malformed:
        return default
