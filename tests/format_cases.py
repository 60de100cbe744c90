"""Every combination of formats, and the judge of their steps: the float64 reference, started from the decoded state.

What a step may add to the reference's result, on top of the bound of the arithmetic (`bounds.py`), is the rounding of
the format at the store, and that is known:

- plain formats and fp32 masters: half an ulp of the dtype;
- split16: half an ulp of float32, because it is a float32; split8: half of 256 ulp of float32, the 8 bits it lacks;
- stochastic rounding: one of the two neighbours in bfloat16;
- int8: one of the two neighbouring codes of the block, see `assert_codes`.
"""

import dataclasses
import itertools

import torch
from bounds import Bounded, assert_within, bounded_step, concatenated, hyper_of
from cases import assert_same_bits, bits, hard_values, normal, parameter, storage
from torch import Tensor

from fusedopt import formats, reference, specs

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
GRAD_DTYPES = [FLOAT32, BFLOAT16, FLOAT16]
BLOCK = specs.STATE_BLOCK

# Around vector widths, the 8 elements that share random bits, int8 blocks and the chunks of the engines.
SIZES = [0, 1, 7, 8, 9, 255, 256, 257, 1025, 8191, 8193]


@dataclasses.dataclass(frozen=True)
class Combination:
    """Formats of one param group."""

    dtype: torch.dtype
    master_weights: str | None = None
    state_dtype: str | None = None
    stochastic_rounding: bool = False

    def __str__(self) -> str:
        main = str(self.dtype).removeprefix("torch.")
        extra = "stochastic" if self.stochastic_rounding else self.master_weights
        return "-".join([main, *([extra] if extra else []), f"{self.state_dtype}_states"])

    @property
    def options(self) -> dict:
        chosen = {key: getattr(self, key) for key in ("master_weights", "state_dtype", "stochastic_rounding")}
        return {key: value for key, value in chosen.items() if value}

    @property
    def state_format(self) -> torch.dtype:
        """Of a first moment that is not too small for it."""
        default = FLOAT32 if self.master_weights else self.dtype
        return {None: default, "fp32": FLOAT32, "bf16": BFLOAT16, "int8": torch.int8}[self.state_dtype]

    @property
    def keeps_more(self) -> bool:
        """Whether there is something to remember besides the states of the rule."""
        return bool(self.master_weights or self.stochastic_rounding)

    @property
    def is_random(self) -> bool:
        return self.stochastic_rounding or self.state_dtype == "int8"


PARAM_SIDES = [
    {"dtype": BFLOAT16},
    {"dtype": BFLOAT16, "master_weights": "fp32"},
    {"dtype": BFLOAT16, "master_weights": "split16"},
    {"dtype": BFLOAT16, "master_weights": "split8"},
    {"dtype": BFLOAT16, "stochastic_rounding": True},
    {"dtype": FLOAT16},
    {"dtype": FLOAT16, "master_weights": "fp32"},
    {"dtype": FLOAT32},
]
COMBINATIONS = [
    Combination(**side, state_dtype=states)
    for side, states in itertools.product(PARAM_SIDES, [None, "fp32", "bf16", "int8"])
]
BY_NAME = {str(c): c for c in COMBINATIONS}
# One for each way of keeping a parameter and each of keeping states.
FEW = [
    Combination(BFLOAT16, "fp32"),
    Combination(BFLOAT16, "split16", "int8"),
    Combination(BFLOAT16, "split8", "bf16"),
    Combination(BFLOAT16, "split8", "int8"),
    Combination(BFLOAT16, None, "bf16", True),
    Combination(BFLOAT16, None, "int8", True),
    Combination(FLOAT16, "fp32", "int8"),
    Combination(FLOAT32, None, "int8"),
]


# ---- gradients ----------------------------------------------------------------------------------------------------


def set_gradient(p, grad: Tensor) -> None:
    """In `.grad` where torch lets it, else in `main_grad`, which all of the parameter's gradients must then be in."""
    if grad.dtype == p.dtype and not hasattr(p, "main_grad"):
        p.grad = grad
    else:
        p.main_grad = grad


def gradient(p) -> Tensor | None:
    main_grad = getattr(p, "main_grad", None)
    return p.grad if main_grad is None else main_grad


def hard_gradient(p, dtype, seed) -> Tensor:
    """As `hard_values`, within what float16 states can square where the parameter is float16."""
    values = hard_values(p.shape, FLOAT16 if p.dtype == FLOAT16 else dtype, p.device, seed)
    return values.clamp(-200, 200).to(dtype) if p.dtype == FLOAT16 else values


# ---- before a step ------------------------------------------------------------------------------------------------


def in_order(t: Tensor, like: Tensor) -> Tensor:
    """The elements of `t`, shaped like the parameter `like`, in the order of its memory, on the CPU, in whole blocks.

    Padded with zeros, which every rule leaves zero, so that tensors end to end keep their blocks.
    """
    dense = torch.empty_like(like.detach(), dtype=t.dtype).copy_(t.detach())
    flat = formats.in_memory_order(dense).cpu()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK))


@dataclasses.dataclass
class Before:
    """What a parameter, its gradient and its decoded states were. Flat tensors as `in_order` has them."""

    tensor: Tensor
    value: Tensor
    grad: Tensor | Bounded
    states: dict[str, Tensor]
    storage: Tensor
    grad_bits: Tensor | None
    """None where `.grad` does not matter."""
    step: int
    group: dict


def before_step(opt, rule: str) -> list[Before]:
    """A record of every parameter that has a gradient. States that do not exist yet are zero."""
    records = []
    for group in opt.param_groups:
        for p in group["params"]:
            if gradient(p) is None:
                continue
            state = opt.state.get(p, {})
            value = formats.decode_master(state, p).float()
            zeros = {name: torch.zeros_like(value) for name in reference.STATES[rule]}
            states = formats.decode_states(state, specs.RULES[rule]) if state else zeros
            flat = {name: in_order(states[name].float(), p) for name in reference.STATES[rule]}
            records.append(
                Before(
                    tensor=p,
                    value=in_order(value, p),
                    grad=in_order(gradient(p), p),
                    states=flat,
                    storage=storage(p).clone(),
                    grad_bits=gradient(p).clone(),
                    step=int(state.get("step", 0)),
                    group=dict(group),
                )
            )
    return records


# ---- after it -----------------------------------------------------------------------------------------------------


def assert_stepped(opt, rule: str, records: list[Before], **transform) -> None:
    """As `bounds.assert_stepped`, for parameters and states in any format."""
    assert records, "no parameter has a gradient: nothing was tested"
    alike = {}
    for r in records:
        state = opt.state.get(r.tensor, {})
        options = (*hyper_of(r.group, rule).items(), r.group["maximize"])
        key = (r.tensor.dtype, r.step, options, tuple(sorted((k, v.dtype) for k, v in state.items())), random(r.group))
        own = id(r.tensor) if specs.RULES[rule].norms else 0  # rules of two phases are not elementwise
        alike.setdefault(f"{key} {own}", []).append(r)
    for group in alike.values():
        _assert_values(opt, rule, group, transform)
    for r in records:
        _assert_kept(opt, rule, r)


def random(group: dict) -> bool:
    return bool(group.get("stochastic_rounding"))


def _expected(rule: str, records: list[Before], transform: dict) -> dict[str, Bounded]:
    first = records[0]
    states = {name: torch.cat([r.states[name] for r in records]) for name in first.states}
    return bounded_step(
        rule,
        torch.cat([r.value for r in records]),
        concatenated([r.grad for r in records]),
        states,
        step=first.step + 1,
        maximize=first.group["maximize"],
        hyper=hyper_of(first.group, rule),
        **transform,
    )


def _assert_values(opt, rule: str, records: list[Before], transform: dict) -> None:
    expected = _expected(rule, records, transform)
    state, group = opt.state.get(records[0].tensor, {}), records[0].group

    def end_to_end(get) -> Tensor:
        return torch.cat([in_order(get(r.tensor), r.tensor) for r in records])

    where = f"{rule}, {records[0].tensor.dtype} with {list(state)}, {[r.tensor.numel() for r in records]} end to end"
    assert_param(
        end_to_end(lambda p: p),
        end_to_end(lambda p: formats.decode_master(opt.state.get(p, {}), p)),
        expected["param"],
        extra=next((state[key].dtype for key in ("master_param", "param_remainder") if key in state), None),
        stochastic=random(group),
        where=where,
    )
    for name, moment in zip(specs.RULES[rule].states, specs.RULES[rule].moments):
        exact = expected[name]
        codes = end_to_end(lambda p, name=name: opt.state[p][name])
        what = f"{name}, {where}"
        if not codes.is_floating_point():
            scales = torch.cat([opt.state[r.tensor][f"{name}_scale"].cpu() for r in records])
            values = end_to_end(lambda p, name=name: formats.decode_states(opt.state[p], specs.RULES[rule])[name])
            assert_codes(values, scales, exact, moment, what)
            if moment == "second":
                positive = exact.value - 2 * exact.error >= MAY_VANISH
                assert codes[positive].count_nonzero() == positive.sum(), f"code 0 for a second moment > 0, {what}"
        elif random(group) and codes.dtype == BFLOAT16:
            assert_neighbour(codes, exact, what)
        else:
            assert_within(codes, exact, what)


def assert_param(main, value, exact: Bounded, extra, stochastic: bool, where: str) -> None:
    """`main` is the model's tensor, `value` what is kept in all, `extra` the dtype of what is kept beside `main`."""
    what = f"param, {where}"
    if stochastic:
        return assert_neighbour(main, exact, what)
    if extra is None:
        return assert_within(main, exact, what)
    if extra == torch.int8:
        # 128 ulp of float32 are half of the last place kept.
        assert_near(value, exact, 128 * reference.ulp(exact.value.abs() + 2 * exact.error, FLOAT32), what)
    else:
        assert_within(value, exact, what)
    if extra == FLOAT32:
        return assert_same_bits(main, value.to(main.dtype))
    off = (main.double() - value.double()).abs()
    nearest = (off <= reference.ulp(value, main.dtype) / 2) | (main.double() == value.double())
    assert nearest.all(), f"the model's tensor is not the rounded value, {where}"


def assert_near(actual: Tensor, exact: Bounded, rounding: Tensor, what: str) -> None:
    """Within the bound of `exact` plus `rounding`."""
    got = actual.double()
    off = (got - exact.value).abs()
    close = (off <= 2 * exact.error + rounding) | (got == exact.value) | (got.isnan() & exact.value.isnan())
    wrong = (~close).nonzero().flatten().tolist()
    assert not wrong, (
        f"{what}: {len(wrong)} elements are wrong, first at {wrong[0]}: got {got[wrong[0]].item()!r}, expected "
        f"{exact.value[wrong[0]].item()!r}, off by {(off / (2 * exact.error + rounding))[wrong[0]].item():.3g} bounds"
    )


def neighbours(value: Tensor) -> tuple[Tensor, Tensor]:
    """The largest bfloat16 <= value and the least >= value. float64; equal where bfloat16 holds the value."""
    spacing = reference.ulp(value, BFLOAT16)
    return (value / spacing).floor() * spacing, (value / spacing).ceil() * spacing


def assert_neighbour(actual: Tensor, exact: Bounded, what: str) -> None:
    """One of the two bfloat16 numbers around the value, which is known to within the bound."""
    low, _ = neighbours(exact.value - 2 * exact.error)
    _, high = neighbours(exact.value + 2 * exact.error)
    got = actual.double()
    wrong = (~((low <= got) & (got <= high))).nonzero().flatten().tolist()
    assert not wrong, (
        f"{what}: {len(wrong)} elements are no neighbour, first at {wrong[0]}: got {got[wrong[0]].item()!r}, expected "
        f"{low[wrong[0]].item()!r} to {high[wrong[0]].item()!r}"
    )


# ---- int8 ----------------------------------------------------------------------------------------------------------

MANTISSA = {"first": 3, "second": 4}
OCTAVES = 15  # from the unit to the power of two at or below the largest of a block
UNIT_ZERO = 2.0 ** (OCTAVES - 126)  # blocks whose largest is smaller would have a subnormal unit
MAY_VANISH = 2.0**-125  # second moments below it may get code 0

# Roundings of float32 between a moment in the compute type and its decoded code: the square root, 2 + y, and half of
# the square's. Powers of two are multiplied and divided by exactly.
ENCODING = 3 * 2.0**-24


def code_step(y: Tensor, moment: str) -> Tensor:
    """Distance from the code at or below `y` >= 0, in units, to the next: codes are the upper bits of 2 + y."""
    _, exponent = torch.frexp(2 + y)
    return torch.ldexp(torch.ones_like(y), exponent - 1 - MANTISSA[moment])


def unit_of(largest: Tensor) -> Tensor:
    """The unit of blocks with these largest magnitudes; inf where nothing is known of them."""
    _, exponent = torch.frexp(largest)
    unit = torch.ldexp(torch.ones_like(largest), exponent - 1 - OCTAVES)
    return torch.where(largest < UNIT_ZERO, 0.0, torch.where(largest.isinf(), largest, unit))


def assert_codes(values: Tensor, scales: Tensor, exact: Bounded, moment: str, what: str, steps: float = 1.0) -> None:
    """Decoded values lie within `steps` code steps of the reference's, block by block; scales are those of the largest.

    In the domain of the code, which is the square root for second moments. A second moment > 0 has no code 0, which is
    a difference of one step at most.
    """
    exact = exact if moment == "first" else Bounded(exact.value, exact.error, FLOAT32).sqrt()
    got = values.double() if moment == "first" else values.double().sqrt()
    target, error = exact.value.view(-1, BLOCK), 2 * exact.error.view(-1, BLOCK)
    got, unit = got.view(-1, BLOCK), scales.double().view(-1, 1)

    most, least = ((target.abs() + sign * error).amax(1, keepdim=True) for sign in (1, -1))
    assert (torch.frexp(unit)[0] * (unit != 0) * 2 % 1 == 0).all(), f"a scale is no power of two, {what}"
    assert (unit <= unit_of(most)).all(), f"a scale is too large, {what}"
    assert (unit >= unit_of(least)).all(), f"a scale is too small, {what}"

    y = (target.abs() + error) / unit
    # `y` is the upper end, so the step may be that of the octave above, where rounding reaches into it.
    bound = error + unit * (steps * code_step(y, moment) + (2 + y) * ENCODING)
    if moment == "second":
        bound += 2.0**-75  # the root of half of the smallest float32: squares are rounded to its multiples
    bound = torch.where(unit == 0, target.abs() + error, bound)
    wrong = (~((got - target).abs() <= bound)).reshape(-1).nonzero().flatten().tolist()
    if wrong:
        at = wrong[0]
        raise AssertionError(
            f"{what}: {len(wrong)} codes are wrong, first at {at}: got {got.reshape(-1)[at].item()!r}, expected "
            f"{target.reshape(-1)[at].item()!r} to within {bound.reshape(-1)[at].item()!r}"
        )


def _assert_kept(opt, rule: str, r: Before) -> None:
    """Keys, dtypes and layouts of the state; the gradient and the gaps of the parameter are as they were."""
    p, state = r.tensor, opt.state.get(r.tensor, {})
    dense = torch.empty_like(p.detach())
    for key, value in state.items():
        if key == "step":
            assert (float(value), value.shape, value.dtype) == (r.step + 1, (), FLOAT32)
        elif key.endswith("_scale"):
            assert (value.dtype, value.shape) == (FLOAT32, (-(-p.numel() // BLOCK),))
        else:
            assert value.shape == p.shape and (value.stride() == dense.stride() or not p.numel())
    if r.grad_bits is not None:
        assert_same_bits(gradient(p), r.grad_bits)
    gaps = torch.ones(r.storage.numel(), dtype=torch.bool)
    gaps.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(False)
    assert torch.equal(bits(storage(p))[gaps], bits(r.storage)[gaps]), "wrote between the elements of a parameter"


def assert_state_formats(opt, combination: Combination, rule: str, min_8bit_size: int) -> None:
    """The state of every parameter has the keys and dtypes that its combination says."""
    for p, state in opt.state.items():
        first = combination.state_format
        blocked = first == torch.int8 and p.numel() >= min_8bit_size
        if first == torch.int8 and not blocked:
            first = FLOAT32
        wanted = {"step": FLOAT32} if specs.RULES[rule].states or combination.keeps_more else {}
        for name, moment in zip(specs.RULES[rule].states, specs.RULES[rule].moments):
            wanted[name] = torch.uint8 if blocked and moment == "second" else first
            if blocked:
                wanted[f"{name}_scale"] = FLOAT32
        if combination.master_weights == "fp32":
            wanted["master_param"] = FLOAT32
        elif combination.master_weights:
            wanted["param_remainder"] = {"split16": torch.int16, "split8": torch.int8}[combination.master_weights]
        assert {key: value.dtype for key, value in state.items()} == wanted


# ---- models -------------------------------------------------------------------------------------------------------


def make_params(combination: Combination, sizes=SIZES, device="cpu", seed=0, values=normal) -> list:
    return [parameter(values((n,), combination.dtype, device, seed=100 * seed + i)) for i, n in enumerate(sizes)]
