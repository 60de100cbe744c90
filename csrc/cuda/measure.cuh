// The measure pass: the first phase of rules of two. It computes what the update pass will, without storing it, and
// leaves the sums of squares of each tensor for that pass.
#pragma once

#include "norm.cuh"
#include "update.cuh"

namespace fusedopt {
namespace FUSEDOPT_ISA {

// sum + x². The square of a float is exact in double: fused or not, the sum is the same number.
__device__ __forceinline__ double add_square(double sum, float x) { return fma(double(x), double(x), sum); }
__device__ __forceinline__ double add_square(double sum, double x) { return sum + x * x; }

// One thread's part of a chunk. P, G, S, M: as Update, whose streams, loads and numbers these are.
template <class Rule, class P, class G, class S, class M, Tuning kTuning>
struct Measure {
  using Pass = Update<Rule, P, G, S, M, kTuning>;
  using T = typename Pass::T;
  using Registers = typename Pass::Registers;
  static constexpr int kNorms = fusedopt::kNorms<Rule>;

  double sums[kNorms] = {};  // of squares

  // The first `n` elements of a vector; the others do not exist.
  template <int N>
  __device__ __forceinline__ void add(const Vector<typename P::Main, N>& main,
                                      const Vector<typename P::Extra, N>& extra, const GradVector<G, M, N>& grad,
                                      const GradSource& source, Vector<S, N>* const (&state)[Pass::kSlots],
                                      const float (&unit)[Pass::kSlots], const typename Pass::Plan& plan, int n) {
    T p[N], g[N], s[Pass::kSlots][N];
    Pass::template decode_all<N>(main, extra, grad, source, state, unit, plan, p, g, s);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      T own[Pass::kSlots], terms[kNorms];
#pragma unroll
      for (int k = 0; k < Pass::kStates; ++k) own[k] = s[k][e];
      Rule::template measure<T>(p[e], g[e], own, plan.coefficients, terms);
#pragma unroll
      for (int k = 0; k < kNorms; ++k) sums[k] = e < n ? add_square(sums[k], terms[k]) : sums[k];
    }
  }

  __device__ __forceinline__ void add_whole(const Pass& pass, Registers& r, int round, const typename Pass::Plan& plan,
                                            const typename Pass::Units& all) {
#pragma unroll
    for (int j = 0; j < Pass::kVectors; ++j) {
      Vector<S, Pass::V>* s[Pass::kSlots];
      float unit[Pass::kSlots] = {};
#pragma unroll
      for (int k = 0; k < Pass::kStates; ++k) {
        s[k] = &r.state[k][j];
        if constexpr (S::kBlocked) unit[k] = __shfl_sync(0xffffffffu, all.held[k], round);
      }
      add<Pass::V>(r.param[j], r.extra[j], r.grad[j], pass.grad.source, s, unit, plan, Pass::V);
    }
  }

  __device__ __forceinline__ void add_part(const Pass& pass, Registers& r, int round, const typename Pass::Plan& plan) {
#pragma unroll
    for (int j = 0; j < Pass::kVectors; ++j) {
      const int i = pass.offset(round, j);
      const int n = pass.count(round, j);
      if (n <= 0) continue;
      Vector<S, Pass::V>* s[Pass::kSlots];
      float unit[Pass::kSlots] = {};
#pragma unroll
      for (int k = 0; k < Pass::kStates; ++k) {
        s[k] = &r.state[k][j];
        if constexpr (S::kBlocked) unit[k] = pass.units[k][i / kStateBlock];
      }
      add<Pass::V>(r.param[j], r.extra[j], r.grad[j], pass.grad.source, s, unit, plan, n);
    }
  }

  // One element, as a vector of length 1. Not in grouped formats.
  __device__ __forceinline__ void add_scalar(const Pass& pass, int i, const typename Pass::Plan& plan) {
    if constexpr (!Pass::kGrouped) {
      Vector<typename P::Main, 1> p;
      p.set(0, pass.param.base[i]);
      Vector<typename P::Extra, 1> x = {};
      if constexpr (Pass::kHasExtra) x.set(0, pass.extra.base[i]);
      Vector<S, 1> own[Pass::kSlots];
      Vector<S, 1>* s[Pass::kSlots];
      const float unit[Pass::kSlots] = {};
#pragma unroll
      for (int k = 0; k < Pass::kStates; ++k) {
        own[k].set(0, pass.state[k].base[i]);
        s[k] = &own[k];
      }
      add<1>(p, x, pass.grad.scalar(i), pass.grad.source, s, unit, plan, 1);
    }
  }
};

// Puts the chunk's sums into its row. The last of a tensor's blocks to come here adds the rows of all, always in the
// same order.
template <class Rule>
__device__ __forceinline__ void finish_measure(const PassArgs& args, const Chunk& chunk, TensorEntry& tensor,
                                               const double (&sums)[kNorms<Rule>]) {
  constexpr int kNorms = fusedopt::kNorms<Rule>;
  __shared__ bool last;
  double* const rows = args.norms + int64(blockIdx.x - chunk.index) * kNorms;  // of the tensor's chunks
#pragma unroll
  for (int k = 0; k < kNorms; ++k) {
    const double sum = reduce_block<NormType::kL2>(sums[k], false).sum;
    if (threadIdx.x == 0) rows[int64(chunk.index) * kNorms + k] = sum;
  }
  if (threadIdx.x == 0) last = tensor.chunks == 1 || take_ticket(&tensor.ticket, uint32(tensor.chunks));
  __syncthreads();
  if (!last) return;
  const volatile double* const parts = rows;
  const int64 end = int64(tensor.chunks) * kNorms;
#pragma unroll
  for (int k = 0; k < kNorms; ++k) {
    double sum = 0.0;
    for (int64 i = int64(threadIdx.x) * kNorms + k; i < end; i += kThreads * kNorms) sum += parts[i];
    sum = reduce_block<NormType::kL2>(sum, false).sum;
    if (threadIdx.x == 0) tensor.norms[k] = sum;
  }
}

template <class Rule, class P, class G, class S, class M, Tuning kTuning, class Table>
__device__ __forceinline__ void measure_pass(const PassArgs& args, const Table& table) {
  using Pass = Update<Rule, P, G, S, M, kTuning>;
  __shared__ typename Pass::Plan shared_plan;

  const Chunk chunk = args.chunks[blockIdx.x];
  const GradSource grad = grad_of(args, table, chunk.tensor);
  TensorEntry& tensor = args.tensors[chunk.tensor];
  if (!grad.any()) {  // other processes may have one
    wait_for_norm();
    if (chunk.index == 0 && int(threadIdx.x) < kNorms<Rule>) tensor.norms[threadIdx.x] = 0.0;
    return;
  }
  const Split split = Pass::split(tensor, chunk);
  const Pass pass(tensor, grad, split);
  const int whole = pass.whole_rounds();
  typename Pass::Registers registers;
  begin_chunk<false, false, kTuning>(pass, registers, whole, shared_plan, args, table, tensor);
  __syncthreads();
  const auto& plan = shared_plan;
  if (plan.skip) return;

  Measure<Rule, P, G, S, M, kTuning> measure;
  int round = 0;
  const auto units = pass.load_units(whole);
#pragma unroll 1
  for (; round < whole; ++round) {
    if (round > 0) pass.load_ahead(registers, round, whole);
    measure.add_whole(pass, registers, round, plan, units);
  }
#pragma unroll 1
  for (; round * Pass::kRound < split.vectored; ++round) {
    if (round > 0) pass.load_part(registers, round);
    measure.add_part(pass, registers, round, plan);
  }
  if (int(threadIdx.x) < split.scalars) measure.add_scalar(pass, split.scalar(threadIdx.x), plan);
  finish_measure<Rule>(args, chunk, tensor, measure.sums);
}

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
