// Random bits that depend on nothing but where they are used, so that replays, resumed runs and both engines repeat
// them.
#pragma once

#include "platform.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

// 128 bits.
struct Random128 {
  uint32 word[4];
};

// Philox4x32-10. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
FUSEDOPT_HD Random128 philox(uint64 seed, uint32 c0, uint32 c1, uint32 c2, uint32 c3) {
  uint32 key0 = uint32(seed), key1 = uint32(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64 a = uint64(0xD2511F53u) * c0;
    const uint64 b = uint64(0xCD9E8D57u) * c2;
    c0 = uint32(b >> 32) ^ c1 ^ key0;
    c1 = uint32(b);
    c2 = uint32(a >> 32) ^ c3 ^ key1;
    c3 = uint32(a);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Whose random numbers: one step of one tensor.
struct RandomStream {
  uint64 seed;
  uint32 tensor;
  uint32 step;
};

constexpr int kRandomGroup = 8;  // elements that share one draw

// ---- random bits, for stochastic rounding -------------------------------------------------------------

// The draw of elements [8 * group, 8 * group + 8) of a tensor: 16 bits each.
FUSEDOPT_HD Random128 draw(const RandomStream& stream, uint64 group) {
  return philox(stream.seed, uint32(group), uint32(group >> 32), stream.tensor, stream.step);
}

// 16 bits for element number `e` of the draw.
FUSEDOPT_HD uint32 bits_of(const Random128& random, int e) { return (random.word[e / 2] >> (e % 2 * 16)) & 0xffffu; }

// Which element's bits round state number `k` of element `e`: those of another one. Each rounding is unbiased by
// itself, and that they hang together changes nothing about that.
FUSEDOPT_HD int bits_for_state(int e, int k) { return (e + 1 + k) % kRandomGroup; }

// ---- dither, for states in 8 bits -----------------------------------------------------------------------

// A state is rounded anew in every step, and what one step rounds up the next should round down. So the dither of an
// element runs through a golden-section sequence over the steps, from a hashed start: 24 bits that fill their range
// more evenly than random ones, for a fraction of the operations. Measured: a sixth less noise in Adam's update than
// random bits give, with betas 0.9 and 0.999 (benchmarks/int8_codes.py).
constexpr uint32 kDitherStep = 0x9E3779u;     // (sqrt(5) - 1) / 2, in units of 2^-24
constexpr uint32 kDitherElement = 0x6A09E6u;  // sqrt(2) - 1

// What is common to all elements of a tensor in one step.
struct DitherKey {
  uint32 tensor;  // hashed
  uint32 advance;
};

FUSEDOPT_HD DitherKey dither_key(const RandomStream& stream) {
  return {philox(stream.seed, stream.tensor, 0u, 0u, 0u).word[0], stream.step * kDitherStep};
}

// Of a group's first element; the murmur3 finalizer hashes.
FUSEDOPT_HD uint32 dither_base(const DitherKey& key, uint64 group) {
  uint32 x = uint32(group) ^ (uint32(group >> 32) * 0x9E3779B9u) ^ key.tensor;
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return (x ^ (x >> 16)) + key.advance;
}

// 24 bits for element number `e` of the group.
FUSEDOPT_HD uint32 dither_of(uint32 base, int e) { return (base + uint32(e) * kDitherElement) & 0xffffffu; }

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
