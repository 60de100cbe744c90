// The states of a rule: how many, and what each is an average of. Formats with few bits encode the two kinds
// differently.
#pragma once

namespace fusedopt {

enum class Moment {
  kFirst,   // of gradients: any sign
  kSecond,  // of squared gradients: never negative, and divided by
};

// Length of an array with an element for each state of a rule: at least 1, because C++ has no empty arrays.
template <class Rule>
constexpr int kSlots = Rule::kStates > 0 ? Rule::kStates : 1;

}  // namespace fusedopt
