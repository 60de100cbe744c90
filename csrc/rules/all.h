// The only C++ list of rules. A new rule: include its header and add its struct here.
#pragma once

#include "adagrad.h"
#include "adam.h"
#include "adamw.h"
#include "amsgrad.h"
#include "lamb.h"
#include "lion.h"
#include "radam.h"
#include "rmsprop.h"
#include "sgd.h"

#define FUSEDOPT_FOR_EACH_RULE(X) \
  X(Adam)                         \
  X(AdamW)                        \
  X(Lion)                         \
  X(AdamAmsgrad)                  \
  X(AdamWAmsgrad)                 \
  X(Sgd)                          \
  X(SgdMomentum)                  \
  X(Sgdw)                         \
  X(SgdwMomentum)                 \
  X(Rmsprop)                      \
  X(RmspropMomentum) X(RmspropCentered) X(RmspropCenteredMomentum) X(Adagrad) X(RAdam) X(Lamb)
