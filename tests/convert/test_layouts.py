"""Layouts that are put together: ZeRO's partitions, CPUOffloadOptimizer's parts, TransformerEngine's masters, steps."""

import copy

import pytest
import torch
from samples import BLOCKS, DATA, HYPER, NEXT, SMALL, STEPS, params, pattern, set_grads

import fusedopt
from fusedopt import convert
from fusedopt.formats import decode_master
from fusedopt.testing.bounds import assert_within, bounded_step, hyper_of

BF16 = torch.bfloat16

# ---- DeepSpeed ZeRO -----------------------------------------------------------------------------------------------

ZERO_SHAPES = {"embedding": (7, 11), "weight": (5, 7), "bias": (7,), "scale": (5,)}
ZERO = [("deepspeed_zero1_bf16", BF16), ("deepspeed_zero2", torch.float32)]


def zero_sample(name: str):
    """Ranks' parts, what DeepSpeed knows, and the whole model with an optimizer."""
    ranks = [convert.load_file(p)["optimizer_state_dict"] for p in sorted((DATA / name).glob("*_optim_states.pt"))]
    truth = convert.load_file(DATA / name / "truth.pt")
    model = torch.nn.ParameterDict(truth["model"])
    named = [(key, model[key]) for key in ZERO_SHAPES]
    masters = {"master_weights": "split16"} if truth["model"]["bias"].dtype == BF16 else {}
    groups = [{"params": [p for _, p in named[:2]]}, {"params": [p for _, p in named[2:]]}]
    return ranks, truth, named, fusedopt.AdamW(groups, lr=0.5, **masters)


def expected_moments(index: int, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Of Adam after the same gradients, in float64."""
    beta1, beta2 = HYPER["adamw"]["betas"]
    m = v = torch.zeros(shape, dtype=torch.float64)
    for step in range(STEPS):
        grad = pattern(shape, 10 * step + index).double()
        m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad.square()
    return {"exp_avg": m, "exp_avg_sq": v}


@pytest.mark.parametrize(("name", "dtype"), ZERO)
def test_zero_partitions_are_put_together(name, dtype):
    ranks, truth, named, opt = zero_sample(name)
    converted = convert.from_deepspeed_zero(ranks, opt, named)
    for i, (key, param) in enumerate(named):
        entry = converted["state"][i]
        assert float(entry["step"]) == STEPS
        for state, exact in expected_moments(i, ZERO_SHAPES[key]).items():  # a few roundings of numbers below 0.5
            torch.testing.assert_close(entry[state].double(), exact, rtol=1e-6, atol=2.0**-24)
        assert param.dtype == dtype
        assert ("master_param" in entry) == (dtype == BF16)
        torch.testing.assert_close(entry.get("master_param", param), truth["master"][key], rtol=0, atol=0)
    assert [group["weight_decay"] for group in converted["param_groups"]] == [HYPER["adamw"]["weight_decay"], 0.0]
    assert [group["lr"] for group in converted["param_groups"]] == [HYPER["adamw"]["lr"]] * 2


@pytest.mark.parametrize(("name", "dtype"), ZERO)
def test_training_goes_on_from_zero(name, dtype):
    ranks, truth, named, opt = zero_sample(name)
    opt.load_state_dict(convert.from_deepspeed_zero(ranks, opt, named))
    before = {key: copy.deepcopy(opt.state[p]) for key, p in named}
    set_grads([p for _, p in named], NEXT)
    opt.step()
    for g, group in enumerate(opt.param_groups):
        for key, param in named[2 * g : 2 * g + 2]:
            hyper, grad = hyper_of(group, "adamw"), param.grad
            expected = bounded_step("adamw", truth["master"][key], grad, before[key], step=STEPS + 1, hyper=hyper)
            assert_within(decode_master(opt.state[param], param), expected["param"], f"ours, {key}")
            assert_within(truth["after"][key], expected["param"], f"DeepSpeed's, {key}")


def elastic(ranks):
    """As `elastic_checkpoint` saves them: a list of states instead of a state_dict, and a step beside it."""
    ranks = copy.deepcopy(ranks)
    for part in ranks:
        part["base_optimizer_state"] = [part["base_optimizer_state"]["state"][g] for g in range(2)]
    return ranks


def test_elastic_zero_checkpoints_keep_the_optimizers_hyperparameters():
    ranks, _, named, opt = zero_sample("deepspeed_zero2")
    converted = convert.from_deepspeed_zero(elastic(ranks), opt, named)
    expected = convert.from_deepspeed_zero(ranks, opt, named)
    for index, entry in expected["state"].items():
        for key, value in entry.items():
            assert torch.equal(converted["state"][index][key], value)
    assert [group["lr"] for group in converted["param_groups"]] == [0.5, 0.5]


def zero_error(change, match):
    ranks, _, named, opt = zero_sample("deepspeed_zero2")
    ranks, named = change(ranks, named)
    with pytest.raises(ValueError, match=match):
        convert.from_deepspeed_zero(ranks, opt, named)


def test_zero_errors():
    zero_error(lambda r, n: (r[:1], n), "got 1 ranks, expected 2")
    zero_error(lambda r, n: (r[0], n), "expected a list of all ranks")
    zero_error(lambda r, n: (r, n[1:]), r"shape \(7, 11\) is not among named_parameters")
    zero_error(lambda r, n: ([{**p, "fp32_flat_groups": []} for p in r], n), "stage 3, expected stage 1 or 2")
    zero_error(lambda r, n: ([{"zero_stage": 1}] * 2, n), r"expected \['base_optimizer_state'")
    zero_error(lambda r, n: (r, [("x" + key, p) for key, p in n]), "hold 0 elements of 'xembedding', expected 77")
    ranks, _, named, opt = zero_sample("deepspeed_zero2")
    with pytest.raises(ValueError, match="has 2 param groups, expected the optimizer's 1"):
        convert.from_deepspeed_zero(ranks, fusedopt.AdamW([p for _, p in named]), named)
    with pytest.raises(ValueError, match="a rank's part of a ZeRO checkpoint"):
        convert.from_deepspeed(ranks[0], opt)


# ---- steps --------------------------------------------------------------------------------------------------------


def adam_dict(entries: list[dict], **group) -> dict:
    hyper = {**HYPER["adamw"], **group}
    return {"state": dict(enumerate(entries)), "param_groups": [{**hyper, "params": list(range(len(entries)))}]}


def moments(shapes=SMALL, dtype=torch.float32) -> list[dict]:
    return [
        {"exp_avg": pattern(shape, i).to(dtype), "exp_avg_sq": pattern(shape, 50 + i).square().to(dtype)}
        for i, shape in enumerate(shapes)
    ]


def test_deepspeeds_fused_adam_counts_for_the_last_parameter_only():
    """Its group has a 'step' too, which the CPU's has not; there, parameters count for themselves."""
    theirs = adam_dict([{**entry, "step": count} for entry, count in zip(moments(), (0, 3))], bias_correction=True)
    opt = fusedopt.AdamW(params(SMALL))
    counts = [float(entry["step"]) for entry in convert.from_deepspeed(theirs, opt)["state"].values()]
    assert counts == [0, 3]
    theirs["param_groups"][0]["step"] = 0
    counts = [float(entry["step"]) for entry in convert.from_deepspeed(theirs, opt)["state"].values()]
    assert counts == [3, 3]


def test_apex_counts_in_a_tensor_where_it_is_capturable():
    theirs = adam_dict(moments(), step=torch.tensor([3], dtype=torch.int), lr=torch.tensor(2e-3), bias_correction=True)
    converted = convert.from_apex(theirs, fusedopt.AdamW(params(SMALL)))
    assert [float(entry["step"]) for entry in converted["state"].values()] == [3, 3]
    assert isinstance(converted["param_groups"][0]["lr"], float)
    assert converted["param_groups"][0].keys() == {"lr", "betas", "eps", "weight_decay", "params"}


# ---- TransformerEngine: dictionaries built as its state_dict() builds them ------------------------------------------


def test_transformer_engines_masters_are_kept():
    """The layout of `FusedAdam.state_dict()`, read in its source; the package needs CUDA."""
    parameters = params(SMALL, BF16)
    entries = moments()
    for entry, param in zip(entries, parameters):
        entry["master_param"] = param.detach().float() * 1.001
    theirs = adam_dict(entries, step=3, bias_correction=True)
    opt = fusedopt.AdamW(parameters, master_weights="fp32")
    opt.load_state_dict(convert.from_transformer_engine(theirs, opt))
    for param, entry in zip(parameters, entries):
        assert torch.equal(opt.state[param]["master_param"], entry["master_param"])
        assert torch.equal(opt.state[param]["exp_avg"], entry["exp_avg"])
        assert float(opt.state[param]["step"]) == 3


def remainders(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bfloat16 and int16 as its kernel `AdamFunctorMasterParamRemainder` writes them: the upper half, plus one where
    the lower half, as a signed number, is negative."""
    halves = master.view(torch.int16).view(-1, 2)  # little endian
    low, high = halves[:, 0], halves[:, 1]
    high = torch.where(low < 0, high + 1, high)
    return high.view(BF16).view(master.shape), low.clone().view(master.shape)


def test_transformer_engines_remainders_are_ours_to_the_bit():
    masters = [(pattern(shape, 100 + i) * 1.2345 + 1e-6) for i, shape in enumerate(SMALL)]
    halves = [remainders(master) for master in masters]
    parameters = [torch.nn.Parameter(high) for high, _ in halves]
    theirs = adam_dict([{**e, "master_param": low} for e, (_, low) in zip(moments(), halves)], step=3)
    opt = fusedopt.AdamW(parameters, master_weights="split16")
    opt.load_state_dict(convert.from_transformer_engine(theirs, opt))
    for param, master in zip(parameters, masters):
        assert torch.equal(decode_master(opt.state[param], param), master)


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8])
def test_transformer_engines_scaled_states_are_refused(dtype):
    theirs = adam_dict(moments(dtype=dtype), step=3)
    with pytest.raises(ValueError, match=r"state\[0\]\['exp_avg'\] is scaled .* expected float32 or bfloat16"):
        convert.from_transformer_engine(theirs, fusedopt.AdamW(params(SMALL)))


# ---- torchao's CPUOffloadOptimizer ----------------------------------------------------------------------------------


def offloaded():
    """Its layout, read in its source (it needs a GPU): an optimizer per large parameter, one for the small ones."""
    sample = convert.load_file(DATA / "torchao_adamw8bit.pt")["state_dict"]
    large = {"state": {0: sample["state"][0]}, "param_groups": [{**sample["param_groups"][0], "params": [0]}]}
    small = {"state": {0: sample["state"][1]}, "param_groups": [{**sample["param_groups"][0], "params": [0]}]}
    return sample, {"offloaded": [large], "on-device": small}


def test_offloaded_parts_are_joined():
    whole, parts = offloaded()
    parameters = params(BLOCKS)
    opt = fusedopt.AdamW(parameters)
    expected, got = convert.from_torchao(whole, opt), convert.from_torchao(parts, opt)
    assert got["param_groups"][0]["lr"] == expected["param_groups"][0]["lr"]
    for index in (0, 1):
        for key, value in expected["state"][index].items():
            assert torch.equal(got["state"][index][key], value)
    swapped = fusedopt.AdamW([{"params": parameters[1:]}, {"params": parameters[:1]}])
    got = convert.from_torchao(parts, swapped)
    assert torch.equal(got["state"][1]["exp_avg"], expected["state"][0]["exp_avg"])
    frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    got = convert.from_torchao(parts, fusedopt.AdamW([parameters[0], frozen, parameters[1]]))
    assert got["state"].keys() == {0, 2}


def test_offloaded_parts_that_do_not_fit():
    _, parts = offloaded()
    parameters = params(BLOCKS)
    with pytest.raises(ValueError, match=r"ends before parameter 1, of 5 elements.*minimal_size=4096"):
        convert.from_torchao({"offloaded": parts["offloaded"]}, fusedopt.AdamW(parameters))
    with pytest.raises(ValueError, match="has 1 parameters more than the optimizer"):
        convert.from_torchao(parts, fusedopt.AdamW(parameters[:1]))
    with pytest.raises(ValueError, match=r"ends before parameter 1, of 5 elements.*minimal_size=5000"):
        convert.from_torchao(parts, fusedopt.AdamW(parameters), minimal_size=5000)
    parts["offloaded"][0]["param_groups"] *= 2
    with pytest.raises(ValueError, match="has 2 parameters, expected one"):
        convert.from_torchao(parts, fusedopt.AdamW(parameters))
