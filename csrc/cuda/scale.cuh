// The scale pass: gradients multiplied and clamped where they are.
#pragma once

#include "launch.cuh"
#include "vectors.cuh"

namespace fusedopt {
namespace FUSEDOPT_ISA {

template <class G, class Table>
__device__ __forceinline__ void scale_pass(const PassArgs& args, const Table& table) {
  using T = typename G::Compute;
  constexpr int V = 16 / int(sizeof(typename G::Storage));
  const GradientTransform<T> transform = gradient_transform<T>(args.scaling);
  if (transform.is_identity() && !args.nonfinite_out) return;  // nothing to do and nothing to look for

  const Chunk chunk = args.chunks[blockIdx.x];
  const void* base = grad_of(args, table, chunk.tensor).grad;
  if (!base) return;
  const Split split = Split::peeled<G, V>(base, chunk.numel, chunk.index);
  const Stream<G, V> grad(base, split.first);
  bool nonfinite = false;
  const auto scale = [&](typename G::Storage stored) {
    const T raw = T(G::decode(stored));
    nonfinite |= !(raw - raw == T(0));
    return G::encode(typename G::Compute(transform(raw)));
  };
  for (int i = int(threadIdx.x) * V; i < split.vectored; i += kThreads * V) {
    const Vector<G, V> vector = grad.load(i);
    Vector<G, V> scaled;
#pragma unroll
    for (int e = 0; e < V; ++e) scaled.set(e, scale(vector.get(e)));
    grad.store(i, scaled);
  }
  if (int(threadIdx.x) < split.scalars) {
    const int i = split.scalar(threadIdx.x);
    grad.base[i] = scale(grad.base[i]);
  }
  if (nonfinite && args.nonfinite_out) *args.nonfinite_out = 1.0f;
}

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
