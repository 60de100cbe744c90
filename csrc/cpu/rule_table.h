// What the CPU engine calls of each rule: loops over blocks, compiled once for each rule and instruction set.
#pragma once

#include "../core/gradient.h"
#include "../core/norms.h"
#include "../rules/all.h"

// Before a loop whose iterations touch different memory.
#if defined(__clang__)
#define FUSEDOPT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define FUSEDOPT_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace fusedopt {
namespace FUSEDOPT_ISA {

// Room for any rule's coefficients, which are prepared once per chunk.
struct Coefficients {
  alignas(64) unsigned char bytes[256];
};

template <class T>
struct RuleFunctions {
  void (*prepare)(const Hyper& hyper, double step, Coefficients& coefficients);
  void (*apply)(T* param, const T* grad, T* const* states, int64 n, const Coefficients& coefficients,
                const GradientTransform<T>& transform);
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

template <class Rule, class T>
void apply_rule(T* __restrict param, const T* __restrict grad, T* const* states, int64 n, const Coefficients& stored,
                const GradientTransform<T>& given) {
  const GradientTransform<T> transform = given;
  typename Rule::template Coefficients<T> coefficients;
  __builtin_memcpy(&coefficients, stored.bytes, sizeof(coefficients));
  T* state[kSlots<Rule>];
  for (int k = 0; k < Rule::kStates; ++k) state[k] = states[k];
  FUSEDOPT_INDEPENDENT
  for (int64 i = 0; i < n; ++i) {
    T s[kSlots<Rule>];
    for (int k = 0; k < Rule::kStates; ++k) s[k] = state[k][i];
    T p = param[i];
    Rule::template update<T>(p, transform(grad[i]), s, coefficients);
    param[i] = p;
    for (int k = 0; k < Rule::kStates; ++k) state[k][i] = s[k];
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

template <class Rule, class T>
constexpr RuleFunctions<T> functions_of() {
  if constexpr (kNorms<Rule> > 0)
    return {&prepare_rule<Rule, T>, &apply_rule<Rule, T>, &measure_block<Rule, T>, &scale_rule<Rule, T>};
  else
    return {&prepare_rule<Rule, T>, &apply_rule<Rule, T>, nullptr, nullptr};
}

struct RuleRow {
  int states;
  int norms;
  Moment (*moment)(int state);
  RuleFunctions<float> in_float;
  RuleFunctions<double> in_double;
};

inline const RuleRow& rule_row(int32 rule) {
#define FUSEDOPT_ROW(Rule) \
  {Rule::kStates, kNorms<Rule>, &Rule::moment, functions_of<Rule, float>(), functions_of<Rule, double>()},
  static const RuleRow table[] = {FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_ROW)};
#undef FUSEDOPT_ROW
  return table[rule];
}

inline const RuleFunctions<float>& rule_functions(const RuleRow& row, float) { return row.in_float; }
inline const RuleFunctions<double>& rule_functions(const RuleRow& row, double) { return row.in_double; }

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
