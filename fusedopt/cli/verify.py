"""``fusedopt verify``: steps beside the float64 reference."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from .shared import check_writable, console, exit_codes, finish, several, shared_options

if TYPE_CHECKING:
    from rich.console import Console

    from ..testing import Plan, Result, Run

__all__ = ["verify"]

_SHOWN_FAILURES = 20


@click.command(epilog=exit_codes("a case failed, or was not reached in time"))
@click.option(
    "--optimizer", metavar="MODULE:CLASS", help="Another optimizer, such as torch.optim:AdamW. Default: fusedopt's."
)
@click.option("--quick", is_flag=True, help="A sample: every rule, format, transform and adversarial case. Under 60 s.")
@click.option("--device", default="cpu", show_default=True, help="Where the parameters are: cpu, cuda, cuda:1.")
@several("backend", "Only these backends of fusedopt. Default: all cases on the best one, a sample on the others.")
@several("rule", "Only these rules; of another optimizer, the rule it is to follow.")
@several("format", "Only these formats, such as bfloat16-split16-int8_states.")
@several("dtype", "Only parameters of these dtypes; of another optimizer, default: float32 and float64.")
@several("transform", "Only these: none, scale, clip, value_clip, accumulate.")
@several("case", "Only these adversarial cases, such as zeros, or cases with this in their name.")
@click.option(
    "--jobs", type=click.IntRange(1), help="Processes that share the cases. Default: one for each core, 16 at most."
)
@click.option(
    "--time-limit", type=click.FloatRange(min=0), help="Stop after so many seconds; cases that are left fail the run."
)
@click.option("--list", "listing", is_flag=True, help="Write the names of the cases, and run none.")
@shared_options("Write every case with its figures here.")
@click.option("--html", "html_path", type=click.Path(dir_okay=False), help="Write a page with plots here.")
@click.option("--markdown", "markdown_path", type=click.Path(dir_okay=False), help="Write a table of the figures here.")
def verify(
    optimizer: str | None,
    jobs: int | None,
    time_limit: float | None,
    listing: bool,
    json_path: str | None,
    html_path: str | None,
    markdown_path: str | None,
    **choice: Any,
) -> None:
    """Compare optimizer steps with the float64 reference, element by element, within derived bounds."""
    from ..testing.harness import plan
    from ..testing.harness import verify as run_plan

    _check_device(choice["device"])
    try:
        planned = plan(optimizer, **choice)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if listing:
        click.echo("\n".join(case.name for case in planned.cases))
        return
    _check_reports(html_path, markdown_path)
    try:
        with _progress(len(planned.cases)) as advance:
            run = run_plan(
                planned=planned,
                command=_command(),
                on_result=advance,
                jobs=_jobs(jobs, len(planned.cases)),
                time_limit=time_limit,
            )
    except (ValueError, RuntimeError) as error:  # of the processes that share the cases; cases raise nothing
        raise click.ClickException(str(error)) from error
    if not run.judged:
        raise click.UsageError(f"no case means anything for {planned.subject}: {run.results[0].left_out}")
    _write_reports(run, html_path, json_path, markdown_path)
    _show(run, planned, choice["quick"])
    finish(failed=run.failed or run.unreached)


def _command() -> str:
    return " ".join(["fusedopt", *sys.argv[1:]])


def _jobs(wanted: int | None, cases: int) -> int:
    """A process takes some seconds to start, so a hundred cases are enough for one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wanted or max(1, min(cores, 16, cases // 100))


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise click.BadParameter(
            f"got {device!r}, which torch cannot use here: {reason}", param_hint="--device"
        ) from error


def _check_reports(html_path: str | None, *others: str | None) -> None:
    """Before any case runs."""
    from ..testing.page import require_matplotlib

    check_writable(html_path, *others)
    if html_path is not None:
        try:
            require_matplotlib()
        except RuntimeError as error:
            raise click.UsageError(str(error)) from error


def _write_reports(run: Run, html_path: str | None, json_path: str | None, markdown_path: str | None) -> None:
    from ..testing.page import write_html
    from ..testing.report import markdown, write_json

    if json_path:
        write_json(json_path, run)
    if html_path:
        write_html(html_path, run)
    if markdown_path:
        Path(markdown_path).write_text(markdown(run))


class _progress:
    """A progress bar; inside of it, a function to call with each result."""

    def __init__(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console(stderr=True), transient=True)
        self._task = self._bar.add_task("Verifying", total=total)
        self._failed = 0

    def __enter__(self) -> Callable[[Result], None]:
        self._bar.start()
        return self._advance

    def _advance(self, result: Result) -> None:
        self._failed += bool(result.error)
        text = f"Verifying, {self._failed} failed" if self._failed else "Verifying"
        self._bar.update(self._task, advance=1, description=text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def _show(run: Run, planned: Plan, quick: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    from ..testing.report import summaries, ulp_text

    out = console()
    table = Table(title=f"{run.subject} on {run.device}, beside the float64 reference", title_justify="left")
    table.add_column("rule")
    table.add_column("backend")
    for name in ("formats", "cases", "failed", "worst ulp", "of bound"):
        table.add_column(name, justify="right")
    formats = [s.key for s in summaries(run.judged, "rule", "backend", "format")]
    for s in summaries(run.judged, "rule", "backend"):
        count = sum(key[:2] == s.key for key in formats)
        failed = f"[bold red]{s.failed}[/]" if s.failed else "0"
        table.add_row(*s.key, str(count), str(s.cases), failed, ulp_text(s.worst_ulp), f"{max(s.share, 0):.2f}")
    out.print(table)
    for result in run.failed[:_SHOWN_FAILURES]:
        out.print(f"[bold red]FAILED[/] {escape(result.case.name)}\n  {escape(result.error)}", soft_wrap=True)
    if len(run.failed) > _SHOWN_FAILURES:
        out.print(f"and {len(run.failed) - _SHOWN_FAILURES} more: --json or --html has all")
    for note in planned.notes:
        out.print(note, style="yellow", markup=False, soft_wrap=True)
    _show_left_out(out, run, quick)
    if run.unreached:
        out.print(f"[bold red]{run.unreached:,} cases were not reached within the time limit[/]")
    colour = "red" if run.failed or run.unreached else "green"
    total = f"{len(run.judged) - len(run.failed):,} of {len(run.judged):,} cases passed in {run.seconds:.0f} s"
    out.print(f"[bold {colour}]{total}[/]")


def _show_left_out(out: Console, run: Run, quick: bool) -> None:
    reasons: dict[str, int] = {}
    for result in run.results:
        if result.left_out:
            reasons[result.left_out] = reasons.get(result.left_out, 0) + 1
    for reason, count in reasons.items():
        out.print(f"{count} cases were left out: {reason}", style="yellow", markup=False)
    if run.skipped:
        why = (
            "--quick runs a sample: each rule with each format, transform and adversarial case"
            if quick
            else "filtered, or of other backends than the best, which --backend names"
        )
        out.print(f"{run.skipped:,} other cases were not run ({why})", markup=False, soft_wrap=True)
