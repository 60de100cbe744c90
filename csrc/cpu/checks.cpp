#include "checks.h"

#include <stdexcept>
#include <string>

#include "../core/norms.h"
#include "../formats/state.h"
#include "../rules/all.h"

namespace fusedopt {
namespace {

constexpr int32 kNumStates[] = {
#define FUSEDOPT_ROW(Rule) baseline::Rule::kStates,
    FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_ROW)
#undef FUSEDOPT_ROW
};
constexpr int32 kNumNorms[] = {
#define FUSEDOPT_ROW(Rule) kNorms<baseline::Rule>,
    FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_ROW)
#undef FUSEDOPT_ROW
};
constexpr int32 kNumRules = int32(sizeof(kNumStates) / sizeof(kNumStates[0]));

constexpr bool kHasExtra[kNumParamFormats] = {
#define FUSEDOPT_ROW(Format) !baseline::is_same<baseline::Format::Extra, baseline::NoExtra>,
    FUSEDOPT_FOR_EACH_PARAM_FORMAT(FUSEDOPT_ROW)
#undef FUSEDOPT_ROW
};

void check_code(const std::string& where, const char* what, int32 code, int32 count) {
  if (code < 0 || code >= count)
    throw std::invalid_argument(where + ": got " + what + "=" + std::to_string(code) + ", expected 0 to " +
                                std::to_string(count - 1) + "; pass a code of fusedopt.specs");
}

void check_alike(const std::string& where, bool alike) {
  if (!alike)
    throw std::invalid_argument(where +
                                ": got float64 beside another dtype, expected all in float64 or none; put them "
                                "into tables of their own");
}

// The memory that a rule and its formats need of one tensor.
void check_entry(const std::string& where, const TensorEntry& entry, int32 index, int32 rule, bool has_extra,
                 bool blocked) {
  const auto require = [&](const void* address, const char* what) {
    if (!address)
      throw std::invalid_argument(where + ": got no address of '" + std::string(what) + "' for tensor " +
                                  std::to_string(index) + ", expected one; give it to Table.add");
  };
  require(entry.step, "step");
  if (kNumNorms[rule] > 0) require(entry.norms, "norms");
  if (entry.numel == 0) return;
  require(entry.param, "param");
  if (has_extra) require(entry.extra, "extra");
  for (int32 k = 0; k < kNumStates[rule]; ++k) {
    require(entry.states[k], "states");
    if (blocked) require(entry.scales[k], "scales");
  }
}

}  // namespace

void check_dtypes(const char* where, int32 grad_dtype, int32 main_dtype) {
  check_code(where, "grad_dtype", grad_dtype, kNumDTypes);
  check_code(where, "main_dtype", main_dtype, kNumDTypes);
  check_alike(where, (DType(grad_dtype) == DType::kFloat64) == (DType(main_dtype) == DType::kFloat64));
}

void check_measure(int32 rule) {
  check_code("cpu_measure", "rule", rule, kNumRules);
  if (kNumNorms[rule] == 0)
    throw std::invalid_argument("cpu_measure: got rule=" + std::to_string(rule) +
                                ", which has one phase, expected one of two; see fusedopt.specs.RuleSpec.norms");
}

void check_update(const char* where, const Table& table, size_t groups, int32 rule, int32 param_format,
                  int32 grad_dtype, int32 main_dtype, int32 state_format) {
  check_dtypes(where, grad_dtype, main_dtype);
  check_code(where, "rule", rule, kNumRules);
  check_code(where, "param_format", param_format, kNumParamFormats);
  check_code(where, "state_format", state_format, kNumStateFormats);
  const bool wide = DType(grad_dtype) == DType::kFloat64;
  check_alike(where, (ParamFormat(param_format) == ParamFormat::kFloat64) == wide &&
                         (StateFormat(state_format) == StateFormat::kFloat64) == wide);
  if (table.num_groups() > groups)
    throw std::invalid_argument(std::string(where) + ": got hyper-parameters of " + std::to_string(groups) +
                                " param groups, expected " + std::to_string(table.num_groups()) +
                                " at least; call Hypers.pack first");
  const bool blocked = StateFormat(state_format) == StateFormat::kInt8 && kNumStates[rule] > 0;
  if (blocked && table.chunk_size() % baseline::kStateBlock != 0)
    throw std::invalid_argument(std::string(where) + ": got chunks of " + std::to_string(table.chunk_size()) +
                                " elements, expected a multiple of " + std::to_string(baseline::kStateBlock) +
                                ", because 8-bit states share scales; make the Table with one");
  // Steps are many and alike: the rows are looked at once.
  const int64 key = 1 + rule + 256 * param_format + 65536 * state_format;
  if (table.checked_for == key) return;
  for (size_t i = 0; i < table.entries().size(); ++i)
    check_entry(where, table.entries()[i], int32(i), rule, kHasExtra[param_format], blocked);
  table.checked_for = key;
}

void check_accumulate(Table& table, int32 grad_dtype, int32 main_dtype) {
  check_dtypes("cpu_accumulate", grad_dtype, main_dtype);
  for (size_t i = 0; i < table.entries().size(); ++i)
    if (table.has_own(int32(i)) && table.entries()[i].numel && !table.entries()[i].main_grad)
      throw std::invalid_argument("cpu_accumulate: got no address of 'main_grad' for tensor " + std::to_string(i) +
                                  ", expected one; give it to Table.add");
}

}  // namespace fusedopt
