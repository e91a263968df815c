"""The one exception that stands for a mistake of the person at the keyboard."""

from __future__ import annotations


class UserError(Exception):
    """A wrong flag, path, file or setting.

    The message is one line: what was found, what was expected, what to do. Entry scripts print it
    as `error: …` without a traceback and exit with code 2 (see `dbae.cli.run`).
    """
