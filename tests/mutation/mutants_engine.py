"""Mistakes in gradient transform, norm and passes; the first file is the CUDA engine's too."""

from mutants import Mutant

CLIP = "tests/optim/test_clip.py"
FUNCTIONS = "tests/test_clip_functions.py"
NONFINITE = "tests/optim/test_nonfinite.py"
ACCUMULATE = "tests/accumulate/test_accumulate.py"
NAN_NORM = (f"{NONFINITE}::test_norm_of_nonfinite_gradients_of_every_order[{{device}}-inf]",)
WEIGHTED = (f"{ACCUMULATE}::test_weights[{{device}}-[3.0, 1.0, 2.5]-mean-number]",)


def follows(variant: str) -> tuple[str, ...]:
    return (f"tests/optim/test_rules.py::test_sizes_and_hard_values[{{device}}-{variant}-torch.float32]",)


def skips(place: str) -> tuple[str, ...]:
    return (f"{NONFINITE}::test_skipped_step_changes_nothing[{{device}}-{{}}-inf-{place}]",)


GRADIENT = [
    Mutant(
        "clip-without-epsilon",
        "clip coefficient without torch's 1e-6",
        "csrc/core/gradient.h",
        "coef = options.max_norm / (norm + 1e-6);",
        "coef = options.max_norm / norm;",
        (f"{CLIP}::test_norm_at_the_limit[{{device}}]", f"{CLIP}::test_zero_gradients[{{device}}]"),
    ),
    Mutant(
        "clip-enlarges",
        "clip coefficient above 1: small gradients grow",
        "csrc/core/gradient.h",
        "    coef = coef > 1.0 ? 1.0 : coef;  // NaN stays NaN\n",
        "",
        (
            f"{CLIP}::test_limit_can_be_changed_and_taken_away[{{device}}]",
            f"{CLIP}::test_zero_gradients[{{device}}]",
        ),
    ),
    Mutant(
        "clip-hides-nan",
        "clip coefficient of a NaN norm is 1",
        "csrc/core/gradient.h",
        "coef = coef > 1.0 ? 1.0 : coef;  // NaN stays NaN",
        "coef = coef < 1.0 ? coef : 1.0;",
        (f"{NONFINITE}::test_norm_of_nonfinite_gradients[{{device}}]",),
    ),
    Mutant(
        "value-clip-hides-nan",
        "NaN is clamped to the bound, as fmin does",
        "csrc/core/gradient.h",
        "return grad > max_value ? max_value : (grad < -max_value ? -max_value : grad);",
        "return grad < max_value ? (grad < -max_value ? -max_value : grad) : max_value;",
        (f"{CLIP}::test_value_clip_keeps_nan[{{device}}]", f"{CLIP}::test_beside_torchs_clip_grad_value[{{device}}]"),
    ),
    Mutant(
        "value-clip-before-unscale",
        "scaled gradients are clamped",
        "csrc/core/gradient.h",
        "    grad = grad * inv_scale;\n    // Comparisons, not fmin: NaN must stay NaN.\n"
        "    return grad > max_value ? max_value : (grad < -max_value ? -max_value : grad);",
        "    return (grad > max_value ? max_value : (grad < -max_value ? -max_value : grad)) * inv_scale;",
        (f"{CLIP}::test_unscale_value_clip_norm_clip[{{device}}-adamw-decay]",),
    ),
    Mutant(
        "value-clip-after-norm-clip",
        "elements are clamped after the norm is clipped",
        "csrc/core/gradient.h",
        "return clamp(grad) * clip_coef; }",
        "return clamp(grad * clip_coef); }",
        (f"{CLIP}::test_unscale_value_clip_norm_clip[{{device}}-adamw-decay]",),
    ),
    Mutant(
        "scale-forgets-clip",
        "clip_grad_norm_ thinks that there is nothing to do",
        "csrc/core/gradient.h",
        "inv_scale == T(1) && clip_coef == T(1); }",
        "inv_scale == T(1); }",
        (f"{FUNCTIONS}::test_clip_grad_norm[{{device}}-1.0-torch.float32-0.5]",),
    ),
    Mutant(
        "max-norm-hides-nan",
        "the largest of elements passes over NaN",
        "csrc/core/gradient.h",
        "return magnitude > total || magnitude != magnitude ? magnitude : total;  // keeps NaN",
        "return magnitude > total ? magnitude : total;",
        NAN_NORM,
    ),
    Mutant(
        "max-norm-forgets-nan",
        "the largest of partial results passes over NaN",
        "csrc/core/gradient.h",
        "return b > a || b != b ? b : a;",
        "return b > a ? b : a;",
        NAN_NORM,
    ),
    Mutant(
        "found-inf-stays",
        "found_inf is not reset: one overflow and no step is taken any more",
        "csrc/core/gradient.h",
        "control.found_inf = options.skip_nonfinite && nonfinite > 0.0 ? 1.0f : 0.0f;",
        "if (options.skip_nonfinite && nonfinite > 0.0) control.found_inf = 1.0f;",
        (f"{NONFINITE}::test_counters[{{device}}]",),
    ),
    Mutant(
        "norm-overflow-skips",
        "a norm beyond float32 counts as non-finite",
        "csrc/core/gradient.h",
        "options.skip_nonfinite && nonfinite > 0.0 ?",
        "options.skip_nonfinite && (nonfinite > 0.0 || !is_finite(float(norm))) ?",
        (f"{NONFINITE}::test_finite_gradients_with_an_infinite_norm_are_not_skipped[{{device}}]",),
    ),
    Mutant(
        "last-micro-batch-lost",
        "this step's gradient is dropped beside a main gradient",
        "csrc/core/gradient.h",
        "return has_main ? (grad ? main + weighted : main) : weighted;",
        "return has_main ? main : weighted;",
        WEIGHTED,
    ),
    Mutant(
        "mean-is-sum",
        "the number of micro-batches does not divide",
        "csrc/core/gradient.h",
        "transform.inv_scale = T(1.0 / (scale * divisor));",
        "transform.inv_scale = T(1.0 / scale) + T(0 * divisor);",
        WEIGHTED,
    ),
]

ENGINE = [
    Mutant(
        "last-element-dropped",
        "the last element of a tensor is left out",
        "csrc/cpu/engine.h",
        "return {begin, end < chunk.numel ? end : chunk.numel};",
        "return {begin, end < chunk.numel ? end : chunk.numel - 1};",
        follows("adamw-decay"),
    ),
    Mutant(
        "chunk-int32",
        "offsets in 32 bits",
        "csrc/cpu/engine.h",
        "const int64 begin = int64(chunk.index) * table.chunk_size;",
        "const int64 begin = int32(chunk.index * uint32(table.chunk_size));",
        ("tests/cpu/test_engine.py::test_norm_of_more_elements_than_int32",),
    ),
    Mutant(
        "maximize-ignored",
        "maximize minimises",
        "csrc/cpu/engine.h",
        "    if (hyper.maximize) transform.clip_coef = -transform.clip_coef;\n",
        "",
        follows("adamw-maximize"),
    ),
    Mutant(
        "norm-ignores-main",
        "tensors without a gradient in the last micro-batch are missing in the norm",
        "csrc/cpu/engine.h",
        "if (!grad.source().any()) return partial;",
        "if (!grad.source().grad) return partial;",
        (f"{ACCUMULATE}::test_parameters_without_gradients[{{device}}-adamw-decay]",),
    ),
    Mutant(
        "norm-underflows",
        "squares of small gradients vanish in float",
        "csrc/cpu/engine.h",
        "if (sum > 1e-30 && sum < 1e38) return",
        "if (sum < 1e38) return",
        (f"{CLIP}::test_small_gradients_do_not_underflow_the_norm[{{device}}-5000]",),
    ),
    Mutant(
        "norm-overflows",
        "squares of large gradients overflow float",
        "csrc/cpu/engine.h",
        "if (sum > 1e-30 && sum < 1e38) return",
        "if (sum > 1e-30) return",
        (f"{CLIP}::test_large_gradients_do_not_overflow_the_norm[{{device}}-5000-2.0-dtype1-1e+30]",),
    ),
    Mutant(
        "nonfinite-forgotten-in-block",
        "only the last element of a block counts as non-finite",
        "csrc/cpu/engine.h",
        "nonfinite |= !(grad[k + l] - grad[k + l] == T(0));",
        "nonfinite = !(grad[k + l] - grad[k + l] == T(0));",
        skips("(0, 0)"),
    ),
    Mutant(
        "nonfinite-forgotten-in-chunk",
        "only the last block of a chunk counts as non-finite",
        "csrc/cpu/engine.h",
        "partial.nonfinite += block.nonfinite;",
        "partial.nonfinite = block.nonfinite;",
        skips("(0, 0)"),
    ),
    Mutant(
        "int8-block-short",
        "the last element of each block of 256 is left out",
        "csrc/cpu/engine.h",
        "return n - first < kStateBlock ? n - first : kStateBlock; }",
        "return n - first < kStateBlock ? n - first : kStateBlock - 1; }",
        (
            "tests/optim/test_format_rounding.py::test_engine_rounds_as_numpy_does"
            "[{device}-adamw-decay-float32-int8_states-normal]",
        ),
    ),
    Mutant(
        "int8-first-scale",
        "every block is decoded with the scale of the first",
        "csrc/cpu/engine.h",
        "const float unit = scales[first / kStateBlock];",
        "const float unit = scales[0 * first];",
        (
            "tests/optim/test_format_rounding.py::test_engine_rounds_as_numpy_does"
            "[{device}-adamw-decay-float32-int8_states-hard]",
        ),
    ),
    Mutant(
        "random-step-late",
        "random bits of the step before",
        "csrc/cpu/engine.h",
        "{job.seed, on.tensor.id, uint32(on.step)});",
        "{job.seed, on.tensor.id, uint32(on.step) - 1});",
        (
            "tests/optim/test_format_rounding.py::test_engine_rounds_as_numpy_does"
            "[{device}-adamw-decay-bfloat16-stochastic-None_states-normal]",
        ),
    ),
    Mutant(
        "lamb-norm-short",
        "the last element of a block is missing in LAMB's norms",
        "csrc/cpu/engine.h",
        "for (int l = 0; i + l < n; ++l) lanes[l] += double(x[i + l]) * double(x[i + l]);",
        "for (int l = 0; i + l < n - 1; ++l) lanes[l] += double(x[i + l]) * double(x[i + l]);",
        follows("lamb-decay"),
    ),
    Mutant(
        "lamb-norm-in-float",
        "squares of LAMB's norms in float",
        "csrc/cpu/engine.h",
        "for (int l = 0; i + l < n; ++l) lanes[l] += double(x[i + l]) * double(x[i + l]);",
        "for (int l = 0; i + l < n; ++l) lanes[l] += double(x[i + l] * x[i + l]);",
        ("tests/optim/test_lamb.py::test_squares_may_leave_the_range_of_floats[{device}-1e-30]",),
    ),
    Mutant(
        "skipped-step-counts",
        "the step counters go on in a skipped step",
        "csrc/cpu/passes.cpp",
        "  if (skip) return;\n",
        "  if (skip) {\n    for (int64 t = 0; t < tensors; ++t)\n"
        "      if (job.table.grads[t]) *job.table.tensors[t].step += 1.0f;\n    return;\n  }\n",
        skips("(0, 0)"),
    ),
    Mutant(
        "step-counts-without-gradient",
        "the step counter goes on for a tensor without a gradient",
        "csrc/cpu/passes.cpp",
        "if (job.table.grads[t]) *job.table.tensors[t].step += 1.0f;",
        "*job.table.tensors[t].step += 1.0f;",
        (
            "tests/optim/test_torch_parity.py::test_same_numbers_as_torch[{device}-intermittent_gradients-adamw-decay"
            "-torch.float32]",
        ),
    ),
    Mutant(
        "norm-order-by-threads",
        "a reduction whose order depends on the number of threads",
        "csrc/cpu/passes.cpp",
        "    sum = baseline::combine(sum, partial.sum, job.type);\n",
        "    const size_t i = size_t(&partial - partials.data());\n"
        "    const size_t other = threads > 1 ? partials.size() - 1 - i : i;\n"
        "    sum = baseline::combine(sum, partials[other].sum, job.type);\n",
        ("tests/cpu/test_engine.py::test_thread_counts_give_the_same_bits[2]",),
    ),
    Mutant(
        "norm-order-by-chance",
        "parts of the norm are added in the order in which threads are done",
        "csrc/cpu/passes.cpp",
        "parallel_for(threads, int64(chunks.size()), [&](int64 i) { partials[i] = engine.norm(job, chunks[i]); });",
        "int64 done = 0;\n"
        "  parallel_for(threads, int64(chunks.size()), [&](int64 i) {\n"
        "    const NormPartial partial = engine.norm(job, chunks[i]);\n"
        "    partials[__atomic_fetch_add(&done, 1, __ATOMIC_RELAXED)] = partial;\n"
        "  });",
        ("tests/optim/test_clip.py::test_order_of_sums_is_always_the_same[{device}]",),
    ),
    Mutant(
        "last-chunk-dropped",
        "with threads, the last chunk is left out",
        "csrc/host/threads.cpp",
        "(i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;)",
        "(i = next_.fetch_add(1, std::memory_order_relaxed)) < count_ - 1;)",
        ("tests/cpu/test_engine.py::test_thread_counts_give_the_same_bits[2]",),
    ),
    Mutant(
        "found-inf-of-two",
        "found_inf of 2, the sum over two devices, does not skip",
        "csrc/bindings.cpp",
        "return flag && *flag != 0.0f; }",
        "return flag && *flag == 1.0f; }",
        ("tests/optim/test_amp.py::test_any_found_inf_that_is_not_zero_skips[{device}-2.0]",),
    ),
    Mutant(
        "skipped-verdict-stays",
        "step_was_skipped stays true",
        "csrc/bindings.cpp",
        "args.control->skipped = skip ? 1.0f : 0.0f;",
        "if (skip) args.control->skipped = 1.0f;",
        (f"{NONFINITE}::test_counters[{{device}}]",),
    ),
]

MUTANTS = GRADIENT + ENGINE
