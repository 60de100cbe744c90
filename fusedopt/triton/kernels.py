"""The passes, each a generic kernel over a table: a program for each chunk, or a few programs that walk all chunks.

Every kernel takes the address of the step table (``PassArgs``, hyper-parameter rows, gradient addresses), and those of
the tensor table and the chunk table. What a combination needs is compiled for it: rule, formats, chunk, norm type.
Integers that change from step to step are never specialised on. ``csrc/cuda/*.cuh`` do the same in C++.
"""

from __future__ import annotations

from ctypes import sizeof

import triton
import triton.language as tl

from ..structs import Chunk, Control, Hyper, NormOptions, Partial, PassArgs, Scaling, TensorEntry
from .formats import (
    at,
    decode,
    decode_param,
    decode_state,
    encode,
    encode_param,
    encode_state,
    extra_at,
    main_at,
    state_at,
)
from .memory import field, field_or, load, tile_offsets
from .noise import dither, dither_key, draw, draw_bits

__all__ = ["finalize_pass", "norm_pass", "scale_pass", "update_pass"]

# ---- where fields stand, in bytes -----------------------------------------------------------------------------

TENSOR_SIZE = tl.constexpr(sizeof(TensorEntry))
PARAM = tl.constexpr(TensorEntry.param.offset)
EXTRA = tl.constexpr(TensorEntry.extra.offset)
STATES = tl.constexpr(TensorEntry.states.offset)
SCALES = tl.constexpr(TensorEntry.scales.offset)
STEP = tl.constexpr(TensorEntry.step.offset)
GROUP = tl.constexpr(TensorEntry.group.offset)
ID = tl.constexpr(TensorEntry.id.offset)
CHUNKS = tl.constexpr(TensorEntry.chunks.offset)
TICKET = tl.constexpr(TensorEntry.ticket.offset)

CHUNK_SIZE = tl.constexpr(sizeof(Chunk))
CHUNK_TENSOR = tl.constexpr(Chunk.tensor.offset)
CHUNK_INDEX = tl.constexpr(Chunk.index.offset)
CHUNK_NUMEL = tl.constexpr(Chunk.numel.offset)

HYPER_SIZE = tl.constexpr(sizeof(Hyper))
HYPER_LR = tl.constexpr(Hyper.lr.offset)
HYPER_LR_IS_DOUBLE = tl.constexpr(Hyper.lr_is_double.offset)
HYPER_MAXIMIZE = tl.constexpr(Hyper.maximize.offset)

ARGS_SIZE = tl.constexpr(sizeof(PassArgs))
ARGS_CONTROL = tl.constexpr(PassArgs.control.offset)
ARGS_PARTIALS = tl.constexpr(PassArgs.partials.offset)
ARGS_GRAD_SCALE = tl.constexpr(PassArgs.scaling.offset + Scaling.grad_scale.offset)
ARGS_FOUND_INF = tl.constexpr(PassArgs.scaling.offset + Scaling.found_inf.offset)
ARGS_CLIP_COEF = tl.constexpr(PassArgs.scaling.offset + Scaling.clip_coef.offset)
ARGS_MAX_GRAD_VALUE = tl.constexpr(PassArgs.scaling.offset + Scaling.max_grad_value.offset)
ARGS_NORM_FOUND_INF = tl.constexpr(PassArgs.norm_found_inf.offset)
ARGS_NONFINITE_OUT = tl.constexpr(PassArgs.nonfinite_out.offset)
ARGS_MAX_NORM = tl.constexpr(PassArgs.norm.offset + NormOptions.max_norm.offset)
ARGS_SKIP_NONFINITE = tl.constexpr(PassArgs.norm.offset + NormOptions.skip_nonfinite.offset)
ARGS_SEED = tl.constexpr(PassArgs.seed.offset)
ARGS_NUM_CHUNKS = tl.constexpr(PassArgs.num_chunks.offset)
ARGS_LEAD = tl.constexpr(PassArgs.lead.offset)
ARGS_FIRST_PARTIAL = tl.constexpr(PassArgs.first_partial.offset)
ARGS_NUM_PARTIALS = tl.constexpr(PassArgs.num_partials.offset)

PARTIAL_SIZE = tl.constexpr(sizeof(Partial))
PARTIAL_NONFINITE = tl.constexpr(Partial.nonfinite.offset)

CONTROL_SUM = tl.constexpr(Control.sum.offset)
CONTROL_NONFINITE = tl.constexpr(Control.nonfinite.offset)
CONTROL_TOTAL_NORM = tl.constexpr(Control.total_norm.offset)
CONTROL_CLIP_COEF = tl.constexpr(Control.clip_coef.offset)
CONTROL_TOTAL_NORM_F32 = tl.constexpr(Control.total_norm_f32.offset)
CONTROL_CLIP_COEF_F32 = tl.constexpr(Control.clip_coef_f32.offset)
CONTROL_FOUND_INF = tl.constexpr(Control.found_inf.offset)
CONTROL_SKIPPED = tl.constexpr(Control.skipped.offset)
CONTROL_SKIPPED_STEPS = tl.constexpr(Control.skipped_steps.offset)
CONTROL_TICKET = tl.constexpr(Control.ticket.offset)

L2, MAXIMUM = tl.constexpr(0), tl.constexpr(2)  # of NormType


@triton.jit
def put(address, OFFSET: tl.constexpr, value, TYPE: tl.constexpr):
    """Stores ``value`` at ``address + OFFSET`` bytes."""
    tl.store((address + OFFSET).to(tl.pointer_type(TYPE)), value.to(TYPE))


# ---- chunks ---------------------------------------------------------------------------------------------------


@triton.jit
def read_chunk(chunks, index):
    """Tensor, first element's chunk number in it, and elements of the tensor."""
    row = chunks + index.to(tl.int64) * CHUNK_SIZE
    tensor = field(row, CHUNK_TENSOR, tl.int32).to(tl.int64)
    number = field(row, CHUNK_INDEX, tl.uint32).to(tl.int64)
    return tensor, number, field(row, CHUNK_NUMEL, tl.int64)


@triton.jit
def length_of(numel, start, CHUNK: tl.constexpr):
    """How many elements the chunk from ``start`` on has, int32."""
    return tl.minimum(numel - start, CHUNK).to(tl.int32)


@triton.jit
def mask_of(offsets, length, VECTOR: tl.constexpr):
    """Which elements exist. Where all accesses are whole vectors, so is the mask, and the compiler must see it."""
    if VECTOR > 1:
        length = (length // 16) * 16  # it is a multiple
    return offsets < length


# ---- gradients ------------------------------------------------------------------------------------------------


@triton.jit
def grad_at(address, start, offsets, GRAD: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to gradient elements. With ``decode_grad`` the only way by which passes come by a gradient."""
    return at(address, start, offsets, GRAD, VECTOR)


@triton.jit
def decode_grad(x, GRAD: tl.constexpr):
    """The gradient as it was handed over, in its compute type."""
    return decode(x, GRAD)


@triton.jit
def scaling(args, TYPE: tl.constexpr):
    """1 / grad_scale, limit of an element, clip coefficient: rounded once to the compute type."""
    grad_scale = field_or(field(args, ARGS_GRAD_SCALE, tl.int64), tl.float32, 1.0).to(tl.float64)
    clip_coef = field_or(field(args, ARGS_CLIP_COEF, tl.int64), tl.float64, 1.0)
    limit = field(args, ARGS_MAX_GRAD_VALUE, tl.float64)
    return (1.0 / grad_scale).to(TYPE), limit.to(TYPE), clip_coef.to(TYPE)


@triton.jit
def unscale(grad, inv_scale, limit, CLAMP: tl.constexpr):
    """Unscaled, then clamped; by comparison, so that NaN stays NaN."""
    grad = grad * inv_scale
    if CLAMP:
        grad = tl.where(grad > limit, limit, tl.where(grad < -limit, -limit, grad))
    return grad


# ---- update ---------------------------------------------------------------------------------------------------


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
def update_tile(
    args,
    entry,
    hyper,
    grad_address,
    start,
    length,
    steps,
    skip,
    RULE: tl.constexpr,
    N: tl.constexpr,
    SECOND: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    CHUNK: tl.constexpr,
    CLAMP: tl.constexpr,
    V: tl.constexpr,
):
    """One chunk. Every load is issued before anything is computed. The names are those of ``update_pass``."""
    offsets = tile_offsets(CHUNK)
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
    grad = load(grad_at(grad_address, start, offsets, G, V), mask)
    if N > 0:
        where0, state0, units0, unit0 = load_state(entry, 0, start, offsets, mask, length, S, CHUNK, V)
    if N > 1:
        where1, state1, units1, unit1 = load_state(entry, 1, start, offsets, mask, length, S, CHUNK, V)
    if N > 2:
        where2, state2, units2, unit2 = load_state(entry, 2, start, offsets, mask, length, S, CHUNK, V)
    if N > 3:
        where3, state3, units3, unit3 = load_state(entry, 3, start, offsets, mask, length, S, CHUNK, V)

    if skip == 0:
        x = decode_param(main, extra, P)
        inv_scale, limit, clip_coef = scaling(args, x.dtype)
        clip_coef = tl.where(field(hyper, HYPER_MAXIMIZE, tl.uint32) != 0, -clip_coef, clip_coef)
        g = unscale(decode_grad(grad, G), inv_scale, limit, CLAMP) * clip_coef

        lr, step = read_lr(hyper), steps.to(tl.float64) + 1.0
        values = hyper.to(tl.pointer_type(tl.float64))
        if N == 0:
            x = RULE(x, g, values, lr, step)
        if N > 0:
            s0 = decode_state(state0, unit0, S, SECOND & 1 != 0)
        if N > 1:
            s1 = decode_state(state1, unit1, S, SECOND & 2 != 0)
        if N > 2:
            s2 = decode_state(state2, unit2, S, SECOND & 4 != 0)
        if N > 3:
            s3 = decode_state(state3, unit3, S, SECOND & 8 != 0)
        if N == 1:
            x, s0 = RULE(x, g, s0, values, lr, step)
        if N == 2:
            x, s0, s1 = RULE(x, g, s0, s1, values, lr, step)
        if N == 3:
            x, s0, s1, s2 = RULE(x, g, s0, s1, s2, values, lr, step)
        if N == 4:
            x, s0, s1, s2, s3 = RULE(x, g, s0, s1, s2, s3, values, lr, step)

        w0, w1, w2, w3, bits, noise = 0, 0, 0, 0, 0, 0
        tensor, number = field(entry, ID, tl.uint32), step.to(tl.int32).to(tl.uint32)
        if RANDOM:
            w0, w1, w2, w3 = draw(field(args, ARGS_SEED, tl.int64), tensor, number, start, CHUNK)
            bits = draw_bits(w0, w1, w2, w3, 0)
        if S == "int8":
            noise = dither(dither_key(field(args, ARGS_SEED, tl.int64), tensor), number, start, CHUNK)

        new_main, new_extra = encode_param(x, bits, P)
        tl.store(main_where, new_main, mask=mask)
        if HAS_EXTRA:
            tl.store(extra_where, new_extra, mask=mask)
        if N > 0:
            stored, unit = encode_state(s0, mask, w0, w1, w2, w3, noise, S, 0, SECOND & 1 != 0)
            store_state(where0, stored, units0, unit, mask, length, S, CHUNK)
        if N > 1:
            stored, unit = encode_state(s1, mask, w0, w1, w2, w3, noise, S, 1, SECOND & 2 != 0)
            store_state(where1, stored, units1, unit, mask, length, S, CHUNK)
        if N > 2:
            stored, unit = encode_state(s2, mask, w0, w1, w2, w3, noise, S, 2, SECOND & 4 != 0)
            store_state(where2, stored, units2, unit, mask, length, S, CHUNK)
        if N > 3:
            stored, unit = encode_state(s3, mask, w0, w1, w2, w3, noise, S, 3, SECOND & 8 != 0)
            store_state(where3, stored, units3, unit, mask, length, S, CHUNK)


@triton.jit
def addresses_of(entry, grad, N: tl.constexpr):
    """All addresses of a tensor's streams, or-ed: its lower bits say whether all of them are aligned."""
    together = grad | field(entry, PARAM, tl.int64) | field(entry, EXTRA, tl.int64)
    for k in tl.static_range(N):
        together = together | field(entry, STATES + 8 * k, tl.int64)
    return together


@triton.jit(do_not_specialize=["args", "tensors", "chunks", "grads"])
def update_pass(
    args: tl.int64,
    tensors: tl.int64,
    chunks: tl.int64,
    grads: tl.int64,
    RULE: tl.constexpr,
    N: tl.constexpr,
    SECOND: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    CHUNK: tl.constexpr,
    CLAMP: tl.constexpr,
    V: tl.constexpr,
):
    """Load, transform the gradient, apply the rule, store; one program for each chunk.

    RULE: of ``rules.py``, with N states; bit k of SECOND: state k is a second moment. P, G, S: parameter format,
    gradient dtype, state format. CLAMP: whether there is a max_grad_value. V: elements of one access.
    """
    skip = must_skip(args)
    if tl.program_id(0) == 0:
        record(args, skip)
    tensor, number, numel = read_chunk(chunks, tl.program_id(0))
    grad = field(grads + tensor * 8, 0, tl.int64)
    if grad != 0:
        entry = tensors + tensor * TENSOR_SIZE
        hyper = args + ARGS_SIZE + field(entry, GROUP, tl.int32).to(tl.int64) * HYPER_SIZE
        steps = tl.load(field(entry, STEP, tl.int64).to(tl.pointer_type(tl.float32)), volatile=True)
        start = number * CHUNK
        length = length_of(numel, start, CHUNK)
        if ((addresses_of(entry, grad, N) | length) & 15) == 0:
            update_tile(args, entry, hyper, grad, start, length, steps, skip, RULE, N, SECOND, P, G, S, CHUNK, CLAMP, V)
        else:
            update_tile(args, entry, hyper, grad, start, length, steps, skip, RULE, N, SECOND, P, G, S, CHUNK, CLAMP, 1)
        count_step(entry, steps, skip)


# ---- norm -----------------------------------------------------------------------------------------------------


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
    grad_address,
    start,
    length,
    G: tl.constexpr,
    TYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    CLAMP: tl.constexpr,
    V: tl.constexpr,
):
    """A chunk's part of the norm, double, and whether an element is inf or NaN, int32.

    Rows of 8 elements are added in float, everything else in double. A sum that has overflowed, or is so small that
    squares may have vanished, is done again in double: finite gradients never give an infinite norm.
    """
    offsets = tile_offsets(CHUNK)
    mask = mask_of(offsets, length, V)
    raw = decode_grad(load(grad_at(grad_address, start, offsets, G, V), mask), G)
    inv_scale, limit, _ = scaling(args, raw.dtype)
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
    TYPE: tl.constexpr,
    CHUNK: tl.constexpr,
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
        grad = field(grads + tensor * 8, 0, tl.int64)
        if grad != 0:
            start = number * CHUNK
            length = length_of(numel, start, CHUNK)
            if ((grad | length) & 15) == 0:
                part, found = norm_tile(args, grad, start, length, G, TYPE, CHUNK, CLAMP, V)
            else:
                part, found = norm_tile(args, grad, start, length, G, TYPE, CHUNK, CLAMP, 1)
            sum = combine(sum, part, TYPE)
            nonfinite += found
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


# ---- scale ----------------------------------------------------------------------------------------------------


@triton.jit
def scale_tile(
    args,
    grad_address,
    start,
    length,
    G: tl.constexpr,
    CHUNK: tl.constexpr,
    CLAMP: tl.constexpr,
    V: tl.constexpr,
):
    """One chunk; whether an element is inf or NaN."""
    offsets = tile_offsets(CHUNK)
    mask = mask_of(offsets, length, V)
    where = grad_at(grad_address, start, offsets, G, V)
    raw = decode_grad(load(where, mask), G)
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
    CLAMP: tl.constexpr,
    V: tl.constexpr,
):
    """Gradients multiplied and clamped where they are; one program for each chunk."""
    out = field(args, ARGS_NONFINITE_OUT, tl.int64)
    inv_scale, _, clip_coef = scaling(args, tl.float64 if G == "float64" else tl.float32)
    tensor, number, numel = read_chunk(chunks, tl.program_id(0))
    grad = field(grads + tensor * 8, 0, tl.int64)
    nothing_to_do = (inv_scale == 1.0) & (clip_coef == 1.0) & (out == 0)
    if CLAMP:
        nothing_to_do = grad == 0
    if (grad != 0) & (nothing_to_do == 0):
        start = number * CHUNK
        length = length_of(numel, start, CHUNK)
        if ((grad | length) & 15) == 0:
            found = scale_tile(args, grad, start, length, G, CHUNK, CLAMP, V)
        else:
            found = scale_tile(args, grad, start, length, G, CHUNK, CLAMP, 1)
        tl.store(out.to(tl.pointer_type(tl.float32)), 1.0, mask=(out != 0) & (found > 0))
