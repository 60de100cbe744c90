"""The correctness harness: any optimizer, element by element, beside the float64 reference.

::

    run = fusedopt.testing.verify("torch.optim:AdamW", quick=True)
    assert not run.failed, run.failed[0].error

Where to add something: an adversarial case is a row of ``data.DATA``, an optimizer or variant one of
``variants.VARIANTS``, a format one of ``formats.COMBINATIONS``. ``bounds`` has the derived error bounds, ``judge`` and
``trials`` the steps, ``runner`` and ``report`` what comes of them.
"""

from .bounds import Bounded, Comparison, assert_within, bounded_step, compare
from .cases import Case, foreign_cases, full_cases, quick_cases, select
from .data import DATA, TRANSFORMS, DataSet
from .harness import Plan, load_optimizer, plan, verify
from .report import Run, environment, markdown, summaries, write_json
from .runner import Result, run_case, run_cases
from .variants import VARIANTS, Variant

__all__ = [
    "DATA",
    "TRANSFORMS",
    "VARIANTS",
    "Bounded",
    "Case",
    "Comparison",
    "DataSet",
    "Plan",
    "Result",
    "Run",
    "Variant",
    "assert_within",
    "bounded_step",
    "compare",
    "environment",
    "foreign_cases",
    "full_cases",
    "load_optimizer",
    "markdown",
    "plan",
    "quick_cases",
    "run_case",
    "run_cases",
    "select",
    "summaries",
    "verify",
    "write_json",
]
