// How the passes read gradients: one stream, or, where gradients are accumulated, two that are added up.
#pragma once

#include "launch.cuh"
#include "vectors.cuh"

namespace fusedopt {
namespace FUSEDOPT_ISA {

// The format of the main gradient in kernels that know none.
using NoMain = NoExtra;

template <class G, class M, int V>
struct GradVector {
  Vector<G, V> own;
  Vector<M, V> main;
};

// G: format of the gradients of this step. M: of the main gradient, or NoMain.
template <class G, class M, int V>
struct GradStream {
  static constexpr bool kHasMain = !is_same<M, NoMain>;
  Stream<G, V> own;
  Stream<M, V> main;
  GradSource source;

  // `first` is where the chunk's vectors begin.
  __device__ __forceinline__ GradStream(const GradSource& from, const void* main_grad, int64 first)
      : own(from.grad, first), main(main_grad, first), source(from) {}

  __device__ __forceinline__ bool reads_own() const { return !kHasMain || source.grad; }
  __device__ __forceinline__ bool reads_main() const { return kHasMain && source.has_main; }
  __device__ __forceinline__ bool aligned() const {
    return (own.aligned || !reads_own()) && (main.aligned || !reads_main());
  }

  __device__ __forceinline__ void prefetch(int i) const {
    if (reads_own()) own.prefetch(i);
    if (reads_main()) main.prefetch(i);
  }

  __device__ __forceinline__ GradVector<G, M, V> load_aligned(int i) const {
    GradVector<G, M, V> vector = {};
    if (reads_own()) vector.own = own.load_aligned(i);
    if (reads_main()) vector.main = main.load_aligned(i);
    return vector;
  }

  __device__ __forceinline__ GradVector<G, M, V> load(int i, int n) const {
    GradVector<G, M, V> vector = {};
    if (reads_own()) vector.own = own.load(i, n);
    if (reads_main()) vector.main = main.load(i, n);
    return vector;
  }

  __device__ __forceinline__ GradVector<G, M, 1> scalar(int i) const {
    GradVector<G, M, 1> vector = {};
    if (reads_own()) vector.own.set(0, own.base[i]);
    if constexpr (kHasMain)
      if (source.has_main) vector.main.set(0, main.base[i]);
    return vector;
  }
};

template <class T, class G, class M, int N>
__device__ __forceinline__ void decode(const GradVector<G, M, N>& vector, const GradSource& source, T weight,
                                       T (&values)[N]) {
  decode(vector.own, values);
  if constexpr (!is_same<M, NoMain>) {
    T main[N];
    decode(vector.main, main);
#pragma unroll
    for (int e = 0; e < N; ++e) values[e] = source.sum(values[e], main[e], weight);
  }
}

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
