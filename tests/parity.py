"""The same program beside torch.optim: what must agree, and how closely."""

import torch
from cases import parts


def numbers(opt):
    """(what, tensor) of every parameter and state, in order."""
    for group in opt.param_groups:
        for i, p in enumerate(group["params"]):
            yield f"param {i}", p.detach()
            yield from ((f"{name} of param {i}", value) for name, value in sorted(opt.state.get(p, {}).items()))


def assert_same_numbers(ours, theirs, steps=12):
    """To within 16 roundings per step at the magnitude of the largest element.

    Per step and element each side rounds twice at |param| (decay, subtraction), about eight times at the update, which
    is smaller, and each moment at most four times at its own magnitude; the next steps never amplify what was made.
    """
    ours, theirs = list(numbers(ours)), list(numbers(theirs))
    known = {what for what, _ in theirs}
    ours = [(what, value) for what, value in ours if what in known or not what.startswith("step of")]  # SGD
    assert [what for what, _ in ours] == [what for what, _ in theirs]
    for (what, a), (_, b) in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), what
        a, b = parts(a), parts(b)
        unit = torch.finfo(a.dtype).eps / 2
        scale = max(1e-30, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(
            a.cpu(), b.cpu(), rtol=0, atol=16 * steps * unit * scale, msg=lambda m, what=what: f"{what}: {m}"
        )


def torch_adagrad_takes_new_groups() -> bool:
    """In torch 2.11 a parameter that is added later has no state, so a step raises KeyError; in 2.13 it has."""
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    opt = torch.optim.Adagrad(params[:1])
    opt.add_param_group({"params": params[1:]})
    for p in params:
        p.grad = torch.ones(1)
    try:
        opt.step()
    except KeyError:
        return False
    return True
