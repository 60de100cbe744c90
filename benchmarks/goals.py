"""The figures that a run is to show: what was asked of rows, and what they came to.

python benchmarks/goals.py benchmarks/results/bench-h100.json     # of fusedopt bench --suite standard, for one
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

from fusedopt.bench.report import Row


@dataclass(frozen=True)
class Goal:
    """A figure to reach: ``value(rows)`` is at least or at most ``bound``; None if its rows were not run."""

    name: str
    value: Callable[[Rows], float | None]
    relation: str
    bound: float
    where: Callable[[Rows], str | None] = lambda rows: None
    """The case that a figure of many rows is of."""

    def judge(self, rows: Rows) -> Row:
        value = self.value(rows)
        reached = None
        if value is not None:
            reached = value >= self.bound if self.relation == ">=" else value <= self.bound
        named = {"name": self.name, "where": self.where(rows)}
        return named | {"value": value, "relation": self.relation, "bound": self.bound, "reached": reached}


class Rows:
    """Looks figures up by what a row is about."""

    def __init__(self, rows: Iterable[Row], first_step: Iterable[Row] = ()) -> None:
        self.rows = list(rows)
        self.first_step = list(first_step)

    def figure(self, key: str, case: str, library: str) -> float | None:
        """``key`` of the row with this ``workload/optimizer/format/contract`` and library."""
        for row in self.rows:
            if _case_of(row) == case and row["library"] == library:
                return row.get(key)
        return None

    def ratio(self, key: str, case: str, library: str, baseline: str, baseline_case: str | None = None) -> float | None:
        """How many times less ``library`` takes than ``baseline``, which may have been measured on another case."""
        ours, theirs = self.figure(key, case, library), self.figure(key, baseline_case or case, baseline)
        return None if ours is None or theirs is None else theirs / ours

    def first_step_seconds(self, cache: str) -> float | None:
        return next((row["first_step_s"] for row in self.first_step if row["cache"] == cache), None)


def _case_of(row: Row) -> str:
    return "/".join(str(row.get(name)) for name in ("workload", "optimizer", "format", "contract"))


def _figure(key: str, case: str) -> Callable[[Rows], float | None]:
    return lambda rows: rows.figure(key, case, "fusedopt-cuda")


def _ratio(
    key: str, case: str, baseline: str, library: str = "fusedopt-cuda", baseline_case: str | None = None
) -> Callable[[Rows], float | None]:
    return lambda rows: rows.ratio(key, case, library, baseline, baseline_case)


def _first_step(cache: str) -> Callable[[Rows], float | None]:
    return lambda rows: rows.first_step_seconds(cache)


def _share_goal(case: str, efficiency: float) -> Goal:
    return Goal(f"{case}: share of the floor", _figure("efficiency", case), ">=", efficiency)


def _efficiency_goals(case: str, launches: int, efficiency: float) -> list[Goal]:
    return [
        Goal(f"{case}: launches", _figure("launches", case), "<=", launches),
        _share_goal(case, efficiency),
    ]


def _speed_goals(case: str) -> list[Goal]:
    return [
        Goal(f"{case}: times faster than GradScaler", _ratio("gpu_ms", case, "torch-fused"), ">=", 1.6),
        Goal(f"{case}: times faster than grad_scale", _ratio("gpu_ms", case, "torch-grad-scale"), ">=", 1.2),
    ]


SMALL = "1000-small/adamw/fp32/scaler_clip_step"

TAIL_GOALS = [
    *_efficiency_goals("llama-1.3B/adamw/fp32/step", 1, 0.97),
    *_efficiency_goals("gpt2-124M/adamw/fp32/step", 1, 0.97),
    *_efficiency_goals("llama-1.3B/adamw/fp32/scaler_clip_step", 2, 0.97),
    *_speed_goals("llama-1.3B/adamw/fp32/scaler_clip_step"),
    *_efficiency_goals("gpt2-124M/adamw/fp32/scaler_clip_step", 2, 0.95),
    *_speed_goals("gpt2-124M/adamw/fp32/scaler_clip_step"),
    *_efficiency_goals("llama-1.3B/lion/fp32/step", 1, 0.95),
    *_efficiency_goals("llama-1.3B/adamw/bf16/step", 1, 0.94),
    Goal(f"{SMALL}: GPU ms, cold L2", _figure("gpu_ms", SMALL), "<=", 0.025),
    Goal(f"{SMALL}: GPU ms, warm L2", _figure("gpu_warm_ms", SMALL), "<=", 0.025),
    Goal(f"{SMALL}: host ms", _figure("host_ms", SMALL), "<=", 0.3),
    Goal(f"{SMALL}: times less host time than torch", _ratio("host_ms", SMALL, "torch-fused"), ">=", 20),
    Goal("first step of a process, cold kernel cache, s", _first_step("cold"), "<=", 2.0),
    Goal("first step of a process, warm kernel cache, s", _first_step("warm"), "<=", 0.3),
]

LLAMA = "llama-1.3B"
SMALLEST = f"{LLAMA}/adamw/bf16+split8+int8/step"
NO_MASTER = f"{LLAMA}/adamw/bf16+int8/step"
HALF = f"{LLAMA}/adamw/fp16+fp32 master/scaler_clip_step"

FORMAT_GOALS = [
    _share_goal(f"{LLAMA}/adamw/bf16+split16/step", 0.94),
    _share_goal(f"{LLAMA}/adamw/bf16+split16/clip_step", 0.94),
    _share_goal(SMALLEST, 0.90),
    _share_goal(f"{LLAMA}/adamw/bf16+split8+int8/clip_step", 0.90),
    Goal(f"{SMALLEST}: times faster than FlashAdamW", _ratio("gpu_ms", SMALLEST, "flashoptim"), ">=", 1.9),
    Goal(
        f"{SMALLEST}: times faster than AdamW8bit",
        _ratio("gpu_ms", SMALLEST, "bitsandbytes", baseline_case=NO_MASTER),  # which keeps no master at all
        ">=",
        6.0,
    ),
    _share_goal(f"{LLAMA}/adamw/bf16+sr/step", 0.88),
    _share_goal(f"{LLAMA}/lion/bf16+split16+bf16/step", 0.95),
    _share_goal(f"{LLAMA}/lion/bf16+split8+int8/step", 0.88),
    _share_goal(HALF, 0.93),
    Goal(f"{HALF}: times faster than apex", _ratio("gpu_ms", HALF, "apex"), ">=", 1.3),
]

NEW_RULES = ("sgd_momentum", "rmsprop", "adagrad")


def _times_faster(case: str, figure: str, library: str, baseline: str, bound: float) -> Goal:
    return Goal(f"{case}: times faster than {baseline}", _ratio(figure, case, baseline, library), ">=", bound)


def _triton(key: str, case: str) -> Callable[[Rows], float | None]:
    return lambda rows: rows.figure(key, case, "fusedopt-triton")


def _triton_goals(case: str, launches: int, efficiency: float) -> list[Goal]:
    """The Triton backend beside the floor and, in host time, beside the CUDA backend."""
    return [
        Goal(f"{case}: launches of Triton", _triton("launches", case), "<=", launches),
        Goal(f"{case}: Triton's share of the floor", _triton("efficiency", case), ">=", efficiency),
        Goal(
            f"{case}: host time of CUDA over Triton's",
            _ratio("host_ms", case, "fusedopt-cuda", "fusedopt-triton"),
            ">=",
            0.5,
        ),
    ]


TAIL_GOALS += _triton_goals("llama-1.3B/adamw/fp32/step", 1, 0.98)
TAIL_GOALS += _triton_goals("llama-1.3B/adamw/fp32/clip_step", 2, 0.97)
# Two: tensors too small for 8-bit states are a bucket of their own.
FORMAT_GOALS += _triton_goals(SMALLEST, 2, 0.85)

RULE_GOALS = [
    goal
    for case in (f"{LLAMA}/{rule}/fp32/step" for rule in NEW_RULES)
    for goal in (
        *_efficiency_goals(case, 1, 0.96),
        _times_faster(case, "gpu_ms", "fusedopt-cuda", "torch-fused", 1.0),
        _times_faster(case, "gpu_ms", "fusedopt-cuda", "torch-foreach", 1.0),
    )
]
CPU_RULE_GOALS = [
    _times_faster(f"cpu-100M/{rule}/fp32/clip_step", "wall_ms", "fusedopt-cpu", baseline, 1.2)
    for rule in (*NEW_RULES, "radam", "adamw_amsgrad")
    for baseline in ("torch-fused", "torch-foreach")
]

CPU_CLIP = "cpu-100M/adamw/fp32/clip_step"

CPU_TAIL_GOALS = [
    Goal(f"{CPU_CLIP}: times faster than torch", _ratio("wall_ms", CPU_CLIP, "torch-fused", "fusedopt-cpu"), ">=", 1.25)
]

ACCUMULATED = f"{LLAMA}/adamw/bf16+split16/accumulated_clip_step"
OWN_SCALER = f"{LLAMA}/adamw/fp32/own_scaler_clip_step"
CAPTURED = "gpt2-124M-model/adamw/fp32/captured_step"


def _host_goals(workload: str, host_ms: float) -> list[Goal]:
    cases = [f"{workload}/adamw/fp32/{contract}_after_backward" for contract in ("step", "clip_step")]
    return [Goal(f"{case}: host ms", _figure("host_ms", case), "<=", host_ms) for case in cases]


LOOP_GOALS = [
    *_efficiency_goals(f"{LLAMA}/none/bf16/accumulate_first", 1, 0.75),
    *_efficiency_goals(f"{LLAMA}/none/bf16/accumulate", 1, 0.94),
    _share_goal(ACCUMULATED, 0.92),
    Goal(f"{ACCUMULATED}: times faster than torch", _ratio("gpu_ms", ACCUMULATED, "torch-fused"), ">=", 1.6),
    Goal(f"{OWN_SCALER}: our launches", _figure("own_launches", OWN_SCALER), "<=", 2),
    _share_goal(OWN_SCALER, 0.95),
    Goal(f"{CAPTURED}: same bits as eager", _figure("same_bits", CAPTURED), ">=", 1),
    *_host_goals("gpt2-124M", 0.06),
    *_host_goals("1000-small", 0.2),
]

GOALS = {
    "cuda": {"tail": TAIL_GOALS, "formats": FORMAT_GOALS, "rules": RULE_GOALS, "loop": LOOP_GOALS},
    "cpu": {"tail": CPU_TAIL_GOALS, "formats": [], "rules": CPU_RULE_GOALS, "loop": []},
}
"""By device and set of cases."""


def judge_goals(device: torch.device, sets: Iterable[str], rows: list[Row], first_step: list[Row]) -> list[Row]:
    """Every goal of the sets; value and verdict are None where the run has no rows for it."""
    looked_up = Rows(rows, first_step)
    return [goal.judge(looked_up) for name in sets for goal in GOALS[device.type][name]]


def print_goals(console: Console, goals: list[Row]) -> None:
    table = Table(title="figures to show", box=None, pad_edge=False)
    table.add_column("figure", no_wrap=True)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("goal", justify="right", no_wrap=True)
    table.add_column("")
    for goal in goals:
        verdict = {None: "not measured", True: "[green]reached[/]", False: "[red]missed[/]"}[goal["reached"]]
        value = "-" if goal["value"] is None else f"{goal['value']:.4g}"
        name = f"{goal['name']} ({goal['where']})" if goal["where"] else goal["name"]
        table.add_row(name, value, f"{goal['relation']} {goal['bound']:g}", verdict)
    console.print(table)


# ------------------------------------------------------------------------------ what fusedopt bench is to show


LARGE = 100_000_000
"""Elements: rows of as many are judged by their share of the floor."""

SHARES = {
    "AdamW in fp32": (lambda row: row["optimizer"] == "adamw" and row["format"] == "fp32", 0.99),
    "fp32 and split16": (lambda row: row["format"] == "fp32" or "split16" in row["format"], 0.985),
    "bf16": (lambda row: row["format"] in ("bf16", "bf16+sr"), 0.97),
    "8-bit states": (lambda row: "int8" in row["format"], 0.92),
}
"""Which rows have to reach which share of the copy's bandwidth."""

TIMES = {
    "8-bit states": (lambda row: "int8" in row["format"], 2.0),
    "every row": (lambda row: True, 1.0),
}
"""Which rows have to be how many times as fast as the best other library."""

Chosen = Callable[[Row], bool]


def _large_step(row: Row) -> bool:
    """Of ours, aligned, with an optimizer step in one pass over the states: what the shares are asked of."""
    aligned = not str(row["workload"]).startswith((f"{LLAMA}-misaligned", f"{LLAMA}-odd"))
    large = row["params"] >= LARGE and row["contract"] in ("step", "clip_step", "scaler_clip_step")
    return row["library"] == "fusedopt-cuda" and aligned and large


def _ours(row: Row) -> bool:
    return row["library"] == "fusedopt-cuda"


def _least_goal(name: str, key: str, bound: float, *conditions: Chosen) -> Goal:
    """Of the least figure of the rows that meet all conditions."""

    def worst(rows: Rows) -> Row | None:
        found = [row for row in rows.rows if row.get(key) is not None and all(holds(row) for holds in conditions)]
        return min(found, key=lambda row: row[key], default=None)

    def value(rows: Rows) -> float | None:
        return None if (row := worst(rows)) is None else row[key]

    def where(rows: Rows) -> str | None:
        return None if (row := worst(rows)) is None else _case_of(row)

    return Goal(f"{name}, least", value, ">=", bound, where)


def _eager_wall(case: str) -> Callable[[Rows], float | None]:
    """Wall time of torch's best eager way over ours."""

    def value(rows: Rows) -> float | None:
        eager = (rows.figure("wall_ms", case, f"torch-{name}") for name in ("fused", "foreach", "grad-scale"))
        best, ours = min(filter(None, eager), default=None), rows.figure("wall_ms", case, "fusedopt-cuda")
        return best / ours if best and ours else None

    return value


def _beside_aligned(workload: str) -> Callable[[Rows], float | None]:
    """Efficiency over that of the aligned workload."""

    def value(rows: Rows) -> float | None:
        case = f"{workload}/adamw/fp32/step"
        own, aligned = (rows.figure("efficiency", one, "fusedopt-cuda") for one in (case, "llama-1.3B/adamw/fp32/step"))
        return own / aligned if own and aligned else None

    return value


def _cpu_rate(rows: Rows) -> float | None:
    """Byte rate of clip + AdamW over that of torch's fused AdamW alone."""
    ours = rows.figure("gbps", CPU_CLIP, "fusedopt-cpu")
    theirs = rows.figure("gbps", "cpu-100M/adamw/fp32/step", "torch-fused")
    return ours / theirs if ours and theirs else None


def _wall(case: str, bound: float) -> Goal:
    return Goal(f"{case}: wall, times faster than torch", _ratio("wall_ms", case, "torch-fused"), ">=", bound)


STANDARD_GOALS = [
    *(
        _least_goal(f"{name}: share of the floor", "efficiency", least, _large_step, chosen)
        for name, (chosen, least) in SHARES.items()
    ),
    *(
        _least_goal(f"{name}: times faster than the best other", "over_best", least, _ours, chosen)
        for name, (chosen, least) in TIMES.items()
    ),
    Goal(
        "llama-1.3B/adamw/fp32/scaler_clip_step: times faster than torch's scaler + clip + fused",
        _ratio("gpu_ms", "llama-1.3B/adamw/fp32/scaler_clip_step", "torch-fused"),
        ">=",
        1.65,
    ),
    *(
        Goal(f"{case}: wall, times faster than torch's best eager way", _eager_wall(case), ">=", 30)
        for case in (SMALL, "10000-tiny/adamw/fp32/scaler_clip_step")
    ),
    Goal(f"{SMALL}: captured, GPU ms", lambda rows: rows.figure("gpu_ms", SMALL, "fusedopt-captured"), "<=", 0.030),
    _wall("resnet50/adamw/fp32/scaler_clip_step", 5.0),
    _wall("bert-large/adamw/fp32/scaler_clip_step", 1.6),
    *(
        Goal(f"{workload}/adamw/fp32/step: over the aligned share", _beside_aligned(workload), ">=", bound)
        for workload, bound in (
            ("llama-1.3B-misaligned", 0.95),
            ("llama-1.3B-odd", 0.95),
            ("llama-1.3B-misaligned-apart", 0.70),
        )
    ),
]
STANDARD_CPU_GOALS = [
    Goal(f"{CPU_CLIP}: byte rate over torch's fused step", _cpu_rate, ">=", 0.95),
    Goal(f"{CPU_CLIP}: times faster than torch", _ratio("wall_ms", CPU_CLIP, "torch-fused", "fusedopt-cpu"), ">=", 1.3),
]
GOALS["cuda"]["standard"], GOALS["cpu"]["standard"] = STANDARD_GOALS, STANDARD_CPU_GOALS


# --------------------------------------------------------------------------- what benchmarks/fsdp.py is to show


FSDP_CASE = "adamw/fp32/fsdp_clip_step"


def _fsdp_goals() -> list[Goal]:
    small, large = f"1000-dtensors/{FSDP_CASE}", f"1.3B/{FSDP_CASE}"
    less_host = _ratio("host_ms", small, "torch-fused")
    return [
        Goal(f"{small}: host ms", _figure("host_ms", small), "<=", 0.4),
        Goal(f"{small}: times less host time than torch", less_host, ">=", 20),
        _wall(small, 1.5),
        _share_goal(large, 0.93),
        _wall(large, 1.5),
    ]


FSDP_GOALS = _fsdp_goals()
"""For every process, by itself: its figures over its own of the other library."""


def judge_ranks(goals: Sequence[Goal], rows: list[Row]) -> list[Row]:
    """Every goal for each process that has rows."""
    ranks = sorted({row["rank"] for row in rows if "rank" in row})
    looked_up = {rank: Rows(row for row in rows if row.get("rank") == rank) for rank in ranks}
    judged = [{**goal.judge(looked_up[rank]), "rank": rank} for rank in ranks for goal in goals]
    return [{**goal, "name": f"rank {goal['rank']}: {goal['name']}"} for goal in judged]


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--device", "device_type", type=click.Choice(list(GOALS)), default="cuda", show_default=True)
def main(results: tuple[Path, ...], device_type: str) -> None:
    """Judge results of ``fusedopt bench`` and of these benchmarks, one file or several: the goals that they have rows
    for."""
    loaded = [json.loads(each.read_text()) for each in results]
    rows = [row for result in loaded for row in result.get("rows", [])]
    first_step = [row for result in loaded for row in result.get("first_step", [])]
    judged = judge_goals(torch.device(device_type), GOALS[device_type], rows, first_step)
    judged += judge_ranks(FSDP_GOALS, rows)
    known = {goal["name"]: goal for goal in judged if goal["value"] is not None}
    print_goals(Console(width=None if sys.stdout.isatty() else 140), list(known.values()))


if __name__ == "__main__":
    main()
