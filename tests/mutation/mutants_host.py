"""Mistakes in what looks at torch's objects between steps: stale pointers, and what goes unnoticed."""

from mutants import Mutant

LAYOUT = "tests/host/test_tensor_layout.py"
REPETITION = "tests/optim/test_repetition.py"


def notices(change: str) -> tuple[str, ...]:
    return (f"{REPETITION}::test_changes_between_steps[{{device}}-adamw-decay-{change}]",)


MUTANTS = [
    Mutant(
        "stale-parameter",
        "a parameter whose memory moved is written where it was",
        "csrc/host/watch.cpp",
        "if (!rows_[i].param.is_at(rows_[i].memory)) return false;",
        "",
        notices("swapped_data"),
    ),
    Mutant(
        "stale-state",
        "a state whose memory moved is written where it was",
        "csrc/host/watch.cpp",
        "if (!state.tensor.is_at(state.memory)) return false;",
        "",
        (f"{LAYOUT}::test_memory_that_moved[{{device}}-swapped-state]",),
    ),
    Mutant(
        "replaced-parameter",
        "another parameter in the place of one in group['params'] goes unnoticed",
        "csrc/host/watch.cpp",
        "if (list.items[i - list.first_row] != rows_[i].listed.object()) return false;",
        "(void)list;",
        ("tests/optim/test_state.py::test_replacement_that_shares_memory_has_no_state_yet[{device}]",),
    ),
    Mutant(
        "gradient-layout-ignored",
        "a gradient laid out unlike its parameter is read as if it were",
        "csrc/host/watch.cpp",
        "const bool direct = same_strides(grad, shape + row.ndim) && !lazy;",
        "const bool direct = !lazy;",
        ("tests/optim/test_rules.py::test_layouts_of_parameters_and_gradients[{device}-adamw-decay-torch.float32]",),
    ),
    Mutant(
        "gradient-layout-changes",
        "of a gradient like the last one, strides are not looked at",
        "csrc/host/tensor_ref.cpp",
        "words[layout->sizes + d] != uint64(shape[d]) || words[layout->sizes + kInlineDims + d] != uint64(strides[d]))",
        "words[layout->sizes + d] != uint64(shape[d]) || strides[d] < 0)",
        (f"{LAYOUT}::test_gradients_of_one_permutation_and_then_of_another[{{device}}]",),
    ),
    Mutant(
        "gradient-offset-lost",
        "a gradient that begins in the middle of its storage is read from the storage's start",
        "csrc/host/tensor_ref.cpp",
        "(storage[0] + words[layout->storage_offset] * kSizes[dtype]);",
        "(storage[0] + 0 * kSizes[dtype]);",
        ("tests/optim/test_clip.py::test_same_bits_every_time[{device}]",),
    ),
    Mutant(
        "lazy-clone-written",
        "memory that a lazy clone shares is written in place",
        "csrc/host/tensor_ref.cpp",
        "storage[0] == memory.storage_data && storage[1] == memory.owner &&",
        "storage[0] == memory.storage_data &&",
        (f"{LAYOUT}::test_lazy_clones_keep_their_values[{{device}}-param]",),
    ),
    Mutant(
        "hooks-not-called",
        "a repeated step passes over the optimizer's hooks",
        "csrc/host/repeated_step.cpp",
        "if (!is_empty(PyDict_GetItem(optimizer, hooks))) return false;",
        "(void)hooks;",
        (f"{REPETITION}::test_an_optimizers_own_hook_is_told_of_every_step[{{device}}-register_step_pre_hook]",),
    ),
    Mutant(
        "stale-learning-rate",
        "a repeated step keeps the hyper-parameters of the one before",
        "csrc/host/repeated_step.cpp",
        "if (groups.size() != hypers->rows().size() || !hypers->pack(groups).empty()) return false;",
        "if (groups.size() != hypers->rows().size()) return false;",
        notices("lr"),
    ),
    Mutant(
        "stale-copy-of-gradient",
        "a repeated step takes no notice of gradients that must be laid out anew",
        "csrc/host/repeated_step.cpp",
        "watch_.refresh(groups, state, relayout, true) || !relayout.empty()) return false;",
        "watch_.refresh(groups, state, relayout, true)) return false;",
        (f"{LAYOUT}::test_gradients_of_another_kind[{{device}}-transposed]",),
    ),
    Mutant(
        "scaler-passed-over",
        "a repeated step passes over a scaler's grad_scale and found_inf",
        "csrc/host/repeated_step.cpp",
        "return grad_scale_.take(grad_scale) && found_inf_.take(found_inf);",
        "return true;",
        (f"{REPETITION}::test_scalers_between_steps[{{device}}]",),
    ),
    Mutant(
        "autograd-not-told",
        "a repeated step does not count parameters' versions up",
        "csrc/host/watch.cpp",
        "if (bump && rows_[i].table && rows_[i].table->grad(rows_[i].slot)) bump_version(rows_[i]);",
        "(void)bump;",
        (f"{REPETITION}::test_autograd_notices_that_parameters_were_written[{{device}}]",),
    ),
    Mutant(
        "main-gradients-not-dropped",
        "main gradients of the last step are added to the next one's",
        "csrc/host/watch.h",
        "bool value() const { return since_ == epoch_->now; }",
        "bool value() const { return since_ >= 0; }",
        (
            "tests/accumulate/test_accumulate.py::test_step_follows_the_reference"
            "[{device}-adamw-decay-torch.float32-torch.float32]",
        ),
    ),
    Mutant(
        "chunk-table-short",
        "a tensor's last chunk is missing in the table",
        "csrc/host/table.h",
        "} while (entry.chunks * chunk_size_ < entry.numel);",
        "} while ((entry.chunks + 1) * chunk_size_ <= entry.numel);",
        ("tests/optim/test_rules.py::test_sizes_and_hard_values[{device}-adamw-decay-torch.float32]",),
    ),
]
