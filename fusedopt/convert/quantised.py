"""Dequantisers of the peers' state formats, in torch: one scale for each block of consecutive elements.

Each repeats the peer's own float32 operations, so that the values are the peer's to the bit.
"""

from __future__ import annotations

import torch

__all__ = ["check_map", "decode_map", "decode_softsign", "error_corrected", "scaled"]


def scaled(where: str, values: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """``values``, float32 in any shape, times the scale of their block; blocks follow each other in row-major order."""
    blocks = -(-values.numel() // block)
    if scale.ndim != 1 or scale.numel() != blocks:
        raise ValueError(
            f"{where} has scales of shape {tuple(scale.shape)} for {values.numel()} elements, expected ({blocks},) "
            f"with blocks of {block}; pass the checkpoint as the peer saved it"
        )
    each = scale.float().repeat_interleave(block)[: values.numel()]
    return values * each.view(values.shape)


def check_map(where: str, table: object, size: int, signed: bool) -> torch.Tensor:
    """The values of codes; ValueError unless they are ``size`` ascending float32 in [-1, 1], unsigned in [0, 1]."""
    low = -1.0 if signed else 0.0
    if (
        not isinstance(table, torch.Tensor)
        or table.dtype != torch.float32
        or tuple(table.shape) != (size,)
        or not bool((table[1:] >= table[:-1]).all())
        or not low <= float(table[0]) <= float(table[-1]) <= 1.0
    ):
        got = type(table).__name__
        if isinstance(table, torch.Tensor):
            got = f"a {str(table.dtype).removeprefix('torch.')} tensor of shape {tuple(table.shape)}"
            if table.numel() and table.is_floating_point():
                got += f" from {float(table.min()):.4g} to {float(table.max()):.4g}"
        raise ValueError(
            f"{where} is {got}, expected an ascending float32 tensor of {size} values in [{low:.0f}, 1]: an unknown "
            "quantisation map; load the checkpoint into the peer and save it again uncompressed"
        )
    return table


def decode_map(where: str, codes: torch.Tensor, table: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """``table[code]`` times the scale of the block, float32, in the shape of the uint8 codes."""
    if codes.dtype != torch.uint8:
        raise ValueError(
            f"{where} has codes of dtype {str(codes.dtype).removeprefix('torch.')}, expected uint8; "
            "pass the checkpoint with the dtypes it was saved with"
        )
    return scaled(where, table.to(codes.device)[codes.long()], scale, block)


def decode_softsign(where: str, codes: torch.Tensor, scale: torch.Tensor, block: int, moment: str) -> torch.Tensor:
    """flashoptim's: a first moment is x / (2 - |x|) of int8 x/127, a second one the square of uint8 x/255."""
    signed = moment == "first"
    dtype = torch.int8 if signed else torch.uint8
    if codes.dtype != dtype:
        raise ValueError(
            f"{where} has codes of dtype {str(codes.dtype).removeprefix('torch.')}, expected "
            f"{str(dtype).removeprefix('torch.')}; pass the checkpoint with the dtypes it was saved with"
        )
    values = codes.float() / (127.0 if signed else 255.0)
    if signed:
        values = values / (2.0 - values.abs())
    values = scaled(where, values, scale, block)
    return values if signed else values.square()


def error_corrected(param: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """flashoptim's master, float32: parameter + error/max · half an ulp of the bfloat16 or float16 parameter.

    An ulp is that of the parameter's exponent, of subnormal numbers the smallest one.
    """
    wide = param.detach().float()
    info = torch.finfo(param.dtype)
    exponent = wide.abs().clamp(min=info.smallest_normal).frexp().exponent - 1
    half_ulp = torch.ldexp(torch.full_like(wide, info.eps / 2), exponent)
    return wide + error.float() / float(torch.iinfo(error.dtype).max) * half_ulp
