"""Lightning's Trainer with its ``gradient_clip_val`` in the step of our optimizers.

::

    class Model(fusedopt.integrations.lightning.FusedClipping, lightning.LightningModule):
        def configure_optimizers(self):
            return fusedopt.AdamW(self.parameters(), lr=1e-3)

    lightning.Trainer(gradient_clip_val=1.0, precision="bf16-mixed").fit(Model(), data)

Nothing is needed for Fabric, nor for a bound that is given to the optimizer: ``fusedopt.AdamW(…, max_grad_norm=1.0)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import unwrap
from .clipping import set_bounds

if TYPE_CHECKING:
    import torch
    from lightning import LightningModule
else:
    LightningModule = object  # of a mixin

__all__ = ["FusedClipping"]


class FusedClipping(LightningModule):
    """Mixin for LightningModules, before ``LightningModule``: ``gradient_clip_val`` becomes a bound of the step.

    Both algorithms, "norm" and "value", with every precision, while Lightning itself refuses optimizers that unscale.
    ``.grad`` keeps its values. Optimizers that are not ours are clipped in Lightning's way.
    """

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning calls this before each step, after the backward pass."""
        fused = unwrap(optimizer)
        if fused is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        where, bound = "LightningModule.configure_gradient_clipping", gradient_clip_val or None
        if str(getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm)) == "value":
            set_bounds(where, fused, max_value=bound)
        else:
            set_bounds(where, fused, max_norm=bound)
