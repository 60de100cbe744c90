// The CUDA engine: accumulate, norm, measure, update and scale passes over a table, compiled at run time by NVRTC for
// the combination in use. fusedopt/backends/nvrtc.py writes the entry points, which call these templates.
#pragma once

#include "accumulate.cuh"
#include "measure.cuh"
#include "norm.cuh"
#include "scale.cuh"
#include "update.cuh"
