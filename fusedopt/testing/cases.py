"""Which cases there are: rule × format × backend × gradient dtype × transform × data set, in full and in a sample."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence

import torch

from .. import backends
from .data import DATA, TRANSFORMS, DataSet
from .formats import COMBINATIONS, Combination
from .variants import BY_NAME, VARIANTS, Variant

__all__ = ["Case", "foreign_cases", "full_cases", "guess_optimizer", "own_backends", "quick_cases", "select"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One optimizer on one data set. ``name`` is what filters look at."""

    variant: Variant
    format: Combination
    backend: str | None
    device: str
    grad_dtype: torch.dtype
    transform: str
    data: DataSet

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equal cases."""
        return (id(self.variant), id(self.format), self.backend, self.grad_dtype, self.transform, self.data.name)

    @property
    def name(self) -> str:
        grad = str(self.grad_dtype).removeprefix("torch.")
        parts = (self.variant.name, self.format, self.backend or "other", grad, self.transform, self.data.name)
        return "/".join(str(part) for part in parts)

    def __str__(self) -> str:
        return self.name


# One row of the table for each rule, with weight decay where it has one.
_CHOSEN = (
    "adam-l2", "adamw-decay", "lion-decay", "adam-amsgrad", "adamw-amsgrad", "sgd-l2", "sgd-momentum", "sgdw-decay",
    "sgdw-nesterov", "rmsprop-l2", "rmsprop-momentum", "rmsprop-centered", "rmsprop-both", "adagrad-l2", "radam-l2",
    "lamb-decay",
)  # fmt: skip
RULES = [BY_NAME[name] for name in _CHOSEN]
FORMATS = [*COMBINATIONS, Combination(torch.float64)]
PLAIN = [form for form in FORMATS if not form.options]
MIXED = DATA[0]


def own_backends(device: str) -> list[str]:
    """The backends of fusedopt that can run on a device of this machine."""
    found = []
    for name in backends.NAMES:
        try:
            backends.for_device(torch.device(device), name)
            found.append(name)
        except RuntimeError:
            continue
    return found


def grad_dtypes(form: Combination) -> list[torch.dtype]:
    """Gradients that parameters of a format may have, their own first."""
    if form.dtype == torch.float64:
        return [torch.float64]
    others = [torch.float32, torch.bfloat16, torch.float16]
    return [form.dtype, *(dtype for dtype in others if dtype != form.dtype)]


def _is_case(case: Case) -> bool:
    """Whether it means anything: micro-batches come as `.grad`, which has the parameter's dtype; a rule without states
    has no formats of states."""
    form = case.format
    own = case.transform != "accumulate" or case.grad_dtype == form.dtype
    formatted = case.variant.rule_spec.states or not form.state_dtype
    # Options of a group that one of two dtypes could not have are an error.
    mixable = not form.keeps_more and (form.dtype.itemsize == 2 or form.state_dtype is None)
    suits = case.data.suits(case.variant.rule, case.transform) and (mixable or not case.data.mixed)
    return own and bool(formatted) and suits


def _in_turn(
    variants: Sequence[Variant], forms: Sequence[Combination], data: Iterable[DataSet], device: str, backend: str | None
) -> list[Case]:
    """Every combination once, with gradient dtypes and transforms in turn."""
    cases = []
    numbered = itertools.product(enumerate(variants), enumerate(forms), enumerate(data))
    for (v, variant), (f, form), (d, each) in numbered:
        turn = v + f + d
        transform = each.transforms[turn % len(each.transforms)]
        dtypes = grad_dtypes(form) if transform != "accumulate" else [form.dtype]
        case = Case(variant, form, backend, device, dtypes[(turn // 2) % len(dtypes)], transform, each)
        if _is_case(case):
            cases.append(case)
    return cases


def _heavy_cases(
    variants: Sequence[Variant], forms: Sequence[Combination], device: str, backend: str | None
) -> list[Case]:
    """Each variant once with each heavy data set, in one of the formats, in turn."""
    cases = []
    for data in (each for each in DATA if each.heavy):
        for v, variant in enumerate(variants):
            form = forms[7 * v % len(forms)]  # 7: so that neighbours have other parameters and other states
            if not variant.rule_spec.states:
                form = Combination(form.dtype)
            cases.append(Case(variant, form, backend, device, form.dtype, data.transforms[0], data))
    return [case for case in cases if _is_case(case)]


def full_cases(device: str, chosen: Iterable[str]) -> list[Case]:
    """All cases of fusedopt's optimizers on a device, on these backends.

    Every rule × format × gradient dtype × transform on mixed values; every rule × format, and every variant × plain
    dtype, × adversarial data set, with gradient dtypes and transforms in turn; every rule once with the heavy ones.
    """
    light = [data for data in DATA if not data.heavy]
    cases = {}
    for backend in chosen:
        for variant, form, transform in itertools.product(RULES, FORMATS, TRANSFORMS):
            for dtype in grad_dtypes(form):
                case = Case(variant, form, backend, device, dtype, transform, MIXED)
                if _is_case(case):
                    cases[case.key] = case
        rest = _in_turn(RULES, FORMATS, light[1:], device, backend) + _in_turn(VARIANTS, PLAIN, light, device, backend)
        for case in rest + _heavy_cases(RULES, FORMATS, device, backend):
            cases.setdefault(case.key, case)
    return list(cases.values())


def _covered(case: Case, best: str | None) -> set[tuple[object, ...]]:
    """What of a case a sample must have: on the best backend pairs of properties, on others each property once."""
    form, transform, data = str(case.format), case.transform, case.data.name
    if case.backend != best:
        return {(case.backend, value) for value in (case.variant.rule, form, transform, data)}
    rule = case.variant.rule
    # Zeros or frozen parameters would say little of a format: that takes all magnitudes.
    telling = {(rule, form), (rule, transform)} if case.data is MIXED else set()
    return telling | {(rule, data), (form, data), (case.grad_dtype, transform)}


def quick_cases(cases: list[Case]) -> list[Case]:
    """A sample of ``cases``, without heavy ones unless there are no others. Of the first backend: each rule with each
    format and transform on mixed values, and each rule and each format with each data set, where ``cases`` has it. Of
    others: each of these at least once."""
    seen: set[tuple[object, ...]] = set()
    sample = []
    light = [case for case in cases if not case.data.heavy] or cases
    for least in (2, 1):  # first those that bring several, then what is missing
        for case in light:
            new = _covered(case, light[0].backend) - seen
            if len(new) >= least:
                seen |= new
                sample.append(case)
    return sample


# ---- other optimizers ---------------------------------------------------------------------------------------------


def guess_optimizer(factory: Callable[..., object]) -> str | None:
    """The optimizer of fusedopt whose name is in the name of a class, or None. apex's FusedAdam is AdamW by default."""
    name = getattr(factory, "__name__", "").lower()
    known = sorted({variant.optimizer for variant in VARIANTS}, key=len, reverse=True)  # AdamW before Adam
    guess = next((each for each in known if each.lower() in name), None)
    if guess == "Adam":
        mode = inspect.signature(factory).parameters.get("adam_w_mode")
        return "AdamW" if mode is not None and mode.default else "Adam"
    return guess


def foreign_cases(variants: list[Variant], dtypes: Iterable[torch.dtype], device: str) -> list[Case]:
    """Every variant × dtype × transform × data set, in plain formats with gradients of the parameters' dtype; of heavy
    data sets each variant has one case."""
    forms = [Combination(dtype) for dtype in dtypes]
    rows = itertools.product(variants, forms, [data for data in DATA if not data.heavy], TRANSFORMS)
    cases = [Case(variant, form, None, device, form.dtype, transform, data) for variant, form, data, transform in rows]
    return [case for case in cases if _is_case(case)] + _heavy_cases(variants, forms, device, None)


def select(cases: list[Case], **wanted: tuple[str, ...]) -> list[Case]:
    """The cases that have one of the wanted values of each property: rule, format, dtype, transform, case.

    rule: a rule, a variant or an optimizer. dtype: of the parameters. case: part of a case's name, or a data set.

    Raises:
        ValueError: no case is left, and which property was the last to leave none.
    """
    for key, values in wanted.items():
        if not values:
            continue
        left = [case for case in cases if any(_MATCHES[key](case, value) for value in values)]
        if not left:
            raise ValueError(
                f"{key}: got {', '.join(map(repr, values))}, which none of {len(cases)} cases has, expected such as "
                f"{', '.join(map(repr, _examples(cases, key)))}; see `fusedopt verify --list`"
            )
        cases = left
    return cases


def _examples(cases: list[Case], key: str) -> list[str]:
    return list(dict.fromkeys(_SHOWN[key](case) for case in cases))[:8]


_SHOWN: dict[str, Callable[[Case], str]] = {
    "rule": lambda case: case.variant.rule,
    "format": lambda case: str(case.format),
    "dtype": lambda case: str(case.format.dtype).removeprefix("torch."),
    "transform": lambda case: case.transform,
    "case": lambda case: case.data.name,
}
_MATCHES: dict[str, Callable[[Case, str], bool]] = {
    "rule": lambda case, value: value in (case.variant.rule, case.variant.name, case.variant.optimizer),
    "format": lambda case, value: value == str(case.format),
    "dtype": lambda case, value: value == _SHOWN["dtype"](case),
    "transform": lambda case, value: value == case.transform,
    "case": lambda case, value: value in case.name,
}
