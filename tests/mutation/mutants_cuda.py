"""Mistakes in the CUDA kernels and in what launches them: only a GPU can tell."""

from mutants import Mutant

BITS = "tests/optim/test_cpu_cuda_bits.py"
NONFINITE = "tests/optim/test_nonfinite.py"
ACCUMULATE = "tests/accumulate/test_accumulate.py"
FORMATS = "tests/optim/test_formats.py::test_same_bits_on_cpu_and_cuda"
SHARED = "tests/optim/test_formats.py::test_chunks_that_share_out_their_rounds"
UPDATE, NORM, VECTORS = "csrc/cuda/update.cuh", "csrc/cuda/norm.cuh", "csrc/cuda/vectors.cuh"


def same_bits(variant: str, dtype: str = "float32") -> tuple[str, ...]:
    """As the CPU's."""
    return (f"{BITS}::test_optimizers[{variant}-torch.{dtype}]",)


def mutant(name: str, mistake: str, path: str, old: str, new: str, tests: tuple[str, ...]) -> Mutant:
    return Mutant(name, mistake, path, old, new, tests, gpu=True)


MUTANTS = [
    mutant(
        "cuda-tail-dropped",
        "elements behind the last whole vector are left out",
        VECTORS,
        "split.scalars = split.head + count - split.vectored;",
        "split.scalars = split.head;",
        same_bits("adamw-decay"),
    ),
    mutant(
        "cuda-head-dropped",
        "elements before the first aligned one are left out",
        VECTORS,
        "split.head = chunk_index == 0 ? int(head < numel ? head : numel) : 0;",
        "split.head = 0;",
        ("tests/optim/test_rules.py::test_layouts_of_parameters_and_gradients[{device}-adamw-decay-torch.float32]",),
    ),
    mutant(
        "cuda-chunk-int32",
        "offsets in 32 bits",
        VECTORS,
        "split.first = head + int64(chunk_index) * kChunk;",
        "split.first = head + int(chunk_index * kChunk);",
        (f"{BITS}::test_more_elements_than_int32",),
    ),
    mutant(
        "cuda-rounds-not-in-turn",
        "of chunks that share out their rounds each begins at the first one's beginning",
        VECTORS,
        "int64(neighbours) * kChunk + (int(chunk.index) - neighbours) * kRound;",
        "int64(neighbours) * kChunk;",
        same_bits("adamw-decay"),
    ),
    mutant(
        "cuda-last-group-full",
        "the last chunks of a tensor lie in turn as if they were as many as the others",
        VECTORS,
        "const int together = minimum(kTogether, full - neighbours);",
        "const int together = kTogether;",
        (f"{SHARED}[adamw-decay-float32-None_states-aligned-cuda]",),
    ),
    mutant(
        "cuda-alignment-assumed",
        "vector accesses to streams that are not aligned",
        VECTORS,
        "aligned(reinterpret_cast<uint64>(base) % alignof(Vector<Format, V>) == 0) {",
        "aligned(true) {",
        ("tests/optim/test_rules.py::test_layouts_of_parameters_and_gradients[{device}-adamw-decay-torch.float32]",),
    ),
    mutant(
        "cuda-skipped-step-counts",
        "the step counters go on in a skipped step",
        UPDATE,
        "if (last && !skip) *tensor.step = step + 1.0f;",
        "if (last) *tensor.step = step + 1.0f;",
        (
            f"{NONFINITE}::test_counters[{{device}}]",
            f"{NONFINITE}::test_skipped_step_changes_nothing[{{device}}-{{}}-inf-(0, 0)]",
        ),
    ),
    mutant(
        "cuda-found-inf-of-two",
        "found_inf of 2, the sum over two devices, does not skip",
        UPDATE,
        "return (asked != 0.0f) |",
        "return (asked == 1.0f) |",
        ("tests/optim/test_amp.py::test_any_found_inf_that_is_not_zero_skips[{device}-2.0]",),
    ),
    mutant(
        "cuda-maximize-ignored",
        "maximize minimises",
        UPDATE,
        "if (hyper_of(args, table, tensor.group).maximize) transform.clip_coef = -transform.clip_coef;",
        "",
        same_bits("adamw-maximize"),
    ),
    mutant(
        "cuda-ticket-never-full",
        "no block is the last one",
        "csrc/cuda/launch.cuh",
        "return atomicInc(ticket, parties - 1) == parties - 1;",
        "return atomicInc(ticket, parties) == parties;",
        (f"{NONFINITE}::test_counters[{{device}}]", f"{BITS}::test_clipped_steps[torch.float32]"),
    ),
    mutant(
        "cuda-lr-always-float",
        "a learning rate that is a float64 tensor is read as float32",
        "csrc/cuda/launch.cuh",
        "hyper.lr_is_double ? *static_cast<const double*>(hyper.lr) : *static_cast<const float*>(hyper.lr);",
        "*static_cast<const float*>(hyper.lr);",
        ("tests/optim/test_graphs.py::test_learning_rate_tensors_of_both_dtypes[torch.float64]",),
    ),
    mutant(
        "cuda-noise-of-first-chunk",
        "parts of rounds get the random bits of the first chunk",
        UPDATE,
        "unit, noise(plan, uint64(first + i)), plan);\n      param.store(i, r.param[j], n);",
        "unit, noise(plan, uint64(i)), plan);\n      param.store(i, r.param[j], n);",
        (f"{FORMATS}[adamw-decay-bfloat16-stochastic-None_states]",),
    ),
    mutant(
        "cuda-scales-of-first-chunk",
        "8-bit states of every chunk use the scales of the first",
        UPDATE,
        "units[k] = tensor.scales[k] + split.first / kStateBlock;",
        "units[k] = tensor.scales[k];",
        (f"{FORMATS}[adamw-decay-float32-int8_states]",),
    ),
    mutant(
        "cuda-int8-maximum-of-thread",
        "the unit of a block is found from 8 of its 256 elements",
        UPDATE,
        "unit = S::unit_of(warp_maximum(largest));",
        "unit = S::unit_of(largest);",
        (f"{FORMATS}[adamw-decay-float32-int8_states]",),
    ),
    mutant(
        "cuda-root-division-not-corrected",
        "a division that is off by a unit in the last place",
        "csrc/core/platform.h",
        "return x < bit_cast<T>(0x7f800000u) ? corrected : quotient;",
        "return x < bit_cast<T>(0x7f800000u) ? quotient : corrected;",
        same_bits("adamw-decay"),
    ),
    mutant(
        "cuda-pairs-swapped",
        "two bfloat16 elements change places",
        "csrc/formats/plain.h",
        'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));',
        'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(low), "f"(high));',
        same_bits("adamw-decay", "bfloat16"),
    ),
    mutant(
        "cuda-nan-of-split",
        "NaN carries into -0 when a split is made",
        "csrc/formats/param.h",
        "return uint32(min(bit_cast<int32>(x), 0x7fff0000));",
        "return bit_cast<uint32>(x);",
        (f"{FORMATS}[adamw-decay-bfloat16-split16-None_states]",),
    ),
    mutant(
        "cuda-nonfinite-forgotten",
        "only a thread's last element counts as non-finite",
        NORM,
        "nonfinite |= !(raw - raw == T(0));",
        "nonfinite = !(raw - raw == T(0));",
        (f"{NONFINITE}::test_skipped_step_changes_nothing[{{device}}-{{}}-inf-(0, 0)]",),
    ),
    mutant(
        "cuda-norm-warp-lost",
        "a warp's sum is missing in the norm",
        NORM,
        "for (int warp = 1; warp < kThreads / 32; ++warp)",
        "for (int warp = 2; warp < kThreads / 32; ++warp)",
        (f"{BITS}::test_clipped_steps[torch.float32]",),
    ),
    mutant(
        "cuda-norm-underflows",
        "squares of small gradients vanish in float",
        NORM,
        "if (quick > 1e-30f && quick < 1e38f) {",
        "if (quick < 1e38f) {",
        ("tests/optim/test_clip.py::test_small_gradients_do_not_underflow_the_norm[{device}-5000]",),
    ),
    mutant(
        "cuda-norm-order-by-chance",
        "parts of the norm are added in the order in which blocks finish",
        NORM,
        "args.partials[args.first_partial + blockIdx.x] = partial;",
        "args.partials[args.first_partial + atomicInc(&args.control->unused, gridDim.x - 1)] = partial;",
        ("tests/optim/test_clip.py::test_order_of_sums_is_always_the_same[{device}]",),
    ),
    mutant(
        "cuda-main-gradient-lost-in-tail",
        "main gradients are not added to elements behind the last whole vector",
        "csrc/cuda/gradients.cuh",
        "if (source.has_main) vector.main.set(0, main.base[i]);",
        "if (source.has_main) vector.main.set(0, typename M::Storage());",
        (f"{ACCUMULATE}::test_step_follows_the_reference[{{device}}-adamw-decay-torch.float32-torch.float32]",),
    ),
    mutant(
        "cuda-weight-lost-in-tail",
        "the weight of a micro-batch is 1 behind the last whole vector",
        "csrc/cuda/accumulate.cuh",
        "Pass::add(grad.scalar(i), source, weight, sum);",
        "Pass::add(grad.scalar(i), source, decltype(weight)(1), sum);",
        (f"{ACCUMULATE}::test_weights[{{device}}-[3.0, 1.0, 2.5]-mean-number]",),
    ),
    mutant(
        "cuda-lamb-parts-lost",
        "LAMB's norms are those of a tensor's first chunk",
        "csrc/cuda/measure.cuh",
        "const int64 end = int64(tensor.chunks) * kNorms;",
        "const int64 end = kNorms;",
        ("tests/optim/test_lamb.py::test_norms_are_of_the_clipped_gradient[{device}]",),
    ),
    mutant(
        "cuda-scale-nan-hidden",
        "unscale_grads_ finds nothing in elements behind the last whole vector",
        "csrc/cuda/scale.cuh",
        "    grad.base[i] = scale(grad.base[i]);",
        "    const bool before = nonfinite;\n    grad.base[i] = scale(grad.base[i]);\n    nonfinite = before;",
        ("tests/test_clip_functions.py::test_unscale_grads_finds_nonfinite[{device}-inf-(2, 16)]",),
    ),
    mutant(
        "cuda-table-pieces-overwrite",
        "every piece of a large step table is sent to its beginning",
        "fusedopt/backends/cuda.py",
        "tables.stream, address + offset, bucket.table, offset, size, piece)",
        "tables.stream, address, bucket.table, offset, size, piece)",
        (f"{BITS}::test_thousands_of_tensors[5000]",),
    ),
    mutant(
        "cuda-partials-not-added",
        "of several buckets the last one's norm is the total",
        "fusedopt/backends/cuda.py",
        "args.first_partial = i * most",
        "args.first_partial = 0",
        ("tests/optim/test_clip.py::test_norm_covers_all_dtypes_groups_and_layouts[{device}]",),
    ),
    mutant(
        "cuda-norm-not-awaited",
        "the update that begins while the norm pass runs does not wait for its end",
        "csrc/cuda/launch.cuh",
        'asm volatile("griddepcontrol.wait;" ::: "memory");',
        "",
        tuple(
            f"tests/backends/test_overlap.py::test_same_bits_as_one_after_the_other[{case}]"
            for case in ("adamw-captured", "large-repeated")
        ),
    ),
]
