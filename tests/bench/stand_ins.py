"""Stand-ins for other libraries' optimizers: each keeps values, states and counts where the library does.

They are what `fusedopt.bench.peers` reads, without the libraries and their GPUs; the arithmetic is in float32, except
where 8 bits are kept.
"""

import math
from types import SimpleNamespace

import torch


class Optimizer(torch.optim.Optimizer):
    """AdamW, or Lion where ``betas`` come without ``eps``. Subclasses say how a state is kept."""

    names = ("exp_avg", "exp_avg_sq")

    def __init__(self, params, lr, betas, weight_decay, eps=None, **options):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.options, self.count = options, 0
        self.moments = self.names if eps is not None else self.names[:1]

    @torch.no_grad()
    def step(self):
        self.count += 1
        (group,) = self.param_groups
        for p in group["params"]:
            entry = self.state[p]
            states = [self.load(entry, key) if entry else torch.zeros_like(p).float() for key in self.moments]
            value = self.value(p, entry).clone()
            self.update(value, p.grad.float(), states, **{key: group[key] for key in ("lr", "eps", "weight_decay")})
            for key, state in zip(self.moments, states):
                self.keep(entry, key, state)
            self.keep_value(p, entry, value)
            self.keep_count(entry, p)

    def update(self, value, grad, states, lr, eps, weight_decay):
        beta1, beta2 = self.param_groups[0]["betas"]
        value.mul_(1 - lr * weight_decay)
        if eps is None:
            (m,) = states
            value.sub_(lr * (beta1 * m + (1 - beta1) * grad).sign())
            m.copy_(beta2 * m + (1 - beta2) * grad)
            return
        m, v = states
        m.copy_(beta1 * m + (1 - beta1) * grad)
        v.copy_(beta2 * v + (1 - beta2) * grad * grad)
        bias1, bias2 = 1 - beta1**self.count, 1 - beta2**self.count
        value.sub_(lr * (m / bias1) / ((v / bias2).sqrt() + eps))

    def load(self, entry, key):
        return entry[key].float()

    def keep(self, entry, key, state):
        """In the parameters' dtype, but for those with masters."""
        entry[key] = state if self.options.get("master_weights") else state.to(self.param_groups[0]["params"][0].dtype)

    def value(self, p, entry):
        return p.detach().float()

    def keep_value(self, p, entry, value):
        p.copy_(value)

    def keep_count(self, entry, p):
        entry["step"] = self.count


class CountsInTheGroup(Optimizer):
    """apex."""

    def keep_count(self, entry, p):
        self.param_groups[0]["step"] = self.count


class ApexOfHalves(CountsInTheGroup):
    """Float32 masters in param groups of their own; a scaler hands itself over, and the step unscales."""

    def __init__(self, params, capturable=False, master_weights=False, **options):
        super().__init__(params, master_weights=master_weights, **options)
        self._step_supports_amp_scaling = capturable
        if master_weights:
            self.masters = {p: p.detach().float().clone() for p in self.param_groups[0]["params"]}
            self.param_groups_master = [{"params": list(self.masters.values())}]

    def step(self, closure=None, *, grad_scaler=None):
        if grad_scaler is not None:
            grad_scaler._check_inf_per_device(self)
            for p in self.param_groups[0]["params"]:
                p.grad = (p.grad.double() / grad_scaler.get_scale()).to(p.dtype)
        super().step()

    def value(self, p, entry):
        return self.masters[p] if hasattr(self, "masters") else super().value(p, entry)

    def keep_value(self, p, entry, value):
        if hasattr(self, "masters"):
            self.masters[p].copy_(value)
        super().keep_value(p, entry, value)


class WithMaster(CountsInTheGroup):
    """transformer-engine."""

    def value(self, p, entry):
        return entry.get("master_param", super().value(p, entry))

    def keep_value(self, p, entry, value):
        if self.options["master_weights"]:
            entry["master_param"] = value
        super().keep_value(p, entry, value)


class CountsInTheLast(Optimizer):
    """deepspeed."""

    def keep_count(self, entry, p):
        if p is self.param_groups[0]["params"][-1]:
            entry["step"] = self.count


class CountsNone(Optimizer):
    """lion-pytorch."""

    def keep_count(self, entry, p):
        pass


class Numbered(Optimizer):
    """bitsandbytes with 32 bits."""

    names = ("state1", "state2")


class NumberedCodes(Numbered):
    """bitsandbytes with 8 bits: codes of a table, times the largest magnitude of 256 elements."""

    table = torch.linspace(-1.0, 1.0, 255)

    def keep(self, entry, key, state):
        n, number = state.numel(), key[-1]
        blocks = torch.nn.functional.pad(state.flatten(), (0, -n % 256)).view(-1, 256)
        scales = blocks.abs().amax(1).clamp(min=1e-30)
        codes = ((blocks / scales[:, None] + 1) * 127).round().flatten()[:n]
        entry[key], entry[f"absmax{number}"] = codes.to(torch.uint8).view_as(state), scales
        entry[f"qmap{number}"] = self.table

    def load(self, entry, key):
        codes, scales = entry[key], entry[f"absmax{key[-1]}"].repeat_interleave(256)[: entry[key].numel()]
        return entry[f"qmap{key[-1]}"][codes.int()] * scales.view_as(codes)


class Coded:
    """A state of torchao's in 8 bits."""

    def __init__(self, state):
        self.scale = state.abs().amax().clamp(min=1e-30)
        self.codes = (state / self.scale * 127).round().to(torch.int8)

    def dequantize(self):
        return self.codes.float() / 127 * self.scale

    float = materialize = dequantize


class InCodes(Optimizer):
    """torchao, and flashoptim, which calls it ``materialize``."""

    def keep(self, entry, key, state):
        entry[key] = Coded(state)


class WithErrorBits(InCodes):
    """flashoptim: what is lost by the rounding to bfloat16, kept beside it; Lion counts no steps."""

    def value(self, p, entry):
        return p.detach().float() + entry.get("error_bits", 0.0)

    def keep_value(self, p, entry, value):
        super().keep_value(p, entry, value)
        entry["error_bits"] = value - p.detach().float()

    def keep_count(self, entry, p):
        if len(self.moments) == 2:
            entry["step"] = self.count


class Corrected(Optimizer):
    """optimi: averages that are divided by 1 - beta^t, and the count, a tensor, in the group."""

    def correction(self, key, count):
        betas = self.param_groups[0]["betas"]
        return 1 - betas[self.names.index(key)] ** count if len(self.moments) == 2 else 1.0

    def load(self, entry, key):
        return entry[key].float() * self.correction(key, self.count - 1)

    def keep(self, entry, key, state):
        super().keep(entry, key, state / self.correction(key, self.count))

    def keep_count(self, entry, p):
        self.param_groups[0]["step"] = torch.tensor(self.count)


def clip_grad_norm_(params, max_norm):
    """apex's own, for float16 too: the norm is taken in float32."""
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in params))
    for p in params:
        p.grad.mul_(min(1.0, max_norm / (norm + 1e-6)))


def modules() -> dict[str, object]:
    """By name, as `fusedopt.bench.peers` imports them."""
    bnb = {name + bits: cls for name in ("AdamW", "Lion") for bits, cls in (("", Numbered), ("8bit", NumberedCodes))}
    torchao = SimpleNamespace(AdamW8bit=InCodes, _AdamW=Optimizer)
    return {
        "amp_C": SimpleNamespace(),
        "apex": SimpleNamespace(),
        "apex.optimizers": SimpleNamespace(FusedAdam=ApexOfHalves),
        "apex.contrib": SimpleNamespace(),
        "apex.contrib.clip_grad": SimpleNamespace(clip_grad_norm_=clip_grad_norm_),
        "transformer_engine": SimpleNamespace(),
        "transformer_engine.pytorch": SimpleNamespace(),
        "transformer_engine.pytorch.optimizers": SimpleNamespace(FusedAdam=WithMaster),
        "deepspeed": SimpleNamespace(__version__="1.2"),
        "deepspeed.ops": SimpleNamespace(),
        "deepspeed.ops.adam": SimpleNamespace(FusedAdam=CountsInTheLast, DeepSpeedCPUAdam=CountsInTheLast),
        "bitsandbytes": SimpleNamespace(optim=SimpleNamespace(**bnb)),
        "torchao": SimpleNamespace(optim=torchao),
        "torchao.optim": torchao,
        "flashoptim": SimpleNamespace(
            FlashAdamW=WithErrorBits,
            FlashLion=WithErrorBits,
            reconstruct_fp32_param=lambda param, error_bits: param.float() + error_bits,
        ),
        "optimi": SimpleNamespace(AdamW=Corrected, Lion=Corrected),
        "lion_pytorch": SimpleNamespace(Lion=CountsNone),
    }
