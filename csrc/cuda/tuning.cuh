// How work is divided between threads.
#pragma once

#include "../core/platform.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

constexpr int kThreads = 256;
constexpr int kChunk = FUSEDOPT_CHUNK;  // elements; fusedopt/backends/nvrtc.py sets it

// What a pass is tuned for. Large models are bound by memory: few blocks with much in flight are best for
// elements of 4 bytes; with 2 bytes arithmetic takes as long as memory, and more warps hide its latency. Models of a
// few million parameters are bound by the latency of one block, so more blocks must run at once.
enum class Tuning { kBandwidth, kLatency };

// How many elements a thread loads at once, and how many blocks share a multiprocessor, by the sizes of the smallest
// and the largest element of parameter, gradient and states, and by whether the parameter has a second part. Measured
// on an H100 (docs/performance.md); macros, so that others can be tried.
#ifndef FUSEDOPT_ELEMENTS
#define FUSEDOPT_ELEMENTS(tuning, smallest, largest) \
  ((tuning) == Tuning::kBandwidth && (smallest) >= 2 && (largest) == 4 ? 16 : 8)
#endif
#ifndef FUSEDOPT_UPDATE_BLOCKS
#define FUSEDOPT_UPDATE_BLOCKS(tuning, smallest, largest, extra)                                               \
  ((smallest) == 1                                                      ? ((largest) == 2 && !(extra) ? 3 : 2) \
   : (largest) == 2 || ((tuning) == Tuning::kLatency && (largest) == 4) ? 4                                    \
                                                                        : 2)
#endif
#ifndef FUSEDOPT_NORM_ELEMENTS
#define FUSEDOPT_NORM_ELEMENTS(tuning) ((tuning) == Tuning::kBandwidth ? 32 : 8)
#endif
#ifndef FUSEDOPT_NORM_BLOCKS
#define FUSEDOPT_NORM_BLOCKS(tuning) ((tuning) == Tuning::kBandwidth ? 4 : 8)
#endif
#ifndef FUSEDOPT_ACCUMULATE_ELEMENTS
#define FUSEDOPT_ACCUMULATE_ELEMENTS 16
#endif

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
