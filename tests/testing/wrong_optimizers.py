"""Optimizers with one defect each, of kinds that have been shipped. `fusedopt verify` must find every one."""

import os
from types import SimpleNamespace

import torch


class Wrong(torch.optim.Optimizer):
    """AdamW in plain torch; `update` of the subclasses goes wrong somewhere."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                    state["step"] += 1
                    self.update(p, self.gradient(p.grad), state, **group)

    def gradient(self, grad):
        return grad

    def moments(self, grad, state, betas):
        state["m"].mul_(betas[0]).add_(grad * (1 - betas[0]))
        state["v"].mul_(betas[1]).add_(grad * grad * (1 - betas[1]))

    def corrected(self, state, betas):
        return state["m"] / (1 - betas[0] ** state["step"]), state["v"] / (1 - betas[1] ** state["step"])

    def denominator(self, v, eps):
        return v.sqrt() + eps

    def update(self, p, grad, state, *, lr, betas, eps, weight_decay, **_):
        p.mul_(1 - lr * weight_decay)
        self.moments(grad, state, betas)
        m, v = self.corrected(state, betas)
        p.sub_(lr * (m / self.denominator(v, eps)))


class RightAdamW(Wrong):
    """No defect: what shows that the others are found for theirs."""


class CountsInTheGroup(Wrong):
    """As apex does: right where all parameters have a gradient in each step."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            self.count(group)
        super().step(closure)

    def count(self, group):
        group["step"] = group.get("step", 0) + 1

    def update(self, p, grad, state, *, step, **rest):
        super().update(p, grad, {**state, "step": float(step)}, **rest)


class CountsInTheGroupsTensor(CountsInTheGroup):
    """In place, as optimi does."""

    def count(self, group):
        group.setdefault("step", torch.tensor(0.0)).add_(1)


class EpsInsideTheRoot(Wrong):
    def denominator(self, v, eps):
        return (v + eps).sqrt()


class NoBiasCorrection(Wrong):
    def corrected(self, state, betas):
        return state["m"], state["v"]


class DecayAfterTheStep(Wrong):
    def update(self, p, grad, state, *, lr, weight_decay, **rest):
        super().update(p, grad, state, lr=lr, weight_decay=0.0, **rest)
        p.mul_(1 - lr * weight_decay)


class DecayIntoTheGradient(Wrong):
    def update(self, p, grad, state, *, weight_decay, **rest):
        super().update(p, grad + weight_decay * p, state, weight_decay=0.0, **rest)


class SwallowsNaN(Wrong):
    def gradient(self, grad):
        return grad.nan_to_num(nan=0.0, posinf=float("inf"), neginf=float("-inf"))


class HalfPrecisionMoment(Wrong):
    def moments(self, grad, state, betas):
        super().moments(grad, state, betas)
        state["v"].copy_(state["v"].bfloat16())


class SharedCounter(Wrong):
    """One step counter for all parameters, wrong where gradients come and go."""

    def step(self, closure=None):
        self.steps = getattr(self, "steps", 0) + 1
        super().step()

    def corrected(self, state, betas):
        return super().corrected({**state, "step": self.steps}, betas)


class SkipsTheLastElement(Wrong):
    def update(self, p, grad, state, **hyper):
        last = p.detach().reshape(-1)[-1:].clone()
        super().update(p, grad, state, **hyper)
        if p.numel() > 1 and p.is_contiguous():
            p.view(-1)[-1:] = last


class RightLion(Wrong):
    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)

    def sign(self, c):
        return c.sign() + 0 * c  # NaN where it is NaN

    def update(self, p, grad, state, *, lr, betas, weight_decay, **_):
        p.mul_(1 - lr * weight_decay)
        c = state["m"] * betas[0] + grad * (1 - betas[0])
        p.sub_(lr * self.sign(c.clamp(-1, 1)))
        state["m"].mul_(betas[1]).add_(grad * (1 - betas[1]))


class LionWithSignOfZeroOne(RightLion):
    def sign(self, c):
        return torch.where(c >= 0, 1.0, -1.0).to(c) + 0 * c


RIGHT = (RightAdamW, RightLion)
WRONG = (
    EpsInsideTheRoot,
    NoBiasCorrection,
    DecayAfterTheStep,
    DecayIntoTheGradient,
    SwallowsNaN,
    HalfPrecisionMoment,
    SharedCounter,
    SkipsTheLastElement,
    LionWithSignOfZeroOne,
)


def make_adamw(params, **kwargs):
    return torch.optim.AdamW(params, **kwargs)


def make_nothing(params, **kwargs):
    return object()


def make_groups_alone(params, **kwargs):
    return SimpleNamespace(param_groups=[{"params": list(params), **kwargs}], state={})


def make_without_counter(params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """Neither state nor param groups have a "step"."""
    return torch.optim.SGD(params, lr=lr, weight_decay=weight_decay)


NOT_CALLABLE = 3


class Dies(torch.optim.SGD):
    """Ends its process, as a wild write of a kernel does, where it meets a NaN."""

    def step(self):
        if any(p.grad.isnan().any() for group in self.param_groups for p in group["params"]):
            os._exit(3)
        super().step()
