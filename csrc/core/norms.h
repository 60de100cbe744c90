// Rules of two phases: their update needs norms over the whole tensor, which no element knows. Such a rule has, besides
// what all rules have,
//
//   kNorms                    how many
//   measure(param, grad, state, coefficients, terms)
//                             the first phase: an element's terms, of which the engine takes the 2-norms over the
//                             tensor. It may change `state`, a copy: nothing is stored in this phase
//   scale(coefficients, hyper, norms)
//                             between the phases: completes the coefficients of `update`
//
// and goes through all elements twice in a step. `update` computes again what `measure` did. Between the phases the
// sums of squares of each tensor stand where `TensorEntry::norms` says, for whoever has to add those of other
// processes.
#pragma once

namespace fusedopt {

// 0 for all other rules.
template <class Rule, class = void>
constexpr int kNorms = 0;
template <class Rule>
constexpr int kNorms<Rule, decltype(void(Rule::kNorms))> = Rule::kNorms;

}  // namespace fusedopt
