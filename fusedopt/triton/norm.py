"""The norm pass: sum, non-finite flag, and from them the clip coefficient; ``csrc/cuda/norm.cuh`` in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import field, tile_offsets
from .tables import (
    ARGS_CONTROL,
    ARGS_FIRST_PARTIAL,
    ARGS_MAX_NORM,
    ARGS_NUM_CHUNKS,
    ARGS_NUM_PARTIALS,
    ARGS_PARTIALS,
    ARGS_SKIP_NONFINITE,
    ARGS_TENSORS,
    CONTROL_CLIP_COEF,
    CONTROL_CLIP_COEF_F32,
    CONTROL_FOUND_INF,
    CONTROL_NONFINITE,
    CONTROL_SUM,
    CONTROL_TICKET,
    CONTROL_TOTAL_NORM,
    CONTROL_TOTAL_NORM_F32,
    L2,
    MAXIMUM,
    PARTIAL_NONFINITE,
    PARTIAL_SIZE,
    decode_grad,
    grad_weight,
    length_of,
    load_grad,
    main_of,
    mask_of,
    own_of,
    put,
    read_chunk,
    scaling,
    unscale,
)

__all__ = ["finalize_pass", "norm_pass"]


@triton.jit
def combine(a, b, TYPE: tl.constexpr):
    """Two partial results of a norm into one, double; NaN stays NaN."""
    if TYPE == MAXIMUM:
        return tl.where((b > a) | (b != b), b, a)
    else:
        return a + b


@triton.jit
def total(x, TYPE: tl.constexpr):
    """Of partial results of shape (rows, columns), not negative: their sum, rows first, or their maximum."""
    if TYPE == MAXIMUM:
        nans = tl.sum(tl.sum((x != x).to(tl.int32), axis=1), axis=0)
        largest = tl.max(tl.max(tl.where(x != x, 0.0, x), axis=1), axis=0).to(tl.float64)
        return tl.where(nans > 0, float("nan"), largest)
    else:
        return tl.sum(tl.sum(x, axis=1).to(tl.float64), axis=0)


@triton.jit
def power(x, TYPE: tl.constexpr):
    """|x|^p, or |x| for the maximum."""
    if TYPE == L2:
        return x * x
    else:
        return tl.abs(x)


@triton.jit
def norm_tile(
    args,
    own,
    main,
    start,
    length,
    G: tl.constexpr,
    M: tl.constexpr,
    TYPE: tl.constexpr,
    TILE: tl.constexpr,
    CLAMP: tl.constexpr,
    V: tl.constexpr,
):
    """A tile's part of the norm, double, and whether an element is inf or NaN, int32.

    Rows of 8 elements are added in float, everything else in double. A sum that has overflowed, or is so small that
    squares may have vanished, is done again in double: finite gradients never give an infinite norm.
    """
    offsets = tile_offsets(TILE)
    mask = mask_of(offsets, length, V)
    stored, stored_main = load_grad(own, main, start, offsets, mask, G, M, V)
    inv_scale, limit, _ = scaling(args, tl.float64 if G == "float64" else tl.float32)
    raw = decode_grad(stored, stored_main, own, main, grad_weight(args, inv_scale.dtype), G, M)
    nonfinite = 0
    if CLAMP or G == "float64":
        result = total(power(unscale(raw, inv_scale, limit, CLAMP).to(tl.float64), TYPE), TYPE)
        nonfinite = tl.sum(tl.sum((raw - raw != 0.0).to(tl.int32), axis=1), axis=0)
    else:
        result = total(power(raw * inv_scale, TYPE), TYPE)
        if (result > 1e-30) & (result < 1e38):
            nonfinite = 0
        else:
            result = total(power((raw * inv_scale).to(tl.float64), TYPE), TYPE)
            nonfinite = tl.sum(tl.sum((raw - raw != 0.0).to(tl.int32), axis=1), axis=0)
    return result, nonfinite


@triton.jit
def write_norm(args, control, sum, nonfinite, TYPE: tl.constexpr):
    """Total norm and clip coefficient, min(1, max_norm / (norm + 1e-6)), into ``Control``."""
    norm = sum
    if TYPE == L2:
        norm = tl.sqrt(sum)
    max_norm = field(args, ARGS_MAX_NORM, tl.float64)
    coef = max_norm / (norm + 1e-6)
    coef = tl.where(coef > 1.0, 1.0, coef)  # NaN stays NaN
    coef = tl.where(max_norm < float("inf"), coef, 1.0)
    put(control, CONTROL_TOTAL_NORM, norm, tl.float64)
    put(control, CONTROL_CLIP_COEF, coef, tl.float64)
    put(control, CONTROL_TOTAL_NORM_F32, norm, tl.float32)
    put(control, CONTROL_CLIP_COEF_F32, coef, tl.float32)
    found = (field(args, ARGS_SKIP_NONFINITE, tl.int32) != 0) & (nonfinite > 0.0)
    put(control, CONTROL_FOUND_INF, found, tl.float32)


@triton.jit
def add_partials(partials, number, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum, or maximum, and non-finite findings of the parts that stand at ``partials``, in a fixed order."""
    sums = tl.zeros((BLOCK,), tl.float64)
    nonfinite = tl.zeros((BLOCK,), tl.float64)
    first = number * 0
    while first < number:
        index = first + tl.arange(0, BLOCK)
        rows = partials + index.to(tl.int64) * PARTIAL_SIZE
        there = index < number
        # Past the first-level cache, which knows nothing of what other programs wrote.
        more = tl.load(rows.to(tl.pointer_type(tl.float64)), mask=there, other=0.0, cache_modifier=".cg")
        found = (rows + PARTIAL_NONFINITE).to(tl.pointer_type(tl.float64))
        sums = combine(sums, more, TYPE)
        nonfinite += tl.load(found, mask=there, other=0.0, cache_modifier=".cg")
        first += BLOCK
    return total(sums[:, None], TYPE), tl.sum(nonfinite, axis=0)


@triton.jit(do_not_specialize=["args", "chunks", "grads", "finalize"])
def norm_pass(
    args: tl.int64,
    chunks: tl.int64,
    grads: tl.int64,
    finalize: tl.int32,
    G: tl.constexpr,
    M: tl.constexpr,
    TYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    CLAMP: tl.constexpr,
    V: tl.constexpr,
):
    """Norm and non-finite flag, and from them the clip coefficient; programs walk the chunks with equal strides.

    The last program of a device's last launch adds the parts of all. finalize: 0 where other devices have shares too.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    sum = tl.full((), 0.0, tl.float64)
    nonfinite = 0
    c, num_chunks = program, field(args, ARGS_NUM_CHUNKS, tl.int32)
    while c < num_chunks:  # not "for … in range": the interpreter, with numpy >= 2.4, cannot count to a loaded number
        tensor, number, numel = read_chunk(chunks, c)
        word = field(grads + tensor * 8, 0, tl.int64)
        if word != 0:
            own, main = own_of(word), main_of(field(args, ARGS_TENSORS, tl.int64), tensor, word, M)
            start = number * CHUNK
            length = length_of(numel, start, CHUNK)
            is_aligned = ((own | main | length) & 15) == 0
            first = length * 0
            while first < length:
                here, rest = start + first, tl.minimum(length - first, TILE)
                if is_aligned:
                    part, found = norm_tile(args, own, main, here, rest, G, M, TYPE, TILE, CLAMP, V)
                else:
                    part, found = norm_tile(args, own, main, here, rest, G, M, TYPE, TILE, CLAMP, 1)
                sum = combine(sum, part, TYPE)
                nonfinite += found
                first += TILE
        c += programs
    partials = field(args, ARGS_PARTIALS, tl.int64)
    own = partials + (field(args, ARGS_FIRST_PARTIAL, tl.int32) + program).to(tl.int64) * PARTIAL_SIZE
    put(own, 0, sum, tl.float64)
    put(own, PARTIAL_NONFINITE, nonfinite > 0, tl.float64)
    tl.debug_barrier()
    number = field(args, ARGS_NUM_PARTIALS, tl.int32)
    if number > 0:
        control = field(args, ARGS_CONTROL, tl.int64)
        ticket = (control + CONTROL_TICKET).to(tl.pointer_type(tl.int32))
        if tl.atomic_add(ticket, 1) == programs - 1:
            tl.store(ticket, 0)
            sum_of_all, found_in_all = add_partials(partials, number, TYPE, 1024)
            put(control, CONTROL_SUM, sum_of_all, tl.float64)
            put(control, CONTROL_NONFINITE, found_in_all, tl.float64)
            if finalize != 0:
                write_norm(args, control, sum_of_all, found_in_all, TYPE)


@triton.jit(do_not_specialize=["args", "gathered", "number"])
def finalize_pass(args: tl.int64, gathered: tl.int64, number: tl.int32, TYPE: tl.constexpr):
    """The end of the norm from the shares of several devices, gathered as partials. One program."""
    sum, nonfinite = add_partials(gathered, number, TYPE, 32)
    write_norm(args, field(args, ARGS_CONTROL, tl.int64), sum, nonfinite, TYPE)
