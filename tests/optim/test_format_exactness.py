"""What masters and split parameters keep: all the bits of a float32, or the upper 24, through the engines."""

import pytest
import torch
from cases import (
    BY_NAME,
    ONE_EACH,
    assert_same_bits,
    bits,
    generator,
    hard_values,
    normal,
    parameter,
    parameters,
)
from format_cases import (
    BFLOAT16,
)

import fusedopt
from fusedopt import formats, reference, specs


@pytest.mark.parametrize("name", ["adamw-decay", "lion-decay"])
def test_split16_is_an_fp32_master_bit_for_bit(name, device):
    """1,000 steps of several tensors; the model's tensor may differ where the two formats round a tie."""
    case, sizes = BY_NAME[name], [1, 9, 257, 4099]
    masters, splits = (parameters(sizes, BFLOAT16, device) for _ in range(2))
    master, split = case.make(masters, master_weights="fp32"), case.make(splits, master_weights="split16")
    gradients = normal((50, sum(sizes)), BFLOAT16, device, seed=1)
    for step in range(1000):
        flat = gradients[step % 50] * (1 + step % 7)
        for params in (masters, splits):
            for p, grad in zip(params, flat.split(sizes)):
                p.grad = grad
        master.step()
        split.step()
        if step % 100 == 99:
            assert_same_bits(split.master_params(), master.master_params())
            for p, q in zip(splits, masters):
                for key in reference.STATES[case.rule]:
                    assert_same_bits(split.state[p][key], master.state[q][key])
                assert_neighbouring_ties(p, q, split.state[p]["param_remainder"])


def assert_neighbouring_ties(split, master, remainder):
    """Equal, or the two neighbours of a value in their middle."""
    different = bits(split) != bits(master)
    assert (bits(remainder)[different] == -(2**15)).all()
    assert ((bits(split).int() - bits(master).int()).abs()[different] == 1).all()


def still_optimizer(name, master_weights, n, device):
    """One bfloat16 parameter that steps leave where it is, with its state made."""
    p = parameter(torch.ones(n, dtype=BFLOAT16, device=device))
    options = {"weight_decay": 0.0, "master_weights": master_weights, "state_dtype": "bf16"}
    opt = getattr(fusedopt, name)([p], lr=0.0, **options)
    p.grad = torch.zeros_like(p)
    opt.step()
    return opt, p


@torch.no_grad()
def assert_engine_keeps(opt, p, high, low):
    """A step that moves nothing decodes and encodes (high, low), integer tensors: same bits, or NaN for NaN."""
    remainder, main = opt.state[p]["param_remainder"], p.view(torch.int16)
    main.copy_(high)
    remainder.copy_(low)
    nan = opt.master_params()[0].isnan()
    before = main.clone(), remainder.clone()
    opt.step()
    assert ((main == before[0]) | nan).all() and ((remainder == before[1]) | nan).all()
    assert torch.equal(p.isnan(), nan), "a NaN is a number in the model's tensor, or the other way round"
    return int(nan.sum())


def test_split8_round_trip_of_all_patterns(device):
    """All 2^24 pairs of a bfloat16 half and a remainder, hence inf, subnormals, -0 and NaN."""
    chunk = 2**20
    opt, p = still_optimizer("AdamW", "split8", chunk, device)
    pair = torch.arange(chunk, device=device, dtype=torch.int32)
    nans = sum(
        assert_engine_keeps(opt, p, (pair + first >> 8) - 2**15, (pair & 0xFF) - 2**7)
        for first in range(0, 2**24, chunk)
    )
    assert nans == 2 * (2**15 - 1)  # of either sign: 8 bits of exponent all set, and 15 bits of mantissa not all zero


@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_split16_round_trip_of_many_patterns(name, device):
    """Two million random words, and those around every bfloat16 number and in the middle between two."""
    random = torch.randint(-(2**31), 2**31, (2**21,), generator=generator(1))
    around = torch.tensor([-2, -1, 0, 1, 2, 2**15 - 1, 2**15, 2**15 + 1])
    edges = (torch.arange(-(2**15), 2**15).view(-1, 1) * 2**16 + around).view(-1)
    word = torch.cat([random, edges])
    high = (word + 2**15) >> 16
    low = word - (high << 16)
    opt, p = still_optimizer(name, "split16", word.numel(), device)
    assert assert_engine_keeps(opt, p, (high + 2**15) % 2**16 - 2**15, low) > 2**13


@pytest.mark.parametrize("values", [normal, hard_values], ids=["normal", "hard"])
@pytest.mark.parametrize("master_weights", ["split16", "split8"])
def test_torch_conversions_agree_with_the_engines(master_weights, values, device):
    """What a step stores is what `convert_master` makes of the same step's fp32 master."""
    p, q = (parameter(values((20_001,), BFLOAT16, device)) for _ in range(2))
    split, master = (ONE_EACH[1].make([each], master_weights=kind) for each, kind in ((p, master_weights), (q, "fp32")))
    for step in range(3):
        p.grad = q.grad = values((20_001,), BFLOAT16, device, seed=1 + step)
        master.load_state_dict(split.state_dict())
        with torch.no_grad():
            q.copy_(p)
        split.step()
        master.step()
        entry, main = dict(master.state[q]), q.detach().clone()
        formats.convert_master(entry, main, specs.PARAM_FORMATS[master_weights])
        assert_same_bits([p.detach(), split.state[p]["param_remainder"]], [main, entry["param_remainder"]])


def test_torch_int8_scales_agree_with_the_engines(device):
    """Codes are rounded to nearest there and at random here, so they may be neighbours; scales have the same bits."""
    p, q = (parameter(normal((20_001,), device=device)) for _ in range(2))
    coded, plain = fusedopt.AdamW([p], state_dtype="int8"), fusedopt.AdamW([q])
    p.grad = q.grad = hard_values((20_001,), device=device, seed=1)
    coded.step()
    plain.step()
    entry = dict(plain.state[q])
    formats.convert_states(entry, specs.RULES["adamw"], specs.STATE_FORMATS["int8"])
    for key, mask in (("exp_avg", 0x7F), ("exp_avg_sq", 0xFF)):
        assert_same_bits(coded.state[p][f"{key}_scale"], entry[f"{key}_scale"])
        ours, theirs = (bits(each[key]).int() & mask for each in (coded.state[p], entry))
        assert ((ours - theirs).abs() <= 1).all()
