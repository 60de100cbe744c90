"""The comparison of 8-bit codes: a short run, and that its "ours" is the code that fusedopt ships."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not installed with the package

import fusedopt
from benchmarks import int8_codes
from benchmarks.int8_codes import BLOCK, FIRST_CURVES, OURS, SECOND_CURVES, FirstMoment, SecondMoment, Simulated
from fusedopt import formats

ROOT = Path(__file__).resolve().parents[2]
UNITS = (1.0, 3.0, 1.7e-9, 0.1, 2.5e-21)  # powers of two, others, and one whose square is below float32's range
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
    ones = torch.full_like(ALL_CODES, 8)  # second octave, mantissa 0: 2 - 1
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
        assert torch.equal(code.stored(values, torch.zeros(values.shape)), expected)


@pytest.mark.parametrize("sigma", [0.5, 2.0, 8.0])
def test_largest_random_bits_do_not_carry_past_the_largest_code(sigma):
    draw = torch.full((64 * BLOCK,), 1 - 2.0**-16)
    for code, values in zip((FirstMoment(OURS), SecondMoment(OURS)), moments(sigma), strict=True):
        blocks = code.stored(values, draw).view(-1, BLOCK).abs()
        torch.testing.assert_close(blocks.amax(1), values.view(-1, BLOCK).abs().amax(1), rtol=1e-6, atol=0)


def test_second_moments_above_zero_stay_above_zero():
    v = torch.zeros(BLOCK)
    v[0], v[1] = 1.0, 1e-30
    stored = SecondMoment(OURS, dither=True).stored(v, torch.zeros(BLOCK))
    assert stored[1] > 0 and not stored[2:].any()
    assert not SecondMoment(OURS, dither=True, zero=True).stored(v, torch.zeros(BLOCK))[1]


# ---- the study ----------------------------------------------------------------------------------------------


def test_engine_and_simulation_agree():
    """Random bits differ, so in their statistics only."""
    betas = (0.9, 0.999)
    ours = Simulated("adam", betas, (FirstMoment(OURS, dither=True), SecondMoment(OURS, dither=True)))
    optimizers = [Simulated("adam", betas, (None, None)), ours, int8_codes.Engine(betas, seed=0)]
    exact, simulated, engine = int8_codes.simulate(optimizers, steps=120, seed=0)
    for run in (simulated, engine):
        assert exact.max_update() <= run.max_update() < 4
        assert 0 < max(run.errors()) < 0.3
    assert engine.errors() == pytest.approx(simulated.errors(), rel=0.2)


def test_command_prints_tables():
    command = [sys.executable, ROOT / "benchmarks" / "int8_codes.py", "--steps", "60", "--engine", "--markdown"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [line for line in run.stdout.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows[: len(int8_codes.ADAM_CODES) + 3]}) == 1
    assert sum(OURS in row for row in rows) == 6
    assert any("fusedopt.Adam" in row for row in rows)
