"""A whole training step in a CUDA graph: the same bits as eager steps, and the time of a replay beside torch's.

The model is the GPT of ``examples/_gpt.py`` with GPT-2's vocabulary and sizes (124 M parameters), float32 under
bfloat16 autocast, on random tokens. Forward, backward, clipping to a norm of 1.0 and AdamW are captured once; the
learning rate, a tensor, follows a cosine from replay to replay. Forward and backward are made deterministic (cuBLAS by
``CUBLAS_WORKSPACE_CONFIG``, attention in plain operations), otherwise two runs would differ without any optimizer.

``measure`` returns a row for fusedopt and one for torch (``clip_grad_norm_``, ``AdamW(capturable=True, fused=True)``):

* ``same_bits``: whether parameters and states after the replays are those of as many eager steps, bit for bit;
* ``gpu_ms``, ``launches``: kernels of a replay; ``gpu_span_ms``: a replay of a run of replays; ``eager_span_ms``: a
  step of a run of eager steps; ``host_ms``, ``wall_ms``: of the call that replays;
* ``tail_ms``, ``tail_launches``: kernels of clipping and update alone, of an eager step.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_

import fusedopt
from examples._gpt import GPT
from fusedopt.bench import timing
from fusedopt.bench.checks import check
from fusedopt.bench.contracts import HYPER, MAX_NORM, Case, Tail, fusedopt_reader, torch_reader
from fusedopt.bench.report import Row
from fusedopt.bench.workloads import BorrowedModel

CONTRACT = "captured_step"
LIBRARIES = ("fusedopt", "torch-fused")

PEAK_LR, LAST_LR = 6e-4, 6e-5
WARM_UP_STEPS = 3

CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""To be set before the process uses cuBLAS for the first time."""


@dataclass(frozen=True)
class Size:
    """A model, its batches, and how many steps are compared and timed."""

    name: str
    vocabulary: int
    positions: int
    width: int
    layers: int
    batch: int
    context: int
    replays: int
    timed: int


GPT2 = Size("gpt2-124M-model", 50257, 1024, 768, 12, batch=4, context=256, replays=50, timed=12)
TINY = Size("tiny-model", 256, 32, 64, 2, batch=2, context=16, replays=5, timed=2)


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms where there are any; memory that is not initialised stays so, which costs nothing."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    os.environ.setdefault(*CUBLAS)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filling


def cosine(step: int, steps: int) -> float:
    """The learning rate of a step."""
    return LAST_LR + (PEAK_LR - LAST_LR) * 0.5 * (1 + math.cos(math.pi * step / steps))


class Training:
    """A model in training: loops that are made alike and fed alike do the same."""

    def __init__(self, library: str, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        torch.manual_seed(0)
        self.model = GPT(size.positions, size.width, size.layers)
        self.model.token = torch.nn.Embedding(size.vocabulary, size.width)  # GPT's own is for bytes
        torch.nn.init.normal_(self.model.token.weight, std=0.02)
        self.model.to(device)
        self.params = list(self.model.parameters())
        self.tokens = torch.zeros((size.batch, size.context + 1), dtype=torch.int64, device=device)
        self.lr = torch.tensor(PEAK_LR, device=device)
        self.optimizer, self.tail = self._optimizer(library)

    def _optimizer(self, library: str) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
        hyper = HYPER["adamw"] | {"lr": self.lr}
        if library == "fusedopt":
            opt = fusedopt.AdamW(self.params, **hyper, max_grad_norm=MAX_NORM)
            return opt, opt.step
        opt = torch.optim.AdamW(self.params, **hyper, capturable=self.device.type == "cuda", fused=True)

        def tail() -> None:
            clip_grad_norm_(self.params, MAX_NORM)
            opt.step()

        return opt, tail

    def feed(self, step: int) -> None:
        """The tokens and the learning rate of a step, into the memory that a graph reads them from."""
        generator = torch.Generator().manual_seed(step)
        shape = tuple(self.tokens.shape)
        self.tokens.copy_(torch.randint(self.size.vocabulary, shape, generator=generator))
        self.lr.fill_(cosine(step, WARM_UP_STEPS + self.size.replays))

    def gradients(self) -> None:
        """Forward and backward."""
        autocast = torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
        with autocast, sdpa_kernel(SDPBackend.MATH):
            loss = self.model.loss(self.tokens)
        loss.backward()

    def backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.gradients()

    def step(self) -> None:
        self.backward()
        self.tail()

    def memory(self) -> list[torch.Tensor]:
        """All that a step changes."""
        states = [value for param in self.params for value in self.optimizer.state[param].values()]
        return [param.detach() for param in self.params] + states


def check_tail(library: str, size: Size, device: torch.device) -> float:
    """Largest error of clipping and update as they are captured, over what rounding allows; see ``checks.check``."""
    loop = Training(library, size, device)
    loop.lr.fill_(HYPER["adamw"]["lr"])
    reader = fusedopt_reader if library == "fusedopt" else torch_reader
    case = Case(size.name, "adamw", "fp32", "clip_step")
    tail = Tail(loop.optimizer, loop.tail, reader(loop.optimizer, case), clips_in_place=library != "fusedopt")
    return check(case, tail, BorrowedModel(loop.params))


def warm_up(loop: Training) -> None:
    for step in range(WARM_UP_STEPS):
        loop.feed(step)
        loop.step()


def capture(loop: Training) -> torch.cuda.CUDAGraph:
    """As torch's documentation has it: warm up on a side stream; then gradients live in the graph's memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        warm_up(loop)
    torch.cuda.current_stream().wait_stream(stream)
    loop.optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop.gradients()
        loop.tail()
    return graph


def same_bits(one: Training, other: Training) -> bool:
    """Whether all parameters and states are equal, and numbers."""
    pairs = list(zip(one.memory(), other.memory(), strict=True))
    return all(bool(torch.equal(a, b)) and bool(a.isfinite().all()) for a, b in pairs)


class Pair:
    """The same training twice: captured and eager."""

    def __init__(self, library: str, size: Size, device: torch.device) -> None:
        self.library, self.size = library, size
        self.check_error_ratio = check_tail(library, size, device)
        self.captured, self.eager = Training(library, size, device), Training(library, size, device)
        self.graph = capture(self.captured)
        warm_up(self.eager)
        self.same_bits = self._compare()
        self.host, self.replay, self.tail = timing.HostTimes(), timing.DeviceTimes(), timing.DeviceTimes()
        self.span: list[float] = []
        self.eager_span: list[float] = []

    def _compare(self) -> bool:
        for step in range(WARM_UP_STEPS, WARM_UP_STEPS + self.size.replays):
            self.captured.feed(step)
            self.graph.replay()
            self.eager.feed(step)
            self.eager.step()
        return same_bits(self.captured, self.eager)

    def measure(self, caches: timing.Caches) -> None:
        timed = self.size.timed
        timing.time_host(self.graph.replay, lambda: None, caches, timed, self.host)
        timing.trace_device(self.graph.replay, lambda: None, caches, timed, self.replay)
        timing.trace_device(self.eager.tail, self.eager.backward, caches, timed, self.tail)
        self.span.append(timing.span_ms(self.graph.replay, lambda: None, timed))
        self.eager_span.append(timing.span_ms(self.eager.step, lambda: None, timed))

    def figures(self) -> Row:
        gpu, tail = [step.ms for step in self.replay.cold], [step.ms for step in self.tail.cold]
        return {
            "gpu_ms": statistics.median(gpu),
            "gpu_ms_min": min(gpu),
            "gpu_ms_max": max(gpu),
            "launches": max(step.kernels for step in self.replay.cold),
            "gpu_span_ms": statistics.median(self.span),
            "eager_span_ms": statistics.median(self.eager_span),
            "wall_ms": statistics.median(self.host.wall),
            "wall_ms_min": min(self.host.wall),
            "wall_ms_max": max(self.host.wall),
            "host_ms": statistics.median(self.host.host),
            "tail_ms": statistics.median(tail),
            "tail_launches": max(step.kernels for step in self.tail.cold),
            "same_bits": self.same_bits,
            "check_error_ratio": self.check_error_ratio,
            "replays": self.size.replays,
            "samples": len(self.host.wall),
            "traced_samples": len(gpu),
        }


def measure(size: Size, device: torch.device, caches: timing.Caches, rounds: int) -> dict[str, Row]:
    """Figures by library, measured in turns."""
    with deterministic():
        pairs = [Pair(library, size, device) for library in LIBRARIES]
        for _ in range(rounds):
            for pair in pairs:
                pair.measure(caches)
    return {pair.library: _subject(pair) | pair.figures() for pair in pairs}


def _subject(pair: Pair) -> Row:
    params = pair.eager.params
    return {"params": sum(param.numel() for param in params), "tensors": len(params)}
