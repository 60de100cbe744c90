"""Steps of optimizers with formats against the float64 reference, alone and mixed; the same bits on CPU and CUDA."""

import math

import pytest
import torch
from cases import (
    ELEMENTWISE,
    GRAD_LAYOUTS,
    ONE_EACH,
    PARAM_LAYOUTS,
    STATELESS,
    assert_same_bits,
    comparer,
    hard_values,
    memory,
    normal,
    parameter,
    parameters,
    set_gradients,
    train,
)
from format_cases import (
    BFLOAT16,
    BLOCK,
    COMBINATIONS,
    FEW,
    FLOAT16,
    FLOAT32,
    GRAD_DTYPES,
    SIZES,
    TOGETHER,
    Combination,
    assert_state_formats,
    assert_stepped,
    before_step,
    hard_gradient,
    make_params,
    set_gradient,
)

import fusedopt
from fusedopt import specs

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

STEPS = 3


# ---- the reference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
@pytest.mark.parametrize("case", [*ONE_EACH, *STATELESS], ids=str)
def test_every_combination_with_gradients_of_every_dtype(case, combination, device):
    """Hard values and sizes."""
    if case in STATELESS and combination.state_dtype == "int8":
        pytest.skip("there is nothing to keep in 8 bits")
    params, dtypes = [], []

    def values(n, seed):
        return hard_values((n,), combination.dtype, device, seed=seed).clamp(-1e4, 1e4)

    for dtype in GRAD_DTYPES:
        params += [parameter(values(n, i)) for i, n in enumerate(SIZES)]
        dtypes += [dtype] * len(SIZES)
    opt = case.make(params, **combination.options, min_8bit_size=1)
    for p, dtype in zip(params, dtypes):
        if dtype != p.dtype:
            p.main_grad = None
    for step in range(STEPS):
        for i, (p, dtype) in enumerate(zip(params, dtypes)):
            set_gradient(p, hard_gradient(p, dtype, seed=1000 * step + i))
        before = before_step(opt, case.rule)
        opt.step()
        assert_stepped(opt, case.rule, before)
    assert_state_formats(opt, combination, case.rule, 1)


@pytest.mark.parametrize("combination", FEW, ids=str)
@pytest.mark.parametrize("case", ONE_EACH[1:], ids=str)
def test_layouts_of_parameters_and_gradients(case, combination, device):
    """All pairs of layouts."""
    layouts = [(make, lay) for make in PARAM_LAYOUTS.values() for lay in GRAD_LAYOUTS.values()]
    params = [parameter(make(lambda shape: normal(shape, combination.dtype, device, seed=7))) for make, _ in layouts]
    opt = case.make(params, **combination.options, min_8bit_size=256)
    for step in range(STEPS):
        for i, (p, (_, lay)) in enumerate(zip(params, layouts, strict=True)):
            p.grad = lay(normal(p.shape, p.dtype, device, seed=100 * step + i))
        before = before_step(opt, case.rule)
        opt.step()
        assert_stepped(opt, case.rule, before)
    assert_state_formats(opt, combination, case.rule, 256)


def next_code(opt, p):
    codes = opt.state[p]["exp_avg"]
    codes[5] += 2 if codes[5] < 100 else -2


def zero_code(opt, p):
    opt.state[p]["exp_avg_sq"][7] = 0


def larger_scale(opt, p):
    opt.state[p]["exp_avg_sq_scale"][1] *= 2


def smaller_scale(opt, p):
    opt.state[p]["exp_avg_sq_scale"][1] /= 2


def odd_scale(opt, p):
    opt.state[p]["exp_avg_sq_scale"][1] *= 1 - 2.0**-24


def scales_exchanged(opt, p):
    opt.state[p]["exp_avg_scale"].copy_(opt.state[p]["exp_avg_scale"].flip(0))


def remainder_lost(opt, p):
    opt.state[p]["param_remainder"].zero_()


def remainder_off_by_two(opt, p):
    opt.state[p]["param_remainder"][3] ^= 2


def master_off(opt, p):
    opt.state[p]["master_param"].mul_(1 + 2.0**-21)


def param_off(opt, p):
    p.data.mul_(1 + 2.0**-6)


def param_elsewhere(opt, p):
    p.data.add_(0.05)


@pytest.mark.parametrize(
    "options, spoil",
    [
        ({"state_dtype": "int8"}, next_code),
        ({"state_dtype": "int8"}, zero_code),
        ({"state_dtype": "int8"}, larger_scale),
        ({"state_dtype": "int8"}, smaller_scale),
        ({"state_dtype": "int8"}, odd_scale),
        ({"state_dtype": "int8"}, scales_exchanged),
        ({"master_weights": "split8"}, remainder_lost),
        ({"master_weights": "split8"}, remainder_off_by_two),
        ({"master_weights": "split16"}, remainder_lost),
        ({"master_weights": "fp32"}, master_off),
        ({"master_weights": "fp32"}, param_off),
        ({"stochastic_rounding": True}, param_off),
        ({"stochastic_rounding": True, "state_dtype": "int8"}, next_code),
        ({"stochastic_rounding": True}, param_elsewhere),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(str(each) for each in value.values()),
)
def test_the_judge_rejects_what_is_wrong(options, spoil):
    p = parameter(normal((1000,), torch.bfloat16))
    opt = ONE_EACH[1].make([p], min_8bit_size=1, **options)
    for step in range(2):
        p.grad = normal((1000,), torch.bfloat16, seed=1 + step)
        p.grad[:BLOCK] *= 64  # so that scales differ
        before = before_step(opt, "adamw")
        opt.step()
    assert_stepped(opt, "adamw", before)
    with torch.no_grad():
        spoil(opt, p)
    with pytest.raises(AssertionError):
        assert_stepped(opt, "adamw", before)


# ---- groups --------------------------------------------------------------------------------------------------------


def test_formats_per_group(device):
    """What a group says wins over what the optimizer says, None included; steps of all are right."""
    params = [parameters([5, 4097, 8193], dtype, device) for dtype in (BFLOAT16, BFLOAT16, FLOAT32, BFLOAT16, FLOAT16)]
    groups = [
        {"params": params[0]},
        {"params": params[1], "master_weights": None, "stochastic_rounding": True, "state_dtype": "bf16"},
        {"params": params[2], "master_weights": None, "state_dtype": None, "lr": 0.1},
        {"params": params[3], "master_weights": "split16", "min_8bit_size": 1},
        {"params": params[4], "master_weights": "fp32", "state_dtype": torch.float32},
    ]
    opt = ONE_EACH[1].make(groups, master_weights="split8", state_dtype="int8", seed=3)
    for step in range(STEPS):
        for group in params:
            set_gradients(group, seed=step)
        before = before_step(opt, "adamw")
        opt.step()
        assert_stepped(opt, "adamw", before)
    kinds = [{(key, value.dtype) for p in group for key, value in opt.state[p].items()} for group in params]
    int8, fp32, bf16 = ({("exp_avg", dtype)} for dtype in (torch.int8, FLOAT32, BFLOAT16))
    assert int8 | fp32 | {("param_remainder", torch.int8)} <= kinds[0]
    assert bf16 <= kinds[1] and not {key for key, _ in kinds[1]} & {"param_remainder", "master_param"}
    assert fp32 <= kinds[2] and ("exp_avg", torch.int8) not in kinds[2]
    assert int8 | {("param_remainder", torch.int16)} <= kinds[3] and ("exp_avg", FLOAT32) not in kinds[3]
    assert fp32 | {("master_param", FLOAT32)} <= kinds[4] and ("exp_avg", torch.int8) not in kinds[4]


def test_groups_with_formats_do_not_disturb_each_other(device):
    """Deterministic formats in one optimizer: the bits that each has alone."""
    chosen = [c for c in COMBINATIONS if not c.is_random]
    together = [make_params(c, [5, 300], device, seed=i) for i, c in enumerate(chosen)]
    alone = [make_params(c, [5, 300], device, seed=i) for i, c in enumerate(chosen)]
    opt = ONE_EACH[1].make([{"params": ps, **c.options} for c, ps in zip(chosen, together)])
    singles = [ONE_EACH[1].make(ps, **c.options) for c, ps in zip(chosen, alone)]
    for step in range(STEPS):
        for ps, single, same in zip(together, singles, alone):
            set_gradients(ps, seed=step)
            train(single, same, 1, first=step)
        opt.step()
    assert_same_bits(memory(opt), [t for single in singles for t in memory(single)])


def test_buckets_are_the_combinations_in_use(device):
    """One launch each, whatever the groups, sizes and shapes."""
    params = parameters([5, 300, 4096, 5000], BFLOAT16, device)
    groups = [{"params": params[:2]}, {"params": params[2:3], "lr": 1.0}, {"params": params[3:], "state_dtype": "bf16"}]
    opt = fusedopt.AdamW(groups, master_weights="split8", state_dtype="int8")
    set_gradients(params)
    opt.step()
    assert sum(len(tables.buckets) for tables in opt._plan.tables) == 3  # fp32 below 4096, int8, bf16
    params[0].grad, params[0].main_grad = None, torch.ones_like(params[0], dtype=FLOAT32)
    opt.state.clear()
    opt._forget_plan()
    opt.step()
    assert sum(len(tables.buckets) for tables in opt._plan.tables) == 4


def test_torchs_param_groups_without_formats(device):
    """Default values are not written down, so that checkpoints have exactly torch's keys."""
    defaults = {"master_weights": None, "state_dtype": None, "stochastic_rounding": False, "min_8bit_size": 4096}
    for options in ({}, defaults):
        opt = fusedopt.AdamW(parameters([5], device=device), **options, seed=None)
        theirs = torch.optim.AdamW(parameters([5], device=device))
        assert opt.param_groups[0].keys() == theirs.param_groups[0].keys()


# ---- CPU and CUDA --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_same_bits_on_cpu_and_cuda(case, combination):
    """Every tensor of the state, random bits included; one gradient with NaN and infinities on the way."""
    sizes = [*SIZES, 65_537]
    optimizers = []
    for device in ("cpu", "cuda"):
        params = make_params(combination, sizes, device, values=hard_values)
        optimizers.append((case.make(params, **combination.options, min_8bit_size=1, seed=9), params))
    for step in range(4):
        for opt, params in optimizers:
            for i, p in enumerate(params):
                p.grad = hard_gradient(p, p.dtype, seed=100 * step + i)
            if step == 2:
                params[-1].grad[1000:1003] = torch.tensor([math.inf, -math.inf, math.nan])
            opt.step()
        (on_cpu, cpu), (on_cuda, cuda) = optimizers
        for p, q in zip(cpu, cuda, strict=True):
            assert_same_bits_or_nan(q.detach().cpu(), p.detach())
            assert on_cpu.state[p].keys() == on_cuda.state[q].keys()
            for key, value in on_cpu.state[p].items():
                number = ~nan_blocks(on_cpu.state[p], key)
                assert_same_bits_or_nan(on_cuda.state[q][key].cpu()[number], value[number])


def nan_blocks(state, key):
    """The elements of int8 blocks that are NaN by their scale: there codes mean nothing."""
    scale = state.get(f"{key}_scale")
    if scale is None:
        return torch.zeros(state[key].shape, dtype=torch.bool)
    return scale.isnan().repeat_interleave(BLOCK)[: state[key].numel()]


def assert_same_bits_or_nan(a, b):
    """Same bits, except that NaN may carry any payload and sign."""
    if a.is_floating_point():
        assert torch.equal(a.isnan(), b.isnan())
        a, b = (t.nan_to_num(7.0, math.inf, -math.inf) for t in (a, b))
    assert_same_bits(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("odd", [0, 1], ids=["aligned", "odd_gradients"])
@pytest.mark.parametrize(
    "combination",
    [
        Combination(FLOAT32),
        Combination(BFLOAT16),
        Combination(BFLOAT16, "fp32"),
        Combination(BFLOAT16, "split16"),
        Combination(BFLOAT16, stochastic_rounding=True),
        Combination(FLOAT32, state_dtype="int8"),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_chunks_that_share_out_their_rounds(case, combination, odd, backend):
    """Two full chunks, one less than a group of them, a group, and more, with and without a shorter one behind; a
    parameter that begins inside a segment."""
    chunk, group = specs.CUDA_CHUNK, TOGETHER * specs.CUDA_CHUNK
    sizes = [2 * chunk, group - chunk, group, group + 3 * chunk - 1, 5 * chunk + 7]
    after = []
    for device, chosen in (("cpu", "cpu"), ("cuda", backend)):
        flat = normal((sum(sizes) + 1,), combination.dtype, device, seed=3)
        params = [parameter(piece) for piece in flat[1:].split(sizes)]
        opt = case.make(params, **combination.options, seed=9, backend=chosen)
        for step in range(2):
            grads = normal((sum(sizes) + odd,), combination.dtype, device, seed=50 + step)
            for p, grad in zip(params, grads[odd:].split(sizes), strict=True):
                p.grad = grad
            opt.step()
        after.append(memory(opt))
    comparer(assert_same_bits, case.rule, combination.dtype, 2)([t.cpu() for t in after[1]], after[0])


@pytest.mark.gpu
@pytest.mark.parametrize("combination", FEW, ids=str)
def test_same_bits_on_cpu_and_cuda_with_layouts_and_gradients_of_other_dtypes(combination):
    cpu, cuda = (steps_on_all_layouts(combination, device) for device in ("cpu", "cuda"))
    assert_same_bits(cuda, cpu)


def steps_on_all_layouts(combination, device):
    layouts = [(make, lay) for make in PARAM_LAYOUTS.values() for lay in GRAD_LAYOUTS.values()]
    params = [parameter(make(lambda shape: normal(shape, combination.dtype, device, seed=7))) for make, _ in layouts]
    opt = ONE_EACH[1].make(params, **combination.options, min_8bit_size=1, seed=9)
    for step in range(3):
        for i, (p, (_, lay)) in enumerate(zip(params, layouts, strict=True)):
            p.main_grad = lay(normal(p.shape, GRAD_DTYPES[i % 3], device, seed=100 * step + i))
        opt.step()
    return [t.cpu() for t in memory(opt)]


# ---- properties ----------------------------------------------------------------------------------------------------

PROPERTY = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
sizes_ = st.lists(st.sampled_from([0, 1, 8, 255, 256, 257, 4096, 8193]) | st.integers(0, 600), min_size=1, max_size=5)


@PROPERTY
@given(
    case=st.sampled_from(ONE_EACH),
    combination=st.sampled_from(COMBINATIONS),
    sizes=sizes_,
    least=st.sampled_from([0, 1, 256, 4096]),
    values=st.sampled_from([normal, hard_values]),
)
def test_reference_on_random_sizes_and_formats(case, combination, sizes, least, values, device):
    params = make_params(combination, sizes, device)
    opt = case.make(params, **combination.options, min_8bit_size=least)
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = (
                hard_gradient(p, p.dtype, step + i) if values is hard_values else normal(p.shape, p.dtype, device, i)
            )
        before = before_step(opt, case.rule)
        opt.step()
        assert_stepped(opt, case.rule, before)
    assert_state_formats(opt, combination, case.rule, least)


@PROPERTY
@given(
    case=st.sampled_from(ELEMENTWISE),
    combination=st.sampled_from([c for c in COMBINATIONS if not c.is_random]),
    size=st.integers(2, 20_000),
    data=st.data(),
)
def test_a_tensor_and_its_parts_are_updated_alike(case, combination, size, data, device):
    """Whatever the alignment and the chunk that an element falls into. Parts are views of one buffer, so unaligned."""
    cut = data.draw(st.integers(1, size - 1))
    whole = parameter(normal((size,), combination.dtype, device))
    buffer = whole.detach().clone()
    parts = [parameter(buffer[:cut]), parameter(buffer[cut:])]
    opt, other = case.make([whole], **combination.options), case.make(parts, **combination.options)
    for step in range(2):
        whole.grad = normal((size,), combination.dtype, device, seed=1 + step)
        parts[0].grad, parts[1].grad = whole.grad[:cut], whole.grad[cut:]
        opt.step()
        other.step()
    assert_same_bits(buffer, whole.detach())
    for key in opt.state[whole].keys() - {"step"}:
        assert_same_bits(torch.cat([other.state[p][key] for p in parts]), opt.state[whole][key])


@PROPERTY
@given(
    combination=st.sampled_from([c for c in COMBINATIONS if c.is_random]),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
)
def test_transposing_changes_no_random_bits(combination, shape, device):
    """Random bits and int8 blocks follow memory: a parameter and its transposed view are rounded alike."""
    params = [
        parameter(normal(shape, combination.dtype, device)),
        parameter(normal(shape, combination.dtype, device).t()),
    ]
    states = []
    for p in params:
        opt = ONE_EACH[1].make([p], **combination.options, min_8bit_size=1, seed=1)
        for step in range(2):
            values = normal(shape, combination.dtype, device, seed=1 + step)
            p.grad = values if p is params[0] else values.t()
            opt.step()
        states.append(opt.state[p])
    assert_same_bits(params[1].detach().t(), params[0].detach())
    for key, value in states[0].items():
        assert_same_bits(states[1][key].t() if value.shape == shape else states[1][key], value)


@pytest.mark.parametrize("master", ["fp32", "split16", "split8"])
def test_masters_follow_a_parameter_into_another_layout(master, device):
    """The model becomes channels-last between two steps: each element goes on with its own master and states."""
    values = [torch.nn.Parameter(normal((3, 4, 5, 2), torch.bfloat16, device=device)) for _ in range(2)]
    opts = [fusedopt.AdamW([p], lr=0.1, master_weights=master) for p in values]
    for step in range(4):
        if step == 2:
            values[1].data = values[1].data.contiguous(memory_format=torch.channels_last)
        for p, opt in zip(values, opts):
            p.grad = normal(p.shape, torch.bfloat16, device=device, seed=step).to(p.dtype)
            opt.step()
    assert values[1].is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(values[0].detach(), values[1].detach().contiguous())
    for key, value in opts[0].state[values[0]].items():
        assert_same_bits(value, opts[1].state[values[1]][key].contiguous())
