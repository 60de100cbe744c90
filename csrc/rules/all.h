// The only C++ list of rules. A new rule: include its header and add its struct here.
#pragma once

#include "adam.h"
#include "adamw.h"
#include "lion.h"

#define FUSEDOPT_FOR_EACH_RULE(X) X(Adam) X(AdamW) X(Lion)
