"""The HTML page of a run: one file, with its plots inside. Needs matplotlib."""

from __future__ import annotations

import base64
import html
import io
import math
from pathlib import Path

from .report import Run, environment, summaries, ulp_text
from .runner import BINS, Result

__all__ = ["distribution_figure", "require_matplotlib", "share_figure", "write_html"]

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .15em .7em; border-bottom: 1px solid #ddd }
th { text-align: left } td.number { text-align: right; font-variant-numeric: tabular-nums }
.failed { color: #b00020; font-weight: 600 } .incomplete { color: #9a6700; font-weight: 600 }
.passed { color: #1b6e3c; font-weight: 600 } img { max-width: 100% }
code { font-size: 13px }
"""
_MOST_FAILURES = 200


def require_matplotlib() -> None:
    """RuntimeError with the remedy where it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            'plots need matplotlib, which is not installed; pip install "fusedopt[bench]", or leave out --html'
        ) from error


# ---- plots --------------------------------------------------------------------------------------------------------

_KINDS = {
    "plain, 32 and 64 bits": lambda f: not f.options.get("master_weights") and f.dtype.itemsize > 2,
    "plain, 16 bits": lambda f: f.dtype.itemsize == 2 and not f.keeps_more,
    "masters and splits": lambda f: bool(f.master_weights),
    "stochastic rounding": lambda f: f.stochastic_rounding,
}
_COLORS = ("#1f5fa8", "#d2691e", "#2a8a57", "#8b3fa0")


def _shares(results: list[Result]) -> list[float]:
    counts = [sum(column) for column in zip(*(r.histogram for r in results))]
    total = sum(counts)
    return [count / total for count in counts] if total else []


def distribution_figure(results: list[Result]):
    """For each rule, how large the errors of all elements are, in ulp, by kind of format."""
    from matplotlib.figure import Figure

    rules = list(dict.fromkeys(r.case.variant.rule for r in results))
    columns = min(4, len(rules))
    rows = math.ceil(len(rules) / columns)
    figure = Figure(figsize=(max(3.4 * columns, 5.5), 2.1 * rows + 1.1), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    centers = [math.log2(BINS[0]) - 0.5, *(math.log2(edge) + 0.5 for edge in BINS)]
    for ax, rule in zip(axes.flat, rules):
        for (kind, belongs), color in zip(_KINDS.items(), _COLORS):
            shares = _shares([r for r in results if r.case.variant.rule == rule and belongs(r.case.format)])
            if shares:
                ax.stairs(shares, [centers[0] - 0.5, *(c + 0.5 for c in centers)], color=color, lw=1.4, label=kind)
        ax.axvline(-1, color="#888", lw=0.8, ls=":")
        ax.set_title(rule, fontsize=10)
        ax.set_yscale("log")
        ax.set_ylim(1e-6, 2)
        ax.set_xticks(range(-12, 12, 4), [f"$2^{{{k}}}$" for k in range(-12, 12, 4)])
    for ax in list(axes.flat)[len(rules) :]:
        ax.set_visible(False)
    figure.supxlabel(
        "error of an element, ulp (leftmost bin: smaller, zero included; dotted: half an ulp)", fontsize=10
    )
    figure.supylabel("share of elements", fontsize=10)
    shown = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=len(shown), frameon=False, fontsize=9)
    return figure


def share_figure(results: list[Result]):
    """The largest error beside its bound, per rule and way of keeping parameters: above 1 is a failure. Where a number
    is stored in 16 bits the bound is half an ulp, which many elements reach."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    cells = {s.key: s for s in summaries(results, "rule", "parameters")}
    rules = list(dict.fromkeys(key[0] for key in cells))
    columns = list(dict.fromkeys(key[1] for key in cells))
    figure = Figure(figsize=(1.15 * len(columns) + 3, 0.33 * len(rules) + 1.9), layout="constrained")
    ax = figure.subplots()
    values = [[max(cells[r, c].share, 0.0) if (r, c) in cells else math.nan for c in columns] for r in rules]
    colours = colormaps["Blues"].with_extremes(over="#d62728")
    image = ax.imshow(values, cmap=colours, vmin=0, vmax=1.0 + 1e-9, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if not math.isnan(value):
                text = f"{value:.2f}" if value < 1e3 else "≫ 1"
                ax.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if value > 0.6 else "black")
    ax.set_xticks(range(len(columns)), [c.replace("-", "\n") for c in columns], fontsize=8)
    ax.set_yticks(range(len(rules)), rules, fontsize=8)
    figure.colorbar(image, ax=ax, label="largest error / bound; red: above 1", extend="max")
    return figure


def _inline(figure, text: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


# ---- tables -------------------------------------------------------------------------------------------------------


def _table(head: list[str], rows: list[list]) -> str:
    def cell(value) -> str:
        kind = ' class="number"' if isinstance(value, int | float) else ""
        text = ulp_text(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        return f"<td{kind}>{html.escape(text)}</td>"

    body = "\n".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + f"</tr>\n{body}</table>"


def _failures(run: Run) -> str:
    if not run.failed:
        return ""
    rows = [[r.case.name, r.error] for r in run.failed[:_MOST_FAILURES]]
    more = f"<p>The first {_MOST_FAILURES} of {len(run.failed):,}.</p>" if len(run.failed) > _MOST_FAILURES else ""
    return "<h2>Failures</h2>" + more + _table(["case", "what was wrong"], rows)


def write_html(path: str | Path, run: Run) -> None:
    """RuntimeError where matplotlib is missing."""
    require_matplotlib()
    rows = [
        [*s.key, s.cases, s.failed, float(s.worst_ulp), float(max(s.share, 0.0))]
        for s in summaries(run.judged, "rule", "format", "backend")
    ]
    facts = {**environment(run.device), "command": run.command, "seconds": f"{run.seconds:.1f}"}
    verdict = "failed" if run.failed else "incomplete" if run.unreached else "passed"
    late = f" {run.unreached:,} cases were not reached within the time limit." if run.unreached else ""
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>fusedopt verify: {html.escape(run.subject)}</title>
<style>{_STYLE}</style></head><body>
<h1>{html.escape(run.subject)} <span class="{verdict}">{verdict}</span></h1>
<p>{len(run.judged):,} cases, {len(run.failed):,} failed; {run.skipped:,} cases were not run.{late} Each element of
each step was compared with the float64 reference; errors are in ulp (units in the last place) of the parameter's
dtype.</p>
{_failures(run)}
<h2>Errors of all elements</h2>{_inline(distribution_figure(run.judged), "histograms of errors by rule")}
<h2>Largest error beside its bound</h2>{_inline(share_figure(run.judged), "largest error over bound")}
<h2>Rules, formats, backends</h2>
{_table(["rule", "format", "backend", "cases", "failed", "worst ulp", "of bound"], rows)}
<h2>Environment</h2>{_table(["", ""], [[key, str(value)] for key, value in facts.items()])}
</body></html>
"""
    Path(path).write_text(page)
