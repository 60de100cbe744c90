"""Mistakes in the Triton kernels, which run in Triton's interpreter where there is no GPU."""

from mutants import Mutant

TRITON = "tests/backends/test_triton.py"
ACCUMULATE = "tests/accumulate/test_accumulate_backends.py"


def same_bits(variant: str, dtype: str = "float32") -> tuple[str, ...]:
    """As the C++ engine."""
    return (f"{TRITON}::test_rules[{{device}}-{variant}-torch.{dtype}]",)


def same_format(combination: str, variant: str = "adamw-decay") -> tuple[str, ...]:
    return (f"{TRITON}::test_formats[{{device}}-{variant}-{combination}]",)


def skips(bad: str) -> tuple[str, ...]:
    return (f"{TRITON}::test_nonfinite_gradients_skip_the_step[{{device}}-2.0-{bad}]",)


MUTANTS = [
    Mutant(
        "triton-eps-before-correction",
        "epsilon added before the bias correction",
        "fusedopt/triton/rules.py",
        "denom = divide_root(square_root(exp_avg_sq), bias_correction2_sqrt, reciprocal) + eps",
        "denom = divide_root(square_root(exp_avg_sq) + eps, bias_correction2_sqrt, reciprocal)",
        same_bits("adam-eps"),
    ),
    Mutant(
        "triton-decay-after-step",
        "weight decay after the step",
        "fusedopt/triton/rules.py",
        "return move(param * decay, exp_avg, exp_avg_sq, c4, c5, c6, c7), exp_avg, exp_avg_sq",
        "return move(param, exp_avg, exp_avg_sq, c4, c5, c6, c7) * decay, exp_avg, exp_avg_sq",
        same_bits("adamw-decay"),
    ),
    Mutant(
        "triton-sign-of-zero",
        "sign(0) = 1",
        "fusedopt/triton/rules.py",
        "tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))",
        "tl.where(x >= 0.0, 1.0, tl.where(x < 0.0, -1.0, x))",
        same_bits("lion"),
    ),
    Mutant(
        "triton-coupled-is-decoupled",
        "L2 regularisation added after the moments",
        "fusedopt/triton/rules.py",
        "    grad = with_decay(grad, param, weight_decay)\n"
        "    exp_avg, exp_avg_sq = average(exp_avg, exp_avg_sq, grad, c0, c1, c2, c3)\n"
        "    return move(param, exp_avg, exp_avg_sq, c4, c5, c6, c7), exp_avg, exp_avg_sq",
        "    exp_avg, exp_avg_sq = average(exp_avg, exp_avg_sq, grad, c0, c1, c2, c3)\n"
        "    return move(param, exp_avg, exp_avg_sq, c4, c5, c6, c7), exp_avg, exp_avg_sq",
        same_bits("adam-l2"),
    ),
    Mutant(
        "triton-dampens-first-step",
        "dampening in the first step",
        "fusedopt/triton/rules.py",
        "tl.where(first, 1.0, 1.0 - dampening).to(TYPE)",
        "(1.0 - dampening).to(TYPE)",
        same_bits("sgd-momentum"),
    ),
    Mutant(
        "triton-powers-in-float",
        "beta^t in float32",
        "fusedopt/triton/rules.py",
        "    return power_a, power_b\n",
        "    return power_a.to(tl.float32).to(tl.float64), power_b\n",
        (f"{TRITON}::test_bias_corrections_of_many_steps[{{device}}]",),
    ),
    Mutant(
        "triton-value-clip-hides-nan",
        "NaN is clamped to the bound",
        "fusedopt/triton/tables.py",
        "tl.where(grad > limit, limit, tl.where(grad < -limit, -limit, grad))",
        "tl.where(grad < limit, tl.where(grad < -limit, -limit, grad), limit)",
        (f"{TRITON}::test_value_clip_keeps_nan[{{device}}]",),
    ),
    Mutant(
        "triton-clip-without-epsilon",
        "clip coefficient without torch's 1e-6",
        "fusedopt/triton/norm.py",
        "coef = max_norm / (norm + 1e-6)",
        "coef = max_norm / norm",
        (f"{TRITON}::test_shares_of_several_devices[{{device}}]",),
    ),
    Mutant(
        "triton-clip-enlarges",
        "clip coefficient above 1",
        "fusedopt/triton/norm.py",
        "    coef = tl.where(coef > 1.0, 1.0, coef)  # NaN stays NaN\n",
        "",
        (f"{TRITON}::test_small_norms_are_not_clipped[{{device}}]",),
    ),
    Mutant(
        "triton-norm-underflows",
        "squares of small gradients vanish in float",
        "fusedopt/triton/norm.py",
        "if (result > 1e-30) & (result < 1e38):",
        "if result < 1e38:",
        (f"{TRITON}::test_norms_that_leave_the_range_of_floats[{{device}}-1e-30-2.0]",),
    ),
    Mutant(
        "triton-max-norm-hides-nan",
        "the largest of elements passes over NaN",
        "fusedopt/triton/norm.py",
        'return tl.where(nans > 0, float("nan"), largest)',
        "return largest + 0 * nans",
        (f"{TRITON}::test_norms_of_nan[{{device}}-inf]",),
    ),
    Mutant(
        "triton-norm-ignores-main",
        "main gradients are missing in the norm",
        "fusedopt/triton/norm.py",
        "own, main = own_of(word), main_of(field(args, ARGS_TENSORS, tl.int64), tensor, word, M)",
        "own, main = own_of(word), word * 0",
        (f"{ACCUMULATE}::test_clipped_steps[triton-{{device}}-torch.float32-2.0]",),
    ),
    Mutant(
        "triton-last-micro-batch-lost",
        "this step's gradient is dropped beside a main gradient",
        "fusedopt/triton/tables.py",
        "tl.where(own != 0, held + weighted, held)",
        "held",
        (f"{ACCUMULATE}::test_rules[triton-{{device}}-adamw-decay-torch.float32-torch.float32]",),
    ),
    Mutant(
        "triton-last-element-dropped",
        "the last element of a tensor is left out",
        "fusedopt/triton/tables.py",
        "return tl.minimum(numel - start, CHUNK).to(tl.int32)",
        "return tl.minimum(numel - start - 1, CHUNK).to(tl.int32)",
        same_bits("adamw-decay"),
    ),
    Mutant(
        "triton-skipped-step-counts",
        "the step counters go on in a skipped step",
        "fusedopt/triton/update.py",
        "    if last & (skip == 0):\n",
        "    if last:\n",
        skips("inf"),
    ),
    Mutant(
        "triton-code-zero",
        "code 0 for a second moment above 0",
        "fusedopt/triton/formats.py",
        "        word = tl.maximum(word, tl.minimum(bits, CODE_ONE))\n",
        "",
        same_format("float32-int8_states"),
    ),
    Mutant(
        "triton-states-share-bits",
        "states are rounded with each other's bits",
        "fusedopt/triton/formats.py",
        "draw_bits(w0, w1, w2, w3, K + 1)",
        "draw_bits(w0, w1, w2, w3, 1)",
        same_format("bfloat16-stochastic-None_states"),
    ),
    Mutant(
        "triton-noise-of-first-chunk",
        "every tile gets the random bits of the first",
        "fusedopt/triton/update.py",
        "draw(field(args, ARGS_SEED, tl.int64), tensor, number, start, TILE)",
        "draw(field(args, ARGS_SEED, tl.int64), tensor, number, start * 0, TILE)",
        same_format("bfloat16-stochastic-None_states"),
    ),
    Mutant(
        "triton-scale-by-square",
        "LAMB's norms without their root",
        "fusedopt/triton/tables.py",
        "return tl.sqrt(field(field(entry, NORMS_AT, tl.int64), 8 * K, tl.float64))",
        "return field(field(entry, NORMS_AT, tl.int64), 8 * K, tl.float64)",
        same_bits("lamb-decay"),
    ),
]
