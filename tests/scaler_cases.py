"""What the tests of fusedopt.GradScaler share."""

import math

import torch
from cases import set_gradients

import fusedopt

SIZES = [5, 0, 4097]
SCALE = {"init_scale": 2.0**10, "growth_interval": 3}
BAD = [math.inf, -math.inf, math.nan]


def scalers(device, **kwargs):
    """Ours and torch's."""
    given = {**SCALE, **kwargs}
    return fusedopt.GradScaler(device.type, **given), torch.amp.GradScaler(device.type, **given)


def scaled_gradients(params, scaler, seed=0, bad=None):
    """Gradients as backward() leaves them on a scaled loss; `bad` is put into the last one."""
    scaler.scale(torch.zeros((), device=params[0].device))  # makes the scaler create its scale tensor
    set_gradients(params, seed=seed, scale=scaler.get_scale())
    if bad is not None:
        params[-1].grad[-1] = bad
