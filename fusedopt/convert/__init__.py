"""Checkpoints of other packages' optimizers, for ours to go on from; none of the packages is needed.

Each function takes the peer's ``state_dict()`` and the fusedopt optimizer that shall go on, and returns what that
optimizer's ``load_state_dict`` takes. It reads both and writes neither. ``docs/moving-over.md`` has the keyword tables.
"""

from .apex import from_apex
from .bitsandbytes import from_bitsandbytes
from .deepspeed import from_deepspeed, from_deepspeed_zero
from .files import Foreign, load_file
from .flashoptim import from_flashoptim
from .lion_pytorch import from_lion_pytorch
from .optimi import from_optimi
from .torchao import from_torchao
from .transformer_engine import from_transformer_engine

__all__ = [
    "Foreign",
    "from_apex",
    "from_bitsandbytes",
    "from_deepspeed",
    "from_deepspeed_zero",
    "from_flashoptim",
    "from_lion_pytorch",
    "from_optimi",
    "from_torchao",
    "from_transformer_engine",
    "load_file",
]
