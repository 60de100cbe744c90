// The passes of the CPU engine over a whole table, on several threads.
#pragma once

#include <vector>

#include "../core/moment.h"
#include "jobs.h"

namespace fusedopt {

// The best engine that this processor supports, or the one that FUSEDOPT_CPU_ISA names.
const CpuEngine& cpu_engine();

// What csrc/rules/all.h lists, for others than engines: names, and of each state which moment it is.
struct RuleInfo {
  const char* struct_name;
  const char* name;
  const char* states;  // names, separated by spaces
  const char* hyper;   // likewise
  std::vector<Moment> moments;
  int norms;
};
std::vector<RuleInfo> rule_infos();

// Chunks [begin, end) of a table.
struct Range {
  int64 begin, end;
};

// The first phase of a rule of two, whose sums it leaves in the tensors' `norms`, added in chunk order; zeros where
// there is no gradient. A part must hold whole tensors.
void cpu_measure(const UpdateJob& job, const std::vector<Chunk>& chunks, Range part, int threads);

// Skips if told so; otherwise updates every tensor that has a gradient and, with the table's last chunk, counts its
// step. Of a rule of two phases the second.
void cpu_update(const UpdateJob& job, const std::vector<Chunk>& chunks, Range part, int64 tensors, bool skip,
                int threads);

// Adds the table's gradients to (sum, nonfinite), in chunk order whatever the number of threads.
void cpu_norm(const NormJob& job, const std::vector<Chunk>& chunks, int threads, double& sum, double& nonfinite);

void cpu_accumulate(const AccumulateJob& job, const std::vector<Chunk>& chunks, int threads);

void cpu_scale(const ScaleJob& job, const std::vector<Chunk>& chunks, int threads);

void cpu_finalize_norm(Control& control, double sum, double nonfinite, const NormOptions& options);

}  // namespace fusedopt
