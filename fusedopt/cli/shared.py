"""What all commands share: options, colours, exit codes, and files, which are tried before the work begins."""

from __future__ import annotations

import enum
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "ExitCode",
    "check_writable",
    "color_option",
    "console",
    "exit_codes",
    "finish",
    "several",
    "shared_options",
    "write_json",
]

Command = TypeVar("Command", bound=Callable[..., Any])


# ---- exit codes -------------------------------------------------------------------------------------------------


class ExitCode(enum.IntEnum):
    """Of every command."""

    OK = 0
    FAILED = 1
    """What was looked for was found wrong, or the work could not be done."""
    BAD_INPUT = 2
    """Options, names or files that are not right; nothing has been run then. click's own for usage errors."""


def exit_codes(failed: str) -> str:
    """The last lines of a command's help. failed: what 1 stands for, there."""
    return f"Exit codes: 0, all is well; 1, {failed}; 2, bad input, before anything was run."


def finish(failed: object) -> NoReturn:
    """Ends the command. failed: whether anything was found wrong."""
    sys.exit(ExitCode.FAILED if failed else ExitCode.OK)


# ---- colours ----------------------------------------------------------------------------------------------------

_COLORS = {"auto": None, "always": True, "never": False}


def _set_color(context: click.Context, option: click.Parameter, wanted: str | None) -> None:
    if wanted is not None:
        context.color = _COLORS[wanted]


def color_option() -> Callable[[Command], Command]:
    """``--color``, for a command and those below it. Without it NO_COLOR and FORCE_COLOR are obeyed."""
    return click.option(
        "--color",
        type=click.Choice(list(_COLORS)),
        expose_value=False,
        callback=_set_color,
        help="Colours: auto (the default) has them on terminals only.",
    )


def console(stderr: bool = False) -> Console:
    """Where commands print. Files and pipes get lines of 160 characters, unless COLUMNS says otherwise."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else 160
    context = click.get_current_context(silent=True)
    color = None if context is None else context.color
    if color is False:
        return Console(stderr=stderr, width=width, color_system=None)
    return Console(stderr=stderr, width=width, force_terminal=color)


# ---- options ----------------------------------------------------------------------------------------------------


def shared_options(json_text: str) -> Callable[[Command], Command]:
    """``--json FILE``, as argument ``json_path``, and ``--color``. json_text: what is written into the file."""
    kind = click.Path(dir_okay=False)
    to_json = click.option("--json", "json_path", type=kind, callback=_checked, metavar="FILE", help=json_text)
    color = color_option()

    def add(command: Command) -> Command:
        return to_json(color(command))

    return add


def several(name: str, text: str, parameter: str | None = None, **settings: Any) -> Callable[[Command], Command]:
    """An option that may be repeated, as a tuple. parameter: the argument, where it is not called like the option."""
    settings.setdefault("metavar", name.upper())
    return click.option(f"--{name}", parameter or name, multiple=True, help=text + " Repeat for several.", **settings)


# ---- files ------------------------------------------------------------------------------------------------------


def check_writable(*paths: str | None) -> None:
    """UsageError if one of the files cannot be written. Leaves no trace of files that were not there."""
    for path in paths:
        if path is None:
            continue
        existed = Path(path).exists()
        try:
            with open(path, "a"):
                pass
        except OSError as error:
            raise click.UsageError(f"{path} cannot be written: {error.strerror}; name another file") from error
        if not existed:
            os.remove(path)


def _checked(context: click.Context, option: click.Parameter, path: str | None) -> str | None:
    check_writable(path)
    return path


def write_json(path: str, content: Any) -> None:
    Path(path).write_text(json.dumps(content, indent=1) + "\n")
