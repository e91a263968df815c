"""Command-line flags made from dataclass fields, so that an option exists in one place only."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from .errors import GroupError, Stopped, UserError, in_words, one_line


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field that is also a command-line flag with this help text and these choices."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def check_choices(config: Any) -> None:
    """Raise UserError where a field of a dataclass instance is not among its `choices`."""
    for field in dataclasses.fields(config):
        known, value = field.metadata.get("choices"), getattr(config, field.name)
        if known and value not in known:
            raise UserError(
                f"--{field.name} {value!r} is unknown; choose one of {', '.join(known)}"
            )


def parse_bool(text: str) -> bool:
    """`true`/`false` in any case (also yes/no, 1/0) → bool; an argparse error otherwise."""
    word = text.lower()
    if word in ("true", "yes", "1"):
        return True
    if word in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")


def _parse_numbers(text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part)
    except ValueError:
        which = "whole numbers" if kind is int else "numbers"
        message = f"expected {which} separated by commas, found {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _parse_words(text: str) -> tuple[str, ...]:
    return tuple(part for part in map(str.strip, text.split(",")) if part)


def _converter(annotation: Any) -> Callable[[str], Any]:
    """The function that turns a flag's text into a value of the field's type."""
    members = [a for a in typing.get_args(annotation) if a is not type(None)]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _converter(members[0])
    if annotation is bool:
        return parse_bool
    if typing.get_origin(annotation) is tuple:
        kind = typing.get_args(annotation)[0]
        return _parse_words if kind is str else functools.partial(_parse_numbers, kind=kind)
    return typing.cast(Callable[[str], Any], annotation)


class _Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line instead of a page of usage."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (see {os.path.basename(self.prog)} --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed = super().parse_args(args, namespace)
        for name, value in vars(parsed).items():
            if value == []:  # before Python 3.13 that is what `--flag=--` gives
                self.error(f"argument --{name}: expected one argument")
        return parsed


def parser(description: str) -> argparse.ArgumentParser:
    """A parser that reports mistakes as `UserError` and accepts no abbreviated flags."""
    return _Parser(description=description, allow_abbrev=False)


# How a flag that is true or false is parsed: `--flag` alone means true.
_SWITCH: dict[str, Any] = {
    "type": parse_bool, "nargs": "?", "const": True, "metavar": "true|false"
}  # fmt: skip


def add_switch(to: argparse.ArgumentParser, flag: str, help: str) -> None:
    """Add a flag that is false unless it is given."""
    to.add_argument(flag, default=False, help=f"{help} (default: false)", **_SWITCH)


def add_flags(
    to: argparse.ArgumentParser, config: type, defaults: str | None = None, skip: Sequence[str] = ()
) -> None:
    """Add one `--flag` per field of the dataclass `config` (those in `skip` left out).

    A flag that is not given does not appear in the parsed namespace, so that the caller can tell
    "given" from "default" (`given`). `defaults` replaces the default shown in the help text.
    """
    hints = typing.get_type_hints(config)
    group = to.add_argument_group(config.__name__)
    for field in dataclasses.fields(config):
        if field.name in skip:
            continue
        convert = _converter(hints[field.name])
        shown = f"{defaults}, else {field.default}" if defaults else field.default
        keywords: dict[str, Any] = _SWITCH if convert is parse_bool else {"type": convert}
        if field.metadata.get("choices"):
            keywords = {**keywords, "choices": list(field.metadata["choices"])}
        group.add_argument(
            f"--{field.name}",
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']} (default: {shown})".replace("%", "%%"),
            **keywords,
        )


def given(namespace: argparse.Namespace, config: type) -> dict[str, Any]:
    """The fields of `config` that were given on the command line, as a dict."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in vars(namespace).items() if name in names}


def run(main: Callable[[Sequence[str] | None], int | None]) -> typing.NoReturn:
    """Run an entry point: `UserError` and `Stopped` become one line on stderr and their exit code.

    So does what the operating system refuses (a full disk, a read-only folder), with exit code 1.
    SIGTERM and SIGUSR1 raise Stopped, wherever it is, unless `main` handles them: whole files are
    written, or none.
    """
    try:
        try:
            _on_stop(_stop)
            code = main(None)
        finally:
            _on_stop(signal.SIG_DFL)  # nothing is left to be told but what follows
    except UserError as error:
        _complain(error)
        code = error.code
    except Stopped as stopped:
        if _rank() == "0":
            print(stopped, file=sys.stderr, flush=True)
        code = stopped.code
    except BrokenPipeError:  # the reader of our output (head, less) went away
        sys.stderr.close()
        code = 1
    except OSError as error:
        _complain(error)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or 0)


def _on_stop(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handler)


def _stop(number: int, _: object) -> typing.NoReturn:
    name = signal.Signals(number).name
    raise Stopped(f"{name}: stopped; the same command goes on with what is finished", 143)


def _complain(error: UserError | OSError) -> None:
    """Print one error line. Of several processes with the same mistake, only the first does."""
    rank, message = _rank(), one_line(in_words(error))
    if rank != "0":
        if isinstance(error, GroupError):  # rank 0 has it too
            return
        # Where rank 0 fails as well, its launcher ends this process meanwhile.
        time.sleep(3)
        message = f"rank {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)


def _rank() -> str:
    """This process's number as its launcher says; of the innermost, as in `distributed`."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0")
