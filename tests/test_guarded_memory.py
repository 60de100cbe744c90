"""What passes write, and read: canaries around every buffer, and memory that nobody has written to yet is poison.

Each tensor is a view inside a larger buffer full of a pattern, 64 elements from either end; a write next to it changes
the pattern. States, masters and scales are moved into such buffers after the first step has made them. Reads beyond a
tensor are for compute-sanitizer: `tests/tools/sanitize.py`.
"""

import contextlib

import pytest
import torch
from cases import BY_NAME, assert_same_bits, backend_or_skip, memory, normal, parameters
from format_cases import COMBINATIONS, Combination, set_gradient

import fusedopt
from fusedopt import specs

PATTERN, MARGIN = 0xA5, 64
ROWS = [BY_NAME[name] for name in ("adamw-decay", "lion-decay", "sgd-l2", "adam-amsgrad", "lamb-decay")]
FORMATS = [*COMBINATIONS, Combination(torch.float64)]
# Around vectors, blocks of 8-bit states and chunks; few in Triton's interpreter.
SIZES = [1, 7, 31, 255, 257, 1023, specs.CUDA_CHUNK - 1, specs.CUDA_CHUNK + 1, specs.CUDA_CHUNK_BLOCKED + 33]
FEW_SIZES = [1, 31, 257]


@pytest.fixture(params=["best", "triton"])
def backend(request, device) -> str | None:
    return backend_or_skip(request.param, device)


class Guarded:
    """Buffers with canaries around the tensors that it hands out."""

    def __init__(self, device) -> None:
        self.device, self.buffers = device, []

    def copy(self, values: torch.Tensor, shift: int = 0) -> torch.Tensor:
        """A copy with the strides of ``values``, dense, ``shift`` elements away from aligned memory."""
        size, margin = values.element_size(), MARGIN * values.element_size()
        inside = slice(margin + shift * size, margin + shift * size + values.numel() * size)
        buffer = torch.full((inside.stop + margin,), PATTERN, dtype=torch.uint8, device=self.device)
        self.buffers.append((buffer, inside))
        view = buffer[: -(-buffer.numel() // size) * size].view(values.dtype)
        return view.as_strided(values.shape, values.stride(), MARGIN + shift).copy_(values)

    def check(self) -> None:
        for i, (buffer, inside) in enumerate(self.buffers):
            changed = (buffer.cpu() != PATTERN).nonzero().flatten().tolist()
            outside = [at for at in changed if not inside.start <= at < inside.stop]
            assert not outside, f"buffer {i}: wrote to byte {outside[0]}, outside of {inside.start} to {inside.stop}"


def guard_states(opt, guarded: Guarded) -> None:
    for state in opt.state.values():
        for key, value in state.items():
            if key != "step":
                state[key] = guarded.copy(value)


def test_the_guard_sees_a_write_next_to_a_tensor(device):
    guarded = Guarded(device)
    t = guarded.copy(torch.zeros(5), shift=1)
    guarded.check()
    t.as_strided((1,), (1,), t.storage_offset() + 5).zero_()
    with pytest.raises(AssertionError, match="wrote to byte"):
        guarded.check()


def interpreted(backend, device) -> bool:
    return backend == "triton" and device.type == "cpu"


def sizes_for(backend, device) -> list[int]:
    return FEW_SIZES if interpreted(backend, device) else SIZES


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("number", range(len(FORMATS)), ids=[str(form) for form in FORMATS])
def test_steps_write_nothing_beside_their_tensors(number, shift, backend, device):
    """In every format, one rule after the other; gradients are not written at all."""
    if backend == "triton" and (number % 4 or not shift):
        pytest.skip("slow to compile and to interpret: Triton gets every fourth format, misaligned")
    form, case = FORMATS[number], ROWS[number % len(ROWS)]
    if not case.rule_spec.states and form.state_dtype:
        case = ROWS[0]
    guarded = Guarded(device)
    values = [normal((n,), form.dtype, device, seed=i) for i, n in enumerate(sizes_for(backend, device))]
    params = [torch.nn.Parameter(guarded.copy(t, shift)) for t in values]
    options = {**form.options, **({"seed": 5} if form.is_random else {})}
    opt = case.make(params, backend=backend, max_grad_norm=1.0, min_8bit_size=1, **options)
    grads = [guarded.copy(normal(p.shape, p.dtype, device, seed=50 + i), shift) for i, p in enumerate(params)]
    before = [g.clone() for g in grads]
    for p, g in zip(params, grads, strict=True):
        set_gradient(p, g)
    for _ in range(2):
        opt.step()
        guard_states(opt, guarded)
    opt.step()
    guarded.check()
    assert_same_bits(grads, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scaled_gradients_have_nothing_written_beside_them(dtype, backend, device):
    guarded = Guarded(device)
    params = parameters(sizes_for(backend, device), dtype, device)
    for i, p in enumerate(params):
        p.grad = guarded.copy(normal(p.shape, dtype, device, seed=i), i % 2)
    with fusedopt.use_backend(backend):
        fusedopt.clip_grad_norm_(params, 0.5)
        fusedopt.clip_grad_value_(params, 0.01)
    guarded.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulation_writes_nothing_beside_its_tensors(dtype, backend, device):
    """Parameters and `.grad` in guarded memory; main gradients are the accumulator's own."""
    guarded = Guarded(device)
    params = [
        torch.nn.Parameter(guarded.copy(normal((n,), dtype, device, seed=i), i % 2))
        for i, n in enumerate(sizes_for(backend, device))
    ]
    opt = fusedopt.AdamW(params, backend=backend, max_grad_norm=1.0)
    accumulator = fusedopt.GradAccumulator(opt)
    for k in range(3):
        for i, p in enumerate(params):
            p.grad = guarded.copy(normal(p.shape, dtype, device, seed=10 * k + i), (i + k) % 2)
        if k < 2:
            accumulator.accumulate()
    opt.step()
    guarded.check()


# ---- poison -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned_memory():
    """What `torch.empty` returns is full of NaN, or of the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize("number", range(0, len(COMBINATIONS), 3), ids=lambda i: str(COMBINATIONS[i]))
def test_nothing_is_read_before_it_is_written(number, backend, device):
    """Steps, norms and sums are the same whatever was in new memory."""
    if backend == "triton" and number % 5:
        pytest.skip("slow to compile and to interpret: Triton gets some of the formats")
    form = COMBINATIONS[number]

    def run():
        params = parameters(sizes_for(backend, device)[-3:], form.dtype, device)
        options = {**form.options, **({"seed": 5} if form.is_random else {})}
        opt = BY_NAME["adamw-amsgrad"].make(params, backend=backend, max_grad_norm=1.0, min_8bit_size=1, **options)
        accumulator = fusedopt.GradAccumulator(opt)
        for step in range(2):
            for k in range(2):
                for i, p in enumerate(params):
                    p.grad = normal(p.shape, p.dtype, device, seed=100 * step + 10 * k + i)
                if k == 0:
                    accumulator.accumulate()
            opt.step()
        return [*memory(opt), opt.grad_norm.clone(), opt.clip_coef.clone()]

    expected = run()
    with poisoned_memory():
        found = run()
    assert_same_bits(found, expected)
