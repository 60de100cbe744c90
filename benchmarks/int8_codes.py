"""Compares 8-bit codes for the moments of Adam and Lion with fp32 moments, on the same gradients.

    python benchmarks/int8_codes.py              # the tables of docs/numerics.md
    python benchmarks/int8_codes.py --engine     # one row more: fusedopt's own optimizer on the CPU

A moment is kept in blocks of 256 with one fp32 number, its unit, and is decoded, updated and encoded in every step.
This is a simulation in float32. It shares no code with fusedopt's kernels, ``--engine`` excepted; its "ours" is theirs
bit for bit, dither included.

A code is a curve, ``x = unit * level(c)``, and a rounding of the fractional code y to c, floor(y + r): ``nearest`` has
r = 1/2; ``random bits`` draws r anew in every step; ``dither`` takes r from a golden-section sequence over the steps.
Both moments of an element have the same r, as in the kernels. Second moments are held as √v, except by ``dynamic``. In
codes with ``zero`` a small v > 0 may become code 0; the others use code 1.

All codes see the same synthetic gradients (``SCENARIOS``) and the same r. What does well here may still do badly in
training. Columns:

* ``max update``: largest |update| / lr of all scenarios, elements and steps. That of exact Adam is at most
  (1-β1) / √(1-β2), once the bias correction has faded and if β1² < β2. ``wide``: of the scenario of that name, which is
  left out everywhere else;
* ``error``: RMS difference of the updates over the RMS of the fp32 ones, in the last third of the steps: median and
  worst of the scenarios;
* ``moved``: the same of the sum of all updates, worst: noise averages out here, and bias does not;
* ``v / exact``: of elements with v > 0, in the last third: median, 5th and 95th percentile.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

BLOCK = 256
EPS = 1e-8
OURS = "log 3+4 bits (ours)"


# ------------------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """Magnitudes of the codes 0, 1, …: ``levels`` rise from 0; ``invert`` gives the fractional code of a magnitude."""

    levels: torch.Tensor
    invert: Callable[[torch.Tensor], torch.Tensor]
    unit_is_power: bool = False

    def unit(self, largest: torch.Tensor) -> torch.Tensor:
        """Of a block, from the largest magnitude in it."""
        if not self.unit_is_power:
            return torch.where(largest < 1e-33, 0.0, largest / self.levels[-1])
        half_mantissa, _ = torch.frexp(largest)
        power = largest / (2 * half_mantissa)
        return torch.where(largest < 2.0**-111, 0.0, power * 2.0**-15)


def power_curve(codes: int, exponent: int) -> Curve:
    """x = (c / codes) ** exponent; 1 is linear."""
    return Curve((torch.arange(codes + 1) / codes) ** exponent, lambda x: codes * x ** (1 / exponent))


def softsign_curve(codes: int) -> Curve:
    """c / codes = 2x / (1 + x), as FlashOptim."""
    y = torch.arange(codes + 1) / codes
    return Curve(y / (2 - y), lambda x: codes * 2 * x / (1 + x))


def dynamic_curve(signed: bool) -> Curve:
    """bitsandbytes' map: decades from 1e-7 to 1, each with twice the levels of the one below, straight between them."""
    steps = [0.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1, dtype=torch.float64)
        steps += ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
    levels = torch.tensor([*steps, 1.0])  # signed: theirs has no level -1

    def invert(x: torch.Tensor) -> torch.Tensor:
        below = (torch.searchsorted(levels, x, right=True) - 1).clamp(0, len(levels) - 2)
        return below + (x - levels[below]) / (levels[below + 1] - levels[below])

    return Curve(levels, invert)


def log_curve(mantissa_bits: int) -> Curve:
    """A float with 4 bits of exponent: 2 + x = 2 ** (1 + octave) * (1 + mantissa)."""
    steps = 1 << mantissa_bits
    code = torch.arange(16 * steps)
    levels = 2.0 ** (1 + code // steps) * (1 + code % steps / steps) - 2

    def invert(x: torch.Tensor) -> torch.Tensor:
        half_mantissa, exponent = torch.frexp(2 + x)  # half_mantissa in [1/2, 1)
        return steps * (exponent - 2 + 2 * half_mantissa.double() - 1)  # double: 24 bits and the octave

    return Curve(levels, invert, unit_is_power=True)


FIRST_CURVES = {
    "linear": power_curve(127, 1),
    "softsign": softsign_curve(127),
    "quartic": power_curve(127, 4),
    "dynamic": dynamic_curve(signed=True),
    OURS: log_curve(mantissa_bits=3),
}
SECOND_CURVES = {
    "linear": power_curve(255, 1),
    "quartic": power_curve(255, 4),
    "dynamic": dynamic_curve(signed=False),
    OURS: log_curve(mantissa_bits=4),
}


# -------------------------------------------------------------------------------------------------------------- codes

Noise = dict[str, torch.Tensor]  # r in [0, 1), one an element, for each rounding


def encode(curve: Curve, x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of magnitudes, and the blocks' units, one an element."""
    unit = curve.unit(x.view(-1, BLOCK).amax(1, keepdim=True)).expand(-1, BLOCK).reshape(x.shape)
    y = curve.invert(x * torch.where(unit > 0, 1 / unit, 0.0)).clamp(max=len(curve.levels) - 1)
    return (y + r).floor().clamp(0, len(curve.levels) - 1).long(), unit


def decode(curve: Curve, code: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    return curve.levels[code] * unit


def root(x: torch.Tensor) -> torch.Tensor:
    """√x, correctly rounded as in the kernels; torch's own is a unit in the last place off here and there."""
    return torch.from_numpy(np.sqrt(x.numpy()))


@dataclass(frozen=True)
class FirstMoment:
    """Signed: a sign and 127 magnitudes."""

    curve: str
    rounding: str = "nearest"

    def stored(self, m: torch.Tensor, noise: Noise) -> torch.Tensor:
        """m, encoded and decoded."""
        curve = FIRST_CURVES[self.curve]
        return decode(curve, *encode(curve, m.abs(), noise[self.rounding])) * m.sign()

    def __str__(self) -> str:
        return f"{self.curve}, {self.rounding}"


@dataclass(frozen=True)
class SecondMoment:
    """Unsigned: 255 magnitudes and 0."""

    curve: str
    rounding: str = "nearest"
    zero: bool = False  # v > 0 may become code 0

    def stored(self, v: torch.Tensor, noise: Noise) -> torch.Tensor:
        """v, encoded and decoded."""
        curve, holds_root = SECOND_CURVES[self.curve], self.curve != "dynamic"
        code, unit = encode(curve, root(v) if holds_root else v, noise[self.rounding])
        if not self.zero:
            code = torch.maximum(code, (v >= 2.0**-125).long())
        x = decode(curve, code, unit)
        return x * x if holds_root else x

    def __str__(self) -> str:
        return f"{self.curve}, {self.rounding}" + (", zero" if self.zero else "")


Codes = tuple[FirstMoment | None, SecondMoment | None]  # None: fp32

ADAM_CODES: list[Codes] = [
    (None, None),
    (FirstMoment("softsign"), SecondMoment("linear", zero=True)),  # as FlashOptim
    (FirstMoment("dynamic"), SecondMoment("dynamic", zero=True)),  # as bitsandbytes
    (FirstMoment("softsign"), SecondMoment("linear")),
    (FirstMoment("dynamic"), SecondMoment("dynamic")),
    *((FirstMoment(curve, "dither"), SecondMoment(curve, "dither")) for curve in ("linear", "dynamic", "quartic")),
    (FirstMoment("quartic"), SecondMoment("quartic")),
    (FirstMoment(OURS), SecondMoment(OURS)),
    (FirstMoment(OURS), SecondMoment(OURS, "dither")),
    (FirstMoment(OURS, "random bits"), SecondMoment(OURS, "random bits")),
    (FirstMoment(OURS, "dither"), SecondMoment(OURS, "dither", zero=True)),
    (FirstMoment(OURS, "dither"), SecondMoment(OURS, "dither")),
]
LION_CODES: list[Codes] = [
    (None, None),
    *((FirstMoment(curve, rounding), None) for curve in FIRST_CURVES for rounding in ("nearest", "dither")),
    (FirstMoment(OURS, "random bits"), None),
]
BETAS = [(0.9, 0.999), (0.9, 0.95), (0.95, 0.99)]


# ---------------------------------------------------------------------------------------------------------- gradients

SCENARIOS = {  # sigma: of the lognormal scales of single elements
    "σ=0.5": 0.5,
    "σ=1": 1.0,
    "σ=1.5": 1.5,
    "σ=1.5, t(3)": 1.5,  # Student's t instead of Gaussian noise
    "drift": 1.0,  # every other element has a mean, as large as its noise, that follows a sine
    "quiet": 1.0,  # the same for all elements, with a tenth of the noise
    "rows": 0.5,  # rows of 64 as of an embedding: zero but in 2 % of the steps
    "stops": 0.5,  # every fourth of such rows becomes zero for good after 20 % of the steps
    "drop": 1.0,  # 30 times smaller after 40 % of the steps
    "spikes": 0.5,  # now and then an element is 300 times as large, once
    "wide": 4.0,  # as the first ones, but hardly any 8-bit code reaches from the largest to the smallest elements
}
USUAL = slice(0, len(SCENARIOS) - 1)  # all but "wide"
PER_SCENARIO = 4 * BLOCK


class Gradients:
    """The same gradients for every code: one row a scenario."""

    def __init__(self, steps: int, seed: int) -> None:
        self.steps = steps
        self.generator = torch.Generator().manual_seed(seed)
        self.shape = (len(SCENARIOS), PER_SCENARIO)
        sigma = torch.tensor(list(SCENARIOS.values()))[:, None]
        self.scale = 1e-3 * (sigma * self.normal(*self.shape)).exp()
        self.scale[-1] *= 1e3  # eps stays small against all of them
        self.phase = self.uniform(PER_SCENARIO) * 2 * math.pi

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)

    def at(self, step: int) -> torch.Tensor:
        rows = dict(zip(SCENARIOS, self.normal(*self.shape)))
        mean = torch.sin(2 * math.pi * step / 1000 + self.phase)
        rows["σ=1.5, t(3)"] /= self.normal(3, PER_SCENARIO).square().mean(0).sqrt()
        rows["drift"][::2] += mean[::2]
        rows["quiet"].mul_(0.1).add_(mean)
        rows["rows"] *= (self.uniform(PER_SCENARIO // 64) < 0.02).repeat_interleave(64)
        if step > 0.2 * self.steps:
            rows["stops"].view(-1, 64)[::4] = 0
        if step > 0.4 * self.steps:
            rows["drop"] /= 30
        rows["spikes"] *= torch.where(self.uniform(PER_SCENARIO) < 2e-5, 300.0, 1.0)
        return torch.stack(list(rows.values())) * self.scale


def philox(seed: int, counter: int) -> int:
    """First word of Philox4x32-10 for the counter (counter, 0, 0, 0)."""
    low, key = 0xFFFFFFFF, [seed & 0xFFFFFFFF, seed >> 32]
    c = [counter, 0, 0, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ key[0], b & low, a >> 32 ^ c[3] ^ key[1], a & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return c[0]


class NoiseSource:
    """The same r for every code. Dither as the kernels': 24 bits for each element of an optimizer's first tensor."""

    def __init__(self, numel: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed + 1)
        x = torch.arange(numel // 8) ^ philox(seed, 0)  # one start for each group of 8 elements, in int64
        for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
            x = ((x ^ x >> shift) * multiplier) & 0xFFFFFFFF
        self.start = ((x ^ x >> 16)[:, None] + torch.arange(8) * 0x6A09E6).view(-1)

    def at(self, step: int, shape: torch.Size) -> Noise:
        dither = (self.start + step * 0x9E3779) & 0xFFFFFF
        random = torch.randint(0, 1 << 24, self.start.shape, generator=self.generator)
        noise = {"dither": dither / 2**24, "random bits": random / 2**24}
        return {"nearest": torch.tensor(0.5), **{name: r.view(shape) for name, r in noise.items()}}


# --------------------------------------------------------------------------------------------------------- optimizers


@dataclass
class Simulated:
    """Adam or Lion whose moments are kept in codes, of one tensor that holds a row for each scenario."""

    rule: str
    betas: tuple[float, float]
    codes: Codes
    m: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    v: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def update(self, gradient: torch.Tensor, step: int, noise: Noise) -> torch.Tensor:
        """Takes the moments a step further and returns the update divided by -lr."""
        beta1, beta2 = self.betas
        m_code, v_code = self.codes
        if self.rule == "lion":
            update = (beta1 * self.m + (1 - beta1) * gradient).sign()
            m = beta2 * self.m + (1 - beta2) * gradient
        else:
            m = beta1 * self.m + (1 - beta1) * gradient
            v = beta2 * self.v + (1 - beta2) * gradient * gradient
            # This step still sees the exact moments, as a fused kernel does: only what is kept is rounded.
            update = m / (1 - beta1**step) / (root(v / (1 - beta2**step)) + EPS)
            self.v = v_code.stored(v, noise) if v_code else v
        self.m = m_code.stored(m, noise) if m_code else m
        return update


class Engine:
    """fusedopt's Adam with 8-bit states, on the CPU."""

    def __init__(self, betas: tuple[float, float], seed: int) -> None:
        import fusedopt

        self.param = torch.nn.Parameter(torch.zeros(len(SCENARIOS), PER_SCENARIO))
        options = {"state_dtype": "int8", "min_8bit_size": 0, "seed": seed}
        self.optimizer = fusedopt.Adam([self.param], lr=1.0, betas=betas, eps=EPS, **options)

    @torch.no_grad()
    def update(self, gradient: torch.Tensor, step: int, noise: Noise) -> torch.Tensor:
        self.param.zero_()
        self.param.grad = gradient
        self.optimizer.step()
        return -self.param.detach()

    @property
    def v(self) -> torch.Tensor:
        return self.optimizer.torch_state_dict()["state"][0]["exp_avg_sq"]


Optimizer = Simulated | Engine


# ------------------------------------------------------------------------------------------------------- measurements


class Comparison:
    """A run and how it differs from the one in fp32. Sums have one value a scenario."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.largest, self.difference_sq, self.exact_sq = (torch.zeros(len(SCENARIOS)) for _ in range(3))
        self.moved = torch.zeros(len(SCENARIOS), PER_SCENARIO)
        self.v_ratios: list[torch.Tensor] = []

    def add(self, update: torch.Tensor, exact: torch.Tensor, late: bool) -> None:
        self.largest = torch.maximum(self.largest, update.abs().amax(1))
        self.moved += update
        if late:
            self.difference_sq += (update - exact).square().sum(1)
            self.exact_sq += exact.square().sum(1)

    def sample_v(self, exact: torch.Tensor) -> None:
        v, exact = self.optimizer.v[USUAL], exact[USUAL]
        self.v_ratios.append(v[exact > 0] / exact[exact > 0])

    def max_update(self) -> float:
        return self.largest[USUAL].max().item()

    def errors(self) -> list[float]:
        return (self.difference_sq / self.exact_sq).sqrt()[USUAL].tolist()

    def moved_error(self, exact: Comparison) -> float:
        return ((self.moved - exact.moved).norm(dim=1) / exact.moved.norm(dim=1))[USUAL].max().item()

    def v_percentiles(self) -> list[float]:
        return torch.cat(self.v_ratios).quantile(torch.tensor([0.5, 0.05, 0.95])).tolist()


def simulate(optimizers: list[Optimizer], steps: int, seed: int) -> list[Comparison]:
    """Runs all side by side; the first is the fp32 one."""
    gradients = Gradients(steps, seed)
    source = NoiseSource(math.prod(gradients.shape), seed)
    runs = [Comparison(optimizer) for optimizer in optimizers]
    for step in range(1, steps + 1):
        gradient = gradients.at(step)
        noise = source.at(step, gradient.shape)
        late = step > steps * 2 // 3
        updates = [run.optimizer.update(gradient, step, noise) for run in runs]
        for run, update in zip(runs, updates):
            run.add(update, updates[0], late)
            if late and step % 20 == 0 and runs[0].optimizer.v.dim():
                run.sample_v(runs[0].optimizer.v)
    return runs


# ------------------------------------------------------------------------------------------------------------- report


@dataclass
class Report:
    """A titled table of text, for GitHub."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return f"{self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(value: float) -> str:
    """Three digits or so."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _name(codes: Codes) -> str:
    m_code, v_code = codes
    if m_code is None:
        return "fp32"
    if v_code is None or str(m_code) == str(v_code):
        return str(m_code)
    if m_code.curve == v_code.curve:
        return f"{m_code} / {str(v_code).removeprefix(v_code.curve + ', ')}"
    return f"{m_code} / {v_code}"


def _error_columns(run: Comparison, exact: Comparison) -> list[str]:
    errors = run.errors()
    return [_number(statistics.median(errors)), _number(max(errors)), _number(run.moved_error(exact))]


def report_adam(steps: int, seed: int, engine: bool) -> Report:
    """Both moments in 8 bits. Errors are of the first betas."""
    names = [_name(codes) for codes in ADAM_CODES] + ["fusedopt.Adam"] * engine
    all_runs = []
    for betas in BETAS:
        optimizers: list[Optimizer] = [Simulated("adam", betas, codes) for codes in ADAM_CODES]
        all_runs.append(simulate(optimizers + [Engine(betas, seed)] * engine, steps, seed))
    rows = []
    for name, *runs in zip(names, *all_runs):
        median, low, high = map(_number, runs[0].v_percentiles())
        largest = [_number(run.max_update()) for run in runs]
        largest.append(_number(max(run.largest[-1].item() for run in runs)))
        rows.append([name, *largest, *_error_columns(runs[0], all_runs[0][0]), f"{median} [{low}, {high}]"])
    largest_of = [f"max update, β = {betas[0]}, {betas[1]}" for betas in BETAS]
    columns = ["code of m / of v", *largest_of, "wide", "error, median", "worst", "moved", "v / exact"]
    title = f"Adam, both moments in 8 bits. wide: the largest of all β; errors and v: β = {BETAS[0]}"
    return Report(title, columns, rows)


def report_lion(steps: int, seed: int) -> Report:
    exact, *runs = simulate([Simulated("lion", (0.9, 0.99), codes) for codes in LION_CODES], steps, seed)
    rows = [[_name(codes), *_error_columns(run, exact)] for codes, run in zip(LION_CODES[1:], runs)]
    return Report("Lion, β = 0.9, 0.99", ["code of m", "error, median", "worst", "moved"], rows)


@click.command(help=__doc__.split("\n")[0])
@click.option("--steps", type=click.IntRange(min=60), default=1200, show_default=True, help="Lion: a third.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--engine", is_flag=True, help="Also run fusedopt.Adam on the CPU.")
def main(steps: int, seed: int, engine: bool) -> None:
    torch.set_num_threads(1)  # tensors are small
    print(report_adam(steps, seed, engine))
    print(report_lion(steps // 3, seed))


if __name__ == "__main__":
    main()
