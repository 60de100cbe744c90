// The CUDA engine: norm, update and scale passes over a table, compiled at run time by NVRTC for the
// combination in use. fusedopt/backends/nvrtc.py writes the entry points, which call these templates.
//
// One thread block works on one chunk: it loads every vector of every stream before it uses the first, so that
// memory has as much in flight as the registers can hold.
#pragma once

#include "../core/gradient.h"
#include "../formats/plain.h"
#include "../rules/all.h"
#include "args.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

constexpr int kThreads = 256;
constexpr int kChunk = FUSEDOPT_CHUNK;  // elements; fusedopt/backends/nvrtc.py sets it

// What the update pass is tuned for. Large models are bound by memory: few blocks with much in flight are best for
// elements of 4 bytes; with 2 bytes arithmetic takes as long as memory, and more warps hide its latency. Models of a
// few million parameters are bound by the latency of one block, so more blocks must run at once.
enum class Tuning { kBandwidth, kLatency };

// How many elements a thread loads at once, and how many blocks share a multiprocessor, by the size of the smallest
// element. The macros are for trying others.
#ifndef FUSEDOPT_ELEMENTS
#define FUSEDOPT_ELEMENTS(tuning, bytes) ((tuning) == Tuning::kBandwidth && (bytes) == 4 ? 16 : 8)
#endif
#ifndef FUSEDOPT_UPDATE_BLOCKS
#define FUSEDOPT_UPDATE_BLOCKS(tuning, bytes) ((bytes) == 2 || ((tuning) == Tuning::kLatency && (bytes) == 4) ? 4 : 2)
#endif
#ifndef FUSEDOPT_NORM_ELEMENTS
#define FUSEDOPT_NORM_ELEMENTS 32
#endif
#ifndef FUSEDOPT_NORM_BLOCKS
#define FUSEDOPT_NORM_BLOCKS 4
#endif

// The step table as a kernel parameter: no copy to the device, and a captured graph keeps it.
template <int kBytes>
struct StepTable {
  alignas(16) char bytes[kBytes];
};

// ---- vectors ------------------------------------------------------------------------------------------

constexpr FUSEDOPT_HD int minimum(int a, int b) { return a < b ? a : b; }

template <class Format, int V>
struct alignas(minimum(16, V* int(sizeof(typename Format::Storage)))) Vector {
  typename Format::Storage lane[V];
};

template <class T, class Format, int V>
__device__ __forceinline__ void decode(const Vector<Format, V>& vector, T (&values)[V]) {
#pragma unroll
  for (int e = 0; e < V; ++e) values[e] = T(Format::decode(vector.lane[e]));
}

template <class T, class Format, int V>
__device__ __forceinline__ void encode(const T (&values)[V], Vector<Format, V>& vector) {
  if constexpr (sizeof(typename Format::Storage) == 2 && V % 2 == 0) {
#pragma unroll
    for (int e = 0; e < V; e += 2)
      reinterpret_cast<uint32*>(vector.lane)[e / 2] = Format::encode_pair(float(values[e]), float(values[e + 1]));
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) vector.lane[e] = Format::encode(typename Format::Compute(values[e]));
  }
}

// A stream is one array of a tensor, from the first element of a chunk on.
template <class Format, int V>
struct Stream {
  using Storage = typename Format::Storage;
  Storage* base;
  bool aligned;  // one access per vector; else one per element

  // `first` is where the chunk's vectors begin.
  __device__ __forceinline__ Stream(const void* tensor, int64 first)
      : base(static_cast<Storage*>(const_cast<void*>(tensor)) + first),
        aligned(reinterpret_cast<uint64>(base) % alignof(Vector<Format, V>) == 0) {
    __builtin_assume(__isGlobal(base));  // the address comes from a table, which says nothing of its space
  }
  Stream() = default;

  __device__ __forceinline__ Vector<Format, V> load(int i) const {
    Vector<Format, V> vector;
    if (aligned) {
      vector = *reinterpret_cast<const Vector<Format, V>*>(base + i);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) vector.lane[k] = base[i + k];
    }
    return vector;
  }

  __device__ __forceinline__ void store(int i, const Vector<Format, V>& vector) const {
    if (aligned) {
      *reinterpret_cast<Vector<Format, V>*>(base + i) = vector;
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) base[i + k] = vector.lane[k];
    }
  }
};

// How a chunk is split. Vectors begin at the tensor's first aligned element, `head` elements in, and chunk
// c holds elements [head + c * kChunk, head + (c + 1) * kChunk); chunk 0 takes the head as well. What does
// not fill a vector, at either end, is done element by element.
struct Split {
  int64 first;
  int vectored;  // elements in vectors, from `first` on
  int head;
  int scalars;  // head and tail together

  template <class Format, int V>
  static __device__ __forceinline__ Split of(const void* leading_stream, int64 numel, uint32 chunk_index) {
    const uint64 element = reinterpret_cast<uint64>(leading_stream) / sizeof(typename Format::Storage);
    const int64 head = int64((V - element % V) % V);
    Split split;
    split.first = head + int64(chunk_index) * kChunk;
    const int64 rest = numel - split.first;
    const int count = rest <= 0 ? 0 : int(rest < kChunk ? rest : kChunk);
    split.vectored = count / V * V;
    split.head = chunk_index == 0 ? int(head < numel ? head : numel) : 0;
    split.scalars = split.head + count - split.vectored;
    return split;
  }

  // The element, relative to `first`, that is done as scalar number `i`.
  __device__ __forceinline__ int scalar(int i) const { return i < head ? i - int(first) : vectored + i - head; }
};

// ---- the step table -----------------------------------------------------------------------------------

template <int kBytes>
__device__ __forceinline__ const void* grad_of(const PassArgs& args, const StepTable<kBytes>& table, int tensor) {
  const char* grads = table.bytes + args.num_groups * sizeof(Hyper);
  return reinterpret_cast<const void* const*>(grads)[tensor];
}

template <int kBytes>
__device__ __forceinline__ Hyper hyper_of(const PassArgs& args, const StepTable<kBytes>& table, int group) {
  Hyper hyper = reinterpret_cast<const Hyper*>(table.bytes)[group];
  if (hyper.lr)
    hyper.value[0] = hyper.lr_is_double ? *static_cast<const double*>(hyper.lr) : *static_cast<const float*>(hyper.lr);
  return hyper;
}

// Copies part of a step table that does not fit a kernel parameter to the device.
template <int kBytes>
__device__ __forceinline__ void upload(char* to, int bytes, const StepTable<kBytes>& table) {
  for (int i = threadIdx.x * 8; i < bytes; i += kThreads * 8)
    *reinterpret_cast<uint64*>(to + i) = *reinterpret_cast<const uint64*>(table.bytes + i);
}

// ---- update -------------------------------------------------------------------------------------------

__device__ __forceinline__ bool must_skip(const PassArgs& args) {
  const bool asked = args.scaling.found_inf && *args.scaling.found_inf != 0.0f;
  return asked || (args.norm_found_inf && *args.norm_found_inf != 0.0f);
}

// Whether this is the last block of the launch to come here; the counter is then 0 again.
__device__ __forceinline__ bool take_ticket(uint32* ticket) {
  __threadfence();
  return atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
}

// What all threads of a block need to know, worked out by two of them, in different warps, while loads are under way.
template <class Rule, class T>
struct BlockPlan {
  typename Rule::template Coefficients<T> coefficients;
  GradientTransform<T> transform;
  bool skip;

  template <class Table>
  __device__ __forceinline__ void prepare(const PassArgs& args, const Table& table, const TensorEntry& tensor) {
    if (threadIdx.x == 0) {
      const double step = double(*static_cast<volatile float*>(tensor.step)) + 1.0;
      coefficients = Rule::template prepare<T>(hyper_of(args, table, tensor.group).value, step);
    } else if (threadIdx.x == 32) {
      skip = must_skip(args);
      transform = gradient_transform<T>(args.scaling);
      if (hyper_of(args, table, tensor.group).maximize) transform.clip_coef = -transform.clip_coef;
    }
  }
};

// Every block takes part when it has read its tensor's step, so the last one may write all of them.
// Called by one thread; a block's other threads ask for the answer at its end.
__device__ __forceinline__ bool finish_reading(const PassArgs& args, bool skip) {
  if (blockIdx.x == 0 && args.lead && args.control) {
    args.control->skipped = skip ? 1.0f : 0.0f;
    args.control->skipped_steps += skip;
  }
  return take_ticket(args.ticket) && !skip;
}

template <class Table>
__device__ __forceinline__ void count_steps(const PassArgs& args, const Table& table) {
  for (int t = threadIdx.x; t < args.num_tensors; t += kThreads)
    if (grad_of(args, table, t)) *args.tensors[t].step += 1.0f;
}

template <class Rule, class P, class G, class S, Tuning kTuning>
struct Update {
  using T = typename P::Compute;
  static constexpr int kSmallest =
      minimum(sizeof(typename P::Storage), minimum(sizeof(typename G::Storage), sizeof(typename S::Storage)));
  static constexpr int V = 16 / kSmallest;
  static constexpr int kVectors = FUSEDOPT_ELEMENTS(kTuning, kSmallest) / V;  // per thread and round
  static constexpr int kBlocksPerMultiprocessor = FUSEDOPT_UPDATE_BLOCKS(kTuning, kSmallest);
  static constexpr int kRound = kThreads * kVectors * V;
  static_assert(kVectors >= 1 && kChunk % kRound == 0, "a chunk is a whole number of rounds");

  struct Registers {
    Vector<P, V> param[kVectors];
    Vector<G, V> grad[kVectors];
    Vector<S, V> state[Rule::kStates][kVectors];
  };

  Stream<P, V> param;
  Stream<G, V> grad;
  Stream<S, V> state[Rule::kStates];
  int vectored;

  __device__ __forceinline__ Update(const TensorEntry& tensor, const void* grads, const Split& split)
      : param(tensor.param, split.first), grad(grads, split.first), vectored(split.vectored) {
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) state[k] = Stream<S, V>(tensor.states[k], split.first);
  }

  static __device__ __forceinline__ int offset(int round, int j) {
    return round * kRound + (j * kThreads + int(threadIdx.x)) * V;
  }

  __device__ __forceinline__ void load(Registers& r, int round) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int i = offset(round, j);
      if (i >= vectored) continue;
      r.param[j] = param.load(i);
      r.grad[j] = grad.load(i);
#pragma unroll
      for (int k = 0; k < Rule::kStates; ++k) r.state[k][j] = state[k].load(i);
    }
  }

  using Plan = BlockPlan<Rule, T>;

  template <int N>
  static __device__ __forceinline__ void update(Vector<P, N>& param, const Vector<G, N>& grad,
                                                Vector<S, N>* const (&state)[Rule::kStates], const Plan& plan) {
    T p[N], g[N], s[Rule::kStates][N];
    decode(param, p);
    decode(grad, g);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) decode(*state[k], s[k]);
    const bool clamps = plan.transform.clamps();
#pragma unroll
    for (int e = 0; e < N; ++e) g[e] = clamps ? plan.transform(g[e]) : plan.transform.without_clamp(g[e]);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      T own[Rule::kStates];
#pragma unroll
      for (int k = 0; k < Rule::kStates; ++k) own[k] = s[k][e];
      Rule::template update<T>(p[e], g[e], own, plan.coefficients);
#pragma unroll
      for (int k = 0; k < Rule::kStates; ++k) s[k][e] = own[k];
    }
    encode(p, param);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) encode(s[k], *state[k]);
  }

  __device__ __forceinline__ void compute_and_store(Registers& r, int round, const Plan& plan) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int i = offset(round, j);
      if (i >= vectored) continue;
      Vector<S, V>* s[Rule::kStates];
#pragma unroll
      for (int k = 0; k < Rule::kStates; ++k) s[k] = &r.state[k][j];
      update<V>(r.param[j], r.grad[j], s, plan);
      param.store(i, r.param[j]);
#pragma unroll
      for (int k = 0; k < Rule::kStates; ++k) state[k].store(i, r.state[k][j]);
    }
  }

  // One element, as a vector of length 1.
  __device__ __forceinline__ void scalar(int i, const Plan& plan) const {
    Vector<P, 1> p = {{param.base[i]}};
    const Vector<G, 1> g = {{grad.base[i]}};
    Vector<S, 1> own[Rule::kStates];
    Vector<S, 1>* s[Rule::kStates];
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) {
      own[k].lane[0] = state[k].base[i];
      s[k] = &own[k];
    }
    update<1>(p, g, s, plan);
    param.base[i] = p.lane[0];
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) state[k].base[i] = own[k].lane[0];
  }
};

template <class Rule, class P, class G, class S, Tuning kTuning, class Table>
__device__ __forceinline__ void update_pass(const PassArgs& args, const Table& table) {
  using Pass = Update<Rule, P, G, S, kTuning>;
  __shared__ typename Pass::Plan shared_plan;
  __shared__ bool last;

  const void* grad = nullptr;
  Chunk chunk = {0, 0};
  if (int(blockIdx.x) < args.num_chunks) {
    chunk = args.chunks[blockIdx.x];
    grad = grad_of(args, table, chunk.tensor);
  }
  if (grad) {
    const TensorEntry& tensor = args.tensors[chunk.tensor];
    const Split split = Split::of<P, Pass::V>(tensor.param, tensor.numel, chunk.index);
    const Pass pass(tensor, grad, split);
    typename Pass::Registers registers;
    pass.load(registers, 0);
    shared_plan.prepare(args, table, tensor);
    __syncthreads();
    const auto plan = shared_plan;
    if (threadIdx.x == 0) last = finish_reading(args, plan.skip);
    if (!plan.skip) {
      pass.compute_and_store(registers, 0, plan);
#pragma unroll 1
      for (int round = 1; round < kChunk / Pass::kRound; ++round) {
        pass.load(registers, round);
        pass.compute_and_store(registers, round, plan);
      }
      if (int(threadIdx.x) < split.scalars) pass.scalar(split.scalar(threadIdx.x), plan);
    }
  } else if (threadIdx.x == 0) {
    last = finish_reading(args, must_skip(args));
  }
  __syncthreads();
  if (last) count_steps(args, table);
}

// ---- norm ---------------------------------------------------------------------------------------------

// Sums in float over the few elements of one load, in double over everything else. A float sum that has
// overflowed, or is so small that squares may have vanished, is done again in double: finite gradients
// never give an infinite norm, whatever their size.
template <class G, NormType kType>
struct Norm {
  using T = typename G::Compute;
  static constexpr int V = 16 / int(sizeof(typename G::Storage));
  static constexpr int kVectors = FUSEDOPT_NORM_ELEMENTS / V;
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

  __device__ __forceinline__ void add(typename G::Storage stored) {
    const T raw = T(G::decode(stored));
    nonfinite |= !(raw - raw == T(0));
    sum = accumulate(sum, double(magnitude(transform.clamp(raw))), kType);
  }

  __device__ __forceinline__ void add(const Vector<G, V> (&vectors)[kVectors]) {
    if (sizeof(T) == 4 && !clamps) {
      float quick = 0.0f;
#pragma unroll
      for (int j = 0; j < kVectors; ++j)
#pragma unroll
        for (int e = 0; e < V; ++e)
          quick = accumulate(quick, float(magnitude(T(G::decode(vectors[j].lane[e])) * transform.inv_scale)), kType);
      if (quick > 1e-30f && quick < 1e38f) {
        sum = combine(sum, double(quick), kType);
        return;
      }
    }
#pragma unroll  // a run-time index would put the vectors into local memory, on the quick way too
    for (int j = 0; j < kVectors; ++j)
#pragma unroll
      for (int e = 0; e < V; ++e) add(vectors[j].lane[e]);
  }

  template <class Table>
  __device__ __forceinline__ void add_chunk(const PassArgs& args, const Table& table, const Chunk& chunk) {
    const void* base = grad_of(args, table, chunk.tensor);
    if (!base) return;
    const Split split = Split::of<G, V>(base, args.tensors[chunk.tensor].numel, chunk.index);
    const Stream<G, V> grad(base, split.first);
    for (int round = 0; round < split.vectored; round += kRound) {
      Vector<G, V> vectors[kVectors];
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const int i = round + (j * kThreads + int(threadIdx.x)) * V;
        if (i < split.vectored)
          vectors[j] = grad.load(i);
        else
          vectors[j] = Vector<G, V>{};
      }
      add(vectors);
    }
    if (int(threadIdx.x) < split.scalars) add(grad.base[split.scalar(threadIdx.x)]);
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

template <class G, NormType kType, class Table>
__device__ __forceinline__ void norm_pass(const PassArgs& args, const Table& table) {
  __shared__ bool last;
  Norm<G, kType> norm(args);
  Chunk next = int(blockIdx.x) < args.num_chunks ? args.chunks[blockIdx.x] : Chunk{0, 0};
  for (int c = blockIdx.x; c < args.num_chunks; c += gridDim.x) {
    const Chunk chunk = next;
    if (c + int(gridDim.x) < args.num_chunks) next = args.chunks[c + gridDim.x];  // while this one is under way
    norm.add_chunk(args, table, chunk);
  }
  const CudaPartial partial = reduce_block<kType>(norm.sum, norm.nonfinite);
  if (threadIdx.x == 0) {
    args.partials[args.first_partial + blockIdx.x] = partial;
    last = take_ticket(&args.control->ticket) && args.num_partials > 0;
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

// ---- scale --------------------------------------------------------------------------------------------

template <class G, class Table>
__device__ __forceinline__ void scale_pass(const PassArgs& args, const Table& table) {
  using T = typename G::Compute;
  constexpr int V = 16 / int(sizeof(typename G::Storage));
  const GradientTransform<T> transform = gradient_transform<T>(args.scaling);
  if (transform.is_identity() && !args.nonfinite_out) return;  // nothing to do and nothing to look for

  const Chunk chunk = args.chunks[blockIdx.x];
  const void* base = grad_of(args, table, chunk.tensor);
  if (!base) return;
  const Split split = Split::of<G, V>(base, args.tensors[chunk.tensor].numel, chunk.index);
  const Stream<G, V> grad(base, split.first);
  bool nonfinite = false;
  const auto scale = [&](typename G::Storage& stored) {
    const T raw = T(G::decode(stored));
    nonfinite |= !(raw - raw == T(0));
    stored = G::encode(typename G::Compute(transform(raw)));
  };
  for (int i = int(threadIdx.x) * V; i < split.vectored; i += kThreads * V) {
    Vector<G, V> vector = grad.load(i);
#pragma unroll
    for (int e = 0; e < V; ++e) scale(vector.lane[e]);
    grad.store(i, vector);
  }
  if (int(threadIdx.x) < split.scalars) scale(grad.base[split.scalar(threadIdx.x)]);
  if (nonfinite && args.nonfinite_out) *args.nonfinite_out = 1.0f;
}

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
