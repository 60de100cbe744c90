"""The table of optimizers under test, one row per optimizer and variant."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .. import optim, specs
from ..optim.base import Options


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row: an optimizer of fusedopt, its keyword arguments, the reference rule it follows and its peer in torch."""

    name: str
    optimizer: str
    rule: str
    kwargs: dict[str, Any]
    peer: Callable[..., torch.optim.Optimizer] | None

    def __str__(self) -> str:
        return self.name

    @property
    def rule_spec(self) -> specs.RuleSpec:
        return specs.RULES[self.rule]

    def takes(self, **kwargs: Any) -> bool:
        """Whether the optimizer has these arguments: as in torch, not all have `fused`."""
        named = inspect.signature(getattr(optim, self.optimizer)).parameters.keys() | Options.__annotations__.keys()
        return kwargs.keys() <= named

    def make(self, params: Any, **extra: Any) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = getattr(optim, self.optimizer)(params, **{**self.kwargs, **extra})
        return made

    def make_peer(self, params: Any, **extra: Any) -> torch.optim.Optimizer:
        assert self.peer is not None, f"{self} has no peer in torch"
        return self.peer(params, **{**self.kwargs, **extra})

    @property
    def has_peer(self) -> bool:
        """Whether this torch has an optimizer that takes the same arguments (old ones lack decoupled_weight_decay)."""
        return self.peer is not None and self.kwargs.keys() <= inspect.signature(self.peer).parameters.keys()


ADAM, ADAMW, RADAM = torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam
SGD, RMSPROP, ADAGRAD = torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad

DECAY = {"lr": 1e-2, "weight_decay": 0.1}
UPHILL = {**DECAY, "maximize": True}
MOMENTUM = {"lr": 3e-2, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}
NESTEROV = {"lr": 1e-2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.3}
MEMORY = {"momentum": 0.8, "alpha": 0.9}
SUMS = {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.3, "eps": 1e-6, "weight_decay": 0.1}

VARIANTS = [
    Variant("adam", "Adam", "adam", {}, ADAM),
    Variant("adam-l2", "Adam", "adam", {"lr": 1e-2, "weight_decay": 0.1}, ADAM),
    Variant("adam-maximize", "Adam", "adam", {"lr": 1e-2, "weight_decay": 0.1, "maximize": True}, ADAM),
    Variant("adam-eps", "Adam", "adam", {"lr": 0.1, "betas": (0.6, 0.8), "eps": 1e-2, "weight_decay": 0.01}, ADAM),
    Variant("adam-decoupled", "Adam", "adamw", {"weight_decay": 0.1, "decoupled_weight_decay": True}, ADAM),
    Variant("adam-amsgrad", "Adam", "adam_amsgrad", {"amsgrad": True, **UPHILL}, ADAM),
    Variant("adamw", "AdamW", "adamw", {}, ADAMW),
    Variant("adamw-decay", "AdamW", "adamw", {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}, ADAMW),
    Variant("adamw-maximize", "AdamW", "adamw", {"lr": 1e-2, "eps": 1e-5, "maximize": True}, ADAMW),
    Variant("adamw-amsgrad", "AdamW", "adamw_amsgrad", {"amsgrad": True, "betas": (0.7, 0.8), **DECAY}, ADAMW),
    Variant("lion", "Lion", "lion", {}, None),
    Variant("lion-decay", "Lion", "lion", {"lr": 3e-3, "betas": (0.95, 0.98), "weight_decay": 0.5}, None),
    Variant("lion-maximize", "Lion", "lion", {"lr": 1e-2, "weight_decay": 0.1, "maximize": True}, None),
    Variant("sgd", "SGD", "sgd", {}, SGD),
    Variant("sgd-l2", "SGD", "sgd", {"lr": 0.1, "weight_decay": 0.1}, SGD),
    Variant("sgd-maximize", "SGD", "sgd", UPHILL, SGD),
    Variant("sgd-momentum", "SGD", "sgd_momentum", MOMENTUM, SGD),
    Variant("sgd-nesterov", "SGD", "sgd_momentum", {**NESTEROV, "maximize": True}, SGD),
    Variant("sgdw", "SGDW", "sgdw", {}, None),
    Variant("sgdw-decay", "SGDW", "sgdw", UPHILL, None),
    Variant("sgdw-momentum", "SGDW", "sgdw_momentum", {**MOMENTUM, "maximize": True}, None),
    Variant("sgdw-nesterov", "SGDW", "sgdw_momentum", NESTEROV, None),
    Variant("rmsprop", "RMSprop", "rmsprop", {}, RMSPROP),
    Variant("rmsprop-l2", "RMSprop", "rmsprop", {"alpha": 0.7, "eps": 1e-5, **UPHILL}, RMSPROP),
    Variant("rmsprop-momentum", "RMSprop", "rmsprop_momentum", {**MEMORY, **DECAY}, RMSPROP),
    Variant("rmsprop-centered", "RMSprop", "rmsprop_centered", {"centered": True, **DECAY}, RMSPROP),
    Variant("rmsprop-both", "RMSprop", "rmsprop_centered_momentum", {"centered": True, **MEMORY, **UPHILL}, RMSPROP),
    Variant("adagrad", "Adagrad", "adagrad", {}, ADAGRAD),
    Variant("adagrad-l2", "Adagrad", "adagrad", SUMS, ADAGRAD),
    Variant("adagrad-maximize", "Adagrad", "adagrad", UPHILL, ADAGRAD),
    Variant("radam", "RAdam", "radam", {}, RADAM),
    Variant("radam-l2", "RAdam", "radam", {"betas": (0.8, 0.95), "eps": 1e-5, **DECAY}, RADAM),
    Variant("radam-decoupled", "RAdam", "radam", {"decoupled_weight_decay": True, **UPHILL}, RADAM),
    Variant("lamb", "LAMB", "lamb", {}, None),
    Variant("lamb-decay", "LAMB", "lamb", {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}, None),
    Variant("lamb-l2", "LAMB", "lamb", {"adam_w_mode": False, "grad_averaging": False, **UPHILL}, None),
    Variant("lamb-nvlamb", "LAMB", "lamb", {"use_nvlamb": True, "weight_decay": 0, "bias_correction": False}, None),
]
BY_NAME = {case.name: case for case in VARIANTS}
