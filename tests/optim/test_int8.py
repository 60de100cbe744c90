"""States in 8 bits: stability, blocks, and which tensors have them."""

import math

import pytest
import torch
from cases import (
    assert_same_bits,
    generator,
    normal,
    parameter,
    parameters,
    set_gradients,
    train,
)
from format_cases import (
    BFLOAT16,
    BLOCK,
    assert_stepped,
    before_step,
)

import fusedopt
from fusedopt import formats, specs


@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_int8_updates_stay_small_on_heavy_tails(sigma, device):
    """Gaussian gradients, each element with a scale of its own from a lognormal distribution.

    |update| / lr of fp32 Adam stays near 1; where second moments vanish beside first ones it goes into the thousands.
    Parameters start each step at zero and lr is 1, so they are the update.
    """
    n, largest = 64 * BLOCK, {}
    scale = (sigma * normal((n,), device=device, seed=1)).exp()
    gradients = torch.randn((300, n), generator=generator(2)).to(device) * scale
    for state_dtype in (None, "int8"):
        p = parameter(torch.zeros(n, device=device))
        opt = fusedopt.AdamW([p], lr=1.0, weight_decay=0.0, state_dtype=state_dtype, seed=1)
        seen = torch.zeros(n, device=device)
        for grad in gradients:
            p.data.zero_()
            p.grad = grad
            opt.step()
            seen = torch.maximum(seen, p.detach().abs())
        largest[state_dtype] = seen.max().item()
    assert (opt.state[p]["exp_avg_sq"] > 0).all()
    assert largest[None] < 2 and largest["int8"] < 4


@pytest.mark.parametrize("least", [None, 0, 1, 100, 10**9])
def test_min_8bit_size(least, device):
    """Tensors below it keep fp32; 4096 if nothing is said. 0 takes in empty tensors, too."""
    sizes = [0, 1, 99, 100, 101, 4095, 4096, 4097]
    params = parameters(sizes, BFLOAT16, device)
    opt = fusedopt.AdamW(params, state_dtype="int8", **({} if least is None else {"min_8bit_size": least}))
    train(opt, params, 2)
    for n, p in zip(sizes, params):
        small = n < (4096 if least is None else least)
        dtypes = [opt.state[p][key].dtype for key in ("exp_avg", "exp_avg_sq")]
        assert dtypes == ([torch.float32] * 2 if small else [torch.int8, torch.uint8])
        assert ("exp_avg_scale" in opt.state[p]) is not small


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_with_nan_or_infinity_is_nan_and_others_are_not_touched(bad, device):
    """It shows from the next step on; a step has other elements of the block right until then."""
    n = 5 * BLOCK + 7
    params, clean = (parameters([n], device=device) for _ in range(2))
    opt, expected = (fusedopt.AdamW(ps, state_dtype="int8", min_8bit_size=1, seed=1) for ps in (params, clean))
    for each, ps in ((opt, params), (expected, clean)):
        train(each, ps, 2)
        set_gradients(ps, seed=2)
        if ps is params:
            ps[0].grad[BLOCK + 3] = bad
        each.step()
    poisoned = torch.zeros(n, dtype=torch.bool)
    poisoned[BLOCK + 3] = True
    assert torch.equal(params[0].isnan().cpu(), poisoned)
    assert_same_bits(params[0].detach()[~poisoned], clean[0].detach()[~poisoned])
    for each, ps in ((opt, params), (expected, clean)):
        train(each, ps, 1, first=3)
    poisoned[BLOCK : 2 * BLOCK] = True
    assert torch.equal(params[0].isnan().cpu(), poisoned)
    assert_same_bits(params[0].detach()[~poisoned], clean[0].detach()[~poisoned])
    for key in ("exp_avg", "exp_avg_sq"):
        scale = opt.state[params[0]][f"{key}_scale"]
        assert scale.isnan().nonzero().flatten().tolist() == [1]
        assert_same_bits(opt.state[params[0]][key][~poisoned], expected.state[clean[0]][key][~poisoned])


@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_zero_gradients_keep_zero_codes(name, device):
    """Whole blocks, with a scale of 0, and elements of a block that others use."""
    p = parameter(normal((1000,), device=device))
    before = p.detach().clone()
    opt = getattr(fusedopt, name)([p], weight_decay=0.0, state_dtype="int8", min_8bit_size=1)
    used = torch.zeros(1000, dtype=torch.bool, device=device)
    used[600:700:3] = True
    for step in range(5):
        p.grad = torch.where(used, normal((1000,), device=device, seed=step), torch.tensor(-0.0, device=device))
        opt.step()
    assert_same_bits(p.detach()[~used], before[~used])
    decoded = formats.decode_states(opt.state[p], specs.RULES[name.lower()])
    for key, value in decoded.items():
        assert (value[~used] == 0).all() and (value[used] != 0).all()
        assert torch.equal(opt.state[p][f"{key}_scale"] == 0, torch.tensor([True, True, False, True], device=device))


def test_units_are_powers_of_two(device):
    """2^-15 of the one at or below the largest of a block; 0 where that would be subnormal. With beta2 = 0, m is g."""
    largest = [1.0, 1.5, 2.0 - 2**-23, 2.0, 3e38, 2.0**-111, 2.0**-111 * (1 - 2**-24), 2.0**-126, 2.0**-149, 0.0]
    expected = [2.0**-15, 2.0**-15, 2.0**-15, 2.0**-14, 2.0**112, 2.0**-126, 0.0, 0.0, 0.0, 0.0]
    p = parameter(torch.zeros(len(largest), BLOCK, device=device))
    opt = fusedopt.Lion([p], lr=0.0, betas=(0.9, 0.0), state_dtype="int8", min_8bit_size=1)
    p.grad = torch.zeros_like(p)
    p.grad[:, 7], p.grad[:, 8] = (sign * torch.tensor(largest, device=device) for sign in (-1, 1))
    for _ in range(3):
        opt.step()
        assert opt.state[p]["exp_avg_scale"].tolist() == expected
        codes = opt.state[p]["exp_avg"].view(torch.uint8).int()
        assert not codes[:, :7].any() and not codes[:, 9:].any()
        magnitude, used = codes[:, 7:9] & 0x7F, torch.tensor(expected, device=device) > 0
        # 15 octaves of 8 codes: the largest is in the last one, or rounded to the code above it.
        assert ((magnitude[used] >= 14 * 8) & (magnitude[used] <= 15 * 8 + 1)).all() and not magnitude[~used].any()
        assert (codes[used, 7] >= 0x80).all() and (codes[used, 8] < 0x80).all()


def test_second_moments_do_not_vanish(device):
    """Beside others 2^125 times as large they keep code 1; below 2^-125 they may become 0. With beta2 = 0, v is g^2."""
    kept = [1.0, 2.0**-20, 2.0**-40, 2.0**-62, 1.5 * 2.0**-63]
    lost = [1.25 * 2.0**-63, 2.0**-63, 2.0**-74, 2.0**-80, 0.0]  # squares below 2^-125
    p = parameter(torch.zeros(BLOCK, device=device))
    opt = fusedopt.AdamW([p], lr=0.0, betas=(0.9, 0.0), state_dtype="int8", min_8bit_size=1)
    p.grad = torch.tensor(kept + lost + [0.0] * (BLOCK - len(kept + lost)), device=device)
    for _ in range(20):
        opt.step()
        codes = opt.state[p]["exp_avg_sq"]
        assert (codes[: len(kept)] > 0).all() and not codes[len(kept) :].any()
        assert (codes[2 : len(kept)] == 1).all()  # far below a step of the code, whatever the dither
    decoded = formats.decode_states(opt.state[p], specs.RULES["adamw"])["exp_avg_sq"]
    assert (decoded[: len(kept)] > 0).all()


@pytest.mark.parametrize("n", [1, 255, 256, 257, 511, 513, 8191, 8192 + 1, 65_536 + 255])
def test_blocks_at_the_end_of_a_tensor(n, device):
    """The last block has the elements that there are, and reads and writes none behind them."""
    buffers = [torch.full((n + 64,), 77, dtype=dtype, device=device) for dtype in (torch.int8, torch.uint8)]
    p = parameter(normal((n,), device=device))
    opt = fusedopt.AdamW([p], state_dtype="int8", min_8bit_size=1)
    train(opt, [p], 1)
    for key, buffer in zip(("exp_avg", "exp_avg_sq"), buffers):
        opt.state[p][key] = buffer[:n].copy_(opt.state[p][key])
    for step in (1, 2):
        set_gradients([p], seed=step)
        before = before_step(opt, "adamw")
        opt.step()
        assert_stepped(opt, "adamw", before)
    assert all((buffer[n:] == 77).all() for buffer in buffers)
