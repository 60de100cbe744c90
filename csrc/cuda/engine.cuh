// The CUDA engine: norm, update and scale passes over a table, compiled at run time by NVRTC for the
// combination in use. fusedopt/backends/nvrtc.py writes the entry points, which call these templates.
//
// One thread block works on one chunk: it loads every vector of every stream before it uses the first, so that
// memory has as much in flight as the registers can hold.
#pragma once

#include "../core/gradient.h"
#include "../formats/state.h"
#include "../rules/all.h"
#include "args.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

constexpr int kThreads = 256;
constexpr int kChunk = FUSEDOPT_CHUNK;  // elements; fusedopt/backends/nvrtc.py sets it

// What a pass is tuned for. Large models are bound by memory: few blocks with much in flight are best for
// elements of 4 bytes; with 2 bytes arithmetic takes as long as memory, and more warps hide its latency. Models of a
// few million parameters are bound by the latency of one block, so more blocks must run at once.
enum class Tuning { kBandwidth, kLatency };

// How many elements a thread loads at once, and how many blocks share a multiprocessor, by the sizes of the smallest and
// the largest element of parameter, gradient and states. Measured on an H100 (docs/performance.md); macros, so that
// others can be tried.
#ifndef FUSEDOPT_ELEMENTS
#define FUSEDOPT_ELEMENTS(tuning, smallest) ((tuning) == Tuning::kBandwidth && (smallest) == 4 ? 16 : 8)
#endif
#ifndef FUSEDOPT_UPDATE_BLOCKS
#define FUSEDOPT_UPDATE_BLOCKS(tuning, smallest, largest) \
  ((smallest) == 1 ? 3 : (largest) == 2 || ((tuning) == Tuning::kLatency && (largest) == 4) ? 4 : 2)
#endif
#ifndef FUSEDOPT_NORM_ELEMENTS
#define FUSEDOPT_NORM_ELEMENTS(tuning) ((tuning) == Tuning::kBandwidth ? 32 : 8)
#endif
#ifndef FUSEDOPT_NORM_BLOCKS
#define FUSEDOPT_NORM_BLOCKS(tuning) ((tuning) == Tuning::kBandwidth ? 4 : 8)
#endif

// The step table as a kernel parameter: no copy to the device, and a captured graph keeps it.
template <int kBytes>
struct StepTable {
  alignas(16) char bytes[kBytes];
};

// ---- vectors ------------------------------------------------------------------------------------------

constexpr FUSEDOPT_HD int minimum(int a, int b) { return a < b ? a : b; }
constexpr FUSEDOPT_HD int maximum(int a, int b) { return a > b ? a : b; }

template <bool kFirst, class A, class B>
struct Select {
  using type = A;
};
template <class A, class B>
struct Select<false, A, B> {
  using type = B;
};

// V elements of a stream. Elements of less than 4 bytes stay packed in words until they are used: taken apart when they are
// loaded, each would cost a register and instructions of its own.
template <class Format, int V>
struct alignas(minimum(16, V* int(sizeof(typename Format::Storage)))) Vector {
  using Storage = typename Format::Storage;
  static constexpr int kPerWord = V * sizeof(Storage) % 4 == 0 && sizeof(Storage) < 4 ? 4 / sizeof(Storage) : 1;
  using Word = typename Select<kPerWord == 1, Storage, uint32>::type;
  Word words[V / kPerWord];

  __device__ __forceinline__ Storage get(int e) const {
    if constexpr (kPerWord == 1)
      return words[e];
    else
      return Storage(words[e / kPerWord] >> (e % kPerWord * sizeof(Storage) * 8));
  }

  // In the order of elements: the first one of a word clears the others.
  __device__ __forceinline__ void set(int e, Storage x) {
    if constexpr (kPerWord == 1) {
      words[e] = x;
    } else {
      constexpr uint32 kMask = sizeof(Storage) == 1 ? 0xffu : 0xffffu;
      const uint32 shifted = (uint32(x) & kMask) << (e % kPerWord * sizeof(Storage) * 8);
      words[e / kPerWord] = e % kPerWord == 0 ? shifted : words[e / kPerWord] | shifted;
    }
  }
};

template <int V>
struct Vector<NoExtra, V> {
  __device__ __forceinline__ NoExtra::Storage get(int) const { return {}; }
};

template <class T, class Format, int V>
__device__ __forceinline__ void decode(const Vector<Format, V>& vector, T (&values)[V]) {
#pragma unroll
  for (int e = 0; e < V; ++e) values[e] = T(Format::decode(vector.get(e)));
}

template <class T, class Format, int V>
__device__ __forceinline__ void encode(const T (&values)[V], Vector<Format, V>& vector) {
  if constexpr (sizeof(typename Format::Storage) == 2 && V % 2 == 0) {
#pragma unroll
    for (int e = 0; e < V; e += 2)
      vector.words[e / 2] = Format::encode_pair(float(values[e]), float(values[e + 1]));
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) vector.set(e, Format::encode(typename Format::Compute(values[e])));
  }
}

// One field of each word: its upper half, its lower half, or one of its bytes.
template <int kBytes, int kFirstByte, class Format, int V>
__device__ __forceinline__ void pack(const uint32 (&words)[V], Vector<Format, V>& vector) {
  static_assert(sizeof(typename Format::Storage) == kBytes && 4 % kBytes == 0, "a field is an element");
  if constexpr (V % 4 != 0) {
#pragma unroll
    for (int e = 0; e < V; ++e) vector.set(e, typename Format::Storage(words[e] >> (8 * kFirstByte)));
  } else if constexpr (kBytes == 2) {
    constexpr uint32 kPick = kFirstByte == 2 ? 0x7632 : 0x5410;
#pragma unroll
    for (int e = 0; e < V; e += 2) vector.words[e / 2] = __byte_perm(words[e], words[e + 1], kPick);
  } else {
    constexpr uint32 kPick = (kFirstByte + 4) << 4 | kFirstByte;
#pragma unroll
    for (int e = 0; e < V; e += 4)
      vector.words[e / 4] = __byte_perm(__byte_perm(words[e], words[e + 1], kPick),
                                        __byte_perm(words[e + 2], words[e + 3], kPick), 0x5410);
  }
}

// In accesses of 16 or 8 bytes. Written out, because the compiler takes the store of a struct apart, word by word, where
// its words are computed by code with branches, as IEEE division has.
template <class Words>
__device__ __forceinline__ void store_words(void* to, const Words& vector) {
  constexpr int kBytes = sizeof(Words);
  const uint32* words = reinterpret_cast<const uint32*>(&vector);
  char* address = static_cast<char*>(to);
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int k = 0; k < kBytes / 4; k += 4)
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address + 4 * k), "r"(words[k]), "r"(words[k + 1]),
                   "r"(words[k + 2]), "r"(words[k + 3])
                   : "memory");
  } else if constexpr (kBytes == 8) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]) : "memory");
  } else {
    *static_cast<Words*>(to) = vector;
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

  // Asks for the vector at `i` to be brought to the L2 cache. One thread of those that share a cache line does.
  __device__ __forceinline__ void prefetch(int i) const {
    constexpr int kSharers = 128 / (V * int(sizeof(Storage)));
    if (kSharers <= 1 || threadIdx.x % kSharers == 0) asm volatile("prefetch.global.L2 [%0];" ::"l"(base + i));
  }

  // One access, where the stream is aligned.
  __device__ __forceinline__ Vector<Format, V> load_aligned(int i) const {
    return *reinterpret_cast<const Vector<Format, V>*>(base + i);
  }
  __device__ __forceinline__ void store_aligned(int i, const Vector<Format, V>& vector) const {
    store_words(base + i, vector);
  }

  __device__ __forceinline__ Vector<Format, V> load(int i) const {
    Vector<Format, V> vector;
    if (aligned) {
      vector = load_aligned(i);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) vector.set(k, base[i + k]);
    }
    return vector;
  }

  __device__ __forceinline__ void store(int i, const Vector<Format, V>& vector) const {
    if (aligned) {
      store_aligned(i, vector);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) base[i + k] = vector.get(k);
    }
  }

  // The same for a vector of which only the first `n` elements exist; the others read as 0.
  __device__ __forceinline__ Vector<Format, V> load(int i, int n) const {
    if (n >= V) return load(i);
    Vector<Format, V> vector = {};
#pragma unroll
    for (int k = 0; k < V; ++k) vector.set(k, k < n ? base[i + k] : Storage());
    return vector;
  }

  __device__ __forceinline__ void store(int i, const Vector<Format, V>& vector, int n) const {
    if (n >= V) return store(i, vector);
#pragma unroll
    for (int k = 0; k < V; ++k)
      if (k < n) base[i + k] = vector.get(k);
  }
};

// The second array of a parameter that has none.
template <int V>
struct Stream<NoExtra, V> {
  static constexpr bool aligned = true;
  __device__ __forceinline__ Stream(const void*, int64) {}
  __device__ __forceinline__ void prefetch(int) const {}
  __device__ __forceinline__ Vector<NoExtra, V> load_aligned(int) const { return {}; }
  __device__ __forceinline__ Vector<NoExtra, V> load(int, int) const { return {}; }
  __device__ __forceinline__ void store_aligned(int, const Vector<NoExtra, V>&) const {}
  __device__ __forceinline__ void store(int, const Vector<NoExtra, V>&, int) const {}
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
  static __device__ __forceinline__ Split peeled(const void* leading_stream, int64 numel, uint32 chunk_index) {
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

  // Where vectors must begin at the tensor's first element, because elements are encoded in groups. The last vector
  // may then be a part of one; streams that are not aligned are accessed by elements.
  static __device__ __forceinline__ Split grouped(int64 numel, uint32 chunk_index) {
    const int64 first = int64(chunk_index) * kChunk;
    const int64 rest = numel - first;
    return {first, int(rest < kChunk ? rest : kChunk), 0, 0};
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

__device__ __forceinline__ uint32 warp_maximum(uint32 x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, x);
#else
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
#endif
}

// Whether this is the last of `parties` to come here; the counter is then 0 again.
__device__ __forceinline__ bool take_ticket(uint32* ticket, uint32 parties) {
  __threadfence();
  return atomicInc(ticket, parties - 1) == parties - 1;
}

// What all threads of a block need to know, worked out by two of them, in different warps, while loads are under way.
template <class Rule, class T>
struct BlockPlan {
  typename Rule::template Coefficients<T> coefficients;
  GradientTransform<T> transform;
  RandomStream random;
  DitherKey dither;
  float step;  // taken before this one
  bool skip;

  template <bool kNoise, class Table>
  __device__ __forceinline__ void prepare(const PassArgs& args, const Table& table, const TensorEntry& tensor) {
    if (kNoise && threadIdx.x == 64) {
      random = {args.seed, tensor.id, uint32(*static_cast<volatile float*>(tensor.step)) + 1};
      dither = dither_key(random);
    } else if (threadIdx.x == 0) {
      step = *static_cast<volatile float*>(tensor.step);
      coefficients = Rule::template prepare<T>(hyper_of(args, table, tensor.group).value, double(step) + 1.0);
    } else if (threadIdx.x == 32) {
      skip = must_skip(args);
      transform = gradient_transform<T>(args.scaling);
      if (hyper_of(args, table, tensor.group).maximize) transform.clip_coef = -transform.clip_coef;
    }
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

template <class Rule, class P, class G, class S, Tuning kTuning>
struct Update {
  using T = typename P::Compute;
  static constexpr int kStates = Rule::kStates;
  static constexpr bool kHasExtra = !is_same<typename P::Extra, NoExtra>;
  // Bytes of the smallest element. Single bytes are accessed eight at a time.
  static constexpr int kSmallest = minimum(sizeof(typename P::Main::Storage),
                                           minimum(sizeof(typename G::Storage), sizeof(typename S::Storage)));
  static constexpr int kLargest = maximum(
      maximum(sizeof(typename P::Main::Storage), sizeof(typename P::Extra::Storage)),
      maximum(sizeof(typename G::Storage), sizeof(typename S::Storage)));
  static constexpr int V = kSmallest == 1 ? 8 : 16 / kSmallest;
  static constexpr int kVectors = FUSEDOPT_ELEMENTS(kTuning, kSmallest) / V;  // per thread and round
  static constexpr int kBlocksPerMultiprocessor = FUSEDOPT_UPDATE_BLOCKS(kTuning, kSmallest, kLargest);
  static constexpr int kRound = kThreads * kVectors * V;
  // Elements that are encoded together lie in one vector (random bits) or in one warp's vectors (blocks).
  static constexpr bool kRandom = P::kRandom || S::kRandom;
  static constexpr bool kNoise = kRandom || S::kDithered;
  static constexpr bool kGrouped = kNoise || S::kBlocked;
  // Whether a round is loaded while the one before is computed, and the one after it brought to the L2 cache: where
  // arithmetic takes as long as memory, blocks alone do not hide the one behind the other.
  static constexpr bool kPipelined = S::kBlocked;
  static_assert(kVectors >= 1 && kChunk % kRound == 0, "a chunk is a whole number of rounds");
  static_assert(!kNoise || V == kRandomGroup, "a vector is a draw");
  static_assert(!S::kBlocked || (V * 32 == kStateBlock && kChunk % kStateBlock == 0), "a warp's vector is a block");

  struct Registers {
    Vector<typename P::Main, V> param[kVectors];
    Vector<typename P::Extra, V> extra[kVectors];
    Vector<G, V> grad[kVectors];
    Vector<S, V> state[kStates][kVectors];
  };

  Stream<typename P::Main, V> param;
  Stream<typename P::Extra, V> extra;
  Stream<G, V> grad;
  Stream<S, V> state[kStates];
  float* units[kStates];  // of this chunk's blocks
  int vectored;

  __device__ __forceinline__ Update(const TensorEntry& tensor, const void* grads, const Split& split)
      : param(tensor.param, split.first),
        extra(tensor.extra, split.first),
        grad(grads, split.first),
        vectored(split.vectored) {
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
    if constexpr (kGrouped) return Split::grouped(chunk.numel, chunk.index);
    return Split::template peeled<typename P::Main, V>(tensor.param, chunk.numel, chunk.index);
  }

  static __device__ __forceinline__ int offset(int round, int j) {
    return round * kRound + (j * kThreads + int(threadIdx.x)) * V;
  }

  // How many rounds can do without looking at alignment and ends.
  __device__ __forceinline__ int whole_rounds() const {
    bool aligned = param.aligned && extra.aligned && grad.aligned;
#pragma unroll
    for (int k = 0; k < kStates; ++k) aligned = aligned && state[k].aligned;
    return aligned ? vectored / kRound : 0;
  }

  // A round that is to come.
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

  // How many elements of the vector at `i` exist. Only in grouped formats may it be a part of one.
  __device__ __forceinline__ int count(int i) const { return kGrouped ? vectored - i : (i < vectored ? V : 0); }

  __device__ __forceinline__ void load_part(Registers& r, int round) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int i = offset(round, j);
      const int n = count(i);
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

  template <int N>
  static __device__ __forceinline__ void update(Vector<typename P::Main, N>& main, Vector<typename P::Extra, N>& extra,
                                                const Vector<G, N>& grad, Vector<S, N>* const (&state)[kStates],
                                                float (&unit)[kStates], const Noise& noise, const Plan& plan) {
    T p[N], g[N], s[kStates][N];
#pragma unroll
    for (int e = 0; e < N; ++e) p[e] = P::decode(main.get(e), extra.get(e));
    decode(grad, g);
#pragma unroll
    for (int k = 0; k < kStates; ++k) decode_state(*state[k], unit[k], k, s[k]);
    const bool clamps = plan.transform.clamps();
#pragma unroll
    for (int e = 0; e < N; ++e) g[e] = clamps ? plan.transform(g[e]) : plan.transform.without_clamp(g[e]);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      T own[kStates];
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
    float held[S::kBlocked ? kStates : 1];
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
      Vector<S, V>* s[kStates];
      float unit[kStates] = {};
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        s[k] = &r.state[k][j];
        if constexpr (S::kBlocked) unit[k] = __shfl_sync(0xffffffffu, all.held[k], round);
      }
      update<V>(r.param[j], r.extra[j], r.grad[j], s, unit, noise(plan, uint64(first + i)), plan);
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
      const int n = count(i);
      if (n <= 0 && !S::kBlocked) continue;  // a warp whose block has a part of its elements stays together
      Vector<S, V>* s[kStates];
      float unit[kStates] = {};
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        s[k] = &r.state[k][j];
        if (S::kBlocked && n > 0) unit[k] = units[k][i / kStateBlock];
      }
      update<V>(r.param[j], r.extra[j], r.grad[j], s, unit, noise(plan, uint64(first + i)), plan);
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
      Vector<G, 1> g;
      g.set(0, grad.base[i]);
      Vector<S, 1> own[kStates];
      Vector<S, 1>* s[kStates];
      float unit[kStates] = {};
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        own[k].set(0, state[k].base[i]);
        s[k] = &own[k];
      }
      update<1>(p, x, g, s, unit, Noise{}, plan);
      param.base[i] = p.get(0);
      if constexpr (kHasExtra) extra.base[i] = x.get(0);
#pragma unroll
      for (int k = 0; k < kStates; ++k) state[k].base[i] = own[k].get(0);
    }
  }
};

template <class Rule, class P, class G, class S, Tuning kTuning, class Table>
__device__ __forceinline__ void update_pass(const PassArgs& args, const Table& table) {
  using Pass = Update<Rule, P, G, S, kTuning>;
  __shared__ typename Pass::Plan shared_plan;

  const Chunk chunk = args.chunks[blockIdx.x];
  const void* grad = grad_of(args, table, chunk.tensor);
  if (!grad) {
    if (blockIdx.x == 0 && threadIdx.x == 0) record(args, must_skip(args));
    return;
  }
  TensorEntry& tensor = args.tensors[chunk.tensor];
  const Split split = Pass::split(tensor, chunk);
  const Pass pass(tensor, grad, split);
  const int whole = pass.whole_rounds();
  typename Pass::Registers registers;
  if (whole > 0)
    pass.load_whole(registers, 0);
  else
    pass.load_part(registers, 0);
  if (Pass::kPipelined && whole > 1) pass.prefetch(1);
  shared_plan.template prepare<Pass::kNoise>(args, table, tensor);
  __syncthreads();
  const auto& plan = shared_plan;
  if (threadIdx.x == 0) {
    if (blockIdx.x == 0) record(args, plan.skip);
    count_step(tensor, plan.step, tensor.chunks, plan.skip);
  }
  if (plan.skip) return;

  int round = 0;
  auto units = pass.load_units(whole);
  if constexpr (Pass::kPipelined) {
    typename Pass::Registers next = registers;
#pragma unroll 1
    for (; round < whole; ++round) {
      registers = next;
      if (round + 1 < whole) pass.load_whole(next, round + 1);
      if (round + 2 < whole) pass.prefetch(round + 2);
      pass.compute_and_store_whole(registers, round, split.first, plan, units);
    }
  } else {
#pragma unroll 1
    for (; round < whole; ++round) {
      if (round > 0) pass.load_whole(registers, round);
      pass.compute_and_store_whole(registers, round, split.first, plan, units);
    }
  }
  pass.store_units(units, whole);
#pragma unroll 1
  for (; round * Pass::kRound < split.vectored; ++round) {
    if (round > 0) pass.load_part(registers, round);
    pass.compute_and_store_part(registers, round, split.first, plan);
  }
  if (int(threadIdx.x) < split.scalars) pass.scalar(split.scalar(threadIdx.x), plan);
}

// ---- norm ---------------------------------------------------------------------------------------------

// Sums in float over the few elements of one load, in double over everything else. A float sum that has
// overflowed, or is so small that squares may have vanished, is done again in double: finite gradients
// never give an infinite norm, whatever their size.
template <class G, NormType kType, Tuning kTuning>
struct Norm {
  using T = typename G::Compute;
  static constexpr int V = 16 / int(sizeof(typename G::Storage));
  static constexpr int kVectors = FUSEDOPT_NORM_ELEMENTS(kTuning) / V;
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
          quick = accumulate(quick, float(magnitude(T(G::decode(vectors[j].get(e))) * transform.inv_scale)), kType);
      if (quick > 1e-30f && quick < 1e38f) {
        sum = combine(sum, double(quick), kType);
        return;
      }
    }
#pragma unroll  // a run-time index would put the vectors into local memory, on the quick way too
    for (int j = 0; j < kVectors; ++j)
#pragma unroll
      for (int e = 0; e < V; ++e) add(vectors[j].get(e));
  }

  template <class Table>
  __device__ __forceinline__ void add_chunk(const PassArgs& args, const Table& table, const Chunk& chunk) {
    const void* base = grad_of(args, table, chunk.tensor);
    if (!base) return;
    const Split split = Split::peeled<G, V>(base, chunk.numel, chunk.index);
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

template <class G, NormType kType, Tuning kTuning, class Table>
__device__ __forceinline__ void norm_pass(const PassArgs& args, const Table& table) {
  __shared__ bool last;
  Norm<G, kType, kTuning> norm(args);
  Chunk next = int(blockIdx.x) < args.num_chunks ? args.chunks[blockIdx.x] : Chunk{0, 0, 0};
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
