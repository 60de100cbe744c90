"""The CPU backend: the C++ engine of ``fusedopt._C``, on as many threads as ``torch.get_num_threads()``."""

from __future__ import annotations

from typing import Any

import torch

from .. import _C
from ..plan import Bucket, DeviceTables, dtype_code
from ..specs import CPU_CHUNK, StateFormatSpec

__all__ = [
    "accumulate",
    "begin",
    "chunk",
    "finalize_norm",
    "measure",
    "measure_chunks",
    "norm",
    "prepare",
    "require_available",
    "scale",
    "update",
    "update_chunks",
]


def require_available(device: torch.device) -> None:
    """RuntimeError with the remedy for tensors elsewhere."""
    if device.type != "cpu":
        raise RuntimeError(
            f"fusedopt: backend 'cpu' was asked for on '{device}', expected 'cpu'; choose 'cuda' or 'triton', or none"
        )


def chunk(state_format: StateFormatSpec | None) -> int:
    return CPU_CHUNK


def prepare(tables: DeviceTables) -> None:
    for bucket in tables.buckets:
        bucket.args.control = tables.control.address


def begin(tables: DeviceTables, passes: tuple[str, ...]) -> None:
    """Nothing to do: tables and gradient addresses are read where the host keeps them."""


def _dtypes(bucket: Bucket) -> tuple[int, int]:
    """Codes of gradients and main gradients."""
    return dtype_code(bucket.grad_dtype), dtype_code(bucket.main_dtype or bucket.grad_dtype)


def norm(tables: DeviceTables, finalize: bool = True) -> None:
    total, nonfinite = 0.0, 0.0
    for bucket in tables.buckets:
        total, nonfinite = _C.cpu_norm(
            bucket.table, *_dtypes(bucket), bucket.args, total, nonfinite, torch.get_num_threads()
        )
    if finalize:
        _C.cpu_finalize_norm(tables.buckets[0].args, total, nonfinite)
    else:
        tables.control.local_sums.copy_(torch.tensor([total, nonfinite], dtype=torch.float64))


def finalize_norm(tables: DeviceTables, gathered: torch.Tensor) -> None:
    args = tables.buckets[0].args
    sums = gathered[:, 0]
    total = sums.max() if args.norm_type == 2 else sums.sum()
    _C.cpu_finalize_norm(args, float(total), float(gathered[:, 1].sum()))


def measure(tables: DeviceTables) -> None:
    for bucket in tables.buckets:
        measure_chunks(bucket, 0, bucket.num_chunks)


def measure_chunks(bucket: Bucket, begin: int, end: int) -> None:
    """The first phase of what ``update_chunks`` does, if its rule has two: whole tensors."""
    if bucket.norms:
        _C.cpu_measure(*_update_arguments(bucket, begin, end))


def update(tables: DeviceTables) -> None:
    for i, bucket in enumerate(tables.buckets):
        bucket.args.lead = int(i == 0)
        update_chunks(bucket, 0, bucket.num_chunks)


def update_chunks(bucket: Bucket, begin: int, end: int) -> None:
    """The part [begin, end) of a bucket's update. The last one counts steps.

    The host may do something else in other threads of Python in the meantime.
    """
    _C.cpu_update(*_update_arguments(bucket, begin, end))


def _update_arguments(bucket: Bucket, begin: int, end: int) -> tuple[Any, ...]:
    rule, param_format, state_format = bucket.formats
    return (
        bucket.table,
        bucket.hypers,
        rule.index,
        param_format.code,
        *_dtypes(bucket),
        state_format.code,
        bucket.args,
        torch.get_num_threads(),
        begin,
        end,
    )


def accumulate(tables: DeviceTables) -> None:
    for bucket in tables.buckets:
        _C.cpu_accumulate(bucket.table, *_dtypes(bucket), bucket.args, torch.get_num_threads())


def scale(tables: DeviceTables) -> None:
    for bucket in tables.buckets:
        _C.cpu_scale(bucket.table, dtype_code(bucket.grad_dtype), bucket.args, torch.get_num_threads())
