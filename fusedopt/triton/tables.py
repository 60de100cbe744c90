"""The tables as the kernels read them: where fields of structs stand, chunks, gradients and their scaling."""

from __future__ import annotations

from ctypes import sizeof

import triton
import triton.language as tl

from ..structs import Chunk, Control, Hyper, NormOptions, Partial, PassArgs, Scaling, TensorEntry
from .formats import at, decode
from .memory import field, field_or, load
from .target import mask_if

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
MAIN_GRAD = tl.constexpr(TensorEntry.main_grad.offset)
NORMS_AT = tl.constexpr(TensorEntry.norms.offset)

CHUNK_SIZE = tl.constexpr(sizeof(Chunk))
CHUNK_TENSOR = tl.constexpr(Chunk.tensor.offset)
CHUNK_INDEX = tl.constexpr(Chunk.index.offset)
CHUNK_NUMEL = tl.constexpr(Chunk.numel.offset)

HYPER_SIZE = tl.constexpr(sizeof(Hyper))
HYPER_LR = tl.constexpr(Hyper.lr.offset)
HYPER_LR_IS_DOUBLE = tl.constexpr(Hyper.lr_is_double.offset)
HYPER_MAXIMIZE = tl.constexpr(Hyper.maximize.offset)

ARGS_SIZE = tl.constexpr(sizeof(PassArgs))
ARGS_TENSORS = tl.constexpr(PassArgs.tensors.offset)
ARGS_CONTROL = tl.constexpr(PassArgs.control.offset)
ARGS_NORMS = tl.constexpr(PassArgs.norms.offset)
ARGS_PARTIALS = tl.constexpr(PassArgs.partials.offset)
ARGS_GRAD_SCALE = tl.constexpr(PassArgs.scaling.offset + Scaling.grad_scale.offset)
ARGS_FOUND_INF = tl.constexpr(PassArgs.scaling.offset + Scaling.found_inf.offset)
ARGS_CLIP_COEF = tl.constexpr(PassArgs.scaling.offset + Scaling.clip_coef.offset)
ARGS_MAX_GRAD_VALUE = tl.constexpr(PassArgs.scaling.offset + Scaling.max_grad_value.offset)
ARGS_GRAD_WEIGHT = tl.constexpr(PassArgs.scaling.offset + Scaling.grad_weight.offset)
ARGS_GRAD_DIVISOR = tl.constexpr(PassArgs.scaling.offset + Scaling.grad_divisor.offset)
ARGS_GRAD_WEIGHT_AT = tl.constexpr(PassArgs.scaling.offset + Scaling.grad_weight_at.offset)
ARGS_GRAD_DIVISOR_AT = tl.constexpr(PassArgs.scaling.offset + Scaling.grad_divisor_at.offset)
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

TOGETHER = tl.constexpr(128)
"""How many full chunks share out their tiles: ``kTogether`` of ``csrc/cuda/vectors.cuh``."""


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
def tiles_of(number, numel, length, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Where the first tile of a chunk begins, and how far it is from there to the next one.

    Tiles of neighbouring full chunks lie in turn: what programs work on at the same time then lies side by side.
    """
    start, stride = number * CHUNK, number * 0 + TILE
    if length == CHUNK:
        neighbours = number // TOGETHER * TOGETHER
        start = neighbours * CHUNK + (number - neighbours) * TILE
        stride = tl.minimum(TOGETHER, numel // CHUNK - neighbours) * TILE
    return start, stride


@triton.jit
def mask_of(offsets, length, VECTOR: tl.constexpr):
    """Which elements exist. Where all accesses are whole vectors, so is the mask, and the compiler must see it."""
    if VECTOR > 1:
        length = (length // 16) * 16  # it is a multiple
    return offsets < length


# ---- norms ----------------------------------------------------------------------------------------------------


@triton.jit
def norms_row(args, number, NORMS: tl.constexpr):
    """Where a tensor's sums stand, a row for each chunk; this program's is ``number``. Of rules of two phases."""
    return field(args, ARGS_NORMS, tl.int64) + (tl.program_id(0).to(tl.int64) - number) * (8 * NORMS)


@triton.jit
def read_norm(entry, K: tl.constexpr):
    """Norm number K of a tensor, between the phases of its rule."""
    return tl.sqrt(field(field(entry, NORMS_AT, tl.int64), 8 * K, tl.float64))


@triton.jit
def put_sums(entry, sum0, sum1, NORMS: tl.constexpr):
    """What ``read_norm`` takes the roots of."""
    where = field(entry, NORMS_AT, tl.int64)
    put(where, 0, sum0, tl.float64)
    if NORMS > 1:
        put(where, 8, sum1, tl.float64)


# ---- gradients ------------------------------------------------------------------------------------------------


# A tensor's gradient in one step travels as a word: the address of this step's own (0: none) and, in its lowest bit,
# whether the main gradient holds anything of earlier micro-batches. G and M are the dtypes of the two, M "none" where
# nobody accumulates. These functions are the only way by which passes come by a gradient.


@triton.jit
def own_of(word):
    """Address of this step's own gradient; 0: none."""
    return word & -2


@triton.jit
def main_of(tensors, tensor, word, M: tl.constexpr):
    """Address of the main gradient; 0 where it holds nothing."""
    if M == "none":
        return word * 0
    else:
        address = field(tensors + tensor * TENSOR_SIZE, MAIN_GRAD, tl.int64)
        return tl.where((word & 1) != 0, address, 0)


@triton.jit
def load_grad(own, main, start, offsets, mask, G: tl.constexpr, M: tl.constexpr, VECTOR: tl.constexpr):
    """Elements of both streams as they are stored; those of one whose address is 0 are not read."""
    if M == "none":
        raw = load(at(own, start, offsets, G, VECTOR), mask)
        return raw, raw
    else:
        raw = load(at(own, start, offsets, G, VECTOR), mask_if(mask, own != 0))
        return raw, load(at(main, start, offsets, M, VECTOR), mask_if(mask, main != 0))


@triton.jit
def decode_grad(raw, raw_main, own, main, weight, G: tl.constexpr, M: tl.constexpr):
    """The gradient before it is divided by anything, in its compute type: main + weight * own."""
    grad = decode(raw, G)
    if M == "none":
        return grad
    else:
        weighted = weight * grad
        held = decode(raw_main, M)
        return tl.where(main != 0, tl.where(own != 0, held + weighted, held), weighted)


@triton.jit
def grad_weight(args, TYPE: tl.constexpr):
    """Of this step's own gradient beside the main gradient, rounded once to the compute type."""
    address = field(args, ARGS_GRAD_WEIGHT_AT, tl.int64)
    there = field_or(address, tl.float32, 1.0).to(tl.float64)
    return tl.where(address != 0, there, field(args, ARGS_GRAD_WEIGHT, tl.float64)).to(TYPE)


@triton.jit
def grad_divisor(args):
    """Of the sum of both, a double."""
    address = field(args, ARGS_GRAD_DIVISOR_AT, tl.int64)
    there = field_or(address, tl.float32, 1.0).to(tl.float64)
    return tl.where(address != 0, there, field(args, ARGS_GRAD_DIVISOR, tl.float64))


@triton.jit
def scaling(args, TYPE: tl.constexpr):
    """1 / (grad_scale * grad_divisor), limit of an element, clip coefficient: rounded once to the compute type."""
    divisor = field_or(field(args, ARGS_GRAD_SCALE, tl.int64), tl.float32, 1.0).to(tl.float64) * grad_divisor(args)
    clip_coef = field_or(field(args, ARGS_CLIP_COEF, tl.int64), tl.float64, 1.0)
    limit = field(args, ARGS_MAX_GRAD_VALUE, tl.float64)
    return (1.0 / divisor).to(TYPE), limit.to(TYPE), clip_coef.to(TYPE)


@triton.jit
def unscale(grad, inv_scale, limit, CLAMP: tl.constexpr):
    """Unscaled, then clamped; by comparison, so that NaN stays NaN."""
    grad = grad * inv_scale
    if CLAMP:
        grad = tl.where(grad > limit, limit, tl.where(grad < -limit, -limit, grad))
    return grad
