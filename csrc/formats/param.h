// How a parameter rests in memory: the model's own tensor (`Main`), and beside it an optional second one (`Extra`) that
// holds what the first one cannot. Fields of a format:
//
//   Main, Extra   plain formats; NoExtra where there is none
//   kReadsMain    whether decoding needs the model's tensor
//   kRounded      whether Main holds the value rounded to nearest even, and Extra, if any, the value itself;
//                 engines then convert whole vectors, and `encode` is not called
//   kRandom       whether encoding needs random bits
//   decode(main, extra)
//
// and where it is not kRounded:
//
//   word(value, bits)  Main is the upper half of word + kCarry, Extra begins at the word's byte number kExtraByte.
//                      Engines pack the fields of many words at once
#pragma once

#include "../core/random.h"
#include "plain.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

// The low bits of a split parameter. Not a format of numbers.
struct Int16Bits {
  using Storage = short;
  using Compute = float;
};
struct Int8Bits {
  using Storage = signed char;
  using Compute = float;
};

struct NoExtra {
  struct Storage {};
  using Compute = float;
};

template <class Format>
struct PlainParam {
  using Main = Format;
  using Extra = NoExtra;
  using Compute = typename Format::Compute;
  static constexpr bool kReadsMain = true, kRounded = true, kRandom = false;
  static FUSEDOPT_HD Compute decode(typename Format::Storage main, NoExtra::Storage) { return Format::decode(main); }
};

// master_weights="fp32": the value itself beside its 16-bit rounding.
template <class Format>
struct MasterParam {
  using Main = Format;
  using Extra = Float32;
  using Compute = float;
  static constexpr bool kReadsMain = false, kRounded = true, kRandom = false;
  static FUSEDOPT_HD float decode(typename Format::Storage, float extra) { return extra; }
};

// The bits of a number; of NaN, those of a NaN whose lower half is 0: adding to others would carry into -0.
FUSEDOPT_HD uint32 bits_or_nan(float x) {
#if defined(__CUDACC__)
  return uint32(min(bit_cast<int32>(x), 0x7fff0000));  // arithmetic on the device gives one NaN only, 0x7fffffff
#else
  return x != x ? 0x7fff0000u : bit_cast<uint32>(x);
#endif
}

// master_weights="split16": a float in 4 bytes. bfloat16 is the upper half of a float, so the model's tensor holds that
// half, rounded (ties away from 0), and 16 bits beside it hold the difference. Exact for every number; NaN becomes the
// one NaN.
struct Split16 {
  using Main = BFloat16;
  using Extra = Int16Bits;
  using Compute = float;
  static constexpr bool kReadsMain = true, kRounded = false, kRandom = false;
  static constexpr uint32 kCarry = 0x8000;
  static constexpr int kExtraByte = 0;
  static FUSEDOPT_HD float decode(uint16 main, short extra) {
    return bit_cast<float>((uint32(main) << 16) + uint32(int32(extra)));
  }
  static FUSEDOPT_HD uint32 word(float value, uint32) { return bits_or_nan(value); }
};

// master_weights="split8": the upper 24 bits of a float, rounded to nearest (ties away from 0), in 3 bytes.
struct Split8 {
  using Main = BFloat16;
  using Extra = Int8Bits;
  using Compute = float;
  static constexpr bool kReadsMain = true, kRounded = false, kRandom = false;
  static constexpr uint32 kCarry = 0x8000;
  static constexpr int kExtraByte = 1;
  static FUSEDOPT_HD float decode(uint16 main, signed char extra) {
    return bit_cast<float>((uint32(main) << 16) + uint32(int32(extra) * 256));
  }
  static FUSEDOPT_HD uint32 word(float value, uint32) { return bits_or_nan(value) + 0x80u; }
};

// stochastic_rounding=True: the neighbour below or above in bfloat16, the nearer the likelier: right on average. inf
// stays.
struct StochasticParam {
  using Main = BFloat16;
  using Extra = NoExtra;
  using Compute = float;
  static constexpr bool kReadsMain = true, kRounded = false, kRandom = true;
  static constexpr uint32 kCarry = 0;
  static constexpr int kExtraByte = 0;
  static FUSEDOPT_HD float decode(uint16 main, NoExtra::Storage) { return BFloat16::decode(main); }
  static FUSEDOPT_HD uint32 word(float value, uint32 bits) { return bits_or_nan(value) + bits; }
};

using PlainFloat32 = PlainParam<Float32>;
using PlainBFloat16 = PlainParam<BFloat16>;
using PlainFloat16 = PlainParam<Float16>;
using PlainFloat64 = PlainParam<Float64>;
using MasterBFloat16 = MasterParam<BFloat16>;
using MasterFloat16 = MasterParam<Float16>;

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt

// In the order of ParamFormat in core/structs.h.
#define FUSEDOPT_FOR_EACH_PARAM_FORMAT(X) \
  X(PlainFloat32)                         \
  X(PlainBFloat16)                        \
  X(PlainFloat16) X(PlainFloat64) X(MasterBFloat16) X(MasterFloat16) X(Split16) X(Split8) X(StochasticParam)
