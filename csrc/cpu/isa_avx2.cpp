#define FUSEDOPT_ISA avx2
#include "engine.h"

namespace fusedopt {

const CpuEngine& engine_avx2() {
  static constexpr CpuEngine engine = {"avx2",      &avx2::update,     &avx2::measure,
                                       &avx2::norm, &avx2::accumulate, &avx2::scale};
  return engine;
}

}  // namespace fusedopt
