"""Drop-in ``torch.optim`` optimizers whose whole step runs in fused kernels."""

from .adam import Adam
from .adamw import AdamW
from .base import FusedOptimizer
from .lion import Lion
from .metrics import StepMetrics

__all__ = ["Adam", "AdamW", "FusedOptimizer", "Lion", "StepMetrics"]
