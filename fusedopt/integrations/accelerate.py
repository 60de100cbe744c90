"""Accelerate with clipping, unscaling and the search for inf and NaN in the step of our optimizers.

::

    from fusedopt.integrations.accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=4)
    model, opt, data, scheduler = accelerator.prepare(model, fusedopt.AdamW(model.parameters()), data, scheduler)

The loop stays as it is. Optimizers that are not ours, and what the step cannot do, are served in Accelerate's way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import torch

from ..optim import FusedOptimizer
from ..scaler import GradScaler
from ..specs import NORM_TYPES
from . import unwrap
from .clipping import set_bounds

try:
    import accelerate
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import DistributedType
except ImportError as error:
    raise ImportError(
        f"fusedopt.integrations.accelerate: importing Accelerate failed ({error}), expected version 1.1 or later; "
        "pip install 'accelerate>=1.1'"
    ) from error

__all__ = ["Accelerator", "FusedAcceleratedOptimizer", "fuse"]

logger = logging.getLogger(__name__)

WHOLE_GRADIENTS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""Where every process has all gradients, so that each can take the norm alone."""


class NormClip(NamedTuple):
    """What ``clip_grad_norm_`` was asked for, and where the norm will be."""

    max_norm: float
    norm_type: float
    norm: torch.Tensor


class FusedAcceleratedOptimizer(AcceleratedOptimizer):
    """What ``prepare`` makes of an optimizer of ours, which is its ``.optimizer``."""

    def __init__(self, optimizer: FusedOptimizer, device_placement: bool = True, scaler: Any = None) -> None:
        self.norm_clip: NormClip | None = None
        self.value_clip: float | None = None
        self._skipped: bool | None = False
        super().__init__(optimizer, device_placement=device_placement, scaler=scaler)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """As Accelerate's: nothing between micro-batches."""
        if not self.gradient_state.sync_gradients:
            return
        asked, self.norm_clip = self.norm_clip, None
        value, self.value_clip = self.value_clip, None
        max_norm, norm_type = (None, 2.0) if asked is None else asked[:2]
        set_bounds("Accelerator", self.optimizer, max_norm, norm_type, value)
        self._skipped = None
        super().step(closure)
        if asked is not None:
            asked.norm.copy_(self.optimizer._control().total_norm)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step changed nothing because of inf or NaN.

        Waits for the device, once a step, where that can happen: with a scaler, or with ``nonfinite="skip"``.
        """
        if self._skipped is None:
            possible = self.scaler is not None or self.optimizer.nonfinite == "skip"
            self._skipped = self._is_overflow or (possible and bool(self.optimizer.step_was_skipped))
        return self._skipped


class Accelerator(accelerate.Accelerator):
    """``accelerate.Accelerator``, in which the step of a :class:`fusedopt.FusedOptimizer` clips.

    * ``clip_grad_norm_`` and ``clip_grad_value_`` note the bound, for the next ``step`` alone. The norm that the first
      returns is NaN until that step writes it. ``.grad`` keeps its values.
    * Under float16 the scaler is a :class:`fusedopt.GradScaler`: no pass of its own over the gradients.
    * ``optimizer_step_was_skipped`` tells of steps that the optimizer skipped itself.

    So where all trained parameters of a call are those of one optimizer, on one device or under DDP. Elsewhere, as with
    FSDP, DeepSpeed, or one call for several optimizers, Accelerate clips; the reason is logged once.
    """

    _told = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scaler = _fused_scaler(self)

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None) -> Any:
        """As Accelerate's. What it returned may be given to it again.

        Raises:
            ValueError: this optimizer was prepared before. Both wrappers would unscale its gradients.
        """
        if any(each.optimizer is optimizer for each in self._optimizers):
            raise ValueError(
                f"Accelerator.prepare: got an {type(optimizer).__name__} that was prepared before, expected each "
                "optimizer once; go on with what the first call returned"
            )
        if unwrap(optimizer) is not optimizer:
            return super().prepare_optimizer(optimizer, device_placement)
        placement = self.device_placement if device_placement is None else device_placement
        self._optimizers.append(FusedAcceleratedOptimizer(optimizer, placement, self.scaler))
        return self._optimizers[-1]

    def clip_grad_norm_(
        self, parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float, norm_type: float = 2
    ) -> torch.Tensor | None:
        """Has the next step clip: see :class:`Accelerator`. Returns the norm before clipping, 0-dim float32."""
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        prepared = self._prepared_for(parameters)
        if prepared is None or float(norm_type) not in NORM_TYPES or not max_norm > 0:
            taken: torch.Tensor | None = super().clip_grad_norm_(parameters, max_norm, norm_type)
            return taken
        norm = torch.full((), float("nan"), device=prepared.optimizer._control().buffer.device)
        prepared.norm_clip = NormClip(float(max_norm), float(norm_type), norm)
        return norm

    def clip_grad_value_(self, parameters: torch.Tensor | Iterable[torch.Tensor], clip_value: float) -> None:
        """Has the next step clamp: see :class:`Accelerator`. After ``clip_grad_norm_`` both are done at once."""
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        prepared = self._prepared_for(parameters)
        if prepared is not None and prepared.norm_clip is None and clip_value > 0:
            prepared.value_clip = float(clip_value)
            return
        if prepared is not None and prepared.norm_clip is not None:  # the step would clamp before it takes the norm
            max_norm, norm_type, norm = prepared.norm_clip
            prepared.norm_clip = None
            norm.copy_(super().clip_grad_norm_(parameters, max_norm, norm_type))
        super().clip_grad_value_(parameters, clip_value)

    def _prepared_for(self, parameters: Sequence[torch.Tensor]) -> FusedAcceleratedOptimizer | None:
        """The optimizer whose step can clip these parameters' gradients."""
        ours = [each for each in self._optimizers if isinstance(each, FusedAcceleratedOptimizer)]
        if not ours:
            return None
        reason = f"{self.distributed_type.value} spreads gradients over processes"
        if self.distributed_type in WHOLE_GRADIENTS:
            trained = {id(param) for param in parameters if param.requires_grad}
            for each in ours:
                own = chain.from_iterable(group["params"] for group in each.optimizer.param_groups)
                if trained == {id(param) for param in own if param.requires_grad}:
                    return each
            reason = "the parameters that require a gradient are not those of one fusedopt optimizer"
        if not self._told:
            self._told = True
            logger.warning("Accelerate clips, not the step of the optimizer: %s", reason)
        return None


def fuse(accelerator: accelerate.Accelerator) -> Accelerator:
    """Turns an accelerator that something else has made into an :class:`Accelerator`, and returns it.

    Raises:
        TypeError: it is of a subclass of ``accelerate.Accelerator``.
        ValueError: optimizers have been prepared already.
    """
    if isinstance(accelerator, Accelerator):
        return accelerator
    if type(accelerator) is not accelerate.Accelerator:
        raise TypeError(
            f"fuse: got a {type(accelerator).__name__}, expected an accelerate.Accelerator itself; derive that class "
            "from fusedopt.integrations.accelerate.Accelerator"
        )
    if accelerator._optimizers:
        raise ValueError(
            f"fuse: got an Accelerator with {len(accelerator._optimizers)} prepared optimizers, expected none; call it "
            "before prepare"
        )
    accelerator.__class__ = Accelerator
    accelerator.scaler = _fused_scaler(accelerator)
    return cast(Accelerator, accelerator)


def _fused_scaler(accelerator: accelerate.Accelerator) -> Any:
    """Ours with the same settings in the place of torch's own; None and others, such as FSDP's, as they are."""
    scaler = accelerator.scaler
    plain = type(scaler) is torch.amp.GradScaler and accelerator.distributed_type in WHOLE_GRADIENTS
    if not plain or not scaler.is_enabled():
        return scaler
    return GradScaler(
        scaler._device,
        init_scale=scaler.get_scale(),
        growth_factor=scaler.get_growth_factor(),
        backoff_factor=scaler.get_backoff_factor(),
        growth_interval=scaler.get_growth_interval(),
    )
