"""What entry scripts tell in one line instead of a traceback."""

from __future__ import annotations

_LONGEST = 1000  # characters of a message: room for LFW's 73 attributes


def one_line(text: str) -> str:
    """`text` as it may be shown on a terminal, whatever a file or its name put into it.

    What cannot be printed (line ends, control characters) is escaped, the middle of what is longer
    than 1000 characters left out.
    """
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in _shortened(text)
    )
    return _shortened(escaped)


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST * 2 // 3]} … {text[-_LONGEST // 4 :]}"


class UserError(Exception):
    """A wrong flag, path, file or setting.

    The message is one line: what was found, what was expected, what to do. Entry scripts print it
    as `error: …` without a traceback and exit with `code` (see `dbae.cli.run`).
    """

    code = 2

    def __str__(self) -> str:
        return one_line(super().__str__())


def in_words(error: UserError | OSError) -> str:
    """The message of a mistake, or of what the operating system refused (a full disk, say)."""
    if isinstance(error, UserError):
        return str(error)
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


class GroupError(UserError):
    """A mistake that every process of the group raises alike, so that rank 0 alone tells it."""


class Stopped(Exception):
    """Work ended early because it was asked to, and all is saved; the message says where it stands.

    `code` is the exit code: 143 after SIGTERM, SIGUSR1 or a time limit, 130 after Ctrl-C.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
