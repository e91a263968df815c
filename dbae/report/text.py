"""Figures, names and protocols as text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

NONE = "—"
_DEEPEST, _LONGEST = 6, 40  # levels and list members of a protocol that are shown


def decimal(value: float | None, digits: int = 3) -> str:
    """A fixed number of digits, another form for the tiny and the huge; a dash for None."""
    if value is None:
        return NONE
    if value and not 10 ** (1 - digits) <= abs(value) < 1e7:
        return f"{value:.3g}"
    return f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """12,345; a dash for None."""
    return NONE if value is None else f"{value:,.0f}"


def share(value: float) -> str:
    """0.25 → 25 %; one digit more where it would round to 0 or 100."""
    percent = 100 * value
    if 0 < percent < 0.1 or 99.9 < percent < 100:
        text = "<0.1" if percent < 1 else ">99.9"
    else:
        text = f"{percent:.{1 if 0 < percent < 1 or 99 < percent < 100 else 0}f}"
    return f"{text}\N{NO-BREAK SPACE}%"


def plain(value: Any) -> str:
    """A JSON scalar as text; a dash for null, a list or an object."""
    if value is None or isinstance(value, dict | list):
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def estimate(found: Any) -> tuple[float | None, float | None, float | None]:
    """Value, low and high of {"value", "low", "high"}, or of a mere number."""
    if isinstance(found, dict):
        return found.get("value"), found.get("low"), found.get("high")
    return found, None, None


def figure(
    found: Any, form: Callable[[float], str] | None = None, best: float | None = None
) -> Markup:
    """An estimate for a table: its value, bold where it is the best, and its interval behind it.

    `form` makes a text of a number. Without it: three decimals, more where all are small.
    """
    value, low, high = estimate(found)
    if value is None:
        return Markup(NONE)
    if form is None:
        largest = max(abs(x) for x in (value, low, high) if x is not None)
        digits = min(9, 2 - math.floor(math.log10(largest))) if 0 < largest < 0.01 else 3
        form = f"{{:.{digits}f}}".format
    interval = None if low is None or high is None else f"[{form(low)}, {form(high)}]"
    return with_small(form(value), interval, bold=value == best)


def with_small(text: str, small: str | None, bold: bool = False) -> Markup:
    """A text with another in small type behind it."""
    shown = Markup("<strong>{}</strong>" if bold else "{}").format(text)
    return shown + Markup(" <small>{}</small>").format(small) if small else shown


def best_of(values: Sequence[float | None], lower_is_better: bool) -> float | None:
    """The value to print in bold; None where there is nothing to compare."""
    there = [value for value in values if value is not None]
    if len(there) < 2:
        return None
    return min(there) if lower_is_better else max(there)


# Essentials of a protocol -------------------------------------------------------------------


def data_of(protocol: Mapping[str, Any]) -> str:
    """`split test of lfw64.zip`. Of a probe, what it is tested on."""
    described = protocol.get("dataset") or (protocol.get("parts") or {}).get("test") or {}
    name, split = described.get("dataset"), described.get("split") or protocol.get("split")
    if name == "folder":  # the user's own: its name is that of the files
        name = described.get("path") or name
    name = name or protocol.get("probe_data")
    return " of ".join([f"split {split}"] * bool(split) + [str(name)] * bool(name)) or (
        "data not recorded"
    )


def seen_of(protocol: Mapping[str, Any]) -> str:
    """Whether the images were trained on."""
    seen = protocol.get("seen_in_training")
    if seen is None:
        return "not recorded whether trained on"
    return "also trained on" if seen else "not trained on"


def checkpoint_of(protocol: Mapping[str, Any]) -> str:
    """`ema_0.9999_004500.pt (EMA 0.9999)`, or `(live)`."""
    name, ema = protocol.get("checkpoint"), protocol.get("ema")
    if name is None:
        return "weights not recorded"
    weights = "live" if ema is False else f"EMA {plain(ema)}"
    return str(name) if ema is None else f"{name} ({weights})"


def sampler_of(protocol: Mapping[str, Any]) -> str:
    """`Euler, 20 steps`, with churn and guidance where they are not the ODE's."""
    if protocol.get("sampler") is None:
        return "sampler not recorded"
    name = plain(protocol["sampler"])
    name = "DBIM" if name == "dbim" else name.capitalize()
    text = f"{name}, {plain(protocol.get('steps'))} steps"
    if order := protocol.get("order"):
        text += f", order {plain(order)}"
    if eta := protocol.get("eta"):
        text += f", η {plain(eta)}"
    if churn := protocol.get("churn"):
        text += f", SDE churn {plain(churn)}"
    if (guidance := protocol.get("guidance")) not in (None, 1):
        text += f", guidance {plain(guidance)}"
    return text


def essentials(protocol: Mapping[str, Any]) -> str:
    """One line of what every figure should be read with."""
    facts = [f"{data_of(protocol)} ({seen_of(protocol)})", checkpoint_of(protocol)]
    facts += [f"z: {protocol['latent']}"] if protocol.get("latent") else []
    facts += [f"seed {protocol['seed']}"] if protocol.get("seed") is not None else []
    return sentence("; ".join(facts))


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def flat(value: Any, name: str = "", depth: int = 0) -> list[tuple[str, str]]:
    """A nested object as dotted names and values."""
    if isinstance(value, dict) and value and depth < _DEEPEST:
        inner = (
            flat(member, f"{name}.{key}" if name else key, depth + 1)
            for key, member in value.items()
        )
        return [pair for pairs in inner for pair in pairs]
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        shown = ", ".join(map(_scalar, value[:_LONGEST])) or "none"
        return [(name, shown + f" … ({len(value)} in all)" * (len(value) > _LONGEST))]
    if isinstance(value, dict | list):
        return [(name, f"{len(value)} entries")]
    return [(name, _scalar(value))]


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
