"""Checkpoints that are damaged, cut short, or being written when the process is killed."""

import copy
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from cases import assert_same_bits, memory, normal, train

import fusedopt

FORMATS = {
    "plain": (torch.float32, {}),
    "masters": (torch.bfloat16, {"master_weights": "fp32"}),
    "split16": (torch.bfloat16, {"master_weights": "split16"}),
    "split8-int8": (torch.bfloat16, {"master_weights": "split8", "state_dtype": "int8", "min_8bit_size": 0}),
}


def make(name, device, seed=0):
    dtype, options = FORMATS[name]
    params = [
        torch.nn.Parameter(normal(shape, dtype, device, seed=seed + i)) for i, shape in enumerate([(300,), (4, 5)])
    ]
    return params, fusedopt.AdamW(params, lr=0.1, seed=1, **options)


def trained(name, device, seed=0, steps=2):
    params, opt = make(name, device, seed)
    train(opt, params, steps, first=seed)
    return params, opt


# ---- what does not fit is refused as a whole ----------------------------------------------------------------------


def entry(checkpoint) -> dict:
    """The state of the last parameter: those before it have been looked at by then."""
    return checkpoint["state"][1]


def no_dict(checkpoint):
    return None


def empty(checkpoint):
    return {}


def state_missing(checkpoint):
    del checkpoint["state"]


def groups_missing(checkpoint):
    del checkpoint["param_groups"]


def groups_are_none(checkpoint):
    checkpoint["param_groups"] = None


def group_is_none(checkpoint):
    checkpoint["param_groups"][0] = None


def group_without_params(checkpoint):
    del checkpoint["param_groups"][0]["params"]


def state_is_a_list(checkpoint):
    checkpoint["state"] = [entry(checkpoint)]


def entry_is_none(checkpoint):
    checkpoint["state"][1] = None


def entry_is_a_tensor(checkpoint):
    checkpoint["state"][1] = entry(checkpoint)["exp_avg"]


def step_missing(checkpoint):
    del entry(checkpoint)["step"]


def step_is_text(checkpoint):
    entry(checkpoint)["step"] = "two"


def step_is_none(checkpoint):
    entry(checkpoint)["step"] = None


def step_has_two_elements(checkpoint):
    entry(checkpoint)["step"] = torch.zeros(2)


def moment_missing(checkpoint):
    del entry(checkpoint)["exp_avg"]


def moment_is_none(checkpoint):
    entry(checkpoint)["exp_avg"] = None


def moment_is_a_number(checkpoint):
    entry(checkpoint)["exp_avg"] = 1.0


def moment_of_another_shape(checkpoint):
    entry(checkpoint)["exp_avg"] = entry(checkpoint)["exp_avg"][:2]


def moment_of_integers(checkpoint):
    entry(checkpoint)["exp_avg"] = entry(checkpoint)["exp_avg"].to(torch.int32)


def moments_of_two_dtypes(checkpoint):
    entry(checkpoint)["exp_avg"] = entry(checkpoint)["exp_avg"].double()


def lr_is_text(checkpoint):
    checkpoint["param_groups"][0]["lr"] = "fast"


def betas_are_one_number(checkpoint):
    checkpoint["param_groups"][0]["betas"] = 0.9


def extra_of_another_shape(checkpoint):
    for key in ("master_param", "param_remainder", "exp_avg_scale"):
        if key in entry(checkpoint):
            entry(checkpoint)[key] = entry(checkpoint)[key][:0]
            return
    pytest.skip("this format keeps nothing beside the parameter")


def extra_of_another_dtype(checkpoint):
    for key in ("master_param", "param_remainder"):
        if key in entry(checkpoint):
            entry(checkpoint)[key] = entry(checkpoint)[key].to(torch.int64)
            return
    pytest.skip("this format keeps nothing beside the parameter")


def scale_missing(checkpoint):
    if "exp_avg_scale" not in entry(checkpoint):
        pytest.skip("this format has no scales")
    del entry(checkpoint)["exp_avg_scale"]


SPOILED = [
    no_dict, empty, state_missing, groups_missing, groups_are_none, group_is_none, group_without_params,
    state_is_a_list, entry_is_none, entry_is_a_tensor, step_missing, step_is_text, step_is_none, step_has_two_elements,
    moment_missing, moment_is_none, moment_is_a_number, moment_of_another_shape, moment_of_integers,
    moments_of_two_dtypes, lr_is_text, betas_are_one_number, extra_of_another_shape,
    extra_of_another_dtype, scale_missing,
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("spoil", SPOILED, ids=lambda f: f.__name__)
def test_what_does_not_fit_is_refused(spoil, name, device):
    """ValueError or TypeError, with the optimizer as it was, which goes on as if nothing had been."""
    _, source = trained(name, device, seed=7)
    checkpoint = copy.deepcopy(source.state_dict())
    replaced = spoil(checkpoint)
    params, opt = trained(name, device)
    expected_params, expected = trained(name, device)
    groups = [{**group, "params": None} for group in opt.param_groups]
    with pytest.raises((ValueError, TypeError), match="AdamW"):
        opt.load_state_dict(checkpoint if spoil not in (no_dict, empty) else replaced)
    assert [{**group, "params": None} for group in opt.param_groups] == groups
    train(opt, params, 1, first=2)
    train(expected, expected_params, 1, first=2)
    assert_same_bits(memory(opt), memory(expected))


# ---- files --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The bytes of a checkpoint, and the optimizer's memory when it was saved."""
    _, opt = trained("split8-int8", "cpu", seed=7)
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt"
    torch.save(opt.state_dict(), path)
    return path.read_bytes()


def load(opt, path) -> bool:
    """Whether the file could be read and was accepted."""
    try:
        checkpoint = torch.load(path, weights_only=True)
    except Exception:  # torch's affair: RuntimeError, UnpicklingError, EOFError, OSError …
        return False
    try:
        opt.load_state_dict(checkpoint)
    except (ValueError, TypeError):
        return False
    return True


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_file(share, written, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(written[: int(share * len(written))])
    _, opt = trained("split8-int8", "cpu")
    before = memory(opt)
    assert not load(opt, tmp_path / "checkpoint.pt")
    assert_same_bits(memory(opt), before)


def test_damaged_file(written, tmp_path):
    """A byte in 60 places: it is refused and nothing has changed, or all of it is loaded."""
    refused = 0
    path = tmp_path / "checkpoint.pt"
    for k in range(60):
        damaged = bytearray(written)
        damaged[k * len(written) // 60] ^= 0x55
        path.write_bytes(damaged)
        params, opt = trained("split8-int8", "cpu")
        before = memory(opt)
        if load(opt, path):
            train(opt, params, 1)
            assert {int(state["step"]) for state in opt.state.values()} == {3}
        else:
            refused += 1
            assert_same_bits(memory(opt), before)
    assert refused


WRITER = """
import os, sys, torch, fusedopt
torch.set_num_threads(1)
params = [torch.nn.Parameter(torch.ones(200_000, dtype=torch.bfloat16))]
opt = fusedopt.AdamW(params, lr=0.1, master_weights="split8", state_dtype="int8", seed=1)
while True:
    params[0].grad = torch.ones_like(params[0])
    opt.step()
    torch.save({"model": params, "optimizer": opt.state_dict()}, sys.argv[1] + ".new")
    os.replace(sys.argv[1] + ".new", sys.argv[1])
    print("saved", flush=True)
"""


def test_killed_while_writing(tmp_path):
    """SIGKILL at three moments. A file that is renamed when it is complete is always the last complete one; the one
    that was being written is refused, or complete too."""
    path = tmp_path / "checkpoint.pt"
    for k in range(3):
        command = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "saved\n"
            time.sleep(0.006 * k)
            process.send_signal(signal.SIGKILL)
            process.wait(60)
        for file in (path, tmp_path / "checkpoint.pt.new"):
            if not file.exists():
                continue
            params = [torch.nn.Parameter(torch.ones(200_000, dtype=torch.bfloat16))]
            opt = fusedopt.AdamW(params, lr=0.1, master_weights="split8", state_dtype="int8", seed=1)
            try:
                saved = torch.load(file, weights_only=True)
            except Exception:
                assert file != path
                continue
            with torch.no_grad():
                params[0].copy_(saved["model"][0])
            opt.load_state_dict(saved["optimizer"])
            steps = int(opt.state[params[0]]["step"])
            params[0].grad = torch.ones_like(params[0])
            opt.step()
            assert int(opt.state[params[0]]["step"]) == steps + 1 and params[0].isfinite().all()
            file.unlink() if file != path else None
    assert os.path.getsize(path) > 0
