"""16-bit elements are decoded exactly, and encoded as torch rounds: to nearest, ties to even, NaN to one NaN."""

import pytest
import torch
from cases import assert_same_bits, generator, parameter

import fusedopt

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def patterns(dtype) -> torch.Tensor:
    """All numbers of a dtype of 16 bits."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def words_around_ties() -> torch.Tensor:
    """float32 of every sign, exponent and 7 bits of mantissa: ties of both dtypes, neighbours of them, random ones."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    lower += torch.randint(2**16, (3,), generator=generator(1)).tolist()
    return torch.cat([upper | bits for bits in lower]).view(torch.float32)


def after_one_step(param, grad) -> torch.Tensor:
    """param - grad."""
    p = parameter(param)
    p.main_grad = grad
    fusedopt.SGD([p], lr=1.0).step()
    return p.detach().cpu()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_stores_round_as_torch_does(dtype, device):
    grad = words_around_ties()
    stored = after_one_step(torch.zeros(grad.shape, dtype=dtype, device=device), grad.to(device))
    expected = (0.0 - grad).to(dtype)
    nan = grad.isnan()
    assert_same_bits(stored[~nan], expected[~nan])
    assert (stored.view(torch.int16)[nan] == 0x7FFF).all()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_loads_are_exact(dtype, device):
    grad = patterns(dtype)
    found = after_one_step(torch.zeros(grad.shape, device=device), grad.to(device))
    nan = grad.isnan()
    assert_same_bits(found[~nan], (0.0 - grad.float())[~nan])
    assert found[nan].isnan().all()
