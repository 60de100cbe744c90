"""Reading the peers' checkpoint files without the peers, and without running anything that a file asks for."""

from __future__ import annotations

import pickle
from os import PathLike
from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["Foreign", "load_file"]

_PACKAGES = (
    "torchao",
    "deepspeed",
    "transformer_engine",
    "flashoptim",
    "bitsandbytes",
    "apex",
    "optimi",
    "lion_pytorch",
)
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "set"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch", "Tensor"),  # of tensors with attributes
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.serialization", "_get_layout"),
    ("torch.storage", "UntypedStorage"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.torch_version", "TorchVersion"),
}


class Foreign:
    """Stands for an object of a package that is not imported: its attributes as they were saved, and no methods.

    A class of its name is made for each of the package's classes that a file mentions.
    """

    def __init__(self, *args: Any) -> None:
        self.args = args


def load_file(path: str | PathLike[str]) -> Any:
    """What ``torch.save`` wrote to a file, on the CPU.

    Tensors, containers and numbers are read as they are. Objects of the peers' classes (torchao's quantised states,
    DeepSpeed's fragment addresses and loss scalers) become :class:`Foreign` ones, whether the package is installed or
    not. Nothing else is made, and no function of theirs is called.

    Raises:
        ValueError: an object of any other class.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return _found(str(path), super().find_class, module, name)

    module = SimpleNamespace(Unpickler=Unpickler, load=_refuse_legacy, __name__="fusedopt.convert.files")
    return torch.load(path, map_location="cpu", pickle_module=module, weights_only=False)


def _refuse_legacy(*args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "load_file: got a file in the format of torch < 1.6, expected a zip archive; save it again with a newer torch"
    )


def _found(path: str, find_class: Any, module: str, name: str) -> Any:
    if module.split(".")[0] in _PACKAGES:
        return type(name, (Foreign,), {"__module__": module})
    if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
        return _rebuilt
    if (module, name) == ("torch._utils", "_rebuild_wrapper_subclass"):
        return _unbuilt
    if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
        return find_class(module, name)
    raise ValueError(
        f"load_file: {path} holds an object of {module}.{name}, expected tensors, containers, numbers and the peers' "
        "states; read it with torch.load where you trust it, and pass on the optimizer's part"
    )


def _unbuilt(cls: type, *args: Any) -> Any:
    """A tensor subclass around other tensors: an object without attributes yet."""
    return object.__new__(cls)


def _rebuilt(make: Any, cls: type, args: tuple[Any, ...], state: Any) -> Any:
    """A tensor subclass, or a tensor with attributes."""
    if not issubclass(cls, Foreign):
        return make(*args)
    found = object.__new__(cls)
    found.__dict__.update(state[0] if isinstance(state, tuple) else state)
    return found
