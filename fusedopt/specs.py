"""What the rules and formats are called, and in which order their parts travel. Standard library only.

A new rule needs a row in ``RULES`` here, a header in ``csrc/rules/``, a reference in ``reference.py`` and an optimizer
in ``optim/``. A new format needs a row here, a struct in ``csrc/formats/`` and, in ``formats.py``, its conversion.
Tests assert that these registries agree.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "COMPLEX_DTYPES",
    "CPU_CHUNK",
    "CUDA_CHUNK",
    "CUDA_CHUNK_BLOCKED",
    "DTYPES",
    "NORM_TYPES",
    "PARAM_FORMATS",
    "RULES",
    "STATE_BLOCK",
    "STATE_FORMATS",
    "TRITON_CHUNK",
    "TRITON_CHUNK_BLOCKED",
    "DTypeSpec",
    "ParamFormatSpec",
    "RuleSpec",
    "StateFormatSpec",
]


@dataclass(frozen=True, eq=False)  # compared by identity: rules are keys of every step's tables
class RuleSpec:
    """An update rule: the names that its C++ header, its state dict and its param groups share."""

    name: str
    family: str
    """What the optimizer's class and the function are called. Its rules differ in their states or where decay goes."""
    cpp: str
    """The struct in ``csrc/rules/``."""
    states: tuple[str, ...]
    """State keys, as in ``torch.optim``, in the order of the header's ``kStateNames``."""
    moments: tuple[str, ...]
    """"first" (any sign) or "second" (never negative), by state: ``moment`` of the header."""
    hyper: tuple[tuple[str, str, int], ...]
    """(hyper-parameter, param group key, index into the key's tuple or -1), in the order of ``kHyperNames``."""
    index: int
    """Position in ``csrc/rules/all.h``."""
    norms: int = 0
    """How many norms over the tensor its update needs: ``kNorms`` of a rule of two phases, else 0."""
    torch_counts: bool = True
    """Whether torch's state has ``step``, and all states from the first step on. SGD has neither: a buffer appears when
    momentum does. Such states may lack both here; ``step`` then counts from the buffer on."""


_LR = ("lr", "lr", -1)
_BETAS = (("beta1", "betas", 0), ("beta2", "betas", 1))
_EPS = ("eps", "eps", -1)
_WEIGHT_DECAY = ("weight_decay", "weight_decay", -1)
_MOMENTUM = ("momentum", "momentum", -1)

_ADAM_HYPER = (_LR, *_BETAS, _EPS, _WEIGHT_DECAY)
_ADAM = {"exp_avg": "first", "exp_avg_sq": "second"}
_AMSGRAD = {**_ADAM, "max_exp_avg_sq": "second"}

_SGD_HYPER = (_LR, _WEIGHT_DECAY)
_SGD_MOMENTUM_HYPER = (_LR, _MOMENTUM, ("dampening", "dampening", -1), _WEIGHT_DECAY, ("nesterov", "nesterov", -1))
_BUFFER = {"momentum_buffer": "first"}

_RMSPROP_HYPER = (_LR, ("alpha", "alpha", -1), _EPS, _WEIGHT_DECAY, _MOMENTUM)
_SQUARE = {"square_avg": "second"}
_MEAN = {"grad_avg": "first"}

_ADAGRAD_HYPER = (_LR, ("lr_decay", "lr_decay", -1), _WEIGHT_DECAY, _EPS)
_RADAM_HYPER = (*_ADAM_HYPER, ("decoupled_weight_decay", "decoupled_weight_decay", -1))

_LAMB_FLAGS = ("bias_correction", "adam_w_mode", "grad_averaging", "use_nvlamb")
_LAMB_HYPER = (*_ADAM_HYPER, *((name, name, -1) for name in _LAMB_FLAGS))

_NORMS = {"lamb": 2}
"""Of the rules of two phases, by name."""

# name, family, C++ struct, states with their moments, hyper-parameters; in the order of csrc/rules/all.h
_ROWS: tuple[tuple[str, str, str, dict[str, str], tuple[tuple[str, str, int], ...]], ...] = (
    ("adam", "adam", "Adam", _ADAM, _ADAM_HYPER),
    ("adamw", "adamw", "AdamW", _ADAM, _ADAM_HYPER),
    ("lion", "lion", "Lion", {"exp_avg": "first"}, (_LR, *_BETAS, _WEIGHT_DECAY)),
    ("adam_amsgrad", "adam", "AdamAmsgrad", _AMSGRAD, _ADAM_HYPER),
    ("adamw_amsgrad", "adamw", "AdamWAmsgrad", _AMSGRAD, _ADAM_HYPER),
    ("sgd", "sgd", "Sgd", {}, _SGD_HYPER),
    ("sgd_momentum", "sgd", "SgdMomentum", _BUFFER, _SGD_MOMENTUM_HYPER),
    ("sgdw", "sgdw", "Sgdw", {}, _SGD_HYPER),
    ("sgdw_momentum", "sgdw", "SgdwMomentum", _BUFFER, _SGD_MOMENTUM_HYPER),
    ("rmsprop", "rmsprop", "Rmsprop", _SQUARE, _RMSPROP_HYPER),
    ("rmsprop_momentum", "rmsprop", "RmspropMomentum", {**_SQUARE, **_BUFFER}, _RMSPROP_HYPER),
    ("rmsprop_centered", "rmsprop", "RmspropCentered", {**_SQUARE, **_MEAN}, _RMSPROP_HYPER),
    (
        "rmsprop_centered_momentum",
        "rmsprop",
        "RmspropCenteredMomentum",
        {**_SQUARE, **_BUFFER, **_MEAN},
        _RMSPROP_HYPER,
    ),
    ("adagrad", "adagrad", "Adagrad", {"sum": "second"}, _ADAGRAD_HYPER),
    ("radam", "radam", "RAdam", _ADAM, _RADAM_HYPER),
    ("lamb", "lamb", "Lamb", _ADAM, _LAMB_HYPER),
)

RULES: dict[str, RuleSpec] = {
    name: RuleSpec(
        name,
        family,
        cpp,
        tuple(states),
        tuple(states.values()),
        hyper,
        index,
        norms=_NORMS.get(name, 0),
        torch_counts=not family.startswith("sgd"),
    )
    for index, (name, family, cpp, states, hyper) in enumerate(_ROWS)
}


@dataclass(frozen=True)
class DTypeSpec:
    """A dtype of plain tensors."""

    name: str
    """torch's name."""
    cpp: str
    """The struct in ``csrc/formats/plain.h``."""
    code: int
    """The value of ``DType`` in ``csrc/core/structs.h``."""
    size: int
    """Bytes per element."""


DTYPES: dict[str, DTypeSpec] = {
    spec.name: spec
    for spec in (
        DTypeSpec("float32", "Float32", 0, 4),
        DTypeSpec("bfloat16", "BFloat16", 1, 2),
        DTypeSpec("float16", "Float16", 2, 2),
        DTypeSpec("float64", "Float64", 3, 8),
    )
}

COMPLEX_DTYPES = ("complex64", "complex128")
"""Of tensors that kernels see as twice as many float32 or float64. In the watch their codes follow those above."""


@dataclass(frozen=True)
class ParamFormatSpec:
    """How a parameter rests in memory: its own tensor, and what is kept beside it."""

    name: str
    cpp: str
    """The struct in ``csrc/formats/param.h``."""
    code: int
    """The value of ``ParamFormat`` in ``csrc/core/structs.h``."""
    dtype: str
    """Of the parameter."""
    extra: tuple[str, str] | None = None
    """State key and dtype of the second tensor, shaped like the parameter."""
    random: bool = False
    """Whether storing it takes random bits."""


_MASTER = ("master_param", "float32")

PARAM_FORMATS: dict[str, ParamFormatSpec] = {
    spec.name: spec
    for spec in (
        ParamFormatSpec("float32", "PlainFloat32", 0, "float32"),
        ParamFormatSpec("bfloat16", "PlainBFloat16", 1, "bfloat16"),
        ParamFormatSpec("float16", "PlainFloat16", 2, "float16"),
        ParamFormatSpec("float64", "PlainFloat64", 3, "float64"),
        ParamFormatSpec("bfloat16+master", "MasterBFloat16", 4, "bfloat16", _MASTER),
        ParamFormatSpec("float16+master", "MasterFloat16", 5, "float16", _MASTER),
        ParamFormatSpec("split16", "Split16", 6, "bfloat16", ("param_remainder", "int16")),
        ParamFormatSpec("split8", "Split8", 7, "bfloat16", ("param_remainder", "int8")),
        ParamFormatSpec("bfloat16+stochastic", "StochasticParam", 8, "bfloat16", random=True),
    )
}

STATE_BLOCK = 256
"""Elements that share a scale in blocked state formats: ``kStateBlock`` of ``csrc/formats/state.h``."""


@dataclass(frozen=True)
class StateFormatSpec:
    """How an optimizer state rests in memory."""

    name: str
    cpp: str
    """The struct in ``csrc/formats/state.h``."""
    code: int
    """The value of ``StateFormat`` in ``csrc/core/structs.h``."""
    dtypes: tuple[str, str]
    """Of the tensor that holds a first and a second moment."""
    blocked: bool = False
    """Whether a second tensor, ``<state>_scale``, holds one float32 for each ``STATE_BLOCK`` elements."""
    random: bool = False
    """Whether storing it takes random bits."""

    def dtype(self, moment: str) -> str:
        return self.dtypes[0 if moment == "first" else 1]


STATE_FORMATS: dict[str, StateFormatSpec] = {
    spec.name: spec
    for spec in (
        StateFormatSpec("float32", "StateFloat32", 0, ("float32", "float32")),
        StateFormatSpec("bfloat16", "StateBFloat16", 1, ("bfloat16", "bfloat16")),
        StateFormatSpec("float16", "StateFloat16", 2, ("float16", "float16")),
        StateFormatSpec("float64", "StateFloat64", 3, ("float64", "float64")),
        StateFormatSpec("int8", "Int8State", 4, ("int8", "uint8"), blocked=True, random=True),
        StateFormatSpec("bfloat16+stochastic", "StochasticState", 5, ("bfloat16", "bfloat16"), random=True),
    )
}

NORM_TYPES: dict[float, tuple[str, int]] = {2.0: ("kL2", 0), 1.0: ("kL1", 1), float("inf"): ("kInf", 2)}
"""Order of the norm → name and value of ``NormType`` in ``csrc/core/structs.h``."""

CPU_CHUNK = 1 << 16
"""Elements per unit of work of a CPU thread: large against its cost, small against a model."""

CUDA_CHUNK = 1 << 13
"""Elements per thread block: 32 for each of 256 threads."""

CUDA_CHUNK_BLOCKED = 1 << 15
"""The same where states are blocked: such kernels are pipelined and need time to get going."""

TRITON_CHUNK = 1 << 13
"""Elements per Triton program, which goes through them tile by tile."""

TRITON_CHUNK_BLOCKED = 1 << 15
"""The same where states are blocked: what all elements share would take as long as they do."""
