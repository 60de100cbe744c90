"""The Triton backend beside the engine of the device: C++ on the CPU, where Triton interprets, and CUDA on a GPU.

Sizes are small on the CPU, because the interpreter takes about a tenth of a second for a chunk.
"""

import copy
import math

import format_cases
import pytest
import torch
from cases import (
    BY_NAME,
    CASES,
    DTYPES,
    GRAD_LAYOUTS,
    ONE_EACH,
    PARAM_LAYOUTS,
    SIZES,
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

import fusedopt
from fusedopt import passes, reference
from fusedopt.backends import for_device
from fusedopt.plan import DeviceTables, TensorRow
from fusedopt.specs import TRITON_CHUNK

CHUNK = TRITON_CHUNK
FEW_SIZES = [0, 1, 17, CHUNK + 1]


@pytest.fixture(autouse=True)
def needs_triton(request):
    device = request.getfixturevalue("device") if "device" in request.fixturenames else torch.device("cuda")
    try:
        for_device(device, "triton")
    except RuntimeError as error:
        pytest.skip(str(error))


def sizes_on(device) -> list[int]:
    return FEW_SIZES if device.type == "cpu" else SIZES


def steps_on(device) -> int:
    return 2 if device.type == "cpu" else 5


def assert_same_numbers(actual, expected):
    """Same bits, except that NaN of float32 and float64 may carry any payload and sign."""
    for a, e in zip(actual, expected, strict=True):
        if a.dtype in (torch.float32, torch.float64):
            assert torch.equal(a.isnan(), e.isnan())
            a, e = a.nan_to_num(7.0, math.inf, -math.inf), e.nan_to_num(7.0, math.inf, -math.inf)
        assert_same_bits(a, e)


def pair(make, params, **options):
    """Two optimizers over copies of the parameters: on Triton, and on the device's own engine."""
    own = [parameter(p.detach().clone()) for p in params]
    return make(own, backend="triton", **options), make(params, **options)


def params_of(opt) -> list[torch.Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


# ---- update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rules(case, dtype, device):
    """Hard values and sizes; gradients with NaN and infinities on the way."""
    opts = pair(case.make, parameters(sizes_on(device), dtype, device, values=hard_values))
    for seed in range(steps_on(device)):
        for opt in opts:
            params = params_of(opt)
            set_gradients(params, seed, hard_values)
            if seed == 1:
                params[-1].grad[:3] = torch.tensor([math.inf, -math.inf, math.nan])
            opt.step()
        comparer(assert_same_numbers, case.rule, dtype, 5)(memory(opts[0]), memory(opts[1]))


FORMATS = [(BY_NAME["adamw-decay"], c) for c in format_cases.COMBINATIONS]
FORMATS += [(case, c) for case in map(BY_NAME.get, ("adam-l2", "lion-decay", "lamb-decay")) for c in format_cases.FEW]


@pytest.mark.parametrize(("case", "combination"), FORMATS, ids=str)
def test_formats(case, combination, device):
    """Every format of parameters and states; a part of a block at the end of a chunk and of a tensor."""
    numels = [0, 9, 257, CHUNK + 250] if device.type == "cpu" else format_cases.SIZES
    params = parameters(numels, combination.dtype, device)
    opts = pair(case.make, params, **combination.options, **({"seed": 2**63 + 77} if combination.is_random else {}))
    for opt in opts:
        for group in opt.param_groups:
            group["min_8bit_size"] = 0
    for seed in range(steps_on(device)):
        for opt in opts:
            for i, p in enumerate(params_of(opt)):
                p.grad = format_cases.hard_gradient(p, p.dtype, 100 * seed + i)
            opt.step()
        assert_same_numbers(memory(opts[0]), memory(opts[1]))


@pytest.mark.parametrize("combination", ["float32-None_states", "bfloat16-split16-None_states"])
def test_chunks_that_share_out_their_tiles(combination, device):
    """Full chunks lie in turn; the shorter one behind them does not. In groups as large as those of the CUDA engine."""
    from fusedopt.triton.tables import TOGETHER

    assert TOGETHER.value == format_cases.TOGETHER
    chosen = format_cases.BY_NAME[combination]
    sizes = [3 * CHUNK + 5, 2 * CHUNK, *([(TOGETHER.value + 2) * CHUNK - 1] if device.type == "cuda" else [])]
    params = parameters(sizes, chosen.dtype, device)
    opts = pair(fusedopt.AdamW, params, **chosen.options)
    for opt in opts:
        train(opt, opt.param_groups[0]["params"], 2)
    assert_same_bits(*map(memory, opts))


@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_nonfinite_gradients_in_formats(state_dtype, device):
    """NaN and infinities through splits and blocks, whose units they spoil."""
    params = parameters([600], torch.bfloat16, device)
    options = dict(master_weights="split8", state_dtype=state_dtype, min_8bit_size=0, seed=1)
    opts = pair(fusedopt.AdamW, params, **options)
    for opt in opts:
        p = params_of(opt)[0]
        p.grad = normal(p.shape, p.dtype, device)
        p.grad[:2] = torch.tensor([math.inf, math.nan])
        opt.step()
    ours, theirs = (opt.state[params_of(opt)[0]] for opt in opts)
    assert_same_bits(params_of(opts[0])[0].detach(), params_of(opts[1])[0].detach())
    if state_dtype == "int8":  # codes of a block that is NaN mean nothing
        for key in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(ours[key][256:], theirs[key][256:])
            assert ours[f"{key}_scale"][0].isnan()
            assert_same_numbers([ours[f"{key}_scale"]], [theirs[f"{key}_scale"]])


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_another_dtype(dtype, grad_dtype, device):
    opts = pair(fusedopt.AdamW, parameters([17, CHUNK + 3], dtype, device))
    for opt in opts:
        for i, p in enumerate(params_of(opt)):
            p.main_grad = normal(p.shape, grad_dtype, device, seed=i)
        opt.step()
    assert_same_numbers(memory(opts[0]), memory(opts[1]))


@pytest.mark.parametrize("grads", GRAD_LAYOUTS)
@pytest.mark.parametrize("layout", PARAM_LAYOUTS)
def test_layouts(layout, grads, device):
    if device.type == "cpu" and grads not in ("dense", "misaligned"):
        pytest.skip("slow in the interpreter; how gradients are laid out anew does not depend on the backend")
    make = lambda shape: normal(shape, device=device)  # noqa: E731
    opts = [fusedopt.AdamW([parameter(PARAM_LAYOUTS[layout](make))], backend=name) for name in ("triton", None)]
    for opt in opts:
        p = params_of(opt)[0]
        p.grad = GRAD_LAYOUTS[grads](normal(p.shape, device=device, seed=1))
        opt.step()
    assert_same_numbers(memory(opts[0]), memory(opts[1]))


def test_groups_and_missing_gradients(device):
    """Hyper-parameters by group; a tensor without a gradient keeps its step; several combinations in one optimizer."""
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float64]
    params = [parameter(normal((30 + i,), dtype, device, seed=i)) for i, dtype in enumerate(dtypes)]

    def make(params, **options):
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "weight_decay": 0.5, "maximize": True}]
        return fusedopt.AdamW(groups, nonfinite="skip", **options)

    opts = pair(make, params)
    for missing in (None, 1, 2):
        for opt in opts:
            own = params_of(opt)
            set_gradients(own, seed=3)
            if missing is not None:
                own[missing].grad = None
            opt.step()
        norms = [opt.grad_norm.item() for opt in opts]
        assert norms[0] == pytest.approx(norms[1], rel=2 * 2.0**-23)
        assert_same_numbers(memory(opts[0]), memory(opts[1]))
    assert [int(opts[0].state[p]["step"]) for p in params_of(opts[0])] == [3, 2, 2, 3]


def test_bias_corrections_of_many_steps(device):
    steps = [0, 1, 2, 9, 99, 2999, 100_000, 2**24 - 1]
    results = []
    for name in ("triton", None):
        lists = [[torch.tensor([x], device=device) for _ in steps] for x in (0.0, 0.5, 0.25, 0.125)]
        counters = [torch.tensor(float(step), device=device) for step in steps]
        with fusedopt.backends.use_backend(name):
            fusedopt.functional.adamw_(*lists, counters, lr=0.013, betas=(0.9, 0.999), weight_decay=0.0)
        results.append([*lists[0], *counters])
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_learning_rate_is_read_on_the_device(dtype, device, monkeypatch):
    """On the CPU tensors are read by the host; the address is put in by hand."""
    lr = torch.tensor(0.3, dtype=dtype, device=device)
    opts = pair(fusedopt.Lion, parameters([5], device=device), lr=lr)
    if device.type == "cpu":
        pack = DeviceTables.pack_hypers

        def with_address(self, groups):
            pack(self, groups)
            if self.backend.__name__.endswith("triton"):
                self.buckets[0].hypers.set_value(0, 0, math.nan)
                self.buckets[0].hypers.set_lr_address(0, lr.data_ptr(), dtype == torch.float64)

        monkeypatch.setattr(DeviceTables, "pack_hypers", with_address)
    for opt in opts:
        train(opt, params_of(opt), 2)
    assert_same_bits(memory(opts[0]), memory(opts[1]))


# ---- norm, clipping, skipping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clipped_steps(dtype, norm_type, device):
    """The norm to two units in the last place of the reference's; with the engine's coefficient, the engine's bits."""
    options = dict(max_grad_norm=0.5, norm_type=norm_type)
    opts = pair(fusedopt.AdamW, parameters(sizes_on(device), dtype, device), **options)
    for opt in opts:
        set_gradients(params_of(opt), scale=3.0)
        opt.step()
    norm = reference.total_norm([p.grad for p in params_of(opts[0])], norm_type).item()
    assert opts[0].grad_norm.item() == pytest.approx(norm, rel=2 * 2.0**-23)
    assert opts[0].clip_coef.item() == pytest.approx(min(1.0, 0.5 / (norm + 1e-6)), rel=4 * 2.0**-23)
    view = "clip_coef64" if dtype == torch.float64 else "clip_coef"
    if torch.equal(*(getattr(opt._control(), view) for opt in opts)):
        assert_same_numbers(memory(opts[0]), memory(opts[1]))


def test_norm_has_the_same_bits_every_time(device):
    norms = set()
    for _ in range(3):
        tensors = [normal((n,), device=device, seed=n) for n in (3 * CHUNK + 5, 17, 5000)]
        with fusedopt.use_backend("triton"):
            norms.add(fusedopt.get_total_norm(tensors).item())
    assert len(norms) == 1


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("magnitude", [1e-30, 0.0, 1e25, 6e4], ids=str)
def test_norms_that_leave_the_range_of_floats(magnitude, norm_type, device):
    """Squares overflow or vanish in float; float16 gradients have a norm beyond float16."""
    dtype = torch.float16 if magnitude == 6e4 else torch.float32
    tensors = [torch.full((CHUNK + 7,), magnitude, dtype=dtype, device=device)]
    with fusedopt.use_backend("triton"):
        norm = fusedopt.get_total_norm(tensors, norm_type).item()
    assert norm == pytest.approx(reference.total_norm(tensors, norm_type).item(), rel=2 * 2.0**-23, abs=0)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_norms_of_nan(norm_type, device):
    for place in (0, 9, 16):
        grad = normal((17,), device=device)
        grad[place] = math.nan
        with fusedopt.use_backend("triton"):
            assert fusedopt.get_total_norm([grad, torch.full((9,), 8.0, device=device)], norm_type).isnan(), place


def test_small_norms_are_not_clipped(device):
    """A coefficient of 1, not above it."""
    (p,) = parameters([17], device=device)
    opt = fusedopt.SGD([p], lr=1.0, max_grad_norm=100.0, backend="triton")
    before = p.detach().clone()
    p.grad = torch.full_like(p, 0.25)
    opt.step()
    assert opt.clip_coef.item() == 1.0
    assert_same_bits(p.detach(), before - 0.25)


def test_value_clip_keeps_nan(device):
    p = parameter(torch.zeros(5, device=device))
    p.grad = torch.tensor([math.nan, math.inf, -math.inf, 0.25, -2.0], device=device)
    fusedopt.SGD([p], lr=1.0, max_grad_value=0.5, backend="triton").step()
    assert p[0].isnan() and p[1:].tolist() == [-0.5, 0.5, -0.25, 0.5]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_nonfinite_gradients_skip_the_step(norm_type, bad, device):
    opt = fusedopt.AdamW(
        params := parameters([17, CHUNK + 9], device=device),
        backend="triton",
        max_grad_norm=1.0,
        norm_type=norm_type,
        nonfinite="skip",
    )
    train(opt, params, 1)
    assert not opt.step_was_skipped
    before = memory(opt)
    set_gradients(params)
    params[-1].grad[-1] = bad
    opt.step()
    assert_same_bits(memory(opt), before)
    assert opt.step_was_skipped and opt.skipped_steps == 1
    assert opt.grad_norm.isnan() if math.isnan(bad) else opt.grad_norm == math.inf
    train(opt, params, 1)
    assert not opt.step_was_skipped and opt.skipped_steps == 1
    assert {int(opt.state[p]["step"]) for p in params} == {2}


def test_a_skipped_step_of_two_phases(device):
    """Neither LAMB's measure pass nor its update writes anything, whoever asked for the step to be skipped."""
    opt = fusedopt.LAMB(params := parameters([17, CHUNK + 9], device=device), backend="triton", nonfinite="skip")
    train(opt, params, 1)
    for bad, found_inf in ((math.nan, 0.0), (1.0, 1.0)):
        before = memory(opt)
        set_gradients(params)
        params[0].grad[0] = bad
        opt.grad_scale, opt.found_inf = (torch.tensor(x, device=device) for x in (1.0, found_inf))
        opt.step()
        assert_same_bits(memory(opt), before)
        assert opt.step_was_skipped
    assert opt.skipped_steps == 2


def test_scaler_and_value_clipping(device):
    """Unscale, clamp, clip; found_inf, which may be a sum; float16."""
    options = dict(max_grad_norm=0.25, max_grad_value=0.5)
    opts = pair(fusedopt.AdamW, parameters([9, CHUNK + 16], torch.float16, device), **options)
    for scale, found_inf in ((8.0, 0.0), (3.0, 0.0), (3.0, 2.0), (1.0, 0.0)):
        for opt in opts:
            opt.grad_scale, opt.found_inf = (torch.tensor(x, device=device) for x in (scale, found_inf))
            set_gradients(params_of(opt), seed=int(scale), scale=scale)
            opt.step()
        assert bool(opts[0].step_was_skipped) is (found_inf != 0)
        assert opts[0].grad_norm.item() == pytest.approx(opts[1].grad_norm.item(), rel=2 * 2.0**-23)
        if torch.equal(opts[0].clip_coef, opts[1].clip_coef):
            assert_same_numbers(memory(opts[0]), memory(opts[1]))
    assert opts[0].skipped_steps == 1


def test_shares_of_several_devices(device):
    """What a device hands over, and what it makes of all shares."""
    rows = [TensorRow(5, device, torch.float32), TensorRow(3, device, torch.float16)]
    grads = [normal((5,), device=device), normal((3,), torch.float16, device)]
    with fusedopt.use_backend("triton"):
        (tables,), places = passes.TablesCache().get(rows)
    for (bucket, slot), grad in zip(places, grads, strict=True):
        bucket.table.set_grad(slot, grad.data_ptr())
    passes.begin([tables], passes.StepScalars(max_grad_norm=1.0, skip_nonfinite=True), ("norm",))
    tables.backend.norm(tables, finalize=False)
    squares = sum(g.double().square().sum().item() for g in grads)
    assert tables.control.local_sums.tolist() == pytest.approx([squares, 0.0], rel=1e-6)
    assert tables.control.total_norm.isnan()
    gathered = torch.tensor([[9.0, 0.0], [16.0, 1.0]], dtype=torch.float64, device=device)
    tables.backend.finalize_norm(tables, gathered)
    assert (tables.control.total_norm, tables.control.norm_found_inf) == (5.0, 1.0)
    assert tables.control.clip_coef64.item() == 1.0 / (5.0 + 1e-6)


# ---- functions, checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_functions(dtype, device):
    results = []
    for name in ("triton", "auto"):
        params = parameters([3, CHUNK + 1], dtype, device)
        with fusedopt.use_backend(name):
            set_gradients(params, scale=4.0)
            found = fusedopt.unscale_grads_(params, torch.tensor(2.0, device=device))
            fusedopt.clip_grad_value_(params, 1.5)
            norm = fusedopt.clip_grad_norm_(params, 1e9)  # a coefficient of 1: memory is left alone
            halved = [p.grad.clone() for p in params]
            clipped = fusedopt.clip_grad_norm_(params, 0.5)
            params[0].grad[0] = math.inf
            found_inf = fusedopt.unscale_grads_(params, 1.0)
        assert (found, found_inf) == (0.0, 1.0) and norm == clipped
        results.append((halved, norm, [p.grad for p in params]))
    (ours, our_norm, our_grads), (theirs, their_norm, their_grads) = results
    assert_same_bits(ours, theirs)
    # Norms may differ by two units of the compute type, coefficients by these and a rounding; products are rounded.
    unit = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    torch.testing.assert_close(our_norm, their_norm, rtol=2 * 2.0**-23, atol=0)
    torch.testing.assert_close(our_grads, their_grads, rtol=3 * unit + torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_runs_go_on_on_another_backend(case, device):
    """Back and forth between backends, by checkpoint and by attribute, as if nothing had happened."""
    opts = pair(case.make, parameters([17, CHUNK + 9], device=device))
    for opt in opts:
        train(opt, params_of(opt), 1)
    opts[0].backend = None
    train(opts[0], params_of(opts[0]), 1, first=1)
    resumed = case.make(params_of(opts[0]), backend="triton")
    resumed.load_state_dict(copy.deepcopy(opts[0].state_dict()))
    train(resumed, params_of(resumed), 1, first=2)
    train(opts[1], params_of(opts[1]), 2, first=1)
    assert_same_bits(memory(resumed), memory(opts[1]))


# ---- on a GPU -----------------------------------------------------------------------------------------------------


def give(params, seed):
    """New values in the same gradient memory, which a graph has the address of."""
    for i, p in enumerate(params):
        value = normal(p.shape, p.dtype, "cuda", seed=100 * seed + i)
        p.grad = value if p.grad is None else p.grad.copy_(value)


def captured(opt, steps=1):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        opt.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            opt.step()
    return graph


@pytest.mark.gpu
@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 0.5, "nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_replays_are_eager_steps(case, kwargs):
    """Eager steps with other gradients between replays, which must not change what a replay reads, nor the reverse."""
    params, eager_params = (parameters([5, 0, 4097, 65537], device="cuda") for _ in range(2))
    opts = [
        case.make(p, backend="triton", lr=torch.tensor(0.01, device="cuda"), **kwargs) for p in (params, eager_params)
    ]
    for own in (params, eager_params):
        give(own, seed=0)
    graph = captured(opts[0])
    kept = [p.grad for p in params]
    opts[1].step()
    for seed in range(1, 6):
        for own in (params, eager_params):
            give(own, seed)
        graph.replay()
        opts[1].step()
        assert_same_bits(memory(opts[0]), memory(opts[1]))
        for own, opt in zip((params, eager_params), opts, strict=True):
            set_gradients(own, seed=50 + seed)  # elsewhere in memory
            opt.step()
        for p, grad in zip(params, kept, strict=True):
            p.grad = grad
        assert_same_bits(memory(opts[0]), memory(opts[1]))


@pytest.mark.gpu
def test_several_steps_in_one_capture():
    params, eager_params = (parameters([5, 4097], device="cuda") for _ in range(2))
    opts = [fusedopt.AdamW(p, backend="triton", max_grad_norm=1.0) for p in (params, eager_params)]
    for own in (params, eager_params):
        give(own, seed=0)
    graph = captured(opts[0], steps=4)
    graph.replay()
    for _ in range(5):
        opts[1].step()
    assert_same_bits(memory(opts[0]), memory(opts[1]))
    with pytest.raises(RuntimeError, match="without an ordinary one"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opts[0].step()
    opts[0].step()
    opts[1].step()
    assert_same_bits(memory(opts[0]), memory(opts[1]))


@pytest.mark.gpu
@pytest.mark.parametrize(("kwargs", "expected"), [({}, 1), ({"max_grad_norm": 1.0}, 2)], ids=str)
def test_launches(kwargs, expected):
    """One kernel a pass for all tensors; at most one copy for the step table, and none if nothing changed."""
    params = parameters([1 + i % 37 for i in range(1000)], device="cuda")
    opt = fusedopt.AdamW(params, backend="triton", **kwargs)
    train(opt, params, 2)
    for fresh in (True, False):
        if fresh:
            set_gradients(params, seed=5)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            opt.step()
            torch.cuda.synchronize()
        on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        copies = [name for name in on_device if name.startswith(("Memcpy", "Memset"))]
        assert len(on_device) - len(copies) == expected, on_device
        assert len(copies) <= int(fresh), copies


@pytest.mark.gpu
def test_pointer_table_is_not_overwritten_in_flight():
    """Many steps issued at once, each with other gradient pointers, while the device is busy."""
    count = 5000
    params = [parameter(torch.zeros(3, device="cuda")) for _ in range(count)]
    opt = fusedopt.Lion(params, lr=1.0, betas=(0.0, 0.0), backend="triton")
    gradients = [torch.full((count, 3), value, device="cuda") for value in (1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0)]
    for p in params:
        p.grad = torch.zeros(3, device="cuda")
    opt.step()
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    for gradient in gradients:
        for p, g in zip(params, gradient, strict=True):
            p.grad = g
        opt.step()
    assert torch.equal(torch.stack([p.detach() for p in params]), torch.full((count, 3), -4.0, device="cuda"))


@pytest.mark.gpu
def test_more_elements_than_int32():
    """2^31 + 4,100 elements of bfloat16: both ends and the middle are what the CPU makes of them."""
    n = 2**31 + 4100
    if torch.cuda.mem_get_info()[0] < 4 * 2 * n:
        pytest.skip("needs 18 GB of free GPU memory")
    p = parameter(torch.zeros(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.zeros_like(p)
    slices = [slice(0, 5000), slice(2**30, 2**30 + 5000), slice(2**31 - 4096, n)]
    for i, s in enumerate(slices):
        p.data[s], p.grad[s] = (normal(p[s].shape, torch.bfloat16, "cuda", seed=i + k) for k in (0, 10))
    small = [parameter(p.detach()[s].cpu()) for s in slices]
    for q, s in zip(small, slices, strict=True):
        q.grad = p.grad[s].cpu()
    opt = fusedopt.Lion([p], lr=0.1, weight_decay=0.1, max_grad_norm=1e9, backend="triton")
    expected = fusedopt.Lion(small, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        opt.step()
        expected.step()
    for q, s in zip(small, slices, strict=True):
        assert_same_bits(p.detach()[s].cpu(), q.detach())
        assert_same_bits(opt.state[p]["exp_avg"][s].cpu(), expected.state[q]["exp_avg"])
    norm = math.sqrt(sum(q.grad.double().square().sum().item() for q in small))
    assert opt.grad_norm.item() == pytest.approx(norm, rel=2 * 2.0**-23)


@pytest.mark.multigpu
def test_second_device_alone_while_the_first_is_current():
    params, cpu = parameters([5, 4097], device="cuda:1"), parameters([5, 4097])
    opt, on_cpu = fusedopt.AdamW(params, backend="triton"), fusedopt.AdamW(cpu)
    with torch.cuda.device(0):
        train(opt, params, 3)
    train(on_cpu, cpu, 3)
    assert_same_bits([p.detach().cpu() for p in params], [p.detach() for p in cpu])
