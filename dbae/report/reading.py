"""JSON that others wrote: typed access that says what is wrong, and where, in one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

LARGEST = 1e100  # far beyond any figure, far below where arithmetic overflows


class Malformed(Exception):
    """A file is not what the report expects; the message says which part and why, on one line."""

    def __init__(self, what: str) -> None:
        super().__init__(" ".join(what.split()))


@dataclasses.dataclass(frozen=True)
class Node:
    """A JSON value and its place in the file, such as `protocol.dataset`.

    Every method raises Malformed where the value is not of the kind asked for.
    """

    value: Any
    place: str = ""

    def __getitem__(self, key: str) -> Node:
        """The member `key` of an object."""
        found = self.get(key)
        if found is None:
            raise Malformed(f"lacks {self._inside(key)}")
        return found

    def get(self, key: str) -> Node | None:
        """The member `key` of an object; None where it is absent or null."""
        if not isinstance(self.value, dict):
            raise self._not("an object")
        value = self.value.get(key)
        return None if value is None else Node(value, self._inside(key))

    def find(self, *keys: str) -> Node | None:
        """The member at this path; None where any part of it is absent or no object."""
        node: Node | None = self
        for key in keys:
            if node is None or not isinstance(node.value, dict):
                return None
            node = node.get(key)
        return node

    def number(self) -> float:
        """A finite number, of a size that can be drawn."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self._not("a number")
        if not abs(self.value) < LARGEST:  # NaN too
            raise Malformed(f"{self.place} is not finite, or larger than any figure")
        return float(self.value)

    def whole(self) -> int:
        """A whole number."""
        number = self.number()
        if number != int(number):
            raise self._not("a whole number")
        return int(number)

    def text(self) -> str:
        """A string."""
        if not isinstance(self.value, str):
            raise self._not("a text")
        return self.value

    def items(self) -> list[Node]:
        """The members of a list."""
        if not isinstance(self.value, list):
            raise self._not("a list")
        return [Node(value, f"{self.place}[{i}]") for i, value in enumerate(self.value)]

    def numbers(self) -> list[float]:
        """A list of finite numbers."""
        return [item.number() for item in self.items()]

    def texts(self) -> list[str]:
        """A list of strings."""
        return [item.text() for item in self.items()]

    def members(self) -> list[tuple[str, Node]]:
        """The members of an object, in the file's order, without those that are null."""
        if not isinstance(self.value, dict):
            raise self._not("an object")
        return [(key, Node(v, self._inside(key))) for key, v in self.value.items() if v is not None]

    def _inside(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def _not(self, expected: str) -> Malformed:
        names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
        found = names.get(type(self.value), "a number")
        return Malformed(f"{self.place or 'the file'} is {found}, expected {expected}")


def read_object(path: Path) -> Node:
    """The JSON object in a file. Malformed where it cannot be read or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Malformed(f"cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise Malformed(f"is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise Malformed("does not hold a JSON object")
    return Node(content)


def number_of(node: Node | None) -> float | None:
    """`node.number()`, None for None."""
    return None if node is None else node.number()


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


def estimate(node: Node | None) -> Estimate | None:
    """{"value", "low", "high"}, of which the last two may be absent; or a mere number.

    None where the value is null: the figure is undefined.
    """
    if node is None or not isinstance(node.value, dict):
        number = number_of(node)
        return None if number is None else Estimate(number)
    value = number_of(node.get("value"))
    low, high = number_of(node.get("low")), number_of(node.get("high"))
    return None if value is None else Estimate(value, low, high)
