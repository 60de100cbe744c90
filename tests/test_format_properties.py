"""Exact invariances of steps, bit for bit, over rules × formats × backends. Without formats: `test_properties.py`."""

import copy
import itertools
import math

import pytest
import torch
from cases import BY_RULE, STATELESS, assert_same_bits, backend_or_skip, generator, memory, normal, parameters
from format_cases import COMBINATIONS, FLOAT32, set_gradient

import fusedopt

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

# Derandomised: a failure today is a failure tomorrow.
PROPERTY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

rules = st.sampled_from([*BY_RULE, *STATELESS])
formats = st.sampled_from(COMBINATIONS)
clips = st.sampled_from([{}, {"max_grad_norm": 0.5}])
few_sizes = st.lists(st.sampled_from([0, 1, 7, 33, 256, 257]), min_size=1, max_size=3)
more_sizes = st.lists(st.sampled_from([0, 1, 7, 33, 256, 257, 8193]) | st.integers(0, 600), min_size=1, max_size=6)


@pytest.fixture(params=["best", "triton", "reference"])
def backend(request, device) -> str | None:
    return backend_or_skip(request.param, device)


@pytest.fixture
def check(device, backend):
    """Calls a property with random rules, formats and sizes. Triton's interpreter takes a tenth of a second for a step,
    so it gets few and small examples; on a GPU each example compiles kernels."""
    interpreted = backend == "triton" and device.type == "cpu"
    count = 2 if backend == "triton" else 5 if device.type == "cuda" else 10

    def call(prop, **more) -> None:
        strategies = {"case": rules, "form": formats, "sizes": few_sizes if interpreted else more_sizes, **more}
        settings(PROPERTY, max_examples=count)(given(**strategies)(prop))()

    return call


def make(case, form, params, backend, **options):
    """The optimizer of a row in a format; 8-bit states whatever the size, random bits from a seed."""
    options = {**form.options, **options}
    if form.is_random:
        options["seed"] = 77
    if not case.rule_spec.states:
        options.pop("state_dtype", None)
    return case.make(params, backend=backend, min_8bit_size=1, **options)


def give(params, seed: int, scale: float = 1.0) -> None:
    for i, p in enumerate(params):
        set_gradient(p, normal(p.shape, p.dtype, p.device, seed=1000 + 100 * seed + i) * scale)


def steps(opt, params, numbers) -> None:
    for number in numbers:
        give(params, number)
        opt.step()


def kept(opt, params) -> list[torch.Tensor]:
    """Parameters and states, in the order of `params`."""
    states = [value for p in params for _, value in sorted(opt.state.get(p, {}).items())]
    return [*(p.detach() for p in params), *(torch.as_tensor(value) for value in states)]


def test_order_of_tensors_does_not_matter(check, backend, device):
    """Random bits depend on a tensor's position, so formats without them."""

    def prop(case, form, sizes, data):
        order = data.draw(st.permutations(range(len(sizes))))
        params, shuffled = (parameters(sizes, form.dtype, device) for _ in range(2))
        opt, other = make(case, form, params, backend), make(case, form, [shuffled[i] for i in order], backend)
        steps(opt, params, range(2))
        steps(other, shuffled, range(2))
        assert_same_bits(kept(other, shuffled), kept(opt, params))

    check(prop, form=st.sampled_from([c for c in COMBINATIONS if not c.is_random]), data=st.data())


def test_split_into_groups_does_not_matter(check, backend, device):
    def prop(case, form, sizes, data):
        cut = data.draw(st.integers(0, len(sizes)))
        params, split = (parameters(sizes, form.dtype, device) for _ in range(2))
        opt = make(case, form, params, backend)
        other = make(case, form, [{"params": split[:cut]}, {"params": split[cut:]}], backend)
        steps(opt, params, range(2))
        steps(other, split, range(2))
        assert_same_bits(kept(other, split), kept(opt, params))

    check(prop, data=st.data())


def test_power_of_two_scaling_is_exact(check, backend, device):
    """Gradients times 2^k with grad_scale 2^k are the gradients. k >= 0: float16 has subnormal numbers soon."""

    def prop(case, form, sizes, exponent, clip):
        params, scaled = (parameters(sizes, form.dtype, device) for _ in range(2))
        opt, other = make(case, form, params, backend, **clip), make(case, form, scaled, backend, **clip)
        other.grad_scale = torch.tensor(2.0**exponent, device=device)
        other.found_inf = torch.zeros((), device=device)
        for seed in range(2):
            give(params, seed)
            give(scaled, seed, scale=2.0**exponent)
            opt.step()
            other.step()
        assert_same_bits(kept(other, scaled), kept(opt, params))

    check(prop, exponent=st.integers(0, 10), clip=clips)


def test_resumed_training_is_uninterrupted_training(check, backend, device):
    def prop(case, form, sizes, done, clip):
        params = parameters(sizes, form.dtype, device)
        opt = make(case, form, params, backend, **clip)
        steps(opt, params, range(done))
        resumed_params = copy.deepcopy(params)
        resumed = make(case, form, resumed_params, backend, **clip)
        resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
        steps(opt, params, range(done, done + 2))
        steps(resumed, resumed_params, range(done, done + 2))
        assert_same_bits(memory(resumed), memory(opt))

    check(prop, done=st.integers(1, 2), clip=clips)


def test_skipped_step_is_the_identity(check, backend, device):
    """On all memory: parameters, masters, states, scales and counters; in the first step of what was there."""

    def prop(case, form, sizes, value, done, data):
        params = parameters(sizes, form.dtype, device)
        opt = make(case, form, params, backend, nonfinite="skip")
        steps(opt, params, range(done))
        before = memory(opt)
        give(params, 1)
        at = data.draw(st.sampled_from([i for i, n in enumerate(sizes) if n]))
        params[at].grad[data.draw(st.integers(0, sizes[at] - 1))] = value
        opt.step()
        assert_same_bits(memory(opt) if done else params, before)
        assert opt.step_was_skipped.item() is True

    values = st.sampled_from([math.inf, -math.inf, math.nan])
    check(prop, sizes=few_sizes.filter(any), value=values, done=st.integers(0, 1), data=st.data())


def test_every_run_and_every_number_of_threads_give_the_same_bits(check, backend, device):
    """On CUDA the second run is on a stream of its own."""

    def run(case, form, sizes, threads):
        params = parameters(sizes, form.dtype, device)
        opt = make(case, form, params, backend, max_grad_norm=0.5)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            steps(opt, params, range(2))
        finally:
            torch.set_num_threads(before)
        return [*memory(opt), opt.grad_norm, opt.clip_coef]

    def prop(case, form, sizes, threads):
        expected = run(case, form, sizes, 1)
        if device.type == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found = run(case, form, sizes, threads)
            stream.synchronize()
        else:
            found = run(case, form, sizes, threads)
        assert_same_bits(found, expected)

    check(prop, threads=st.integers(1, 4))


def test_the_clip_coefficient_is_continuous(check, backend, device):
    """It grows with the limit, by no more than the limit does beside the norm, up to exactly 1; there the step is the
    one without a limit. Of each coefficient norm + 1e-6, the quotient and the result are rounded to float32 at most."""

    def prop(case, form, sizes, places, scale):
        params = parameters(sizes, form.dtype, device)
        give(params, 0, scale=scale)
        norm = float(fusedopt.get_total_norm([p.grad.double() for p in params]))
        limits = sorted((norm + 1e-6) * (1 + k * 2.0**-22) for k in places)
        coefs = [clipped(case, form, sizes, scale, limit)[0] for limit in limits]
        for (low, high), (first, second) in zip(itertools.pairwise(limits), itertools.pairwise(coefs)):
            assert first <= second <= 1.0
            assert second - first <= (high - low) / norm + 3 * 2.0**-23
        coef, bits = clipped(case, form, sizes, scale, (norm + 1e-6) * (1 + 2.0**-20))
        assert coef == 1.0
        assert_same_bits(bits, clipped(case, form, sizes, scale, None)[1])

    def clipped(case, form, sizes, scale, limit):
        params = parameters(sizes, form.dtype, device)
        opt = make(case, form, params, backend, max_grad_norm=limit)
        give(params, 0, scale=scale)
        opt.step()
        return opt.clip_coef.item() if limit else 1.0, memory(opt)

    places = st.lists(st.integers(-(2**21), 4) | st.integers(-4, 4), min_size=2, max_size=3)
    check(prop, sizes=few_sizes.filter(any), places=places, scale=st.sampled_from([1.0, 0.125, 16.0]))


def test_micro_batches_are_one_batch(check, backend, device):
    """Gradients are multiples of 1/8 below 16 and their number a power of two, so that sum and mean are exact in
    float32, and the step has the bits of one on the mean. With rounding: the transform "accumulate" of `verify`."""

    def gradient(p, seed, micro_batch):
        eighths = torch.randint(-127, 128, p.shape, generator=generator(1000 * seed + micro_batch))
        return (eighths / 8).to(p.device)

    def prop(case, form, sizes, count):
        params, whole = (parameters(sizes, form.dtype, device) for _ in range(2))
        opt, other = make(case, form, params, backend), make(case, form, whole, backend)
        accumulator = fusedopt.GradAccumulator(opt)
        for step in range(2):
            for k in range(count):
                for i, p in enumerate(params):
                    p.grad = gradient(p, step + 10 * i, k).to(p.dtype)
                if k + 1 < count:
                    accumulator.accumulate()
            opt.step()
            for i, p in enumerate(whole):
                p.main_grad = sum(gradient(p, step + 10 * i, k) for k in range(count)).to(FLOAT32) / count
            other.step()
        assert_same_bits(kept(opt, params), kept(other, whole))

    check(prop, count=st.sampled_from([1, 2, 4]))
