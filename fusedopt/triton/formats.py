"""How elements rest in memory, bit for bit as ``csrc/formats/`` has it.

Loading and decoding are apart, as are encoding and storing, so that a kernel issues every load before it uses one.
Formats go by their names in ``fusedopt.specs``. 16-bit floats travel as uint16.

NVIDIA's conversions round to nearest even and make 0x7fff of NaN. Other targets may store another NaN, and Triton's
interpreter rounds otherwise: there ``encode`` takes integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import pointers
from .noise import draw_bits
from .target import NVIDIA, square_root

__all__ = [
    "at",
    "decode",
    "decode_param",
    "decode_state",
    "encode",
    "encode_param",
    "encode_state",
    "extra_at",
    "main_at",
    "state_at",
]


# ---- plain ----------------------------------------------------------------------------------------------------


@triton.jit
def at(address, start, offsets, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to elements of a plain tensor."""
    if DTYPE == "float32":
        return pointers(address, start, offsets, tl.float32, 4, VECTOR)
    elif DTYPE == "float64":
        return pointers(address, start, offsets, tl.float64, 8, VECTOR)
    else:
        return pointers(address, start, offsets, tl.uint16, 2, VECTOR)


@triton.jit
def decode(x, DTYPE: tl.constexpr):
    """float64 of float64, else float32."""
    if DTYPE == "bfloat16":
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == "float16":
        return x.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return x


@triton.jit
def encode(x, DTYPE: tl.constexpr):
    """Rounded to nearest even; NaN of 16 bits is 0x7fff."""
    if DTYPE == "bfloat16":
        if NVIDIA:
            return x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
        else:
            word = x.to(tl.uint32, bitcast=True)
            rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
            return tl.where(x != x, 0x7FFF, rounded).to(tl.uint16)
    elif DTYPE == "float16":
        half = x.to(tl.float16).to(tl.uint16, bitcast=True)
        if NVIDIA:
            return half
        else:
            return tl.where(x != x, 0x7FFF, half.to(tl.uint32)).to(tl.uint16)
    else:
        return x


# ---- parameters -----------------------------------------------------------------------------------------------


@triton.jit
def main_at(address, start, offsets, FORMAT: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to the model's tensor."""
    if FORMAT == "float32" or FORMAT == "float64":
        return at(address, start, offsets, FORMAT, VECTOR)
    else:
        return pointers(address, start, offsets, tl.uint16, 2, VECTOR)


@triton.jit
def extra_at(address, start, offsets, FORMAT: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to what is kept beside it. Only for formats that keep something."""
    if FORMAT == "split16":
        return pointers(address, start, offsets, tl.int16, 2, VECTOR)
    elif FORMAT == "split8":
        return pointers(address, start, offsets, tl.int8, 1, VECTOR)
    else:
        return pointers(address, start, offsets, tl.float32, 4, VECTOR)


@triton.jit
def decode_param(main, extra, FORMAT: tl.constexpr):
    """The value. ``main`` is not read where there is a full master."""
    if FORMAT == "bfloat16+master" or FORMAT == "float16+master":
        return extra
    elif FORMAT == "split16":
        word = (main.to(tl.uint32) << 16) + extra.to(tl.int32).to(tl.uint32, bitcast=True)
        return word.to(tl.float32, bitcast=True)
    elif FORMAT == "split8":
        word = (main.to(tl.uint32) << 16) + (extra.to(tl.int32) * 256).to(tl.uint32, bitcast=True)
        return word.to(tl.float32, bitcast=True)
    elif FORMAT == "bfloat16+stochastic":
        return decode(main, "bfloat16")
    else:
        return decode(main, FORMAT)


@triton.jit
def bits_or_nan(x):
    """The bits of float32; of NaN those of one whose lower half is 0: adding to others would carry into -0."""
    return tl.where(x != x, 0x7FFF0000, x.to(tl.uint32, bitcast=True))


@triton.jit
def encode_param(x, bits, FORMAT: tl.constexpr):
    """What is stored in the model's tensor, and beside it. bits: 16 random ones, for stochastic rounding."""
    if FORMAT == "bfloat16+master":
        return encode(x, "bfloat16"), x
    elif FORMAT == "float16+master":
        return encode(x, "float16"), x
    elif FORMAT == "split16":
        word = bits_or_nan(x)
        return ((word + 0x8000) >> 16).to(tl.uint16), word.to(tl.int32, bitcast=True).to(tl.int16)
    elif FORMAT == "split8":
        word = bits_or_nan(x) + 0x80
        return ((word + 0x8000) >> 16).to(tl.uint16), (word >> 8).to(tl.int32, bitcast=True).to(tl.int8)
    elif FORMAT == "bfloat16+stochastic":
        return ((bits_or_nan(x) + bits) >> 16).to(tl.uint16), x
    else:
        return encode(x, FORMAT), x


# ---- states ---------------------------------------------------------------------------------------------------

OCTAVES = tl.constexpr(15 << 23)
TINY = tl.constexpr(1 << 23)
CODE_ONE = tl.constexpr(1 << 24)
TWO_BITS = tl.constexpr(0x40000000)


@triton.jit
def state_at(address, start, offsets, FORMAT: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to a state, or to its codes."""
    if FORMAT == "int8":
        return pointers(address, start, offsets, tl.uint8, 1, VECTOR)
    elif FORMAT == "bfloat16+stochastic":
        return pointers(address, start, offsets, tl.uint16, 2, VECTOR)
    else:
        return at(address, start, offsets, FORMAT, VECTOR)


@triton.jit
def per_element(unit):
    """Units of shape (blocks,) for each row of 8 elements: shape (32 blocks, 1), to be broadcast."""
    rows = tl.broadcast_to(unit[:, None], (unit.shape[0], 32))
    return tl.reshape(rows, (unit.shape[0] * 32,))[:, None]


@triton.jit
def decode_state(x, unit, FORMAT: tl.constexpr, SECOND: tl.constexpr):
    """The value. unit: shape (blocks,), of blocked formats. SECOND: whether it is a second moment."""
    if FORMAT == "int8":
        scale = per_element(unit)
        code = x.to(tl.uint32)
        if SECOND:
            root = ((code << 19) | TWO_BITS).to(tl.float32, bitcast=True) * scale + -2.0 * scale
            return root * root
        else:
            size = (((code & 0x7F) << 20) | TWO_BITS).to(tl.float32, bitcast=True) * scale + -2.0 * scale
            return (size.to(tl.uint32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)
    elif FORMAT == "bfloat16+stochastic":
        return decode(x, "bfloat16")
    else:
        return decode(x, FORMAT)


@triton.jit
def block_maximum(x):
    """Of int32 of shape (rows of 8 elements, 8), over blocks of 256 elements: shape (blocks,)."""
    rows = tl.max(x, axis=1)
    return tl.max(tl.reshape(rows, (rows.shape[0] // 32, 32)), axis=1)


@triton.jit
def encode_int8(x, dither, mask, SECOND: tl.constexpr):
    """Codes and units."""
    size = x
    if SECOND:
        size = square_root(x)
    magnitude = size.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    exponent = block_maximum(tl.where(mask, magnitude, 0)) & 0x7F800000
    small = tl.where(exponent < OCTAVES + TINY, 0, exponent - OCTAVES)
    unit_bits = tl.where(exponent == 0x7F800000, 0x7FC00000, small)
    unit = unit_bits.to(tl.float32, bitcast=True)
    # 1 / unit: units are powers of two, so that negating the exponent is all it takes.
    reciprocal = per_element(tl.where(unit > 0.0, 0x7F000000 - unit_bits, 0).to(tl.float32, bitcast=True))
    bits = x.to(tl.uint32, bitcast=True)
    if SECOND:
        word = ((size * reciprocal + 2.0).to(tl.uint32, bitcast=True) << 5) + dither
        word = tl.maximum(word, tl.minimum(bits, CODE_ONE))
    else:
        size = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        word = ((size * reciprocal + 2.0).to(tl.uint32, bitcast=True) << 4) + dither
        word = (word & 0x7FFFFFFF) | (bits & 0x80000000)
    return (word >> 24).to(tl.uint8), unit


@triton.jit
def encode_state(x, mask, w0, w1, w2, w3, dither, FORMAT: tl.constexpr, K: tl.constexpr, SECOND: tl.constexpr):
    """What is stored of state number K, and the units. w0 … w3: the draw of the rows; dither: of the elements."""
    if FORMAT == "int8":
        return encode_int8(x, dither, mask, SECOND)
    elif FORMAT == "bfloat16+stochastic":
        word = bits_or_nan(x) + draw_bits(w0, w1, w2, w3, K + 1)
        return (word >> 16).to(tl.uint16), 0.0
    else:
        return encode(x, FORMAT), 0.0
