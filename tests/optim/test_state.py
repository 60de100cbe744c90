"""Checkpoints, copies, and everything that other people's code does to optimizer state between two steps."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from cases import (
    DTYPES,
    ONE_EACH,
    ONE_EACH_WITH_PEER,
    PARAM_LAYOUTS,
    WITH_PEER,
    assert_same_bits,
    memory,
    normal,
    parameter,
    parameters,
    set_gradients,
    train,
)

import fusedopt
from fusedopt import _C

SIZES = [5, 0, 4097]
ADDITIONS = {"max_grad_norm": 2.0, "norm_type": 1.0, "max_grad_value": 0.5, "nonfinite": "skip"}


def saved_and_loaded(state_dict, weights_only=True):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


def states(opt, p, case):
    """The rule's states of one parameter, in its order."""
    return [opt.state[p][key] for key in case.rule_spec.states]


# ---- disturbances between two steps that must not change what follows, not in a single bit --------------------------
# Each gets (case, opt, params) and returns the optimizer and the parameters to go on with.

DISTURBANCES = {}


def disturbance(function):
    DISTURBANCES[function.__name__] = function
    return function


@disturbance
def resume_in_a_new_optimizer(case, opt, params):
    fresh = copy.deepcopy(params)
    resumed = case.make(fresh, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    return resumed, fresh


@disturbance
def resume_from_file(case, opt, params):
    opt.load_state_dict(saved_and_loaded(opt.state_dict()))
    return opt, params


@disturbance
def load_its_own_state_dict(case, opt, params):
    opt.load_state_dict(opt.state_dict())
    return opt, params


@disturbance
def deepcopied(case, opt, params):
    opt, params = copy.deepcopy((opt, params))
    return opt, params


@disturbance
def pickled(case, opt, params):
    opt, params = pickle.loads(pickle.dumps((opt, params)))
    return opt, params


@disturbance
def optimizer_to(case, opt, params):
    """The widespread snippet, with copies so that addresses change even where the device stays."""
    for state in opt.state.values():
        for value in state.values():
            value.data = value.data.to(params[0].device, copy=True)
    return opt, params


@disturbance
def state_entries_replaced(case, opt, params):
    for state in opt.state.values():
        for key, value in state.items():
            state[key] = value.clone()
    return opt, params


@disturbance
def state_dicts_replaced(case, opt, params):
    for p in params:
        opt.state[p] = {key: value.clone() for key, value in opt.state[p].items()}
    return opt, params


@disturbance
def step_is_a_python_float(case, opt, params):
    for state in opt.state.values():
        state["step"] = float(state["step"])
    return opt, params


@disturbance
def step_is_a_python_int(case, opt, params):
    for state in opt.state.values():
        state["step"] = int(state["step"])
    return opt, params


@disturbance
def step_is_a_cpu_tensor(case, opt, params):
    for state in opt.state.values():
        state["step"] = state["step"].cpu().clone()
    return opt, params


@disturbance
def step_is_an_int64_tensor(case, opt, params):
    for state in opt.state.values():
        state["step"] = state["step"].long()
    return opt, params


@disturbance
def moments_lie_elsewhere_in_memory(case, opt, params):
    """Views into a larger buffer, at odd offsets."""
    for state in opt.state.values():
        for key in state.keys() - {"step"}:
            buffer = torch.empty(state[key].numel() + 1, dtype=state[key].dtype, device=state[key].device)
            state[key] = buffer[1:].view_as(state[key]).copy_(state[key])
    return opt, params


@disturbance
def data_swapped(case, opt, params):
    for p in params:
        p.data = p.data.clone()
    return opt, params


@disturbance
def parameters_replaced_in_groups(case, opt, params):
    """What FSDP wrappers do, without notice."""
    new = [parameter(p.data.clone()) for p in params]
    for old, replacement in zip(params, new, strict=True):
        opt.state[replacement] = opt.state.pop(old)
    opt.param_groups[0]["params"][:] = new
    return opt, new


@disturbance
def parameters_reordered(case, opt, params):
    opt.param_groups[0]["params"].reverse()
    return opt, params


@disturbance
def group_split_in_two(case, opt, params):
    group = opt.param_groups[0]
    opt.param_groups.append({**group, "params": group["params"][1:]})
    group["params"] = group["params"][:1]
    return opt, params


@disturbance
def zeroed_and_stepped_without_gradients(case, opt, params):
    opt.zero_grad()
    opt.step()
    return opt, params


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
@pytest.mark.parametrize("disturb", DISTURBANCES.values(), ids=DISTURBANCES)
def test_goes_on_as_if_nothing_had_happened(disturb, case, device):
    params, undisturbed = (parameters(SIZES, device=device) for _ in range(2))
    opt, expected = case.make(params), case.make(undisturbed)
    train(opt, params, 3)
    train(expected, undisturbed, 6)
    opt, params = disturb(case, opt, params)
    train(opt, params, 3, first=3)
    assert_same_bits([p.detach() for p in params], [p.detach() for p in undisturbed])
    for p, q in zip(params, undisturbed, strict=True):
        assert float(opt.state[p]["step"]) == 6
        assert_same_bits(states(opt, p, case), states(expected, q, case))


def test_parameter_replaced_before_the_first_step(device):
    p, q = parameters([5, 4097], device=device)
    opt = fusedopt.AdamW([p, q])
    new = parameter(q.data.clone())
    opt.param_groups[0]["params"][1] = new
    train(opt, [p, new], 2)
    assert q not in opt.state and float(opt.state[new]["step"]) == 2
    assert torch.equal(q, parameters([5, 4097], device=device)[1])


def test_replacement_that_shares_memory_has_no_state_yet(device):
    """State belongs to the Parameter object, not to its address."""
    old = parameter(normal((33,), device=device))
    opt = fusedopt.AdamW([old])
    train(opt, [old], 3)
    new = parameter(old.data)
    opt.param_groups[0]["params"][0] = new
    train(opt, [new], 1, first=3)
    assert (float(opt.state[new]["step"]), float(opt.state[old]["step"])) == (1, 3)


@pytest.mark.parametrize("lay", [torch.Tensor.contiguous, lambda t: t.t().contiguous().t()], ids=["rows", "columns"])
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_moments_in_another_layout_than_their_parameter(case, lay, device):
    """As checkpoints of transposed or sliced parameters have them: elements go together by index, not by address."""

    def odd_parameters():
        return [parameter(normal((37, 58), device=device)[:, ::2]), parameter(normal((37, 29), device=device).t())]

    params, undisturbed = odd_parameters(), odd_parameters()
    opt, expected = case.make(params), case.make(undisturbed)
    train(opt, params, 2)
    train(expected, undisturbed, 4)
    for state in opt.state.values():
        for key in state.keys() - {"step"}:
            state[key] = lay(state[key])
    train(opt, params, 2, first=2)
    assert_same_bits([p.detach() for p in params], [p.detach() for p in undisturbed])


@pytest.mark.parametrize("layout", ["every_second", "columns"])
def test_written_between_steps(layout, device):
    """A parameter with gaps is stepped in a copy, which takes over what others have written meanwhile."""
    p = parameter(PARAM_LAYOUTS[layout](lambda shape: normal(shape, device=device)))
    twin = parameter(p.detach().clone(memory_format=torch.contiguous_format))
    for q in (p, twin):
        opt = fusedopt.AdamW([q], lr=0.1)
        for step in range(3):
            set_gradients([q], seed=step)
            opt.step()
            with torch.no_grad():
                q.mul_(-2.0)
    assert_same_bits(p.detach().clone(memory_format=torch.contiguous_format), twin.detach())


@pytest.mark.parametrize("count", [2049, 2**24 - 1])
def test_large_counters_are_loaded_exactly(count, device):
    """Neither a float16 nor an int could go on from both; float32 counts to 2^24."""
    p = parameter(normal((5,), device=device))
    opt = fusedopt.AdamW([p])
    train(opt, [p], 1)
    saved = opt.state_dict()
    saved["state"][0]["step"] = float(count)
    opt.load_state_dict(saved)
    train(opt, [p], 1)
    assert float(opt.state[p]["step"]) == count + 1


def test_shrunk_parameter_storage(device):
    """A new `.data` of another size with matching states, as of a resized embedding: no length is remembered."""
    p = parameter(normal((4097,), device=device))
    opt = fusedopt.AdamW([p])
    train(opt, [p], 2)
    p.grad = None
    p.data = p.data[:33].clone()
    for key in ("exp_avg", "exp_avg_sq"):
        opt.state[p][key] = opt.state[p][key][:33].clone()
    twin = copy.deepcopy(p)
    resumed = fusedopt.AdamW([twin])
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, [p], 2, first=2)
    train(resumed, [twin], 2, first=2)
    assert_same_bits(p.detach(), twin.detach())


# ---- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WITH_PEER, ids=str)
def test_state_dict_has_torchs_layout(case, device):
    state_dicts = []
    for make in (case.make, case.make_peer):
        params = parameters(SIZES, device=device)
        opt = make(params)
        train(opt, params, 1)
        state_dicts.append(opt.state_dict())
    ours, theirs = state_dicts
    assert ours.keys() == theirs.keys()
    assert [group.keys() for group in ours["param_groups"]] == [group.keys() for group in theirs["param_groups"]]
    keys = [{i: list(entry) for i, entry in saved["state"].items()} for saved in state_dicts]
    if case.rule_spec.states and not case.rule_spec.torch_counts:  # our counter comes first
        keys[1] = {i: ["step", *entry] for i, entry in keys[1].items()}
    assert keys[0] == keys[1]
    for index, state in theirs["state"].items():
        for key, value in state.items():
            mine = ours["state"][index][key]
            assert (mine.dtype, mine.shape, mine.stride()) == (value.dtype, value.shape, value.stride())


@pytest.mark.parametrize("direction", ["from torch", "to torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ONE_EACH_WITH_PEER, ids=str)
def test_change_of_library_in_mid_run(case, dtype, direction, device):
    """Three steps with one library, a checkpoint, three with the other: the same as six steps with torch."""
    first, second = (case.make_peer, case.make) if direction == "from torch" else (case.make, case.make_peer)
    params, alone = (parameters(SIZES, dtype, device) for _ in range(2))
    opt, expected = first(params, lr=0.02), case.make_peer(alone, lr=0.02)
    train(opt, params, 3)
    train(expected, alone, 6)
    resumed = second(params)
    resumed.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert resumed.param_groups[0]["lr"] == 0.02
    for p in params:
        assert_same_bits(states(resumed, p, case), states(opt, p, case))
    train(resumed, params, 3, first=3)
    unit = torch.finfo(dtype).eps / 2
    for p, q in zip(params, alone, strict=True):
        # Six steps of at most 16 roundings each (test_torch_parity.py) at the largest parameter, about 4.
        torch.testing.assert_close(p, q, rtol=0, atol=6 * 16 * unit * 4)
        if case.rule_spec.torch_counts:
            assert float(resumed.state[p]["step"]) == 6
        else:  # torch's SGD leaves our counter alone, and has none: a buffer has seen a step at least
            assert float(resumed.state[p]["step"]) == (3 if direction == "to torch" else 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_checkpoint_preserves_bits_and_dtypes(case, dtype, device):
    params = parameters(SIZES, dtype, device)
    opt = case.make(params)
    train(opt, params, 2)
    saved = saved_and_loaded(opt.state_dict())
    resumed = case.make(params)
    resumed.load_state_dict(saved)
    assert_same_bits(memory(resumed), memory(opt))


def test_loading_does_not_alias_the_checkpoint(device):
    params = parameters(SIZES, device=device)
    opt = fusedopt.AdamW(params)
    train(opt, params, 2)
    checkpoint = copy.deepcopy(opt.state_dict())
    kept = copy.deepcopy(checkpoint)
    opt.load_state_dict(checkpoint)
    train(opt, params, 2, first=2)
    for index, state in kept["state"].items():
        for key, value in state.items():
            assert_same_bits(checkpoint["state"][index][key], value)


def test_float32_moments_of_bfloat16_parameters_are_not_rounded(device):
    """torch rounds them to bfloat16 on loading, silently. Here they stay, and so do the steps after it."""
    params = parameters(SIZES, torch.bfloat16, device)
    opt = fusedopt.AdamW(params)
    train(opt, params, 1)
    checkpoint = copy.deepcopy(opt.state_dict())
    moments = {"exp_avg": normal((4097,), device=device), "exp_avg_sq": normal((4097,), device=device, seed=1).square()}
    checkpoint["state"][2].update({key: value.clone() for key, value in moments.items()})
    opt.load_state_dict(checkpoint)
    for key, value in moments.items():
        assert_same_bits(opt.state[params[2]][key], value)
    train(opt, params, 1, first=1)
    assert {opt.state[params[2]][key].dtype for key in moments} == {torch.float32}
    assert {opt.state[params[1]][key].dtype for key in moments} == {torch.bfloat16}


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_moments_of_different_dtypes_are_refused(key, device):
    """Rounding one of them silently would be wrong, and so would be guessing which."""
    params = parameters(SIZES, torch.bfloat16, device)
    opt = fusedopt.AdamW(params)
    train(opt, params, 1)
    checkpoint, before = copy.deepcopy(opt.state_dict()), memory(opt)
    checkpoint["state"][2][key] = normal((4097,), device=device)
    with pytest.raises(ValueError, match=r"state\[2\].*expected one format for all") as error:
        opt.load_state_dict(checkpoint)
    missing = [word for word in ("exp_avg", "exp_avg_sq", "float32", "bfloat16") if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"
    assert_same_bits(memory(opt), before)


def test_loaded_hyper_parameters_win_and_additions_stay(device):
    params = parameters(SIZES, device=device)
    source = torch.optim.AdamW(params, lr=0.5, weight_decay=0.25)
    opt = fusedopt.AdamW(params, **ADDITIONS)
    opt.load_state_dict(source.state_dict())
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["weight_decay"]) == (0.5, 0.25)
    assert {key: getattr(opt, key) for key in ADDITIONS} == ADDITIONS
    assert not ADDITIONS.keys() & opt.param_groups[0].keys()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["deepcopy", "pickle"]
)
def test_additions_survive_copies(copied, device):
    params = parameters(SIZES, device=device)
    opt = fusedopt.AdamW(params, fused=True, **ADDITIONS)
    train(opt, params, 1)
    twin = copied(opt)
    assert {key: getattr(twin, key) for key in ADDITIONS} == ADDITIONS
    assert twin._step_supports_amp_scaling is True
    assert {key: getattr(twin, key) for key in ADDITIONS} == {key: getattr(opt, key) for key in ADDITIONS}
    train(opt, params, 2, first=1)
    train(twin, twin.param_groups[0]["params"], 2, first=1)
    assert_same_bits(memory(twin), memory(opt))


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_distributed_checkpoint_state(case, device):
    """torch.distributed.checkpoint's flattening by parameter name, into an optimizer without state, and on."""
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")

    def model():
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).to(device)

    def run(network, opt, steps):
        for step in range(steps):
            opt.zero_grad()
            network(normal((4, 5), device=device, seed=step)).square().sum().backward()
            opt.step()
        opt.zero_grad()

    one, two = model(), model()
    opt = case.make(one.parameters(), max_grad_norm=1.0)
    run(one, opt, 3)
    for flatten in (False, True):
        options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
        saved = copy.deepcopy(dcp.get_optimizer_state_dict(one, opt, options=options))
        two.load_state_dict(one.state_dict())
        resumed = case.make(two.parameters(), max_grad_norm=1.0)
        dcp.set_optimizer_state_dict(two, resumed, saved, options=options)
        assert_same_bits(memory(resumed), memory(opt))
        run(one, opt, 2)
        run(two, resumed, 2)
        assert_same_bits(memory(resumed), memory(opt))


def test_distributed_checkpoint_from_torch(device):
    """Every key of a live param group must be in a checkpoint: our additions must not be keys of groups."""
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = torch.nn.Linear(5, 7).to(device)
    source = torch.optim.AdamW(model.parameters(), lr=0.25)
    train(source, list(model.parameters()), 2)
    source.zero_grad()
    saved = dcp.get_optimizer_state_dict(model, source)
    opt = fusedopt.AdamW(model.parameters(), **ADDITIONS)
    dcp.set_optimizer_state_dict(model, opt, saved)
    assert opt.param_groups[0]["lr"] == 0.25
    for p in model.parameters():
        assert float(opt.state[p]["step"]) == 2
        assert_same_bits(opt.state[p]["exp_avg"], source.state[p]["exp_avg"])


@pytest.mark.gpu
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_training_moves_from_cpu_to_cuda(case):
    """model.to(device) after some steps: `.data` of parameters moves, states by the usual snippet."""
    params = parameters(SIZES)
    opt = case.make(params)
    train(opt, params, 3)
    for p in params:
        p.data, p.grad = p.data.cuda(), None
    for state in opt.state.values():
        for value in state.values():
            value.data = value.data.cuda()
    train(opt, params, 3, first=3)
    undisturbed = parameters(SIZES)
    expected = case.make(undisturbed)
    train(expected, undisturbed, 6)
    # Elementwise updates are bitwise the same on both devices (test_cpu_cuda_bits.py).
    assert_same_bits([p.detach().cpu() for p in params], [p.detach() for p in undisturbed])


def test_parameter_moved_to_another_group(device):
    """The order of all parameters stays the same, only the group of one changes: its hyper-parameters must too."""
    ours, theirs = (parameters(SIZES, device=device) for _ in range(2))
    optimizers = fusedopt.AdamW(ours, lr=0.01), torch.optim.AdamW(theirs, lr=0.01)
    for opt, params in zip(optimizers, (ours, theirs)):
        train(opt, params, 1)
        group = opt.param_groups[0]
        opt.param_groups.append({**group, "params": group["params"][-1:], "lr": 1.0})
        group["params"] = group["params"][:-1]
        train(opt, params, 1, first=1)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


def test_optimizer_that_its_parameter_refers_to_is_freed(device):
    """The collector sees the whole cycle, with what repeats a step too."""
    params = parameters([5, 300], device=device)
    opt = fusedopt.AdamW(params)
    train(opt, params, 3)
    assert _C.has_torch_functions() == (opt._plan.repetition is not None)
    params[0].owner = opt
    gone = weakref.ref(opt)
    del opt, params
    gc.collect()
    assert gone() is None
