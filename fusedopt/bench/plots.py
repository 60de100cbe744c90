"""Plots of results, from their JSON files: time by library, roofline, efficiency by size, host time, memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..reference import reference_step
from .contracts import HYPER, STATES, Case
from .report import Row
from .suites import make_case

MIN_ROOFLINE_BYTES = 100_000_000
"""Moved in a step: of smaller ones launches are a part, and the caches."""

MAX_BARS = 36
"""Of the plot of memory."""

MAX_CASES = 12
"""Of the plot of times: the first ones of the results."""

_OURS = {"fusedopt-cuda": "#0b5fa5", "fusedopt-cpu": "#0b5fa5", "fusedopt-triton": "#39a0ed"}
_COLOURS = _OURS | {
    "fusedopt-captured": "#5e3c99",
    "torch-fused": "#e07a1f",
    "torch-foreach": "#b5651d",
    "torch-grad-scale": "#f2b134",
    "torch-captured": "#c0392b",
    "torch-compiled": "#7f4f24",
    "apex": "#2a8a57",
    "transformer-engine": "#76b041",
    "deepspeed": "#00838f",
    "bitsandbytes": "#8e44ad",
    "torchao": "#d81b60",
    "flashoptim": "#607d8b",
    "optimi": "#455a64",
    "lion-pytorch": "#9e9d24",
}
_LONGEST_NAME = 36
_MARKERS = "osD^vP*X<>hdp"

Rows = list[Row]
Axes = Any  # matplotlib's, which is optional
Series = dict[str, list[tuple[float, float]]]


_PARTS = {"addcmul": 3, "addcdiv": 3, "lerp": 3}
_NO_OPERATION = ("zeros_like", "clone", "empty", "detach", "_to_copy", "ones", "full", "scalar_tensor", "lift", "view")


class _Counting(TorchDispatchMode):
    """Counts elementwise operations of floats; fused ones as what they are made of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = function.overloadpacket.__name__.rstrip("_")
        if not any(name.startswith(none) for none in _NO_OPERATION):
            self.count += _PARTS.get(name, 1)
        return function(*arguments, **(keywords or {}))


@functools.cache
def operations(optimizer: str, clips: bool) -> int:
    """Floating-point operations per element: those of the reference's second step, and of norm and clipping."""
    zero = torch.zeros(1, dtype=torch.float64)
    with _Counting() as counted:
        states = {name: zero for name in STATES[optimizer]}
        reference_step(optimizer, zero, zero, states, step=2, **HYPER[optimizer])
    return int(counted.count) + 3 * clips


def draw(results: Sequence[Row], folder: Path) -> list[Path]:
    """Every plot that the results, all of one device, have rows for, each as PNG and SVG. Returns the files.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for result in results for row in result["rows"] if not row["error"] and not row.get("skipped")]
    written = []
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "0"}):
        for name, plot in PLOTS.items():
            figure, axes = plt.subplots(figsize=(8.6, 5.2), layout="constrained")
            if plot(axes, rows, results[0]):
                axes.set_xlabel(axes.get_xlabel() + f"\n{_where(results)}", color="#333")
                for suffix in ("png", "svg"):
                    written.append(folder / f"{name}.{suffix}")
                    figure.savefig(written[-1], dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            plt.close(figure)
    return written


def _where(results: Sequence[Row]) -> str:
    dates = sorted({str(result.get("date", ""))[:10] for result in results})
    first = results[0]
    return f"{first['device']}, torch {first['torch']}, {', '.join(dates)}"


def _time(result: Row) -> str:
    return "gpu_ms" if any(row.get("gpu_ms") for row in result["rows"]) else "wall_ms"


def _case(row: Row) -> Case:
    return make_case(*(str(row[key]) for key in ("workload", "optimizer", "format", "contract")))


# ---- the plots: each draws what it finds into the axes, and says whether there was anything ------------------------


def roofline(axes: Axes, rows: Rows, result: Row) -> bool:
    """Operations a second over operations a byte, below the line that the copy's bandwidth draws."""
    time = _time(result)
    shown = [row for row in rows if row.get(time) and _moved(row) >= MIN_ROOFLINE_BYTES]
    shown = [row for row in shown if row["contract"] in ("step", "clip_step", "scaler_clip_step")]
    if not shown:
        return False
    points: dict[str, list[tuple[float, float, Row]]] = {}
    for row in shown:
        count = operations(str(row["optimizer"]), _case(row).clips)
        x, y = count / row["bytes_per_param"], count * row["params"] / row[time] / 1e6
        points.setdefault(str(row["library"]), []).append((x, y, row))
    intensities = [x for one in points.values() for x, *_ in one]
    ends = [min(intensities) / 1.4, max(intensities) * 1.4]
    for key, style in (("copy_gbps", "-"), ("triad_gbps", "--")):
        if result.get(key):
            label = f"{key.removesuffix('_gbps')}, {result[key]:.0f} GB/s"
            axes.plot(ends, [end * result[key] for end in ends], style, color="#222", linewidth=1.2, label=label)
    for library, marker in zip(_ordered(points), _MARKERS * 2):
        x, y, _ = zip(*points[library])
        axes.plot(x, y, marker, color=_COLOURS.get(library, "#999"), label=library, markersize=7, alpha=0.85)
    _name_intensities(axes, points)
    axes.set(xscale="log", yscale="log", xlim=ends)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.75)  # room for the names
    axes.set_xlabel("operations per byte that the step must move")
    axes.set_ylabel("operations, 10⁹ a second")
    axes.set_title("Roofline: the memory's bandwidth is the roof", loc="left")
    _plain_ticks(axes.xaxis, sorted({round(x, 1) for x in intensities}))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return True


def _name_intensities(axes: Axes, points: dict[str, list[tuple[float, float, Row]]]) -> None:
    """What the points at each intensity are about, upright above the roof; neighbours share a line."""
    names: dict[str, float] = {}
    for one in points.values():
        for x, _, row in one:
            names[f"{row['optimizer']} {row['format']}{'' if row['contract'] == 'step' else ' + clip'}"] = x
    groups: list[tuple[float, list[str]]] = []
    for name, x in sorted(names.items(), key=lambda item: item[1]):
        if not groups or x > 1.055 * groups[-1][0]:
            groups.append((x, []))
        groups[-1][1].append(name)
    for x, members in groups:
        shown = members[: 2 if len(", ".join(members[:2])) < _LONGEST_NAME else 1]
        text = ", ".join(shown) + (f", {len(members) - len(shown)} more" if len(members) > len(shown) else "")
        axes.axvline(x, color="#ddd", linewidth=0.8, zorder=0)
        axes.text(x, 0.99, text, transform=axes.get_xaxis_transform(), rotation=90, ha="right", va="top", fontsize=7)


def _plain_ticks(axis: Any, values: list[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    spaced = [value for i, value in enumerate(values) if i == 0 or value > 1.1 * values[i - 1]]
    axis.set_major_locator(FixedLocator(spaced))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def _moved(row: Row) -> float:
    return float((row["bytes_per_param"] or 0) * row["params"])


def efficiency_by_size(axes: Axes, rows: Rows, result: Row) -> bool:
    """Share of the copy floor over parameters: the workloads ``size-…`` of one tensor."""
    shown = [row for row in rows if str(row["workload"]).startswith("size-") and row["efficiency"]]
    series: Series = {}
    for row in shown:
        series.setdefault(str(row["library"]), []).append((row["params"], 100 * row["efficiency"]))
    if not _has_lines(series):
        return False
    _lines(axes, series)
    axes.axhline(100, color="#222", linewidth=1)
    axes.set(xscale="log", ylim=(0, max(105, 1.05 * max(y for line in series.values() for _, y in line))))
    axes.set_xlabel("parameters, in one tensor")
    axes.set_ylabel("share of the copy floor, %")
    axes.set_title(f"Efficiency by size: {_kinds_by_size(shown)}", loc="left")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return True


def _kinds_by_size(rows: Rows) -> str:
    """The optimizer and format of most sizes, and from which size on it is another one."""
    smallest: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row["params"]):
        smallest.setdefault(f"{row['optimizer']} {row['format']}", row["params"])
    (first, _), *others = smallest.items()
    return first + "".join(f"; {kind} at {size:.0e}".replace("e+0", "e") for kind, size in others)


def host_time_by_tensors(axes: Axes, rows: Rows, result: Row) -> bool:
    """Host time of a step with cold caches over the number of tensors: the workloads ``tensors-…``."""
    shown = [row for row in rows if str(row["workload"]).startswith("tensors-") and row.get("host_ms")]
    series: Series = {}
    for row in shown:
        series.setdefault(str(row["library"]), []).append((row["tensors"], row["host_ms"]))
    if not _has_lines(series):
        return False
    _lines(axes, series)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("tensors")
    axes.set_ylabel("host time of a step, ms, caches cold")
    axes.set_title("Host time by number of tensors: clip + AdamW", loc="left")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return True


def memory_per_parameter(axes: Axes, rows: Rows, result: Row) -> bool:
    """Bytes an element: parameter, gradient, what the optimizer keeps, what a step takes for a while."""
    bars: dict[str, Row] = {}
    for row in rows:
        if row.get("state_bytes") and row["params"] >= 10**8 and str(row["contract"]) in ("step", "clip_step"):
            bars.setdefault(f"{row['optimizer']} {row['format']}: {row['library']}", row)
    bars = bars or {
        f"{row['optimizer']} {row['format']}: {row['library']}": row for row in rows if row.get("state_bytes")
    }
    if len(bars) > MAX_BARS:  # captured steps keep what others keep, and other rules have other numbers of states
        bars = {
            name: row
            for name, row in bars.items()
            if row["optimizer"] == "adamw" and not str(row["library"]).endswith("-captured")
        }
    if not bars:
        return False
    names = sorted(bars, key=lambda name: (_bytes(bars[name])["total"], name), reverse=True)
    left = [0.0] * len(names)
    for part, colour in (
        ("parameter", "#4c78a8"),
        ("gradient", "#9ecae9"),
        ("kept", "#f58518"),
        ("for a step", "#bbb"),
    ):
        widths = [_bytes(bars[name])[part] for name in names]
        axes.barh(names, widths, left=left, color=colour, label=part, height=0.7)
        left = [one + width for one, width in zip(left, widths)]
    for y, total in enumerate(left):
        axes.text(total, y, f" {total:.1f}", va="center", fontsize=8)
    axes.figure.set_size_inches(8.6, max(3.0, 1.4 + 0.27 * len(names)))
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlim(0, 1.08 * max(left))  # room for the totals
    axes.margins(y=0.01)
    axes.set_xlabel("bytes per parameter")
    axes.set_title("Memory per parameter", loc="left")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return True


def time_by_library(axes: Axes, rows: Rows, result: Row) -> bool:
    """Time of a step in each library, of the workload with most cases that several libraries ran, and the largest."""
    time = _time(result)
    cases: dict[tuple[tuple[int, str], str, str, str], Rows] = {}
    for row in rows:
        if row.get(time):
            model = (row["params"], str(row["workload"]))  # others may have as many parameters
            key = (model, str(row["contract"]), str(row["optimizer"]), str(row["format"]))
            cases.setdefault(key, []).append(row)
    compared = {key: one for key, one in cases.items() if len({row["library"] for row in one}) > 1}
    if not compared:
        return False
    models = [model for model, *_ in compared]
    params, name = chosen = max(models, key=lambda model: (models.count(model), model))
    shown = [one for (model, *_), one in compared.items() if model == chosen]
    heights = _grouped_bars(axes, shown[:MAX_CASES], time)
    axes.figure.set_size_inches(8.6, 1.6 + 0.19 * heights)
    axes.set_xlabel(
        f"{'GPU' if time == 'gpu_ms' else 'wall'} time of a step, ms; black: what a copy of the bytes takes"
    )
    axes.set_title(f"The step tail of {name}, {params / 1e9:.2f} billion parameters", loc="left")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return True


_WORK = {
    "step": "{}",
    "clip_step": "clip + {}",
    "scaler_clip_step": "unscale, check, clip + {}",
    "torch_scaler_clip_step": "torch's scaler, clip + {}",
}
"""What contracts are about, with the optimizer put in."""


def _grouped_bars(axes: Axes, cases: Sequence[Rows], time: str) -> float:
    """A group of bars for each case, the first at the top, and the floor as a line. Returns their number, with gaps."""
    top, ticks, names, labelled = 0.0, [], [], set()
    for case in cases:
        first = case[0]
        libraries = {str(row["library"]): row for row in case}
        ordered = _ordered(libraries)
        for place, library in enumerate(ordered):
            label = None if library in labelled else library
            labelled.add(library)
            value = libraries[library][time]
            axes.barh(-(top + place), value, 0.86, color=_COLOURS.get(library, "#999"), label=label)
            axes.text(value, -(top + place), f" {value:.1f}", va="center", fontsize=7)
        if first.get("floor_ms"):
            axes.vlines(first["floor_ms"], -(top + len(ordered) - 0.57), -(top - 0.43), color="#000", linewidth=1.2)
        ticks.append(-(top + (len(ordered) - 1) / 2))
        work = _WORK.get(str(first["contract"]), f"{first['contract']}, {{}}").format(first["optimizer"])
        names.append(f"{work}\n{first['format']}")
        top += len(ordered) + 0.8
    axes.set_yticks(ticks, names, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.06, y=0.01)
    return top


def _bytes(row: Row) -> dict[str, float]:
    item = _case(row).layout.dtype.itemsize
    parts = {
        "parameter": float(item),
        "gradient": float(item),
        "kept": row["state_bytes"] / row["params"],
        "for a step": (row.get("temporary_bytes") or 0) / row["params"],
    }
    return parts | {"total": sum(parts.values())}


def _has_lines(series: Series) -> bool:
    return any(len(points) > 1 for points in series.values())


def _lines(axes: Axes, series: Series) -> None:
    for library, marker in zip(_ordered(series), _MARKERS * 2):
        x, y = zip(*sorted(series[library]))
        style = {"color": _COLOURS.get(library, "#999"), "linewidth": 2.2 if library in _OURS else 1.2}
        axes.plot(x, y, marker=marker, markersize=5, label=library, **style)
    axes.grid(True, alpha=0.25)


def _ordered(libraries: Iterable[str]) -> list[str]:
    known = list(_COLOURS)
    return sorted(libraries, key=lambda name: (known.index(name) if name in known else len(known), name))


PLOTS: dict[str, Callable[[Axes, Rows, Row], bool]] = {
    "roofline": roofline,
    "efficiency-by-size": efficiency_by_size,
    "host-time-by-tensors": host_time_by_tensors,
    "memory-per-parameter": memory_per_parameter,
    "time-by-library": time_by_library,
}
"""By the names of their files."""
