"""Hooks on parameters that do not keep their owner alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch.utils.hooks import RemovableHandle

__all__ = ["on_gradient"]


def on_gradient(param: torch.Tensor, method: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """Calls a bound method with ``param`` whenever a backward pass has completed its gradient.

    Not once the method's object is gone. It is held weakly: Python's collector does not see what a tensor's hooks hold,
    so an object that holds the tensor, as an optimizer does, would never be freed.
    """
    weak = weakref.WeakMethod(method)

    def hook(param: torch.Tensor) -> None:
        alive = weak()
        if alive is not None:
            alive(param)

    handle: RemovableHandle = param.register_post_accumulate_grad_hook(hook)
    return handle
