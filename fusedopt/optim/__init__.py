"""Drop-in ``torch.optim`` optimizers whose whole step runs in fused kernels."""

from .adagrad import Adagrad
from .adam import Adam
from .adamw import AdamW
from .base import FusedOptimizer
from .lamb import LAMB
from .lion import Lion
from .metrics import StepMetrics
from .radam import RAdam
from .rmsprop import RMSprop
from .sgd import SGD
from .sgdw import SGDW

__all__ = [
    "LAMB",
    "SGD",
    "SGDW",
    "Adagrad",
    "Adam",
    "AdamW",
    "FusedOptimizer",
    "Lion",
    "RAdam",
    "RMSprop",
    "StepMetrics",
]
