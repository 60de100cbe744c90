"""What csrc/bindings.cpp defines, with the names it gives; tests/test_typing.py compares. Addresses are integers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

# Dicts and lists that are read or written in place have to be dicts and lists: no Mapping and no Sequence.
_Group = dict[str, Any]
_State = dict[torch.Tensor, dict[str, Any]]

class Table:
    def __init__(self, chunk_size: int) -> None: ...
    def add(
        self,
        param: int,
        extra: int,
        states: Sequence[int],
        scales: Sequence[int],
        step: int,
        main_grad: int,
        numel: int,
        group: int,
        id: int,
        norms: int = 0,
    ) -> int: ...
    def set_grad(self, index: int, grad: int, /) -> None: ...
    def set_memory(self, slot: int, param: int, grad: int, main_grad: int = 0, has_main: bool = False) -> None: ...
    def entries(self) -> bytes: ...
    def chunks(self) -> bytes: ...
    def pack(self, hypers: Hypers, capacity: int, /) -> None: ...
    @property
    def num_tensors(self) -> int: ...
    @property
    def num_chunks(self) -> int: ...
    def packed_bytes(self, num_groups: int) -> int: ...

class Hypers:
    def __init__(self, keys: Sequence[tuple[str, int]]) -> None: ...
    def pack(self, groups: list[_Group], /) -> list[tuple[int, int]]: ...
    def set_value(self, group: int, k: int, value: float, /) -> None: ...
    def set_lr_address(self, group: int, address: int, is_double: bool, /) -> None: ...
    def learning_rates(self) -> list[float]: ...

class Epoch:
    def __init__(self) -> None: ...
    def advance(self) -> None: ...

class Held:
    def __init__(self, epoch: Epoch) -> None: ...
    value: bool

class Watch:
    def __init__(self) -> None: ...
    def add(
        self,
        param: torch.Tensor,
        as_seen: torch.Tensor,
        group: int,
        grad_dtype: int,
        table: Table | None,
        slot: int,
        has_main_grad: bool,
        held: Held | None = None,
        local: torch.Tensor | None = None,
    ) -> None: ...
    def know_spec(self, row: int, spec: object) -> None: ...
    def remember_state(self, state: _State, /) -> None: ...
    def remember_flags(self, keys: Sequence[str], param_groups: list[_Group], /) -> None: ...
    def refresh(self, param_groups: list[_Group], state: _State, relayout: list[int], bump: bool = False) -> bool: ...
    def bump_versions(self) -> bool: ...
    def has_grads(self) -> bool: ...
    def hold(self) -> None: ...
    def drop_grads(self) -> None: ...
    def __len__(self) -> int: ...

class PassArgs:
    def __init__(self) -> None: ...
    def copy(self) -> PassArgs: ...
    tensors: int
    chunks: int
    step_table: int
    control: int
    partials: int
    norms: int
    @property
    def norm_type(self) -> int: ...
    @property
    def max_grad_value(self) -> float: ...
    seed: int
    num_groups: int
    num_chunks: int
    lead: int
    first_partial: int
    num_partials: int
    finalize: int

class RepeatedStep:
    def __init__(
        self,
        watch: Watch,
        hypers: Sequence[Hypers],
        args: Sequence[PassArgs],
        finding: tuple[torch.device, torch.Tensor],
        scalars: object,
        hooks: tuple[dict[int, Any], ...],
        backend: str | None,
        context_backend: Callable[[], str | None],
        reports: bool,
        accumulator: object,
        divisor: Callable[[], float | None] | None,
        has_own_grads: bool,
        run_passes: Callable[[], object] | None,
    ) -> None: ...
    def launch_on(self, stream_of: Callable[[int], int], device: int | None, /) -> None: ...
    def add(
        self,
        table: Table | None,
        hypers: Hypers | None,
        args: PassArgs,
        context: int,
        function: int,
        grid: int,
        capacity: int,
        overlaps: bool,
        /,
    ) -> None: ...
    def exchange(self, exchange: Callable[[], object], /) -> None: ...
    def serves(self, scalars: object, reports: bool, /) -> bool: ...
    def run(self, optimizer: dict[str, Any], /) -> bool: ...

def rules() -> list[dict[str, Any]]: ...
def cpu_isa() -> str: ...
def has_tensor_layout() -> bool: ...
def finds_tensor_layout() -> bool: ...
def has_shard_layout() -> bool: ...
def has_torch_functions() -> bool: ...
def set_scalars(
    args: Sequence[PassArgs],
    grad_scale: int,
    found_inf: int,
    clip_coef: int,
    norm_found_inf: int,
    max_grad_value: float,
    max_norm: float,
    norm_type: int,
    skip_nonfinite: bool,
    nonfinite_out: int,
    grad_weight: float,
    grad_weight_at: int,
    grad_divisor: float,
    grad_divisor_at: int,
    /,
) -> None: ...
def pack_step(to: int, previous: int, args: PassArgs, table: Table, hypers: Hypers) -> bool: ...
def cpu_measure(
    table: Table,
    hypers: Hypers,
    rule: int,
    param_format: int,
    grad_dtype: int,
    main_dtype: int,
    state_format: int,
    args: PassArgs,
    threads: int,
    begin: int = 0,
    end: int = -1,
) -> None: ...
def cpu_update(
    table: Table,
    hypers: Hypers,
    rule: int,
    param_format: int,
    grad_dtype: int,
    main_dtype: int,
    state_format: int,
    args: PassArgs,
    threads: int,
    begin: int = 0,
    end: int = -1,
) -> None: ...
def cpu_norm(
    table: Table,
    grad_dtype: int,
    main_dtype: int,
    args: PassArgs,
    sum: float,
    nonfinite: float,
    threads: int,
    /,
) -> tuple[float, float]: ...
def cpu_accumulate(table: Table, grad_dtype: int, main_dtype: int, args: PassArgs, threads: int, /) -> None: ...
def cpu_scale(table: Table, grad_dtype: int, args: PassArgs, threads: int, /) -> None: ...
def cpu_finalize_norm(args: PassArgs, sum: float, nonfinite: float, /) -> None: ...
def cuda_driver_version() -> int: ...
def cuda_primary_context(device: int, /) -> int: ...
def cuda_load(context: int, cubin: bytes, name: str, /) -> int: ...
def cuda_launch(
    context: int,
    function: int,
    grid: int,
    stream: int,
    args: PassArgs,
    table: Table | None,
    overlaps: bool,
    /,
) -> None: ...
def cuda_launch_words(
    context: int,
    function: int,
    grid: int,
    threads: int,
    shared_bytes: int,
    stream: int,
    words: Sequence[int],
    /,
) -> None: ...
def cuda_upload(
    context: int,
    function: int,
    stream: int,
    to: int,
    table: Table,
    offset: int,
    bytes: int,
    capacity: int,
    /,
) -> None: ...
