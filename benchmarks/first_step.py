"""Times the first ``opt.step()`` of a process: with an empty kernel cache, and with the cache that this one filled.

    python benchmarks/first_step.py --device cuda --json benchmarks/results/first-step-h100.json

Each figure comes from a fresh Python process, after the device context, the model and its gradients have been made and
the device is idle: AdamW, fp32, ``max_grad_norm=1.0``, the 148 tensors of GPT-2 124M. Importing fusedopt and making the
optimizer are timed too, but are not part of the step.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import click
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

from fusedopt.bench.report import environment
from fusedopt.bench.timing import synchronize
from fusedopt.bench.workloads import FORMATS, WORKLOADS, Model

WORKLOAD = {"cuda": "gpt2-124M", "cpu": "tiny"}  # nothing is compiled on a CPU: small is enough to see that

Row = dict[str, object]


def time_first_step(device: torch.device) -> Row:
    """What a child process measures, in seconds."""
    model = Model(WORKLOADS[WORKLOAD[device.type]], FORMATS["fp32"].dtype, device)
    model.backward()
    before = model.params[0].detach().clone()
    synchronize(device)
    start = perf_counter()
    import fusedopt

    imported = perf_counter()
    opt = fusedopt.AdamW(model.params, max_grad_norm=1.0)
    synchronize(device)
    made = perf_counter()
    opt.step()
    synchronize(device)
    stepped = perf_counter()
    opt.step()
    synchronize(device)
    second = perf_counter()
    if torch.equal(before, model.params[0]) or not model.params[0].isfinite().all():
        raise RuntimeError("time_first_step: the step did not update params[0] to finite values")
    return {
        "import_s": imported - start,
        "construct_s": made - imported,
        "first_step_s": stepped - made,
        "second_step_s": second - stepped,
    }


def run_child(device: torch.device, cache: Path) -> Row:
    """Measures in a fresh process whose kernel caches, ours and the driver's, are below ``cache``."""
    variables = {"FUSEDOPT_CACHE_DIR": str(cache / "fusedopt"), "CUDA_CACHE_PATH": str(cache / "driver")}
    command = [sys.executable, __file__, "--device", device.type, "--child"]
    result = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=300, check=False
    )
    if result.returncode:
        raise RuntimeError(f"run_child: exit status {result.returncode} from {' '.join(command)}:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def measure(device: torch.device, repeats: int) -> list[Row]:
    """A row for the cold and one for the warm cache: medians, smallest and largest first step, in seconds."""
    runs: dict[str, list[Row]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for rows in runs.values():  # the second child finds what the first one left
                rows.append(run_child(device, Path(folder)))
    return [_summary(cache, rows) for cache, rows in runs.items()]


def _summary(cache: str, rows: list[Row]) -> Row:
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    first = [row["first_step_s"] for row in rows]
    spread = {"first_step_s_min": min(first), "first_step_s_max": max(first)}
    return {"cache": cache, **medians, **spread, "runs": len(rows)}


@click.command(help=__doc__.split("\n")[0])
@click.option("--device", "device_type", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Processes of each kind.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write the results here.")
@click.option("--child", is_flag=True, hidden=True)
def main(device_type: str, repeats: int, path: Path | None, child: bool) -> None:
    device = torch.device(device_type)
    if child:
        print(json.dumps(time_first_step(device)))
        return
    rows = measure(device, repeats)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(environment(device) | {"first_step": rows}, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['cache']} cache: first step {row['first_step_s']:.3f} s "
            f"({row['first_step_s_min']:.3f} to {row['first_step_s_max']:.3f}), second {row['second_step_s']:.4f} s, "
            f"import {row['import_s']:.3f} s, optimizer {row['construct_s']:.4f} s"
        )


if __name__ == "__main__":
    main()
