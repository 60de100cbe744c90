"""Files that commands write, which are tried before the work begins."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

__all__ = ["check_writable", "json_option", "write_json"]


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


def json_option(text: str) -> Callable:
    """The option ``--json FILE`` that all commands share, as argument ``json_path``."""
    kind = click.Path(dir_okay=False)
    return click.option("--json", "json_path", type=kind, callback=_checked, metavar="FILE", help=text)


def write_json(path: str, content: Any) -> None:
    Path(path).write_text(json.dumps(content, indent=1) + "\n")
