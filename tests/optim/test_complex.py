"""Complex parameters: the step of their `view_as_real`, bit for bit, with torch's states, dtypes and errors."""

import copy
import io
import itertools

import pytest
import torch
from cases import (
    CASES,
    FUNCTION_HYPER,
    GRAD_LAYOUTS,
    ONE_EACH,
    ONE_EACH_WITH_PEER,
    PARAM_LAYOUTS,
    assert_same_bits,
    bits,
    call_function,
    normal,
    parts,
    train,
)
from parity import assert_same_numbers

import fusedopt
from fusedopt import reference, specs

DTYPES = [torch.complex64, torch.complex128]
SHAPES = [(5,), (0,), (), (33, 7), (4097,), (20_000,)]
BACKENDS = ["reference", "triton"]


def complex_parameters(dtype, device, shapes=SHAPES):
    return [torch.nn.Parameter(normal(shape, dtype, device, seed=i)) for i, shape in enumerate(shapes)]


def real_twins(params):
    return [torch.nn.Parameter(parts(p).clone(memory_format=torch.contiguous_format)) for p in params]


def give(params, twins, seed, lay=None):
    """The same gradients for both; `lay` puts those of the complex parameters into another layout."""
    for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
        grad = normal(p.shape, p.dtype, p.device, seed=10_000 + 100 * seed + i)
        p.grad = lay(grad) if lay else grad
        twin.grad = parts(p.grad).clone(memory_format=torch.contiguous_format)


def assert_twins(opt, twin):
    """Parameters and states of `opt` are those of its real twin, bit for bit, and of torch's dtypes and shapes."""
    for p, q in zip(opt.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
        assert_same_bits(parts(p), q.detach())
        own, other = opt.state.get(p, {}), twin.state.get(q, {})
        assert own.keys() == other.keys()
        for key, value in own.items():
            if key == "step":
                assert value.item() == other[key].item()
                continue
            assert (value.dtype, value.shape) == (p.dtype, p.shape), key
            assert_same_bits(parts(value), other[key])
    assert_same_bits(opt.grad_norm, twin.grad_norm)


# ---- the step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_is_that_of_the_real_parameter(case, dtype, device):
    params = complex_parameters(dtype, device)
    twins = real_twins(params)
    opt, twin = (case.make(each, max_grad_norm=20.0) for each in (params, twins))
    for step in range(4):
        give(params, twins, step)
        if step == 2:
            params[0].grad = twins[0].grad = None
        opt.step()
        twin.step()
    assert_twins(opt, twin)


def test_real_and_complex_parameters_share_launches(device):
    """They are rows of the same tables: one bucket for complex64 and float32."""
    params = [*complex_parameters(torch.complex64, device), torch.nn.Parameter(normal((300,), device=device))]
    twins = [*real_twins(params[:-1]), copy.deepcopy(params[-1])]
    opt, twin = (fusedopt.AdamW(each, lr=0.1) for each in (params, twins))
    for step in range(3):
        give(params[:-1], twins[:-1], step)
        params[-1].grad = twins[-1].grad = normal((300,), device=device, seed=step)
        opt.step()
        twin.step()
    assert [len(tables.buckets) for tables in opt._plan.tables] == [1]
    for p, q in zip(params, twins, strict=True):
        assert_same_bits(parts(p), q.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_backends(case, backend, device):
    params = complex_parameters(torch.complex64, device, [(5,), (33, 7)])
    twins = real_twins(params)
    opt, twin = (case.make(each, max_grad_norm=1.0, backend=backend) for each in (params, twins))
    for step in range(2):
        give(params, twins, step, GRAD_LAYOUTS["gapped"])
        opt.step()
        twin.step()
    assert_twins(opt, twin)


# ---- layouts ------------------------------------------------------------------------------------------------------

LAYOUTS = {
    **{name: lay for name, lay in GRAD_LAYOUTS.items() if name != "expanded"},
    "expanded": lambda values: values.new_full((), 0.375 - 0.5j).expand(values.shape),
    "conjugate": lambda values: values.conj(),
    "transposed_conjugate": lambda values: values.t().contiguous().t().conj() if values.dim() == 2 else values.conj(),
    "negated": lambda values: torch._neg_view(values),
    "negated_conjugate": lambda values: torch._neg_view(values.conj()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_other_layouts(layout, device):
    """They change between steps: a conjugate view, with the address and strides of what it is of, must be noticed."""
    params = complex_parameters(torch.complex64, device)
    twins = real_twins(params)
    opt, twin = (fusedopt.AdamW(each, lr=0.1, max_grad_norm=1.0) for each in (params, twins))
    for step in range(6):
        give(params, twins, step, LAYOUTS[layout] if step % 3 != 2 else None)
        opt.step()
        twin.step()
    assert_twins(opt, twin)


@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize("layout", PARAM_LAYOUTS)
def test_parameters_in_other_layouts(layout, conjugate, device):
    value = PARAM_LAYOUTS[layout](lambda shape: normal(shape, torch.complex64, device))
    value = value.conj() if conjugate else value
    params = [torch.nn.Parameter(value)]
    twins = real_twins(params)
    opt, twin = (fusedopt.Adam(each, lr=0.1, amsgrad=True) for each in (params, twins))
    for step in range(3):
        give(params, twins, step)
        opt.step()
        twin.step()
    assert params[0].is_conj() == conjugate
    assert_twins(opt, twin)


# ---- torch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ONE_EACH_WITH_PEER, ids=str)
def test_states_are_torchs(case, dtype, device):
    """Keys, dtypes, shapes, and the state before the first step."""
    opt, peer = (make(complex_parameters(dtype, device), **kw) for make, kw in ((case.make, {}), (case.make_peer, {})))
    for each in (opt, peer):
        if case.optimizer == "Adagrad":
            assert each.state_dict()["state"][0]["sum"].eq(0.3 + 0.3j).all()
        train(each, each.param_groups[0]["params"], 1)
    ours, theirs = opt.state_dict(), peer.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    for i, expected in theirs["state"].items():
        entry = ours["state"][i]
        assert entry.keys() - {"step"} == expected.keys() - {"step"}
        for key in expected.keys() - {"step"}:
            assert (entry[key].dtype, entry[key].shape) == (expected[key].dtype, expected[key].shape)
    assert_same_numbers(opt, peer, steps=1)


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("case", ONE_EACH_WITH_PEER, ids=str)
def test_torch_then_ours_then_torch(case, exported, device):
    params, expected_params = (complex_parameters(torch.complex128, device) for _ in range(2))
    expected = case.make_peer(expected_params, foreach=False)
    train(expected, expected_params, 15)
    opt = case.make_peer(params, foreach=False)
    train(opt, params, 5)
    for turn, make in enumerate((case.make, case.make_peer), 1):
        own = exported and hasattr(opt, "torch_state_dict")
        saved = opt.torch_state_dict() if own else opt.state_dict()
        torch.save(saved, buffer := io.BytesIO())
        buffer.seek(0)
        opt = make(params, lr=0.5)  # the checkpoint's counts
        opt.load_state_dict(torch.load(buffer, weights_only=True))
        train(opt, params, 5, first=5 * turn)
    assert_same_numbers(opt, expected, steps=15)


def test_state_of_another_dtype_is_refused(device):
    """Each error leaves the optimizer as it was."""
    params = complex_parameters(torch.complex64, device, [(5,)])
    opt = fusedopt.AdamW(params)
    train(opt, params, 1)
    before = copy.deepcopy(opt.state_dict())
    for dtype in (torch.float32, torch.complex128):
        wrong = copy.deepcopy(before)
        wrong["state"][0]["exp_avg"] = torch.zeros(5, dtype=dtype)
        with pytest.raises(ValueError, match=r"exp_avg.*expected complex64"):
            opt.load_state_dict(wrong)
    real = fusedopt.AdamW([torch.nn.Parameter(torch.zeros(5, device=device))])
    with pytest.raises(ValueError, match="complex64, expected float32"):
        real.load_state_dict(before)
    for key in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(parts(opt.state[params[0]][key]), parts(before["state"][0][key]))


def test_version_counters(device):
    params = complex_parameters(torch.complex64, device)
    opt = fusedopt.AdamW(params)
    train(opt, params, 2)
    before = [p._version for p in params]
    params[1].grad = None
    opt.step()
    assert [p._version - was for p, was in zip(params, before, strict=True)] == [1, 0, *[1] * (len(params) - 2)]


def test_masters_and_memory(device):
    params = complex_parameters(torch.complex64, device)
    opt = fusedopt.AdamW(params)
    train(opt, params, 1)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(opt.master_params(), params, strict=True))
    elements = sum(p.numel() for p in params)
    summary = opt.memory_summary()
    assert (summary.numel, summary.bytes["param"], summary.bytes["states"]) == (elements, 8 * elements, 16 * elements)


# ---- gradients that are scaled, clipped, accumulated, released -------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_clipped_and_skipped(dtype, device):
    """A NaN in one imaginary part skips the step of all."""
    params = complex_parameters(dtype, device)
    twins = real_twins(params)
    opt, twin = (fusedopt.Adam(each, max_grad_norm=0.5, nonfinite="skip") for each in (params, twins))
    for step in range(3):
        give(params, twins, step)
        if step == 1:
            twins[0].grad[2, 1] = params[0].grad.imag[2] = float("nan")
        for each in (opt, twin):
            each.grad_scale = torch.tensor(64.0, device=device)
            each.step()
    assert opt.skipped_steps.item() == 1
    assert_twins(opt, twin)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_gradient_scaler(options, device):
    params = complex_parameters(torch.complex64, device)
    twins = real_twins(params)
    opts = [fusedopt.AdamW(each, **options) for each in (params, twins)]
    scalers = [fusedopt.GradScaler(device.type, init_scale=4.0, growth_interval=2) for _ in opts]
    for step in range(4):
        give(params, twins, step)
        if step == 2:
            twins[3].grad[1, 2, 0] = params[3].grad.real[1, 2] = float("inf")
        for opt, scaler in zip(opts, scalers, strict=True):
            scaler.scale(torch.ones((), device=device))
            scaler.step(opt)
            scaler.update()
    assert [scaler.get_scale() for scaler in scalers] == [4.0, 4.0]
    assert opts[0].skipped_steps.item() == 1
    assert_twins(*opts)
    with pytest.raises(NotImplementedError, match="without unscale_"):
        scalers[0].unscale_(opts[0])


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("main", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulated(dtype, main, hooks, device):
    """Main gradients of complex parameters have their dtype; the twin's are float32 or float64."""
    params = complex_parameters(dtype, device)
    twins = real_twins(params)
    opts = [fusedopt.AdamW(each, lr=0.1, max_grad_norm=1.0) for each in (params, twins)]
    mains = (main, torch.float32)
    accs = [fusedopt.GradAccumulator(opt, each, hooks=hooks) for opt, each in zip(opts, mains, strict=True)]
    for step in range(2):
        for batch, weight in enumerate((3.0, 1.0, 0.3)):
            give(params, twins, 10 * step + batch, LAYOUTS["conjugate"] if batch == 1 else None)
            for acc, own in zip(accs, (params, twins), strict=True):
                acc.weight = weight
                if hooks:
                    for p in own:
                        acc._fold(p)
                if hooks or batch < 2:
                    acc.accumulate()
        for opt in opts:
            opt.step()
    assert {acc.main_grad("", p).tensor.dtype for acc in accs[:1] for p in params} == {dtype}
    assert_twins(*opts)


def test_accumulated_gradients_by_themselves(device):
    """Sums that are handed over, saved and loaded."""
    params = complex_parameters(torch.complex64, device)
    acc = fusedopt.GradAccumulator(params, reduction="mean")
    grads = [[normal(p.shape, p.dtype, device, seed=10 * k + i) for i, p in enumerate(params)] for k in range(2)]
    for batch in grads:
        for p, grad in zip(params, batch, strict=True):
            p.grad = grad
        acc.accumulate()
    other = fusedopt.GradAccumulator(params)
    other.load_state_dict(copy.deepcopy(acc.state_dict()))
    with pytest.raises(ValueError, match="both complex or none"):
        state = acc.state_dict()
        other.load_state_dict({**state, "main_grads": {0: torch.zeros(5)}})
    for each in (acc, other):
        for p in params:
            p.grad = None  # else it would be folded too
        each.assign_grads()
        for p, a, b in zip(params, *grads, strict=True):
            assert_same_bits(parts(p.grad), (parts(a) + parts(b)) / 2)


def test_backward_and_release(device):
    """Whole training steps: autograd's gradients are conjugates of derivatives, as for torch's optimizers."""
    weights = [normal((8, 8), torch.complex64, device, seed=i) for i in range(2)]
    inputs = normal((4, 8), torch.complex64, device, seed=7)
    results = []
    for release in (False, True):
        params = [torch.nn.Parameter(w.clone()) for w in weights]
        opt = fusedopt.AdamW(params, lr=0.1)
        if release:
            opt.release_gradients()
        for _ in range(3):
            (inputs @ params[0] @ params[1]).abs().square().sum().backward()
            opt.step()
            opt.zero_grad()
        results.append([parts(p) for p in params])
    peers = [torch.nn.Parameter(w.clone()) for w in weights]
    peer = torch.optim.AdamW(peers, lr=0.1)
    for _ in range(3):
        (inputs @ peers[0] @ peers[1]).abs().square().sum().backward()
        peer.step()
        peer.zero_grad()
    assert_same_bits(*results)
    for own, p in zip(results[0], peers, strict=True):
        torch.testing.assert_close(own, parts(p), rtol=0, atol=1e-4)


def test_main_grad_attribute(device):
    params = complex_parameters(torch.complex64, device, [(33, 7)])
    twins = real_twins(params)
    opt, twin = (fusedopt.AdamW(each, lr=0.1) for each in (params, twins))
    give(params, twins, 0)
    params[0].main_grad, params[0].grad = params[0].grad.conj().resolve_conj().conj(), None
    opt.step()
    twin.step()
    assert_twins(opt, twin)


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, pattern",
    [
        ({"max_grad_value": 1.0}, TypeError, "max_grad_value=1.0.*view_as_real"),
        ({"max_grad_norm": 1.0, "norm_type": 1.0}, ValueError, "norm_type=1.0.*norm_type=2"),
        ({"max_grad_norm": 1.0, "norm_type": float("inf")}, ValueError, "norm_type=inf.*norm_type=2"),
    ],
    ids=str,
)
def test_clipping_that_complex_gradients_do_not_have(options, error, pattern, device):
    params = complex_parameters(torch.complex64, device)
    opt = fusedopt.AdamW(params, lr=0.1)
    train(opt, params, 1)
    before = [parts(p).clone() for p in params]
    for key, value in options.items():
        setattr(opt, key, value)
    with pytest.raises(error, match=pattern):
        opt.step()
    fresh = fusedopt.AdamW(params, lr=0.1, **options)
    with pytest.raises(error, match=pattern):
        fresh.step()
    assert not fresh.state
    assert_same_bits([parts(p) for p in params], before)
    for key in options:
        setattr(opt, key, 2.0 if key == "norm_type" else None)
    opt.step()
    assert float(opt.state[params[0]]["step"]) == 2


def test_scalers_take_a_norm(device):
    params = complex_parameters(torch.complex64, device)
    opt = fusedopt.AdamW(params, norm_type=1.0)
    train(opt, params, 1)
    scaler = fusedopt.GradScaler(device.type, init_scale=4.0)
    scaler.scale(torch.ones((), device=device))
    with pytest.raises(ValueError, match="norm_type=2"):
        scaler.step(opt)
    opt.norm_type = 2.0
    scaler.step(opt)
    assert float(opt.state[params[0]]["step"]) == 2


def test_norm_types_that_nobody_asks_for(device):
    """Where no norm is taken its order does not matter; real parameters keep all of them."""
    params = complex_parameters(torch.complex64, device)
    train(fusedopt.AdamW(params, norm_type=1.0), params, 1)


@pytest.mark.parametrize(
    "options",
    [{"master_weights": "fp32"}, {"master_weights": "split16"}, {"stochastic_rounding": True}]
    + [{"state_dtype": name} for name in ("fp32", "bf16", "int8")],
    ids=str,
)
def test_formats_are_for_real_parameters(options, device):
    params = complex_parameters(torch.complex64, device)
    with pytest.raises(ValueError, match=r"complex64.*param group"):
        fusedopt.AdamW(params, **options)
    real = torch.nn.Parameter(torch.zeros(5, dtype=torch.bfloat16, device=device))
    opt = fusedopt.AdamW([{"params": [real], **options}, {"params": params}])  # a group of their own
    train(opt, params, 1)


@pytest.mark.parametrize("make", [torch.zeros, torch.ones])
def test_gradients_of_other_dtypes(make, device):
    """Through main_grad, since torch refuses them in .grad."""
    params = complex_parameters(torch.complex64, device, [(5,)])
    real = torch.nn.Parameter(torch.zeros(5, device=device))
    for p, dtype in ((params[0], torch.float32), (params[0], torch.complex128), (real, torch.complex64)):
        p.main_grad = make(5, dtype=dtype, device=device)
        opt = fusedopt.SGD([p], lr=0.1)
        with pytest.raises(TypeError, match=r"complex.*convert the gradient"):
            opt.step()


# ---- functions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lay", ["dense", "gapped"])
@pytest.mark.parametrize("rule", specs.RULES)
def test_functions(rule, lay, device):
    """Parameters, gradients and states that are gapped or conjugated are copied and written back."""
    dtype, shapes = torch.complex64, [(37, 5), (0,), ()]
    layout = (lambda t: t) if lay == "dense" else (lambda t: GRAD_LAYOUTS["gapped"](t).conj())
    params, grads, *states = (
        [layout(normal(shape, dtype, device, seed=10 * k + i)) for i, shape in enumerate(shapes)]
        for k in range(2 + len(reference.STATES[rule]))
    )
    for tensor in itertools.chain(*states):
        torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor).abs_()
    twins, twin_grads, *twin_states = (
        [parts(t).clone(memory_format=torch.contiguous_format) for t in group] for group in (params, grads, *states)
    )
    for group in ((params, grads, states), (twins, twin_grads, twin_states)):
        steps = [torch.full((), 3.0, device=device) for _ in shapes]
        call_function(rule, *group, steps, **FUNCTION_HYPER[rule], grad_scale=2.0, clip_coef=0.5)
    for own, other in zip((params, *states), (twins, *twin_states), strict=True):
        assert_same_bits([parts(t) for t in own], other)
    with pytest.raises(TypeError, match="max_grad_value"):
        call_function(rule, params, grads, states, steps, **FUNCTION_HYPER[rule], max_grad_value=1.0)
    if states:
        with pytest.raises(ValueError, match="expected the parameter's dtype"):
            real = [[tensor.real.clone() for tensor in group] for group in states]
            call_function(rule, params, grads, real, steps, **FUNCTION_HYPER[rule])


@pytest.mark.parametrize("lay", [None, *LAYOUTS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_functions(dtype, lay, device):
    """Norms, clipping by them and unscaling are those of the parts, and torch's."""
    if lay == "expanded":
        pytest.skip("cannot be written")
    params = complex_parameters(dtype, device)
    twins, peers = real_twins(params), complex_parameters(dtype, device)
    give(params, twins, 0, LAYOUTS.get(lay))
    for p, peer in zip(params, peers, strict=True):
        peer.grad = p.grad.clone()
    norms = [fusedopt.get_total_norm([p.grad for p in each]) for each in (params, twins)]
    norms += [fusedopt.clip_grad_norm_(each, 0.5) for each in (params, twins)]
    assert_same_bits(norms[1:], norms[:1] * 3)
    assert norms[0].dtype == dtype.to_real()
    theirs = torch.nn.utils.clip_grad_norm_(peers, 0.5)
    unit, elements = torch.finfo(dtype).eps, sum(2 * p.numel() for p in params)
    # torch adds up in the gradients' dtype: at most a rounding for each of its additions, pairwise or not.
    torch.testing.assert_close(theirs, norms[0], rtol=elements * unit, atol=0)
    for p, twin, peer in zip(params, twins, peers, strict=True):
        assert_same_bits(parts(p.grad), twin.grad)
        torch.testing.assert_close(parts(p.grad), parts(peer.grad), rtol=2 * elements * unit, atol=0)
    found = [fusedopt.unscale_grads_(each, 3.0) for each in (params, twins)]
    assert [flag.item() for flag in found] == [0.0, 0.0]
    assert_same_bits([parts(p.grad) for p in params], [twin.grad for twin in twins])


def test_errors_of_clip_functions(device):
    params = complex_parameters(torch.complex64, device, [(5,)])
    params[0].grad = normal((5,), torch.complex64, device)
    before = bits(parts(params[0].grad))
    with pytest.raises(TypeError, match="view_as_real"):
        fusedopt.clip_grad_value_(params, 0.1)
    for norm_type in (1.0, float("inf")):
        with pytest.raises(ValueError, match="norm_type=2"):
            fusedopt.clip_grad_norm_(params, 0.1, norm_type)
        with pytest.raises(ValueError, match="norm_type=2"):
            fusedopt.get_total_norm(params[0].grad, norm_type)
    assert torch.equal(bits(parts(params[0].grad)), before)
