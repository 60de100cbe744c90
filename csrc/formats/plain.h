// Plain formats: an element rests in memory as one IEEE number or bfloat16.
//
// A format says how one element is decoded into the compute type and encoded again, rounding to
// nearest even. NaN stays NaN; 16-bit formats store the one that the GPU's conversion gives, 0x7fff, everywhere.
// Engines decide how elements are fetched. `encode_pair` packs two elements, the first in the low half.
#pragma once

#include "../core/structs.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

struct Float32 {
  static constexpr DType kDType = DType::kFloat32;
  using Storage = float;
  using Compute = float;
  static FUSEDOPT_HD float decode(float x) { return x; }
  static FUSEDOPT_HD float encode(float x) { return x; }
};

struct Float64 {
  static constexpr DType kDType = DType::kFloat64;
  using Storage = double;
  using Compute = double;
  static FUSEDOPT_HD double decode(double x) { return x; }
  static FUSEDOPT_HD double encode(double x) { return x; }
};

struct BFloat16 {
  static constexpr DType kDType = DType::kBFloat16;
  using Storage = uint16;
  using Compute = float;

  static FUSEDOPT_HD float decode(uint16 x) { return bit_cast<float>(uint32(x) << 16); }

  static FUSEDOPT_HD uint16 encode(float x) {
    const uint32 u = bit_cast<uint32>(x);
    const uint32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (u & 0x7fffffffu) > 0x7f800000u ? uint16(0x7fff) : uint16(rounded);
  }

#if defined(__CUDACC__)
  static __device__ __forceinline__ uint32 encode_pair(float low, float high) {
#if __CUDA_ARCH__ >= 800
    uint32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
#else
    return encode(low) | uint32(encode(high)) << 16;
#endif
  }
#endif
};

struct Float16 {
  static constexpr DType kDType = DType::kFloat16;
  using Storage = uint16;
  using Compute = float;

#if defined(__CUDACC__)
  static __device__ __forceinline__ float decode(uint16 x) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x));
    return result;
  }

  static __device__ __forceinline__ uint16 encode(float x) {
    uint16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(x));
    return result;
  }

  static __device__ __forceinline__ uint32 encode_pair(float low, float high) {
#if __CUDA_ARCH__ >= 800
    uint32 result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
#else
    return encode(low) | uint32(encode(high)) << 16;
#endif
  }
#else
  // Without branches, so that compilers vectorise it on every instruction set.
  static FUSEDOPT_HD float decode(uint16 x) {
    const uint32 sign = uint32(x & 0x8000u) << 16;
    const uint32 magnitude = uint32(x & 0x7fffu) << 13;
    const float normal = bit_cast<float>(magnitude + (112u << 23));
    const float subnormal = bit_cast<float>(magnitude + (113u << 23)) - bit_cast<float>(113u << 23);
    const uint32 special = magnitude | 0x7f800000u;  // inf and NaN
    uint32 u = magnitude < (1u << 23) ? bit_cast<uint32>(subnormal) : bit_cast<uint32>(normal);
    u = magnitude >= (31u << 23) ? special : u;
    return bit_cast<float>(u | sign);
  }

  static FUSEDOPT_HD uint16 encode(float x) {
    const uint32 u = bit_cast<uint32>(x);
    const uint32 sign = (u >> 16) & 0x8000u;
    const uint32 a = u & 0x7fffffffu;
    // Below 2^-14: adding 0.5 makes the hardware round at the subnormal's last place.
    const uint32 subnormal = bit_cast<uint32>(bit_cast<float>(a) + 0.5f) - bit_cast<uint32>(0.5f);
    const uint32 normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
    uint32 half = a < (113u << 23) ? subnormal : normal;
    half = a >= (143u << 23) ? 0x7c00u : half;  // beyond the largest half: inf
    return a > 0x7f800000u ? uint16(0x7fff) : uint16(half | sign);
  }
#endif
};

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt

#define FUSEDOPT_FOR_EACH_FORMAT(X) X(Float32) X(BFloat16) X(Float16) X(Float64)
