"""Times variants of the CUDA kernels in turn: other tunings, and other sources.

    python benchmarks/variants.py --format bf16 "8 elements:FUSEDOPT_ELEMENTS(tuning, smallest, largest)=8"
    git worktree add ../before HEAD~5
    python benchmarks/variants.py --optimizer adamw --optimizer lion --json variants.json before:source=../before/csrc

A variant is a name and settings with ``;`` between them: macros of ``csrc/cuda/tuning.cuh``, and ``source``, a folder
to compile instead of the package's. Every variant is a library of ``fusedopt bench``: checked against the float64
reference, then measured in turns with the kernels as they are.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import click
import torch
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

from fusedopt.backends import cuda, nvrtc
from fusedopt.bench.contracts import Case, Tail
from fusedopt.bench.report import Row, environment, print_rows, write
from fusedopt.bench.runner import CACHES, FULL, QUICK, Measured, Repeats, Runner, add_floor, measure_cases, progress_bar
from fusedopt.bench.suites import CONTRACTS, OPTIMIZERS, select_cases
from fusedopt.bench.workloads import FORMATS, WORKLOADS, Model

SETTING = re.compile(r"(?P<name>\w+(\([^)]*\))?)=(?P<value>.+)")


@dataclass(frozen=True)
class Variant:
    """What kernels are compiled with and from."""

    name: str
    macros: dict[str, object] = field(default_factory=dict)
    source: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Variant:
        """``name:setting;setting``. click.BadParameter for anything else, and for folders without kernels."""
        name, colon, settings = text.partition(":")
        found = [SETTING.fullmatch(setting.strip()) for setting in settings.split(";")]
        if not name or not colon or None in found:
            raise click.BadParameter(f"got {text!r}, expected NAME:SETTING=VALUE;..., such as 'before:source=old/csrc'")
        macros: dict[str, object] = {match["name"]: match["value"] for match in found if match}
        source = Path(str(macros.pop("source"))) if "source" in macros else None
        tuning = (source or nvrtc.source_dir()) / "cuda" / "tuning.cuh"
        if not tuning.is_file():
            raise click.BadParameter(f"{name}: got source={source}, where there is no cuda/tuning.cuh; name a csrc/")
        for macro in macros:
            if f"#ifndef {macro.partition('(')[0]}\n" not in tuning.read_text():
                raise click.BadParameter(f"{name}: got {macro}, which {tuning} does not ask for; see its #ifndef lines")
        return cls(name, macros, source)

    @contextmanager
    def compiled(self, device: torch.device) -> Iterator[None]:
        """Kernels that are asked for inside are this variant's; whoever has asked keeps what it got."""
        known = cuda._device(device.index or 0).functions
        source = self.source or nvrtc.source_dir()
        try:
            with patch.object(nvrtc, "source_dir", lambda: source), patch.dict(nvrtc.DEFINES, self.macros):
                nvrtc._source_hash.cache_clear()
                known.clear()
                yield
        finally:
            nvrtc._source_hash.cache_clear()
            known.clear()


class VariantRunner(Runner):
    """Measures variants where ``Runner`` measures libraries."""

    def __init__(self, device: torch.device, repeats: Repeats, variants: list[Variant]) -> None:
        super().__init__(device, repeats)
        self.variants = {"fusedopt": Variant("fusedopt")} | {each.name: each for each in variants}

    def libraries(self, case: Case) -> list[str]:
        return list(self.variants)

    def build(self, library: str, case: Case, model: Model) -> Tail:
        return super().build("fusedopt", case, model)

    def _turn(self, stage: Callable[..., None], entry: Measured, case: Case, model: Model) -> Measured:
        with self.variants[entry.library].compiled(self.device):  # the first step chooses kernels, a later one may
            return super()._turn(stage, entry, case, model)


def measure(repeats: Repeats, cases: list[Case], variants: list[Variant], deadline: float, console: Console) -> Row:
    """The whole run, as the JSON file holds it."""
    device = torch.device("cuda", torch.cuda.current_device())
    runner = VariantRunner(device, repeats, variants)
    with progress_bar(console) as progress:
        rows, left_out = measure_cases(runner, cases, deadline, progress)
    runner.copy_gbps.append(runner.measure_copy())
    add_floor(rows, max(runner.copy_gbps), measured="gpu_ms")
    return environment(device) | {
        "copy_gbps": max(runner.copy_gbps),
        "copy_gbps_start_end": runner.copy_gbps,
        "caches": CACHES,
        "variants": {each.name: each.macros | ({"source": "other"} if each.source else {}) for each in variants},
        "rows": rows,
        "left_out": left_out,
    }


@click.command(help=__doc__.split("\n")[0])
@click.argument("variants", nargs=-1, required=True, metavar="NAME:SETTING=VALUE...", callback=lambda *a: parsed(a[2]))
@click.option("--workload", "workloads", type=click.Choice(list(WORKLOADS)), multiple=True, default=("llama-1.3B",))
@click.option("--optimizer", "optimizers", type=click.Choice(OPTIMIZERS), multiple=True, default=("adamw",))
@click.option("--format", "formats", type=click.Choice(list(FORMATS)), multiple=True, default=("fp32",))
@click.option("--contract", "contracts", type=click.Choice(CONTRACTS), multiple=True, default=("step",))
@click.option("--quick", is_flag=True, help="A smoke run: few repetitions.")
@click.option("--time-limit", type=float, default=240, show_default=True, help="Start no case after so many seconds.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write the results here.")
def main(
    variants: list[Variant],
    workloads: tuple[str, ...],
    optimizers: tuple[str, ...],
    formats: tuple[str, ...],
    contracts: tuple[str, ...],
    quick: bool,
    time_limit: float,
    path: Path | None,
) -> None:
    deadline = time.monotonic() + time_limit
    if not torch.cuda.is_available():
        raise click.UsageError("torch sees no CUDA device, and these are kernels for one")
    console = Console(width=None if sys.stdout.isatty() else 120)
    cases = select_cases(None, "cuda", workloads, optimizers, formats, contracts)
    result = measure(QUICK if quick else FULL, cases, variants, deadline, console)
    write(path, result)
    print_rows(console, result["rows"])
    if any(row["error"] for row in result["rows"]):
        sys.exit(1)


def parsed(texts: tuple[str, ...]) -> list[Variant]:
    """click.BadParameter for names that do not tell rows apart."""
    found = [Variant.parse(text) for text in texts]
    names = [each.name for each in found]
    if len({"fusedopt", *names}) <= len(names):
        raise click.BadParameter(f"got the names {', '.join(names)}, expected each once, and not 'fusedopt'")
    return found


if __name__ == "__main__":
    main()
