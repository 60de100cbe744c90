"""The reference backend: every pass in plain torch, one tensor after the other. Slow and plain, for debugging.

When a result looks wrong, run it here: the same plan, formats and order of operations as the kernels, in code that can
be stepped through. It reads results back to the host, so it cannot be captured in a graph. Bits are those of the C++
engines (NaN for NaN); the norm is added in another order.

Not to be confused with ``fusedopt.reference``: the rules in float64 from the papers, which judge all backends.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .. import _C, formats
from ..plan import Bucket, DeviceTables
from ..specs import CPU_CHUNK, StateFormatSpec
from ..structs import Hyper, PassArgs, TensorEntry, rows
from .reference_noise import Noise, encode_int8, round_stochastically
from .reference_rules import RULES, TERMS

__all__ = [
    "accumulate",
    "begin",
    "chunk",
    "finalize_norm",
    "measure",
    "norm",
    "prepare",
    "require_available",
    "scale",
    "update",
]


def require_available(device: torch.device) -> None:
    """RuntimeError where tensors cannot be made from addresses."""
    if device.type not in ("cpu", "cuda"):
        raise RuntimeError(
            f"fusedopt: backend 'reference' was asked for on '{device}', expected 'cpu' or 'cuda'; choose another one"
        )


def chunk(state_format: StateFormatSpec | None) -> int:
    return CPU_CHUNK


def prepare(tables: DeviceTables) -> None:
    for bucket in tables.buckets:
        bucket.args.control = tables.control.address


def begin(tables: DeviceTables, passes: tuple[str, ...]) -> None:
    """RuntimeError under graph capture: nothing here can be replayed."""
    if tables.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "fusedopt: backend 'reference' reads results back to the host, which a CUDA graph cannot; choose another"
        )


# ---- memory behind addresses ----------------------------------------------------------------------------------


class _OnCuda:  # on a GPU alone
    """Device memory as ``torch.as_tensor`` reads it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def _tensor(address: int, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The elements at an address, flat, sharing memory."""
    size = numel * dtype.itemsize
    if not size:
        return torch.empty(0, dtype=dtype, device=device)
    if device.type == "cpu":
        return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)
    return torch.as_tensor(_OnCuda(address, size), device=device).view(dtype)


def _number(address: int, dtype: torch.dtype, device: torch.device, default: float) -> float:
    return _tensor(address, 1, dtype, device).item() if address else default


class _Scaling(NamedTuple):
    """As doubles: 1 / (grad_scale * grad_divisor), limit of an element, clip coefficient, weight of this step's own
    gradient beside the main gradient; whether to skip."""

    inv_scale: float
    limit: float
    clip_coef: float
    grad_weight: float
    skip: bool

    def unscale(self, grad: torch.Tensor) -> torch.Tensor:
        """Unscaled, then clamped, in the compute type; NaN stays NaN."""
        grad = grad * _like(self.inv_scale, grad)
        return grad.clamp(-self.limit, self.limit) if math.isfinite(self.limit) else grad


def _like(value: float, tensor: torch.Tensor) -> torch.Tensor:
    """A double rounded to the tensor's dtype."""
    return torch.tensor(value, dtype=torch.float64).to(dtype=tensor.dtype, device=tensor.device)


class _Streams(NamedTuple):
    """This step's own gradient and the main gradient, as far as there are any."""

    own: torch.Tensor | None
    main: torch.Tensor | None

    def sum(self, weight: float) -> torch.Tensor:
        """main + weight * own, as ``GradSource`` of ``csrc/core/gradient.h``."""
        if self.own is None:
            assert self.main is not None
            return _wide(self.main)
        own = _wide(self.own)
        weighted = _like(weight, own) * own
        return weighted if self.main is None else _wide(self.main) + weighted


class _Step(NamedTuple):
    """What ``_C.pack_step`` packs, taken apart."""

    args: PassArgs
    hypers: list[Hyper]
    grads: list[int]
    scaling: _Scaling

    @classmethod
    def of(cls, bucket: Bucket, tables: DeviceTables) -> _Step:
        size, device = ctypes.sizeof(PassArgs), tables.device
        content = torch.zeros(size + bucket.table.packed_bytes(tables.num_groups), dtype=torch.uint8)
        _C.pack_step(content.data_ptr(), 0, bucket.args, bucket.table, bucket.hypers)
        packed = bytes(content.tolist())
        end = size + tables.num_groups * ctypes.sizeof(Hyper)
        args = rows(PassArgs, packed[:size])[0]
        given = args.scaling
        skip = any(_number(at, torch.float32, device, 0.0) != 0.0 for at in (given.found_inf, args.norm_found_inf))
        divisor = _number(given.grad_divisor_at, torch.float32, device, given.grad_divisor)
        scaling = _Scaling(
            1.0 / (_number(given.grad_scale, torch.float32, device, 1.0) * divisor),
            given.max_grad_value,
            _number(given.clip_coef, torch.float64, device, 1.0),
            _number(given.grad_weight_at, torch.float32, device, given.grad_weight),
            skip,
        )
        return cls(args, rows(Hyper, packed[size:end]), memoryview(packed[end:]).cast("Q").tolist(), scaling)

    def streams(self, bucket: Bucket, device: torch.device) -> Iterator[tuple[TensorEntry, _Streams]]:
        """Of each tensor with a gradient: its row, and where the gradient comes from."""
        for entry, word in zip(rows(TensorEntry, bucket.table.entries()), self.grads):
            if word:
                own = _tensor(word & ~1, entry.numel, bucket.grad_dtype, device) if word > 1 else None
                held = None
                if word & 1 and bucket.main_dtype is not None:
                    held = _tensor(entry.main_grad, entry.numel, bucket.main_dtype, device)
                yield entry, _Streams(own, held)

    def tensors(self, bucket: Bucket, device: torch.device) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        """Of each tensor with a gradient: its row, and the gradient in the compute type, before it is unscaled."""
        for entry, streams in self.streams(bucket, device):
            yield entry, streams.sum(self.scaling.grad_weight)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In the compute type: float64 of float64, else float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# ---- norm -----------------------------------------------------------------------------------------------------


def norm(tables: DeviceTables, finalize: bool = True) -> None:
    sums, nonfinite = [], 0.0
    for bucket in tables.buckets:
        step = _Step.of(bucket, tables)
        for _, grad in step.tensors(bucket, tables.device):
            if grad.numel():
                nonfinite += float(not grad.isfinite().all())
                size = step.scaling.unscale(grad).double().abs()
                sums.append((size.max() if step.args.norm.type == 2 else size ** (2 - step.args.norm.type)).sum())
    shares = torch.stack(sums) if sums else torch.zeros(1, dtype=torch.float64, device=tables.device)
    total = shares.max() if tables.buckets[0].args.norm_type == 2 else shares.sum()
    tables.control.local_sums.copy_(torch.tensor([total.item(), nonfinite], dtype=torch.float64))
    if finalize:
        _write_norm(tables, total.item(), nonfinite)


def finalize_norm(tables: DeviceTables, gathered: torch.Tensor) -> None:
    sums = gathered[:, 0]
    total = sums.max() if tables.buckets[0].args.norm_type == 2 else sums.sum()
    _write_norm(tables, total.item(), gathered[:, 1].sum().item())


def _write_norm(tables: DeviceTables, total: float, nonfinite: float) -> None:
    """min(1, max_norm / (norm + 1e-6)), as ``finalize_norm`` of ``csrc/core/gradient.h``."""
    options = _Step.of(tables.buckets[0], tables).args.norm
    norm = math.sqrt(total) if options.type == 0 else total
    coef = 1.0
    if math.isfinite(options.max_norm):
        coef = options.max_norm / (norm + 1e-6)
        coef = 1.0 if coef > 1.0 else coef  # NaN stays NaN
    control = tables.control
    for view in (control.total_norm64, control.total_norm):
        view.copy_(torch.tensor(norm, dtype=torch.float64))  # infinite in float32 where it overflows
    for view in (control.clip_coef64, control.clip_coef):
        view.fill_(coef)
    control.norm_found_inf.fill_(float(options.skip_nonfinite and nonfinite > 0.0))


# ---- update ---------------------------------------------------------------------------------------------------


def measure(tables: DeviceTables) -> None:
    """Squares and sums in double."""
    for bucket in tables.buckets:
        rule, _, _ = bucket.formats
        step = _Step.of(bucket, tables)
        if not rule.norms or step.scaling.skip:
            continue
        for entry in rows(TensorEntry, bucket.table.entries()):
            _norms(entry, rule.norms, tables.device).zero_()
        for entry, grad in step.tensors(bucket, tables.device):
            terms = TERMS[rule.name](*_Operands.of(tables, bucket, step, entry, grad).given)
            sums = torch.stack([term.double().square().sum() for term in terms])
            _norms(entry, rule.norms, tables.device).copy_(sums)


def _norms(entry: TensorEntry, count: int, device: torch.device) -> torch.Tensor:
    """Where the sums of squares stand that a rule of two phases needs."""
    return _tensor(entry.norms, count, torch.float64, device)


def update(tables: DeviceTables) -> None:
    for i, bucket in enumerate(tables.buckets):
        step = _Step.of(bucket, tables)
        if i == 0:
            tables.control.skipped.fill_(float(step.scaling.skip))
            tables.control.skipped_steps += int(step.scaling.skip)
        if not step.scaling.skip:
            for entry, grad in step.tensors(bucket, tables.device):
                _update_tensor(tables, bucket, step, entry, grad)


class _Operands(NamedTuple):
    """One tensor: its memory, and what the rule is given of it."""

    counter: torch.Tensor
    param: torch.Tensor
    extra_name: str | None
    extra: torch.Tensor | None
    states: dict[str, torch.Tensor]
    given: tuple[Any, ...]
    """Parameter, gradient, states, hyper-parameters, number of the step."""

    @classmethod
    def of(cls, tables: DeviceTables, bucket: Bucket, step: _Step, entry: TensorEntry, grad: torch.Tensor) -> _Operands:
        device, n, (rule, param_format, state_format) = tables.device, entry.numel, bucket.formats
        counter = _tensor(entry.step, 1, torch.float32, device)
        param = _tensor(entry.param, n, getattr(torch, param_format.dtype), device)
        extra_name, extra_dtype = param_format.extra or (None, None)
        extra = _tensor(entry.extra, n, getattr(torch, extra_dtype), device) if extra_dtype else None
        states = {}
        for k, (key, moment) in enumerate(zip(rule.states, rule.moments)):
            states[key] = _tensor(entry.states[k], n, getattr(torch, state_format.dtype(moment)), device)
            if state_format.blocked:
                count = formats.scale_shape(n)[0]
                states[formats.scale_key(key)] = _tensor(entry.scales[k], count, torch.float32, device)
        hyper = step.hypers[entry.group]
        values = list(hyper.value)
        if hyper.lr:
            values[0] = _number(hyper.lr, torch.float64 if hyper.lr_is_double else torch.float32, device, 0.0)
        value = formats.decode_master({extra_name: extra} if extra_name else {}, param)
        decoded = [_wide(state) for state in formats.decode_states(states, rule).values()]
        coef = _like(step.scaling.clip_coef, value)
        g = step.scaling.unscale(grad) * (-coef if hyper.maximize else coef)
        return cls(counter, param, extra_name, extra, states, (value, g, *decoded, values, int(counter.item()) + 1))


def _update_tensor(tables: DeviceTables, bucket: Bucket, step: _Step, entry: TensorEntry, grad: torch.Tensor) -> None:
    rule, _, state_format = bucket.formats
    counter, param, extra_name, extra, states, given = _Operands.of(tables, bucket, step, entry, grad)
    norms = [math.sqrt(x) for x in _norms(entry, rule.norms, tables.device).tolist()] if rule.norms else []
    value, *updated = RULES[rule.name](*given, *norms)

    number = given[-1]
    noise = Noise(step.args.seed, entry.id, number, entry.numel, tables.device)
    _store_param(bucket, value, param, extra_name, extra, noise)
    for k, (key, moment) in enumerate(zip(rule.states, rule.moments)):
        if state_format.blocked:
            encode_int8(updated[k], moment, noise.dither(), states[key], states[formats.scale_key(key)])
        elif state_format.random:
            states[key].copy_(round_stochastically(updated[k], noise.bits(k + 1)))
        else:
            states[key].copy_(_round(updated[k], states[key].dtype))
    counter.fill_(float(number))


def _store_param(
    bucket: Bucket,
    value: torch.Tensor,
    param: torch.Tensor,
    extra_name: str | None,
    extra: torch.Tensor | None,
    noise: Noise,
) -> None:
    _, param_format, _ = bucket.formats
    if extra_name == "param_remainder":
        entry = {"master_param": value}
        formats.convert_master(entry, param, param_format)
        assert extra is not None
        extra.copy_(entry[extra_name])
        return
    if extra is not None:
        extra.copy_(value)
    param.copy_(round_stochastically(value, noise.bits(0)) if param_format.random else _round(value, param.dtype))


def _round(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To nearest even; NaN of 16 bits is 0x7fff."""
    rounded = value.to(dtype)
    if dtype.itemsize == 2:
        rounded = torch.where(value.isnan(), 0x7FFF, rounded.view(torch.int16)).to(torch.int16).view(dtype)
    return rounded


# ---- accumulate, scale ------------------------------------------------------------------------------------------


def accumulate(tables: DeviceTables) -> None:
    for bucket in tables.buckets:
        step = _Step.of(bucket, tables)
        for entry, streams in step.streams(bucket, tables.device):
            if streams.own is not None and bucket.main_dtype is not None:
                main = _tensor(entry.main_grad, entry.numel, bucket.main_dtype, tables.device)
                main.copy_(_round(streams.sum(step.scaling.grad_weight), main.dtype))


def scale(tables: DeviceTables) -> None:
    for bucket in tables.buckets:
        step = _Step.of(bucket, tables)
        for _, (grad, _) in step.streams(bucket, tables.device):
            assert grad is not None
            if step.args.nonfinite_out and not grad.isfinite().all():
                _tensor(step.args.nonfinite_out, 1, torch.float32, tables.device).fill_(1.0)
            scaled = step.scaling.unscale(_wide(grad))
            grad.copy_(_round(scaled * _like(step.scaling.clip_coef, scaled), grad.dtype))
