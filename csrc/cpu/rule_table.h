// What the CPU engine calls of each rule: loops over blocks, compiled once for each rule and instruction set.
#pragma once

#include "../core/gradient.h"
#include "../core/norms.h"
#include "../formats/plain.h"
#include "../rules/all.h"

// Before a loop whose iterations touch different memory.
#if defined(__clang__)
#define FUSEDOPT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define FUSEDOPT_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace fusedopt {
namespace FUSEDOPT_ISA {

// Elements. Measured: without prefetching, a single stream of reads takes a quarter longer; the update, which reads
// four and writes three, a tenth longer in float32 and 1.7 times as long in bfloat16.
constexpr int64 kAhead = 512;
constexpr int64 kRun = 128;  // prefetched at once

// Room for any rule's coefficients, which are prepared once per chunk.
struct Coefficients {
  alignas(64) unsigned char bytes[256];
};

// Updates n elements, all of whose streams rest as `Storage`.
template <class Storage, class T>
using Apply = void (*)(Storage* param, const Storage* grad, Storage* const* states, int64 n,
                       const Coefficients& coefficients, const GradientTransform<T>& transform);

template <class T>
struct RuleFunctions {
  void (*prepare)(const Hyper& hyper, double step, Coefficients& coefficients);
  Apply<T, T> apply;
  // Of rules of two phases, else null; `terms`: one array for each norm.
  void (*measure)(const T* param, const T* grad, const T* const* states, int64 n, const Coefficients& coefficients,
                  const GradientTransform<T>& transform, T* const* terms);
  void (*scale)(const Hyper& hyper, const double* norms, Coefficients& coefficients);
};

template <class Rule, class T>
void prepare_rule(const Hyper& hyper, double step, Coefficients& coefficients) {
  const auto prepared = Rule::template prepare<T>(hyper.value, step);
  static_assert(sizeof(prepared) <= sizeof(coefficients), "make Coefficients larger");
  __builtin_memcpy(coefficients.bytes, &prepared, sizeof(prepared));
}

// Asks for the cache lines of elements [first, first + kRun).
template <class Storage>
inline void prefetch_run(const Storage* stream, int64 first) {
  for (int64 i = first; i < first + kRun; i += 64 / int64(sizeof(Storage))) __builtin_prefetch(stream + i);
}

// Storage: of `Format`, a plain one. Where that is 16 bits wide, converting inside the loop takes less time than passes
// of their own: the processor does it while it divides.
template <class Rule, class Format, class Storage = typename Format::Storage, class T = typename Format::Compute>
void apply_rule(Storage* __restrict param, const Storage* __restrict grad, Storage* const* states, int64 n,
                const Coefficients& stored, const GradientTransform<T>& given) {
  const GradientTransform<T> transform = given;
  typename Rule::template Coefficients<T> coefficients;
  __builtin_memcpy(&coefficients, stored.bytes, sizeof(coefficients));
  Storage* state[kSlots<Rule>];
  for (int k = 0; k < Rule::kStates; ++k) state[k] = states[k];
  for (int64 first = 0; first < n; first += kRun) {
    prefetch_run(param, first + kAhead);
    prefetch_run(grad, first + kAhead);
    for (int k = 0; k < Rule::kStates; ++k) prefetch_run(state[k], first + kAhead);
    const int64 end = first + kRun < n ? first + kRun : n;
    FUSEDOPT_INDEPENDENT
    for (int64 i = first; i < end; ++i) {
      T s[kSlots<Rule>];
      for (int k = 0; k < Rule::kStates; ++k) s[k] = Format::decode(state[k][i]);
      T p = Format::decode(param[i]);
      Rule::template update<T>(p, transform(Format::decode(grad[i])), s, coefficients);
      param[i] = Format::encode(p);
      for (int k = 0; k < Rule::kStates; ++k) state[k][i] = Format::encode(s[k]);
    }
  }
}

template <class Rule, class T>
void measure_block(const T* __restrict param, const T* __restrict grad, const T* const* states, int64 n,
                   const Coefficients& stored, const GradientTransform<T>& given, T* const* terms) {
  constexpr int kNorms = fusedopt::kNorms<Rule>;
  static_assert(kNorms <= kMaxNorms, "make kMaxNorms larger");
  const GradientTransform<T> transform = given;
  typename Rule::template Coefficients<T> coefficients;
  __builtin_memcpy(&coefficients, stored.bytes, sizeof(coefficients));
  const T* state[kSlots<Rule>];
  for (int k = 0; k < Rule::kStates; ++k) state[k] = states[k];
  T* term[kNorms];
  for (int k = 0; k < kNorms; ++k) term[k] = terms[k];
  FUSEDOPT_INDEPENDENT
  for (int64 i = 0; i < n; ++i) {
    T s[kSlots<Rule>], t[kNorms];
    for (int k = 0; k < Rule::kStates; ++k) s[k] = state[k][i];
    Rule::template measure<T>(param[i], transform(grad[i]), s, coefficients, t);
    for (int k = 0; k < kNorms; ++k) term[k][i] = t[k];
  }
}

template <class Rule, class T>
void scale_rule(const Hyper& hyper, const double* norms, Coefficients& stored) {
  typename Rule::template Coefficients<T> coefficients;
  __builtin_memcpy(&coefficients, stored.bytes, sizeof(coefficients));
  Rule::template scale<T>(coefficients, hyper.value, norms);
  __builtin_memcpy(stored.bytes, &coefficients, sizeof(coefficients));
}

template <class Rule, class Format, class T = typename Format::Compute>
constexpr RuleFunctions<T> functions_of() {
  if constexpr (kNorms<Rule> > 0)
    return {&prepare_rule<Rule, T>, &apply_rule<Rule, Format>, &measure_block<Rule, T>, &scale_rule<Rule, T>};
  else
    return {&prepare_rule<Rule, T>, &apply_rule<Rule, Format>, nullptr, nullptr};
}

struct RuleRow {
  int states;
  int norms;
  Moment (*moment)(int state);
  RuleFunctions<float> in_float;
  RuleFunctions<double> in_double;
  Apply<uint16, float> apply_bfloat16;
};

inline const RuleRow& rule_row(int32 rule) {
#define FUSEDOPT_ROW(Rule)        \
  {Rule::kStates,                 \
   kNorms<Rule>,                  \
   &Rule::moment,                 \
   functions_of<Rule, Float32>(), \
   functions_of<Rule, Float64>(), \
   &apply_rule<Rule, BFloat16>},
  static const RuleRow table[] = {FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_ROW)};
#undef FUSEDOPT_ROW
  return table[rule];
}

inline const RuleFunctions<float>& rule_functions(const RuleRow& row, float) { return row.in_float; }
inline const RuleFunctions<double>& rule_functions(const RuleRow& row, double) { return row.in_double; }

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
