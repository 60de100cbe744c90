#define FUSEDOPT_ISA avx512
#include "engine.h"

namespace fusedopt {

const CpuEngine& engine_avx512() {
  static constexpr CpuEngine engine = {"avx512",      &avx512::update,     &avx512::measure,
                                       &avx512::norm, &avx512::accumulate, &avx512::scale};
  return engine;
}

}  // namespace fusedopt
