// The update pass: load, transform the gradient, apply the rule, store.
//
// One thread block works on one chunk, round by round: it loads every vector of a round before it uses the first, so
// that memory has as much in flight as the registers can hold.
#pragma once

#include "../core/norms.h"
#include "../formats/state.h"
#include "../rules/all.h"
#include "gradients.cuh"

namespace fusedopt {
namespace FUSEDOPT_ISA {

__device__ __forceinline__ bool must_skip(const PassArgs& args) {
  const float asked = args.scaling.found_inf ? *args.scaling.found_inf : 0.0f;
  const float found = args.norm_found_inf ? *args.norm_found_inf : 0.0f;  // read whatever was asked: one wait, not two
  return (asked != 0.0f) | (found != 0.0f);
}

__device__ __forceinline__ uint32 warp_maximum(uint32 x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, x);
#else
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
#endif
}

// The steps that a tensor has taken, for the threads of `BlockPlan::prepare` that want to know.
__device__ __forceinline__ float steps_taken(const TensorEntry& tensor) {
  return threadIdx.x % 64 == 0 ? *static_cast<volatile float*>(tensor.step) : 0.0f;
}

// What all threads of a block need to know, worked out by some of them, in different warps, while loads are under way.
template <class Rule, class T>
struct BlockPlan {
  typename Rule::template Coefficients<T> coefficients;
  GradientTransform<T> transform;
  RandomStream random;
  DitherKey dither;
  float step;  // taken before this one
  bool skip;

  // taken: of `steps_taken`. kScales: whether it is the second phase of a rule of two.
  template <bool kNoise, bool kScales, class Table>
  __device__ __forceinline__ void prepare(const PassArgs& args, const Table& table, const TensorEntry& tensor,
                                          float taken) {
    if (kNoise && threadIdx.x == 64) {
      random = {args.seed, tensor.id, uint32(taken) + 1};
      dither = dither_key(random);
    } else if (threadIdx.x == 0) {
      step = taken;
      const Hyper hyper = hyper_of(args, table, tensor.group);
      coefficients = Rule::template prepare<T>(hyper.value, double(step) + 1.0);
      if constexpr (kScales) {
        double norms[kNorms<Rule>];
#pragma unroll
        for (int k = 0; k < kNorms<Rule>; ++k) norms[k] = square_root(tensor.norms[k]);
        Rule::template scale<T>(coefficients, hyper.value, norms);
      }
    }
  }

  // What depends on the norm, where one was taken.
  template <class Table>
  __device__ __forceinline__ void prepare_transform(const PassArgs& args, const Table& table,
                                                    const TensorEntry& tensor) {
    if (threadIdx.x != 32) return;
    skip = must_skip(args);
    transform = gradient_transform<T>(args.scaling);
    if (hyper_of(args, table, tensor.group).maximize) transform.clip_coef = -transform.clip_coef;
  }
};

// A tensor's step is counted by the last of its blocks to have read it. Called by one thread.
__device__ __forceinline__ void count_step(TensorEntry& tensor, float step, int blocks, bool skip) {
  const bool last = blocks == 1 || take_ticket(&tensor.ticket, uint32(blocks));
  if (last && !skip) *tensor.step = step + 1.0f;
}

// Called by one thread of the launch.
__device__ __forceinline__ void record(const PassArgs& args, bool skip) {
  if (!args.lead || !args.control) return;
  args.control->skipped = skip ? 1.0f : 0.0f;
  args.control->skipped_steps += skip;
}

// G, M: as GradStream.
template <class Rule, class P, class G, class S, class M, Tuning kTuning>
struct Update {
  using T = typename P::Compute;
  static constexpr int kStates = Rule::kStates;
  static constexpr int kSlots = fusedopt::kSlots<Rule>;
  static constexpr bool kRooted = kStates == 1 && Rule::moment(0) == Moment::kSecond;
  static constexpr bool kHasExtra = !is_same<typename P::Extra, NoExtra>;
  // Bytes of an element. What accompanies the parameter is not counted among the smallest.
  static constexpr int kSmallest =
      minimum(sizeof(typename P::Main::Storage), minimum(sizeof(typename G::Storage), sizeof(typename S::Storage)));
  static constexpr int kLargest =
      maximum(maximum(sizeof(typename P::Main::Storage), sizeof(typename P::Extra::Storage)),
              maximum(maximum(sizeof(typename G::Storage), sizeof(typename M::Storage)), sizeof(typename S::Storage)));
  // Elements that are encoded together lie in one vector (random bits) or in one warp's vectors (blocks).
  static constexpr bool kRandom = P::kRandom || S::kRandom;
  static constexpr bool kNoise = kRandom || S::kDithered;
  static constexpr bool kGrouped = kNoise || S::kBlocked;
  static constexpr int V = kGrouped ? kRandomGroup : 16 / kLargest;
  static constexpr int kVectors = FUSEDOPT_ELEMENTS(kTuning, kSmallest, kLargest) / V;  // per thread and round
  static constexpr int kFitting = FUSEDOPT_UPDATE_BLOCKS(kTuning, kSmallest, kLargest, kHasExtra, kRooted);
  // A main gradient, as a third state, takes the registers of a block, where there are more than two.
  static constexpr int kMore = int(GradStream<G, M, V>::kHasMain) + int(kStates > 2);
  static constexpr int kBlocksPerMultiprocessor = kFitting > 2 ? maximum(2, kFitting - kMore) : kFitting;
  static constexpr int kRound = kThreads * kVectors * V;
  // Whether the next round is brought to the L2 cache while one is computed: where arithmetic takes as long as memory,
  // blocks alone do not hide the one behind the other. Chunks of many rounds gain nothing from sharing them out.
  static constexpr bool kFetchesAhead = S::kBlocked;
  static constexpr bool kSharesRounds = !S::kBlocked;
  static_assert(kVectors >= 1 && kChunk % kRound == 0, "a chunk is a whole number of rounds");
  static_assert(!kNoise || V == kRandomGroup, "a vector is a draw");
  static_assert(!S::kBlocked || (V * 32 == kStateBlock && kChunk % kStateBlock == 0), "a warp's vector is a block");

  struct Registers {
    Vector<typename P::Main, V> param[kVectors];
    Vector<typename P::Extra, V> extra[kVectors];
    GradVector<G, M, V> grad[kVectors];
    Vector<S, V> state[kSlots][kVectors];
  };

  Stream<typename P::Main, V> param;
  Stream<typename P::Extra, V> extra;
  GradStream<G, M, V> grad;
  Stream<S, V> state[kSlots];
  float* units[kSlots];  // of this chunk's blocks
  int vectored;
  int stride;

  __device__ __forceinline__ Update(const TensorEntry& tensor, const GradSource& source, const Split& split)
      : param(tensor.param, split.first),
        extra(tensor.extra, split.first),
        grad(source, GradStream<G, M, V>::kHasMain ? tensor.main_grad : nullptr, split.first),
        vectored(split.vectored),
        stride(kSharesRounds ? split.stride : kRound) {
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      state[k] = Stream<S, V>(tensor.states[k], split.first);
      if constexpr (S::kBlocked) {
        units[k] = tensor.scales[k] + split.first / kStateBlock;
        __builtin_assume(__isGlobal(units[k]));
      }
    }
  }

  static __device__ __forceinline__ Split split(const TensorEntry& tensor, const Chunk& chunk) {
    Split split = kGrouped ? Split::grouped(chunk.numel, chunk.index)
                           : Split::template peeled<typename P::Main, V>(tensor.param, chunk.numel, chunk.index);
    split.template in_rounds<kRound, kSharesRounds>(chunk);
    return split;
  }

  // Where a vector of this thread begins.
  static __device__ __forceinline__ int in_round(int j) { return (j * kThreads + int(threadIdx.x)) * V; }
  __device__ __forceinline__ int offset(int round, int j) const { return round * stride + in_round(j); }

  // How many rounds can do without looking at alignment and ends.
  __device__ __forceinline__ int whole_rounds() const {
    bool aligned = param.aligned && extra.aligned && grad.aligned();
#pragma unroll
    for (int k = 0; k < kStates; ++k) aligned = aligned && state[k].aligned;
    return aligned ? vectored / kRound : 0;
  }

  __device__ __forceinline__ void prefetch(int round) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int i = offset(round, j);
      if (P::kReadsMain) param.prefetch(i);
      extra.prefetch(i);
      grad.prefetch(i);
#pragma unroll
      for (int k = 0; k < kStates; ++k) state[k].prefetch(i);
    }
  }

  __device__ __forceinline__ void load_whole(Registers& r, int round) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int i = offset(round, j);
      if (P::kReadsMain) r.param[j] = param.load_aligned(i);
      r.extra[j] = extra.load_aligned(i);
      r.grad[j] = grad.load_aligned(i);
#pragma unroll
      for (int k = 0; k < kStates; ++k) r.state[k][j] = state[k].load_aligned(i);
    }
  }

  // One of `whole` rounds. Asks for the one behind it.
  __device__ __forceinline__ void load_ahead(Registers& r, int round, int whole) const {
    load_whole(r, round);
    if (kFetchesAhead && round + 1 < whole) prefetch(round + 1);
  }

  // How many elements of a vector exist. Only in grouped formats may it be a part of one.
  __device__ __forceinline__ int count(int round, int j) const {
    const int left = vectored - round * kRound - in_round(j);
    return kGrouped ? left : (left > 0 ? V : 0);
  }

  __device__ __forceinline__ void load_part(Registers& r, int round) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int i = offset(round, j);
      const int n = count(round, j);
      if (n <= 0 && !S::kBlocked) continue;
      if (P::kReadsMain) r.param[j] = param.load(i, n);
      r.extra[j] = extra.load(i, n);
      r.grad[j] = grad.load(i, n);
#pragma unroll
      for (int k = 0; k < kStates; ++k) r.state[k][j] = state[k].load(i, n);
    }
  }

  using Plan = BlockPlan<Rule, T>;

  template <int N>
  static __device__ __forceinline__ void decode_state(const Vector<S, N>& stored, float unit, int k, T (&values)[N]) {
    if constexpr (S::kBlocked) {
#pragma unroll
      for (int e = 0; e < N; ++e) values[e] = S::decode(stored.get(e), unit, Rule::moment(k));
    } else if constexpr (S::kRounded) {
      decode(reinterpret_cast<const Vector<typename S::Plain, N>&>(stored), values);
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) values[e] = S::decode(stored.get(e));
    }
  }

  // What a vector's elements are encoded with besides their values.
  struct Noise {
    Random128 random;
    uint32 dither;
  };

  __device__ __forceinline__ Noise noise(const Plan& plan, uint64 element) const {
    Noise result = {};
    if constexpr (kRandom) result.random = draw(plan.random, element / kRandomGroup);
    if constexpr (S::kDithered) result.dither = dither_base(plan.dither, element / kRandomGroup);
    return result;
  }

  template <int N>
  static __device__ __forceinline__ void encode_state(const T (&values)[N], const Noise& noise, int k,
                                                      Vector<S, N>& stored, float& unit) {
    if constexpr (S::kBlocked) {
      uint32 largest = 0;
#pragma unroll
      for (int e = 0; e < N; ++e) largest = max(largest, S::magnitude(values[e], Rule::moment(k)));
      unit = S::unit_of(warp_maximum(largest));
      const float reciprocal = S::reciprocal(unit);
      uint32 words[N];
#pragma unroll
      for (int e = 0; e < N; ++e)
        words[e] = S::encode_word(values[e], reciprocal, dither_of(noise.dither, e), Rule::moment(k));
      pack<1, 3>(words, stored);
    } else if constexpr (S::kRounded) {
      encode(values, reinterpret_cast<Vector<typename S::Plain, N>&>(stored));
    } else {
      uint32 words[N];
#pragma unroll
      for (int e = 0; e < N; ++e) words[e] = S::word(values[e], bits_of(noise.random, bits_for_state(e, k)));
      pack<2, 2>(words, stored);
    }
  }

  template <int N>
  static __device__ __forceinline__ void encode_param(const T (&values)[N], const Noise& noise,
                                                      Vector<typename P::Main, N>& main,
                                                      Vector<typename P::Extra, N>& extra) {
    if constexpr (P::kRounded) {
      encode(values, main);
      if constexpr (kHasExtra) {
#pragma unroll
        for (int e = 0; e < N; ++e) extra.set(e, values[e]);
      }
    } else {
      uint32 words[N], carried[N];
#pragma unroll
      for (int e = 0; e < N; ++e) {
        words[e] = P::word(values[e], P::kRandom ? bits_of(noise.random, e) : 0);
        carried[e] = words[e] + P::kCarry;
      }
      pack<2, 2>(carried, main);
      if constexpr (kHasExtra) pack<sizeof(typename P::Extra::Storage), P::kExtraByte>(words, extra);
    }
  }

  // A vector of every stream as numbers, the gradient transformed.
  template <int N>
  static __device__ __forceinline__ void decode_all(const Vector<typename P::Main, N>& main,
                                                    const Vector<typename P::Extra, N>& extra,
                                                    const GradVector<G, M, N>& grad, const GradSource& source,
                                                    Vector<S, N>* const (&state)[kSlots], const float (&unit)[kSlots],
                                                    const Plan& plan, T (&p)[N], T (&g)[N], T (&s)[kSlots][N]) {
#pragma unroll
    for (int e = 0; e < N; ++e) p[e] = P::decode(main.get(e), extra.get(e));
    decode(grad, source, plan.transform.weight, g);
#pragma unroll
    for (int k = 0; k < kStates; ++k) decode_state(*state[k], unit[k], k, s[k]);
    const bool clamps = plan.transform.clamps();
#pragma unroll
    for (int e = 0; e < N; ++e) g[e] = clamps ? plan.transform(g[e]) : plan.transform.without_clamp(g[e]);
  }

  template <int N>
  static __device__ __forceinline__ void update(Vector<typename P::Main, N>& main, Vector<typename P::Extra, N>& extra,
                                                const GradVector<G, M, N>& grad, const GradSource& source,
                                                Vector<S, N>* const (&state)[kSlots], float (&unit)[kSlots],
                                                const Noise& noise, const Plan& plan) {
    T p[N], g[N], s[kSlots][N];
    decode_all(main, extra, grad, source, state, unit, plan, p, g, s);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      T own[kSlots];
#pragma unroll
      for (int k = 0; k < kStates; ++k) own[k] = s[k][e];
      Rule::template update<T>(p[e], g[e], own, plan.coefficients);
#pragma unroll
      for (int k = 0; k < kStates; ++k) s[k][e] = own[k];
    }
    encode_param(p, noise, main, extra);
#pragma unroll
    for (int k = 0; k < kStates; ++k) encode_state(s[k], noise, k, *state[k], unit[k]);
  }

  // The units of a warp's blocks in all whole rounds of a chunk: lane r holds those of round r, so that they are loaded
  // and stored once, side by side.
  struct Units {
    float held[S::kBlocked ? kSlots : 1];
  };
  static_assert(!S::kBlocked || (kVectors == 1 && kChunk / kRound <= 32), "a lane holds one unit for each state");

  // Of this thread's warp in the round that is this thread's lane.
  __device__ __forceinline__ float* unit_of_lane(int k) const {
    return units[k] + offset(int(threadIdx.x % 32), 0) / kStateBlock;
  }

  __device__ __forceinline__ Units load_units(int whole) const {
    Units loaded = {};
    if constexpr (S::kBlocked) {
#pragma unroll
      for (int k = 0; k < kStates; ++k)
        if (int(threadIdx.x % 32) < whole) loaded.held[k] = *unit_of_lane(k);
    }
    return loaded;
  }

  __device__ __forceinline__ void store_units(const Units& updated, int whole) const {
    if constexpr (S::kBlocked) {
#pragma unroll
      for (int k = 0; k < kStates; ++k)
        if (int(threadIdx.x % 32) < whole) *unit_of_lane(k) = updated.held[k];
    }
  }

  __device__ __forceinline__ void compute_and_store_whole(Registers& r, int round, int64 first, const Plan& plan,
                                                          Units& all) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int i = offset(round, j);
      Vector<S, V>* s[kSlots];
      float unit[kSlots] = {};
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        s[k] = &r.state[k][j];
        if constexpr (S::kBlocked) unit[k] = __shfl_sync(0xffffffffu, all.held[k], round);
      }
      update<V>(r.param[j], r.extra[j], r.grad[j], grad.source, s, unit, noise(plan, uint64(first + i)), plan);
      param.store_aligned(i, r.param[j]);
      extra.store_aligned(i, r.extra[j]);
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        state[k].store_aligned(i, r.state[k][j]);
        if constexpr (S::kBlocked) all.held[k] = int(threadIdx.x % 32) == round ? unit[k] : all.held[k];
      }
    }
  }

  __device__ __forceinline__ void compute_and_store_part(Registers& r, int round, int64 first, const Plan& plan) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int i = offset(round, j);
      const int n = count(round, j);
      if (n <= 0 && !S::kBlocked) continue;  // a warp whose block has a part of its elements stays together
      Vector<S, V>* s[kSlots];
      float unit[kSlots] = {};
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        s[k] = &r.state[k][j];
        if (S::kBlocked && n > 0) unit[k] = units[k][i / kStateBlock];
      }
      update<V>(r.param[j], r.extra[j], r.grad[j], grad.source, s, unit, noise(plan, uint64(first + i)), plan);
      param.store(i, r.param[j], n);
      extra.store(i, r.extra[j], n);
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        state[k].store(i, r.state[k][j], n);
        if (S::kBlocked && threadIdx.x % 32 == 0 && n > 0) units[k][i / kStateBlock] = unit[k];
      }
    }
  }

  // One element, as a vector of length 1. Not in grouped formats.
  __device__ __forceinline__ void scalar(int i, const Plan& plan) const {
    if constexpr (!kGrouped) {
      Vector<typename P::Main, 1> p;
      p.set(0, param.base[i]);
      Vector<typename P::Extra, 1> x = {};
      if constexpr (kHasExtra) x.set(0, extra.base[i]);
      Vector<S, 1> own[kSlots];
      Vector<S, 1>* s[kSlots];
      float unit[kSlots] = {};
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        own[k].set(0, state[k].base[i]);
        s[k] = &own[k];
      }
      update<1>(p, x, grad.scalar(i), grad.source, s, unit, Noise{}, plan);
      param.base[i] = p.get(0);
      if constexpr (kHasExtra) extra.base[i] = x.get(0);
#pragma unroll
      for (int k = 0; k < kStates; ++k) state[k].base[i] = own[k].get(0);
    }
  }
};

// Loads a chunk's first round while some threads work out the block's plan, which `__syncthreads` makes known to all.
// The norm pass has ended when it returns.
template <bool kNoise, bool kScales, Tuning kTuning, class Pass, class Table>
__device__ __forceinline__ void begin_chunk(const Pass& pass, typename Pass::Registers& registers, int whole,
                                            typename Pass::Plan& plan, const PassArgs& args, const Table& table,
                                            const TensorEntry& tensor) {
  // Where a block's latency counts, the warps with the plan work it out before they queue for memory with the others.
  constexpr bool kEarly = kTuning == Tuning::kLatency;
  if (kEarly) plan.template prepare<kNoise, kScales>(args, table, tensor, steps_taken(tensor));
  const bool after_norm = kOverlaps && args.norm_found_inf;
  if (kEarly && !after_norm) plan.prepare_transform(args, table, tensor);
  if (whole > 0)
    pass.load_ahead(registers, 0, whole);
  else
    pass.load_part(registers, 0);
  if (!kEarly) plan.template prepare<kNoise, kScales>(args, table, tensor, steps_taken(tensor));
  wait_for_norm();
  if (!kEarly || after_norm) plan.prepare_transform(args, table, tensor);
}

template <class Rule, class P, class G, class S, class M, Tuning kTuning, class Table>
__device__ __forceinline__ void update_pass(const PassArgs& args, const Table& table) {
  using Pass = Update<Rule, P, G, S, M, kTuning>;
  __shared__ typename Pass::Plan shared_plan;

  const Chunk chunk = args.chunks[blockIdx.x];
  const GradSource grad = grad_of(args, table, chunk.tensor);
  if (!grad.any()) {
    wait_for_norm();
    if (blockIdx.x == 0 && threadIdx.x == 0) record(args, must_skip(args));
    return;
  }
  TensorEntry& tensor = args.tensors[chunk.tensor];
  const Split split = Pass::split(tensor, chunk);
  const Pass pass(tensor, grad, split);
  const int whole = pass.whole_rounds();
  typename Pass::Registers registers;
  begin_chunk<Pass::kNoise, (kNorms<Rule> > 0), kTuning>(pass, registers, whole, shared_plan, args, table, tensor);
  __syncthreads();
  const auto& plan = shared_plan;
  if (threadIdx.x == 0) {
    if (blockIdx.x == 0) record(args, plan.skip);
    count_step(tensor, plan.step, tensor.chunks, plan.skip);
  }
  if (plan.skip) return;

  int round = 0;
  auto units = pass.load_units(whole);
#pragma unroll 1
  for (; round < whole; ++round) {
    if (round > 0) pass.load_ahead(registers, round, whole);
    pass.compute_and_store_whole(registers, round, split.first, plan, units);
  }
  pass.store_units(units, whole);
#pragma unroll 1
  for (; round * Pass::kRound < split.vectored; ++round) {
    if (round > 0) pass.load_part(registers, round);
    pass.compute_and_store_part(registers, round, split.first, plan);
  }
  if (int(threadIdx.x) < split.scalars) pass.scalar(split.scalar(threadIdx.x), plan);
}

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
