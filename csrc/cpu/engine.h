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
  int64 size;  // bytes per element
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
#define FUSEDOPT_ROW(Format)                                                              \
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

template <class T>
using RuleFunction = void (*)(T* param, const T* grad, T* const* states, int64 n, const Hyper& hyper, double step);

template <class Rule, class T>
void apply_rule(T* __restrict param, const T* __restrict grad, T* const* states, int64 n, const Hyper& hyper,
                double step) {
  const auto coefficients = Rule::template prepare<T>(hyper.value, step);
  T* state[Rule::kStates];
  for (int k = 0; k < Rule::kStates; ++k) state[k] = states[k];
#pragma GCC ivdep
  for (int64 i = 0; i < n; ++i) {
    T s[Rule::kStates];
    for (int k = 0; k < Rule::kStates; ++k) s[k] = state[k][i];
    T p = param[i];
    Rule::template update<T>(p, grad[i], s, coefficients);
    param[i] = p;
    for (int k = 0; k < Rule::kStates; ++k) state[k][i] = s[k];
  }
}

struct RuleRow {
  int states;
  RuleFunction<float> in_float;
  RuleFunction<double> in_double;
};

inline const RuleRow& rule_row(int32 rule) {
#define FUSEDOPT_ROW(Rule) {Rule::kStates, &apply_rule<Rule, float>, &apply_rule<Rule, double>},
  static const RuleRow table[] = {FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_ROW)};
#undef FUSEDOPT_ROW
  return table[rule];
}

inline RuleFunction<float> rule_function(const RuleRow& row, float) { return row.in_float; }
inline RuleFunction<double> rule_function(const RuleRow& row, double) { return row.in_double; }

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
  const double step = double(*tensor.step) + 1.0;
  const Span span = span_of(chunk, job.table);

  alignas(64) T param_buffer[kBlock], grad[kBlock], state_buffers[kMaxStates][kBlock];
  for (int64 i = span.begin; i < span.end; i += kBlock) {
    const int64 n = span.end - i < kBlock ? span.end - i : kBlock;
    stream_functions<T>(job.table.grad_dtype).load(element(grad_base, job.table.grad_dtype, i), grad, n);
    for (int64 k = 0; k < n; ++k) grad[k] = transform(grad[k]);

    const BlockView<T> param(job.param_dtype, tensor.param, i, n, param_buffer);
    T* states[kMaxStates];
    for (int k = 0; k < rule.states; ++k)
      states[k] = BlockView<T>(job.state_dtype, tensor.states[k], i, n, state_buffers[k]).data();

    rule_function(rule, T())(param.data(), grad, states, n, hyper, step);

    param.commit();
    const StreamFunctions<T>& state_functions = stream_functions<T>(job.state_dtype);
    if (!state_functions.direct)
      for (int k = 0; k < rule.states; ++k)
        state_functions.store(states[k], static_cast<char*>(tensor.states[k]) + i * state_functions.size, n);
  }
}

// ---- norm ---------------------------------------------------------------------------------------------

constexpr int kLanes = 16;  // partial sums, in an order that no instruction set changes

template <class T>
NormPartial norm_chunk(const NormJob& job, const Chunk& chunk) {
  NormPartial partial = {0.0, 0.0};
  const void* base = job.table.grads[chunk.tensor];
  if (!base) return partial;
  const GradientTransform<T> transform = gradient_transform<T>(job.scaling);
  const Span span = span_of(chunk, job.table);

  alignas(64) T grad[kBlock];
  double lanes[kLanes] = {};
  int32 nonfinite = 0;
  for (int64 i = span.begin; i < span.end; i += kBlock) {
    int64 n = span.end - i < kBlock ? span.end - i : kBlock;
    stream_functions<T>(job.table.grad_dtype).load(element(base, job.table.grad_dtype, i), grad, n);
    for (; n % kLanes != 0; ++n) grad[n] = T(0);
    for (int64 k = 0; k < n; ++k) {
      nonfinite |= !(grad[k] - grad[k] == T(0));
      const T clamped = transform.clamp(grad[k]);
      grad[k] = clamped < T(0) ? -clamped : clamped;
    }
    // One loop per type: a choice inside it would keep it from being vectorised.
    if (job.type == NormType::kL2) {
      for (int64 k = 0; k < n; k += kLanes)
        for (int l = 0; l < kLanes; ++l) lanes[l] = accumulate(lanes[l], double(grad[k + l]), NormType::kL2);
    } else if (job.type == NormType::kL1) {
      for (int64 k = 0; k < n; k += kLanes)
        for (int l = 0; l < kLanes; ++l) lanes[l] = accumulate(lanes[l], double(grad[k + l]), NormType::kL1);
    } else {
      for (int64 k = 0; k < n; k += kLanes)
        for (int l = 0; l < kLanes; ++l) lanes[l] = accumulate(lanes[l], double(grad[k + l]), NormType::kInf);
    }
  }
  for (int l = 0; l < kLanes; ++l) partial.sum = combine(partial.sum, lanes[l], job.type);
  partial.nonfinite = nonfinite;
  return partial;
}

// ---- scale --------------------------------------------------------------------------------------------

constexpr uint32 kOne = 0x3f800000;  // 1.0f; several threads may store it

template <class T>
void scale_chunk(const ScaleJob& job, const Chunk& chunk) {
  void* base = const_cast<void*>(job.table.grads[chunk.tensor]);
  if (!base) return;
  const GradientTransform<T> transform = gradient_transform<T>(job.scaling);
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
    if (nonfinite && job.nonfinite_out) __atomic_store_n(reinterpret_cast<uint32*>(job.nonfinite_out), kOne, __ATOMIC_RELAXED);
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
