"""A ``torch.amp.GradScaler`` that leaves the search for inf and NaN to the step of our optimizers."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.amp.grad_scaler import OptState

from .compiling import keep_out_of_graphs
from .optim import FusedOptimizer
from .optim.wrappers import check_unwrapped

__all__ = ["GradScaler"]


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` without a pass of its own over the gradients of a :class:`FusedOptimizer`.

    The optimizer's norm pass looks for inf and NaN and its update pass divides by the scale: two launches, with
    clipping too, then the scaler's own update of the scale. The host waits for nothing. The gradients are only read,
    so ``.grad`` stays scaled. ``optimizer.step`` is always called, and changes nothing on overflow; see
    ``optimizer.step_was_skipped``. Gradients may be float16.

    After ``unscale_(optimizer)``, which writes the gradients as torch's does, the step only takes over what was found.
    Other optimizers are served in torch's way. Constructor, ``scale``, ``update``, checkpoints and errors are torch's.

    What is found holds for all processes of the meshes that DTensor parameters lie on (FSDP2), and for those that the
    optimizer's ``norm_reduce`` combines. For plain tensors that differ between processes (FSDP1), without it, it holds
    for this process alone.
    """

    if not TYPE_CHECKING:  # the signature is torch's

        @functools.wraps(torch.amp.GradScaler.__init__)
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            keep_out_of_graphs(type(self), "step", "unscale_", "update")

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the scale, in place, and notes whether they hold inf or NaN; see torch.

        Raises:
            RuntimeError: called twice or after ``step``; gradients that are not in ``.grad``, which it could not reach.
            ValueError: float16 gradients.
            NotImplementedError: complex gradients.
        """
        if self._enabled and isinstance(optimizer, FusedOptimizer):
            check_unwrapped("GradScaler.unscale_", optimizer)
            _require_plain_grads(optimizer)
        super().unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """``optimizer.step(*args, **kwargs)`` on gradients divided by the scale, the identity if they hold inf or NaN.

        Raises:
            RuntimeError: called twice without ``update``; ``closure`` given by name.
            AssertionError: no loss was scaled yet.
            TypeError: a wrapper of Lightning's around an optimizer of ours.
        """
        served = self._enabled and "closure" not in kwargs and self._scale is not None
        if not isinstance(optimizer, FusedOptimizer) or not served:
            return super().step(optimizer, *args, **kwargs)
        check_unwrapped("GradScaler.step", optimizer)
        entry = self._per_optimizer_states[id(optimizer)]
        if entry["stage"] is OptState.STEPPED:
            return super().step(optimizer, *args, **kwargs)  # raises
        attributes = self._after_unscale(entry) if entry["stage"] is OptState.UNSCALED else self._unscaling(optimizer)
        result = _step_with(optimizer, attributes, args, kwargs)
        if "_nonfinite_found" in attributes:
            entry["found_inf_per_device"] = attributes["_nonfinite_found"]
        entry["stage"] = OptState.STEPPED
        return result

    def _unscaling(self, optimizer: FusedOptimizer) -> dict[str, Any]:
        """What makes a step divide by the scale, and by a ``grad_scale`` of the user's, and look for inf and NaN."""
        scale, own = self._get_scale_async(), optimizer.__dict__.get("grad_scale")
        return {"grad_scale": scale if own is None else scale * own, "_nonfinite_found": {}}

    def _after_unscale(self, entry: dict[str, Any]) -> dict[str, Any]:
        """What makes a step skip if ``unscale_`` found something. The gradients are divided already."""
        assert self._scale is not None
        found = [each.to(self._scale.device, non_blocking=True) for each in entry["found_inf_per_device"].values()]
        return {"found_inf": sum(found[1:], found[0])} if found else {}

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Backs off if any optimizer found inf or NaN since the last update, grows after enough steps without."""
        if self._enabled and new_scale is None:
            found = [each["found_inf_per_device"] for each in self._per_optimizer_states.values()]
            found = [each for each in found if each]
            if sum(map(len, found)) > 1:
                # torch adds the others to the first one in place, which may be a view of an optimizer's results.
                device = next(iter(found[0]))
                found[0][device] = found[0][device].clone()
        super().update(new_scale)


def _step_with(
    optimizer: FusedOptimizer, attributes: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls ``step`` with ``attributes`` set for its time.

    As with torch, a ``grad_scale`` or ``found_inf`` that was there before is used up; if the step fails it is put back.
    """
    given = optimizer.__dict__
    before = {key: given[key] for key in attributes if key in given}
    given.update(attributes)
    try:
        result = optimizer.step(*args, **kwargs)
        before.clear()
    finally:
        for key in attributes:
            given.pop(key, None)
        given.update(before)
    return result


def _require_plain_grads(optimizer: FusedOptimizer) -> None:
    where = f"GradScaler.unscale_({type(optimizer).__name__})"
    if optimizer._has_accumulated():
        raise RuntimeError(
            f"{where}: got accumulated main gradients, expected gradients in .grad alone; call scaler.step(optimizer) "
            "without unscale_, and let the optimizer clip with max_grad_norm"
        )
    for group in optimizer.param_groups:
        if any(param.grad is not None and param.grad.is_complex() for param in group["params"]):
            raise NotImplementedError(
                f"{where}: got complex gradients, expected real ones, which alone torch's kernel unscales; call "
                "scaler.step(optimizer) without unscale_, and let the optimizer clip with max_grad_norm"
            )
        if any(getattr(param, "main_grad", None) is not None for param in group["params"]):
            raise RuntimeError(
                f"{where}: got parameters with a main_grad, expected gradients in .grad alone; call "
                "scaler.step(optimizer) without unscale_, and let the optimizer clip with max_grad_norm"
            )
