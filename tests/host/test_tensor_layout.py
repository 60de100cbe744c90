"""Reading torch's objects in place: it works on the versions that are supported, and no change goes unnoticed."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import assert_same_bits, normal, parameter, parts, set_gradients

import fusedopt
from fusedopt import _C

SHAPE = (3, 5, 7)


def test_the_layout_is_known():
    """Where this fails torch has moved something: steps still work, by asking torch, and take longer."""
    assert _C.has_torch_functions() and _C.has_tensor_layout()


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library by its Linux name")
def test_the_layout_is_known_whatever_was_in_memory():
    """Tensors that are alike differ in bits that nobody sets."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    for function, kinds in (("malloc", "n"), ("memset", "pin"), ("free", "p")):
        types = {"n": ctypes.c_size_t, "p": ctypes.c_void_p, "i": ctypes.c_int}
        getattr(libc, function).argtypes = [types[kind] for kind in kinds]
    for alike in 3 * [1, 2, 3, 4, 5]:  # blocks of a size in a row
        blocks = [(libc.malloc(size), size, 255 * (i // alike % 2)) for i in range(99) for size in range(176, 257, 16)]
        for block, size, byte in blocks:
            libc.memset(block, byte, size)
        for block, _, _ in blocks:
            libc.free(block)
        assert _C.finds_tensor_layout()


def run(change, device):
    """Five steps; before the fourth, `change` does something to parameter, gradient or state behind our back."""
    params = [parameter(normal(SHAPE, device=device, seed=i)) for i in range(3)]
    opt = fusedopt.AdamW(params, lr=0.1)
    for step in range(5):
        set_gradients(params, seed=step)
        if step >= 3:
            change(params[1], opt)
        opt.step()
    return values(opt)


def values(opt):
    """Of parameters and states."""
    params = opt.param_groups[0]["params"]
    return [t.detach().clone() for p in params for t in (p, *opt.state[p].values())]


GRADIENTS = {
    "view": lambda g: torch.stack([g, g])[1],
    "expanded": lambda g: g[:1, :1, :1].clone().expand(g.shape),
    "transposed": lambda g: g.transpose(0, 2).contiguous().transpose(0, 2),
    "gapped": lambda g: torch.stack([g, g], -1)[..., 0],
    "misaligned": lambda g: torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape),
    "copy_on_write": lambda g: torch._lazy_clone(g),
    "negated": lambda g: torch._neg_view(-g),
}


@pytest.mark.parametrize("layout", GRADIENTS)
def test_gradients_of_another_kind(layout, device):
    """Values count, however they are laid out."""
    if layout == "negated" and not _C.has_tensor_layout():
        pytest.skip("torch's C functions do not tell")

    def change(p, _):
        p.grad = GRADIENTS[layout](p.grad)

    def materialise(p, _):
        p.grad = GRADIENTS[layout](p.grad).resolve_neg().clone(memory_format=torch.contiguous_format)

    assert_same_bits(run(change, device), run(materialise, device))


def test_a_gradient_turns_into_its_conjugate(device):
    """The same address, shape and strides. Told or not, values count."""
    param = parameter(normal(SHAPE, torch.complex64, device))
    real = parameter(parts(param).clone())
    opt, expected = (fusedopt.AdamW([p], lr=0.1) for p in (param, real))
    grad = normal(SHAPE, torch.complex64, device, seed=1)
    kept = grad.clone()
    for step in range(6):
        param.grad = (grad, grad.conj(), torch._neg_view(grad))[step % 3]
        real.grad = parts(param.grad).clone()
        opt.step()
        expected.step()
    assert_same_bits([parts(param), grad], [real.detach(), kept])


def test_a_parameter_of_which_memory_holds_the_negatives(device):
    value = normal(SHAPE, device=device)
    lazy, plain = parameter(torch._neg_view(-value)), parameter(value)
    opt, expected = (fusedopt.AdamW([p], lr=0.1) for p in (lazy, plain))
    for step in range(3):
        for p, each in ((lazy, opt), (plain, expected)):
            set_gradients([p], seed=step)
            each.step()
    assert lazy.is_neg()
    assert_same_bits(parts(lazy), plain.detach())


def test_gradient_whose_storage_was_swapped(device):
    def change(p, _):
        values = p.grad.clone()
        p.grad.data = torch.zeros_like(values)
        p.grad.set_(values)

    assert_same_bits(run(change, device), run(lambda *_: None, device))


CHANGES = {
    "swapped": lambda t: setattr(t, "data", t.data.clone()),
    "moved_twice": lambda t: [setattr(t, "data", t.data.clone()) for _ in range(2)],
    "another_offset": lambda t: setattr(t, "data", torch.stack([t.data, t.data])[1]),
    "set": lambda t: t.set_(t.detach().clone()),
    "swapped_tensors": lambda t: torch.utils.swap_tensors(t, type(t)(t.detach().clone())),
}


@pytest.mark.parametrize("of", ["param", "state"])
@pytest.mark.parametrize("how", CHANGES)
def test_memory_that_moved(how, of, device):
    if how == "swapped_tensors" and not _C.has_tensor_layout():
        pytest.skip("torch's C functions do not tell")

    def change(p, opt):
        p.grad, grad = None, p.grad  # swap_tensors would take it along
        with torch.no_grad():
            CHANGES[how](p if of == "param" else opt.state[p]["exp_avg"])
        p.grad = grad

    assert_same_bits(run(change, device), run(lambda *_: None, device))


@pytest.mark.parametrize("of", ["param", "state"])
def test_lazy_clones_keep_their_values(of, device):
    """Memory that is shared until it is written must not be written in place; its address stays the same."""
    params = [parameter(normal(SHAPE, device=device, seed=i)) for i in range(2)]
    opt = fusedopt.AdamW(params, lr=0.1)
    for step in range(3):
        set_gradients(params, seed=step)
        opt.step()
    kept = params[0].detach() if of == "param" else opt.state[params[0]]["exp_avg"]
    clone, expected = torch._lazy_clone(kept), kept.clone()
    set_gradients(params, seed=9)
    opt.step()
    assert_same_bits(clone, expected)
    assert not torch.equal(kept, expected)


def test_gradients_of_one_permutation_and_then_of_another(device):
    """Neither is contiguous, so that torch's own marks do not tell them apart; only the strides do."""
    values = [normal((6, 6, 6), device=device, seed=i) for i in range(5)]
    p, twin = parameter(values[4].permute(2, 0, 1)), parameter(values[4].permute(2, 0, 1).contiguous())
    opt, expected = fusedopt.AdamW([p], lr=0.1), fusedopt.AdamW([twin], lr=0.1)
    for step, value in enumerate(values[:4]):
        alike, other = torch.empty_like(p).copy_(value), value.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert alike.stride() == p.stride() != other.stride()
        p.grad, twin.grad = (other if step == 3 else alike), value
        opt.step()
        expected.step()
    assert_same_bits(p.detach().contiguous(), twin.detach())


def test_many_dimensions(device):
    """Torch keeps more than five elsewhere."""
    params = [parameter(normal((1, 2, 3, 1, 2, 3, 2), device=device, seed=i)) for i in range(2)]
    flat = [parameter(p.detach().clone().flatten()) for p in params]
    opt, expected = fusedopt.AdamW(params, lr=0.1), fusedopt.AdamW(flat, lr=0.1)
    for step in range(4):
        set_gradients(params, seed=step)
        for p, q in zip(params, flat, strict=True):
            q.grad = p.grad.flatten()
        opt.step()
        expected.step()
    assert_same_bits([p.detach().flatten() for p in params], [q.detach() for q in flat])


@pytest.mark.parametrize("variable", ["FUSEDOPT_NO_TENSOR_LAYOUT", "FUSEDOPT_NO_TORCH_FUNCTIONS"])
def test_without_it(variable):
    """The same tests where torch is asked."""
    tests = Path(__file__)
    environment = {**os.environ, variable: "1", "PYTHONPATH": str(Path(fusedopt.__file__).parents[1])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", str(tests)]
    chosen = ["-k", "not test_without_it and not layout_is_known and cpu"]
    done = subprocess.run([*command, *chosen], capture_output=True, text=True, env=environment, cwd=tests.parents[2])
    assert done.returncode == 0, done.stdout[-3000:]


def test_first_steps_in_several_threads():
    """What is found out once is found out while Python switches threads: nobody may wait for it with Python's lock."""
    program = (
        "import threading, torch, fusedopt\n"
        "def train():\n"
        "    params = [torch.nn.Parameter(torch.ones(7)) for _ in range(400)]\n"
        "    opt = fusedopt.AdamW(params)\n"
        "    for _ in range(3):\n"
        "        for p in params: p.grad = torch.ones(7)\n"
        "        opt.step()\n"
        "threads = [threading.Thread(target=train) for _ in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(fusedopt.__file__).parents[1])}
    for _ in range(3):
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=100)
