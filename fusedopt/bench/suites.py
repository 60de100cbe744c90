"""Which cases ``fusedopt bench`` runs: suites, the most important case first, as a time limit leaves out the rest.

In ``STANDARD`` those come first that goals are set for, and of them those that take little time.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from .accumulation import CONTRACTS as ACCUMULATION_CONTRACTS
from .accumulation import FOLDS, AccumulationCase
from .contracts import HYPER, Case
from .workloads import COUNTS, FORMATS, SIZES, WORKLOADS, counted, sized

CONTRACTS = ("step", "clip_step", "scaler_clip_step", *ACCUMULATION_CONTRACTS)
"""That cases are chosen by; ``contracts.py`` and ``accumulation.py`` say what each is."""

OPTIMIZERS = tuple(HYPER)

MODELS = (
    *("gpt2-124M", "llama-1.3B", "llama-8B-shard", "resnet50", "vit-l", "1000-small", "10000-tiny", "one-huge"),
    "bert-large",
)
"""The workloads of the suite ``full``."""

Variant = tuple[str, str, str, str]
"""Workload, optimizer, format, contract."""

STANDARD: list[Variant] = [
    *[("llama-1.3B", "adamw", "fp32", contract) for contract in ("scaler_clip_step", "clip_step", "step")],
    *[("gpt2-124M", "adamw", "fp32", contract) for contract in ("scaler_clip_step", "clip_step", "step")],
    ("1000-small", "adamw", "fp32", "scaler_clip_step"),
    ("resnet50", "adamw", "fp32", "scaler_clip_step"),
    ("bert-large", "adamw", "fp32", "scaler_clip_step"),
    ("vit-l", "adamw", "fp32", "clip_step"),
    ("llama-8B-shard", "adamw", "bf16+split16", "clip_step"),
    ("llama-1.3B", "adamw", "bf16+split16", "clip_step"),
    ("llama-1.3B", "adamw", "bf16+split8+int8", "step"),
    ("llama-1.3B", "adamw", "bf16+int8", "step"),
    ("llama-1.3B", "adamw", "bf16", "step"),
    ("llama-1.3B", "lion", "fp32", "step"),
    ("one-huge", "adamw", "fp32", "clip_step"),
    ("10000-tiny", "adamw", "fp32", "scaler_clip_step"),
    ("llama-1.3B-misaligned", "adamw", "fp32", "step"),
    ("llama-1.3B-misaligned-apart", "adamw", "fp32", "step"),
    ("llama-1.3B-odd", "adamw", "fp32", "step"),
    ("llama-1.3B", "adamw", "fp16+fp32 master", "scaler_clip_step"),
    ("llama-1.3B", "adamw", "bf16+split16", "accumulated_clip_step"),
    ("llama-1.3B", "none", "bf16", "accumulate_first"),
    ("llama-1.3B", "none", "bf16", "accumulate"),
    ("1000-small", "adamw", "fp32", "clip_step"),
]

STANDARD_CPU: list[Variant] = [
    *[("cpu-100M", "adamw", "fp32", contract) for contract in ("clip_step", "step", "scaler_clip_step")],
    ("1000-small", "adamw", "fp32", "clip_step"),
    ("resnet50", "adamw", "fp32", "clip_step"),
    ("cpu-100M", "lion", "fp32", "step"),
    ("cpu-100M", "adamw", "bf16", "step"),
    ("cpu-100M", "adamw", "bf16+split16", "clip_step"),
    ("cpu-100M", "adamw", "fp32+int8", "step"),
]

QUICK: list[Variant] = [
    ("tiny", "adamw", "fp32", "clip_step"),
    ("tiny", "adamw", "bf16+split16", "step"),
    ("tiny", "none", "bf16", "accumulate"),
]

_RULES = ("sgd_momentum", "rmsprop", "adagrad", "radam", "adamw_amsgrad", "lion", "lamb", "sgd")


def suites(device_type: str) -> dict[str, list[Variant]]:
    """By name, for a kind of device."""
    cuda = device_type == "cuda"
    model = "llama-1.3B" if cuda else "cpu-100M"
    sizes = [size for size in SIZES if cuda or size <= 10**8]
    return {
        "standard": STANDARD if cuda else STANDARD_CPU,
        "formats": [
            (model, "adamw", format_, contract) for contract in ("step", "clip_step") for format_ in _formats()
        ],
        "rules": [(model, rule, "fp32", contract) for contract in ("step", "clip_step") for rule in _RULES],
        # 4e9 elements fit into 80 GB in bfloat16 alone
        "sizes": [(sized(size).name, "adamw", "fp32" if size < 2e9 else "bf16", "step") for size in sizes],
        "host": [(counted(count).name, "adamw", "fp32", "clip_step") for count in COUNTS],
        "full": list(full()),
        "quick": QUICK,
    }


def _formats() -> list[str]:
    """Those of one dtype follow one another: they share a model."""
    dtypes = [layout.dtype for layout in FORMATS.values()]
    return sorted(FORMATS, key=lambda name: dtypes.index(FORMATS[name].dtype))


def full() -> Iterable[Variant]:
    """All models, formats and contracts with AdamW."""
    for contract in CONTRACTS:
        for format_ in FORMATS:
            for model in MODELS:
                yield (model, "none" if contract in FOLDS else "adamw", format_, contract)


def make_case(workload: str, optimizer: str, format_: str, contract: str) -> Case:
    cls = AccumulationCase if contract in ACCUMULATION_CONTRACTS else Case
    return cls(workload, "none" if contract in FOLDS else optimizer, format_, contract)


def select_cases(
    suite: str | None,
    device_type: str,
    workloads: Sequence[str] = (),
    optimizers: Sequence[str] = (),
    formats: Sequence[str] = (),
    contracts: Sequence[str] = (),
) -> list[Case]:
    """The cases of a suite that are of the given workloads, ...; without a suite, each of them with each.

    Of what is not given all of the suite's are taken; without a suite, clip + AdamW in fp32 on a model.
    """
    if suite is not None:
        chosen = suites(device_type)[suite]
        wanted = (workloads, optimizers, formats, contracts)
        chosen = [one for one in chosen if all(not some or part in some for part, some in zip(one, wanted))]
        return [make_case(*one) for one in chosen]
    default = "gpt2-124M" if device_type == "cuda" else "cpu-100M"
    cases = [
        make_case(workload, optimizer, format_, contract)
        for workload in workloads or (default,)
        for optimizer in optimizers or ("adamw",)
        for format_ in formats or ("fp32",)
        for contract in contracts or ("clip_step",)
    ]
    return list(dict.fromkeys(cases))


def command_of(row: dict[str, object], device_type: str) -> str:
    """The command that measures one row again, with ours beside it; what is the default is left out."""
    workload, optimizer, format_, contract = (str(row[key]) for key in ("workload", "optimizer", "format", "contract"))
    parts = ["fusedopt bench", *(["--device cpu"] if device_type == "cpu" else []), f"--workload {workload}"]
    parts += [f"--optimizer {optimizer}"] if optimizer not in ("adamw", "none") else []
    parts += [f"--format {shlex.quote(format_)}"] if format_ != "fp32" else []
    parts += [f"--contract {contract}"]
    library = str(row["library"])
    if not library.startswith("fusedopt"):
        parts += [f"--against {library}"]
    elif library == "fusedopt-triton":
        parts += ["--backend triton"]
    elif library == "fusedopt-captured":
        parts += ["--against torch-captured"]
    return " ".join(parts)


def known(row: dict[str, object]) -> bool:
    """Whether ``fusedopt bench`` has what a row is about: other benchmarks have contracts of their own."""
    return row["workload"] in WORKLOADS and row["contract"] in CONTRACTS and row["format"] in FORMATS
