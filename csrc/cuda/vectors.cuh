// How elements travel between memory and registers: vectors, streams of them, and how a chunk is split into vectors.
#pragma once

#include "../formats/param.h"
#include "tuning.cuh"

namespace fusedopt {
namespace FUSEDOPT_ISA {

constexpr int kCacheLine = 128;  // bytes
// Vectors begin at multiples of so many bytes. Where those of a warp begin inside a cache line, they touch a line more
// than they fill; where chunks begin between two multiples, an H100 moves 1% less.
constexpr int kSegment = 256;

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

// V elements of a stream. Elements of less than 4 bytes stay packed in words until they are used: taken apart when they
// are loaded, each would cost a register and instructions of its own.
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
    for (int e = 0; e < V; e += 2) vector.words[e / 2] = Format::encode_pair(float(values[e]), float(values[e + 1]));
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
    constexpr int kSharers = kCacheLine / (V * int(sizeof(Storage)));
    if (kSharers <= 1 || threadIdx.x % kSharers == 0) asm volatile("prefetch.global.L2 [%0];" ::"l"(base + i));
  }

  // One access, where the stream is aligned.
  __device__ __forceinline__ Vector<Format, V> load_aligned(int i) const {
    return *reinterpret_cast<const Vector<Format, V>*>(base + i);
  }
  __device__ __forceinline__ void store_aligned(int i, const Vector<Format, V>& vector) const {
    *reinterpret_cast<Vector<Format, V>*>(base + i) = vector;
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

// How a chunk is split. Vectors begin where the tensor's first whole segment does, `head` elements in. Chunk c holds
// elements [head + c * kChunk, head + (c + 1) * kChunk), chunk 0 the head as well, unless chunks share out their
// rounds. What does not fill a vector, at either end, is done element by element.
struct Split {
  int64 first;
  int vectored;  // elements in vectors, from `first` on
  int head;
  int scalars;     // head and tail together
  int stride = 0;  // elements from the beginning of a round to that of the next; see `in_rounds`

  template <class Format, int V>
  static __device__ __forceinline__ Split peeled(const void* leading_stream, int64 numel, uint32 chunk_index) {
    constexpr int kPeriod = kSegment / int(sizeof(typename Format::Storage));
    static_assert(kPeriod % V == 0 && kPeriod + V <= kThreads,
                  "a segment is whole vectors; a thread takes one scalar at most");
    const uint64 element = reinterpret_cast<uint64>(leading_stream) / sizeof(typename Format::Storage);
    const int64 head = int64((kPeriod - element % kPeriod) % kPeriod);
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

  // How many full chunks of a tensor share out their rounds: of 64, 128, 256 and 512 the best on an H100.
  static constexpr int kTogether = 128;

  // Rounds of `kRound` elements. Where `kShared`, those of neighbouring full chunks lie in turn: the first of each,
  // then the second of each. What blocks work on at the same time then lies side by side, which memory is faster at.
  template <int kRound, bool kShared>
  __device__ __forceinline__ void in_rounds(const Chunk& chunk) {
    stride = kRound;
    if (!kShared || kRound == kChunk || vectored < kChunk) return;
    const int64 begin = first - int64(chunk.index) * kChunk;  // of chunk 0
    const int full = int((chunk.numel - begin) / kChunk), neighbours = int(chunk.index) / kTogether * kTogether;
    const int together = minimum(kTogether, full - neighbours);
    first = begin + int64(neighbours) * kChunk + (int(chunk.index) - neighbours) * kRound;
    stride = together * kRound;
  }

  // The element, relative to `first`, that is done as scalar number `i`.
  __device__ __forceinline__ int scalar(int i) const { return i < head ? i - int(first) : vectored + i - head; }
};

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
