"""Checkpoints of formats: exact continuation, conversion at loading, export to torch, refusals, copies."""

import copy
import io
import pickle
import re

import pytest
import torch
from bounds import assert_stepped as assert_torch_stepped
from bounds import before_step as before_torch_step
from cases import BY_NAME, assert_same_bits, bits, memory, normal, parameter, parameters, train
from format_cases import (
    BFLOAT16,
    BLOCK,
    COMBINATIONS,
    FEW,
    FLOAT16,
    FLOAT32,
    Combination,
    assert_stepped,
    before_step,
    code_step,
    make_params,
)

import fusedopt
from fusedopt import formats, specs

CASES = [BY_NAME["adamw-decay"], BY_NAME["lion-decay"]]
SIZES = [5, 0, 4097, 257]
ADAMW = specs.RULES["adamw"]


def through_file(value):
    """As training jobs save and load it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def optimizer(case, combination, params, **options):
    return case.make(params, **combination.options, min_8bit_size=256, **options)


def copied(params):
    return [parameter(p.detach().clone()) for p in params]


# ---- the same formats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_resume_continues_bit_for_bit(case, combination, device):
    """Three steps, a file, a new process in effect (other seed, other initial weights), three more steps.

    The model's weights are loaded after the optimizer's state, as some trainers do.
    """
    undisturbed = make_params(combination, SIZES, device)
    expected = optimizer(case, combination, undisturbed, seed=1)
    train(expected, undisturbed, 3)
    saved = through_file({"model": [p.detach() for p in undisturbed], "optimizer": expected.state_dict()})
    train(expected, undisturbed, 3, first=3)

    params = make_params(combination, SIZES, device, seed=5)
    opt = optimizer(case, combination, params, seed=2, lr=0.5)
    opt.load_state_dict(saved["optimizer"])
    with torch.no_grad():
        for p, weights in zip(params, saved["model"]):
            p.copy_(weights)
    train(opt, params, 3, first=3)
    assert_same_bits(memory(opt), memory(expected))


@pytest.mark.parametrize("combination", FEW, ids=str)
def test_checkpoint_keeps_every_dtype_and_layout(combination, device):
    """What torch's load_state_dict would cast to the parameter's dtype; parameters that are no rows included."""
    params = [
        parameter(normal((37, 58), combination.dtype, device).t()),
        parameter(normal((37, 58), combination.dtype, device)[:, ::2]),
        parameter(normal((3, 5, 7, 11), combination.dtype, device).contiguous(memory_format=torch.channels_last)),
    ]
    opt = optimizer(CASES[0], combination, params, seed=1)
    train(opt, params, 2)
    twins = [parameter(p.detach()) for p in copy.deepcopy(params)]
    resumed = optimizer(CASES[0], combination, twins, seed=1)
    resumed.load_state_dict(through_file(opt.state_dict()))
    for p, twin in zip(params, twins):
        ours, theirs = opt.state[p], resumed.state[twin]
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same_bits(theirs[key], ours[key])
            assert theirs[key].stride() == ours[key].stride()
    for each, ps in ((opt, params), (resumed, twins)):
        train(each, ps, 2, first=2)
    assert_same_bits([p.detach() for p in twins], [p.detach() for p in params])


@pytest.mark.parametrize("combination", FEW, ids=str)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "replaced entries", "moved", "loaded in place"])
def test_disturbances_change_nothing(how, combination, device):
    """What other people's code does between two steps."""
    params, undisturbed = (make_params(combination, SIZES, device) for _ in range(2))
    opt, expected = (optimizer(CASES[0], combination, ps, seed=1) for ps in (params, undisturbed))
    train(opt, params, 3)
    train(expected, undisturbed, 6)
    if how == "deepcopy":
        opt, params = copy.deepcopy((opt, params))
    elif how == "pickle":
        opt, params = pickle.loads(pickle.dumps((opt, params)))
    elif how == "replaced entries":
        for state in opt.state.values():
            state.update({key: value.clone() for key, value in state.items()})
    elif how == "moved":
        for state in opt.state.values():
            for value in state.values():
                value.data = value.data.to(device, copy=True)
    else:
        opt.load_state_dict(opt.state_dict())
    options = {key: opt.param_groups[0].get(key) for key in (*combination.options, "min_8bit_size")}
    assert options == {**combination.options, "min_8bit_size": 256}
    train(opt, params, 3, first=3)
    assert_same_bits(memory(opt), memory(expected))


# ---- states of another format --------------------------------------------------------------------------------------


def trained_by_torch(device, steps=3):
    params = parameters(SIZES, device=device)
    opt = torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)
    train(opt, params, steps)
    return opt, params


def assert_nearest_code(entry, plain, device):
    """Each code is the nearest, within half a step, or 1 where that is 0 and the second moment is not: a whole one."""
    for (key, value), moment in zip(formats.decode_states(entry, ADAMW).items(), ADAMW.moments):
        got, exact = value.double(), plain[key].double()
        if moment == "second":
            got, exact = got.sqrt(), exact.sqrt()
        unit = entry[f"{key}_scale"].double().repeat_interleave(BLOCK)[: got.numel()]
        # Encoding and decoding round a few times, each by at most 2^-24 of 2 + y units.
        y = exact.abs() / unit
        slack = (2 + y) * 16 * 2.0**-24
        half = torch.where((exact > 0) & (y < code_step(y, moment) / 2) & (moment == "second"), 1.0, 0.5)
        # At the upper end of an octave the next code is the first of the next one, as far away as the ones before.
        bound = unit * (half * code_step(y + slack, moment) + slack)
        assert ((got - exact).abs() <= bound).all(), key


def test_torchs_fp32_states_become_int8(device):
    """Rounded to nearest at loading; small tensors stay fp32; hyper-parameters of the checkpoint, own formats."""
    source, theirs = trained_by_torch(device)
    params = copied(theirs)
    opt = fusedopt.AdamW(params, state_dtype="int8", min_8bit_size=257)
    opt.load_state_dict(through_file(source.state_dict()))
    assert opt.param_groups[0]["lr"] == 0.01 and opt.param_groups[0]["state_dtype"] == "int8"
    for n, p, q in zip(SIZES, params, theirs):
        entry, plain = opt.state[p], source.state[q]
        assert float(entry["step"]) == 3
        if n < 257:
            assert_same_bits([entry["exp_avg"], entry["exp_avg_sq"]], [plain["exp_avg"], plain["exp_avg_sq"]])
        else:
            assert (entry["exp_avg"].dtype, entry["exp_avg_sq"].dtype) == (torch.int8, torch.uint8)
            assert (entry["exp_avg_sq"] > 0).all()
            assert_nearest_code(entry, plain, device)
    for step in (3, 4):
        for i, p in enumerate(params):
            p.grad = normal(p.shape, device=device, seed=10 * step + i)
        before = before_step(opt, "adamw")
        opt.step()
        assert_stepped(opt, "adamw", before)


@pytest.mark.parametrize("wanted", [None, "fp32", "bf16"])
def test_int8_states_become_plain(wanted, device):
    """None takes the parameter's dtype, as nothing says otherwise; fp32 holds a decoded state exactly."""
    params = parameters(SIZES, FLOAT32, device)
    source = fusedopt.AdamW(params, state_dtype="int8", min_8bit_size=1)
    train(source, params, 3)
    twins = copied(params)
    opt = fusedopt.AdamW(twins, state_dtype=wanted)
    opt.load_state_dict(through_file(source.state_dict()))
    dtype = BFLOAT16 if wanted == "bf16" else FLOAT32
    for p, q in zip(params, twins):
        assert opt.state[q].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in formats.decode_states(source.state[p], ADAMW).items():
            assert_same_bits(opt.state[q][key], value.to(dtype))
    train(opt, twins, 1, first=3)


@pytest.mark.parametrize("saved, wanted", [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", None), ("fp32", None)])
def test_plain_states_are_rounded_once_or_kept(saved, wanted, device):
    """Where the optimizer leaves it open, plain states keep the dtype that they were saved in."""
    params = parameters(SIZES, BFLOAT16, device)
    source = fusedopt.AdamW(params, state_dtype=saved)
    train(source, params, 3)
    twins = copied(params)
    opt = fusedopt.AdamW(twins, state_dtype=wanted)
    opt.load_state_dict(through_file(source.state_dict()))
    dtype = {"bf16": BFLOAT16, "fp32": FLOAT32}[wanted or saved]
    for p, q in zip(params, twins):
        for key in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(opt.state[q][key], source.state[p][key].to(dtype))
    train(opt, twins, 1, first=3)
    assert {opt.state[q]["exp_avg"].dtype for q in twins} == {dtype}


# ---- masters of another format -------------------------------------------------------------------------------------

MASTERS = [None, "fp32", "split16", "split8"]


def kept(value, master_weights):
    """What a format keeps of a float32 value: all of it, or its upper 24 bits, rounded with ties away from zero."""
    if master_weights == "split8":
        return ((value.view(torch.int32) + 0x80) & ~0xFF).view(FLOAT32)
    return value


def test_what_split8_keeps():
    """The rule of `kept` itself: 1 + 2^-16 is a tie, between the neighbours 1 and 1 + 2^-15."""
    value = torch.tensor([1 + 2.0**-16, -1 - 2.0**-16, 1 + 2.0**-17, 1.0, -0.0, float("inf")])
    expected = torch.tensor([1 + 2.0**-15, -1 - 2.0**-15, 1.0, 1.0, -0.0, float("inf")])
    assert_same_bits(kept(value, "split8"), expected)


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("wanted", MASTERS)
@pytest.mark.parametrize("saved", MASTERS)
def test_masters_are_converted_by_the_next_step(saved, wanted, order, device):
    """Which here moves nothing: all digits that the new format has, and a master starts from the model's weights."""
    case = CASES[0]
    params = parameters(SIZES, BFLOAT16, device)
    source = case.make(params, master_weights=saved, state_dtype="fp32")
    train(source, params, 3)
    values = source.master_params()
    checkpoint = through_file({"model": [p.detach() for p in params], "optimizer": source.state_dict()})

    twins = parameters(SIZES, BFLOAT16, device, seed=3)
    opt = case.make(twins, master_weights=wanted, state_dtype="fp32")

    @torch.no_grad()
    def load_model():
        for p, weights in zip(twins, checkpoint["model"]):
            p.copy_(weights)

    if order == "model first":
        load_model()
        opt.load_state_dict(checkpoint["optimizer"])
    else:
        opt.load_state_dict(checkpoint["optimizer"])
        load_model()
    opt.param_groups[0]["lr"] = 0.0
    train(opt, twins, 1)
    extra = {None: set(), "fp32": {"master_param"}}.get(wanted, {"param_remainder"})
    assert {key for p in twins for key in opt.state[p]} == {"step", "exp_avg", "exp_avg_sq"} | extra
    if wanted is None:
        assert_same_bits([p.detach() for p in twins], [p.detach() for p in params])
    else:
        assert_same_bits(opt.master_params(), [kept(value, wanted) for value in values])
        for p, value in zip(twins, opt.master_params()):
            if wanted == "fp32":
                assert_same_bits(p.detach(), value.to(BFLOAT16))
            # Half an ulp of bfloat16; which of two neighbours takes a tie is up to the format.
            assert ((p.double() - value.double()).abs() <= value.double().abs() * 2.0**-8).all()


@pytest.mark.parametrize("saved, wanted", [("fp32", "split16"), ("split16", "fp32")])
def test_training_goes_on_exactly_after_conversion(saved, wanted, device):
    """Both hold a float32, so the run is the one that was not converted."""
    case, params, twins = CASES[0], *(parameters(SIZES, BFLOAT16, device) for _ in range(2))
    source, opt = case.make(params, master_weights=saved), case.make(twins, master_weights=wanted)
    train(source, params, 3)
    opt.load_state_dict(through_file(source.state_dict()))
    with torch.no_grad():
        for p, twin in zip(params, twins):
            twin.copy_(p)
    for each, ps in ((source, params), (opt, twins)):
        train(each, ps, 3, first=3)
    assert_same_bits(opt.master_params(), source.master_params())


def test_remainders_of_bfloat16_do_not_fit_float16(device):
    """A remainder says nothing beside anything but the bfloat16 half that it was split from."""
    params = parameters([5, 300], BFLOAT16, device)
    source = fusedopt.AdamW(params, master_weights="split16")
    train(source, params, 2)
    halves = [parameter(p.detach().to(FLOAT16)) for p in params]
    opt = fusedopt.AdamW(halves, master_weights="fp32")
    with pytest.raises(ValueError) as error:
        opt.load_state_dict(through_file(source.state_dict()))
    assert "param_remainder" in str(error.value)


# ---- to torch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", FEW, ids=str)
def test_torch_goes_on_from_the_exported_state(combination, device):
    """torch.optim.AdamW beside fp32 weights: exactly the state that we had, and its next steps are right."""
    case = CASES[0]
    params = make_params(combination, SIZES, device)
    opt = optimizer(case, combination, params)
    train(opt, params, 3)
    before = copy.deepcopy(opt.state_dict())
    exported = through_file(opt.torch_state_dict())
    assert exported["param_groups"][0].keys() == torch.optim.AdamW(parameters([1])).param_groups[0].keys()

    peers = [parameter(value) for value in opt.master_params()]
    peer = torch.optim.AdamW(peers)
    peer.load_state_dict(exported)
    for p, q in zip(params, peers):
        assert peer.state[q].keys() == {"step", "exp_avg", "exp_avg_sq"}
        decoded = formats.decode_states(opt.state[p], ADAMW)
        assert_same_bits([peer.state[q][key] for key in decoded], [value.float() for value in decoded.values()])
    for step in (3, 4):
        for i, p in enumerate(peers):
            p.grad = normal(p.shape, device=device, seed=10 * step + i)
        records = before_torch_step(peer, "adamw")
        peer.step()
        assert_torch_stepped(peer, "adamw", records)
    after = opt.state_dict()
    for index, entry in before["state"].items():
        for key, value in entry.items():
            assert_same_bits(after["state"][index][key], value)


def test_export_before_the_first_step(device):
    params = parameters([5], BFLOAT16, device)
    opt = fusedopt.AdamW(params, master_weights="split8", state_dtype="int8")
    torch.optim.AdamW(parameters([5], device=device)).load_state_dict(opt.torch_state_dict())
    assert_same_bits(opt.master_params(), [p.detach().float() for p in params])


# ---- refusals ------------------------------------------------------------------------------------------------------


def replace(key, make):
    def spoil(state):
        state[key] = make(state[key])

    return spoil


BAD_STATES = {
    "block size 128": (replace("exp_avg_scale", lambda t: t.repeat_interleave(2)), ["exp_avg_scale", "256", "shape"]),
    "scales of another tensor": (replace("exp_avg_sq_scale", lambda t: t[:-1]), ["exp_avg_sq_scale", "shape"]),
    "scales in float64": (replace("exp_avg_scale", torch.Tensor.double), ["exp_avg_scale", "float64", "float32"]),
    "no scales": (lambda state: state.pop("exp_avg_scale"), ["exp_avg_scale"]),
    "other shape": (replace("exp_avg", lambda t: t[:-1]), ["exp_avg", "4096", "4097"]),
    "signed second moment": (replace("exp_avg_sq", lambda t: t.view(torch.int8)), ["exp_avg_sq", "int8", "uint8"]),
    "unsigned first moment": (replace("exp_avg", lambda t: t.view(torch.uint8)), ["exp_avg", "uint8", "int8"]),
    "codes cast to float32 beside uint8": (replace("exp_avg", torch.Tensor.float), ["float32", "uint8", "one format"]),
    "int32 moment": (replace("exp_avg", torch.Tensor.int), ["exp_avg", "int32"]),
    "remainder in bfloat16": (
        replace("param_remainder", torch.Tensor.bfloat16),
        ["param_remainder", "bfloat16", "int8"],
    ),
    "remainder of another shape": (replace("param_remainder", lambda t: t[1:]), ["param_remainder", "shape"]),
    "moment missing": (lambda state: state.pop("exp_avg_sq"), ["exp_avg_sq"]),
    "moment is a list": (replace("exp_avg", torch.Tensor.tolist), ["exp_avg", "list", "tensor"]),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_checkpoint_is_refused_and_nothing_changed(name, device):
    params = parameters([5, 4097], BFLOAT16, device)
    opt = fusedopt.AdamW(params, lr=0.01, master_weights="split8", state_dtype="int8")
    train(opt, params, 2)
    checkpoint = copy.deepcopy(opt.state_dict())
    checkpoint["param_groups"][0]["lr"] = 0.5
    for state in checkpoint["state"].values():
        state["exp_avg"].zero_()
    spoil, patterns = BAD_STATES[name]
    spoil(checkpoint["state"][1])
    before = memory(opt)
    with pytest.raises(ValueError) as error:
        opt.load_state_dict(checkpoint)
    for pattern in patterns:
        assert re.search(pattern, str(error.value)), f"{pattern!r} is not in: {error.value}"
    assert_same_bits(memory(opt), before)
    assert opt.param_groups[0]["lr"] == 0.01
    train(opt, params, 1, first=2)


def test_master_of_a_wrong_dtype_is_refused(device):
    params = parameters([5, 4097], BFLOAT16, device)
    opt = fusedopt.AdamW(params, master_weights="fp32")
    train(opt, params, 2)
    checkpoint, before = copy.deepcopy(opt.state_dict()), memory(opt)
    checkpoint["state"][0]["master_param"] = checkpoint["state"][0]["master_param"].bfloat16()
    with pytest.raises(ValueError, match=r"master_param.*bfloat16.*float32"):
        opt.load_state_dict(checkpoint)
    assert_same_bits(memory(opt), before)


@pytest.mark.parametrize("name", ["block size 128", "no scales", "signed second moment", "remainder of another shape"])
def test_bad_state_made_by_hand_is_refused_by_the_step(name, device):
    params = parameters([5, 4097], BFLOAT16, device)
    opt = fusedopt.AdamW(params, master_weights="split8", state_dtype="int8")
    train(opt, params, 2)
    BAD_STATES[name][0](opt.state[params[1]])
    before = memory(opt)
    with pytest.raises(ValueError):
        train(opt, params, 1, first=2)
    assert_same_bits(memory(opt), before)


def test_the_checkpoints_formats_do_not_win(device):
    """Options belong to the optimizer that loads; the seed to the run that goes on."""
    params = parameters([5, 4097], BFLOAT16, device)
    source = fusedopt.AdamW(params, master_weights="split8", state_dtype="int8", min_8bit_size=1, seed=4)
    train(source, params, 2)
    twins = copied(params)
    opt = fusedopt.AdamW(twins, stochastic_rounding=True, state_dtype="bf16", seed=9)
    opt.load_state_dict(through_file(source.state_dict()))
    group = opt.param_groups[0]
    assert (group["stochastic_rounding"], group["state_dtype"], group["seed"]) == (True, "bf16", 4)
    assert group.get("master_weights") is None and group.get("min_8bit_size", 4096) == 4096
    train(opt, twins, 2, first=2)
    assert {value.dtype for p in twins for value in opt.state[p].values()} == {FLOAT32, BFLOAT16}
    assert {key for p in twins for key in opt.state[p]} == {"step", "exp_avg", "exp_avg_sq"}


def test_size_of_a_checkpoint_is_in_the_summary(device):
    combination = Combination(BFLOAT16, "split8", "int8")
    params = make_params(combination, SIZES, device)
    opt = optimizer(CASES[0], combination, params)
    train(opt, params, 1)
    state = opt.state_dict()["state"]
    saved = sum(value.numel() * value.element_size() for entry in state.values() for value in entry.values())
    assert opt.memory_summary().checkpoint == saved
    assert bits(opt.state[params[2]]["exp_avg"]).numel() == 4097


# ---- element by element, as the states of DTensors are saved ------------------------------------------------------


def by_elements(opt):
    saved = copy.deepcopy(opt.state_dict())
    for entry in saved["state"].values():
        formats.to_elements(entry, ADAMW)
    return saved


@pytest.mark.parametrize("master", ["split16", "split8", "fp32"])
def test_states_by_element(master, device):
    """The same bits where blocks are the same, in another memory order too; NaN stays in its block."""
    options = {"master_weights": master, "state_dtype": "int8", "min_8bit_size": 0, "seed": 1}
    values = [
        normal((30, 41), device=device, dtype=torch.bfloat16).t(),
        normal((0,), device=device, dtype=torch.bfloat16),
    ]
    params, twins = ([parameter(value.clone()) for value in values] for _ in range(2))
    opt, twin = (fusedopt.AdamW(each, lr=0.1, **options) for each in (params, twins))
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = normal(p.shape, device=device, dtype=torch.bfloat16, seed=step + i)
        params[0].grad[3, 4] = float("nan") if step else 0.0
        opt.step()
    saved = through_file(by_elements(opt))
    assert saved["state"][0]["exp_avg.code"].shape == saved["state"][0]["exp_avg.exponent"].shape == params[0].shape
    twin.load_state_dict(saved)
    for p, q in zip(params, twins):
        assert_same_bits([*opt.state[p].values()], [twin.state[q][key] for key in opt.state[p]])


def test_blocks_that_are_put_together_anew(device):
    """One rounding more, and 0 only where there was 0."""
    value = normal((1000,), device=device) * 2.0 ** (torch.arange(1000, device=device) // 100).float()
    param = parameter(torch.zeros_like(value))
    opt = fusedopt.AdamW([param], state_dtype="int8", min_8bit_size=0)
    param.grad = value
    opt.step()
    cut = slice(130, 900)
    saved = by_elements(opt)
    state = {key: each[cut] if each.dim() else each for key, each in saved["state"][0].items()}
    part = parameter(torch.zeros_like(value[cut]))
    resumed = fusedopt.AdamW([part], state_dtype="int8", min_8bit_size=0)
    resumed.load_state_dict({**saved, "state": {0: state}})
    whole, now = (formats.decode_states(each.state[p], ADAMW) for each, p in ((opt, param), (resumed, part)))
    assert not torch.equal(now["exp_avg"], whole["exp_avg"][cut])
    for key, bits_ in (("exp_avg", 3), ("exp_avg_sq", 4)):
        got, want = (each.double() if bits_ == 3 else each.double().sqrt() for each in (now[key], whole[key][cut]))
        unit = torch.cat([block.abs().max().expand(len(block)) for block in want.split(BLOCK)]) * 2.0**-15
        assert ((got - want).abs() <= (want.abs() + (2 if bits_ == 3 else 4) * unit) * 2.0 ** -(bits_ + 1)).all()
    assert ((now["exp_avg_sq"] > 0) == (whole["exp_avg_sq"][cut] > 0)).all()


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("exp_avg.exponent", lambda t: None, r"\['exp_avg'\]\['exponent'\] is a NoneType, expected a tensor"),
        ("exp_avg_sq.code", lambda t: t.float(), r"\['code'\] has dtype float32, expected uint8"),
        ("exp_avg.code", lambda t: t[:3], r"\['code'\] has shape \(3,\), expected \(5,\)"),
        ("param_remainder.bits16", lambda t: t.view(torch.int16), r"\['bits16'\] has dtype int16, expected bfloat16"),
    ],
)
def test_elements_that_do_not_fit(key, change, message, device):
    options = {"state_dtype": "int8", "min_8bit_size": 0, "master_weights": "split16"}
    params = [parameter(normal((5,), device=device, dtype=torch.bfloat16))]
    opt = fusedopt.AdamW(params, **options)
    params[0].grad = torch.ones_like(params[0])
    opt.step()
    before, saved = copy.deepcopy(opt.state_dict()), by_elements(opt)
    saved["state"][0][key] = change(saved["state"][0][key])
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert_same_bits(
        [value for entry in opt.state_dict()["state"].values() for value in entry.values()],
        [value for entry in before["state"].values() for value in entry.values()],
    )
