"""Fused optimizer kernels for PyTorch.

Swap ``torch.optim.AdamW`` for ``fusedopt.AdamW``: unscale, inf/NaN check, global-norm clip and update become two
kernel launches for any number of tensors, with no host synchronisation.
"""

from typing import TYPE_CHECKING

from . import functional
from .accumulate import GradAccumulator
from .backends import use_backend
from .clip import clip_grad_norm_, clip_grad_value_, get_total_norm, unscale_grads_
from .optim import LAMB, SGD, SGDW, Adagrad, Adam, AdamW, FusedOptimizer, Lion, RAdam, RMSprop, StepMetrics
from .scaler import GradScaler

if TYPE_CHECKING:
    from .backends import CallableModule

    backends: CallableModule
else:
    from . import backends

__version__ = "0.1.0"

__all__ = [
    "LAMB",
    "SGD",
    "SGDW",
    "Adagrad",
    "Adam",
    "AdamW",
    "FusedOptimizer",
    "GradAccumulator",
    "GradScaler",
    "Lion",
    "RAdam",
    "RMSprop",
    "StepMetrics",
    "__version__",
    "backends",
    "clip_grad_norm_",
    "clip_grad_value_",
    "functional",
    "get_total_norm",
    "unscale_grads_",
    "use_backend",
]
