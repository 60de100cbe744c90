"""torch's own test data base drives our classes of the same names: inputs, error inputs, schedulers.

What deviates is named here, with the row of docs/compatibility.md that gives the reason.
"""

import copy
import inspect
import io
import math
import pickle
import sys

import pytest
import torch
from cases import WITH_PEER, assert_same_bits, memory, normal, parameter, parameters, parts, set_gradients, train
from optim_db import ERRORS, INFOS, INPUTS, SCHEDULERS, Input
from parity import assert_same_numbers, numbers

import fusedopt

SIZES = [5, 0, 33, 4097]


def test_every_class_is_there():
    """Those of torch that are left out are listed in docs/compatibility.md."""
    assert INFOS.keys() == {"Adam", "AdamW", "RAdam", "SGD", "RMSprop", "Adagrad"}


# ---- inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("given", INPUTS, ids=str)
def test_inputs(given, dtype, device):
    """20 steps; the fifth without gradients for one parameter."""
    results = []
    given = given.in_dtype(dtype.to_real())
    for make in (given.ours, given.theirs):
        opt = make(params := parameters(SIZES, dtype, device, seed=3))
        for step in range(20):
            set_gradients(params, seed=step)
            if step == 4:
                params[2].grad = None
            opt.step()
        results.append(opt)
    assert_same_numbers(*results, steps=20)


def coefficients(name, lr, betas, step):
    """What torch's capturable steps make of their number, in double or, of a tensor `step`, in that tensor's dtype."""
    if name not in ("Adam", "AdamW", "RAdam"):
        return []
    correction1, correction2 = (1 - beta**step for beta in betas)
    if name != "RAdam":
        return [lr / correction1, correction2**0.5]
    rho_inf = 2 / (1 - betas[1]) - 1
    rho = rho_inf - 2 * step * (betas[1] ** step) / correction2
    if rho <= 5.0:
        return [1 / correction1]
    rect = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
    return [1 / correction1, correction2**0.5, rect]


def relative_error(given, step, device):
    """By how much of itself torch's update may be wrong with coefficients from a float32 step.

    It is a product and quotient of positive coefficients (and a sum with eps times one of them), whose errors are
    computed here with torch's own operations. Four roundings to float32 come on top: of their product, of eps, of its
    quotient by one, and one to spare.
    """
    lr, betas = given.kwargs.get("lr", 1e-3), given.kwargs.get("betas", (0.9, 0.999))
    betas = [beta.squeeze() if isinstance(beta, torch.Tensor) else beta for beta in betas]
    exact = coefficients(given.name, float(lr), [float(beta) for beta in betas], float(step))
    rounded = coefficients(given.name, lr, betas, torch.tensor(float(step), device=device))
    if len(rounded) != len(exact):
        return math.inf  # RAdam, at the step from which it rectifies: each takes the other formula
    factor = (1 + 2.0**-24) ** 4 if exact else 1.0
    for a, b in zip(rounded, exact, strict=True):
        factor *= max(float(a) / b, b / float(a))
    return factor - 1


@pytest.mark.parametrize("given", [given for given in INPUTS if given.kwargs.get("capturable")], ids=str)
def test_capturable_in_float64(given, device, monkeypatch):
    """torch makes the coefficients of a capturable step in float32; that is all that keeps float64 steps apart.

    Each step begins with our numbers, so that errors neither add up nor come back through weight decay.
    """
    for name in ("adam", "radam", "rmsprop"):  # on CPUs torch's code would work, but refuses
        module = sys.modules[f"torch.optim.{name}"]
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu", "cuda"])
    given = given.in_dtype(torch.float64)
    own, others = (parameters(SIZES, torch.float64, device, seed=3) for _ in range(2))
    ours, theirs = given.ours(own), given.theirs_as_given(others)
    group, unit = ours.param_groups[0], torch.finfo(torch.float64).eps / 2
    decay = float(group["lr"]) * group["weight_decay"]
    for step in range(1, 21):
        before = [p.detach().clone() for p in own]
        for ps, opt in ((own, ours), (others, theirs)):
            set_gradients(ps, seed=step)
            opt.step()
        error = relative_error(given, step, device)
        for p, q, was in zip(own, others, before, strict=True):
            update = (p - was).abs() + decay * was.abs()  # at most: the decay may be a part of the difference
            apart = (p - q).abs() - torch.where(update > 0, error * update, 0.0)
            assert apart.numel() == 0 or apart.max() <= 16 * unit * p.abs().max()  # as assert_same_numbers
            q.data.copy_(p)
        assert_same_numbers(ours, theirs, steps=1)
        for p, q in zip(own, others, strict=True):
            for key, value in theirs.state[q].items():
                value.copy_(ours.state[p][key])


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("given", INPUTS, ids=str)
def test_complex(given, flags, device):
    """torch's tests of that name: a complex parameter goes where its view as real numbers goes, bit for bit, and where
    its real and its imaginary part go as parameters of their own. With `fused`, which torch refuses, too."""
    if not flags.keys() <= inspect.signature(getattr(fusedopt, given.name)).parameters.keys():
        pytest.skip("no such argument, as in torch")
    mixed = [
        normal((20, 3), torch.complex64, device),
        normal((7,), device=device),
        normal((2, 3), torch.complex128, device),
    ]
    views = [part for tensor in mixed for part in ([tensor] if not tensor.is_complex() else [tensor.real, tensor.imag])]
    whole, real, halves = ([parameter(t.clone()) for t in own] for own in (mixed, map(parts, mixed), views))
    opts = [given.ours(own, **flags) for own in (whole, real, halves)]
    for step in range(4):
        set_gradients(whole, seed=step)
        for p, q in zip(whole, real, strict=True):
            q.grad = parts(p.grad)
        grads = [part for p in whole for part in ([p.grad] if not p.is_complex() else [p.grad.real, p.grad.imag])]
        for half, grad in zip(halves, grads, strict=True):
            half.grad = grad
        for opt in opts:
            opt.step()
    assert_same_bits([parts(p) for p in whole], [p.detach() for p in real])
    joined = iter(halves)
    for p in whole:
        expected = torch.complex(next(joined), next(joined)) if p.is_complex() else next(joined)
        assert_same_bits(p.detach(), expected.detach())


@pytest.mark.parametrize("flag", ["foreach", "fused", "capturable"])
@pytest.mark.parametrize("given", INPUTS, ids=str)
def test_flags_that_choose_an_implementation_change_nothing(given, flag, device):
    if flag not in inspect.signature(getattr(fusedopt, given.name)).parameters:
        pytest.skip("no such argument, as in torch")
    plain = Input(given.name, "", {key: value for key, value in given.kwargs.items() if key != "capturable"})
    results = []
    for value in (False, True):
        opt = plain.ours(params := parameters(SIZES, device=device), **{flag: value})
        assert opt.param_groups[0][flag] is value
        train(opt, params, 3)
        results.append(memory(opt))
    assert_same_bits(*results)


@pytest.mark.parametrize("name", INFOS)
def test_signatures_groups_and_repr(name):
    """Positional arguments in torch's order, its defaults, its keys of groups, its text."""
    ours, theirs = getattr(fusedopt, name), getattr(torch.optim, name)

    def positional(cls):
        found = inspect.signature(cls).parameters.values()
        return [(p.name, p.default) for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(ours) == positional(theirs)
    keyword_only = {p.name for p in inspect.signature(theirs).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert keyword_only <= inspect.signature(ours).parameters.keys()
    own, other = (cls(parameters([3])) for cls in (ours, theirs))
    assert own.defaults == other.defaults
    assert own.param_groups[0].keys() == other.param_groups[0].keys()
    assert repr(own) == repr(other)


# ---- error inputs --------------------------------------------------------------------------------------------------

DEVIATIONS = {
    "a param group cannot have duplicate parameters": ValueError,  # a warning in torch
    "lr as Tensor doesn't work with foreach & not capturable": None,  # foreach is ignored
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": None,
}
"""What we raise instead; None: nothing."""


def error_ids() -> list[str]:
    return [f"{i}-{name}-{description}".replace(" ", "_") for i, (name, _, _, description, _) in enumerate(ERRORS)]


@pytest.mark.parametrize(("name", "params", "kwargs", "description", "error"), ERRORS, ids=error_ids())
def test_error_inputs(name, params, kwargs, description, error):
    params = parameters([3]) if params is None else params
    error = DEVIATIONS.get(description, error)
    if error is None:
        getattr(fusedopt, name)(params, **kwargs)
        return
    with pytest.raises(error):
        getattr(fusedopt, name)(params, **kwargs)


@pytest.mark.parametrize("name", INFOS)
def test_error_inputs_for_gpus(name, device):
    """`optim_db` has them for CUDA tensors; it does not matter where parameters are."""
    given = inspect.signature(getattr(torch.optim, name)).parameters
    if "fused" not in given:
        pytest.skip("no such argument, as in torch")
    for kwargs in ({"foreach": True, "fused": True}, {"fused": True, "differentiable": True}):
        with pytest.raises(RuntimeError):
            getattr(torch.optim, name)(parameters([3], device=device), **kwargs)
        with pytest.raises(RuntimeError):
            getattr(fusedopt, name)(parameters([3], device=device), **kwargs)


@pytest.mark.parametrize("name", INFOS)
def test_what_is_not_supported(name, device):
    """The other deviations: differentiable steps, sparse gradients."""
    cls = getattr(fusedopt, name)
    with pytest.raises(ValueError, match="differentiable"):
        cls(parameters([3], device=device), differentiable=True)
    opt = cls(params := parameters([3], device=device))
    params[0].grad = torch.sparse_coo_tensor([[1]], [1.0], (3,), device=device, check_invariants=True)
    with pytest.raises(RuntimeError, match="dense"):
        opt.step()


# ---- schedulers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize(("name", "makers"), SCHEDULERS, ids=lambda x: x if isinstance(x, str) else str(len(x)))
def test_schedulers(name, makers, tensor_lr, device):
    results = []
    for module in (fusedopt, torch.optim):
        lr = torch.tensor(0.01, dtype=torch.float64) if tensor_lr else 0.01
        opt = getattr(module, name)(params := parameters(SIZES, torch.float64, device), lr=lr)
        schedulers = [make(opt) for make in makers]
        for step in range(30):
            train(opt, params, 1, first=step)
            for scheduler in schedulers:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(1.0) if plateau else scheduler.step()
        results.append(opt)
    ours, theirs = results
    assert float(ours.param_groups[0]["lr"]) == float(theirs.param_groups[0]["lr"])
    assert_same_numbers(ours, theirs, steps=30)


# ---- swapping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", WITH_PEER, ids=str)
def test_torch_then_ours_then_torch(case, dtype, device):
    """Swapped twice in the middle of training by state dicts, beside torch all the way."""
    params, expected_params = (parameters(SIZES, dtype, device, seed=3) for _ in range(2))
    expected = case.make_peer(expected_params, foreach=False)
    train(expected, expected_params, 15)
    opt = case.make_peer(params, foreach=False)
    train(opt, params, 5)
    for turn, make in enumerate((case.make, case.make_peer), 1):
        following = make(params, lr=0.5)  # the checkpoint's counts
        following.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt = following
        train(opt, params, 5, first=5 * turn)
    assert_same_numbers(opt, expected, steps=15)


@pytest.mark.parametrize("case", WITH_PEER, ids=str)
def test_one_parameter_is_handed_over(case, device):
    """It leaves torch's optimizer for ours, with its state, and goes back, while the others stay."""
    params, expected_params = (parameters([17, 300], torch.float64, device, seed=3) for _ in range(2))
    expected = case.make_peer(expected_params, foreach=False)
    train(expected, expected_params, 15)
    stays = case.make_peer(params[:1], foreach=False)
    moves = case.make_peer(params[1:], foreach=False)
    for turn in range(3):
        if turn:
            make = case.make if turn == 1 else case.make_peer
            following = make(params[1:])
            following.load_state_dict(moves.state_dict())
            moves = following
        for step in range(5 * turn, 5 * turn + 5):
            set_gradients(params, seed=step)
            stays.step()
            moves.step()
    for p, e in zip(params, expected_params, strict=True):
        unit = torch.finfo(torch.float64).eps / 2  # as assert_same_numbers
        torch.testing.assert_close(p.cpu(), e.cpu(), rtol=0, atol=16 * 15 * unit * e.abs().max().item())


# ---- the rest of the interface -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", INPUTS, ids=str)
def test_copies_pickles_and_checkpoints(given, device):
    """Each goes on as the original does; checkpoints are read with weights_only=True."""

    def through_a_file(state_dict):
        torch.save(state_dict, buffer := io.BytesIO())
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    opt = given.ours(params := parameters(SIZES, device=device))
    train(opt, params, 3)
    others = [copy.deepcopy((opt, params)), pickle.loads(pickle.dumps((opt, params)))]
    fresh = copy.deepcopy(params)
    others.append((given.ours(fresh), fresh))
    others[-1][0].load_state_dict(through_a_file(opt.state_dict()))
    train(opt, params, 3, first=3)
    for other, own in others:
        assert repr(other) == repr(opt)
        train(other, own, 3, first=3)
        assert_same_bits(memory(other), memory(opt))


@pytest.mark.parametrize("name", INFOS)
def test_hooks_of_state_dicts(name):
    """Before and after, of saving and loading, in torch's order."""
    calls = {}
    for module in (fusedopt, torch.optim):
        opt, seen = getattr(module, name)(params := parameters([3])), []
        train(opt, params, 1)
        opt.register_state_dict_pre_hook(lambda _, seen=seen: seen.append("saving"))
        opt.register_state_dict_post_hook(lambda _, state, seen=seen: seen.append(sorted(state)) or state)
        opt.register_load_state_dict_pre_hook(lambda _, state, seen=seen: seen.append("loading") or state)
        opt.register_load_state_dict_post_hook(lambda _, seen=seen: seen.append("loaded"))
        opt.load_state_dict(opt.state_dict())
        calls[module] = seen
    assert calls[fusedopt] == calls[torch.optim] == ["saving", ["param_groups", "state"], "loading", "loaded"]


@pytest.mark.parametrize("name", INFOS)
def test_named_parameters(name):
    """Names are kept, saved and overwritten by those of a checkpoint, as in torch."""
    seen = []
    for module in (fusedopt, torch.optim):
        cls, params = getattr(module, name), parameters([3, 4])
        opt = cls([("weight", params[0]), ("bias", params[1])])
        train(opt, params, 1)
        renamed = cls([("w", params[0]), ("b", params[1])])
        renamed.load_state_dict(opt.state_dict())
        nameless = cls(params)
        nameless.load_state_dict(opt.state_dict())
        seen.append([each.param_groups[0].get("param_names") for each in (opt, renamed, nameless)])
        with pytest.raises(ValueError, match="names"):
            opt.add_param_group({"params": parameters([2])})
    assert seen[0] == seen[1]


@pytest.mark.parametrize("given", INPUTS, ids=str)
def test_shared_memory(given):
    """Parameters and states that move into shared memory between steps; other processes may then read them."""
    opt, params = given.ours(ps := parameters(SIZES)), ps
    expected = given.ours(others := parameters(SIZES))
    train(opt, params, 2)
    for _, tensor in numbers(opt):
        tensor.share_memory_()
    train(opt, params, 3, first=2)
    train(expected, others, 5)
    assert all(p.is_shared() for p in params)
    assert_same_bits(memory(opt), memory(expected))
