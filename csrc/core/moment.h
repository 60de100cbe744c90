// What a state of a rule is an average of. Formats with few bits encode the two kinds differently.
#pragma once

namespace fusedopt {

enum class Moment {
  kFirst,   // of gradients: any sign
  kSecond,  // of squared gradients: never negative, and divided by
};

}  // namespace fusedopt
