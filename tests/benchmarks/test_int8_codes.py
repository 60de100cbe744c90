"""The comparison of 8-bit codes: a short run, and that its "ours" is the code that fusedopt ships."""

import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not installed with the package

import fusedopt
from benchmarks import int8_codes
from benchmarks.int8_codes import (
    BETAS,
    BLOCK,
    FIRST_CURVES,
    OURS,
    SECOND_CURVES,
    Engine,
    FirstMoment,
    Gradients,
    NoiseSource,
    SecondMoment,
    Simulated,
)
from fusedopt import formats

ROOT = Path(__file__).resolve().parents[2]
UNITS = (1.0, 0.125, 2.0**20, 2.0**-40, 2.0**-70)  # the last one's square is below float32's range, in part
SHIPPED = (FirstMoment(OURS, "dither"), SecondMoment(OURS, "dither"))
NEAREST = {"nearest": torch.tensor(0.5)}
ALL_CODES = torch.arange(256, dtype=torch.uint8)


def decoded_first(unit):
    """What the script says that the 256 codes of first moments stand for: a sign bit above 7 bits."""
    magnitudes = int8_codes.decode(FIRST_CURVES[OURS], torch.arange(128), torch.tensor(unit))
    return torch.cat([magnitudes, -magnitudes])


def decoded_second(unit):
    """The same for second moments."""
    return int8_codes.decode(SECOND_CURVES[OURS], torch.arange(256), torch.tensor(unit)).square()


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# ---- the code -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
def test_decodes_as_formats(unit):
    scale = torch.tensor([unit])
    assert same_bits(formats._decode_int8(ALL_CODES.view(torch.int8), scale, "first"), decoded_first(unit))
    assert same_bits(formats._decode_int8(ALL_CODES, scale, "second"), decoded_second(unit))


def step_from_codes(exp_avg, exp_avg_unit, exp_avg_sq, exp_avg_sq_unit):
    """The parameter after one step of the C++ engine from these moments, with zeros for parameter and gradient.

    With both betas 1/2, eps = 1 and a first step it is -m / (√(v / 2) / √(1/2) + 1): halving is exact.
    """
    param = torch.nn.Parameter(torch.zeros(BLOCK))
    param.grad = torch.zeros(BLOCK)
    options = {"state_dtype": "int8", "min_8bit_size": 0, "seed": 1}
    optimizer = fusedopt.Adam([param], lr=1.0, betas=(0.5, 0.5), eps=1.0, **options)
    optimizer.step()
    state = optimizer.state[param]
    state["step"].zero_()
    state["exp_avg"].copy_(exp_avg.view(torch.int8))
    state["exp_avg_scale"].fill_(exp_avg_unit)
    state["exp_avg_sq"].copy_(exp_avg_sq)
    state["exp_avg_sq_scale"].fill_(exp_avg_sq_unit)
    optimizer.step()
    return param.detach()


@pytest.mark.parametrize("unit", UNITS)
def test_first_moments_decode_as_in_the_engine(unit):
    zeros = torch.zeros_like(ALL_CODES)
    assert torch.equal(step_from_codes(ALL_CODES, unit, zeros, 0.0), -decoded_first(unit))


@pytest.mark.parametrize("unit", UNITS[:2])  # others vanish beside eps
def test_second_moments_decode_as_in_the_engine(unit):
    ones = torch.full_like(ALL_CODES, 4)  # first octave, mantissa 4/8: 3 - 2
    root = np.sqrt(decoded_second(unit).numpy() * np.float32(0.5))  # torch's own is a unit off here and there
    expected = torch.from_numpy(np.float32(-1.0) / (root / np.float32(np.sqrt(0.5)) + np.float32(1.0)))
    assert len(expected.unique()) == 256
    assert torch.equal(step_from_codes(ones, 1.0, ALL_CODES, unit), expected)


def moments(sigma):
    """First and second moments of a few blocks of very different magnitudes, with zeros and a block of nothing else."""
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(64 * BLOCK, generator=generator) * (sigma * torch.randn(64 * BLOCK, generator=generator)).exp()
    m[::17] = 0
    m[:BLOCK] = 0
    return m, m.square() * torch.rand(m.shape, generator=generator)


@pytest.mark.parametrize("sigma", [0.5, 2.0, 8.0])
def test_encodes_as_formats(sigma):
    for name, code, values in zip(
        ("first", "second"), (FirstMoment(OURS), SecondMoment(OURS)), moments(sigma), strict=True
    ):
        expected = formats._decode_int8(*formats._encode_int8(values, name), name)
        assert torch.equal(code.stored(values, NEAREST), expected)


@pytest.mark.parametrize("sigma", [0.5, 2.0, 8.0])
def test_largest_dither_does_not_carry_past_the_largest_code(sigma):
    """The largest of a block goes up to the next level, at most an eighth of 2 + x / unit higher."""
    noise = {"dither": torch.tensor(1 - 2.0**-24)}
    for code, values in zip(SHIPPED, moments(sigma), strict=True):
        stored, exact = (x.view(-1, BLOCK).abs().amax(1) for x in (code.stored(values, noise), values))
        assert (stored >= exact).all()
        assert (stored <= 1.13 * exact).all()


def test_second_moments_above_zero_stay_above_zero():
    """Unless they are among the smallest numbers."""
    v = torch.zeros(BLOCK)
    v[:4] = torch.tensor([1.0, 1e-30, 2.0**-125, 2.0**-126])
    noise = {"dither": torch.tensor(0.0)}
    stored = SHIPPED[1].stored(v, noise)
    assert stored[:3].all() and not stored[3:].any()
    assert not SecondMoment(OURS, "dither", zero=True).stored(v, noise)[1:].any()


@pytest.mark.parametrize("largest", [0.0, 2.0**-112, 2.0**-111, 1e-38, 1.0, 3e38])
def test_units_are_those_of_formats(largest):
    m = torch.zeros(BLOCK)
    m[3] = -largest
    unit = FIRST_CURVES[OURS].unit(m.abs().view(1, -1).amax(1))
    assert same_bits(unit, formats._encode_int8(m, "first")[1])


# ---- the study ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 2**40 + 7])
@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_engine_and_simulation_keep_the_same_moments(betas, seed):
    """Bit for bit: codes, units and dither; updates differ by a rounding, as the simulation orders them otherwise."""
    steps = 60
    gradients = Gradients(steps, seed)
    source = NoiseSource(gradients.scale.numel(), seed)
    simulated, engine = Simulated("adam", betas, SHIPPED), Engine(betas, seed)
    for step in range(1, steps + 1):
        gradient = gradients.at(step)
        noise = source.at(step, gradient.shape)
        ours, theirs = (each.update(gradient, step, noise) for each in (simulated, engine))
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=0)
        kept = engine.optimizer.torch_state_dict()["state"][0]
        assert torch.equal(kept["exp_avg"], simulated.m), step
        assert torch.equal(kept["exp_avg_sq"], simulated.v), step


def test_dither_has_less_noise_than_random_bits():
    random_bits = (FirstMoment(OURS, "random bits"), SecondMoment(OURS, "random bits"))
    optimizers = [Simulated("adam", BETAS[0], codes) for codes in ((None, None), random_bits, SHIPPED)]
    _, random, dithered = int8_codes.simulate(optimizers, steps=300, seed=0)
    assert 0 < statistics.median(dithered.errors()) < 0.9 * statistics.median(random.errors()) < 0.2
    assert dithered.max_update() < 4


def test_command_prints_tables():
    command = [sys.executable, ROOT / "benchmarks" / "int8_codes.py", "--steps", "60", "--engine"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [line for line in run.stdout.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows[: len(int8_codes.ADAM_CODES) + 3]}) == 1
    assert sum(OURS in row for row in rows) == 8
    assert any("fusedopt.Adam" in row for row in rows)
