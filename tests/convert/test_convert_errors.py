"""Bad input: says where, what was got, what was expected, and the remedy, before anything is written."""

import copy
import pickle

import pytest
import torch
from samples import BLOCKS, DATA, SMALL, WEIGHTS, params

import fusedopt
from fusedopt import convert

BF16 = torch.bfloat16
NESTED = "__bnb_optimizer_quant_state__"


def loaded(name: str) -> dict:
    return copy.deepcopy(convert.load_file(DATA / f"{name}.pt")["state_dict"])


def refused(read, state_dict, opt, match: str, error=ValueError, **options) -> None:
    with pytest.raises(error, match=match) as raised:
        read(state_dict, opt, **options)
    message = str(raised.value)
    assert message.startswith(f"{read.__name__}: ") and ("expected" in message or "> 0" in message) and ";" in message
    assert not opt.state if isinstance(opt, fusedopt.FusedOptimizer) else True


# ---- every importer -------------------------------------------------------------------------------------------------

ADAMS = [
    (convert.from_apex, "apex_adam"),
    (convert.from_deepspeed, "deepspeed_cpuadam"),
    (convert.from_bitsandbytes, "bitsandbytes_adamw32bit"),
    (convert.from_optimi, "optimi_adamw"),
]


@pytest.mark.parametrize(("read", "name"), ADAMS, ids=lambda x: getattr(x, "__name__", None))
def test_what_does_not_fit_the_optimizer(read, name):
    theirs, opt = loaded(name), fusedopt.AdamW(params(SMALL))
    refused(read, theirs, torch.optim.AdamW(params(SMALL)), "an optimizer of type AdamW, expected one of", TypeError)
    refused(read, theirs, fusedopt.RMSprop(params(SMALL)), "an optimizer of type RMSprop, expected one with the rule")
    refused(read, theirs, fusedopt.AdamW(params(SMALL)[:1]), r"hold \[2\] parameters, expected \[1\]")
    refused(read, theirs, fusedopt.AdamW(params(((11, 7), (5,)))), r"state\[0\]\['exp_avg'\] has shape \(7, 11\)")
    refused(read, [theirs], opt, "got a checkpoint of type list")
    refused(read, {"state": {}}, opt, "expected 'param_groups'")
    without_lr = copy.deepcopy(theirs)
    del without_lr["param_groups"][0]["lr"]
    refused(read, without_lr, opt, r"param_groups\[0\] has keys .* expected \['lr'\] too")
    theirs["state"][7] = theirs["state"][0]
    refused(read, theirs, opt, r"state\[7\] belongs to no parameter of param_groups")


def test_states_of_another_algorithm():
    lion, adam = loaded("lion_pytorch"), loaded("apex_adam")
    adam["param_groups"][0]["step"] = 3
    lion["param_groups"][0]["step"] = 3
    refused(
        convert.from_apex, lion, fusedopt.AdamW(params(SMALL)), r"expected \['exp_avg_sq'\] too.*this one is 'adamw'"
    )
    refused(convert.from_apex, adam, fusedopt.SGD(params(SMALL), momentum=0.9), r"expected \['momentum_buffer'\] too")
    theirs = loaded("bitsandbytes_adamw32bit")
    refused(convert.from_bitsandbytes, theirs, fusedopt.Lion(params(SMALL)), "expected no 'state2': an Adam's")


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.zeros(7, 11, dtype=torch.int8), "has dtype int8, expected a floating-point dtype: a foreign format"),
        ([0.0], "is a list, expected a tensor"),
    ],
)
def test_foreign_layouts(value, match):
    theirs = loaded("apex_adam")
    theirs["state"][0]["exp_avg"] = value
    refused(convert.from_apex, theirs, fusedopt.AdamW(params(SMALL)), rf"state\[0\]\['exp_avg'\] {match}")


@pytest.mark.parametrize("step", [-1, float("nan"), "three", torch.zeros(2)])
def test_steps_that_are_none(step):
    theirs = loaded("deepspeed_cpuadam")
    theirs["state"][1]["step"] = step
    refused(convert.from_deepspeed, theirs, fusedopt.AdamW(params(SMALL)), r"state\[1\]\['step'\] is .* expected")


def test_adam_without_bias_correction_is_refused_and_lamb_keeps_it():
    theirs = loaded("apex_adam")
    theirs["param_groups"][0]["bias_correction"] = False
    refused(convert.from_apex, theirs, fusedopt.AdamW(params(SMALL)), "bias_correction=False, expected True")
    theirs = loaded("apex_lamb")
    theirs["param_groups"][0]["bias_correction"] = False
    group = convert.from_apex(theirs, fusedopt.LAMB(params(SMALL)))["param_groups"][0]
    assert group["bias_correction"] is False
    assert "max_grad_norm" not in group


# ---- bitsandbytes ---------------------------------------------------------------------------------------------------


def quantised(change) -> dict:
    theirs = loaded("bitsandbytes_adamw8bit")
    change(theirs["state"][0][NESTED])
    return theirs


def bnb_refused(change, match: str, **options) -> None:
    refused(convert.from_bitsandbytes, quantised(change), fusedopt.AdamW(params(WEIGHTS)), match, **options)


def test_unknown_block_sizes():
    def blocks_of_100(state):
        for key in ("absmax1", "absmax2"):
            state[key] = torch.ones(7)

    match = (
        r"has 7 scales for 660 elements, expected 3 \(blocks of 256\) or 1 \(blocks of 2048\): an unknown block size"
    )
    bnb_refused(blocks_of_100, match)
    converted = convert.from_bitsandbytes(quantised(blocks_of_100), fusedopt.AdamW(params(WEIGHTS)), block_size=100)
    assert converted["state"][0]["exp_avg"].abs().max() <= 1.0
    bnb_refused(blocks_of_100, r"expected 6 \(blocks of 128\)", block_size=128)
    bnb_refused(blocks_of_100, "got block_size=0, expected elements >= 1", block_size=0)


def test_blocks_of_2048_of_older_versions():
    def one_block(state):
        for key in ("absmax1", "absmax2"):
            state[key] = torch.full((1,), 2.0)

    theirs = quantised(one_block)
    state = theirs["state"][0][NESTED]
    got = convert.from_bitsandbytes(theirs, fusedopt.AdamW(params(WEIGHTS)))["state"][0]["exp_avg"]
    assert torch.equal(got, state["qmap1"][state["state1"].long()] * 2.0)


def test_checkpoints_from_before_states_were_nested():
    theirs = loaded("bitsandbytes_adamw8bit")
    opt = fusedopt.AdamW(params(WEIGHTS))
    expected = convert.from_bitsandbytes(theirs, opt)["state"]
    for entry in theirs["state"].values():
        entry.update(entry.pop(NESTED))
    for index, entry in convert.from_bitsandbytes(theirs, opt)["state"].items():
        assert all(torch.equal(entry[key], value) for key, value in expected[index].items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qmap1", torch.linspace(-1, 1, 256).bfloat16()),
        ("qmap1", torch.linspace(-1, 1, 16)),
        ("qmap1", torch.linspace(-2, 1, 256)),
        ("qmap1", torch.linspace(1, -1, 256)),
        ("qmap2", torch.linspace(-1, 1, 256)),
        ("qmap2", torch.full((256,), float("nan"))),
        ("qmap2", "dynamic"),
    ],
)
def test_unknown_quantisation_maps(key, value):
    bnb_refused(
        lambda state: state.update({key: value}), rf"\['{key}'\] is .* expected an ascending .* quantisation map"
    )


def test_incomplete_8bit_states():
    bnb_refused(lambda s: s.pop("qmap2"), r"expected \['qmap2'\] too; an unknown quantisation map")
    bnb_refused(lambda s: s.pop("absmax1"), r"expected 'absmax1': state1 is in 8 bits with one scale for the tensor")
    bnb_refused(lambda s: s.pop("state2"), r"expected \['state2'\] too")
    bnb_refused(lambda s: s.update(state1=s["state1"].t().contiguous().t()), r"has strides \(1, 20\)")


def test_other_algorithms_of_bitsandbytes():
    theirs = loaded("bitsandbytes_adamw32bit")
    theirs["param_groups"][0]["betas"] = (0.9, 0.999, 0.9999)
    refused(convert.from_bitsandbytes, theirs, fusedopt.AdamW(params(SMALL)), "AdEMAMix keeps three")
    theirs = loaded("bitsandbytes_lion8bit")
    theirs["param_groups"][0]["betas"] = (0.9, 0.0)
    refused(convert.from_bitsandbytes, theirs, fusedopt.Lion(params(WEIGHTS)), "those of SGD, RMSprop or Adagrad")


# ---- weight decay ---------------------------------------------------------------------------------------------------


def test_decay_is_decoupled_where_the_peers_is():
    """bitsandbytes' Adam decouples it too; our Adam then does."""
    theirs = loaded("bitsandbytes_adamw32bit")
    opt = fusedopt.Adam(params(SMALL))
    opt.load_state_dict(convert.from_bitsandbytes(theirs, opt))
    assert opt.param_groups[0]["decoupled_weight_decay"] is True
    theirs = loaded("optimi_adamw")
    theirs["param_groups"][0]["decouple_wd"] = False
    refused(convert.from_optimi, theirs, fusedopt.AdamW(params(SMALL)), r"weight_decay=0.1, coupled \(L2\) in that")
    theirs["param_groups"][0]["weight_decay"] = 0.0
    convert.from_optimi(theirs, fusedopt.AdamW(params(SMALL)))
    theirs, opt = loaded("optimi_sgdw"), fusedopt.SGD(params(SMALL), momentum=0.9)
    refused(convert.from_optimi, theirs, opt, "decoupled in that package, expected .* instead of SGD")


@pytest.mark.parametrize("lr", [0.0, None, "fast"])
def test_decay_without_a_learning_rate_to_divide_by(lr):
    theirs = loaded("optimi_lion")
    theirs["param_groups"][0]["max_lr"] = lr
    refused(convert.from_optimi, theirs, fusedopt.Lion(params(SMALL)), r"param_groups\[0\].* max_lr")


def test_decay_of_flashoptim_is_divided_by_the_first_learning_rate():
    theirs = loaded("flashoptim_lion")
    group = theirs["param_groups"][0]
    group["initial_lr"] = 4e-3
    opt = fusedopt.Lion(params(SMALL, BF16), master_weights="fp32")
    converted = convert.from_flashoptim(theirs, opt, decouple_lr=True)["param_groups"][0]
    assert converted["weight_decay"] == group["weight_decay"] / 4e-3
    assert converted.keys() == {"lr", "betas", "weight_decay", "initial_lr", "params"}


# ---- torchao, flashoptim --------------------------------------------------------------------------------------------


def ao_refused(name: str, match: str, **attributes) -> None:
    theirs = loaded(name)
    theirs["state"][0]["exp_avg"].__dict__.update(attributes)
    refused(convert.from_torchao, theirs, fusedopt.AdamW(params(BLOCKS)), match)


def test_unknown_states_of_torchao():
    ao_refused("torchao_adamw8bit", "has 15 scales for 4096 elements.*unknown block size", scale=torch.ones(15))
    ao_refused("torchao_adamw8bit", r"\.qmap is .* expected an ascending float32 tensor of 256", qmap=torch.ones(16))
    ao_refused("torchao_adamw8bit", "codes of dtype int8, expected uint8", codes=torch.zeros(64, 64, dtype=torch.int8))
    ao_refused(
        "torchao_adamwfp8", "codes of dtype uint8, expected float8", codes=torch.zeros(64, 64, dtype=torch.uint8)
    )
    theirs = loaded("torchao_adamw8bit")

    class OptimState2bit(convert.Foreign):
        codes = torch.zeros(64, 64)

    theirs["state"][0]["exp_avg"] = OptimState2bit()
    refused(
        convert.from_torchao, theirs, fusedopt.AdamW(params(BLOCKS)), "of class OptimState2bit, expected OptimState8"
    )


def flash_refused(change, match: str, dtype=BF16) -> None:
    theirs = loaded("flashoptim_adamw")
    change(theirs["state"][0], theirs["param_groups"][0])
    refused(convert.from_flashoptim, theirs, fusedopt.AdamW(params(SMALL, dtype)), match)


def test_unknown_states_of_flashoptim():
    codes, scales = "exp_avg::quantized", "exp_avg::scales"
    flash_refused(lambda s, g: s.pop(scales), "expected 'exp_avg', or 'exp_avg::quantized' and 'exp_avg::scales'")
    flash_refused(
        lambda s, g: s.update({scales: s[scales][:2]}), r"scales of shape \(2,\) for 77 elements, expected \(3,\)"
    )
    flash_refused(lambda s, g: s.update({codes: s[codes].to(BF16)}), "codes of dtype bfloat16, expected int8")
    flash_refused(lambda s, g: s.pop("step"), "expected 'step' too")
    flash_refused(
        lambda s, g: g.update(master_bytewidth=6), "master_bytewidth=6, expected bfloat16 or float16 with 3 or 4"
    )
    flash_refused(lambda s, g: s.update(error_bits=s["error_bits"].t()), r"\['error_bits'\] has shape \(11, 7\)")
    flash_refused(lambda s, g: None, "beside a parameter of dtype float32", torch.float32)


# ---- files ----------------------------------------------------------------------------------------------------------


class Surprise:
    def __reduce__(self):
        return eval, ("1 + 1",)


def test_files_run_nothing(tmp_path):
    torch.save({"state": {}, "hidden": Surprise()}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"load_file: .*file.pt holds an object of \w+.eval, expected tensors"):
        convert.load_file(tmp_path / "file.pt")


def test_files_of_old_torch_are_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"format of torch < 1\.6, expected a zip archive"):
        convert.load_file(tmp_path / "file.pt")


def test_files_of_our_own_and_torchs_are_read(tmp_path):
    opt = fusedopt.AdamW(params(SMALL, BF16), master_weights="split8", state_dtype="int8", min_8bit_size=0)
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    opt.step()
    content = {"optimizer": opt.state_dict(), "params": params(SMALL), "version": torch.__version__}
    torch.save(content, tmp_path / "file.pt")
    read = convert.load_file(tmp_path / "file.pt")
    assert torch.equal(read["params"][0], content["params"][0])
    for key, value in opt.state_dict()["state"][0].items():
        assert read["optimizer"]["state"][0][key].dtype == value.dtype
        assert torch.equal(read["optimizer"]["state"][0][key], value)


def test_foreign_objects_are_attributes_only():
    state = convert.load_file(DATA / "torchao_adamw8bit.pt")["state_dict"]["state"][0]["exp_avg"]
    assert isinstance(state, convert.Foreign)
    assert type(state).__name__ == "OptimState8bit"
    assert {"codes", "scale", "qmap", "signed"} <= state.__dict__.keys()
    with pytest.raises((pickle.PicklingError, AttributeError, ModuleNotFoundError)):
        pickle.dumps(state)


# ---- parameters without states ---------------------------------------------------------------------------------------


def test_optimizers_without_states_read_none():
    """SGD without momentum: apex keeps a buffer of zeros there, optimi nothing."""
    theirs = {"state": {0: {"momentum_buffer": torch.zeros(7, 11)}}, "param_groups": [sgd_group()]}
    opt = fusedopt.SGD(params(SMALL[:1]))
    assert convert.from_apex(theirs, opt)["state"] == {}
    theirs = {"state": {0: {"kahan_comp": None}}, "param_groups": [{**sgd_group(), "kahan_sum": False}]}
    assert convert.from_optimi(theirs, opt)["state"] == {}
    assert convert.from_flashoptim({"state": {0: {}}, "param_groups": [sgd_group()]}, opt)["state"] == {}


def sgd_group() -> dict:
    return {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False, "params": [0]}


def test_groups_of_deepspeed_that_have_not_stepped():
    theirs = loaded("deepspeed_cpuadam")
    for group in theirs["param_groups"]:
        group |= {"step": 0, "bias_correction": True}
    theirs["state"] = {}
    assert convert.from_deepspeed(theirs, fusedopt.AdamW(params(SMALL)))["state"] == {}


def test_maps_that_are_no_numbers():
    def change(state):
        state["qmap1"] = torch.zeros(0)

    bnb_refused(change, r"is a float32 tensor of shape \(0,\), expected an ascending")


def test_files_with_parameters_and_tensors_with_attributes(tmp_path):
    """Which torch saves in ways of their own."""
    param = torch.nn.Parameter(torch.ones(2))
    tensor = torch.zeros(3)
    tensor.note = "kept with the tensor"
    torch.save({"param": param, "tensor": tensor}, tmp_path / "file.pt")
    read = convert.load_file(tmp_path / "file.pt")
    assert torch.equal(read["param"], param) and torch.equal(read["tensor"], tensor)
    assert not hasattr(read["tensor"], "note")  # nobody needs it
