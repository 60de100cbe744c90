"""``fusedopt doctor``: what to paste into a bug report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .shared import console, exit_codes, finish, shared_options, write_json

if TYPE_CHECKING:
    from ..backends import Availability
    from ..doctor import Report

__all__ = ["doctor"]


@click.command(epilog=exit_codes("something does not work"))
@shared_options("Write what was found here.")
def doctor(json_path: str | None) -> None:
    """Show versions, GPUs, backends and the kernel cache, and try every backend that is there."""
    from ..doctor import examine

    out = console()
    with out.status("Trying every backend"):
        report = examine()
    for line in lines(report):
        out.print(line, markup=False, highlight=False, soft_wrap=True, style=_style(line))
    if json_path:
        write_json(json_path, report.as_dict())
    finish(failed=not report.healthy)


def _style(line: str) -> str | None:
    return {"ok ": "green", "BAD": "bold red"}.get(line.strip()[:3])


def lines(report: Report) -> list[str]:
    """The report as plain text, for a terminal and for a bug report alike."""
    found = ["versions", *_columns(report.versions), "machine", *_columns(report.machine), "backends"]
    found += _columns({name: _availability(entry) for name, entry in report.backends.items()})
    size = f"{report.cache['kernels']} kernels, {report.cache['bytes'] / 1e6:.1f} MB"
    found += ["kernel cache", f"  {report.cache['folder']}: {size}", "checks"]
    found += [f"  {'ok ' if check.passed else 'BAD'} {check.name}: {check.detail}" for check in report.checks]
    return found


def _availability(entry: Availability) -> str:
    return entry.description if entry.available else f"not here: {entry.reason}"


def _columns(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:{width}}  {text}" for name, text in rows.items()]
