// The accumulate pass: gradients of one micro-batch added to the main gradients; the first of them is written, not
// added.
#pragma once

#include "gradients.cuh"

namespace fusedopt {
namespace FUSEDOPT_ISA {

template <class G, class M>
struct Accumulate {
  using T = typename M::Compute;
  static constexpr int V = 16 / maximum(sizeof(typename G::Storage), sizeof(typename M::Storage));
  static constexpr int kVectors = minimum(8, FUSEDOPT_ACCUMULATE_ELEMENTS / V);  // at most 128 bytes of a stream
  static constexpr int kRound = kThreads * kVectors * V;
  static_assert(kChunk % kRound == 0, "a chunk is a whole number of rounds");

  template <int N>
  static __device__ __forceinline__ void add(const GradVector<G, M, N>& vector, const GradSource& source, T weight,
                                             Vector<M, N>& sum) {
    T values[N];
    decode(vector, source, weight, values);
    encode(values, sum);
  }
};

template <class G, class M, class Table>
__device__ __forceinline__ void accumulate_pass(const PassArgs& args, const Table& table) {
  using Pass = Accumulate<G, M>;
  constexpr int V = Pass::V;
  const Chunk chunk = args.chunks[blockIdx.x];
  const GradSource source = grad_of(args, table, chunk.tensor);
  if (!source.grad) return;
  const void* const main_grad = args.tensors[chunk.tensor].main_grad;
  const Split split = Split::peeled<M, V>(main_grad, chunk.numel, chunk.index);
  const GradStream<G, M, V> grad(source, main_grad, split.first);
  const auto weight = gradient_transform<typename Pass::T>(args.scaling).weight;
  const int whole = grad.own.aligned && grad.main.aligned ? split.vectored / Pass::kRound : 0;
  const auto offset = [](int round, int j) { return round * Pass::kRound + (j * kThreads + int(threadIdx.x)) * V; };

#pragma unroll 1
  for (int round = 0; round < whole; ++round) {
    GradVector<G, M, V> vectors[Pass::kVectors];
#pragma unroll
    for (int j = 0; j < Pass::kVectors; ++j) vectors[j] = grad.load_aligned(offset(round, j));
#pragma unroll
    for (int j = 0; j < Pass::kVectors; ++j) {
      Vector<M, V> sum;
      Pass::add(vectors[j], source, weight, sum);
      grad.main.store_aligned(offset(round, j), sum);
    }
  }
#pragma unroll 1
  for (int i = whole * Pass::kRound + int(threadIdx.x) * V; i < split.vectored; i += kThreads * V) {
    Vector<M, V> sum;
    Pass::add(grad.load(i, V), source, weight, sum);
    grad.main.store(i, sum);
  }
  if (int(threadIdx.x) < split.scalars) {
    const int i = split.scalar(threadIdx.x);
    Vector<M, 1> sum;
    Pass::add(grad.scalar(i), source, weight, sum);
    grad.main.base[i] = sum.get(0);
  }
}

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
