"""Steps that are recorded once: in a CUDA graph, or by ``torch.compile``.

``fusedopt-captured``, ``torch-captured``: the tail in a CUDA graph, which reads the gradients from tensors of its own;
copying them there is no part of the step. torch's is its fused optimizer, ``capturable``, after ``clip_grad_norm_``;
its documentation keeps ``GradScaler`` out of graphs, and captured here, its steps came out wrong. ``torch-compiled``:
``torch.compile`` over clipping and torch's foreach optimizer.
"""

from __future__ import annotations

import inspect
from dataclasses import replace

import torch

from . import contracts
from .contracts import CLASSES, Case, Params, Tail

LIBRARIES = ("fusedopt-captured", "torch-captured", "torch-compiled")

CONTRACTS = {
    "fusedopt-captured": ("step", "clip_step", "scaler_clip_step"),
    "torch-captured": ("step", "clip_step"),
    "torch-compiled": ("step", "clip_step"),
}

_WARM_UP_STEPS = 2


def offered(case: Case, device: torch.device) -> list[str]:
    """Those of ``LIBRARIES`` that can do the case. After the warm-up states go back to 0, which masters must not."""
    plain = not case.param_spec.extra and case.contract in CONTRACTS["fusedopt-captured"]
    names = ["fusedopt-captured"] if plain and device.type == "cuda" else []
    if contracts.torch_offers("torch-foreach", case, device):
        capturable = "capturable" in inspect.signature(getattr(torch.optim, CLASSES[case.optimizer])).parameters
        names += ["torch-captured"] if capturable and device.type == "cuda" else []
        names += ["torch-compiled"]
    return [name for name in names if case.contract in CONTRACTS[name]]


def build(library: str, case: Case, params: Params) -> Tail:
    """The tail of one of ``offered(case)`` over ``params``; its optimizer has no state yet, or zeros."""
    if library == "fusedopt-captured":
        return _captured(contracts.build("fusedopt", case, params), params)
    if library == "torch-captured":
        way = "fused" if contracts.torch_fuses(CLASSES[case.optimizer], params[0].device.type) else "foreach"
        opt = contracts.torch_optimizer(case, params, capturable=True, **{way: True})
        return _captured(_torch_tail(case, opt, params), params)
    torch._dynamo.reset()  # the graphs of other cases count towards its limit, beyond which it compiles no more
    tail = _torch_tail(case, contracts.torch_optimizer(case, params, foreach=True), params)
    return replace(tail, run=torch.compile(tail.run))


def _torch_tail(case: Case, opt: torch.optim.Optimizer, params: Params) -> Tail:
    if case.contract == "step":
        return contracts.torch_tail(opt, opt.step, clips=False)
    return contracts.clipped(opt, params)


def _captured(tail: Tail, params: Params) -> Tail:  # on a GPU alone
    """The tail in a graph, as torch's documentation has it: after a warm-up on a side stream."""
    gradients = [torch.zeros_like(param, requires_grad=False) for param in params]
    for param, gradient in zip(params, gradients):
        param.grad = gradient
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_STEPS):
            tail.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tail.run()
    for entry in tail.optimizer.state.values():
        for value in filter(torch.is_tensor, entry.values()):
            value.zero_()
    for param in params:
        param.grad = None
    return replace(tail, run=graph.replay, gradients=gradients)
