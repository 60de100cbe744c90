"""Bad format options: the type and message of the error, before anything is there or changed."""

import re

import pytest
import torch
from cases import (
    assert_same_bits,
    memory,
    parameters,
    train,
)
from format_cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
)

import fusedopt

BAD_OPTIONS = {
    "unknown master": (BFLOAT16, {"master_weights": "fp16"}, ["master_weights", "'fp16'", "fp32", "split16", "split8"]),
    "unknown state dtype": (BFLOAT16, {"state_dtype": "fp8"}, ["state_dtype", "'fp8'", "fp32", "bf16", "int8"]),
    "torch dtype": (BFLOAT16, {"state_dtype": torch.float16}, ["state_dtype", "float16", "fp32", "bf16", "int8"]),
    "not a bool": (BFLOAT16, {"stochastic_rounding": "yes"}, ["stochastic_rounding", "'yes'", "True", "False"]),
    "split16 of fp32": (FLOAT32, {"master_weights": "split16"}, ["split16", "float32", "bfloat16"]),
    "split8 of fp32": (FLOAT32, {"master_weights": "split8"}, ["split8", "float32", "bfloat16"]),
    "split8 of fp16": (FLOAT16, {"master_weights": "split8"}, ["split8", "float16", "bfloat16"]),
    "master of fp32": (FLOAT32, {"master_weights": "fp32"}, ["master_weights", "float32", "bfloat16 or float16"]),
    "stochastic fp32": (FLOAT32, {"stochastic_rounding": True}, ["stochastic_rounding", "float32", "bfloat16"]),
    "stochastic fp16": (FLOAT16, {"stochastic_rounding": True}, ["stochastic_rounding", "float16", "bfloat16"]),
    "stochastic with a master": (
        BFLOAT16,
        {"stochastic_rounding": True, "master_weights": "split16"},
        ["stochastic_rounding", "split16", "leave one out"],
    ),
    "int8 of fp64": (torch.float64, {"state_dtype": "int8"}, ["float64", "int8"]),
    "fp32 of fp64": (torch.float64, {"state_dtype": "fp32"}, ["float64", "fp32"]),
    "negative size": (BFLOAT16, {"min_8bit_size": -1}, ["min_8bit_size", "-1"]),
    "fractional size": (BFLOAT16, {"min_8bit_size": 0.5}, ["min_8bit_size", r"0\.5"]),
    "size is a bool": (BFLOAT16, {"min_8bit_size": True}, ["min_8bit_size", "True"]),
}


def assert_message(error, patterns):
    for pattern in patterns:
        assert re.search(pattern, str(error.value), re.IGNORECASE), f"{pattern!r} is not in: {error.value}"


@pytest.mark.parametrize("where", ["optimizer", "group", "added group"])
@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name, where, device):
    """Refused before anything is there; an optimizer goes on without the added group."""
    dtype, options, patterns = BAD_OPTIONS[name]
    good, bad = parameters([5], FLOAT32, device), parameters([5], dtype, device)
    opt = fusedopt.AdamW(good)
    for cls in (fusedopt.AdamW, fusedopt.Adam, fusedopt.Lion):
        with pytest.raises(ValueError) as error:
            if where == "optimizer":
                cls(bad, **options)
            elif where == "group":
                cls([{"params": good}, {"params": bad, **options}])
            else:
                opt.add_param_group({"params": bad, **options})
        assert_message(error, patterns)
    assert len(opt.param_groups) == 1
    train(opt, good, 1)


def test_one_seed_for_all_groups():
    first, second = parameters([5, 6], BFLOAT16)
    opt = fusedopt.AdamW([first], stochastic_rounding=True, seed=1)
    with pytest.raises(ValueError, match="AdamW: got seed=2 in one param group and 1 in another, expected one for all"):
        opt.add_param_group({"params": [second], "seed": 2})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [second], "seed": 1})


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7"], ids=repr)
def test_bad_seed(seed):
    """Found when the optimizer is made, like every bad option, and not in the first step."""
    with pytest.raises((ValueError, TypeError)) as error:
        fusedopt.AdamW(parameters([5], BFLOAT16), stochastic_rounding=True, seed=seed)
    assert_message(error, ["seed"])


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Lion"])
def test_unknown_keyword(name):
    with pytest.raises(TypeError) as error:
        getattr(fusedopt, name)(parameters([5]), master_weigths="fp32")
    assert_message(error, ["master_weigths", "master_weights"])


def test_options_made_bad_between_steps(device):
    """A group is a dictionary that anybody may write to: the next plan refuses, and changes nothing."""
    params = parameters([5, 4097], BFLOAT16, device)
    opt = fusedopt.AdamW(params, master_weights="split16")
    train(opt, params, 2)
    params[0].data = params[0].data.float()
    params[0].grad = None
    before = memory(opt)
    with pytest.raises(ValueError) as error:
        opt.step()
    assert_message(error, ["split16", "float32"])
    assert_same_bits(memory(opt), before)
