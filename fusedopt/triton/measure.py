"""The measure pass: the first phase of rules of two; ``csrc/cuda/measure.cuh`` in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .formats import decode_param, decode_state, extra_at, main_at
from .memory import field, load, tile_offsets
from .tables import (
    ARGS_SIZE,
    CHUNKS,
    EXTRA,
    GROUP,
    HYPER_SIZE,
    PARAM,
    STEP,
    TENSOR_SIZE,
    TICKET,
    decode_grad,
    length_of,
    load_grad,
    main_of,
    mask_of,
    norms_row,
    own_of,
    put,
    put_sums,
    read_chunk,
    unscale,
)
from .update import addresses_of, load_state, must_skip, prepare_program

__all__ = ["measure_pass"]


@triton.jit
def sum_of_squares(x, mask):
    """In double, in which the square of a float is exact."""
    x = tl.where(mask, x, 0.0).to(tl.float64)
    return tl.sum(tl.sum(x * x, axis=1), axis=0)


@triton.jit
def measure_tile(
    args,
    entry,
    hyper,
    own,
    main_grad,
    start,
    length,
    steps,
    inv_scale,
    limit,
    clip_coef,
    weight,
    c0,
    c1,
    c2,
    c3,
    c4,
    c5,
    c6,
    c7,
    c8,
    c9,
    RULE: tl.constexpr,
    N: tl.constexpr,
    SECOND: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
    CLAMP: tl.constexpr,
    V: tl.constexpr,
):
    """Sums of one tile. As in ``update_tile``, every load is issued before anything is computed."""
    offsets = tile_offsets(TILE)
    mask = mask_of(offsets, length, V)
    READS_MAIN: tl.constexpr = (P != "bfloat16+master") and (P != "float16+master")
    HAS_EXTRA: tl.constexpr = (P == "split16") or (P == "split8") or (not READS_MAIN)
    if READS_MAIN:
        main = load(main_at(field(entry, PARAM, tl.int64), start, offsets, P, V), mask)
    if HAS_EXTRA:
        extra = load(extra_at(field(entry, EXTRA, tl.int64), start, offsets, P, V), mask)
    if not READS_MAIN:
        main = extra
    if not HAS_EXTRA:
        extra = main
    grad, held = load_grad(own, main_grad, start, offsets, mask, G, M, V)
    if N > 0:
        _, state0, _, unit0 = load_state(entry, 0, start, offsets, mask, length, S, TILE, V)
    if N > 1:
        _, state1, _, unit1 = load_state(entry, 1, start, offsets, mask, length, S, TILE, V)
    if N > 2:  # no such rule yet
        _, state2, _, unit2 = load_state(entry, 2, start, offsets, mask, length, S, TILE, V)
    if N > 3:  # no such rule yet
        _, state3, _, unit3 = load_state(entry, 3, start, offsets, mask, length, S, TILE, V)

    x = decode_param(main, extra, P)
    g = unscale(decode_grad(grad, held, own, main_grad, weight, G, M), inv_scale, limit, CLAMP) * clip_coef
    if N > 0:
        s0 = decode_state(state0, unit0, S, SECOND & 1 != 0)
    if N > 1:
        s1 = decode_state(state1, unit1, S, SECOND & 2 != 0)
    if N > 2:  # no such rule yet
        s2 = decode_state(state2, unit2, S, SECOND & 4 != 0)
    if N > 3:  # no such rule yet
        s3 = decode_state(state3, unit3, S, SECOND & 8 != 0)
    if N == 0:  # no such rule yet
        first, second = RULE(x, g, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9)
    if N == 1:  # no such rule yet
        first, second = RULE(x, g, s0, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9)
    if N == 2:
        first, second = RULE(x, g, s0, s1, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9)
    if N == 3:  # no such rule yet
        first, second = RULE(x, g, s0, s1, s2, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9)
    if N == 4:  # no such rule yet
        first, second = RULE(x, g, s0, s1, s2, s3, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9)
    return sum_of_squares(first, mask), sum_of_squares(second, mask)


@triton.jit
def measure_chunk(
    args,
    entry,
    hyper,
    own,
    main_grad,
    start,
    length,
    steps,
    PREPARE: tl.constexpr,
    RULE: tl.constexpr,
    N: tl.constexpr,
    SECOND: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
    CLAMP: tl.constexpr,
    V: tl.constexpr,
):
    """Sums of a chunk, tile by tile."""
    sum0, sum1 = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    inv_scale, limit, clip_coef, weight, _, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 = prepare_program(
        args, entry, hyper, steps, PREPARE, PREPARE, 0, "float32", tl.float64 if P == "float64" else tl.float32
    )
    first = length * 0
    while first < length:
        # fmt: off
        part0, part1 = measure_tile(
            args, entry, hyper, own, main_grad, start + first, tl.minimum(length - first, TILE), steps,
            inv_scale, limit, clip_coef, weight, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9,
            RULE, N, SECOND, P, G, M, S, TILE, CLAMP, V,
        )
        # fmt: on
        sum0 += part0
        sum1 += part1
        first += TILE
    return sum0, sum1


@triton.jit
def add_rows(rows, number, NORMS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Of column K, in a fixed order."""
    sums = tl.zeros((BLOCK,), tl.float64)
    first = number * 0
    while first < number:
        index = first + tl.arange(0, BLOCK)
        where = (rows + (index.to(tl.int64) * NORMS + K) * 8).to(tl.pointer_type(tl.float64))
        # Past the first-level cache, which knows nothing of what other programs wrote.
        sums += tl.load(where, mask=index < number, other=0.0, cache_modifier=".cg")
        first += BLOCK
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["args", "tensors", "chunks", "grads"])
def measure_pass(
    args: tl.int64,
    tensors: tl.int64,
    chunks: tl.int64,
    grads: tl.int64,
    PREPARE: tl.constexpr,
    RULE: tl.constexpr,
    SCALE: tl.constexpr,
    NORMS: tl.constexpr,
    N: tl.constexpr,
    SECOND: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    CLAMP: tl.constexpr,
    V: tl.constexpr,
):
    """What the update will be of, without storing it: the sums of squares of each tensor; a program for each chunk.

    Constants: as ``update_pass``; RULE measures, with one term for each of the NORMS norms, always two returned. The
    last of a tensor's programs adds the sums of all.
    """
    tensor, number, numel = read_chunk(chunks, tl.program_id(0))
    word = field(grads + tensor * 8, 0, tl.int64)
    if (word == 0) & (number == 0):  # other processes may have a gradient
        zero = tl.full((), 0.0, tl.float64)
        put_sums(tensors + tensor * TENSOR_SIZE, zero, zero, NORMS)
    if (word != 0) & (must_skip(args) == 0):
        own, main_grad = own_of(word), main_of(tensors, tensor, word, M)
        entry = tensors + tensor * TENSOR_SIZE
        hyper = args + ARGS_SIZE + field(entry, GROUP, tl.int32).to(tl.int64) * HYPER_SIZE
        steps = tl.load(field(entry, STEP, tl.int64).to(tl.pointer_type(tl.float32)))
        start = number * CHUNK
        length = length_of(numel, start, CHUNK)
        # fmt: off
        if ((addresses_of(entry, own | main_grad, N) | length) & 15) == 0:
            sum0, sum1 = measure_chunk(
                args, entry, hyper, own, main_grad, start, length, steps,
                PREPARE, RULE, N, SECOND, P, G, M, S, TILE, CLAMP, V,
            )
        else:
            sum0, sum1 = measure_chunk(
                args, entry, hyper, own, main_grad, start, length, steps,
                PREPARE, RULE, N, SECOND, P, G, M, S, TILE, CLAMP, 1,
            )
        # fmt: on
        rows = norms_row(args, number, NORMS)
        row = rows + number * (8 * NORMS)
        put(row, 0, sum0, tl.float64)
        if NORMS > 1:
            put(row, 8, sum1, tl.float64)
        tl.debug_barrier()
        programs = field(entry, CHUNKS, tl.int32)
        ticket = (entry + TICKET).to(tl.pointer_type(tl.int32))
        if tl.atomic_add(ticket, 1) == programs - 1:
            tl.store(ticket, 0)
            total0 = add_rows(rows, programs, NORMS, 0, 1024)
            put_sums(entry, total0, add_rows(rows, programs, NORMS, NORMS - 1, 1024), NORMS)
