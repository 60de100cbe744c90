// The norm pass: sum, non-finite flag, and from them the clip coefficient.
#pragma once

#include "gradients.cuh"

namespace fusedopt {
namespace FUSEDOPT_ISA {

// Sums in float over the few elements of one load, in double over everything else. A float sum that has
// overflowed, or is so small that squares may have vanished, is done again in double: finite gradients
// never give an infinite norm, whatever their size.
//
// G, M: as GradStream.
template <class G, class M, NormType kType, Tuning kTuning>
struct Norm {
  using T = typename G::Compute;
  using Stored = GradVector<G, M, 16 / int(sizeof(typename G::Storage))>;
  static constexpr int V = 16 / int(sizeof(typename G::Storage));
  static constexpr bool kHasMain = !is_same<M, NoMain>;
  // Two streams have as much in flight with half the elements.
  static constexpr int kElements = FUSEDOPT_NORM_ELEMENTS(kTuning) / (kHasMain ? 2 : 1);
  static constexpr int kVectors = maximum(1, kElements / V);
  static constexpr int kRound = kThreads * kVectors * V;
  static_assert(kVectors >= 1 && kChunk % kRound == 0, "a chunk is a whole number of rounds");

  GradientTransform<T> transform;
  bool clamps;
  double sum = 0.0;
  bool nonfinite = false;

  __device__ __forceinline__ explicit Norm(const PassArgs& args) : transform(gradient_transform<T>(args.scaling)) {
    clamps = transform.clamps();
  }

  static __device__ __forceinline__ T magnitude(T x) { return x < T(0) ? -x : x; }

  __device__ __forceinline__ void add(T raw) {
    nonfinite |= !(raw - raw == T(0));
    sum = accumulate(sum, double(magnitude(transform.clamp(raw))), kType);
  }

  __device__ __forceinline__ void add(const Stored (&vectors)[kVectors], const GradSource& source) {
    if (sizeof(T) == 4 && !clamps) {
      float quick = 0.0f;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        T values[V];
        decode(vectors[j], source, transform.weight, values);
#pragma unroll
        for (int e = 0; e < V; ++e) quick = accumulate(quick, float(magnitude(values[e] * transform.inv_scale)), kType);
      }
      if (quick > 1e-30f && quick < 1e38f) {
        sum = combine(sum, double(quick), kType);
        return;
      }
    }
#pragma unroll  // a run-time index would put the vectors into local memory, on the quick way too
    for (int j = 0; j < kVectors; ++j) {
      T values[V];
      decode(vectors[j], source, transform.weight, values);
#pragma unroll
      for (int e = 0; e < V; ++e) add(values[e]);
    }
  }

  // Vectors begin where the stream that is read is aligned: this step's own gradients, if there are any.
  static __device__ __forceinline__ Split split_of(const GradSource& source, const void* main_grad,
                                                   const Chunk& chunk) {
    if constexpr (kHasMain)
      if (!source.grad) return Split::peeled<M, V>(main_grad, chunk.numel, chunk.index);
    return Split::peeled<G, V>(source.grad, chunk.numel, chunk.index);
  }

  template <class Table>
  __device__ __forceinline__ void add_chunk(const PassArgs& args, const Table& table, const Chunk& chunk) {
    const GradSource source = grad_of(args, table, chunk.tensor);
    if (!source.any()) return;
    const void* const main_grad = kHasMain ? args.tensors[chunk.tensor].main_grad : nullptr;
    const Split split = split_of(source, main_grad, chunk);
    const GradStream<G, M, V> grad(source, main_grad, split.first);
    for (int round = 0; round < split.vectored; round += kRound) {
      Stored vectors[kVectors];
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const int i = round + (j * kThreads + int(threadIdx.x)) * V;
        if (i < split.vectored)
          vectors[j] = grad.load(i, V);
        else
          vectors[j] = Stored{};
      }
      add(vectors, source);
    }
    if (int(threadIdx.x) < split.scalars) {
      T value[1];
      decode(grad.scalar(split.scalar(threadIdx.x)), source, transform.weight, value);
      add(value[0]);
    }
  }
};

// Thread 0 receives the block's total. Always in the same order.
template <NormType kType>
__device__ __forceinline__ CudaPartial reduce_block(double sum, bool nonfinite) {
  __shared__ double warp_sums[kThreads / 32];
  const bool any = __syncthreads_or(nonfinite);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    sum = combine(sum, __shfl_down_sync(0xffffffffu, sum, distance), kType);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kThreads / 32; ++warp) sum = combine(sum, warp_sums[warp], kType);
  return {sum, any ? 1.0 : 0.0};
}

template <NormType kType>
__device__ __forceinline__ void finish_norm(const PassArgs& args) {
  double sum = 0.0;
  bool nonfinite = false;
  for (int i = threadIdx.x; i < args.num_partials; i += kThreads) {
    const volatile CudaPartial& partial = args.partials[i];
    sum = combine(sum, partial.sum, kType);
    nonfinite |= partial.nonfinite > 0.0;
  }
  const CudaPartial total = reduce_block<kType>(sum, nonfinite);
  if (threadIdx.x != 0) return;
  args.control->sum = total.sum;
  args.control->nonfinite = total.nonfinite;
  if (args.finalize) finalize_norm(*args.control, total.sum, total.nonfinite, args.norm);
}

template <class G, class M, NormType kType, Tuning kTuning, class Table>
__device__ __forceinline__ void norm_pass(const PassArgs& args, const Table& table) {
  __shared__ bool last;
  let_next_pass_begin();
  // Asked for before the scale, which is read and divided by meanwhile.
  Chunk next = int(blockIdx.x) < args.num_chunks ? args.chunks[blockIdx.x] : Chunk{0, 0, 0};
  Norm<G, M, kType, kTuning> norm(args);
  for (int c = blockIdx.x; c < args.num_chunks; c += gridDim.x) {
    const Chunk chunk = next;
    if (c + int(gridDim.x) < args.num_chunks) next = args.chunks[c + gridDim.x];  // while this one is under way
    norm.add_chunk(args, table, chunk);
  }
  const CudaPartial partial = reduce_block<kType>(norm.sum, norm.nonfinite);
  if (threadIdx.x == 0) {
    args.partials[args.first_partial + blockIdx.x] = partial;
    last = take_ticket(&args.control->ticket, gridDim.x) && args.num_partials > 0;
  }
  __syncthreads();
  if (last) finish_norm<kType>(args);
}

// Combines the totals of several devices, which the host has gathered in args.partials.
__device__ __forceinline__ void finalize_pass(const PassArgs& args) {
  double sum = 0.0, nonfinite = 0.0;
  for (int i = 0; i < args.num_partials; ++i) {
    sum = combine(sum, args.partials[i].sum, args.norm.type);
    nonfinite += args.partials[i].nonfinite;
  }
  finalize_norm(*args.control, sum, nonfinite, args.norm);
}

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
