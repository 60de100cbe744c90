"""Mistakes in rules and formats, which the CPU and the CUDA engine share."""

from mutants import Mutant


def follows(variant: str, dtype: str = "float32") -> tuple[str, ...]:
    return (f"tests/optim/test_rules.py::test_sizes_and_hard_values[{{device}}-{variant}-torch.{dtype}]",)


def propagates(variant: str) -> tuple[str, ...]:
    return (f"tests/optim/test_nonfinite.py::test_propagation_follows_the_rule[{{device}}-{variant}]",)


def stores(dtype: str) -> tuple[str, ...]:
    return (f"tests/optim/test_conversions.py::test_stores_round_as_torch_does[{{device}}-torch.{dtype}]",)


EXACT = "tests/optim/test_format_exactness.py"
ROUNDING = "tests/optim/test_format_rounding.py"


def rounds(combination: str, variant: str = "adamw-decay", values: str = "normal") -> tuple[str, ...]:
    return (f"{ROUNDING}::test_engine_rounds_as_numpy_does[{{device}}-{variant}-{combination}-{values}]",)


RULES = [
    Mutant(
        "adam-eps-in-root",
        "epsilon inside the square root",
        "csrc/rules/adam.h",
        "divide_root(square_root(exp_avg_sq), c.bias",
        "divide_root(square_root(exp_avg_sq + c.eps), c.bias",
        follows("adam-eps"),
    ),
    Mutant(
        "adam-eps-before-correction",
        "epsilon added before the bias correction, as in old versions of torch",
        "csrc/rules/adam.h",
        "divide_root(square_root(exp_avg_sq), c.bias_correction2_sqrt, c.reciprocal);  // sqrt(v_hat)\n"
        "    const T denom = root + c.eps;",
        "divide_root(square_root(exp_avg_sq) + c.eps, c.bias_correction2_sqrt, c.reciprocal);\n"
        "    const T denom = root;",
        follows("adam-eps"),
    ),
    Mutant(
        "adam-no-first-correction",
        "no bias correction of the first moment",
        "csrc/rules/adam.h",
        "c.step_size = T(hyper[kLr] / (1.0 - beta_t.a));",
        "c.step_size = T(hyper[kLr]);",
        follows("adamw-decay"),
    ),
    Mutant(
        "adam-no-second-correction",
        "no bias correction of the second moment",
        "csrc/rules/adam.h",
        "c.bias_correction2_sqrt = T(square_root(1.0 - beta_t.b));",
        "c.bias_correction2_sqrt = T(1);",
        follows("adamw-decay"),
    ),
    Mutant(
        "adam-betas-swapped",
        "beta1 and beta2 swapped",
        "csrc/rules/adam.h",
        "c.beta1 = T(hyper[kBeta1]);",
        "c.beta1 = T(hyper[kBeta2]);",
        follows("adamw-decay"),
    ),
    Mutant(
        "adam-complement-in-float",
        "1 - beta2 of a beta2 that was rounded to float32",
        "csrc/rules/adam.h",
        "c.one_minus_beta2 = T(1.0 - hyper[kBeta2]);",
        "c.one_minus_beta2 = T(1) - T(hyper[kBeta2]);",
        follows("adamw"),
    ),
    Mutant(
        "adamw-decay-after-step",
        "weight decay after the step, as in bitsandbytes' CUDA kernels",
        "csrc/rules/adamw.h",
        "    param = param * c.decay;  // theta - alpha * lambda * theta\n    descend(param, grad, state, c);",
        "    descend(param, grad, state, c);\n    param = param * c.decay;",
        follows("adamw-decay"),
    ),
    Mutant(
        "decay-zero-times-inf",
        "an infinite parameter meets a decay of 0",
        "csrc/rules/decay.h",
        "return weight_decay != T(0) ? grad + weight_decay * param : grad;",
        "return grad + weight_decay * param;",
        ("tests/optim/test_nonfinite.py::test_infinite_parameter_without_decay[{device}-adam]",),
    ),
    Mutant(
        "amsgrad-hides-nan",
        "the maximum of second moments drops NaN, as fmax does",
        "csrc/rules/amsgrad.h",
        "return a >= b || a != a ? a : b;",
        "return b > a ? b : a;",
        (
            "tests/optim/test_variants.py::test_amsgrad_maximum_does_not_hide_nan[{device}]",
            *propagates("adamw-amsgrad"),
        ),
    ),
    Mutant(
        "amsgrad-divides-by-latest",
        "AMSGrad divides by the latest second moment",
        "csrc/rules/amsgrad.h",
        "move(param, state[0], state[2], c);",
        "move(param, state[0], state[1], c);",
        follows("adamw-amsgrad"),
    ),
    Mutant(
        "lion-sign-of-zero",
        "sign(0) = 1: rows that are not used drift",
        "csrc/rules/lion.h",
        "return x > T(0) ? T(1)",
        "return x >= T(0) ? T(1)",
        ("tests/optim/test_rules.py::test_lion_leaves_untouched_elements_alone[{device}]",),
    ),
    Mutant(
        "lion-hides-nan",
        "sign(NaN) = -1",
        "csrc/rules/lion.h",
        "(x < T(0) ? T(-1) : x);",
        "(x == T(0) ? x : T(-1));",
        ("tests/optim/test_nonfinite.py::test_lion_does_not_hide_nan[{device}-torch.float32]",),
    ),
    Mutant(
        "lion-one-beta",
        "the sign is taken of the moment with beta2",
        "csrc/rules/lion.h",
        "sign(c.beta1 * exp_avg + c.one_minus_beta1 * grad);",
        "sign(c.beta2 * exp_avg + c.one_minus_beta2 * grad);",
        follows("lion-decay"),
    ),
    Mutant(
        "sgd-dampens-first-step",
        "dampening in the first step, where torch has none",
        "csrc/rules/sgd.h",
        "c.gain = first ? T(1) : T(1.0 - hyper[kDampening]);",
        "c.gain = T(1.0 - hyper[kDampening]);",
        follows("sgd-momentum"),
    ),
    Mutant(
        "sgd-nesterov-keeps",
        "Nesterov momentum with the factor that is 0 in the first step",
        "csrc/rules/sgd.h",
        "grad + c.momentum * momentum_buffer",
        "grad + c.keep * momentum_buffer",
        follows("sgdw-nesterov"),
    ),
    Mutant(
        "rmsprop-eps-in-root",
        "epsilon inside the square root",
        "csrc/rules/rmsprop.h",
        "grad / (square_root(variance) + c.eps);",
        "grad / square_root(variance + c.eps);",
        follows("rmsprop-momentum"),
    ),
    Mutant(
        "rmsprop-hides-nan",
        "a variance of NaN becomes 0",
        "csrc/rules/rmsprop.h",
        "variance < T(0) ? T(0) : variance;",
        "variance > T(0) ? variance : T(0);",
        propagates("rmsprop-centered"),
    ),
    Mutant(
        "adagrad-decays-first-step",
        "the learning rate decays with t in place of t - 1",
        "csrc/rules/adagrad.h",
        "(1.0 + (step - 1.0) * hyper[kLrDecay])",
        "(1.0 + step * hyper[kLrDecay])",
        follows("adagrad-l2"),
    ),
    Mutant(
        "radam-threshold",
        "rectified from rho > 4 on, as the paper has it, in place of torch's 5",
        "csrc/rules/radam.h",
        "c.rectified = rho > 5.0;",
        "c.rectified = rho > 4.0;",
        ("tests/optim/test_variants.py::test_radam_goes_without_the_second_moment_at_first[{device}-0.999-6]",),
    ),
    Mutant(
        "lamb-zero-norm",
        "a parameter of zeros has a trust ratio of 0 and stays there",
        "csrc/rules/lamb.h",
        "adapts && norms[0] != 0.0 && norms[1] != 0.0",
        "adapts && norms[1] != 0.0",
        ("tests/optim/test_lamb.py::test_where_a_norm_is_zero_the_ratio_is_one[{device}]",),
    ),
    Mutant(
        "lamb-adapts-without-decay",
        "a trust ratio where nothing decays, which is NVLAMB",
        "csrc/rules/lamb.h",
        "const bool adapts = hyper[kWeightDecay] != 0.0 || hyper[kUseNvlamb] != 0.0;",
        "const bool adapts = true;",
        ("tests/optim/test_lamb.py::test_takes_apexs_steps[{device}-{'weight_decay': 0.0}]",),
    ),
]

FORMATS = [
    Mutant(
        "bfloat16-ties-away",
        "bfloat16 rounds ties away from zero",
        "csrc/formats/plain.h",
        "(u + 0x7fffu + ((u >> 16) & 1u)) >> 16",
        "(u + 0x8000u) >> 16",
        stores("bfloat16"),
    ),
    Mutant(
        "bfloat16-nan-carries",
        "NaN of all ones becomes -0 when it is rounded",
        "csrc/formats/plain.h",
        "(u & 0x7fffffffu) > 0x7f800000u ? uint16(0x7fff) : uint16(rounded)",
        "uint16(rounded)",
        stores("bfloat16"),
    ),
    Mutant(
        "float16-subnormal-cut",
        "subnormal float16 flushed to zero",
        "csrc/formats/plain.h",
        "a < (113u << 23) ? subnormal : normal",
        "a < (113u << 23) ? 0u : normal",
        stores("float16"),
    ),
    Mutant(
        "float16-overflow-late",
        "infinity from 2^17 on only",
        "csrc/formats/plain.h",
        "a >= (143u << 23) ? 0x7c00u",
        "a >= (144u << 23) ? 0x7c00u",
        stores("float16"),
    ),
    Mutant(
        "split16-sign-lost",
        "the lower half of a split master read as unsigned",
        "csrc/formats/param.h",
        "(uint32(main) << 16) + uint32(int32(extra)));",
        "(uint32(main) << 16) + uint32(uint16(extra)));",
        (f"{EXACT}::test_split16_is_an_fp32_master_bit_for_bit[{{device}}-adamw-decay]",),
    ),
    Mutant(
        "split8-truncates",
        "split8 cuts off bits in place of rounding",
        "csrc/formats/param.h",
        "return bits_or_nan(value) + 0x80u;",
        "return bits_or_nan(value);",
        (f"{EXACT}::test_torch_conversions_agree_with_the_engines[{{device}}-split8-normal]",),
    ),
    Mutant(
        "split-nan-carries",
        "NaN carries into -0 when a split is made",
        "csrc/formats/param.h",
        "return x != x ? 0x7fff0000u : bit_cast<uint32>(x);",
        "return bit_cast<uint32>(x);",
        (f"{ROUNDING}::test_nan_and_infinities_pass_unrounded[{{device}}]",),
    ),
    Mutant(
        "stochastic-to-nearest",
        "stochastic rounding that rounds to nearest",
        "csrc/formats/param.h",
        "return bits_or_nan(value) + bits;",
        "return bits_or_nan(value) + 0x8000u + 0 * bits;",
        rounds("bfloat16-stochastic-None_states"),
    ),
    Mutant(
        "stochastic-fifteen-bits",
        "15 random bits in place of 16: biased",
        "csrc/core/random.h",
        "(e % 2 * 16)) & 0xffffu;",
        "(e % 2 * 16)) & 0x7fffu;",
        rounds("bfloat16-stochastic-None_states"),
    ),
    Mutant(
        "stochastic-tensors-alike",
        "all tensors get the same random bits",
        "csrc/core/random.h",
        "uint32(group >> 32), stream.tensor, stream.step);",
        "uint32(group >> 32), 0u, stream.step);",
        rounds("bfloat16-stochastic-None_states"),
    ),
    Mutant(
        "states-share-bits",
        "states are rounded with the parameter's bits",
        "csrc/core/random.h",
        "return (e + 1 + k) % kRandomGroup;",
        "return (e + 0 * k) % kRandomGroup;",
        rounds("bfloat16-stochastic-None_states"),
    ),
    Mutant(
        "dither-stands-still",
        "the dither of every step is the same",
        "csrc/core/random.h",
        "stream.step * kDitherStep};",
        "kDitherStep};",
        rounds("float32-int8_states"),
    ),
    Mutant(
        "int8-code-zero",
        "code 0 for a second moment above 0",
        "csrc/formats/state.h",
        "return word > least ? word : least;",
        "return 0 * least + word;",
        ("tests/optim/test_int8.py::test_second_moments_do_not_vanish[{device}]",),
    ),
    Mutant(
        "int8-unit-an-octave-low",
        "codes of a block's largest elements overflow",
        "csrc/formats/state.h",
        "kOctaves = 15u << 23;",
        "kOctaves = 16u << 23;",
        rounds("float32-int8_states"),
    ),
    Mutant(
        "int8-hides-nan",
        "a block with an infinity in it has an ordinary unit",
        "csrc/formats/state.h",
        "    if (exponent == 0x7f800000u) return bit_cast<float>(0x7fc00000u);\n",
        "",
        (
            "tests/optim/test_int8.py::test_a_block_with_nan_or_infinity_is_nan_and_others_are_not_touched[{device}-inf]",
        ),
    ),
    Mutant(
        "int8-sign-lost",
        "first moments in 8 bits without their sign",
        "csrc/formats/state.h",
        "& 0x7fffffffu) | (bits & 0x80000000u);",
        "& 0x7fffffffu);",
        rounds("float32-int8_states", "lion-decay"),
    ),
]

MUTANTS = RULES + FORMATS
