#define FUSEDOPT_ISA baseline
#include "engine.h"

namespace fusedopt {

const CpuEngine& engine_baseline() {
  static constexpr CpuEngine engine = {"baseline",      &baseline::update,     &baseline::measure,
                                       &baseline::norm, &baseline::accumulate, &baseline::scale};
  return engine;
}

}  // namespace fusedopt
