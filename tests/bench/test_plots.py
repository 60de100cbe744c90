"""The plots: every one is written, from the rows that it is about, and only then."""

import pytest

from fusedopt.bench.contracts import HYPER
from fusedopt.bench.plots import PLOTS, draw, operations
from fusedopt.bench.workloads import WORKLOADS

pytest.importorskip("matplotlib")


def row(workload, library="fusedopt-cuda", gpu_ms=1.0, **changes):
    model = WORKLOADS[workload]
    figures = {
        "workload": workload,
        "optimizer": "adamw",
        "format": "fp32",
        "contract": "step",
        "library": library,
        "params": model.numel,
        "tensors": len(model.shapes),
        "bytes_per_param": 28,
        "gpu_ms": gpu_ms,
        "host_ms": 0.1,
        "efficiency": 0.98,
        "state_bytes": 8 * model.numel,
        "temporary_bytes": 0,
        "error": None,
        "skipped": None,
    }
    return figures | changes


def result(*rows):
    facts = {"device": "a GPU", "torch": "2.11", "date": "2026-11-22", "copy_gbps": 3000.0, "triad_gbps": 3100.0}
    return facts | {"rows": list(rows)}


def test_every_plot_is_written_as_png_and_svg(tmp_path):
    rows = [row(name, library) for library in ("fusedopt-cuda", "torch-fused") for name in WORKLOADS]
    written = draw([result(*rows)], tmp_path / "plots")
    assert {path.name for path in written} == {f"{name}.{suffix}" for name in PLOTS for suffix in ("png", "svg")}
    assert all(path.stat().st_size > 5000 for path in written)
    svg = (tmp_path / "plots" / "efficiency-by-size.svg").read_text()
    assert svg.startswith("<?xml")


def test_plots_without_rows_are_not_written(tmp_path):
    written = draw([result(row("tiny"))], tmp_path)
    assert {path.stem for path in written} == {"memory-per-parameter"}
    failed = result(row("llama-1.3B", error="OutOfMemoryError"), row("gpt2-124M", skipped="too large"))
    assert draw([failed], tmp_path) == []


def test_rows_of_several_results_are_put_together(tmp_path):
    results = [result(row("size-1e3")), result(row("size-1e4"))]
    assert "efficiency-by-size.png" in {path.name for path in draw(results, tmp_path)}


def test_time_by_library_needs_two_libraries(tmp_path):
    ours, theirs = row("gpt2-124M"), row("gpt2-124M", "torch-fused", 2.0, floor_ms=0.9)
    assert "time-by-library.png" not in {path.name for path in draw([result(ours)], tmp_path)}
    assert "time-by-library.png" in {path.name for path in draw([result(ours, theirs)], tmp_path)}


def test_efficiency_by_size_says_where_the_format_changes(tmp_path):
    sizes = [row("size-1e3"), row("size-1e9"), row("size-4e9", format="bf16")]
    draw([result(*sizes)], tmp_path)
    assert "Efficiency by size: adamw fp32; adamw bf16 at 4e9" in (tmp_path / "efficiency-by-size.svg").read_text()


def test_time_by_library_is_of_the_workload_with_most_cases(tmp_path):
    cases = [("gpt2-124M", "step"), ("gpt2-124M", "clip_step"), ("size-4e9", "step")]
    rows = [row(name, library, contract=contract) for name, contract in cases for library in ("torch-fused", "apex")]
    draw([result(*rows)], tmp_path)
    assert "The step tail of gpt2-124M" in (tmp_path / "time-by-library.svg").read_text()


def test_time_by_library_keeps_workloads_of_one_size_apart(tmp_path):
    """A misaligned model has as many parameters as the aligned one."""
    rows = [
        row(name, library, time)
        for name, time in (("llama-1.3B", 12.5), ("llama-1.3B-misaligned", 13.5))
        for library in ("torch-fused", "apex")
    ]
    rows += [row("llama-1.3B", library, 7.25, contract="clip_step") for library in ("torch-fused", "apex")]
    draw([result(*rows)], tmp_path)
    drawn = (tmp_path / "time-by-library.svg").read_text()
    assert "The step tail of llama-1.3B," in drawn and "12.5" in drawn and "13.5" not in drawn


def test_many_bars_of_memory_are_those_of_adamw(tmp_path):
    rules = [row("gpt2-124M", library, optimizer=rule) for rule in HYPER for library in ("torch-fused", "apex", *"abc")]
    draw([result(*rules, row("gpt2-124M", "torch-captured"))], tmp_path)
    text = (tmp_path / "memory-per-parameter.svg").read_text()
    assert "adamw fp32: apex" in text and "sgd fp32: apex" not in text and "torch-captured" not in text


def test_operations_are_counted():
    """SGD: lr * (g + lambda * p) subtracted from p."""
    assert 4 <= operations("sgd", clips=False) <= 8
    assert operations("sgd", clips=False) < operations("sgd_momentum", clips=False) < operations("adamw", clips=False)
    assert operations("adamw", clips=True) == operations("adamw", clips=False) + 3


def test_a_roof_of_one_bandwidth_and_neighbours_that_share_a_line(tmp_path):
    """A result without a triad; two rules with almost as many operations a byte."""
    rows = [row("llama-1.3B", optimizer=rule) for rule in ("adamw", "adamw_amsgrad", "radam", "lion")]
    one = result(*rows, row("llama-1.3B", "torch-fused", gpu_ms=None))
    del one["triad_gbps"]
    assert "roofline.png" in {path.name for path in draw([one], tmp_path)}
