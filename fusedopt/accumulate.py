"""Gradient accumulation in float32, whatever the gradients' dtype: one launch per micro-batch, none for the last."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
import torch.distributed

from . import _C
from .backends import wanted
from .checks import check_grad, check_params
from .compiling import keep_out_of_graphs
from .hooks import on_gradient
from .main_grads import AccumulatePlan, MainGrad, check_grads, make_main_grads
from .optim.base import FusedOptimizer
from .optim.wrappers import check_unwrapped
from .sharding import is_sharded, local_grad, local_of, wrap_like

__all__ = ["GradAccumulator"]


class GradAccumulator:
    r"""Sums the gradients of several micro-batches into main gradients of higher precision.

    After each micro-batch but the last, :meth:`accumulate` folds every ``.grad`` into its main gradient, in one launch
    for all, and frees it; the first one writes, so nothing is ever zeroed. The last micro-batch is not folded:
    ``optimizer.step()`` reads main gradient and ``.grad`` together. With g\ :sub:`k` the gradient of micro-batch k and
    w\ :sub:`k` its weight, the step sees Σ w\ :sub:`k` g\ :sub:`k` / Σ w\ :sub:`k` ("mean") or
    Σ w\ :sub:`k` g\ :sub:`k` ("sum")::

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

    Of DTensors (FSDP2, tensor parallelism) each process adds up its own part, of gradients that the backward pass has
    added up over the mesh: weights, and numbers of micro-batches, must be the same in all processes.

    Args:
        target: an optimizer of this library; or any other ``torch.optim.Optimizer`` or iterable of parameters, for
            which :meth:`grads` or :meth:`assign_grads` hand over the result and begin anew.
        dtype: of main gradients, torch.float32 or torch.bfloat16; float64 and complex parameters always have ones of
            their own dtype.
        reduction: "mean" (weighted, over the micro-batches) or "sum", for losses that are divided already.
        hooks: fold each gradient in the backward pass as soon as it is complete, in launches of its own, so that only
            one ``.grad`` exists at a time. The last micro-batch is then folded too; :meth:`accumulate` after all
            others says where one ends.

    Raises:
        TypeError: other dtypes; parameters that are not dense floating-point or complex tensors.
        ValueError: no parameters; one of them twice; an unknown reduction; an optimizer that has an accumulator.
    """

    _total: float | torch.Tensor
    _weight: float | torch.Tensor

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
        if isinstance(target, torch.Tensor):
            raise TypeError("GradAccumulator: got a Tensor, expected an optimizer or parameters; pass [param]")
        if isinstance(target, FusedOptimizer):
            check_unwrapped("GradAccumulator", target)
        self.optimizer = target if isinstance(target, torch.optim.Optimizer) else None
        self._listed = [] if isinstance(target, torch.optim.Optimizer) else list(target)
        self.dtype, self.reduction = dtype, reduction
        check_params("GradAccumulator: params", self.params, sharded=True)
        if not self.params:
            raise ValueError("GradAccumulator: got no parameters, expected at least one; pass model.parameters()")
        self._mains: dict[torch.Tensor, MainGrad] = {}
        self._plan: AccumulatePlan | None = None
        self._hooks: list[Any] = []
        self._detached = False
        self._epoch = _C.Epoch()
        keep_out_of_graphs(type(self), "accumulate", "grads", "all_reduce", "_fold")
        self.reset()
        trained = [param for param in self.params if param.requires_grad] if hooks else []
        self._adopt(trained)
        if isinstance(self.optimizer, FusedOptimizer):
            self.optimizer._attach_accumulator(self)
        self._hooks = [on_gradient(param, self._fold) for param in trained]

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

    @property
    def weight(self) -> float | torch.Tensor:
        """Of the micro-batch under way: 1.0, unless set; :meth:`accumulate`, the step and :meth:`reset` set it back.

        A finite number >= 0, or a one-element tensor of such a value. Tensors are read on the device and not waited
        for, hence not checked; a sum of weights that is 0 then gives NaN. With ``hooks`` set it before the backward
        pass, where it multiplies the gradients.

        Raises:
            RuntimeError: hooks have folded a part of the micro-batch with the weight that there was.
        """
        return self._weight

    @weight.setter
    def weight(self, value: float | torch.Tensor) -> None:
        self._weight = self._checked_weight(value)

    # ---- folding ------------------------------------------------------------------------------------------

    def accumulate(self, weight: float | torch.Tensor | None = None) -> None:
        """Folds the gradients of one micro-batch into the main gradients and frees them.

        Args:
            weight: of this micro-batch, for instance its number of tokens; by default ``self.weight``.

        Raises:
            RuntimeError: no parameter has a gradient; sparse gradients; the first call inside a CUDA graph capture;
                after :meth:`detach`.
            ValueError, TypeError: a gradient, or a parameter, whose shape, device or dtype does not fit; a weight that
                is not a finite number >= 0. Nothing has been folded then.
        """
        if self._detached:
            raise RuntimeError(
                "GradAccumulator.accumulate: got a detached accumulator, expected one in use; make another"
            )
        weight = self._weight if weight is None else self._checked_weight(weight)
        plan = self._refreshed()
        if plan.watch.has_grads():
            plan.run(weight)
        elif not self._open:
            raise RuntimeError(
                "GradAccumulator.accumulate: got no gradients, expected a micro-batch's; call it after backward()"
            )
        self._close(weight)

    @torch.no_grad()
    def _fold(self, param: torch.Tensor) -> None:
        """The same for one parameter, inside the backward pass, with the same bits."""
        where, grad = "GradAccumulator: a parameter's gradient in backward()", param.grad
        if grad is None:  # released meanwhile
            return
        check_grad(where, grad, param)
        if is_sharded(param):
            grad = local_grad(where, grad, param)
        main = self.main_grad(where, param)
        if main is None:
            self._adopt([param])
            main = self._mains[param]
        weight, total = self._weight, main.tensor
        if grad.is_complex():  # a complex product may round otherwise than the pass
            grad, total = torch.view_as_real(grad.resolve_conj()), torch.view_as_real(total)
        if isinstance(weight, torch.Tensor) or weight != 1.0:
            wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
            if isinstance(weight, torch.Tensor):
                weight = weight.to(device=grad.device, dtype=wide, non_blocking=True).reshape(())
            grad = grad.to(wide) * weight
        total.add_(grad) if main.held.value else total.copy_(grad)
        main.held.value, self._open = True, True
        param.grad = None

    def _close(self, weight: float | torch.Tensor) -> None:
        """The end of a micro-batch."""
        self._total = self._total + _wide(weight)
        self._count += 1
        self._open, self._weight = False, 1.0

    def _checked_weight(self, weight: float | torch.Tensor) -> float | torch.Tensor:
        if isinstance(weight, torch.Tensor):
            if weight.numel() != 1:
                raise ValueError(
                    f"GradAccumulator: got a weight of shape {tuple(weight.shape)}, expected one element; pass a scalar"
                )
        elif not isinstance(weight, numbers.Real):
            raise TypeError(
                f"GradAccumulator: got a weight of type {type(weight).__name__}, expected a number or tensor; pass one"
            )
        elif not (math.isfinite(weight) and weight >= 0.0):
            raise ValueError(f"GradAccumulator: got weight={weight}, expected a finite number >= 0; pass one")
        tensors = isinstance(weight, torch.Tensor) or isinstance(self._weight, torch.Tensor)
        if self._open and weight is not self._weight and (tensors or weight != self._weight):
            raise RuntimeError(
                f"GradAccumulator: got a weight for a micro-batch that hooks have folded with weight={self._weight}, "
                "expected none; set accumulator.weight before the backward pass"
            )
        return weight

    def reset(self) -> None:
        """Drops what was accumulated. The memory stays."""
        self._epoch.advance()
        self._count = 0
        self._total = 0.0  # of the weights
        self._open = False  # whether hooks have folded a part of a micro-batch that has not ended
        self._weight = 1.0

    # ---- the result ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def grads(self) -> list[torch.Tensor | None]:
        """Folds what is left in ``.grad``, divides, and hands over the main gradients, by parameter; then begins anew.

        None where a parameter got no gradient in any micro-batch. The tensors are valid until the next fold.

        Raises:
            RuntimeError: there is nothing to hand over. As :meth:`accumulate` else.
            ValueError: the weights are all 0.
        """
        if self._open or any(param.grad is not None for param in self.params):
            self.accumulate()
        if not self._count:
            raise RuntimeError(
                "GradAccumulator.grads: got no gradients, expected those of a micro-batch; call it after backward()"
            )
        divisor = self._divisor(None)
        mains = [self.main_grad(f"GradAccumulator.grads: params[{i}]", param) for i, param in enumerate(self.params)]
        grads = [
            _like(param, main.tensor) if main and main.held.value else None for param, main in zip(self.params, mains)
        ]
        if isinstance(divisor, torch.Tensor) or divisor != 1.0:
            for buffer in self.buffers:
                buffer.div_(divisor.to(buffer.device) if isinstance(divisor, torch.Tensor) else divisor)
        self.reset()
        return grads

    def assign_grads(self) -> None:
        """Puts the result of :meth:`grads` into ``.grad``, for anybody's optimizer.

        In each parameter's dtype, or ``grad_dtype`` if it has one. Where that is the main gradient's dtype they share
        memory until the next fold.
        """
        for param, grad in zip(self.params, self.grads()):
            dtype = getattr(param, "grad_dtype", None) or param.dtype
            param.grad = None if grad is None else grad.to(dtype)

    @torch.no_grad()
    def all_reduce(self, group: Any = None, *, find_unused_parameters: bool = False) -> None:
        """Averages main gradients, in the dtype in which they are kept, and weights over the processes of a group.

        For micro-batches in ``DistributedDataParallel.no_sync()``: call it once, after the last :meth:`accumulate`. A
        last micro-batch outside of ``no_sync`` is averaged by DDP itself, and needs the same weight in every process;
        other weights, and numbers of micro-batches, may differ between processes.

        Args:
            group: a process group, by default all processes.
            find_unused_parameters: leave parameters that no process has a gradient for without one, for which the
                processes must tell each other; the host waits. By default a parameter that requires a gradient and has
                none, here or anywhere, counts as 0.

        Raises:
            ValueError: DTensors among the parameters: their gradients have been added up over their mesh.
        """
        if any(is_sharded(param) for param in self.params):
            raise ValueError(
                "GradAccumulator.all_reduce: got parameters that are DTensors, expected plain ones: the backward pass "
                "adds up gradients of DTensors over their mesh; leave this call out"
            )
        if self._open:
            self._close(self._weight)
        self._adopt(self._trained())
        mains = [self._mains[param] for param in self.params if param in self._mains]
        if not mains:
            return
        used = [param.requires_grad for param in self.params if param in self._mains]
        if find_unused_parameters:
            flags = torch.tensor(
                [main.held.value for main in mains], dtype=torch.float32, device=mains[0].tensor.device
            )
            torch.distributed.all_reduce(flags, group=group)
            used = [flag > 0 for flag in flags.tolist()]
        for main, use in zip(mains, used):
            if use and not main.held.value:
                main.tensor.zero_()
                main.held.value = True
        self._count = max(self._count, 1)  # other processes may have had micro-batches where this one had none
        averaged = self.buffers
        if self.reduction == "mean":
            self._total = torch.zeros((), dtype=torch.float64, device=averaged[0].device) + self._total
            averaged = [*averaged, self._total]
        for tensor in averaged:
            torch.distributed.all_reduce(tensor, group=group)
            tensor.div_(torch.distributed.get_world_size(group))

    # ---- what the optimizer asks for ----------------------------------------------------------------------

    @property
    def holds(self) -> bool:
        """Whether any gradient has been folded since the last step."""
        return self._count > 0 or self._open

    def main_grad(self, where: str, param: torch.Tensor) -> MainGrad | None:
        """Of a parameter; ValueError where the parameter has changed while it holds something."""
        main = self._mains.get(param)
        if main is None:
            return None
        main.check(where, param)
        return main if main.fits(param) else None

    def step_scalars(self, own: bool) -> dict[str, float | torch.Tensor]:
        """Weight and divisor of the step. own: whether any parameter has a ``.grad``, which belongs to the last
        micro-batch, as what hooks have folded since the last call of :meth:`accumulate` does."""
        last = self._weight if own or self._open else None
        return {"grad_weight": self._weight, "grad_divisor": self._divisor(last)}

    def release(self, param: torch.Tensor) -> None:
        """A parameter has been updated alone, inside a backward pass: its main gradient is used up."""
        if param in self._mains:
            self._mains[param].held.value = False

    def _divisor(self, last: float | torch.Tensor | None) -> float | torch.Tensor:
        """last: weight of a micro-batch that has not ended; None where there is none."""
        if self.reduction == "sum" or (last is None and not self._count):
            return 1.0
        total = self._total if last is None else self._total + _wide(last)
        if not isinstance(total, torch.Tensor) and total == 0.0:
            raise ValueError(
                "GradAccumulator: got weights that are all 0, expected one above 0; call zero_grad() in place of step()"
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
        self._hooks, self._plan, self._detached = [], None, True
        self._mains.clear()
        self.reset()

    # ---- checkpoints --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What has been accumulated since the last step; tensors share memory with it.

        Raises:
            RuntimeError: hooks have folded a part of a micro-batch.
        """
        if self._open:
            raise RuntimeError(
                "GradAccumulator.state_dict: got a micro-batch that has not ended, expected to be called between them; "
                "call accumulate() first"
            )
        params = self.params
        mains = {i: self._mains.get(param) for i, param in enumerate(params)}
        return {
            "main_grads": {i: _like(params[i], main.tensor) for i, main in mains.items() if main and main.held.value},
            "weight": self._total,
            "micro_batches": self._count,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues a sum that :meth:`state_dict` has saved, in another dtype of main gradients if need be.

        Raises:
            ValueError: missing keys, parameters that are not there, other shapes. Nothing has been changed then, nor
            where memory runs out.
        """
        params, main_grads = self.params, _checked_state(state, self.params)
        total, count = state["weight"], int(state["micro_batches"])
        total = total.to(params[0].device) if isinstance(total, torch.Tensor) else float(total)
        self._adopt((params[i] for i in main_grads), anew=True)
        self.reset()
        for i, grad in main_grads.items():
            main = self._mains[params[i]]
            main.tensor.copy_(local_of(grad))
            main.held.value = True
        self._total, self._count = total, count

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "GradAccumulator: got an attempt to copy or to pickle it, expected state_dict(); make a new one for the "
            "copied optimizer and call its load_state_dict()"
        )

    # ---- main gradients and plan --------------------------------------------------------------------------

    def _trained(self) -> list[torch.Tensor]:
        return [param for param in self.params if param.requires_grad]

    def _adopt(self, params: Iterable[torch.Tensor], anew: bool = False) -> None:
        """Gives main gradients to those that have none, or an empty one (anew: any) that no longer fits."""
        new = []
        for param in params:
            main = self._mains.get(param)
            if main is None or not (main.fits(param) or (main.held.value and not anew)):
                new.append(param)
        if new:
            self._mains.update(make_main_grads(new, self.dtype, self._epoch))
            if isinstance(self.optimizer, FusedOptimizer):
                self.optimizer._forget_plan()

    def _refreshed(self) -> AccumulatePlan:
        params = self.params
        if self._plan is None or self._plan.backend != self._backend() or not self._plan.refresh(params):
            self._plan = None
            self._plan = self._make_plan(params)
            if not self._plan.refresh(params):
                raise RuntimeError("GradAccumulator.accumulate: parameters or gradients changed while they were read")
        return self._plan

    def _make_plan(self, params: list[torch.Tensor]) -> AccumulatePlan:
        where = "GradAccumulator.accumulate"
        check_grads(where, params)
        for i, param in enumerate(params):
            self.main_grad(f"{where}: params[{i}]", param)
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{where}: got the first call, or the first one after parameters changed, inside a CUDA graph capture, "
                "where tables cannot be copied; call it once before the capture"
            )
        self._adopt([*self._trained(), *(param for param in params if param.grad is not None)])
        return AccumulatePlan.make(params, [self.main_grad(where, param) for param in params], self._backend())

    def _backend(self) -> str | None:
        """Where gradients are folded: as the optimizer's step."""
        return wanted(self.optimizer.backend if isinstance(self.optimizer, FusedOptimizer) else None)


def _wide(weight: float | torch.Tensor) -> float | torch.Tensor:
    """To be added up: a copy, because tensors may be written to between micro-batches."""
    if isinstance(weight, torch.Tensor):
        return weight.detach().reshape(()).to(torch.float64, copy=True)
    return float(weight)


def _like(param: torch.Tensor, main: torch.Tensor) -> torch.Tensor:
    """A main gradient as its parameter lies: of a DTensor a DTensor."""
    return wrap_like(main, param) if is_sharded(param) else main


def _lie_alike(grad: torch.Tensor, param: torch.Tensor) -> bool:
    """Whether both are plain, or DTensors with the same parts in each process."""
    if not is_sharded(param) or not is_sharded(grad):
        return is_sharded(param) == is_sharded(grad)
    return grad.device_mesh == param.device_mesh and tuple(grad.placements) == tuple(param.placements)


def _checked_state(state: dict[str, Any], params: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    """The main gradients of a checkpoint, by parameter. ValueError as ``load_state_dict``."""
    where, wanted = "GradAccumulator.load_state_dict", {"main_grads", "weight", "micro_batches"}
    if not isinstance(state, dict) or not wanted <= state.keys():
        found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{where}: got {found}, expected the keys {sorted(wanted)}; pass state_dict()")
    for i, grad in state["main_grads"].items():
        known = i in range(len(params))
        if not known or not isinstance(grad, torch.Tensor) or grad.shape != params[i].shape:
            expected = f"shape {tuple(params[i].shape)}" if known else f"one of {len(params)} parameters"
            raise ValueError(
                f"{where}: got main_grads[{i}] of shape {tuple(getattr(grad, 'shape', ()))}, expected {expected}; load "
                "the state of the same model"
            )
        if not _lie_alike(grad, params[i]):
            raise ValueError(
                f"{where}: got main_grads[{i}] with placements {getattr(grad, 'placements', None)}, expected the "
                f"parameter's {getattr(params[i], 'placements', None)}; distribute it as the parameter"
            )
        if grad.is_complex() != params[i].is_complex():
            raise ValueError(
                f"{where}: got main_grads[{i}] of dtype {grad.dtype} for a parameter of {params[i].dtype}, expected "
                "both complex or none; load the state of the same model"
            )
    main_grads: dict[int, torch.Tensor] = state["main_grads"]
    return main_grads
