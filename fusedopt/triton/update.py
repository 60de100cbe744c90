"""The update pass: load, transform the gradient, apply the rule, store; ``csrc/cuda/update.cuh`` in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .formats import decode_param, decode_state, encode_param, encode_state, extra_at, main_at, state_at
from .memory import field, field_or, load, tile_offsets
from .noise import dither, dither_key, draw, draw_bits
from .tables import (
    ARGS_CONTROL,
    ARGS_FOUND_INF,
    ARGS_LEAD,
    ARGS_NORM_FOUND_INF,
    ARGS_SEED,
    ARGS_SIZE,
    CHUNKS,
    CONTROL_SKIPPED,
    CONTROL_SKIPPED_STEPS,
    EXTRA,
    GROUP,
    HYPER_LR,
    HYPER_LR_IS_DOUBLE,
    HYPER_MAXIMIZE,
    HYPER_SIZE,
    ID,
    PARAM,
    SCALES,
    STATES,
    STEP,
    TENSOR_SIZE,
    TICKET,
    decode_grad,
    grad_weight,
    length_of,
    load_grad,
    main_of,
    mask_of,
    own_of,
    put,
    read_chunk,
    read_norm,
    scaling,
    tiles_of,
    unscale,
)

__all__ = ["update_pass"]


@triton.jit
def must_skip(args):
    """Whether the step is to change nothing: the scaler's verdict or the norm pass's own."""
    asked = field_or(field(args, ARGS_FOUND_INF, tl.int64), tl.float32, 0.0)
    found = field_or(field(args, ARGS_NORM_FOUND_INF, tl.int64), tl.float32, 0.0)
    return (asked != 0.0) | (found != 0.0)


@triton.jit
def record(args, skip):
    """Whether the step was skipped, into ``Control``; by one program of a step."""
    control = field(args, ARGS_CONTROL, tl.int64)
    if (field(args, ARGS_LEAD, tl.int32) != 0) & (control != 0):
        put(control, CONTROL_SKIPPED, skip, tl.float32)
        steps = field(control, CONTROL_SKIPPED_STEPS, tl.int64)
        put(control, CONTROL_SKIPPED_STEPS, steps + skip.to(tl.int64), tl.int64)


@triton.jit
def count_step(entry, steps, skip):
    """A tensor's step is counted by the last of its programs to have read it."""
    tl.debug_barrier()  # every thread of this one has
    chunks = field(entry, CHUNKS, tl.int32)
    last = chunks == 1
    if chunks > 1:
        ticket = (entry + TICKET).to(tl.pointer_type(tl.int32))
        last = tl.atomic_add(ticket, 1) == chunks - 1
        if last:
            tl.store(ticket, 0)
    if last & (skip == 0):
        put(field(entry, STEP, tl.int64), 0, steps + 1.0, tl.float32)


@triton.jit
def read_lr(hyper):
    """The learning rate, a double: from where the row says that it lives, or else from the row."""
    lr = field(hyper, HYPER_LR, tl.int64)
    is_double = field(hyper, HYPER_LR_IS_DOUBLE, tl.uint32) != 0
    as_double = tl.load(lr.to(tl.pointer_type(tl.float64)), mask=(lr != 0) & is_double, other=0.0)
    as_float = tl.load(lr.to(tl.pointer_type(tl.float32)), mask=(lr != 0) & (is_double == 0), other=0.0)
    there = tl.where(is_double, as_double, as_float.to(tl.float64))
    return tl.where(lr != 0, there, field(hyper, 0, tl.float64))


@triton.jit
def load_state(
    entry, K: tl.constexpr, start, offsets, mask, length, STATE: tl.constexpr, CHUNK: tl.constexpr, V: tl.constexpr
):
    """State number K: where it stands, its elements as stored, where its units stand, and they (of blocked formats)."""
    where = state_at(field(entry, STATES + 8 * K, tl.int64), start, offsets, STATE, V)
    stored = load(where, mask)
    if STATE == "int8":
        units = field(entry, SCALES + 8 * K, tl.int64).to(tl.pointer_type(tl.float32)) + start // 256
        units_where = units + tl.arange(0, CHUNK // 256)
        return where, stored, units_where, load(units_where, tl.arange(0, CHUNK // 256) * 256 < length)
    else:
        return where, stored, where, 0.0


@triton.jit
def store_state(where, stored, units_where, unit, mask, length, STATE: tl.constexpr, CHUNK: tl.constexpr):
    """What ``encode_state`` made of a state."""
    tl.store(where, stored, mask=mask)
    if STATE == "int8":
        tl.store(units_where, unit, mask=tl.arange(0, CHUNK // 256) * 256 < length)


@triton.jit
def prepare_program(
    args,
    entry,
    hyper,
    steps,
    PREPARE: tl.constexpr,
    SCALE: tl.constexpr,
    NORMS: tl.constexpr,
    S: tl.constexpr,
    TYPE: tl.constexpr,
):
    """What all elements of a program share: scaling of gradients, dither key, the rule's coefficients."""
    inv_scale, limit, clip_coef = scaling(args, TYPE)
    clip_coef = tl.where(field(hyper, HYPER_MAXIMIZE, tl.uint32) != 0, -clip_coef, clip_coef)
    weight = grad_weight(args, TYPE)
    key = field(entry, ID, tl.uint32)
    if S == "int8":
        key = dither_key(field(args, ARGS_SEED, tl.int64), key)
    values, step = hyper.to(tl.pointer_type(tl.float64)), steps.to(tl.float64) + 1.0
    lr = read_lr(hyper)
    c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 = PREPARE(values, lr, step, TYPE)
    if NORMS > 0:
        c9 = SCALE(values, lr, read_norm(entry, 0), read_norm(entry, NORMS - 1)).to(TYPE)
    return inv_scale, limit, clip_coef, weight, key, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9


@triton.jit
def update_tile(
    args,
    entry,
    hyper,
    own,
    main_grad,
    start,
    length,
    steps,
    skip,
    inv_scale,
    limit,
    clip_coef,
    weight,
    key,
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
    """One tile. Every load is issued before anything is computed. The names are those of ``update_pass``."""
    offsets = tile_offsets(TILE)
    mask = mask_of(offsets, length, V)
    READS_MAIN: tl.constexpr = (P != "bfloat16+master") and (P != "float16+master")
    IS_SPLIT: tl.constexpr = (P == "split16") or (P == "split8")
    HAS_EXTRA: tl.constexpr = IS_SPLIT or (not READS_MAIN)
    RANDOM: tl.constexpr = P == "bfloat16+stochastic" or S == "bfloat16+stochastic"

    main_where = main_at(field(entry, PARAM, tl.int64), start, offsets, P, V)
    if READS_MAIN:
        main = load(main_where, mask)
    if HAS_EXTRA:
        extra_where = extra_at(field(entry, EXTRA, tl.int64), start, offsets, P, V)
        extra = load(extra_where, mask)
    if not READS_MAIN:
        main = extra
    if not HAS_EXTRA:
        extra = main
    grad, held = load_grad(own, main_grad, start, offsets, mask, G, M, V)
    if N > 0:
        where0, state0, units0, unit0 = load_state(entry, 0, start, offsets, mask, length, S, TILE, V)
    if N > 1:
        where1, state1, units1, unit1 = load_state(entry, 1, start, offsets, mask, length, S, TILE, V)
    if N > 2:
        where2, state2, units2, unit2 = load_state(entry, 2, start, offsets, mask, length, S, TILE, V)
    if N > 3:  # no such rule yet
        where3, state3, units3, unit3 = load_state(entry, 3, start, offsets, mask, length, S, TILE, V)

    if skip == 0:
        x = decode_param(main, extra, P)
        g = decode_grad(grad, held, own, main_grad, weight, G, M)
        g = unscale(g, inv_scale, limit, CLAMP) * clip_coef
        if N == 0:
            x = RULE(x, g, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9)
        if N > 0:
            s0 = decode_state(state0, unit0, S, SECOND & 1 != 0)
        if N > 1:
            s1 = decode_state(state1, unit1, S, SECOND & 2 != 0)
        if N > 2:
            s2 = decode_state(state2, unit2, S, SECOND & 4 != 0)
        if N > 3:  # no such rule yet
            s3 = decode_state(state3, unit3, S, SECOND & 8 != 0)
        if N == 1:
            x, s0 = RULE(x, g, s0, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9)
        if N == 2:
            x, s0, s1 = RULE(x, g, s0, s1, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9)
        if N == 3:
            x, s0, s1, s2 = RULE(x, g, s0, s1, s2, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9)
        if N == 4:  # no such rule yet
            x, s0, s1, s2, s3 = RULE(x, g, s0, s1, s2, s3, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9)

        w0, w1, w2, w3, bits, noise = 0, 0, 0, 0, 0, 0
        number = (steps + 1.0).to(tl.int32).to(tl.uint32)
        if RANDOM:
            tensor = field(entry, ID, tl.uint32)
            w0, w1, w2, w3 = draw(field(args, ARGS_SEED, tl.int64), tensor, number, start, TILE)
            bits = draw_bits(w0, w1, w2, w3, 0)
        if S == "int8":
            noise = dither(key, number, start, TILE)

        new_main, new_extra = encode_param(x, bits, P)
        tl.store(main_where, new_main, mask=mask)
        if HAS_EXTRA:
            tl.store(extra_where, new_extra, mask=mask)
        if N > 0:
            stored, unit = encode_state(s0, mask, w0, w1, w2, w3, noise, S, 0, SECOND & 1 != 0)
            store_state(where0, stored, units0, unit, mask, length, S, TILE)
        if N > 1:
            stored, unit = encode_state(s1, mask, w0, w1, w2, w3, noise, S, 1, SECOND & 2 != 0)
            store_state(where1, stored, units1, unit, mask, length, S, TILE)
        if N > 2:
            stored, unit = encode_state(s2, mask, w0, w1, w2, w3, noise, S, 2, SECOND & 4 != 0)
            store_state(where2, stored, units2, unit, mask, length, S, TILE)
        if N > 3:  # no such rule yet
            stored, unit = encode_state(s3, mask, w0, w1, w2, w3, noise, S, 3, SECOND & 8 != 0)
            store_state(where3, stored, units3, unit, mask, length, S, TILE)


@triton.jit
def update_chunk(
    args,
    entry,
    hyper,
    own,
    main_grad,
    start,
    stride,
    length,
    steps,
    skip,
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
    TILE: tl.constexpr,
    CLAMP: tl.constexpr,
    V: tl.constexpr,
):
    """A chunk, tile by tile; the next one is ``stride`` elements behind."""
    inv_scale, limit, clip_coef, weight, key, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 = prepare_program(
        args, entry, hyper, steps, PREPARE, SCALE, NORMS, S, tl.float64 if P == "float64" else tl.float32
    )
    first = length * 0
    while first < length:
        # fmt: off
        update_tile(
            args, entry, hyper, own, main_grad, start, tl.minimum(length - first, TILE), steps, skip,
            inv_scale, limit, clip_coef, weight, key, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9,
            RULE, N, SECOND, P, G, M, S, TILE, CLAMP, V,
        )
        # fmt: on
        start += stride
        first += TILE


@triton.jit
def addresses_of(entry, grads, N: tl.constexpr):
    """All addresses of a tensor's streams, or-ed: its lower bits say whether all of them are aligned."""
    together = grads | field(entry, PARAM, tl.int64) | field(entry, EXTRA, tl.int64)
    for k in tl.static_range(N):
        together = together | field(entry, STATES + 8 * k, tl.int64)
    return together


@triton.jit(do_not_specialize=["args", "tensors", "chunks", "grads"])
def update_pass(
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
    """Load, transform the gradient, apply the rule, store; one program for each chunk.

    PREPARE, RULE: of ``rules.py``, with N states; bit k of SECOND: state k is a second moment. SCALE: of a rule of two
    phases, of NORMS norms. P, G, M, S: parameter format, dtypes of gradients and main gradients, state format. TILE:
    elements that are loaded at once. CLAMP: whether there is a max_grad_value. V: elements of one access.
    """
    skip = must_skip(args)
    if tl.program_id(0) == 0:
        record(args, skip)
    tensor, number, numel = read_chunk(chunks, tl.program_id(0))
    word = field(grads + tensor * 8, 0, tl.int64)
    if word != 0:
        own, main_grad = own_of(word), main_of(tensors, tensor, word, M)
        entry = tensors + tensor * TENSOR_SIZE
        hyper = args + ARGS_SIZE + field(entry, GROUP, tl.int32).to(tl.int64) * HYPER_SIZE
        steps = tl.load(field(entry, STEP, tl.int64).to(tl.pointer_type(tl.float32)), volatile=True)
        length = length_of(numel, number * CHUNK, CHUNK)
        start, stride = number * CHUNK, number * 0 + TILE
        if S != "int8":  # chunks of many tiles gain nothing from sharing them out
            start, stride = tiles_of(number, numel, length, CHUNK, TILE)
        # fmt: off
        if ((addresses_of(entry, own | main_grad, N) | length) & 15) == 0:
            update_chunk(
                args, entry, hyper, own, main_grad, start, stride, length, steps, skip,
                PREPARE, RULE, SCALE, NORMS, N, SECOND, P, G, M, S, TILE, CLAMP, V,
            )
        else:
            update_chunk(
                args, entry, hyper, own, main_grad, start, stride, length, steps, skip,
                PREPARE, RULE, SCALE, NORMS, N, SECOND, P, G, M, S, TILE, CLAMP, 1,
            )
        # fmt: on
        count_step(entry, steps, skip)
