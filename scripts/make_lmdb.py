#!/usr/bin/env python3
"""Write an LMDB in DiffAE's layout from a folder, zip or LMDB of images.

python3 scripts/make_lmdb.py SOURCE OUT --size 256 --format jpg
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from dbae.cli import add_flags, given, parser, run
from dbae.data.lmdb_writer import LmdbConfig, write_lmdb

_SECONDS_BETWEEN_LINES = 10.0
_NAMES_SHOWN = 10


class Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.bar: tqdm | None = None
        self.last_line = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if self.terminal:
            self.bar = self.bar or tqdm(total=total, initial=done, unit="image", smoothing=0.1)
            self.bar.update(done - self.bar.n)
        elif time.monotonic() - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            print(f"{done}/{total} images", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser("Write an LMDB in DiffAE's layout. An interrupted run continues where it was.")
    flags.add_argument("source", metavar="SOURCE", help="folder, zip or LMDB with the images")
    flags.add_argument("out", metavar="OUT", help="folder for data.mdb")
    add_flags(flags, LmdbConfig)
    parsed = flags.parse_args(arguments)
    config = LmdbConfig(**given(parsed, LmdbConfig))
    progress = Progress()
    try:
        written = write_lmdb(parsed.source, parsed.out, config, progress)
    finally:
        progress.close()
    if written.resumed_at:
        print(f"continued at image {written.resumed_at} of an interrupted run")
    if written.skipped:
        names = ", ".join(written.skipped[:_NAMES_SHOWN])
        more = ", …" if len(written.skipped) > _NAMES_SHOWN else ""
        print(f"left out {len(written.skipped)} unreadable images: {names}{more}")
        print("index i of this LMDB is therefore not row i of the source's label files")
    first, last = (written.form.key(i).decode() for i in (0, written.records - 1))
    print(f"wrote and verified {written.records} images, keys {first} to {last}, in {parsed.out}")
    return 0


if __name__ == "__main__":
    run(main)
