"""Gradient accumulation in float32, whatever the gradients' dtype: one launch per micro-batch, none for the last."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed

from . import _C, passes
from .checks import check_dense, check_grad, check_param
from .optim.base import FusedOptimizer
from .plan import Bucket, DeviceTables, TensorRow, build_tables, dtype_code, like_parameter

__all__ = ["GradAccumulator"]

_ALIGNMENT = 256
"""Bytes at whose multiples main gradients begin."""


@dataclass
class _Main:
    """One parameter's main gradient."""

    buffer: torch.Tensor
    tensor: torch.Tensor
    """A part of ``buffer``, in the parameter's shape and, if that is dense, layout."""
    held: _C.Held
    """Whether it holds anything; shared with the optimizer's plan."""
    grad_dtype: torch.dtype | None = None
    """Of the gradients seen last; None before the first."""

    def fits(self, param: torch.Tensor) -> bool:
        return self.tensor.shape == param.shape and self.tensor.device == param.device


@dataclass
class _Plan:
    """Of the accumulate pass. Valid until ``refresh`` says otherwise."""

    tables: list[DeviceTables]
    watch: _C.Watch
    groups: list[dict]
    """What the watch compares the parameters with."""
    rows: list[tuple[torch.Tensor, _Main, Bucket | None, int]]
    """Parameter, main gradient, and where its gradient's address goes."""

    def refresh(self, params: list[torch.Tensor], staged: list[torch.Tensor]) -> bool:
        """Finds the gradients; ``staged`` receives those that had to be laid out as their parameter."""
        relayout: list[int] = []
        self.groups[0]["params"] = params
        if not self.watch.refresh(self.groups, _NO_STATE, relayout):
            return False
        for i in relayout:
            param, main, bucket, slot = self.rows[i]
            staged.append(like_parameter(param.grad, main.tensor))
            bucket.table.set_grad(slot, staged[-1].data_ptr() or 2)
        return True


_NO_STATE: dict = {}


class GradAccumulator:
    r"""Sums the gradients of several micro-batches into main gradients of higher precision.

    After each micro-batch but the last, :meth:`accumulate` folds every ``.grad`` into its main gradient, in one launch
    for all, and frees it; the first one writes, so nothing is ever zeroed. The last micro-batch is not folded:
    ``optimizer.step()`` reads main gradient and ``.grad`` together. With g\ :sub:`k` the gradient of micro-batch k and
    w\ :sub:`k` its weight, the step sees Σ w\ :sub:`k` g\ :sub:`k` / Σ w\ :sub:`k` ("mean") or Σ w\ :sub:`k` g\ :sub:`k`
    ("sum")::

        accumulator = fusedopt.GradAccumulator(optimizer)
        for i, micro_batch in enumerate(micro_batches):
            loss(micro_batch).backward()
            if i + 1 < len(micro_batches):
                accumulator.accumulate()
        optimizer.step()
        optimizer.zero_grad()

    A non-finite element of any micro-batch stays one in the main gradient, so clipping, ``nonfinite="skip"`` and
    :class:`fusedopt.GradScaler` see it. The loss scale must not change between the micro-batches of a step, which
    ``GradScaler`` sees to by itself. ``optimizer.step()`` and ``optimizer.zero_grad()`` begin anew; main gradients stay
    where they are in memory.

    Args:
        target: an optimizer of this library; or any other ``torch.optim.Optimizer`` or iterable of parameters, for
            which :meth:`grads` or :meth:`assign_grads` hand over the result.
        dtype: of main gradients, torch.float32 or torch.bfloat16; float64 parameters always have float64 ones.
        reduction: "mean" (weighted, over the micro-batches) or "sum", for losses that are divided already.
        hooks: fold each gradient in the backward pass as soon as it is complete, in a launch of its own, so that only
            one ``.grad`` exists at a time. The last micro-batch is then folded too; :meth:`accumulate` after all
            others says where one ends.

    Attributes:
        weight: of the micro-batch under way, 1.0 unless it was set: a number, or a one-element tensor, which is not
            waited for. With ``hooks`` set it before the backward pass. :meth:`accumulate` and ``optimizer.step()`` put
            it back to 1.0.

    Raises:
        TypeError: other dtypes; parameters that are not dense floating-point tensors.
        ValueError: an unknown reduction; an optimizer that has an accumulator already.
    """

    def __init__(
        self,
        target: torch.optim.Optimizer | Iterable[torch.Tensor],
        dtype: torch.dtype = torch.float32,
        *,
        reduction: str = "mean",
        hooks: bool = False,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(
                f"GradAccumulator: got dtype={dtype}, expected torch.float32 or torch.bfloat16; pass one of them"
            )
        if reduction not in ("mean", "sum"):
            raise ValueError(f"GradAccumulator: got reduction={reduction!r}, expected 'mean' or 'sum'; choose one")
        self.optimizer = target if isinstance(target, torch.optim.Optimizer) else None
        self._listed = [] if self.optimizer else list(target)
        self.dtype, self.reduction = dtype, reduction
        self._mains: dict[torch.Tensor, _Main] = {}
        self._plan: _Plan | None = None
        self._staged: list[torch.Tensor] = []
        self._hooks: list[Any] = []
        for i, param in enumerate(self.params):
            check_param(f"GradAccumulator: params[{i}]", param)
        if isinstance(self.optimizer, FusedOptimizer):
            self.optimizer._attach_accumulator(self)
        self.reset()
        if hooks:
            self._adopt(self.params)
            self._hooks = [
                param.register_post_accumulate_grad_hook(self._fold) for param in self.params if param.requires_grad
            ]

    @property
    def params(self) -> list[torch.Tensor]:
        """All parameters, in the order of the param groups."""
        if self.optimizer is None:
            return self._listed
        return list(chain.from_iterable(group["params"] for group in self.optimizer.param_groups))

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The memory of all main gradients: few one-dimensional tensors."""
        return list({id(main.buffer): main.buffer for main in self._mains.values()}.values())

    @property
    def micro_batches(self) -> int:
        """How many have been folded completely since the last step."""
        return self._count

    # ---- folding ------------------------------------------------------------------------------------------

    def accumulate(self, weight: float | torch.Tensor | None = None) -> None:
        """Folds the gradients of one micro-batch into the main gradients and frees them.

        Args:
            weight: of this micro-batch, for instance its number of tokens; by default ``self.weight``.

        Raises:
            RuntimeError: no parameter has a gradient; sparse gradients; the first call inside a CUDA graph capture.
            ValueError, TypeError: a gradient, or a parameter, whose shape, device or dtype does not fit; a weight that is
                not a finite number >= 0. Nothing has been folded then.
        """
        self._set_weight(self.weight if weight is None else weight)
        plan = self._refreshed()
        if plan.watch.num_grads():
            passes.begin(plan.tables, passes.StepScalars(grad_weight=self.weight), ("accumulate",))
            passes.accumulate(plan.tables)
            plan.watch.hold()
            plan.watch.drop_grads()
            self._staged.clear()
        elif not self._open:
            raise RuntimeError(
                "GradAccumulator.accumulate: got no gradients, expected those of a micro-batch; call it after backward()"
            )
        self._close()

    def _fold(self, param: torch.Tensor) -> None:
        """The same for one parameter, inside the backward pass."""
        main, grad = self._mains[param], param.grad
        check_grad("GradAccumulator: a gradient", grad, param)
        if not main.fits(param):
            raise ValueError(_MOVED.format(tuple(main.tensor.shape), main.tensor.device, tuple(param.shape), param.device))
        with torch.no_grad():
            if isinstance(self.weight, torch.Tensor) or self.weight != 1.0:
                wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
                grad = grad.to(wide) * torch.as_tensor(self.weight, dtype=wide, device=grad.device)
            main.tensor.add_(grad) if main.held.value else main.tensor.copy_(grad)
        main.held.value, self._open = True, True
        param.grad = None

    def _close(self) -> None:
        """The end of a micro-batch."""
        self._weights.append(self.weight)
        self._count += 1
        self._open, self.weight = False, 1.0

    def _set_weight(self, weight: float | torch.Tensor) -> None:
        if isinstance(weight, torch.Tensor):
            if weight.numel() != 1:
                raise ValueError(
                    f"GradAccumulator: got a weight of shape {tuple(weight.shape)}, expected one element; pass a scalar"
                )
        elif not (math.isfinite(weight) and weight >= 0.0):
            raise ValueError(f"GradAccumulator: got weight={weight}, expected a finite number >= 0; pass one")
        self.weight = weight

    def reset(self) -> None:
        """Drops what was accumulated. The memory stays."""
        for main in self._mains.values():
            main.held.value = False
        self._count = 0
        self._weights: list[float | torch.Tensor] = []
        self._open = False  # whether hooks have folded a part of a micro-batch that has not ended
        self.weight: float | torch.Tensor = 1.0

    # ---- the result ---------------------------------------------------------------------------------------

    def grads(self) -> list[torch.Tensor | None]:
        """Folds what is left in ``.grad``, divides, and hands over the main gradients, by parameter; then begins anew.

        None where a parameter got no gradient in any micro-batch. The tensors are valid until the next fold.

        Raises:
            RuntimeError: there is nothing to hand over. As :meth:`accumulate` else.
        """
        if self._open or any(param.grad is not None for param in self.params):
            self.accumulate()
        if not self._count:
            raise RuntimeError(
                "GradAccumulator.grads: got no gradients, expected those of a micro-batch; call it after backward()"
            )
        divisor = self._divisor([])
        mains = [self._mains.get(param) for param in self.params]
        grads = [main.tensor if main and main.held.value else None for main in mains]
        if isinstance(divisor, torch.Tensor) or divisor != 1.0:
            for buffer in self.buffers:
                buffer.div_(divisor.to(buffer.device) if isinstance(divisor, torch.Tensor) else divisor)
        self.reset()
        return grads

    def assign_grads(self) -> None:
        """Puts the result of :meth:`grads` into ``.grad``, in each parameter's dtype, for anybody's optimizer."""
        for param, grad in zip(self.params, self.grads()):
            param.grad = None if grad is None else grad.to(param.dtype)

    def all_reduce(self, group: Any = None) -> None:
        """Averages the main gradients over the processes of a group, in the dtype in which they are kept.

        For micro-batches in ``DistributedDataParallel.no_sync()``: then call it once before the step; a last micro-batch
        outside of ``no_sync`` is averaged by DDP itself. All processes must have accumulated as many micro-batches;
        parameters without a gradient in one process count as 0 there.
        """
        for main in self._mains.values():
            if not main.held.value:
                main.tensor.zero_()
                main.held.value = True
        for buffer in self.buffers:
            torch.distributed.all_reduce(buffer, group=group)
            buffer.div_(torch.distributed.get_world_size(group))

    # ---- what the optimizer asks for ----------------------------------------------------------------------

    @property
    def holds(self) -> bool:
        """Whether any gradient has been folded since the last step."""
        return self._count > 0 or self._open

    def main_grad(self, where: str, param: torch.Tensor) -> _Main | None:
        """Of a parameter; ValueError where the parameter has been moved or resized meanwhile."""
        main = self._mains.get(param)
        if main is None or main.fits(param):
            return main
        if main.held.value:
            raise ValueError(
                f"{where}: " + _MOVED.format(tuple(main.tensor.shape), main.tensor.device, tuple(param.shape), param.device)
            )
        return None

    def step_scalars(self, own: bool) -> dict[str, float | torch.Tensor]:
        """Weight and divisor of the step. own: whether any parameter has a ``.grad``, which belongs to the last
        micro-batch, as what hooks have folded since the last call of :meth:`accumulate` does."""
        self._set_weight(self.weight)
        return {"grad_weight": self.weight, "grad_divisor": self._divisor([self.weight] if own or self._open else [])}

    def release(self, param: torch.Tensor) -> None:
        """A parameter has been updated alone, inside a backward pass: its main gradient is used up."""
        if param in self._mains:
            self._mains[param].held.value = False

    def _divisor(self, last: Sequence[float | torch.Tensor]) -> float | torch.Tensor:
        weights = [*self._weights, *last]
        if self.reduction == "sum" or not weights:
            return 1.0
        total = sum(weights)
        if not isinstance(total, torch.Tensor) and total == 0.0:
            raise ValueError(
                f"GradAccumulator: got weights {weights}, expected one of them above 0; give an empty step no step()"
            )
        return total

    def bytes(self) -> int:
        """Of all main gradients."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers)

    def detach(self) -> None:
        """Removes hooks, gives the memory back and leaves the optimizer as if there had been no accumulator."""
        for hook in self._hooks:
            hook.remove()
        if isinstance(self.optimizer, FusedOptimizer):
            self.optimizer._attach_accumulator(None)
        self._hooks, self._plan = [], None
        self._mains.clear()
        self.reset()

    # ---- checkpoints --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What has been accumulated since the last step; tensors share memory with it. Call it between micro-batches."""
        mains = {i: self._mains.get(param) for i, param in enumerate(self.params)}
        return {
            "main_grads": {i: main.tensor for i, main in mains.items() if main and main.held.value},
            "weights": list(self._weights),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues a sum that :meth:`state_dict` has saved.

        Raises:
            ValueError: missing keys, parameters that are not there, other shapes. Nothing has been changed then.
        """
        where, params = "GradAccumulator.load_state_dict", self.params
        if not {"main_grads", "weights"} <= state.keys():
            raise ValueError(
                f"{where}: got keys {sorted(map(str, state))}, expected 'main_grads' and 'weights'; pass state_dict()"
            )
        for i, grad in state["main_grads"].items():
            if not 0 <= i < len(params) or not isinstance(grad, torch.Tensor) or grad.shape != params[i].shape:
                expected = tuple(params[i].shape) if 0 <= i < len(params) else f"one of {len(params)} parameters"
                raise ValueError(
                    f"{where}: main_grads[{i}] has shape {tuple(getattr(grad, 'shape', ()))}, expected {expected}; load "
                    "the state of the same model"
                )
        self.reset()
        self._adopt(params)
        for i, grad in state["main_grads"].items():
            main = self._mains[params[i]]
            main.tensor.copy_(grad)
            main.held.value = True
        self._weights, self._count = list(state["weights"]), len(state["weights"])

    # ---- memory and plan ----------------------------------------------------------------------------------

    def _refreshed(self) -> _Plan:
        self._staged.clear()
        params = self.params
        if self._plan is None or not self._plan.refresh(params, self._staged):
            self._plan = None
            self._plan = self._make_plan(params)
            if not self._plan.refresh(params, self._staged):
                raise RuntimeError("GradAccumulator.accumulate: parameters or gradients changed while they were read")
        return self._plan

    def _make_plan(self, params: list[torch.Tensor]) -> _Plan:
        for i, param in enumerate(params):
            where = f"GradAccumulator.accumulate: params[{i}]"
            check_dense(where, param)
            self.main_grad(where, param)
            if param.grad is not None:
                check_grad(f"{where}.grad", param.grad, param)
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "GradAccumulator.accumulate: got the first call, or the first one after parameters changed, inside a "
                "CUDA graph capture, where tables cannot be copied; call it once before the capture"
            )
        self._adopt(params)
        mains = [self._mains[param] if param in self._mains else None for param in params]
        active = []
        for param, main in zip(params, mains):
            if param.grad is not None:
                main.grad_dtype = param.grad.dtype
            if main and main.grad_dtype:
                active.append((param, main))
        rows = [
            TensorRow(param.numel(), param.device, main.grad_dtype, main_grad=main.tensor) for param, main in active
        ]
        tables, places = build_tables(None, rows)
        passes.prepare(tables)
        found = {param: place for (param, _), place in zip(active, places)}
        plan = _Plan(tables, _C.Watch(), [{"params": params}], [])
        for param, main in zip(params, mains):
            bucket, slot = found.get(param, (None, -1))
            plan.watch.add(
                param,
                main.tensor if main else param,
                0,
                dtype_code(main.grad_dtype) if bucket else -1,
                bucket.table if bucket else None,
                slot,
                False,
                main.held if bucket else None,
            )
            plan.rows.append((param, main, bucket, slot))
        plan.watch.remember_state(_NO_STATE)
        return plan

    def _adopt(self, params: list[torch.Tensor]) -> None:
        """Gives main gradients to all parameters that need one and have none."""
        new: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for param in params:
            main = self._mains.get(param)
            if (param.requires_grad or param.grad is not None) and (main is None or not main.fits(param)):
                dtype = torch.float64 if param.dtype == torch.float64 else self.dtype
                new.setdefault((param.device, dtype), []).append(param)
        for (device, dtype), own in new.items():
            step = _ALIGNMENT // dtype.itemsize
            starts = [0]
            for param in own:
                starts.append(starts[-1] + -(-param.numel() // step) * step)
            buffer = torch.zeros(starts[-1], dtype=dtype, device=device)
            for param, start in zip(own, starts):
                strides = torch.empty_like(param, device="meta").stride()
                self._mains[param] = _Main(buffer, buffer.as_strided(param.shape, strides, start), _C.Held())
        if new and isinstance(self.optimizer, FusedOptimizer):
            self.optimizer._forget_plan()


_MOVED = (
    "the main gradient has shape {} on {}, the parameter {} on {}, expected the same; call reset() before a parameter is "
    "moved or resized"
)
