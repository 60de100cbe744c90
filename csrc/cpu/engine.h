// The CPU engine, compiled once per instruction set by the isa_*.cpp files.
//
// Works in blocks that fit the first-level cache: fetch each stream as the compute type (in place where
// it already is), transform the gradient, apply the rule, store what was converted. Formats and rules
// thus combine at run time, through tables of functions, and each is compiled once per instruction set.
// The loops are written for the compiler's vectoriser. No standard library here: its inline functions would
// be compiled for this instruction set and could be linked into code for a lesser one.
#pragma once

#include "../core/gradient.h"
#include "../formats/plain.h"
#include "../rules/all.h"
#include "jobs.h"

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

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

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

// ---- update -------------------------------------------------------------------------------------------

// Room for any rule's coefficients, which are prepared once per chunk.
struct Coefficients {
  alignas(64) unsigned char bytes[256];
};

template <class T>
struct RuleFunctions {
  void (*prepare)(const Hyper& hyper, double step, Coefficients& coefficients);
  void (*apply)(T* param, const T* grad, T* const* states, int64 n, const Coefficients& coefficients,
                const GradientTransform<T>& transform);
};

template <class Rule, class T>
void prepare_rule(const Hyper& hyper, double step, Coefficients& coefficients) {
  const auto prepared = Rule::template prepare<T>(hyper.value, step);
  static_assert(sizeof(prepared) <= sizeof(coefficients), "make Coefficients larger");
  __builtin_memcpy(coefficients.bytes, &prepared, sizeof(prepared));
}

template <class Rule, class T>
void apply_rule(T* __restrict param, const T* __restrict grad, T* const* states, int64 n, const Coefficients& stored,
                const GradientTransform<T>& given) {
  const GradientTransform<T> transform = given;
  typename Rule::template Coefficients<T> coefficients;
  __builtin_memcpy(&coefficients, stored.bytes, sizeof(coefficients));
  T* state[Rule::kStates];
  for (int k = 0; k < Rule::kStates; ++k) state[k] = states[k];
#pragma GCC ivdep
  for (int64 i = 0; i < n; ++i) {
    T s[Rule::kStates];
    for (int k = 0; k < Rule::kStates; ++k) s[k] = state[k][i];
    T p = param[i];
    Rule::template update<T>(p, transform(grad[i]), s, coefficients);
    param[i] = p;
    for (int k = 0; k < Rule::kStates; ++k) state[k][i] = s[k];
  }
}

struct RuleRow {
  int states;
  RuleFunctions<float> in_float;
  RuleFunctions<double> in_double;
};

inline const RuleRow& rule_row(int32 rule) {
#define FUSEDOPT_ROW(Rule)                                 \
  {Rule::kStates,                                          \
   {&prepare_rule<Rule, float>, &apply_rule<Rule, float>}, \
   {&prepare_rule<Rule, double>, &apply_rule<Rule, double>}},
  static const RuleRow table[] = {FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_ROW)};
#undef FUSEDOPT_ROW
  return table[rule];
}

inline const RuleFunctions<float>& rule_functions(const RuleRow& row, float) { return row.in_float; }
inline const RuleFunctions<double>& rule_functions(const RuleRow& row, double) { return row.in_double; }

struct Span {
  int64 begin, end;
};

inline Span span_of(const Chunk& chunk, const GradTable& table) {
  const int64 begin = int64(chunk.index) * table.chunk_size;
  const int64 end = begin + table.chunk_size;
  const int64 numel = table.tensors[chunk.tensor].numel;
  return {begin, end < numel ? end : numel};
}

template <class T>
void update_chunk(const UpdateJob& job, const Chunk& chunk) {
  const void* grad_base = job.table.grads[chunk.tensor];
  if (!grad_base) return;
  const TensorEntry& tensor = job.table.tensors[chunk.tensor];
  const Hyper& hyper = job.hypers[tensor.group];
  const RuleRow& rule = rule_row(job.rule);
  GradientTransform<T> transform = gradient_transform<T>(job.scaling);
  if (hyper.maximize) transform.clip_coef = -transform.clip_coef;
  const Span span = span_of(chunk, job.table);
  const RuleFunctions<T>& functions = rule_functions(rule, T());
  Coefficients coefficients;
  functions.prepare(hyper, double(*tensor.step) + 1.0, coefficients);

  const StreamFunctions<T>& grad_stream = stream_functions<T>(job.table.grad_dtype);
  alignas(64) T param_buffer[kBlock], grad_buffer[kBlock], state_buffers[kMaxStates][kBlock];
  for (int64 i = span.begin; i < span.end; i += kBlock) {
    const int64 n = span.end - i < kBlock ? span.end - i : kBlock;
    const void* grad_memory = element(grad_base, job.table.grad_dtype, i);
    if (!grad_stream.direct) grad_stream.load(grad_memory, grad_buffer, n);
    const T* grad = grad_stream.direct ? static_cast<const T*>(grad_memory) : grad_buffer;

    const BlockView<T> param(job.param_dtype, tensor.param, i, n, param_buffer);
    T* states[kMaxStates];
    for (int k = 0; k < rule.states; ++k)
      states[k] = BlockView<T>(job.state_dtype, tensor.states[k], i, n, state_buffers[k]).data();

    functions.apply(param.data(), grad, states, n, coefficients, transform);

    param.commit();
    const StreamFunctions<T>& state_functions = stream_functions<T>(job.state_dtype);
    if (!state_functions.direct)
      for (int k = 0; k < rule.states; ++k)
        state_functions.store(states[k], static_cast<char*>(tensor.states[k]) + i * state_functions.size, n);
  }
}

// ---- norm ---------------------------------------------------------------------------------------------

// Partial sums, in an order that no instruction set changes.
constexpr int kLanes = 64;
constexpr int64 kAhead = 512;  // elements; measured: without it a single stream of reads takes a quarter longer

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
  const void* base = job.table.grads[chunk.tensor];
  if (!base) return partial;
  const GradientTransform<T> transform = gradient_transform<T>(job.scaling);
  const StreamFunctions<T>& stream = stream_functions<T>(job.table.grad_dtype);
  const Span span = span_of(chunk, job.table);

  alignas(64) T buffer[kBlock];
  for (int64 i = span.begin; i < span.end; i += kBlock) {
    const int64 n = span.end - i < kBlock ? span.end - i : kBlock;
    const void* memory = element(base, job.table.grad_dtype, i);
    if (!stream.direct) stream.load(memory, buffer, n);
    const NormPartial block = sum_block<kType>(stream.direct ? static_cast<const T*>(memory) : buffer, n, transform);
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
  job.param_dtype == DType::kFloat64 ? update_chunk<double>(job, chunk) : update_chunk<float>(job, chunk);
}

inline NormPartial norm(const NormJob& job, const Chunk& chunk) {
  return job.table.grad_dtype == DType::kFloat64 ? norm_chunk<double>(job, chunk) : norm_chunk<float>(job, chunk);
}

inline void scale(const ScaleJob& job, const Chunk& chunk) {
  job.table.grad_dtype == DType::kFloat64 ? scale_chunk<double>(job, chunk) : scale_chunk<float>(job, chunk);
}

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
