"""Random bits and dither, the same as ``csrc/core/random.h``: a function of seed, tensor, step and element alone."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["dither", "dither_key", "draw", "draw_bits"]

DITHER_STEP = tl.constexpr(0x9E3779)
DITHER_ELEMENT = tl.constexpr(0x6A09E6)


@triton.jit
def philox(key0, key1, c0, c1, c2, c3):
    """Philox4x32-10 (Salmon et al., SC 2011). All uint32; the counter's words are of one shape, the key's scalars."""
    for _ in tl.static_range(10):
        a_low, a_high = c0 * 0xD2511F53, tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32))
        b_low, b_high = c2 * 0xCD9E8D57, tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32))
        c0 = b_high ^ c1 ^ key0
        c1 = b_low
        c2 = a_high ^ c3 ^ key1
        c3 = a_low
        key0 = key0 + 0x9E3779B9
        key1 = key1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def group_words(start, CHUNK: tl.constexpr):
    """Lower and upper half of the numbers of a chunk's groups of 8 elements, each of shape (CHUNK / 8,)."""
    first = start // 8  # a multiple of the chunk's groups, so that the lower half carries nothing
    low = (first & 0xFFFFFFFF).to(tl.uint32) + tl.arange(0, CHUNK // 8).to(tl.uint32)
    high = tl.full((CHUNK // 8,), 0, tl.uint32) + (first >> 32).to(tl.uint32)
    return low, high


@triton.jit
def seed_words(seed):
    """A 64-bit seed as two uint32."""
    return (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def draw(seed, tensor, step, start, CHUNK: tl.constexpr):
    """Four words of 32 random bits for each group of a chunk, shape (CHUNK / 8,). tensor, step: uint32."""
    key0, key1 = seed_words(seed)
    low, high = group_words(start, CHUNK)
    zero = low * 0
    return philox(key0, key1, low, high, zero + tensor, zero + step)


@triton.jit
def draw_bits(w0, w1, w2, w3, SHIFT: tl.constexpr):
    """16 random bits for each element, shape (groups, 8): those of element (e + SHIFT) mod 8 of the draw."""
    e = ((tl.arange(0, 8) + SHIFT) % 8)[None, :]
    word = tl.where(e < 4, tl.where(e < 2, w0[:, None], w1[:, None]), tl.where(e < 6, w2[:, None], w3[:, None]))
    return (word >> ((e % 2) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def dither_key(seed, tensor):
    """What is common to all elements of a tensor: a uint32 scalar."""
    key0, key1 = seed_words(seed)
    zero = tl.full((1,), 0, tl.uint32)
    word, _, _, _ = philox(key0, key1, zero + tensor, zero, zero, zero)
    return tl.max(word.to(tl.int32, bitcast=True), axis=0).to(tl.uint32, bitcast=True)  # of one element: a scalar


@triton.jit
def dither(key, step, start, CHUNK: tl.constexpr):
    """24 bits for each element, uint32 of shape (CHUNK / 8, 8)."""
    low, high = group_words(start, CHUNK)
    x = low ^ (high * 0x9E3779B9) ^ key
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    base = (x ^ (x >> 16)) + step * DITHER_STEP
    return (base[:, None] + tl.arange(0, 8).to(tl.uint32)[None, :] * DITHER_ELEMENT) & 0xFFFFFF
