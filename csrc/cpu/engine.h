// The CPU engine, compiled once per instruction set by the isa_*.cpp files.
//
// Works in blocks that fit the first-level cache: decode each stream to the compute type (in place where
// memory already holds it), transform the gradient, apply the rule, encode what was decoded. Formats and rules
// thus combine at run time, through tables of functions, and each is compiled once per instruction set.
// The loops are written for the compiler's vectoriser. No standard library here: its inline functions would
// be compiled for this instruction set and could be linked into code for a lesser one.
#pragma once

#include "../core/gradient.h"
#include "../formats/state.h"
#include "jobs.h"
#include "rule_table.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

constexpr int64 kBlock = 1024;  // elements: six float streams of them take 24 KiB

// ---- one stream ---------------------------------------------------------------------------------------

template <class T>
struct StreamFunctions {
  int64 size;   // bytes per element
  bool direct;  // memory already holds the compute type
  void (*load)(const void* from, T* to, int64 n);
  void (*store)(const T* from, void* to, int64 n);
};

template <class Format, class T>
void load_stream(const void* from, T* __restrict to, int64 n) {
  const auto* __restrict source = static_cast<const typename Format::Storage*>(from);
  for (int64 i = 0; i < n; ++i) to[i] = T(Format::decode(source[i]));
}

template <class Format, class T>
void store_stream(const T* __restrict from, void* to, int64 n) {
  auto* __restrict target = static_cast<typename Format::Storage*>(to);
  for (int64 i = 0; i < n; ++i) target[i] = Format::encode(typename Format::Compute(from[i]));
}

template <class T>
inline const StreamFunctions<T>& stream_functions(DType dtype) {
#define FUSEDOPT_ROW(Format)                                                                        \
  {sizeof(typename Format::Storage), is_same<typename Format::Storage, T>, &load_stream<Format, T>, \
   &store_stream<Format, T>},
  static const StreamFunctions<T> table[kNumDTypes] = {FUSEDOPT_FOR_EACH_FORMAT(FUSEDOPT_ROW)};
#undef FUSEDOPT_ROW
  return table[int32(dtype)];
}

// A block of a stream as the compute type: in place, or in a buffer that `commit` writes back.
template <class T>
class BlockView {
 public:
  BlockView(DType dtype, void* base, int64 offset, int64 n, T* buffer)
      : functions_(stream_functions<T>(dtype)), memory_(static_cast<char*>(base) + offset * functions_.size), n_(n) {
    data_ = functions_.direct ? reinterpret_cast<T*>(memory_) : buffer;
    if (!functions_.direct) functions_.load(memory_, data_, n);
  }
  T* data() const { return data_; }
  void commit() const {
    if (!functions_.direct) functions_.store(data_, memory_, n_);
  }

 private:
  const StreamFunctions<T>& functions_;
  char* memory_;
  T* data_;
  int64 n_;
};

inline const void* element(const void* base, DType dtype, int64 offset) {
  return static_cast<const char*>(base) + offset * stream_functions<float>(dtype).size;
}

// ---- gradients ----------------------------------------------------------------------------------------

// One tensor's gradient, block by block: memory itself, or a buffer where it takes more than that.
template <class T>
class GradBlocks {
 public:
  GradBlocks(const GradTable& table, int32 tensor, T weight)
      : dtype_(table.grad_dtype),
        main_dtype_(table.main_dtype),
        functions_(stream_functions<T>(table.grad_dtype)),
        source_(grad_source(table.grads[tensor])),
        main_grad_(table.tensors[tensor].main_grad),
        weight_(weight) {}

  const GradSource& source() const { return source_; }

  // Elements [offset, offset + n) of main gradient and gradient together.
  const T* at(int64 offset, int64 n) {
    if (!source_.has_main && weight_ == T(1)) return own(offset, n);
    const T* grad = source_.grad ? own(offset, n) : nullptr;
    if (source_.has_main) {
      main_functions().load(element(main_grad_, main_dtype_, offset), main_buffer_, n);
      if (!grad) return main_buffer_;
    }
    for (int64 i = 0; i < n; ++i) sum_[i] = source_.sum(grad[i], main_buffer_[i], weight_);
    return sum_;
  }

  void* main_at(int64 offset) const { return const_cast<void*>(element(main_grad_, main_dtype_, offset)); }
  const StreamFunctions<T>& main_functions() const { return stream_functions<T>(main_dtype_); }

 private:
  const T* own(int64 offset, int64 n) {
    const void* memory = element(source_.grad, dtype_, offset);
    if (functions_.direct) return static_cast<const T*>(memory);
    functions_.load(memory, buffer_, n);
    return buffer_;
  }

  DType dtype_, main_dtype_;
  const StreamFunctions<T>& functions_;
  GradSource source_;
  const void* main_grad_;
  T weight_;
  alignas(64) T buffer_[kBlock], main_buffer_[kBlock], sum_[kBlock];
};

// ---- random bits --------------------------------------------------------------------------------------

// For each of the elements [first, first + n); `first` is a multiple of kRandomGroup. Whole groups are filled.
inline void draw_block(const RandomStream& stream, int64 first, int64 n, uint32* __restrict bits) {
  for (int64 group = 0; group * kRandomGroup < n; ++group) {
    const Random128 random = draw(stream, uint64(first / kRandomGroup + group));
    for (int e = 0; e < kRandomGroup; ++e) bits[group * kRandomGroup + e] = bits_of(random, e);
  }
}

inline void dither_block(const DitherKey& key, int64 first, int64 n, uint32* __restrict dither) {
  for (int64 group = 0; group * kRandomGroup < n; ++group) {
    const uint32 base = dither_base(key, uint64(first / kRandomGroup + group));
    for (int e = 0; e < kRandomGroup; ++e) dither[group * kRandomGroup + e] = dither_of(base, e);
  }
}

// Random bits and dither of one block's elements, by element.
struct Noise {
  alignas(64) uint32 bits[kBlock];
  alignas(64) uint32 dither[kBlock];
};

// ---- parameters ---------------------------------------------------------------------------------------

enum class InPlace { kNo, kMain, kExtra };  // which memory already holds the compute type

template <class T>
struct ParamFunctions {
  int64 size, extra_size;  // bytes per element
  InPlace in_place;
  bool random;
  void (*load)(const void* main, const void* extra, T* to, int64 n);
  void (*store)(const T* from, void* main, void* extra, int64 n, const Noise& noise);
};

template <class Format, class T>
void load_param(const void* main, const void* extra, T* __restrict to, int64 n) {
  const auto* __restrict low = static_cast<const typename Format::Extra::Storage*>(extra);
  const auto* __restrict high = static_cast<const typename Format::Main::Storage*>(main);
  for (int64 i = 0; i < n; ++i) to[i] = T(Format::decode(high[i], low[i]));
}

template <class Format, class T>
void store_param(const T* from, void* main, void* extra, int64 n, const Noise& noise) {
  auto* __restrict high = static_cast<typename Format::Main::Storage*>(main);
  auto* __restrict low = static_cast<typename Format::Extra::Storage*>(extra);
  if constexpr (Format::kRounded) {
    store_stream<typename Format::Main, T>(from, main, n);
  } else {
    for (int64 i = 0; i < n; ++i) {
      const uint32 word = Format::word(float(from[i]), noise.bits[i]);
      high[i] = uint16((word + Format::kCarry) >> 16);
      if constexpr (!is_same<typename Format::Extra, NoExtra>)
        low[i] = typename Format::Extra::Storage(word >> (8 * Format::kExtraByte));
    }
  }
}

template <class Format, class T>
constexpr InPlace in_place() {
  if (Format::kReadsMain) return is_same<typename Format::Main::Storage, T> ? InPlace::kMain : InPlace::kNo;
  return is_same<typename Format::Extra::Storage, T> ? InPlace::kExtra : InPlace::kNo;
}

template <class T>
inline const ParamFunctions<T>& param_functions(ParamFormat format) {
#define FUSEDOPT_ROW(Format)                \
  {sizeof(typename Format::Main::Storage),  \
   sizeof(typename Format::Extra::Storage), \
   in_place<Format, T>(),                   \
   Format::kRandom,                         \
   &load_param<Format, T>,                  \
   &store_param<Format, T>},
  static const ParamFunctions<T> table[kNumParamFormats] = {FUSEDOPT_FOR_EACH_PARAM_FORMAT(FUSEDOPT_ROW)};
#undef FUSEDOPT_ROW
  return table[int32(format)];
}

// ---- states -------------------------------------------------------------------------------------------

template <class T>
struct StateFunctions {
  int64 size;  // bytes per element
  bool in_place, blocked, random, dithered;
  void (*load)(const void* memory, const float* scales, T* to, int64 n, Moment moment);
  void (*store)(const T* from, void* memory, float* scales, int64 n, Moment moment, int k, const Noise& noise);
};

// Elements in the scale's block that begins at `first`.
inline int64 block_length(int64 first, int64 n) { return n - first < kStateBlock ? n - first : kStateBlock; }

template <class Format, class T>
void load_state(const void* memory, const float* scales, T* __restrict to, int64 n, Moment moment) {
  const auto* __restrict codes = static_cast<const typename Format::Storage*>(memory);
  if constexpr (Format::kRounded) {
    load_stream<typename Format::Plain, T>(memory, to, n);
  } else if constexpr (Format::kBlocked) {
    for (int64 first = 0; first < n; first += kStateBlock) {
      const float unit = scales[first / kStateBlock];
      const int64 length = block_length(first, n);
      for (int64 i = 0; i < length; ++i) to[first + i] = T(Format::decode(codes[first + i], unit, moment));
    }
  } else {
    for (int64 i = 0; i < n; ++i) to[i] = T(Format::decode(codes[i]));
  }
}

template <class Format, class T>
void store_state(const T* __restrict from, void* memory, float* scales, int64 n, Moment moment, int k,
                 const Noise& noise) {
  auto* __restrict codes = static_cast<typename Format::Storage*>(memory);
  if constexpr (Format::kRounded) {
    store_stream<typename Format::Plain, T>(from, memory, n);
  } else if constexpr (Format::kBlocked) {
    for (int64 first = 0; first < n; first += kStateBlock) {
      const int64 length = block_length(first, n);
      uint32 largest = 0;
      for (int64 i = 0; i < length; ++i) {
        const uint32 magnitude = Format::magnitude(float(from[first + i]), moment);
        largest = magnitude > largest ? magnitude : largest;
      }
      const float unit = Format::unit_of(largest);
      const float reciprocal = Format::reciprocal(unit);
      scales[first / kStateBlock] = unit;
      for (int64 i = 0; i < length; ++i)
        codes[first + i] =
            uint8(Format::encode_word(float(from[first + i]), reciprocal, noise.dither[first + i], moment) >> 24);
    }
  } else {
    for (int64 group = 0; group < n; group += kRandomGroup)
      for (int e = 0; e < kRandomGroup && group + e < n; ++e)
        codes[group + e] = uint16(Format::word(float(from[group + e]), noise.bits[group + bits_for_state(e, k)]) >> 16);
  }
}

template <class T>
inline const StateFunctions<T>& state_functions(StateFormat format) {
#define FUSEDOPT_ROW(Format)                                 \
  {sizeof(typename Format::Storage),                         \
   Format::kRounded && is_same<typename Format::Storage, T>, \
   Format::kBlocked,                                         \
   Format::kRandom,                                          \
   Format::kDithered,                                        \
   &load_state<Format, T>,                                   \
   &store_state<Format, T>},
  static const StateFunctions<T> table[kNumStateFormats] = {FUSEDOPT_FOR_EACH_STATE_FORMAT(FUSEDOPT_ROW)};
#undef FUSEDOPT_ROW
  return table[int32(format)];
}

// ---- update -------------------------------------------------------------------------------------------

struct Span {
  int64 begin, end;
};

inline Span span_of(const Chunk& chunk, const GradTable& table) {
  const int64 begin = int64(chunk.index) * table.chunk_size;
  const int64 end = begin + table.chunk_size;
  return {begin, end < chunk.numel ? end : chunk.numel};
}

// One tensor's part of an update, block by block. `offset` is the block's first element.
template <class T>
class TensorBlocks {
 public:
  TensorBlocks(const UpdateJob& job, const TensorEntry& tensor, const RandomStream& stream)
      : rule_(rule_row(job.rule)),
        param_functions_(param_functions<T>(job.param_format)),
        state_functions_(state_functions<T>(job.state_format)),
        tensor_(tensor),
        stream_(stream),
        dither_key_(dither_key(stream)) {}

  T* param(int64 offset, int64 n) {
    if (param_functions_.in_place == InPlace::kMain) return static_cast<T*>(main(offset));
    if (param_functions_.in_place == InPlace::kExtra) return static_cast<T*>(extra(offset));
    param_functions_.load(main(offset), extra(offset), param_buffer_, n);
    return param_buffer_;
  }

  T* state(int k, int64 offset, int64 n) {
    if (state_functions_.in_place) return static_cast<T*>(memory(k, offset));
    state_functions_.load(memory(k, offset), scales(k, offset), state_buffers_[k], n, rule_.moment(k));
    return state_buffers_[k];
  }

  // Writes back what was not updated in place.
  void commit(int64 offset, int64 n, const T* param, T* const* states) {
    if (param_functions_.random || state_functions_.random) draw_block(stream_, offset, n, noise_.bits);
    if (state_functions_.dithered) dither_block(dither_key_, offset, n, noise_.dither);
    if (param_functions_.in_place != InPlace::kMain)
      param_functions_.store(param, main(offset), extra(offset), n, noise_);
    if (state_functions_.in_place) return;
    for (int k = 0; k < rule_.states; ++k)
      state_functions_.store(states[k], memory(k, offset), scales(k, offset), n, rule_.moment(k), k, noise_);
  }

 private:
  void* main(int64 offset) const { return static_cast<char*>(tensor_.param) + offset * param_functions_.size; }
  void* extra(int64 offset) const { return static_cast<char*>(tensor_.extra) + offset * param_functions_.extra_size; }
  void* memory(int k, int64 offset) const {
    return static_cast<char*>(tensor_.states[k]) + offset * state_functions_.size;
  }
  float* scales(int k, int64 offset) const {
    return state_functions_.blocked ? tensor_.scales[k] + offset / kStateBlock : nullptr;
  }

  const RuleRow& rule_;
  const ParamFunctions<T>& param_functions_;
  const StateFunctions<T>& state_functions_;
  const TensorEntry& tensor_;
  RandomStream stream_;
  DitherKey dither_key_;
  alignas(64) T param_buffer_[kBlock];
  alignas(64) T state_buffers_[kMaxStates][kBlock];
  Noise noise_;
};

// What both phases of an update need to know of a chunk.
template <class T>
struct RuleOnChunk {
  RuleOnChunk(const UpdateJob& job, const Chunk& chunk, const GradientTransform<T>& given)
      : tensor(job.table.tensors[chunk.tensor]),
        hyper(job.hypers[tensor.group]),
        rule(rule_row(job.rule)),
        functions(rule_functions(rule, T())),
        span(span_of(chunk, job.table)),
        step(double(*tensor.step) + 1.0),
        transform(given) {
    if (hyper.maximize) transform.clip_coef = -transform.clip_coef;
    functions.prepare(hyper, step, coefficients);
  }

  const TensorEntry& tensor;
  const Hyper& hyper;
  const RuleRow& rule;
  const RuleFunctions<T>& functions;
  Span span;
  double step;
  GradientTransform<T> transform;
  Coefficients coefficients;
};

inline bool all_bfloat16(const UpdateJob& job) {
  return job.param_format == ParamFormat::kBFloat16 && job.state_format == StateFormat::kBFloat16 &&
         job.table.grad_dtype == DType::kBFloat16;
}

inline void update_bfloat16(const RuleOnChunk<float>& on, const uint16* grad) {
  const int64 begin = on.span.begin;
  uint16* states[kMaxStates];
  for (int k = 0; k < on.rule.states; ++k) states[k] = static_cast<uint16*>(on.tensor.states[k]) + begin;
  on.rule.apply_bfloat16(static_cast<uint16*>(on.tensor.param) + begin, grad + begin, states, on.span.end - begin,
                         on.coefficients, on.transform);
}

template <class T>
void update_chunk(const UpdateJob& job, const Chunk& chunk) {
  const GradientTransform<T> transform = gradient_transform<T>(job.scaling);
  GradBlocks<T> grad(job.table, chunk.tensor, transform.weight);
  if (!grad.source().any()) return;
  RuleOnChunk<T> on(job, chunk, transform);
  if (on.rule.norms) {
    double norms[kMaxNorms];
    for (int k = 0; k < on.rule.norms; ++k) norms[k] = square_root(on.tensor.norms[k]);
    on.functions.scale(on.hyper, norms, on.coefficients);
  }

  if constexpr (is_same<T, float>)
    if (all_bfloat16(job) && !grad.source().has_main && transform.weight == 1.0f)
      return update_bfloat16(on, static_cast<const uint16*>(grad.source().grad));

  TensorBlocks<T> blocks(job, on.tensor, {job.seed, on.tensor.id, uint32(on.step)});
  for (int64 i = on.span.begin; i < on.span.end; i += kBlock) {
    const int64 n = on.span.end - i < kBlock ? on.span.end - i : kBlock;
    T* const param = blocks.param(i, n);
    T* states[kMaxStates];
    for (int k = 0; k < on.rule.states; ++k) states[k] = blocks.state(k, i, n);
    on.functions.apply(param, grad.at(i, n), states, n, on.coefficients, on.transform);
    blocks.commit(i, n, param, states);
  }
}

// ---- measure ------------------------------------------------------------------------------------------

constexpr int kSumLanes = 16;  // partial sums, in an order that no instruction set changes

template <class T>
double sum_of_squares(const T* x, int64 n) {
  alignas(64) double lanes[kSumLanes] = {};
  int64 i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (int l = 0; l < kSumLanes; ++l) lanes[l] += double(x[i + l]) * double(x[i + l]);
  for (int l = 0; i + l < n; ++l) lanes[l] += double(x[i + l]) * double(x[i + l]);
  for (int width = kSumLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}

// The first phase of a rule of two: Σ x² of its terms.
template <class T>
TensorNorms measure_chunk(const UpdateJob& job, const Chunk& chunk) {
  TensorNorms sums = {};
  const GradientTransform<T> transform = gradient_transform<T>(job.scaling);
  GradBlocks<T> grad(job.table, chunk.tensor, transform.weight);
  if (!grad.source().any()) return sums;
  const RuleOnChunk<T> on(job, chunk, transform);

  TensorBlocks<T> blocks(job, on.tensor, {});
  alignas(64) T buffers[kMaxNorms][kBlock];
  T* const terms[kMaxNorms] = {buffers[0], buffers[1]};
  for (int64 i = on.span.begin; i < on.span.end; i += kBlock) {
    const int64 n = on.span.end - i < kBlock ? on.span.end - i : kBlock;
    const T* const param = blocks.param(i, n);
    const T* states[kMaxStates];
    for (int k = 0; k < on.rule.states; ++k) states[k] = blocks.state(k, i, n);
    on.functions.measure(param, grad.at(i, n), states, n, on.coefficients, on.transform, terms);
    for (int k = 0; k < on.rule.norms; ++k) sums.value[k] += sum_of_squares(terms[k], n);
  }
  return sums;
}

// ---- norm ---------------------------------------------------------------------------------------------

// Partial sums, in an order that no instruction set changes.
constexpr int kLanes = 64;

template <NormType kType, class T>
double reduce_lanes(const T* lanes) {
  alignas(64) double sums[kLanes];
  for (int l = 0; l < kLanes; ++l) sums[l] = double(lanes[l]);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) sums[l] = combine(sums[l], sums[l + width], kType);
  return sums[0];
}

// Sums in float over a few elements per lane. A sum that has overflowed, or is so small that squares may have vanished,
// is done again by `exact_sum`: finite gradients never give an infinite norm, whatever their size.
template <NormType kType>
double quick_sum(const float* grad, float scale) {
  alignas(64) float lanes[kLanes] = {};
  for (int64 k = 0; k < kBlock; k += kLanes) {
    for (int line = 0; line < kLanes; line += 16) __builtin_prefetch(grad + k + line + kAhead);
    for (int l = 0; l < kLanes; ++l) {
      const float x = grad[k + l] * scale;
      lanes[l] = accumulate(lanes[l], x < 0.0f ? -x : x, kType);
    }
  }
  return reduce_lanes<kType>(lanes);
}

template <NormType kType, class T>
NormPartial exact_sum(const T* grad, int64 n, const GradientTransform<T>& transform) {
  alignas(64) double lanes[kLanes] = {};
  int32 nonfinite = 0;
  for (int64 k = 0; k < n; k += kLanes) {
    const int64 width = n - k < kLanes ? n - k : kLanes;
    for (int64 l = 0; l < width; ++l) {
      nonfinite |= !(grad[k + l] - grad[k + l] == T(0));
      const T x = transform.clamp(grad[k + l]);
      lanes[l] = accumulate(lanes[l], double(x < T(0) ? -x : x), kType);
    }
  }
  return {reduce_lanes<kType>(lanes), double(nonfinite)};
}

template <NormType kType>
NormPartial sum_block(const float* grad, int64 n, const GradientTransform<float>& transform) {
  if (n == kBlock && !transform.clamps()) {
    const double sum = quick_sum<kType>(grad, transform.inv_scale);
    if (sum > 1e-30 && sum < 1e38) return {sum, 0.0};
  }
  return exact_sum<kType>(grad, n, transform);
}

template <NormType kType>
NormPartial sum_block(const double* grad, int64 n, const GradientTransform<double>& transform) {
  return exact_sum<kType>(grad, n, transform);
}

template <NormType kType, class T>
NormPartial norm_chunk(const NormJob& job, const Chunk& chunk) {
  NormPartial partial = {0.0, 0.0};
  const GradientTransform<T> transform = gradient_transform<T>(job.scaling);
  GradBlocks<T> grad(job.table, chunk.tensor, transform.weight);
  if (!grad.source().any()) return partial;
  const Span span = span_of(chunk, job.table);

  for (int64 i = span.begin; i < span.end; i += kBlock) {
    const int64 n = span.end - i < kBlock ? span.end - i : kBlock;
    const NormPartial block = sum_block<kType>(grad.at(i, n), n, transform);
    partial.sum = combine(partial.sum, block.sum, kType);
    partial.nonfinite += block.nonfinite;
  }
  return partial;
}

template <class T>
NormPartial norm_chunk(const NormJob& job, const Chunk& chunk) {
  if (job.type == NormType::kL2) return norm_chunk<NormType::kL2, T>(job, chunk);
  return job.type == NormType::kL1 ? norm_chunk<NormType::kL1, T>(job, chunk)
                                   : norm_chunk<NormType::kInf, T>(job, chunk);
}

// ---- accumulate ---------------------------------------------------------------------------------------

template <class T>
void accumulate_chunk(const AccumulateJob& job, const Chunk& chunk) {
  GradBlocks<T> grad(job.table, chunk.tensor, gradient_transform<T>(job.scaling).weight);
  if (!grad.source().grad) return;
  const Span span = span_of(chunk, job.table);
  for (int64 i = span.begin; i < span.end; i += kBlock) {
    const int64 n = span.end - i < kBlock ? span.end - i : kBlock;
    grad.main_functions().store(grad.at(i, n), grad.main_at(i), n);
  }
}

// ---- scale --------------------------------------------------------------------------------------------

constexpr uint32 kOne = 0x3f800000;  // 1.0f; several threads may store it

template <class T>
void scale_chunk(const ScaleJob& job, const Chunk& chunk) {
  void* base = const_cast<void*>(job.table.grads[chunk.tensor]);
  if (!base) return;
  const GradientTransform<T> transform = gradient_transform<T>(job.scaling);
  if (transform.is_identity() && !job.nonfinite_out) return;  // nothing to do and nothing to look for
  const Span span = span_of(chunk, job.table);

  alignas(64) T buffer[kBlock];
  for (int64 i = span.begin; i < span.end; i += kBlock) {
    const int64 n = span.end - i < kBlock ? span.end - i : kBlock;
    const BlockView<T> grad(job.table.grad_dtype, base, i, n, buffer);
    T* data = grad.data();
    int32 nonfinite = 0;
    for (int64 k = 0; k < n; ++k) {
      nonfinite |= !(data[k] - data[k] == T(0));
      data[k] = transform(data[k]);
    }
    if (nonfinite && job.nonfinite_out)
      __atomic_store_n(reinterpret_cast<uint32*>(job.nonfinite_out), kOne, __ATOMIC_RELAXED);
    grad.commit();
  }
}

// ---- the compute type: double for float64, float for everything else ----------------------------------

inline void update(const UpdateJob& job, const Chunk& chunk) {
  job.param_format == ParamFormat::kFloat64 ? update_chunk<double>(job, chunk) : update_chunk<float>(job, chunk);
}

inline TensorNorms measure(const UpdateJob& job, const Chunk& chunk) {
  return job.param_format == ParamFormat::kFloat64 ? measure_chunk<double>(job, chunk)
                                                   : measure_chunk<float>(job, chunk);
}

inline NormPartial norm(const NormJob& job, const Chunk& chunk) {
  return job.table.grad_dtype == DType::kFloat64 ? norm_chunk<double>(job, chunk) : norm_chunk<float>(job, chunk);
}

inline void accumulate(const AccumulateJob& job, const Chunk& chunk) {
  job.table.main_dtype == DType::kFloat64 ? accumulate_chunk<double>(job, chunk) : accumulate_chunk<float>(job, chunk);
}

inline void scale(const ScaleJob& job, const Chunk& chunk) {
  job.table.grad_dtype == DType::kFloat64 ? scale_chunk<double>(job, chunk) : scale_chunk<float>(job, chunk);
}

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
