"""The peers' checkpoints under data/ and what goes with them; `make_data.py` and `make_zero_data.py` made them.

A file is {"state_dict": the peer's, "decoded": [{state: values}], "after": [values], "versions": {...}}. "decoded" is
what the peer itself reads its states as, "after" what its next step makes of `params()` with the gradients of `NEXT`.
Of large tensors both hold every seventh element.
"""

import math
from pathlib import Path

import torch

DATA = Path(__file__).parent / "data"
STRIDE = 7
LARGE = 500


def pattern(shape: tuple[int, ...], salt: int) -> torch.Tensor:
    """float32 of both signs over seven octaves, the same everywhere; bfloat16 and float16 hold them too."""
    i = torch.arange(math.prod(shape))
    values = ((i * 37 + salt * 11) % 251 - 125) / 256.0 * torch.exp2(-((i + salt) % 7).float())
    return values.view(shape)


def params(shapes, dtype: torch.dtype = torch.float32, device="cpu") -> list[torch.nn.Parameter]:
    """What the parameters are when the checkpoint is taken."""
    return [torch.nn.Parameter(pattern(shape, 100 + i).to(device, dtype)) for i, shape in enumerate(shapes)]


def set_grads(parameters, step: int) -> None:
    """The gradients of a step of the peer, counted from 0; the one after the checkpoint is `NEXT`."""
    for i, param in enumerate(parameters):
        param.grad = pattern(tuple(param.shape), 10 * step + i).to(param)


STEPS = 3
NEXT = STEPS


def sampled(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[::STRIDE].clone() if flat.numel() >= LARGE else flat.clone()


WEIGHTS = ((20, 33), (5,))
"""One that 8-bit formats take in three blocks of 256, the last one incomplete, and one that they leave alone."""
SMALL = ((7, 11), (5,))
"""For the others. flashoptim takes the first one in three groups of 32, the last one incomplete."""
BLOCKS = ((64, 64), (5,))
"""torchao quantises from 4096 elements on, in whole blocks only."""

# The peers' keyword arguments, also read by the tests.
HYPER = {
    "adamw": dict(lr=2e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1),
    "adam": dict(lr=2e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0),
    "lion": dict(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1),
    "sgd": dict(lr=0.1, momentum=0.9, weight_decay=0.01),
    "lamb": dict(lr=2e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1),
}
