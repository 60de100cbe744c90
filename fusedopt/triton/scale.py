"""The scale pass: gradients multiplied and clamped where they are."""

from __future__ import annotations

import triton
import triton.language as tl

from .formats import at, decode, encode
from .memory import field, load, tile_offsets
from .tables import ARGS_NONFINITE_OUT, length_of, mask_of, own_of, read_chunk, scaling, unscale

__all__ = ["scale_pass"]


@triton.jit
def scale_tile(
    args,
    grad_address,
    start,
    length,
    G: tl.constexpr,
    TILE: tl.constexpr,
    CLAMP: tl.constexpr,
    V: tl.constexpr,
):
    """One tile; whether an element is inf or NaN."""
    offsets = tile_offsets(TILE)
    mask = mask_of(offsets, length, V)
    where = at(grad_address, start, offsets, G, V)
    raw = decode(load(where, mask), G)
    inv_scale, limit, clip_coef = scaling(args, raw.dtype)
    tl.store(where, encode(unscale(raw, inv_scale, limit, CLAMP) * clip_coef, G), mask=mask)
    return tl.sum(tl.sum((raw - raw != 0.0).to(tl.int32), axis=1), axis=0)


@triton.jit(do_not_specialize=["args", "chunks", "grads"])
def scale_pass(
    args: tl.int64,
    chunks: tl.int64,
    grads: tl.int64,
    G: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    CLAMP: tl.constexpr,
    V: tl.constexpr,
):
    """Gradients multiplied and clamped where they are; one program for each chunk."""
    out = field(args, ARGS_NONFINITE_OUT, tl.int64)
    inv_scale, _, clip_coef = scaling(args, tl.float64 if G == "float64" else tl.float32)
    tensor, number, numel = read_chunk(chunks, tl.program_id(0))
    grad = own_of(field(grads + tensor * 8, 0, tl.int64))
    nothing_to_do = (inv_scale == 1.0) & (clip_coef == 1.0) & (out == 0)
    if CLAMP:
        nothing_to_do = grad == 0
    if (grad != 0) & (nothing_to_do == 0):
        start = number * CHUNK
        length = length_of(numel, start, CHUNK)
        is_aligned = ((grad | length) & 15) == 0
        found = 0
        first = length * 0
        while first < length:
            here, rest = start + first, tl.minimum(length - first, TILE)
            if is_aligned:
                found += scale_tile(args, grad, here, rest, G, TILE, CLAMP, V)
            else:
                found += scale_tile(args, grad, here, rest, G, TILE, CLAMP, 1)
            first += TILE
        tl.store(out.to(tl.pointer_type(tl.float32)), 1.0, mask=(out != 0) & (found > 0))
