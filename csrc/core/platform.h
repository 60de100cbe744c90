// What differs between the compilers that read the shared headers (g++, clang, NVRTC), and nothing else.
//
// NVRTC is given no toolkit, so the shared headers include no system header when it compiles them.
#pragma once

#if defined(__CUDACC__)
#define FUSEDOPT_HD __host__ __device__ __forceinline__
#define FUSEDOPT_ISA cuda
#else
#include <cmath>
#ifndef FUSEDOPT_HD  // given where coverage is measured: it counts each place that a function is inlined into
#define FUSEDOPT_HD inline __attribute__((always_inline))
#endif
// The CPU engine is compiled once per instruction set; each copy lives in a namespace of its own, so
// that the linker can never merge an AVX-512 copy of a function with the one the baseline calls.
#ifndef FUSEDOPT_ISA
#define FUSEDOPT_ISA baseline
#endif
#endif

namespace fusedopt {

using int32 = int;
using int64 = long long;
using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;
static_assert(sizeof(int32) == 4 && sizeof(int64) == 8 && sizeof(void*) == 8, "a 64-bit platform is required");

namespace FUSEDOPT_ISA {

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

template <class To, class From>
FUSEDOPT_HD To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between different sizes");
  To result;
#if defined(__CUDACC__)
  memcpy(&result, &value, sizeof(To));
#else
  __builtin_memcpy(&result, &value, sizeof(To));
#endif
  return result;
}

FUSEDOPT_HD float square_root(float x) {
#if defined(__CUDACC__)
  return sqrtf(x);  // IEEE: compiled with --prec-sqrt=true
#else
  return __builtin_sqrtf(x);
#endif
}

FUSEDOPT_HD double square_root(double x) {
#if defined(__CUDACC__)
  return sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}

// x * scale + offset for a power of two `scale`: the product is exact, so fused or not it is the same number.
FUSEDOPT_HD float scale_and_add(float x, float scale, float offset) {
#if defined(__CUDACC__)
  return fmaf(x, scale, offset);
#else
  return x * scale + offset;
#endif
}

#if defined(__CUDACC__) || defined(__FMA__)
FUSEDOPT_HD float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDACC__)
  return fmaf(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
#endif

// x / divisor, rounded as IEEE division. `reciprocal` is 1 / divisor, rounded to nearest: worth it where many numbers
// are divided by the same one. With it, one multiplication and two fused ones are enough for the correctly rounded
// quotient (Markstein 1990; Brisebarre, Muller & Raina, IEEE TC 53(8), 2004), unless something leaves the range of
// floats: for sqrt(x) / d with d in [2^-24, 1] nothing does but infinity. Processors that do not fuse them divide.
template <class T>
FUSEDOPT_HD T divide_root(T x, T divisor, [[maybe_unused]] T reciprocal) {
#if defined(__CUDACC__) || defined(__FMA__)
  if constexpr (sizeof(T) == 4) {
    const T quotient = x * reciprocal;
    const T corrected = fused_multiply_add(fused_multiply_add(-divisor, quotient, x), reciprocal, quotient);
    return x < bit_cast<T>(0x7f800000u) ? corrected : quotient;
  }
#endif
  return x / divisor;
}

// a^n and b^n by squaring, both in one loop so that neither waits for the other. Written out because the pow() of
// CUDA and of the C library differ in the last place, and bias corrections must have the same bits on both. Relative
// error below n * 2^-53.
struct TwoPowers {
  double a, b;
};

FUSEDOPT_HD TwoPowers powers(double a, double b, uint64 n) {
  TwoPowers result = {1.0, 1.0};
  for (; n != 0; n >>= 1) {
    if (n & 1) {
      result.a *= a;
      result.b *= b;
    }
    a *= a;
    b *= b;
  }
  return result;
}

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
