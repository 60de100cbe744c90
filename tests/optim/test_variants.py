"""Rules of one optimizer that differ in what they keep: by param group, switched between steps, and in checkpoints."""

import copy

import pytest
import torch
from cases import (
    BY_NAME,
    CASES,
    STATELESS,
    assert_same_bits,
    memory,
    normal,
    parameter,
    parameters,
    set_gradients,
    train,
)
from parity import torch_adagrad_takes_new_groups

import fusedopt

SIZES = [5, 0, 4097]
STEPS = 4


def assert_close_to_torch(ours, theirs, steps):
    """As `test_torch_parity.assert_same_numbers`: 16 roundings a step at the largest parameter, about 4."""
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=steps * 16 * 2.0**-24 * 4)


def numbers_of_rules(opt) -> int:
    return len({bucket.rule for tables in opt._plan.tables for bucket in tables.buckets})


# ---- rules by param group ------------------------------------------------------------------------------------------

GROUPS = {
    "Adam": [{}, {"amsgrad": True}, {"weight_decay": 0.1}, {"amsgrad": True, "weight_decay": 0.1}],
    "AdamW": [{}, {"amsgrad": True}, {"amsgrad": True, "maximize": True}],
    "SGD": [{}, {"momentum": 0.9, "dampening": 0.2}, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}],
    "RMSprop": [{}, {"centered": True}, {"momentum": 0.9}, {"centered": True, "momentum": 0.5, "weight_decay": 0.1}],
    "RAdam": [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
}
RULES_IN_USE = {"Adam": 2, "AdamW": 2, "SGD": 2, "RMSprop": 4, "RAdam": 1}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_one_optimizer_may_have_different_rules(name, device):
    """Two groups of each kind: the numbers that torch gets, in one launch for each rule."""
    finals = []
    for module in (fusedopt, torch.optim):
        params = [parameters(SIZES, device=device, seed=i) for i in range(2 * len(GROUPS[name]))]
        opt = getattr(module, name)([{"params": own, **group} for own, group in zip(params, GROUPS[name] * 2)], lr=0.02)
        flat = [p for own in params for p in own]
        train(opt, flat, STEPS)
        finals.append(flat)
        if module is fusedopt:
            assert numbers_of_rules(opt) == RULES_IN_USE[name]
    assert_close_to_torch(*finals, STEPS)


@pytest.mark.skipif(not BY_NAME["adam-decoupled"].has_peer, reason="this torch has no decoupled_weight_decay")
def test_decoupled_and_coupled_groups_in_one_adam(device):
    finals = []
    for module in (fusedopt, torch.optim):
        params = [parameters(SIZES, device=device, seed=i) for i in range(2)]
        groups = [{"params": params[0]}, {"params": params[1], "decoupled_weight_decay": True}]
        opt = module.Adam(groups, lr=0.02, weight_decay=0.3)
        train(opt, [*params[0], *params[1]], STEPS)
        finals.append([*params[0], *params[1]])
    assert_close_to_torch(*finals, STEPS)


def test_rules_by_group_share_one_clip(device):
    """The norm is over all groups, whatever their rules."""
    params, same = ([parameters([17, 300], device=device, seed=i) for i in range(2)] for _ in range(2))
    groups = [{"params": params[0]}, {"params": params[1], "momentum": 0.9}]
    opt = fusedopt.SGD(groups, lr=0.1, max_grad_norm=0.5)
    peer = torch.optim.SGD([{"params": same[0]}, {"params": same[1], "momentum": 0.9}], lr=0.1)
    for step in range(3):
        for own, twin in zip(params, same):
            set_gradients(own, seed=step)
            set_gradients(twin, seed=step)
        norm = torch.nn.utils.clip_grad_norm_([*same[0], *same[1]], 0.5)
        opt.step()
        peer.step()
        torch.testing.assert_close(opt.grad_norm, norm, rtol=1e-6, atol=0)
    assert_close_to_torch([*params[0], *params[1]], [*same[0], *same[1]], 3)


# ---- switched between steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_momentum_switched_on_off_and_on(dampening, device):
    """As in torch: a buffer appears with momentum, its first step is not dampened, and it stays when momentum goes."""
    ours, theirs = (parameters(SIZES, device=device) for _ in range(2))
    optimizers = [(module.SGD(own, lr=0.1, dampening=dampening), own) for module, own in
                  ((fusedopt, ours), (torch.optim, theirs))]  # fmt: skip
    for step, momentum in enumerate((0, 0, 0.9, 0.9, 0.7, 0, 0, 0.8, 0.8)):
        for opt, own in optimizers:
            opt.param_groups[0]["momentum"] = momentum
            train(opt, own, 1, first=step)
            kept = {key for p in own for key in opt.state.get(p, {}) if key != "step"}
            assert kept == ({"momentum_buffer"} if step >= 2 else set())
        assert_close_to_torch(ours, theirs, step + 1)


def test_momentum_switched_on_beside_masters(device):
    """The state that was there stays; the counter starts with the buffer."""
    p, q = (parameter(normal((5000,), torch.bfloat16, device)) for _ in range(2))
    opt, whole = fusedopt.SGD([p], lr=0.1, master_weights="fp32"), parameter(q.detach().float())
    peer = torch.optim.SGD([whole], lr=0.1, dampening=0.0)
    opt.param_groups[0]["dampening"] = peer.param_groups[0]["dampening"] = 0.3
    for step in range(6):
        if step == 3:
            opt.param_groups[0]["momentum"] = peer.param_groups[0]["momentum"] = 0.9
        set_gradients([p], seed=step)
        whole.grad = p.grad.float()
        opt.step()
        peer.step()
        assert set(opt.state[p]) == {"step", "master_param"} | ({"momentum_buffer"} if step >= 3 else set())
        torch.testing.assert_close(opt.state[p]["master_param"], whole.detach(), rtol=0, atol=6 * 16 * 2.0**-24 * 4)
    assert float(opt.state[p]["step"]) == 3


def test_rule_switched_where_state_is_missing(device):
    """torch raises KeyError in the middle of the step; nothing is changed here."""
    for make, key in (
        (lambda own: fusedopt.AdamW(own), "amsgrad"),
        (lambda own: fusedopt.RMSprop(own), "centered"),
        (lambda own: fusedopt.RMSprop(own), "momentum"),
    ):
        params = parameters(SIZES, device=device)
        opt = make(params)
        train(opt, params, 1)
        opt.param_groups[0][key] = True
        set_gradients(params, seed=1)
        before = memory(opt)
        with pytest.raises(ValueError, match=r"expected .*(max_exp_avg_sq|grad_avg|momentum_buffer)"):
            opt.step()
        assert_same_bits(memory(opt), before)
        opt.param_groups[0][key] = False
        opt.step()


@pytest.mark.parametrize("skip", ["nonfinite", "found_inf"])
@pytest.mark.parametrize("name", ["SGD", "SGDW"])
def test_skipped_first_step_leaves_the_next_one_first(name, skip, device):
    """It is not dampened then. torch's fused SGD has garbage in the buffer after such a step."""
    params, clean = (parameters(SIZES, device=device) for _ in range(2))
    extra = {"nonfinite": "skip"} if skip == "nonfinite" else {}
    opt = getattr(fusedopt, name)(params, lr=0.1, momentum=0.9, dampening=0.5, **extra)
    expected = getattr(fusedopt, name)(clean, lr=0.1, momentum=0.9, dampening=0.5)
    set_gradients(params, seed=9)
    if skip == "nonfinite":
        params[2].grad[7] = float("nan")
        opt.step()
    else:
        opt.found_inf = torch.ones((), device=device)
        opt.step()
        del opt.found_inf
    train(opt, params, 3)
    train(expected, clean, 3)
    assert_same_bits(memory(opt), memory(expected))


# ---- rules without state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", STATELESS, ids=str)
def test_no_state_without_momentum(case, device):
    """As in torch: the state stays empty, and so does the checkpoint."""
    params = parameters(SIZES, device=device)
    opt = case.make(params, max_grad_norm=1.0)
    train(opt, params, 3)
    assert len(opt.state) == 0 and opt.state_dict()["state"] == {}
    assert opt.memory_summary().bytes["states"] == opt.memory_summary().bytes["steps"] == 0
    assert opt.master_params()[2].equal(params[2])
    resumed = case.make(params)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(resumed, params, 1, first=3)
    assert len(resumed.state) == 0


@pytest.mark.parametrize("case", STATELESS, ids=str)
def test_random_bits_follow_the_step(case, device):
    """Stochastic rounding counts steps even where the rule has no state: no two steps round alike."""
    p = parameter(torch.ones(4096, dtype=torch.bfloat16, device=device))
    opt = case.make([p], lr=2.0**-9, weight_decay=0.0, stochastic_rounding=True, seed=1)
    seen = []
    for step in range(3):
        p.data.fill_(1.0)
        p.grad = torch.ones_like(p)
        opt.step()
        seen.append(p.detach().clone())
        assert set(opt.state[p]) == {"step"} and float(opt.state[p]["step"]) == step + 1
    assert not any(torch.equal(a, b) for a, b in ((seen[0], seen[1]), (seen[1], seen[2]), (seen[0], seen[2])))


@pytest.mark.parametrize("case", STATELESS, ids=str)
def test_int8_states_without_states_are_refused(case):
    with pytest.raises(ValueError, match=r"state_dtype='int8'.*keeps no moments"):
        case.make(parameters([5]), state_dtype="int8")


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.optimizer == "SGD"], ids=str)
def test_torch_state_dict_is_torchs(case, device):
    """Key for key, without our counter."""
    dicts = []
    for make in (case.make, case.make_peer):
        params = parameters(SIZES, device=device)
        opt = make(params)
        train(opt, params, 2)
        dicts.append(opt.torch_state_dict() if make == case.make else opt.state_dict())
    assert [{i: list(entry) for i, entry in saved["state"].items()} for saved in dicts[:1]] == [
        {i: list(entry) for i, entry in saved["state"].items()} for saved in dicts[1:]
    ]
    assert dicts[0]["param_groups"][0].keys() == dicts[1]["param_groups"][0].keys()


@pytest.mark.parametrize("buffer", ["None", "missing", "empty"])
def test_torchs_checkpoint_without_a_buffer(buffer, device):
    """As torch leaves it for parameters that had no gradient: the next step is the first, undampened."""
    kwargs = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    ours, theirs = (parameters([17, 4097], device=device) for _ in range(2))
    peer = torch.optim.SGD(theirs, **kwargs)
    train(peer, theirs[:1], 2)
    saved = peer.state_dict()
    saved["state"].update({"None": {1: {"momentum_buffer": None}}, "missing": {}, "empty": {1: {}}}[buffer])
    for p, q in zip(ours, theirs):
        p.data.copy_(q.data)
    opt = fusedopt.SGD(ours, lr=1.0)
    opt.load_state_dict(copy.deepcopy(saved))
    train(opt, ours, 3, first=2)
    train(peer, theirs, 3, first=2)
    assert_close_to_torch(ours, theirs, 5)
    assert [float(opt.state[p]["step"]) for p in ours] == [4, 3]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "SGD"])
def test_checkpoint_decides_on_the_rule(name, device):
    """Its param groups say which states there are."""
    chosen = {"Adam": {"amsgrad": True}, "AdamW": {"amsgrad": True}, "RMSprop": {"centered": True, "momentum": 0.9},
              "SGD": {"momentum": 0.9, "dampening": 0.1}}[name]  # fmt: skip
    ours, theirs = (parameters(SIZES, device=device) for _ in range(2))
    peer = getattr(torch.optim, name)(theirs, lr=0.02, **chosen)
    train(peer, theirs, 2)
    for p, q in zip(ours, theirs):
        p.data.copy_(q.data)
    opt = getattr(fusedopt, name)(ours)
    opt.load_state_dict(copy.deepcopy(peer.state_dict()))
    train(opt, ours, 2, first=2)
    train(peer, theirs, 2, first=2)
    assert_close_to_torch(ours, theirs, 4)


@pytest.mark.parametrize("name, kwargs, key", [
    ("AdamW", {"amsgrad": True}, "max_exp_avg_sq"),
    ("RMSprop", {"centered": True}, "grad_avg"),
    ("Adagrad", {}, "sum"),
])  # fmt: skip
def test_checkpoint_that_lacks_a_state(name, kwargs, key, device):
    params = parameters(SIZES, device=device)
    opt = getattr(fusedopt, name)(params, **kwargs)
    train(opt, params, 1)
    checkpoint, before = copy.deepcopy(opt.state_dict()), memory(opt)
    del checkpoint["state"][2][key]
    with pytest.raises(ValueError, match=rf"state\[2\].*expected \['{key}'\]"):
        opt.load_state_dict(checkpoint)
    assert_same_bits(memory(opt), before)


# ---- Adagrad -------------------------------------------------------------------------------------------------------


def test_adagrad_makes_its_state_in_the_constructor(device):
    """As torch, with the initial value; for a group that is added later, in the next step."""
    states = []
    for module in (fusedopt, torch.optim):
        params = parameters([5, 4097, 33], device=device)
        opt = module.Adagrad(params[:2], initial_accumulator_value=0.25)
        assert [list(opt.state[p]) for p in params[:2]] == [["step", "sum"]] * 2
        assert all((opt.state[p]["sum"] == 0.25).all() and float(opt.state[p]["step"]) == 0 for p in params[:2])
        opt.add_param_group({"params": params[2:]})
        assert not opt.state.get(params[2])
        if module is torch.optim and not torch_adagrad_takes_new_groups():
            pytest.skip("this torch's Adagrad cannot step after add_param_group")
        train(opt, params, 2)
        states.append([opt.state[p]["sum"] for p in params])
    for ours, theirs in zip(*states):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options, dtype", [
    ({"state_dtype": "int8", "min_8bit_size": 1}, torch.uint8),
    ({"state_dtype": "fp32"}, torch.float32),
    ({"master_weights": "split16"}, torch.float32),
    ({}, torch.bfloat16),
], ids=str)  # fmt: skip
def test_adagrad_begins_in_the_format_asked_for(options, dtype, device):
    """Also where the state is made late. 0.25 is a number of every plain format; in 8 bits it is a code step away."""
    params = [parameter(normal((n,), torch.bfloat16, device)) for n in (300, 257)]
    opt = fusedopt.Adagrad(params[:1], initial_accumulator_value=0.25, lr=0.1, **options)
    opt.add_param_group({"params": params[1:]})
    assert opt.state[params[0]]["sum"].dtype == dtype
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    for p in params:
        assert opt.state[p]["sum"].dtype == dtype
        entry = opt.torch_state_dict()["state"][[q is p for q in params].index(True)]
        torch.testing.assert_close(
            entry["sum"], torch.full_like(entry["sum"], 0.25), rtol=0.13 if dtype == torch.uint8 else 0, atol=0
        )


def test_adagrad_shares_memory():
    opt = fusedopt.Adagrad(parameters(SIZES))
    opt.share_memory()
    assert all(state["sum"].is_shared() for state in opt.state.values() if state["sum"].numel())


# ---- arithmetic ----------------------------------------------------------------------------------------------------


def test_centered_rmsprop_survives_gradients_without_variance(device):
    """Rounding makes the variance negative then: 0 is put for it. NaN stays NaN."""
    p = parameter(normal((4097,), device=device))
    opt = fusedopt.RMSprop([p], lr=1e-12, alpha=0.5, centered=True)
    negative = torch.zeros_like(p, dtype=torch.bool)
    grad = normal((4097,), device=device, seed=1)
    for _ in range(100):
        p.grad = grad.clone()
        opt.step()
        state = opt.state[p]
        negative |= state["square_avg"] - state["grad_avg"].square() < 0
    assert negative.any() and p.isfinite().all()
    p.grad[3] = float("nan")
    opt.step()
    assert p.isnan().nonzero().flatten().tolist() == [3]


def test_amsgrad_maximum_does_not_hide_nan(device):
    p = parameter(normal((4097,), device=device))
    opt = fusedopt.AdamW([p], amsgrad=True)
    train(opt, [p], 1)
    set_gradients([p], seed=1)
    p.grad[[0, 5, 4096]] = float("nan")
    opt.step()
    train(opt, [p], 1, first=2)
    for t in (p.detach(), opt.state[p]["max_exp_avg_sq"]):
        assert t.isnan().nonzero().flatten().tolist() == [0, 5, 4096]


def test_amsgrad_never_forgets(device):
    p = parameter(normal((4097,), device=device))
    opt = fusedopt.AdamW([p], amsgrad=True, betas=(0.5, 0.5))
    largest = torch.zeros_like(p)
    for step in range(6):
        p.grad = normal((4097,), device=device, seed=step) * (100 if step == 2 else 1)
        opt.step()
        largest = torch.maximum(largest, opt.state[p]["exp_avg_sq"])
        assert_same_bits(opt.state[p]["max_exp_avg_sq"], largest)
    assert (opt.state[p]["exp_avg_sq"] < largest).any()


@pytest.mark.parametrize("beta2, first", [(0.999, 6), (0.9, 6), (0.6, 10)])
def test_radam_goes_without_the_second_moment_at_first(beta2, first, device):
    """Until rho_t exceeds 5; the step is then that of momentum, whatever the gradient's scale."""
    moved = []
    for scale in (1.0, 16.0):
        p = parameter(torch.zeros(33, device=device))
        opt, steps = fusedopt.RAdam([p], lr=1.0, betas=(0.5, beta2)), []
        for _ in range(9):
            before = p.detach().clone()
            p.grad = torch.full_like(p, scale)
            opt.step()
            steps.append((p.detach() - before)[0].item())
        moved.append(steps)
    ratios = [b / a for a, b in zip(*moved)]
    assert [abs(r - 16) < 1e-3 for r in ratios] == [step < first for step in range(1, 10)]
