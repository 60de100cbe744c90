"""torch's own test data base of optimizers, as far as our classes have its names."""

import dataclasses
import sys
import types
import unittest
import unittest.mock

import torch

try:
    import expecttest  # noqa: F401
except ImportError:  # torch's test modules import it; nothing of it is used here
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase
    sys.modules["expecttest"] = stand_in

# torch's test modules freeze the flags of torch.backends for the process; a Trainer that is tested in it sets some.
with unittest.mock.patch.object(torch.backends, "disable_global_flags", lambda: None):
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import fusedopt

__all__ = ["ERRORS", "INFOS", "INPUTS", "SCHEDULERS", "Input"]

INFOS = {info.optim_cls.__name__: info for info in optim_db if hasattr(fusedopt, info.optim_cls.__name__)}
"""Of the classes that we have, by name."""


@dataclasses.dataclass(frozen=True)
class Input:
    """Keyword arguments of torch's tests for one class."""

    name: str
    """Of the class."""
    description: str
    kwargs: dict

    def __str__(self) -> str:
        return f"{self.name}-{self.description}".replace(" ", "_")

    def ours(self, params, **extra) -> torch.optim.Optimizer:
        return getattr(fusedopt, self.name)(params, **self.copied(), **extra)

    def theirs(self, params) -> torch.optim.Optimizer:
        """torch's, one operation after the other, with coefficients in double: that is, not `capturable`."""
        kwargs = {key: value for key, value in self.copied().items() if key != "capturable"}
        return getattr(torch.optim, self.name)(params, **kwargs, foreach=False)

    def theirs_as_given(self, params) -> torch.optim.Optimizer:
        """The same, `capturable` too where it says so: then coefficients are in float32, as the tensor `step` is."""
        return getattr(torch.optim, self.name)(params, **self.copied(), foreach=False)

    def in_dtype(self, dtype: torch.dtype) -> "Input":
        """With tensors of that dtype, in which torch computes with them; here they are read as doubles."""
        return Input(self.name, self.description, self.copied(dtype))

    def copied(self, dtype: torch.dtype | None = None) -> dict:
        """Tensors of its own: schedulers write to them."""

        def clone(value):
            return value.clone().to(dtype or value.dtype) if isinstance(value, torch.Tensor) else value

        return {
            key: tuple(map(clone, value)) if isinstance(value, tuple) else clone(value)
            for key, value in self.kwargs.items()
        }


# Those for CUDA hold those for CPUs, and tensors as hyper-parameters.
INPUTS = [
    Input(name, given.desc, given.kwargs)
    for name, info in INFOS.items()
    for given in info.optim_inputs_func(device="cuda")
]

SCHEDULERS = [(name, tuple(makers)) for name, info in INFOS.items() for makers in info.scheduler_inputs]


def errors() -> list:
    """(name, parameters or None, keyword arguments, description, exception), of the errors of constructors."""
    found = []
    for name, info in INFOS.items():
        given = info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
        for each in given:
            assert each.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
            wrong = each.optimizer_error_input
            found.append((name, wrong.params, wrong.kwargs, wrong.desc, each.error_type))
    return found


ERRORS = errors()
