#include "passes.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../core/gradient.h"
#include "../core/norms.h"
#include "../host/threads.h"
#include "../rules/all.h"
#include "instruction_sets.h"

namespace fusedopt {
namespace {

// From the widest on. Other architectures have the baseline, which their compiler vectorises (NEON).
std::vector<const CpuEngine*> supported_engines() {
  std::vector<const CpuEngine*> engines;
#if defined(FUSEDOPT_X86)
  const InstructionSets sets = InstructionSets::here();
  if (sets.avx512) engines.push_back(&engine_avx512());
  if (sets.avx2) engines.push_back(&engine_avx2());
#endif
  engines.push_back(&engine_baseline());
  return engines;
}

const CpuEngine& choose_engine() {
  const auto engines = supported_engines();
  const char* wanted = std::getenv("FUSEDOPT_CPU_ISA");
  if (!wanted || !*wanted) return *engines.front();
  std::string names;
  for (const CpuEngine* engine : engines) {
    if (std::strcmp(engine->isa, wanted) == 0) return *engine;
    names += std::string(names.empty() ? "" : ", ") + engine->isa;
  }
  throw std::invalid_argument(std::string("FUSEDOPT_CPU_ISA: got '") + wanted + "', expected one of: " + names +
                              " (what this processor supports)");
}

template <class Rule>
std::vector<Moment> moments_of() {
  std::vector<Moment> moments;
  for (int k = 0; k < Rule::kStates; ++k) moments.push_back(Rule::moment(k));
  return moments;
}

int norms_of(int32 rule) {
#define FUSEDOPT_ROW(Rule) kNorms<baseline::Rule>,
  static constexpr int table[] = {FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_ROW)};
#undef FUSEDOPT_ROW
  return table[rule];
}

}  // namespace

std::vector<RuleInfo> rule_infos() {
#define FUSEDOPT_ROW(Rule)       \
  {#Rule,                        \
   baseline::Rule::kName,        \
   baseline::Rule::kStateNames,  \
   baseline::Rule::kHyperNames,  \
   moments_of<baseline::Rule>(), \
   kNorms<baseline::Rule>},
  return {FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_ROW)};
#undef FUSEDOPT_ROW
}

const CpuEngine& cpu_engine() {
  static const CpuEngine& engine = choose_engine();
  return engine;
}

void cpu_measure(const UpdateJob& job, const std::vector<Chunk>& chunks, Range part, int threads) {
  const CpuEngine& engine = cpu_engine();
  std::vector<TensorNorms> sums(static_cast<size_t>(part.end - part.begin));
  parallel_for(threads, part.end - part.begin, [&](int64 i) { sums[i] = engine.measure(job, chunks[part.begin + i]); });
  for (int64 i = part.begin; i < part.end; ++i) {
    double* const total = job.table.tensors[chunks[i].tensor].norms;
    for (int k = 0; k < norms_of(job.rule); ++k)
      total[k] = (chunks[i].index == 0 ? 0.0 : total[k]) + sums[i - part.begin].value[k];
  }
}

void cpu_update(const UpdateJob& job, const std::vector<Chunk>& chunks, Range part, int64 tensors, bool skip,
                int threads) {
  if (skip) return;
  const CpuEngine& engine = cpu_engine();
  // Backwards: a norm pass before this one left the last gradients in the cache.
  const int64 last = part.end - 1;
  parallel_for(threads, part.end - part.begin, [&](int64 i) { engine.update(job, chunks[last - i]); });
  if (part.end < int64(chunks.size())) return;
  for (int64 t = 0; t < tensors; ++t)
    if (job.table.grads[t]) *job.table.tensors[t].step += 1.0f;
}

void cpu_norm(const NormJob& job, const std::vector<Chunk>& chunks, int threads, double& sum, double& nonfinite) {
  const CpuEngine& engine = cpu_engine();
  std::vector<NormPartial> partials(chunks.size());
  parallel_for(threads, int64(chunks.size()), [&](int64 i) { partials[i] = engine.norm(job, chunks[i]); });
  for (const NormPartial& partial : partials) {
    sum = baseline::combine(sum, partial.sum, job.type);
    nonfinite += partial.nonfinite;
  }
}

void cpu_accumulate(const AccumulateJob& job, const std::vector<Chunk>& chunks, int threads) {
  const CpuEngine& engine = cpu_engine();
  parallel_for(threads, int64(chunks.size()), [&](int64 i) { engine.accumulate(job, chunks[i]); });
}

void cpu_scale(const ScaleJob& job, const std::vector<Chunk>& chunks, int threads) {
  const CpuEngine& engine = cpu_engine();
  parallel_for(threads, int64(chunks.size()), [&](int64 i) { engine.scale(job, chunks[i]); });
}

void cpu_finalize_norm(Control& control, double sum, double nonfinite, const NormOptions& options) {
  baseline::finalize_norm(control, sum, nonfinite, options);
}

}  // namespace fusedopt
