"""The structs of ``csrc/core/structs.h`` and ``csrc/cuda/args.h`` as Python sees them: where each field stands.

For whoever reads tables that the extension packed: the Triton kernels take the offsets, the reference backend the
values. Standard library only. ``tests/test_structure.py`` compares field by field with the C++ text.
"""

from __future__ import annotations

from ctypes import Structure, c_double, c_float, c_int32, c_int64, c_uint32, c_uint64, sizeof
from typing import TypeVar

__all__ = ["Chunk", "Control", "Hyper", "NormOptions", "Partial", "PassArgs", "Scaling", "TensorEntry", "rows"]

_MAX_STATES, _MAX_HYPER = 4, 10  # kMaxStates, kMaxHyper

Row = TypeVar("Row", bound=Structure)

# Pointers are unsigned 64-bit integers here: addresses, of whatever device.


class TensorEntry(Structure):
    """Everything about a parameter that stays the same from step to step."""

    _fields_ = (
        ("param", c_uint64),
        ("extra", c_uint64),
        ("states", c_uint64 * _MAX_STATES),
        ("scales", c_uint64 * _MAX_STATES),
        ("step", c_uint64),
        ("numel", c_int64),
        ("group", c_int32),
        ("id", c_uint32),
        ("chunks", c_int32),
        ("ticket", c_uint32),
        ("main_grad", c_uint64),
        ("norms", c_uint64),
    )


class Chunk(Structure):
    """A run of consecutive elements of one tensor."""

    _fields_ = (("tensor", c_int32), ("index", c_uint32), ("numel", c_int64))


class Hyper(Structure):
    """The hyper-parameters of one param group."""

    _fields_ = (
        ("value", c_double * _MAX_HYPER),
        ("lr", c_uint64),
        ("lr_is_double", c_uint32),
        ("maximize", c_uint32),
    )


class Control(Structure):
    """Results of a step on one device."""

    _fields_ = (
        ("sum", c_double),
        ("nonfinite", c_double),
        ("total_norm", c_double),
        ("clip_coef", c_double),
        ("total_norm_f32", c_float),
        ("clip_coef_f32", c_float),
        ("found_inf", c_float),
        ("skipped", c_float),
        ("skipped_steps", c_int64),
        ("ticket", c_uint32),
        ("unused", c_uint32),
    )


class Partial(Structure):
    """A program's part of the norm: ``CudaPartial``."""

    _fields_ = (("sum", c_double), ("nonfinite", c_double))


class Scaling(Structure):
    """What happens to gradients before the rule. Null pointers mean "not given"."""

    _fields_ = (
        ("grad_scale", c_uint64),
        ("found_inf", c_uint64),
        ("clip_coef", c_uint64),
        ("max_grad_value", c_double),
        ("grad_weight", c_double),
        ("grad_divisor", c_double),
        ("grad_weight_at", c_uint64),
        ("grad_divisor_at", c_uint64),
    )


class NormOptions(Structure):
    """How the norm pass ends."""

    _fields_ = (("max_norm", c_double), ("type", c_int32), ("skip_nonfinite", c_int32))


class PassArgs(Structure):
    """What the host tells a pass besides the tables."""

    _fields_ = (
        ("tensors", c_uint64),
        ("chunks", c_uint64),
        ("step_table", c_uint64),
        ("control", c_uint64),
        ("partials", c_uint64),
        ("norms", c_uint64),
        ("scaling", Scaling),
        ("norm_found_inf", c_uint64),
        ("nonfinite_out", c_uint64),
        ("norm", NormOptions),
        ("seed", c_uint64),
        ("num_groups", c_int32),
        ("num_chunks", c_int32),
        ("lead", c_int32),
        ("first_partial", c_int32),
        ("num_partials", c_int32),
        ("finalize", c_int32),
    )


def rows(struct: type[Row], content: bytes) -> list[Row]:
    """Copies of the rows that ``content`` holds one after the other."""
    return list((struct * (len(content) // sizeof(struct))).from_buffer_copy(content))
