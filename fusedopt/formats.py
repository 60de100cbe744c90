"""Formats as tensors: which one a param group asks for, what it keeps in the state, and conversions between formats.

The kernels decode and encode on the way (``csrc/formats/``). Here the same is written in torch, for what happens once:
new state, checkpoints of another format, exports. Conversions round to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch

from .specs import DTYPES, PARAM_FORMATS, STATE_BLOCK, STATE_FORMATS, ParamFormatSpec, RuleSpec, StateFormatSpec

__all__ = [
    "MASTER_WEIGHTS",
    "OPTIONS",
    "STATE_DTYPES",
    "adopt_entry",
    "check_entry",
    "check_format_options",
    "convert_master",
    "convert_states",
    "decode_master",
    "decode_states",
    "from_elements",
    "in_memory_order",
    "lacks_master",
    "needs_seed",
    "new_states",
    "param_format",
    "scale_key",
    "scale_shape",
    "to_elements",
    "wanted_state_format",
]

OPTIONS: dict[str, Any] = {
    "master_weights": None,
    "state_dtype": None,
    "stochastic_rounding": False,
    "min_8bit_size": 4096,
}
"""Keys of a param group that choose formats, with what they are where a group has none."""

MASTER_WEIGHTS = (None, "fp32", "split16", "split8")
STATE_DTYPES = (None, "fp32", "bf16", "int8")

_TORCH_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}
_STATE_FORMATS = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


# ---- choosing -----------------------------------------------------------------------------------------------


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _option(group: Mapping[str, Any], key: str) -> Any:
    value = group.get(key, OPTIONS[key])
    return _TORCH_NAMES.get(value, value) if isinstance(value, torch.dtype) else value


def check_format_options(where: str, group: Mapping[str, Any], rule: RuleSpec) -> None:
    """ValueError for options that no parameter could have."""
    for key, choices in (
        ("master_weights", MASTER_WEIGHTS),
        ("state_dtype", STATE_DTYPES),
        ("stochastic_rounding", (True, False)),
    ):
        value = _option(group, key)
        if value not in choices:
            raise ValueError(f"{where}: got {key}={value!r}, expected one of {choices}; choose one of them")
    least = _option(group, "min_8bit_size")
    if isinstance(least, bool) or not isinstance(least, int) or least < 0:
        raise ValueError(f"{where}: got min_8bit_size={least!r}, expected a number of elements >= 0; pass an int")
    seed = group.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(
            f"{where}: got seed={seed!r}, expected an int in [0, 2**64); pass one, or None to have one drawn"
        )
    if _option(group, "stochastic_rounding") and _option(group, "master_weights"):
        raise ValueError(
            f"{where}: got stochastic_rounding=True with master_weights={group['master_weights']!r}, expected one of "
            "them: beside an exact master there is nothing to round stochastically; leave one out"
        )
    if _option(group, "state_dtype") == "int8" and not rule.moments:
        raise ValueError(
            f"{where}: got state_dtype='int8' for the rule '{rule.name}', which keeps no moments, expected None; "
            "leave it out"
        )


def param_format(where: str, group: Mapping[str, Any], dtype: torch.dtype) -> ParamFormatSpec:
    """Of a parameter of this dtype in this group; ValueError if the group asks for what the dtype cannot have."""
    master = _option(group, "master_weights")
    name = _name(dtype) if master else _name(dtype.to_real())
    if _option(group, "stochastic_rounding"):
        master, name = "stochastic_rounding", f"{name}+stochastic"
    elif master == "fp32":
        name = f"{name}+master"
    elif master is not None:
        name = master
    if name not in PARAM_FORMATS or PARAM_FORMATS[name].dtype != _name(dtype.to_real()):
        fitting = "bfloat16 or float16" if master == "fp32" else "bfloat16"
        option = "stochastic_rounding=True" if master == "stochastic_rounding" else f"master_weights={master!r}"
        raise ValueError(
            f"{where} has dtype {_name(dtype)} and {option}, expected {fitting}; put parameters of other dtypes into a "
            "param group without it"
        )
    return PARAM_FORMATS[name]


def state_format(where: str, group: Mapping[str, Any], param: torch.Tensor) -> StateFormatSpec:
    """Of the states of this parameter; ValueError for float64 with a lower precision, and for complex with any."""
    wanted, dtype = _option(group, "state_dtype"), _name(param.dtype)
    if dtype == "float64" or param.is_complex():
        if wanted is not None:
            raise ValueError(
                f"{where} has dtype {dtype} and state_dtype={wanted!r}, expected None; put it into a param group "
                "without state_dtype"
            )
        return STATE_FORMATS[_name(param.dtype.to_real())]
    by_default = "float32" if _option(group, "master_weights") else dtype
    name = by_default if wanted is None else _STATE_FORMATS[wanted]
    if STATE_FORMATS[name].blocked and param.numel() < _option(group, "min_8bit_size"):
        name = "float32"
    if name == "bfloat16" and _option(group, "stochastic_rounding"):
        name = "bfloat16+stochastic"
    return STATE_FORMATS[name]


def wanted_state_format(
    where: str, group: Mapping[str, Any], param: torch.Tensor, entry: Mapping[str, Any], rule: RuleSpec
) -> StateFormatSpec:
    """As ``state_format``; but where the group leaves it open, plain states that are there keep their dtype.

    float16 ones beside anything but plain float16 parameters do not.
    """
    wanted = state_format(where, group, param)
    present = [entry[key].dtype for key, _ in _present(entry, rule)]
    if _option(group, "state_dtype") is not None or not present or _name(present[0]) not in DTYPES:
        return wanted
    name = _name(present[0])
    if name == "float16" and wanted.name != "float16":
        return wanted  # float16 states exist beside plain float16 parameters only
    return STATE_FORMATS[f"{name}+stochastic" if name == "bfloat16" and wanted.random else name]


def needs_seed(group: Mapping[str, Any]) -> bool:
    """Whether any format of the group may take random bits."""
    return bool(_option(group, "stochastic_rounding")) or _option(group, "state_dtype") == "int8"


def scale_shape(numel: int) -> tuple[int]:
    """Of the scales of a blocked state."""
    return (-(-numel // STATE_BLOCK),)


def _present(entry: Mapping[str, Any], rule: RuleSpec) -> Iterator[tuple[str, str]]:
    """The states of the rule that are there, each with its moment."""
    return ((key, moment) for key, moment in zip(rule.states, rule.moments) if entry.get(key) is not None)


def _is_coded(state: torch.Tensor) -> bool:
    return not (state.is_floating_point() or state.is_complex())


def check_entry(where: str, entry: Mapping[str, Any], param: torch.Tensor, rule: RuleSpec) -> None:
    """ValueError unless a parameter's state, empty or complete, has shapes and dtypes of some format."""
    if not entry:
        return
    missing = [key for key in ("step", *rule.states) if entry.get(key) is None]
    if missing and rule.torch_counts:
        raise ValueError(
            f"{where} has keys {sorted(map(str, entry))}, expected {missing} too; load a checkpoint of an optimizer "
            f"with the state of '{rule.name}'"
        )
    step = entry.get("step", 0.0)
    if isinstance(step, bool) or not (
        step.numel() == 1 and not step.is_complex() if isinstance(step, torch.Tensor) else isinstance(step, Real)
    ):
        got = f"of shape {tuple(step.shape)}" if isinstance(step, torch.Tensor) else f"{step!r:.50}"
        raise ValueError(
            f"{where}['step'] is {got}, expected a number or a tensor of one element; load a complete checkpoint"
        )
    for key, moment in _present(entry, rule):
        dtypes = (_name(param.dtype),) if param.is_complex() else (*DTYPES, *STATE_FORMATS["int8"].dtypes)
        _check_tensor(f"{where}['{key}']", entry[key], tuple(param.shape), dtypes)
        if _is_coded(entry[key]):
            _check_tensor(f"{where}['{key}']", entry[key], tuple(param.shape), (STATE_FORMATS["int8"].dtype(moment),))
            scale = entry.get(scale_key(key))
            _check_tensor(f"{where}['{scale_key(key)}']", scale, scale_shape(param.numel()), ("float32",))
    for name in {spec.extra[0] for spec in PARAM_FORMATS.values() if spec.extra and spec.extra[0] in entry}:
        dtypes = tuple(dict.fromkeys(s.extra[1] for s in PARAM_FORMATS.values() if s.extra and s.extra[0] == name))
        _check_tensor(f"{where}['{name}']", entry[name], tuple(param.shape), dtypes)
    if "param_remainder" in entry and param.dtype != torch.bfloat16:
        raise ValueError(
            f"{where} has 'param_remainder' beside a parameter of dtype {_name(param.dtype)}, expected bfloat16, whose "
            "lower bits it holds; load it into the model it was saved with"
        )
    present = [key for key, _ in _present(entry, rule)]
    floating = {entry[key].dtype for key in present if entry[key].is_floating_point()}
    kinds = {_is_coded(entry[key]) for key in present}
    wide = bool(present) and param.dtype == torch.float64
    if len(floating) > 1 or len(kinds) > 1 or (torch.float64 in floating) != wide:
        got = ", ".join(f"{key} in {_name(entry[key].dtype)}" for key in present)
        raise ValueError(
            f"{where} has {got} beside a parameter in {_name(param.dtype)}, expected one format for all, float64 only "
            "with float64; load a checkpoint of this model"
        )


def adopt_entry(entry: dict[str, Any], rule: RuleSpec) -> None:
    """Brings a state that torch may have made into our form: torch's SGD counts no steps, and a buffer may be None.

    A buffer that is there has seen a step; the next one, then, is not the first.
    """
    if rule.torch_counts:
        return
    for key in [key for key, value in entry.items() if value is None]:
        del entry[key]
    if entry:
        entry.setdefault("step", 1.0)


def _check_tensor(where: str, tensor: Any, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{where} is a {type(tensor).__name__}, expected a tensor; load a complete checkpoint")
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{where} has shape {tuple(tensor.shape)}, expected {shape}; load the checkpoint of this model"
            + (f", made with blocks of {STATE_BLOCK} elements" if where.endswith("_scale']") else "")
        )
    if _name(tensor.dtype) not in dtypes:
        raise ValueError(
            f"{where} has dtype {_name(tensor.dtype)}, expected {' or '.join(dtypes)}; load a checkpoint of this "
            "optimizer, with the dtypes it was saved with"
        )
    return tensor


def scale_key(state: str) -> str:
    """The state key of the scales of a blocked state."""
    return f"{state}_scale"


# ---- memory order -------------------------------------------------------------------------------------------


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements as a 1-D view, in the order in which they stand in memory: that of blocks."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _like(flat: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``flat``, in memory order, in the shape and layout of the dense ``tensor``."""
    return flat.as_strided(tensor.shape, tensor.stride())


# ---- states -------------------------------------------------------------------------------------------------


def _blocks(flat: torch.Tensor) -> torch.Tensor:
    """Shape (blocks, STATE_BLOCK), padded with zeros."""
    rows = -(-flat.numel() // STATE_BLOCK)
    padded = flat.new_zeros(rows * STATE_BLOCK)
    padded[: flat.numel()] = flat
    return padded.view(rows, STATE_BLOCK)


_TWO = 0x40000000  # the bits of 2.0
_SHIFT = {"first": 20, "second": 19}
"""Bits of a float below a code, by moment, as ``Int8State`` has them."""


def _decode_int8(codes: torch.Tensor, scale: torch.Tensor, moment: str) -> torch.Tensor:
    """scale: of each block, shape (blocks,), or of each element, (blocks, STATE_BLOCK)."""
    scale = scale.view(-1, 1) if scale.dim() == 1 else scale
    blocks = _blocks(in_memory_order(codes).view(torch.uint8)).to(torch.int32)
    magnitude = blocks & 0x7F if moment == "first" else blocks
    values = ((_TWO | (magnitude << _SHIFT[moment])).view(torch.float32) - 2.0) * scale
    values = torch.where(blocks > 0x7F, -values, values) if moment == "first" else values.square()
    return _like(values.view(-1)[: codes.numel()], codes)


def _encode_int8(values: torch.Tensor, moment: str) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = _blocks(in_memory_order(values).float())
    magnitude = blocks.abs() if moment == "first" else blocks.sqrt()
    exponent = magnitude.amax(1, keepdim=True).view(torch.int32) & 0x7F800000
    unit = (exponent - (15 << 23)).clamp(min=0).view(torch.float32)
    unit = torch.where(exponent == 0x7F800000, float("nan"), unit)
    word = (2.0 + magnitude * torch.where(unit > 0, 1.0 / unit, 0.0)).view(torch.int32) - _TWO
    codes = (word + (1 << (_SHIFT[moment] - 1))) >> _SHIFT[moment]
    if moment == "first":
        codes = (codes | torch.where(blocks < 0, 0x80, 0)).to(torch.uint8).view(torch.int8)
    else:
        codes = torch.where(blocks > 0, codes.clamp(min=1), codes).to(torch.uint8)
    return _like(codes.view(-1)[: values.numel()].clone(), values), unit.view(-1).contiguous()


def decode_states(entry: Mapping[str, Any], rule: RuleSpec) -> dict[str, torch.Tensor]:
    """The states of one parameter as plain tensors: float32 where they are in 8 bits."""
    decoded = {}
    for key, moment in _present(entry, rule):
        value = entry[key]
        decoded[key] = _decode_int8(value, entry[scale_key(key)], moment) if _is_coded(value) else value
    return decoded


def convert_states(entry: dict[str, Any], rule: RuleSpec, wanted: StateFormatSpec) -> None:
    """Brings the states of one parameter, dense, into ``wanted``, rounding to nearest; nothing where they are in it."""
    for key, moment in list(_present(entry, rule)):
        dtype = getattr(torch, wanted.dtype(moment))
        value = entry[key]
        if value.dtype == dtype or value.is_complex():  # complex states are never converted
            continue
        if _is_coded(value):
            value = _decode_int8(value, entry.pop(scale_key(key)), moment)
        if wanted.blocked:
            entry[key], entry[scale_key(key)] = _encode_int8(value, moment)
        else:
            entry[key] = value.to(dtype)


def new_states(rule: RuleSpec, wanted: StateFormatSpec, param: torch.Tensor, value: float = 0.0) -> dict[str, Any]:
    """The states that a parameter begins with: ``value`` everywhere, in the layout of the (dense) parameter.

    A complex parameter's are complex, their real and imaginary parts ``value``.
    """
    plain = STATE_FORMATS["float32"] if wanted.blocked and value else wanted  # 0 is 0 in every format
    entry = {}
    for key, moment in zip(rule.states, rule.moments):
        dtype = param.dtype if param.is_complex() else getattr(torch, plain.dtype(moment))
        filling = complex(value, value) if param.is_complex() else value
        entry[key] = torch.full_like(param, filling, dtype=dtype, requires_grad=False)
        if plain.blocked:
            entry[scale_key(key)] = torch.zeros(scale_shape(param.numel()), device=param.device)
    convert_states(entry, rule, wanted)
    return entry


# ---- masters ------------------------------------------------------------------------------------------------


def _word(value: torch.Tensor) -> torch.Tensor:
    """The bits of a float32 tensor as int64 in [0, 2^32)."""
    return value.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def _from_word(word: torch.Tensor) -> torch.Tensor:
    return ((word + 2**31) % 2**32 - 2**31).to(torch.int32).view(torch.float32)


def decode_master(entry: Mapping[str, Any], param: torch.Tensor) -> torch.Tensor:
    """The value of a parameter to all its digits, in the parameter's shape: float32, or wider where it is."""
    if "master_param" in entry:
        master: torch.Tensor = entry["master_param"]
        return master.detach().clone()
    low = entry.get("param_remainder")
    param = param.detach()
    if low is None:
        return param.to(torch.promote_types(param.dtype, torch.float32), copy=True)
    param = param.to(low.device)
    low = low.to(torch.int64) * (1 if low.dtype == torch.int16 else 256)
    return _from_word((_word(param.float()) + low) % 2**32)


def _split(value: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bfloat16 and int16 or int8, as ``Split16`` and ``Split8``."""
    word = _word(value)
    if bits == 8:
        word = (word + 0x80) & ~0xFF
    high = (word + 0x8000) >> 16
    low = (word - (high << 16)) >> (16 - bits)
    high = torch.where(value.isnan(), 0x7FFF, high)
    low = torch.where(value.isnan(), 0, low)
    return _from_word((high << 16) % 2**32).to(torch.bfloat16), low.to(torch.int16 if bits == 16 else torch.int8)


def lacks_master(entry: Mapping[str, Any], wanted: ParamFormatSpec) -> bool:
    """Whether ``convert_master`` will make a second tensor, for which it may read the parameter."""
    if wanted.extra is None:
        return False
    key, dtype = wanted.extra
    return key not in entry or entry[key].dtype != getattr(torch, dtype)


def convert_master(entry: dict[str, Any], param: torch.Tensor, wanted: ParamFormatSpec) -> bool:
    """Gives the state of one (dense) parameter the second tensor that ``wanted`` keeps, and removes any other.

    A new one starts from the parameter. One of another format is converted; then the parameter is written too, because
    formats round ties differently. ``split16`` keeps a float32 master exactly, ``split8`` its upper 24 bits.

    Returns whether the parameter was written, which is the last thing to happen: nothing fails after it.
    """
    key, dtype = wanted.extra or (None, None)
    present = [name for name in ("master_param", "param_remainder") if name in entry]
    if key is None or dtype is None:
        for name in present:
            del entry[name]
        return False
    if present == [key] and entry[key].dtype == getattr(torch, dtype):
        return False
    if not present and key == "param_remainder":
        entry[key] = torch.zeros_like(param, dtype=getattr(torch, dtype), requires_grad=False)
        return False
    value = decode_master(entry, param)
    if key == "master_param":
        main, extra = value.to(param.dtype), value
    else:
        main, extra = _split(value, 16 if dtype == "int16" else 8)
    for name in present:
        del entry[name]
    entry[key] = torch.empty_like(param, dtype=extra.dtype, requires_grad=False).copy_(extra)
    if present:
        with torch.no_grad():
            param.copy_(main)
    return bool(present)


# ---- elements -----------------------------------------------------------------------------------------------
#
# Where a tensor is cut into other parts, blocks begin elsewhere. So checkpoints of parts keep with each element what it
# takes to read it. Keys with a dot name what a state consists of.

_CODE, _EXPONENT = "code", "exponent"
_BITS = {torch.int16: "bits16", torch.int8: "bits8"}
"""Of a split master, by dtype: optimizers that keep 8 and 16 bits do not take one another's for their own."""


def to_elements(entry: dict[str, Any], rule: RuleSpec) -> None:
    """Brings the state of one (dense) parameter into a form that may be cut anywhere, without loss.

    A state ``key`` in blocks becomes ``key.code``, the codes, and ``key.exponent``, uint8 of the same shape: of the
    block's scale, a power of two, as float32 has it. The remainder of a split master becomes ``param_remainder.bits8``
    or ``.bits16``; the latter are called bfloat16, because collectives do not know int16. Memory of codes and
    remainders is shared.
    """
    for key, _ in list(_present(entry, rule)):
        if _is_coded(entry[key]):
            codes, scale = entry.pop(key), entry.pop(scale_key(key))
            exponents = ((scale.view(torch.int32) >> 23) & 0xFF).to(torch.uint8)
            flat = exponents.repeat_interleave(STATE_BLOCK)[: codes.numel()]
            entry[f"{key}.{_CODE}"], entry[f"{key}.{_EXPONENT}"] = codes, _like(flat, codes)
    low = entry.pop("param_remainder", None)
    if low is not None:
        entry[f"param_remainder.{_BITS[low.dtype]}"] = low.view(torch.bfloat16) if low.dtype == torch.int16 else low


def from_elements(where: str, entry: dict[str, Any], dense: torch.Tensor, rule: RuleSpec) -> None:
    """The inverse of ``to_elements``, for a dense parameter, or part of one, in whose memory order blocks are made.

    A block all of whose elements come from blocks of one exponent keeps its codes, bit for bit. Others are decoded and
    encoded again: one more rounding to nearest.

    Raises:
        ValueError: something missing, or of another shape or dtype. ``entry`` is as it was then.
    """
    made: dict[str, Any] = {}
    for key, moment in zip(rule.states, rule.moments):
        codes, exponents = (entry.get(f"{key}.{name}") for name in (_CODE, _EXPONENT))
        if codes is None and exponents is None:
            continue
        dtype = STATE_FORMATS["int8"].dtype(moment)
        codes = _check_tensor(f"{where}['{key}']['{_CODE}']", codes, tuple(dense.shape), (dtype,))
        exponents = _check_tensor(f"{where}['{key}']['{_EXPONENT}']", exponents, tuple(dense.shape), ("uint8",))
        made[key], made[scale_key(key)] = _blocks_of(_laid_out(codes, dense), _laid_out(exponents, dense), moment)
    for bits, name in _BITS.items():
        low = entry.get(f"param_remainder.{name}")
        if low is not None:
            stored = "bfloat16" if bits == torch.int16 else "int8"
            _check_tensor(f"{where}['param_remainder']['{name}']", low, tuple(dense.shape), (stored,))
            made["param_remainder"] = low.view(bits)
    for key in [key for key in entry if isinstance(key, str) and key.partition(".")[0] in made]:
        del entry[key]
    entry.update(made)


def _laid_out(tensor: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(dense, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def _blocks_of(codes: torch.Tensor, exponents: torch.Tensor, moment: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and the scales of their blocks, from codes with an exponent each; dense. Waits for the device."""
    flat = in_memory_order(exponents)
    rows = _blocks(flat)
    rows.view(-1)[flat.numel() :] = flat[-1:]  # the padding is like the last element
    scales = torch.where(rows == 0xFF, float("nan"), (rows.to(torch.int32) << 23).view(torch.float32))
    same = rows.amin(1) == rows.amax(1)
    if same.all():
        return codes, scales[:, 0].contiguous()
    new_codes, new_scales = _encode_int8(_decode_int8(codes, scales, moment), moment)
    kept = same.repeat_interleave(STATE_BLOCK)[: codes.numel()]
    merged = torch.where(kept, in_memory_order(codes), in_memory_order(new_codes))
    return _like(merged, codes), torch.where(same, scales[:, 0], new_scales)
