"""Every CUDA kernel is compiled, which needs no GPU, and none spills registers unless it may."""

import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import pytest
import torch

from fusedopt import formats
from fusedopt.backends import nvrtc
from fusedopt.specs import DTYPES, PARAM_FORMATS, RULES

ARCH = "sm_90"  # kernels are tuned on it


def sections(cubin: bytes):
    """(name, content) of each section of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(count)]
    for name, _, _, _, offset, length in headers:
        start = headers[names][4] + name
        yield cubin[start : cubin.index(b"\0", start)].decode(), cubin[offset : offset + length]


def frame_bytes(cubin: bytes) -> int:
    """The largest stack frame of a cubin's functions: spilled registers, and arrays with an index known at run time.

    The compiler records it in section .nv.info, a list of (format, attribute, value or length of a value). Attribute
    0x11, EIATTR_FRAME_SIZE, holds the function's number and its bytes.
    """
    frames = []
    for content in (content for name, content in sections(cubin) if name == ".nv.info"):
        at = 0
        while at < len(content):
            kind, attribute, value = struct.unpack_from("<2BH", content, at)
            length = value if kind == 4 else 0
            if attribute == 0x11:
                frames.append(struct.unpack_from("<2I", content, at + 4)[1])
            at += 4 + length
    return max(frames)


@dataclass(frozen=True)
class Source:
    """A kernel written out, where a ``KernelSpec`` is expected."""

    text: str

    def source(self) -> str:
        return self.text


# Rules, and formats of parameters and states, whose figures the benchmarks show.
MEASURED_RULES = ("adam", "adamw", "lion", "sgd", "sgd_momentum", "rmsprop", "adagrad")
MEASURED_FORMATS = (
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16+master", "float32"),
    ("float16+master", "float32"),
    ("split16", "float32"),
    ("split16", "bfloat16"),
    ("bfloat16+stochastic", "bfloat16+stochastic"),
    ("split8", "int8"),
    ("bfloat16", "int8"),
    ("float32", "int8"),
)
TWO_BYTES = {spec.cpp for spec in PARAM_FORMATS.values() if spec.dtype in ("bfloat16", "float16")}
TWO_PHASES = {spec.cpp for spec in RULES.values() if spec.norms}
OTHER_STRUCTS = {spec.cpp for name, spec in RULES.items() if name not in MEASURED_RULES}


def measured_kernels(rule: str) -> list[nvrtc.KernelSpec]:
    return [nvrtc.update_kernel(rule, param, PARAM_FORMATS[param].dtype, state) for param, state in MEASURED_FORMATS]


# Where launch bounds leave too few registers, the compiler spills some; never whole vectors. Largest frame in bytes,
# with NVRTC 13.5, on the architecture that kernels are tuned on and on the others. All other kernels have none.
SPILLED_BYTES = {
    "norm of float64": (72, 96),
    "norm": (0, 56),
    "norm, small models": (16, 16),
    "accumulation of float64": (104, 104),
    "accumulation in float32, 2-byte parameters": (0, 24),  # 16 elements a thread, and two gradients
    "update, stochastic states": (0, 32),
    "update, other rules": (40, 48),
    "update, two phases": (8, 32),
}


def spills_as(kernel: nvrtc.KernelSpec) -> str | None:
    """The row of `SPILLED_BYTES`."""
    if kernel.template == "norm_pass":
        if "Float64" in kernel.arguments:
            return "norm of float64"
        return "norm, small models" if "Tuning::kLatency" in kernel.arguments else "norm"
    if kernel.template == "update_pass" and kernel.arguments[1] == "PlainFloat64" and "NoMain" not in kernel.arguments:
        return "accumulation of float64"
    if TWO_PHASES & set(kernel.arguments):
        return "update, two phases"
    if OTHER_STRUCTS & set(kernel.arguments):
        return "update, other rules"
    if "StochasticState" in kernel.arguments:
        return "update, stochastic states"
    if kernel.template == "update_pass" and kernel.arguments[1] in TWO_BYTES and kernel.arguments[4] == "Float32":
        return "accumulation in float32, 2-byte parameters"
    return None


def allowed_frame_bytes(kernel: nvrtc.KernelSpec, arch: str) -> int:
    row = spills_as(kernel)
    return SPILLED_BYTES[row][arch != ARCH] if row else 0


def compile_all(kernels, arch) -> None:
    """Each must become a cubin that has its entry point and keeps its vectors in registers."""
    with ThreadPoolExecutor(2) as pool:
        cubins = list(pool.map(lambda kernel: nvrtc.compile_kernel(kernel, arch), kernels))
    assert all(cubin.startswith(b"\x7fELF") and nvrtc.ENTRY.encode() in cubin for cubin in cubins)
    frames = {kernel: frame_bytes(cubin) for kernel, cubin in zip(kernels, cubins, strict=True)}
    assert not {kernel: size for kernel, size in frames.items() if size > allowed_frame_bytes(kernel, arch)}


TABLES = {"small": nvrtc.SMALL_TABLE, "medium": nvrtc.MEDIUM_TABLE, "large": nvrtc.LARGE_TABLE, "device": 0}

# All kernels for all architectures would take an hour: five times some 2,100, a third of a second each. A kernel is
# made of a rule, formats, dtypes and a table, each written once. So every kernel is compiled for one architecture, in
# turn, and for each architecture kernels enough that any two of these that go together do so there. For all
# architectures besides:
EVERYWHERE = ("adamw", "lion")  # in MEASURED_FORMATS


def accumulation_kernels() -> list[nvrtc.KernelSpec]:
    """The passes over main gradients: updates in all formats for one rule, in plain ones for the others."""
    kernels = [*nvrtc.accumulated_gradient_kernels(), *nvrtc.accumulation_kernels("adamw")]
    for rule in RULES:
        mains = {dtype: "float64" if dtype == "float64" else "float32" for dtype in DTYPES}
        updates = [nvrtc.update_kernel(rule, dtype, dtype, dtype, main=main) for dtype, main in mains.items()]
        kernels += nvrtc.with_measuring(updates)
    return list(dict.fromkeys(kernels))


def parts_of(kernel: nvrtc.KernelSpec) -> tuple:
    return (kernel.template, kernel.table_bytes, *kernel.arguments)


def pairs_of(kernel: nvrtc.KernelSpec) -> set[tuple]:
    """Any two of its parts, each with its place."""
    return set(combinations(enumerate(parts_of(kernel)), 2))


def in_turn(turn: int, turns: int) -> list[nvrtc.KernelSpec]:
    """A share of all kernels; the shares of all turns are disjoint, and together they are all."""
    chosen, seen = [], set()
    for r, rule in enumerate(RULES):  # shifted, so that a format meets another architecture with each rule
        kernels = nvrtc.update_kernels(rule)
        chosen += [kernel for i, kernel in enumerate(kernels) if (i + r) % turns == turn]
        seen |= set(kernels)
    for kernels in (nvrtc.common_kernels(), accumulation_kernels()):
        chosen += [kernel for i, kernel in enumerate(kernels) if i % turns == turn and kernel not in seen]
        seen |= set(kernels)
    return chosen


def with_every_pair(chosen: list[nvrtc.KernelSpec], every: list[nvrtc.KernelSpec]) -> list[nvrtc.KernelSpec]:
    """These and more, until each pair of parts is there; those that bring many come first, so that it takes few."""
    pairs = {kernel: pairs_of(kernel) for kernel in every}
    missing = set().union(*pairs.values()).difference(*(pairs[kernel] for kernel in chosen))
    chosen = list(chosen)
    for least in (8, 4, 3, 2, 1):
        for kernel in every:
            if len(pairs[kernel] & missing) >= least:
                chosen.append(kernel)
                missing -= pairs[kernel]
    return chosen


def every_kernel() -> list[nvrtc.KernelSpec]:
    return list(dict.fromkeys([*nvrtc.all_kernels(), *accumulation_kernels()]))


@cache
def kernels_for(arch: str) -> list[nvrtc.KernelSpec]:
    """What is compiled for this architecture."""
    chosen = in_turn(nvrtc.ARCHITECTURES.index(arch), len(nvrtc.ARCHITECTURES))
    for rule in MEASURED_RULES if arch == ARCH else EVERYWHERE:
        chosen += measured_kernels(rule)
    chosen += nvrtc.gradient_kernels() if arch == ARCH else []
    return with_every_pair(list(dict.fromkeys(chosen)), every_kernel())


PARTS = 10  # of an architecture's kernels, so that processes can share the work


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_every_kernel_compiles(arch, part):
    """Without spilling more than `SPILLED_BYTES`."""
    compile_all(kernels_for(arch)[part::PARTS], arch)


def test_every_kernel_is_compiled():
    """For some architecture, every one; for every architecture, any two of rules, formats, dtypes and tables."""
    compiled = [kernels_for(arch) for arch in nvrtc.ARCHITECTURES]
    every = every_kernel()
    assert set().union(*compiled) == set(every)
    assert set(TABLES.values()) <= {part for kernel in every for part in parts_of(kernel)}
    pairs = set().union(*map(pairs_of, every))
    assert all(set().union(*map(pairs_of, kernels)) == pairs for kernels in compiled)
    assert all(len(set(kernels)) == len(kernels) for kernels in compiled)


@pytest.mark.parametrize("rule", MEASURED_RULES)
def test_what_is_measured_may_not_spill(rule):
    """The figures of the benchmarks are those of kernels whose limit is 0."""
    for kernel in measured_kernels(rule):
        assert kernel in kernels_for(ARCH) and allowed_frame_bytes(kernel, ARCH) == 0


@pytest.mark.parametrize("rule", MEASURED_RULES)
def test_float32_main_gradients_may_not_spill(rule):
    """Nor do main gradients of masters, splits and plain parameters make them."""
    kernels = [
        nvrtc.update_kernel(rule, param, PARAM_FORMATS[param].dtype, state, latency_bound=low, main="float32")
        for param, state, low in (
            ("float32", "float32", False),
            ("bfloat16", "bfloat16", False),
            ("bfloat16+master", "float32", False),
            ("float16+master", "float32", False),
            ("split16", "float32", False),
            ("split16", "bfloat16", False),
            ("split8", "float32", False),
        )
    ]
    assert set(kernels) <= set(nvrtc.accumulation_kernels(rule))
    assert all(allowed_frame_bytes(kernel, ARCH) == 0 for kernel in kernels)


def test_combinations_are_those_that_options_give():
    """Parameter and state formats that some param group asks for, each with gradients of every dtype that may be."""
    found, large = set(), 4096
    for dtype, master, state, stochastic in product(
        DTYPES, formats.MASTER_WEIGHTS, formats.STATE_DTYPES, (False, True)
    ):
        group = {"master_weights": master, "state_dtype": state, "stochastic_rounding": stochastic}
        param = torch.zeros(large, dtype=getattr(torch, dtype))
        try:
            formats.check_format_options("group", group, RULES["adamw"])
            chosen = formats.param_format("p", group, param.dtype).name, formats.state_format("p", group, param).name
        except ValueError:
            continue
        found |= {(chosen[0], grad, chosen[1]) for grad in DTYPES if (grad == "float64") == (dtype == "float64")}
    assert set(nvrtc.combinations()) == found
    assert len(nvrtc.combinations()) == len(found)


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_local_memory_is_noticed(arch):
    """64 floats with an index known at run time."""
    kernel = Source(
        'extern "C" __global__ void fusedopt_entry(float* x, int n) {'
        "  float a[64];"
        "  for (int i = 0; i < n; ++i) a[i * 7 % 64] = x[i];"
        "  for (int i = 0; i < n; ++i) x[i] = a[i * 5 % 64];"
        "}"
    )
    assert frame_bytes(nvrtc.compile_kernel(kernel, arch)) == 64 * 4
