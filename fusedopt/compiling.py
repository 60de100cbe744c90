"""Keeping methods out of the graphs of ``torch.compile``, which cannot see what our kernels do behind addresses."""

from __future__ import annotations

import torch

__all__ = ["keep_out_of_graphs"]


def keep_out_of_graphs(cls: type, *names: str, alone: tuple[str, ...] = ()) -> None:
    """Makes ``torch.compile`` break its graph at methods of ``cls`` and run them, and all they call, as they are.

    For constructors: decorators would import the compiler, which takes a second, when the package is imported, while
    ``torch.optim.Optimizer.__init__`` does it anyway. Costs a call of about 1 microsecond.

    alone: methods for which that is too much; they call nothing but builtins and methods among ``names``.
    """
    for name in (*names, *alone):
        method = getattr(cls, name)
        if not getattr(method, "_torchdynamo_disable", False):
            setattr(cls, name, torch.compiler.disable(method, recursive=name not in alone))
