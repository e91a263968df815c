"""RELIABILITY.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_test_of_the_table_exists_and_every_fault_has_one() -> None:
    table = (ROOT / "RELIABILITY.md").read_text()
    there = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", table))
    missing = {name for name in named if f"def {name}(" not in there}
    assert not missing and len(named) > 50
    for fault in (f"F{i}" for i in range(1, 16)):
        rows = [line for line in table.splitlines() if line.startswith(f"| {fault} ")]
        assert rows and all("`test_" in row for row in rows), fault
