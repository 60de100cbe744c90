"""Random rounding, bit for bit: Philox, stochastic rounding, dither and int8 codes in numpy beside the engines.

What is rounded, the result in float32, comes from a twin with fp32 masters and fp32 states that takes the same step.
"""

import copy
import math

import numpy as np
import pytest
import torch
from cases import BY_NAME, assert_same_bits, bits, hard_values, memory, normal, parameter, set_gradients, train
from format_cases import BFLOAT16, BLOCK, FLOAT32, Combination, make_params

import fusedopt
from fusedopt import specs

CASES = [BY_NAME["adamw-decay"], BY_NAME["lion-decay"]]
SIZES = [1, 7, 8, 9, 0, 255, 1000, 8193, 70_001]
RANDOM = [
    Combination(BFLOAT16, None, None, True),
    Combination(BFLOAT16, None, "fp32", True),
    Combination(BFLOAT16, None, "int8", True),
    Combination(BFLOAT16, "split8", "int8"),
    Combination(FLOAT32, None, "int8"),
]
SEED = 0x1234_5678_9ABC_DEF0


# ---- the same once more in numpy -----------------------------------------------------------------------------------


def philox(counter, key) -> np.ndarray:
    """Philox4x32-10 of Random123. counter: (..., 4) uint32; key: two integers. Returns (..., 4) uint32."""
    low = np.uint64(0xFFFFFFFF)
    c = [np.asarray(counter, dtype=np.uint64)[..., i] for i in range(4)]
    k0, k1 = (np.uint64(int(k)) for k in key)
    for _ in range(10):
        product0, product1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (product1 >> np.uint64(32)) ^ c[1] ^ k0,
            product1 & low,
            (product0 >> np.uint64(32)) ^ c[3] ^ k1,
            product0 & low,
        ]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack(c, axis=-1).astype(np.uint32)


def random_bits(n: int, seed: int, tensor: int, step: int) -> np.ndarray:
    """16 for each of n elements and the rest of their group of eight, as uint32.

    Eight elements share a draw, two a word, the first in its low half.
    """
    group = np.arange(-(-n // 8), dtype=np.uint64)
    rest = np.full_like(group, tensor), np.full_like(group, step)
    words = philox(np.stack([group & np.uint64(0xFFFFFFFF), group >> np.uint64(32), *rest], axis=-1), key_of(seed))
    return np.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(-1).astype(np.uint32)


def key_of(seed: int) -> tuple[int, int]:
    return seed & 0xFFFFFFFF, seed >> 32


def bits_for_state(drawn: np.ndarray, k: int) -> np.ndarray:
    """State number k of an element takes the bits of the element k + 1 further on in the group of eight."""
    return np.roll(drawn.reshape(-1, 8), -(k + 1), axis=1).reshape(-1)


def dither(n: int, seed: int, tensor: int, step: int) -> np.ndarray:
    """24 bits for each of n elements: a hash of its group of eight and tensor, moved on by a constant each step.

    The eight elements of a group lie another constant apart.
    """
    group = np.arange(-(-n // 8), dtype=np.uint32)
    x = group ^ philox([[tensor, 0, 0, 0]], key_of(seed))[0, 0]
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    x = (x ^ (x >> 16)) + np.uint32(step * 0x9E3779 & 0xFFFFFFFF)
    return ((x[:, None] + np.arange(8, dtype=np.uint32) * np.uint32(0x6A09E6)) & 0xFFFFFF).reshape(-1)[:n]


def words_of(t) -> np.ndarray:
    return t.detach().cpu().contiguous().view(torch.int32).numpy().view(np.uint32).reshape(-1)


def stochastic_bfloat16(value, drawn: np.ndarray) -> np.ndarray:
    """The bits, uint16, of a float32 tensor rounded up with the probability of its distance from the lower number."""
    word = words_of(value)
    rounded = ((word + drawn) >> 16).astype(np.uint16)
    return np.where(np.isnan(word.view(np.float32)), np.uint16(0x7FFF), rounded)


def int8_codes(value, dithered: np.ndarray, moment: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes (uint8) and units (float32) of a float32 tensor: the upper bits of 2 + |x| / unit, with dither below.

    The unit is 2^-15 of the largest power of two of the block, or 0 where that would be subnormal.
    """
    word, first = words_of(value), moment == "first"
    x = word.view(np.float32)
    magnitude = np.abs(x) if first else np.sqrt(x)
    largest = np.pad(magnitude, (0, -len(x) % BLOCK)).reshape(-1, BLOCK).max(axis=1, initial=0)
    exponent = largest.view(np.uint32) >> 23
    unit = (np.where(exponent < 16, 0, exponent - 15) << 23).astype(np.uint32).view(np.float32)
    with np.errstate(divide="ignore"):
        reciprocal = np.where(unit == 0, np.float32(0), np.float32(1) / unit)
    above = magnitude * np.repeat(reciprocal, BLOCK)[: len(x)] + np.float32(2)
    assert unit.dtype == above.dtype == np.float32
    fixed = ((above.view(np.uint32) - np.uint32(0x40000000)) << (4 if first else 5)) + dithered
    codes = fixed >> 24
    codes = codes | (word >> 24 & 0x80) if first else np.where((x >= 2.0**-125) & (codes == 0), 1, codes)
    return codes.astype(np.uint8), unit


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_this_philox_knows_the_answers(counter, key, expected):
    """Of Random123's kat_vectors, philox4x32 with 10 rounds."""
    counter, key, expected = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    assert philox([counter], key)[0].tolist() == expected


# ---- the engines ---------------------------------------------------------------------------------------------------


def exact_twin(case, opt, combination):
    """An optimizer at the same point, with the same gradients, that rounds nothing but to float32."""
    twins = [parameter(p.detach().clone()) for group in opt.param_groups for p in group["params"]]
    for p, twin in zip((p for group in opt.param_groups for p in group["params"]), twins):
        twin.grad = p.grad
    master = {} if combination.dtype == FLOAT32 else {"master_weights": "fp32"}
    sizes = [len(group["params"]) for group in opt.param_groups]
    groups = [{"params": list(part)} for part in _parts(twins, sizes)]
    twin = case.make(groups, state_dtype="fp32", **master)
    twin.load_state_dict(opt.state_dict())
    return twin, twins


def _parts(items, sizes):
    start = 0
    for size in sizes:
        yield items[start : start + size]
        start += size


def expected_bits(case, combination, p, entry, exact, exact_entry, tensor, step):
    """(what, actual, expected) of everything that is rounded at random."""
    n, drawn = p.numel(), random_bits(p.numel(), SEED, tensor, step)
    if combination.stochastic_rounding:
        yield "param", bits(p).numpy().view(np.uint16), stochastic_bfloat16(exact, drawn[:n])
    spec = specs.RULES[case.rule]
    for k, (name, moment) in enumerate(zip(spec.states, spec.moments)):
        actual, value = entry[name], exact_entry[name]
        if not actual.is_floating_point():
            codes, unit = int8_codes(value, dither(n, SEED, tensor, step), moment)
            yield name, bits(actual).numpy(), codes
            yield f"{name}_scale", words_of(entry[f"{name}_scale"]), unit.view(np.uint32)
        elif combination.stochastic_rounding and actual.dtype == BFLOAT16:
            yield name, bits(actual).numpy().view(np.uint16), stochastic_bfloat16(value, bits_for_state(drawn, k)[:n])


@pytest.mark.parametrize("values", [normal, hard_values], ids=["normal", "hard"])
@pytest.mark.parametrize("combination", RANDOM, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_engine_rounds_as_numpy_does(case, combination, values, device):
    """Two groups; one parameter without gradient counts in the numbering of tensors."""
    params = make_params(combination, [3, *SIZES], device, values=values)
    groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.25}]
    opt = case.make(groups, **combination.options, min_8bit_size=2, seed=SEED)
    checked = 0
    for step in range(1, 4):
        set_gradients(params[1:], seed=step, values=values)
        twin, twins = exact_twin(case, opt, combination)
        for group, twin_group in zip(opt.param_groups, twin.param_groups):
            twin_group["lr"] = group["lr"]
        opt.step()
        twin.step()
        exact_params = twin.master_params()
        for tensor, (p, q, exact) in enumerate(zip(params, twins, exact_params)):
            if p.grad is None:
                continue
            rows = expected_bits(case, combination, p, opt.state[p], exact, twin.state[q], tensor, step)
            for what, actual, expected in rows:
                np.testing.assert_array_equal(actual.reshape(-1), expected, err_msg=f"{what}, {p.numel()}, {step}")
                checked += 1
    assert checked >= 3 * (len(SIZES) - 1)


def test_nan_and_infinities_pass_unrounded(device):
    """They have no neighbours: added bits would carry an infinity into NaN, and some NaN into -0."""
    values = [math.inf, -math.inf, math.nan, 1.0, 0.0, -0.0, 3e38, 1e-40]
    gradients = [0.0, 0.0, 0.0, math.nan, math.inf, -math.inf, 0.0, 0.0]
    p = parameter(torch.tensor(values * 500, dtype=BFLOAT16, device=device))
    opt = fusedopt.Lion([p], lr=0.0, stochastic_rounding=True)
    p.grad = torch.tensor(gradients * 500, dtype=BFLOAT16, device=device)
    before = p.detach().clone()
    for _ in range(3):
        opt.step()
    number = before.isfinite() & p.grad.isfinite()
    assert_same_bits(p.detach()[number], before[number])  # exact in bfloat16: nothing to round
    infinite = before.isinf()
    assert_same_bits(p.detach()[infinite], before[infinite])
    assert p.detach()[before.isnan() | p.grad.isnan()].isnan().all()
    moment = opt.state[p]["exp_avg"]
    assert_same_bits(moment[p.grad.isinf()], p.grad[p.grad.isinf()])
    assert moment[p.grad.isnan()].isnan().all()
    assert (bits(moment[p.grad.isnan()]) == 0x7FFF).all()


# ---- repeatability -------------------------------------------------------------------------------------------------


def trained(combination, device="cpu", seed=5, sizes=(5, 4097, 300), steps=4, **options):
    params = make_params(combination, sizes, device)
    opt = fusedopt.AdamW(params, lr=0.01, **combination.options, min_8bit_size=256, seed=seed, **options)
    train(opt, params, steps)
    return opt


@pytest.mark.parametrize("combination", RANDOM, ids=str)
def test_the_seed_decides(combination, device):
    one, again, other = (trained(combination, device, seed) for seed in (5, 5, 6))
    assert_same_bits(memory(one), memory(again))
    assert any((bits(a) != bits(b)).any() for a, b in zip(memory(one), memory(other)))


def test_seed_comes_from_torchs_default_generator(device):
    seeds = []
    for start in (1, 1, 2):
        torch.manual_seed(start)
        seeds.append(
            fusedopt.AdamW(make_params(RANDOM[0], [5], device), stochastic_rounding=True).param_groups[0]["seed"]
        )
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize("options", [{}, {"master_weights": "split8"}, {"state_dtype": "bf16"}], ids=str)
def test_formats_without_random_bits_draw_no_seed(options):
    """torch's generator is left alone, and param groups hold no seed."""
    before = torch.get_rng_state()
    opt = fusedopt.AdamW(make_params(RANDOM[0], [5]), **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert "seed" not in opt.param_groups[0]


def test_tensors_and_steps_get_other_bits(device):
    """Equal tensors with equal gradients are rounded each in its own way, and so is one tensor at two steps."""
    value = normal((4096,), BFLOAT16, device)
    params = [parameter(value.clone()) for _ in range(3)]
    opt = fusedopt.Lion(params, lr=1e-3, stochastic_rounding=True, state_dtype="fp32", seed=1)
    results = []
    for _ in range(2):
        for p in params:
            p.data.copy_(value)
            p.grad = torch.ones_like(p)
        opt.step()
        results += [p.detach().clone() for p in params]
    for i, one in enumerate(results):
        for other in results[i + 1 :]:
            # A lr of 1e-3 is below the spacing of most elements, which are then rounded down or up by chance.
            assert (one != other).float().mean() > 0.1


@pytest.mark.parametrize("combination", RANDOM, ids=str)
def test_number_of_threads_does_not_matter(combination):
    default, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(memory(trained(combination, sizes=[5, 70_001, 300])))
    finally:
        torch.set_num_threads(default)
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("combination", RANDOM, ids=str)
def test_a_skipped_step_uses_up_no_bits(combination, device):
    """Its retry is rounded as if there had been none."""
    expected = trained(combination, device, nonfinite="skip")
    opt = trained(combination, device, nonfinite="skip", steps=2)
    params = opt.param_groups[0]["params"]
    for step in (2, 3):
        set_gradients(params, seed=step)
        params[1].grad[100] = math.inf
        before = memory(opt)
        opt.step()
        assert opt.step_was_skipped.item() is True
        assert_same_bits(memory(opt), before)
        train(opt, params, 1, first=step)
    assert_same_bits(memory(opt), memory(expected))


def test_copies_repeat_the_bits(device):
    opt = trained(RANDOM[2], device)
    twin = copy.deepcopy(opt)
    for each in (opt, twin):
        train(each, each.param_groups[0]["params"], 2, first=4)
    assert_same_bits(memory(twin), memory(opt))


# ---- statistics ----------------------------------------------------------------------------------------------------

# |z| of a standard normal exceeds this with a probability of 1e-6: the p-value below which these tests fail. The seeds
# are fixed, so they do not fail at random.
Z = 4.892


def assert_unbiased(rounded_up, probability, what):
    """The sum of Bernoulli draws that are independent, or less: see `assert_independent`."""
    variance = probability * (1 - probability)
    z = (rounded_up.double() - probability).sum() / variance.sum().sqrt()
    assert abs(z) < Z, f"{what}: mean is {z:.2f} standard deviations off"


def assert_independent(rounded_up, probability, what):
    """Products of the residuals of elements that are 1, 2 or 8 apart have the mean 0."""
    residual, variance = rounded_up.double() - probability, probability * (1 - probability)
    for lag in (1, 2, 8):
        z = (residual[lag:] * residual[:-lag]).sum() / (variance[lag:] * variance[:-lag]).sum().sqrt()
        assert abs(z) < Z, f"{what}: elements {lag} apart are correlated, {z:.2f} standard deviations"


def stepped_beside_exact(combination, device, n=2**20):
    """One Adam step from the same parameter with random rounding, and without."""
    case, p = BY_NAME["adamw-decay"], parameter(normal((n,), combination.dtype, device))
    opt = case.make([p], **combination.options, seed=3)
    p.grad = normal((n,), combination.dtype, device, seed=1)
    twin, _ = exact_twin(case, opt, combination)
    opt.step()
    twin.step()
    return opt.state[p], p, next(iter(twin.state.values())), twin.master_params()[0]


def test_stochastic_rounding_is_unbiased(device):
    """Over 2^20 elements, p-value 1e-6: parameter, first and second moment; each rounded to a neighbour."""
    entry, p, exact_entry, exact_param = stepped_beside_exact(Combination(BFLOAT16, None, None, True), device)
    for what, rounded, exact in (
        ("param", p, exact_param),
        ("exp_avg", entry["exp_avg"], exact_entry["exp_avg"]),
        ("exp_avg_sq", entry["exp_avg_sq"], exact_entry["exp_avg_sq"]),
    ):
        word = torch.from_numpy(words_of(exact).astype(np.int64))
        up = (bits(rounded).long() & 0xFFFF) - (word >> 16)
        assert ((up == 0) | ((up == 1) & (word & 0xFFFF != 0))).all(), f"{what} is no neighbour"
        assert_unbiased(up, (word & 0xFFFF).double() / 2**16, what)
        assert_independent(up, (word & 0xFFFF).double() / 2**16, what)


def test_int8_codes_are_unbiased(device):
    """In code units, over 2^20 elements, p-value 1e-6; second moments without those that must not become zero.

    The dither of a group of eight is spread evenly, so that sums scatter less than those of independent bits.
    """
    entry, _, exact_entry, _ = stepped_beside_exact(Combination(FLOAT32, None, "int8"), device)
    for name, shift, mask in (("exp_avg", 20, 0x7F), ("exp_avg_sq", 19, 0xFF)):
        exact = exact_entry[name].cpu()
        magnitude = exact.abs() if name == "exp_avg" else exact.sqrt()
        reciprocal = (1 / entry[f"{name}_scale"].cpu()).repeat_interleave(BLOCK)
        word = (magnitude * reciprocal + 2).view(torch.int32).long() - 0x40000000
        up = (bits(entry[name]).long() & mask) - (word >> shift)
        fraction = (word & ((1 << shift) - 1)).double() / (1 << shift)
        assert ((up == 0) | ((up == 1) & (fraction > 0)) | (word >> shift == 0)).all(), f"{name} is no neighbour"
        inside = word >> shift >= 1
        assert inside.float().mean() > 0.98
        assert_unbiased(up[inside], fraction[inside], name)


def test_int8_rounding_errors_cancel_over_steps(device):
    """With beta2 = 0 the moment of Lion is the gradient, here the same one in 144 steps: its mean code is right.

    Of 144 = F_12 points of a golden-section sequence, each lies less than 1 / F_13 beside another multiple of 1 / 144,
    all on one side of it. So the number of points in an interval is off by 2 at most, and with it the sum of codes.
    Random bits would be off by sqrt(144) / 2 = 6 on average.
    """
    steps, n = 144, 4096
    p = parameter(torch.zeros(n, device=device))
    opt = fusedopt.Lion([p], lr=0.0, betas=(0.9, 0.0), state_dtype="int8", seed=11)
    p.grad = normal((n,), device=device)
    total = torch.zeros(n, dtype=torch.int64)
    for _ in range(steps):
        opt.step()
        total += bits(opt.state[p]["exp_avg"]).long() & 0x7F
    reciprocal = (1 / opt.state[p]["exp_avg_scale"]).repeat_interleave(BLOCK)
    word = (p.grad.abs() * reciprocal + 2).cpu().view(torch.int32).long() - 0x40000000
    assert ((total - steps * word.double() / 2**20).abs() <= 2).all()


def test_bfloat16_second_moment_follows_small_changes(device):
    """With beta2 = 0.999 a change is below half an ulp: to nearest it would stand still, at random it goes there."""
    ends = []
    for stochastic in (False, True):
        p = parameter(torch.zeros(4096, dtype=BFLOAT16, device=device))
        opt = fusedopt.AdamW([p], lr=0.0, betas=(0.9, 0.999), stochastic_rounding=stochastic, seed=1)
        for step in range(400):
            p.grad = torch.full_like(p, 1.0 if step < 1 else 2.0)
            opt.step()
        ends.append(opt.state[p]["exp_avg_sq"].double().mean().item())
    expected = 0.001
    for _ in range(399):
        expected += 0.001 * (4 - expected)
    # A rounding has a variance of at most 1/4 ulp^2, and errors decay slowly: after 400 steps the mean of 4096 elements
    # has a standard deviation below sqrt(400 / 4 / 4096) ulp, which is 2^-7 for values from 1 to 2.
    deviation = math.sqrt(400 / 4096) / 2 * 2.0**-7
    assert abs(ends[1] - expected) < Z * deviation
    assert abs(ends[0] - expected) > 5 * Z * deviation, "rounding to nearest was meant to be the worse"
