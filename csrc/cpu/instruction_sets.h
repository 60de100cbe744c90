// Which instruction sets the processor has and the system saves. Compilers have functions for it, but not every one on
// every system (clang's need a library that the Microsoft linker does not know).
#pragma once

#if defined(FUSEDOPT_X86)
#include <cpuid.h>

namespace fusedopt {

// Registers that the system saves when it switches threads: bits of the extended control register.
inline unsigned saved_registers() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

struct InstructionSets {
  bool avx2 = false;    // with the conversions of float16 and fused multiply-add
  bool avx512 = false;  // F, BW, DQ, VL

  static InstructionSets here() {
    constexpr unsigned kF16c = 1u << 29, kFma = 1u << 12, kOsxsave = 1u << 27, kAvx2 = 1u << 5;
    constexpr unsigned kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    constexpr unsigned kYmm = 0x6, kZmm = 0xe6;
    InstructionSets sets;
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kOsxsave)) return sets;
    const bool beside = (ecx & kF16c) && (ecx & kFma);
    const unsigned saved = saved_registers();
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return sets;
    sets.avx2 = beside && (ebx & kAvx2) && (saved & kYmm) == kYmm;
    sets.avx512 = sets.avx2 && (ebx & kAvx512) == kAvx512 && (saved & kZmm) == kZmm;
    return sets;
  }
};

}  // namespace fusedopt
#endif
