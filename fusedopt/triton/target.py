"""What differs between targets, and nothing else. A process has one: that of its torch, or the interpreter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["INTERPRETED", "NVIDIA", "divide", "divide_root", "mask_if", "square_root"]


@triton.jit
def _probe():
    pass


INTERPRETED = not isinstance(_probe, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when triton was imported: kernels run in numpy, on the CPU."""

NVIDIA = tl.constexpr(not INTERPRETED and torch.version.hip is None and getattr(torch.version, "xpu", None) is None)
"""Whether kernels become PTX."""

_IN_NUMPY = tl.constexpr(INTERPRETED)


@triton.jit
def mask_if(mask, condition):
    """``mask`` where ``condition``, a scalar, is true; else nothing."""
    if _IN_NUMPY:  # the interpreter of Triton 3.9 makes integers of a scalar truth value that meets a tile
        return tl.where(condition, mask, mask != mask)
    else:
        return mask & condition


# tl.sqrt_rn and tl.div_rn of float32 are correctly rounded, but Triton before 3.4 makes them flush subnormal numbers.


@triton.jit
def square_root(x):
    """Correctly rounded, of float32 or float64."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    elif NVIDIA:
        return tl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(x, y):
    """Correctly rounded, of float32 or float64. ``y``: a tile or a scalar."""
    if x.dtype == tl.float64:
        return x / y
    elif NVIDIA:
        return tl.inline_asm_elementwise(
            "div.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.div_rn(x, y)


@triton.jit
def fused(x, y, z):
    """x * y + z, rounded once. On NVIDIA GPUs only."""
    return tl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, y, z], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def divide_root(x, y, reciprocal):
    """As ``divide``, for x a square root and y in [2^-24, 1]: ``divide_root`` of ``csrc/core/platform.h``.

    reciprocal: 1 / y, rounded to nearest.
    """
    if x.dtype == tl.float64:
        return x / y
    elif NVIDIA:
        quotient = x * reciprocal
        corrected = fused(fused(-y, quotient, x), reciprocal, quotient)
        return tl.where(x < float("inf"), corrected, quotient)
    else:
        return tl.div_rn(x, y)
