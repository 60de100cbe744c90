"""``fusedopt verify``: steps beside the float64 reference. Exit code 0: all cases passed; 1: not so; 2: bad input."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from .reports import check_writable, json_option

__all__ = ["verify"]

_SHOWN_FAILURES = 20


def _several(name: str, text: str):
    return click.option(f"--{name}", name, multiple=True, metavar=name.upper(), help=text + " Repeat for several.")


@click.command()
@click.option(
    "--optimizer", metavar="MODULE:CLASS", help="Another optimizer, such as torch.optim:AdamW. Default: fusedopt's."
)
@click.option("--quick", is_flag=True, help="A sample: every rule, format, transform and adversarial case. Under 60 s.")
@click.option("--device", default="cpu", show_default=True, help="Where the parameters are: cpu, cuda, cuda:1.")
@_several("backend", "Only these backends of fusedopt. Default: all cases on the best one, a sample on the others.")
@_several("rule", "Only these rules; of another optimizer, the rule it is to follow.")
@_several("format", "Only these formats, such as bfloat16-split16-int8_states.")
@_several("dtype", "Only parameters of these dtypes; of another optimizer, default: float32 and float64.")
@_several("transform", "Only these: none, scale, clip, value_clip, accumulate.")
@_several("case", "Only these adversarial cases, such as zeros, or cases with this in their name.")
@click.option(
    "--jobs", type=click.IntRange(1), help="Processes that share the cases. Default: one for each core, 16 at most."
)
@click.option(
    "--time-limit", type=click.FloatRange(min=0), help="Stop after so many seconds; cases that are left fail the run."
)
@click.option("--list", "listing", is_flag=True, help="Write the names of the cases, and run none.")
@json_option("Write every case with its figures here.")
@click.option("--html", "html_path", type=click.Path(dir_okay=False), help="Write a page with plots here.")
@click.option("--markdown", "markdown_path", type=click.Path(dir_okay=False), help="Write a table of the figures here.")
def verify(optimizer, jobs, time_limit, listing, json_path, html_path, markdown_path, **choice) -> None:
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
    sys.exit(1 if run.failed or run.unreached else 0)


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


def _write_reports(run, html_path, json_path, markdown_path) -> None:
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
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("Verifying", total=total)
        self._failed = 0

    def __enter__(self):
        self._bar.start()
        return self._advance

    def _advance(self, result) -> None:
        self._failed += bool(result.error)
        text = f"Verifying, {self._failed} failed" if self._failed else "Verifying"
        self._bar.update(self._task, advance=1, description=text)

    def __exit__(self, *_) -> None:
        self._bar.stop()


def _show(run, planned, quick: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..testing.report import summaries, ulp_text

    console = Console()
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
    console.print(table)
    for result in run.failed[:_SHOWN_FAILURES]:
        console.print(f"[bold red]FAILED[/] {escape(result.case.name)}\n  {escape(result.error)}", soft_wrap=True)
    if len(run.failed) > _SHOWN_FAILURES:
        console.print(f"and {len(run.failed) - _SHOWN_FAILURES} more: --json or --html has all")
    for note in planned.notes:
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    _show_left_out(console, run, quick)
    if run.unreached:
        console.print(f"[bold red]{run.unreached:,} cases were not reached within the time limit[/]")
    colour = "red" if run.failed or run.unreached else "green"
    total = f"{len(run.judged) - len(run.failed):,} of {len(run.judged):,} cases passed in {run.seconds:.0f} s"
    console.print(f"[bold {colour}]{total}[/]")


def _show_left_out(console, run, quick: bool) -> None:
    reasons = {}
    for result in run.results:
        if result.left_out:
            reasons[result.left_out] = reasons.get(result.left_out, 0) + 1
    for reason, count in reasons.items():
        console.print(f"{count} cases were left out: {reason}", style="yellow", markup=False)
    if run.skipped:
        why = (
            "--quick runs a sample: each rule with each format, transform and adversarial case"
            if quick
            else "filtered, or of other backends than the best, which --backend names"
        )
        console.print(f"{run.skipped:,} other cases were not run ({why})", markup=False, soft_wrap=True)
