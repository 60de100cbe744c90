"""Checkpoints that the real peers made: read as the peers read them, and gone on from as they go on.

`make_data.py` made the files. The next step of both is held against the float64 reference from the converted state,
within the bound of `fusedopt.testing.bounds`: it covers any order of the operations.
"""

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from samples import BLOCKS, DATA, HYPER, NEXT, SMALL, STEPS, WEIGHTS, params, sampled, set_grads

import fusedopt
from fusedopt import convert, reference
from fusedopt.testing.bounds import assert_within, bounded_step, hyper_of

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A file and how it is converted."""

    name: str
    read: object
    make: type
    rule: str
    shapes: tuple = SMALL
    dtype: torch.dtype = torch.float32
    options: dict = field(default_factory=dict)
    expected: dict = field(default_factory=dict)
    """Hyper-parameters of the result, where they are not the peer's."""
    float32_powers: bool = False
    """The peer takes β**t in float32."""
    error_bits: int = 0
    """Of the master that the peer keeps after its step."""

    def __str__(self) -> str:
        return self.name


ADAMW, LION = (fusedopt.AdamW, "adamw"), (fusedopt.Lion, "lion")
MASTER = {"master_weights": "fp32"}
_torchao = partial(
    Case, read=convert.from_torchao, make=fusedopt.AdamW, rule="adamw", shapes=BLOCKS, float32_powers=True
)
CASES = [
    Case("bitsandbytes_adamw8bit", convert.from_bitsandbytes, *ADAMW, WEIGHTS),
    Case("bitsandbytes_adamw32bit", convert.from_bitsandbytes, *ADAMW),
    Case("bitsandbytes_lion8bit", convert.from_bitsandbytes, *LION, WEIGHTS),
    _torchao("torchao_adamw8bit"),
    _torchao("torchao_adamw4bit"),
    _torchao("torchao_adamwfp8"),
    Case("lion_pytorch", convert.from_lion_pytorch, *LION),
    Case(
        "lion_pytorch_decoupled",
        partial(convert.from_lion_pytorch, decoupled_from_lr=HYPER["lion"]["lr"]),
        *LION,
        expected={"weight_decay": 1e-3 / HYPER["lion"]["lr"]},
    ),
    Case("optimi_adamw", convert.from_optimi, *ADAMW),
    Case("optimi_adamw_kahan", convert.from_optimi, *ADAMW, dtype=BF16, options=MASTER),
    Case("optimi_radam", convert.from_optimi, fusedopt.RAdam, "radam", expected={"decoupled_weight_decay": False}),
    Case("optimi_lion", convert.from_optimi, *LION, expected={"weight_decay": 1e-3 / HYPER["lion"]["lr"]}),
    Case(
        "optimi_sgdw",
        convert.from_optimi,
        fusedopt.SGDW,
        "sgdw_momentum",
        expected={"dampening": HYPER["sgd"]["momentum"]},
    ),
    Case("flashoptim_adamw", convert.from_flashoptim, *ADAMW, dtype=BF16, options=MASTER, error_bits=8),
    Case("flashoptim_lion", convert.from_flashoptim, *LION, dtype=BF16, options=MASTER, error_bits=16),
    Case("flashoptim_sgd", convert.from_flashoptim, fusedopt.SGD, "sgd_momentum"),
    Case("apex_adam", convert.from_apex, *ADAMW),
    Case("apex_lamb", convert.from_apex, fusedopt.LAMB, "lamb"),
    Case("apex_sgd", convert.from_apex, fusedopt.SGD, "sgd_momentum"),
    Case("deepspeed_cpuadam", convert.from_deepspeed, *ADAMW),
    Case("deepspeed_fusedadam", convert.from_deepspeed, *ADAMW),
]


def sample_of(case: Case, device="cpu"):
    """The file, and an optimizer with defaults of its own beside the parameters of that time."""
    sample = convert.load_file(DATA / f"{case.name}.pt")
    parameters = params(case.shapes, case.dtype, device)
    momentum = {"momentum": 0.5} if case.rule.startswith("sgd") else {}
    return sample, parameters, case.make(parameters, lr=0.5, **momentum, **case.options)


def peer_hyper(case: Case) -> dict:
    base = {"sgd_momentum": "sgd", "sgdw_momentum": "sgd", "radam": "adamw"}.get(case.rule, case.rule)
    return {**HYPER[base], **case.expected}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_states_and_hyperparameters_are_the_peers(case):
    sample, parameters, opt = sample_of(case)
    converted = case.read(sample["state_dict"], opt)
    for index, decoded in enumerate(sample["decoded"]):
        entry = converted["state"][index]
        assert {key for key in entry if key != "step"} == decoded.keys()
        for key, value in decoded.items():
            assert entry[key].shape == parameters[index].shape
            torch.testing.assert_close(sampled(entry[key]), value, rtol=0, atol=0, equal_nan=True)
        if "Adam" in case.make.__name__ or case.make is fusedopt.LAMB:
            assert float(entry["step"]) == STEPS
    (group,) = converted["param_groups"]
    assert group["params"] == [0, 1]
    for key, value in peer_hyper(case).items():
        assert group[key] == pytest.approx(value, rel=1e-6), key  # torchao keeps lr in float32


@pytest.mark.parametrize("case", CASES, ids=str)
def test_neither_the_checkpoint_nor_the_optimizer_is_written(case):
    sample, parameters, opt = sample_of(case)
    case.read(sample["state_dict"], opt)
    assert not opt.state
    assert opt.param_groups[0]["lr"] == 0.5
    again = convert.load_file(DATA / f"{case.name}.pt")
    assert_same(sample["state_dict"], again["state_dict"])
    for param, before in zip(parameters, params(case.shapes, case.dtype)):
        assert torch.equal(param, before)


def assert_same(a, b) -> None:
    """Containers, tensors and objects with attributes."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a.float(), b.float())
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, convert.Foreign):
        assert_same(a.__dict__, b.__dict__)
    else:
        assert a == b


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_next_step_is_the_peers(case, device):
    sample, parameters, opt = sample_of(case, device)
    opt.load_state_dict(case.read(sample["state_dict"], opt))
    before = [p.detach().clone() for p in parameters]
    states = [{key: opt.state[p][key].clone() for key in reference.STATES[case.rule]} for p in parameters]
    masters = [opt.state[p].get("master_param", p).detach().clone() for p in parameters]
    steps = [int(opt.state[p]["step"]) for p in parameters]
    set_grads(parameters, NEXT)
    opt.step()
    for i, param in enumerate(parameters):
        hyper = hyper_of(opt.param_groups[0], case.rule)
        expected = bounded_step(case.rule, masters[i], param.grad, states[i], step=steps[i] + 1, hyper=hyper)["param"]
        assert_within(opt.state[param].get("master_param", param), expected, f"ours, parameter {i}")
        if sample["after"] is not None:
            if case.float32_powers:
                expected.error += float32_power_error(expected.value - masters[i].double().cpu(), hyper, steps[i] + 1)
            if case.error_bits:
                expected.error += error_bits_error(sample["after"][i], case.error_bits).view(expected.error.shape)
            theirs = sample["after"][i]
            expected.value, expected.error = sampled(expected.value), sampled(expected.error)
            assert_within(theirs, expected, f"theirs, parameter {i}")
        assert not torch.equal(param, before[i])


def float32_power_error(moved: torch.Tensor, hyper: dict, step: int) -> torch.Tensor:
    """Of a step, where 1 - β**t is computed in float32: the power is off by up to 4 units of 2^-24, β and t being exact
    to half of one each, and the difference makes that relative to 1 - β**t. The second moment's stands under a root."""
    first, second = (4 * (step + 1) * 2.0**-24 / (1 - beta**step) for beta in hyper["betas"])
    decay = hyper["lr"] * hyper["weight_decay"]
    return (moved.abs() + decay) * (first + second / 2)


def error_bits_error(after: torch.Tensor, bits: int) -> torch.Tensor:
    """Half a unit of the error bits, which is 1/(2^(bits - 1) - 1) of half an ulp of bfloat16, 2^-8 of the number."""
    return after.abs().double() * 2.0**-8 / (2 ** (bits - 1) - 1)
