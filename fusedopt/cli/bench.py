"""``fusedopt bench``: the step tail, timed beside other libraries'."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from .shared import color_option, console, exit_codes, finish, several, shared_options, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from ..bench.contracts import Case
    from ..bench.report import Row
    from ..bench.runner import Repeats

__all__ = ["bench"]

_SUITES = ("standard", "formats", "rules", "sizes", "host", "full", "quick")


@click.group(invoke_without_command=True, epilog=exit_codes("a case of fusedopt's failed"))
@click.pass_context
@click.option("--suite", type=click.Choice(_SUITES), help="Which cases. Default: standard, if no case is named.")
@several("workload", "Only these models; --list names them.", "workloads")
@several("optimizer", "Only these rules, such as adamw.", "optimizers")
@several("format", "Only these formats, such as fp32 or bf16+split16.", "formats")
@several("contract", "Only these: step, clip_step, scaler_clip_step, accumulate, ...", "contracts")
@click.option(
    "--against",
    multiple=True,
    metavar="LIBRARY",
    help="Compare with these: a list with commas of torch-fused, apex, ..., or torch, default, all, none. --list names "
    "them. Default: all that are installed, but for those that compile for minutes, and foreach where fused is there.",
)
@click.option("--backend", "backends", multiple=True, type=click.Choice(["triton"]), help="fusedopt on this one too.")
@click.option("--device", "device_type", type=click.Choice(["cuda", "cpu"]), help="Default: cuda where there is one.")
@click.option("--quick", is_flag=True, help="A smoke run: few repetitions; a tiny model, if no case is named.")
@click.option("--rounds", type=click.IntRange(min=1), help="Turns of each library.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; torch's default otherwise.")
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="SECONDS", help="Start no case after so long.")
@shared_options("Write the results here, after each case.")
@click.option("--resume", is_flag=True, help="Go on from the file of --json, with the cases that it has no rows of.")
@click.option("--supervised", hidden=True, metavar="COMMAND", help="The command of the process that started this one.")
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), help="Draw plots into this folder.")
@click.option("--list", "listing", is_flag=True, help="Name workloads, formats, ... and libraries, and run nothing.")
def bench(context: click.Context, /, listing: bool, **options: Any) -> None:
    """Time the step tail of fusedopt beside other libraries', each checked first against the float64 reference."""
    if context.invoked_subcommand is not None:
        return
    _require_numpy()
    if listing:
        _show_names(options["device_type"] or _default_device())
        return
    started = time.monotonic()
    plan = _planned(options)
    limit = options["time_limit"]
    deadline = float("inf") if limit is None else started + limit
    path = Path(options["json_path"]) if options["json_path"] else None
    if options["supervised"] is not None:
        _run(plan, deadline, path, options)
    if not _supervise(context, plan, deadline, path, options["resume"]):
        _run(plan, deadline, path, options)


def _require_numpy() -> None:
    try:
        import numpy  # noqa: F401
    except ImportError as error:
        raise click.UsageError('this needs numpy, which is not installed; pip install "fusedopt[bench]"') from error


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class _Plan:
    """What is to be measured."""

    cases: list[Case]
    device_type: str
    repeats: Repeats
    against: tuple[str, ...]
    backends: tuple[str, ...]


def _planned(options: dict[str, Any]) -> _Plan:
    """All that may be wrong with the options is noticed here."""
    import torch

    from ..bench.runner import FULL, FULL_CPU, QUICK
    from ..bench.session import resolve_peers
    from ..bench.suites import select_cases

    device_type = options["device_type"] or _default_device()
    if device_type == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("got cuda, but torch finds no GPU here; use cpu", param_hint="--device")
    chosen = {key: options[key] for key in ("workloads", "optimizers", "formats", "contracts")}
    _check_names(chosen)
    suite = options["suite"]
    if suite is None and not any(chosen.values()):
        suite = "quick" if options["quick"] else "standard"
    cases = select_cases(suite, device_type, **chosen)
    if not cases:
        raise click.UsageError(f"the suite {suite} has no such case; leave out --suite to combine freely")
    try:
        against = resolve_peers(options["against"] or ("default",))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--against") from error
    _check_plots(options["plots"])
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    repeats = QUICK if options["quick"] else {"cuda": FULL, "cpu": FULL_CPU}[device_type]
    if options["rounds"]:
        repeats = replace(repeats, rounds=options["rounds"])
    if options["resume"] and options["json_path"] is None:
        raise click.UsageError("--resume goes on from a file; name it with --json")
    return _Plan(cases, device_type, repeats, against, options["backends"])


def _earlier(path: Path, device_type: str) -> Row:
    """The run to go on with. Asking for the device's name takes memory there: where there is a child, that does it."""
    import torch

    from ..bench.session import resumed

    try:
        return resumed(path, torch.device(device_type))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--resume") from error


def _supervise(context: click.Context, plan: _Plan, deadline: float, path: Path | None, resume: bool) -> bool:
    """Runs all in a child process if libraries take part that might end it; False if there are none."""
    import torch

    from ..bench.journal import supervise
    from ..bench.session import of_others

    if not of_others(plan.cases, torch.device(plan.device_type), plan.against):
        return False
    with tempfile.TemporaryDirectory() as folder:
        path = path or Path(folder, "result.json")
        replaced: dict[str, Any] = {"json_path": path, "time_limit": None, "resume": False}
        replaced["supervised"] = _command()
        arguments = ["bench", *_as_arguments(context, replaced)]
        if context.color is not None:
            arguments += ["--color", "always" if context.color else "never"]
        code = supervise(arguments, path, deadline, resume)
    sys.exit(code)


def _command() -> str:
    return " ".join(["fusedopt", *sys.argv[1:]])


def _as_arguments(context: click.Context, replaced: dict[str, Any]) -> list[str]:
    """The options of a command as one would type them; those of ``replaced`` with other values."""
    words: list[str] = []
    values = {**context.params, **replaced}
    for option in context.command.params:
        value = values.get(option.name or "")
        for one in value if isinstance(value, tuple) else (value,):
            if one is True:
                words.append(option.opts[0])
            elif one not in (None, False):
                words += [option.opts[0], str(one)]
    return words


def _name_those_without_a_case(plan: _Plan) -> None:
    import torch

    from ..bench.session import without_case

    for name in without_case(plan.cases, torch.device(plan.device_type), plan.against):
        click.echo(f"{name} has nothing to compare with these cases on {plan.device_type}", err=True)


def _check_names(chosen: dict[str, tuple[str, ...]]) -> None:
    from ..bench.suites import CONTRACTS, OPTIMIZERS
    from ..bench.workloads import FORMATS, WORKLOADS

    known = {"workloads": WORKLOADS, "optimizers": (*OPTIMIZERS, "none"), "formats": FORMATS, "contracts": CONTRACTS}
    for key, names in chosen.items():
        for name in names:
            if name not in known[key]:
                raise click.BadParameter(
                    f"got {name!r}, expected one of {', '.join(known[key])}", param_hint=f"--{key.removesuffix('s')}"
                )


def _check_plots(folder: Path | None) -> None:
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"{folder} cannot be made: {error.strerror}; name another folder") from error
    _require_matplotlib()


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise click.UsageError(
            'plots need matplotlib, which is not installed; pip install "fusedopt[bench]"'
        ) from error


def _show_names(device_type: str) -> None:
    from ..bench import peers
    from ..bench.session import PEERS
    from ..bench.suites import CONTRACTS, OPTIMIZERS
    from ..bench.workloads import FORMATS, WORKLOADS

    out = console()
    for title, names in (("formats", FORMATS), ("contracts", CONTRACTS), ("optimizers", OPTIMIZERS)):
        out.print(f"[bold]{title}[/]: {', '.join(names)}")
    sizes = [f"{name} ({one.numel:,} in {len(one.shapes):,})" for name, one in WORKLOADS.items()]
    out.print(f"[bold]workloads[/], elements in tensors: {', '.join(sizes)}", highlight=False)
    out.print("[bold]libraries[/]:")
    for name in PEERS:
        reason = peers.why_missing(name) if name in peers.MODULES else None
        elsewhere = device_type not in peers.DEVICES.get(name, (device_type,))
        out.print(
            f"  {name}{f': missing ({reason})' if reason else ''}{', for GPUs' if elsewhere else ''}", markup=False
        )


def _run(plan: _Plan, deadline: float, path: Path | None, options: dict[str, Any]) -> NoReturn:
    import torch

    from ..bench.journal import end_with_parent
    from ..bench.report import print_rows
    from ..bench.session import BenchRunner, failed_rows, measure, print_end

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what has been measured is written then
    out = console()
    command = options["supervised"]
    if command is not None:
        end_with_parent()
    if options["against"] and not options["resume"]:
        _name_those_without_a_case(plan)
    earlier = _earlier(path, plan.device_type) if path and options["resume"] else None
    runner = BenchRunner(torch.device(plan.device_type), plan.repeats, plan.against, plan.backends)
    result = measure(runner, plan.cases, deadline, out, command or _command(), path, earlier)
    if options["supervised"] is not None and runner.journal.read():
        finish(failed=True)  # the device is lost: another process goes on
    print_rows(out, result["rows"])
    print_end(out, result)
    if options["plots"]:
        _draw([result], options["plots"], out)
    finish(failed=failed_rows(result, own=True))


def _draw(results: list[Row], folder: Path, out: Console) -> None:
    from ..bench.plots import draw

    for path in draw(results, folder):
        out.print(f"wrote {path}", highlight=False, soft_wrap=True)


@bench.command(epilog=exit_codes("something became slower, or fails now"))
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--tolerance", type=click.FloatRange(min=0), help="Relative change that is no regression, such as 0.02.")
@click.option("--all", "every", is_flag=True, help="Show what is the same too.")
@shared_options("Write the changes here.")
def compare(before: Path, after: Path, tolerance: float | None, every: bool, json_path: str | None) -> None:
    """Flag what became slower from one JSON file to another."""
    from ..bench.compare import compare as changes_of
    from ..bench.compare import load, print_changes, warnings

    out = console()
    try:
        first, second = load(before), load(after)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    for text in warnings(first, second):
        out.print(f"WARNING: {text}", style="yellow", markup=False)
    changes, only = changes_of(first, second, tolerance)
    if not changes:
        raise click.UsageError(f"{before} and {after} have no row in common")
    print_changes(out, changes, every)
    for name in only:
        out.print(name, markup=False, highlight=False)
    regressions = sum(change.is_regression for change in changes)
    out.print(f"{len(changes)} figures compared, {regressions} regressed", highlight=False)
    if json_path:
        write_json(json_path, {"changes": [asdict(change) for change in changes], "only": only})
    finish(failed=regressions)


@bench.command(epilog=exit_codes("the plots could not be drawn"))
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", "folder", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the plots."
)
@color_option()
def plot(results: tuple[Path, ...], folder: Path) -> None:
    """Draw the plots of one or more JSON files of one device."""
    from ..bench.compare import load

    _check_plots(folder)
    try:
        loaded = [load(path) for path in results]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    devices = sorted({str(result.get("device")) for result in loaded})
    if len(devices) > 1:
        raise click.UsageError(f"the results are of different devices: {', '.join(devices)}; plot them apart")
    _draw(loaded, folder, console())
