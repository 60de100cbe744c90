// How an optimizer state rests in memory. Fields of a format:
//
//   Storage, Compute
//   kBlocked      whether runs of kStateBlock elements share a scale
//   kRandom       whether encoding needs random bits
//   kDithered     whether encoding needs dither
//   kRounded      whether it is a plain format, rounded to nearest even; `Plain` is that format
#pragma once

#include "../core/moment.h"
#include "param.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

template <class Format>
struct PlainState {
  using Plain = Format;
  using Storage = typename Format::Storage;
  using Compute = typename Format::Compute;
  static constexpr bool kBlocked = false, kRounded = true, kRandom = false, kDithered = false;
};

// stochastic_rounding=True and state_dtype="bf16": a second moment that changes by a thousandth per step would stand
// still if it were rounded to the nearest of 256 steps per octave.
struct StochasticState {
  using Storage = uint16;
  using Compute = float;
  static constexpr bool kBlocked = false, kRounded = false, kRandom = true, kDithered = false;
  static FUSEDOPT_HD float decode(uint16 x) { return BFloat16::decode(x); }
  // It is stored as the upper half of this.
  static FUSEDOPT_HD uint32 word(float x, uint32 bits) { return StochasticParam::word(x, bits); }
};

// state_dtype="int8": one byte an element and one float, the `unit`, a power of two, per 256 elements.
//
// A code is an 8-bit floating-point number without subnormals: with y = |x| / unit, or sqrt(x) / unit for second
// moments, it is the upper bits of 2 + y, counted from those of 2. So 0 is exact, steps near 0 are even, and further up
// they are an eighth (first moments: sign, 3 bits of mantissa) or a sixteenth (second moments: 4 bits) of the value,
// over 15 octaves below the largest element of the block. It takes a few integer operations, the same on every machine.
// benchmarks/int8_codes.py compares it with others.
//
// Rounding is dithered: to nearest, a moment whose change is less than half a step would stand still. A second moment >
// 0 never gets code 0 (if it is more than 2^-125, the smallest numbers but one octave): vanished beside a first moment
// that has not, it would make the update explode.
//
// A block with inf or NaN in it has the unit NaN, and is NaN as a whole from then on: it shows.
struct Int8State {
  using Storage = uint8;
  using Compute = float;
  static constexpr bool kBlocked = true, kRounded = false, kRandom = false, kDithered = true;

  // What a block's unit is found from: the largest of its elements' magnitudes, compared as integers, NaN highest.
  static FUSEDOPT_HD uint32 magnitude(float x, Moment moment) {
    return bit_cast<uint32>(moment == Moment::kFirst ? x : square_root(x)) & 0x7fffffffu;
  }

  // 2^-15 of the largest power of two in the block: every y is below 2^16, and so every code below the largest.
  static FUSEDOPT_HD float unit_of(uint32 largest) {
    const uint32 exponent = largest & 0x7f800000u;
    if (exponent == 0x7f800000u) return bit_cast<float>(0x7fc00000u);
    return exponent < kOctaves + kTiny ? 0.0f : bit_cast<float>(exponent - kOctaves);
  }

  // 1 / unit, which is 0 or at least 2^-126: no other operation needed than to negate the exponent.
  static FUSEDOPT_HD float reciprocal(float unit) {
    return unit > 0.0f ? bit_cast<float>(0x7f000000u - bit_cast<uint32>(unit)) : 0.0f;
  }

  static FUSEDOPT_HD float decode(uint8 code, float unit, Moment moment) {
    if (moment == Moment::kSecond) {
      const float root = scale_and_add(bit_cast<float>(kTwoBits | uint32(code) << 19), unit, -2.0f * unit);
      return root * root;
    }
    const float magnitude = scale_and_add(bit_cast<float>(kTwoBits | uint32(code & 0x7f) << 20), unit, -2.0f * unit);
    return bit_cast<float>(bit_cast<uint32>(magnitude) | uint32(code & 0x80) << 24);
  }

  // The code is its upper byte.
  static FUSEDOPT_HD uint32 encode_word(float x, float reciprocal, uint32 dither, Moment moment) {
    const uint32 bits = bit_cast<uint32>(x);
    if (moment == Moment::kSecond) {
      const uint32 word = (bit_cast<uint32>(scale_and_add(square_root(x), reciprocal, 2.0f)) << 5) + dither;
      const uint32 least = bits < kCodeOne ? bits : kCodeOne;
      return word > least ? word : least;
    }
    const float y = scale_and_add(bit_cast<float>(bits & 0x7fffffffu), reciprocal, 2.0f);
    return (((bit_cast<uint32>(y) << 4) + dither) & 0x7fffffffu) | (bits & 0x80000000u);
  }

 private:
  static constexpr uint32 kTwoBits = 0x40000000u;
  static constexpr uint32 kCodeOne = 1u << 24;
  static constexpr uint32 kOctaves = 15u << 23;
  static constexpr uint32 kTiny = 1u << 23;
};

constexpr int kStateBlock = 256;

using StateFloat32 = PlainState<Float32>;
using StateBFloat16 = PlainState<BFloat16>;
using StateFloat16 = PlainState<Float16>;
using StateFloat64 = PlainState<Float64>;

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt

// In the order of StateFormat in core/structs.h.
#define FUSEDOPT_FOR_EACH_STATE_FORMAT(X) \
  X(StateFloat32) X(StateBFloat16) X(StateFloat16) X(StateFloat64) X(Int8State) X(StochasticState)
