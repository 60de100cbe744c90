// How work is divided between threads.
#pragma once

#include "../core/platform.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

constexpr int kThreads = 256;
constexpr int kChunk = FUSEDOPT_CHUNK;  // elements; fusedopt/backends/nvrtc.py sets it

// What a pass is tuned for. Large models are bound by memory: few blocks with much in flight are best, more where
// arithmetic takes as long as memory, so that warps hide its latency. Models of a few million parameters are bound by
// the latency of one block, so more blocks must run at once.
enum class Tuning { kBandwidth, kLatency };

// How many blocks of an update pass share a multiprocessor, by the sizes of the smallest and the largest element of
// parameter, gradient and states, by whether the parameter has a second part, and by whether a rule takes a root beside
// one state: as much arithmetic as beside two, in less time.
constexpr FUSEDOPT_HD int update_blocks(Tuning tuning, int smallest, int largest, bool extra, bool rooted) {
  if (smallest == 1) return largest == 2 && !extra ? 3 : 2;
  if (largest == 2) return 3;
  if (largest == 4 && tuning == Tuning::kLatency) return 4;
  return largest == 4 && rooted ? 3 : 2;
}

// These numbers, and how many elements a thread loads at once. Measured on an H100 (docs/performance.md); macros, so
// that others can be tried (benchmarks/variants.py).
#ifndef FUSEDOPT_ELEMENTS
#define FUSEDOPT_ELEMENTS(tuning, smallest, largest) \
  ((tuning) == Tuning::kBandwidth && (smallest) >= 2 && (largest) <= 4 ? 16 : 8)
#endif
#ifndef FUSEDOPT_UPDATE_BLOCKS
#define FUSEDOPT_UPDATE_BLOCKS(tuning, smallest, largest, extra, rooted) \
  update_blocks(tuning, smallest, largest, extra, rooted)
#endif
#ifndef FUSEDOPT_NORM_ELEMENTS
#define FUSEDOPT_NORM_ELEMENTS(tuning) ((tuning) == Tuning::kBandwidth ? 32 : 8)
#endif
#ifndef FUSEDOPT_NORM_BLOCKS
#define FUSEDOPT_NORM_BLOCKS(tuning) ((tuning) == Tuning::kBandwidth ? 4 : 8)
#endif
#ifndef FUSEDOPT_ACCUMULATE_ELEMENTS
#define FUSEDOPT_ACCUMULATE_ELEMENTS 32
#endif

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
