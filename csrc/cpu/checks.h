// What the CPU passes are asked for, looked at before a thread reads the first address. std::invalid_argument says what
// is wrong. That addresses are those of enough memory, in the dtypes that are named, is for the caller to see to.
#pragma once

#include "../host/table.h"

namespace fusedopt {

// Both known, and both float64 or none of them.
void check_dtypes(const char* where, int32 grad_dtype, int32 main_dtype);

// It has two phases.
void check_measure(int32 rule);

// Of either phase. groups: rows of hyper-parameters.
void check_update(const char* where, const Table& table, size_t groups, int32 rule, int32 param_format,
                  int32 grad_dtype, int32 main_dtype, int32 state_format);

// The table's gradients have somewhere to be added to.
void check_accumulate(Table& table, int32 grad_dtype, int32 main_dtype);

}  // namespace fusedopt
