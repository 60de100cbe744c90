"""Writes what the classes say of themselves into the pages of `docs/optimizers/`, between markers.

    python docs/tools/optimizer_pages.py            # after a docstring, a default or a format has changed
    python docs/tools/optimizer_pages.py --check    # exit code 1 if a page is not what this would write

Formula, state and arguments are the class's docstring and signature; memory is what `memory_summary` counts.
A marker names the class: ``<!-- class: AdamW -->`` … ``<!-- end of class -->``.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import click
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, when started as a file

import docstrings

import fusedopt
from fusedopt.specs import RULES

PAGES = Path(__file__).resolve().parents[1] / "optimizers"
MARKER = re.compile(r"(<!-- class: (\w+) -->\n).*?(<!-- end of class -->)", re.DOTALL)

NUMEL = 2**16
"""Elements of the parameter that memory is counted of: more than ``min_8bit_size``, whole blocks."""

FORMATS: dict[str, tuple[torch.dtype, dict[str, object]]] = {
    "fp32": (torch.float32, {}),
    'fp32, `state_dtype="int8"`': (torch.float32, {"state_dtype": "int8"}),
    'bf16, `master_weights="fp32"`': (torch.bfloat16, {"master_weights": "fp32"}),
    'bf16, `master_weights="split16"`': (torch.bfloat16, {"master_weights": "split16"}),
    'bf16, `"split16"`, `"int8"`': (torch.bfloat16, {"master_weights": "split16", "state_dtype": "int8"}),
    'bf16, `"split8"`, `"int8"`': (torch.bfloat16, {"master_weights": "split8", "state_dtype": "int8"}),
    "bf16, `stochastic_rounding=True`": (torch.bfloat16, {"stochastic_rounding": True}),
    "bf16": (torch.bfloat16, {}),
}
"""By their names in the tables: dtype of the parameter, options."""

VARIANTS: dict[str, dict[str, dict[str, object]]] = {
    "Adam": {"": {}, "`amsgrad`": {"amsgrad": True}},
    "AdamW": {"": {}, "`amsgrad`": {"amsgrad": True}},
    "SGD": {"no momentum": {}, "momentum": {"momentum": 0.9}},
    "SGDW": {"no momentum": {}, "momentum": {"momentum": 0.9}},
    "RMSprop": {
        "": {},
        "momentum, or `centered`": {"momentum": 0.9},
        "both": {"momentum": 0.9, "centered": True},
    },
}
"""Options of a class that change what it keeps, by their names in the tables."""


def fill(page: str) -> str:
    """The page with what its marker asks for."""
    return MARKER.sub(lambda match: f"{match[1]}\n{generated(getattr(fusedopt, match[2]))}\n\n{match[3]}", page)


def generated(cls: type) -> str:
    """Formula, arguments and memory of an optimizer."""
    function = f"{cls.__name__.lower()}_"
    rules = [name for name, rule in RULES.items() if f"{rule.family}_" == function]
    about = (
        f"As a function: `fusedopt.functional.{function}`. Rules in the kernels: "
        f"{', '.join(f'`{name}`' for name in rules)}. All of both: [API](../api.md)."
    )
    parts = ["## Formula", docstrings.body(cls.__doc__), about, "## Arguments", argument_table(cls)]
    return "\n\n".join([*parts, "## Memory", memory_table(cls)])


def argument_table(cls: type) -> str:
    documented = docstrings.arguments(cls.__doc__)
    if not documented:  # the docstring says that they are those of the class above
        parent = cls.__mro__[1].__name__
        return f"Those of [`{parent}`]({parent.lower()}.md#arguments), with the formula above."
    defaults = {name: parameter.default for name, parameter in signature_of(cls).items()}
    lines = ["| argument | default | |", "| --- | --- | --- |"]
    for names, text in documented.items():
        values = [defaults.get(name, inspect.Parameter.empty) for name in names.split(", ")]
        shown = ", ".join(dict.fromkeys(f"`{value}`" for value in values if value is not inspect.Parameter.empty))
        title = ", ".join(f"`{'**' if name == 'options' else ''}{name}`" for name in names.split(", "))
        text = text.replace("`FusedOptimizer`", "[`FusedOptimizer`](../api.md)")
        lines.append(f"| {title} | {shown} | {text} |")
    return "\n".join(lines)


def signature_of(cls: type) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(cls.__init__).parameters)


def memory_table(cls: type) -> str:
    variants = VARIANTS.get(cls.__name__, {"": {}})
    titles = [name or "bytes per parameter" for name in variants]
    text = (
        "Bytes per parameter at rest: parameter + gradient + what is kept beside it: master, states, scales of blocks."
    )
    lines = [text, "", f"| format | {' | '.join(titles)} |", f"| --- |{' --- |' * len(titles)}"]
    for name, (dtype, options) in FORMATS.items():
        cells = [memory_cell(cls, dtype, {**options, **variant}) for variant in variants.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "More formats, and which to choose: [formats](../formats.md)."]
    return "\n".join(lines)


def memory_cell(cls: type, dtype: torch.dtype, options: dict[str, object]) -> str:
    """What ``memory_summary`` counts after a step of one parameter; a dash for 8-bit states of a rule without any."""
    param = torch.nn.Parameter(torch.ones(NUMEL, dtype=dtype))
    param.grad = torch.ones_like(param)
    try:
        optimizer = cls([param], lr=1e-3, **options)
    except ValueError as error:
        if "keeps no moments" not in str(error):
            raise
        return "–"
    optimizer.step()
    summary = optimizer.memory_summary()
    kept = sum(summary.per_param(role) for role in ("master", "states", "scales"))
    parts = [summary.per_param("param"), summary.per_param("grad"), kept]
    return f"{' + '.join(f'{part:.4g}' for part in parts)} = **{sum(parts):.4g}**"


@click.command(help=__doc__.splitlines()[0])
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 if a page is out of date.")
def main(check: bool) -> None:
    stale = [path for path in sorted(PAGES.glob("*.md")) if fill(path.read_text()) != path.read_text()]
    if check and stale:
        names = ", ".join(path.name for path in stale)
        raise click.ClickException(f"out of date: {names}; run python docs/tools/optimizer_pages.py")
    for path in stale:
        path.write_text(fill(path.read_text()))


if __name__ == "__main__":
    main()
