"""The accumulate pass: gradients added to the main gradients; ``csrc/cuda/accumulate.cuh`` in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .formats import at, encode
from .memory import field, tile_offsets
from .tables import MAIN_GRAD, TENSOR_SIZE, decode_grad, grad_weight, length_of, load_grad, mask_of, own_of, read_chunk

__all__ = ["accumulate_pass"]


@triton.jit
def accumulate_tile(
    args,
    own,
    main,
    holds,
    start,
    length,
    G: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    V: tl.constexpr,
):
    """One tile. main: the address to write to; holds: whether it is added to."""
    offsets = tile_offsets(TILE)
    mask = mask_of(offsets, length, V)
    held = tl.where(holds, main, 0)
    raw, raw_main = load_grad(own, held, start, offsets, mask, G, M, V)
    weight = grad_weight(args, tl.float64 if M == "float64" else tl.float32)
    total = decode_grad(raw, raw_main, own, held, weight, G, M)
    tl.store(at(main, start, offsets, M, V), encode(total, M), mask=mask)


@triton.jit(do_not_specialize=["args", "tensors", "chunks", "grads"])
def accumulate_pass(
    args: tl.int64,
    tensors: tl.int64,
    chunks: tl.int64,
    grads: tl.int64,
    G: tl.constexpr,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    V: tl.constexpr,
):
    """Gradients added to main gradients, or written there where these hold nothing; one program for each chunk."""
    tensor, number, numel = read_chunk(chunks, tl.program_id(0))
    word = field(grads + tensor * 8, 0, tl.int64)
    own, holds = own_of(word), (word & 1) != 0
    if own != 0:
        main = field(tensors + tensor * TENSOR_SIZE, MAIN_GRAD, tl.int64)
        start = number * CHUNK
        length = length_of(numel, start, CHUNK)
        is_aligned = ((own | main | length) & 15) == 0
        first = length * 0
        while first < length:
            here, rest = start + first, tl.minimum(length - first, TILE)
            if is_aligned:
                accumulate_tile(args, own, main, holds, here, rest, G, M, TILE, V)
            else:
                accumulate_tile(args, own, main, holds, here, rest, G, M, TILE, 1)
            first += TILE
