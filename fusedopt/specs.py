"""What the rules and formats are called, and in which order their parts travel. Standard library only.

A new rule needs a row in ``RULES`` here, a header in ``csrc/rules/``, a reference in ``reference.py`` and an optimizer
in ``optim/``; a test asserts that these registries agree.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CPU_CHUNK", "CUDA_CHUNK", "DTYPES", "NORM_TYPES", "RULES", "FormatSpec", "RuleSpec"]


@dataclass(frozen=True)
class RuleSpec:
    """An update rule: the names that its C++ header, its state dict and its param groups share."""

    name: str
    cpp: str
    """The struct in ``csrc/rules/``."""
    states: tuple[str, ...]
    """State keys, as in ``torch.optim``, in the order of the header's ``kStateNames``."""
    hyper: tuple[tuple[str, str, int], ...]
    """(hyper-parameter, param group key, index into the key's tuple or -1), in the order of ``kHyperNames``."""
    index: int
    """Position in ``csrc/rules/all.h``."""


_LR = ("lr", "lr", -1)
_BETAS = (("beta1", "betas", 0), ("beta2", "betas", 1))
_EPS = ("eps", "eps", -1)
_WEIGHT_DECAY = ("weight_decay", "weight_decay", -1)

RULES: dict[str, RuleSpec] = {
    spec.name: spec
    for spec in (
        RuleSpec("adam", "Adam", ("exp_avg", "exp_avg_sq"), (_LR, *_BETAS, _EPS, _WEIGHT_DECAY), 0),
        RuleSpec("adamw", "AdamW", ("exp_avg", "exp_avg_sq"), (_LR, *_BETAS, _EPS, _WEIGHT_DECAY), 1),
        RuleSpec("lion", "Lion", ("exp_avg",), (_LR, *_BETAS, _WEIGHT_DECAY), 2),
    )
}


@dataclass(frozen=True)
class FormatSpec:
    """How an element rests in memory."""

    name: str
    """torch's name of the dtype."""
    cpp: str
    """The struct in ``csrc/formats/``."""
    code: int
    """The value of ``DType`` in ``csrc/core/structs.h``."""


DTYPES: dict[str, FormatSpec] = {
    spec.name: spec
    for spec in (
        FormatSpec("float32", "Float32", 0),
        FormatSpec("bfloat16", "BFloat16", 1),
        FormatSpec("float16", "Float16", 2),
        FormatSpec("float64", "Float64", 3),
    )
}

NORM_TYPES: dict[float, tuple[str, int]] = {2.0: ("kL2", 0), 1.0: ("kL1", 1), float("inf"): ("kInf", 2)}
"""Order of the norm → name and value of ``NormType`` in ``csrc/core/structs.h``."""

CPU_CHUNK = 1 << 16
"""Elements per unit of work of a CPU thread: large against its cost, small against a model."""

CUDA_CHUNK = 1 << 13
"""Elements per thread block: 32 for each of 256 threads."""
