"""Makes data/*.pt with the real peers, on the CPU: `PYTHONPATH=. python tests/convert/make_data.py [name ...]`.

Needs bitsandbytes, torchao (and a C++ compiler), lion-pytorch, torch-optimi, flashoptim (and Triton), deepspeed (and a
C++ compiler). The peers' versions are in the files.

Where a peer runs on CUDA only, what stands in for CUDA is in this file:
- flashoptim's Triton kernels run in Triton's interpreter (`TRITON_INTERPRET=1`, numpy < 2.3), unfused;
- apex's optimizers are its own, from the folder APEX_PYTHON; its kernels (`amp_C`) are written in torch below, so their
  files hold no next step.
"""

import importlib.metadata
import os
import sys
import types
from collections.abc import Callable
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from samples import BLOCKS, DATA, HYPER, NEXT, SMALL, STEPS, WEIGHTS, params, pattern, sampled, set_grads

torch.set_num_threads(1)


def trained(make: Callable, shapes, dtype):
    """The peer's optimizer after STEPS steps, and its parameters, which are then what `samples.params` says."""
    parameters = params(shapes, dtype)
    opt = make(parameters)
    for step in range(STEPS):
        set_grads(parameters, step)
        opt.step()
    with torch.no_grad():
        for i, param in enumerate(parameters):
            param.copy_(pattern(tuple(param.shape), 100 + i))
    return opt, parameters


def save(name: str, packages: list[str], state_dict, decoded: list[dict], after: list | None) -> None:
    versions = {package: importlib.metadata.version(package) for package in packages if package != "apex"}
    content = {
        "state_dict": state_dict,
        "decoded": [{key: sampled(value) for key, value in states.items()} for states in decoded],
        "after": None if after is None else [sampled(value) for value in after],
        "versions": {**versions, "torch": str(torch.__version__)},
    }
    DATA.mkdir(exist_ok=True)
    torch.save(content, DATA / f"{name}.pt")
    print(f"{name}: {(DATA / f'{name}.pt').stat().st_size} bytes")


def make(name, packages, build, decode, shapes=SMALL, dtype=torch.float32, next_step=True) -> None:
    """decode: from the optimizer and a parameter to the peer's own reading of its states."""
    opt, parameters = trained(build, shapes, dtype)
    decoded = [{key: value.clone() for key, value in decode(opt, p).items()} for p in parameters]
    after = None
    if next_step:  # of a second run, so that the first one's state stays as it is
        again, stepped = trained(build, shapes, dtype)
        set_grads(stepped, NEXT)
        again.step()
        after = [opt_value(again, p) for p in stepped]
    save(name, packages, opt.state_dict(), decoded, after)


def opt_value(opt, param) -> torch.Tensor:
    """The parameter to all its digits."""
    state = opt.state[param]
    if "error_bits" in state:
        return sys.modules["flashoptim.optimizers"].reconstruct_fp32_param(param, state["error_bits"])
    return param.detach().clone()


# ---- bitsandbytes ---------------------------------------------------------------------------------------------------


def bitsandbytes() -> None:
    import bitsandbytes as bnb

    def decode(opt, param):
        state, found = opt.state[param], {}
        for number, key in ((1, "exp_avg"), (2, "exp_avg_sq")):
            value = state.get(f"state{number}")
            if value is not None and value.dtype == torch.uint8:
                value = bnb.functional.dequantize_blockwise(
                    value, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
                )
            if value is not None:
                found[key] = value
        return found

    def adamw(bits):
        return lambda p: bnb.optim.AdamW(p, **HYPER["adamw"], optim_bits=bits, min_8bit_size=256)

    make("bitsandbytes_adamw8bit", ["bitsandbytes"], adamw(8), decode, WEIGHTS)
    make("bitsandbytes_adamw32bit", ["bitsandbytes"], adamw(32), decode)
    lion = lambda p: bnb.optim.Lion8bit(p, **HYPER["lion"], min_8bit_size=256)  # noqa: E731
    make("bitsandbytes_lion8bit", ["bitsandbytes"], lion, decode, WEIGHTS)


# ---- torchao --------------------------------------------------------------------------------------------------------


def torchao() -> None:
    from torchao import optim

    def decode(opt, param):
        states = {key: opt.state[param][key] for key in ("exp_avg", "exp_avg_sq")}
        return {k: v.dequantize() if hasattr(v, "dequantize") and hasattr(v, "codes") else v for k, v in states.items()}

    for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8"):
        build = getattr(optim, name)
        make(f"torchao_{name.lower()}", ["torchao"], lambda p: build(p, **HYPER["adamw"]), decode, BLOCKS)  # noqa: B023


# ---- lion-pytorch, optimi -------------------------------------------------------------------------------------------


def lion_pytorch() -> None:
    from lion_pytorch import Lion

    for name, decoupled in (("lion_pytorch", False), ("lion_pytorch_decoupled", True)):
        hyper = {**HYPER["lion"], **({"weight_decay": 1e-3} if decoupled else {})}
        build = lambda p: Lion(p, **hyper, decoupled_weight_decay=decoupled)  # noqa: B023, E731
        make(name, ["lion-pytorch"], build, lambda opt, p: dict(opt.state[p]))


def optimi() -> None:
    import optimi

    def moments(opt, param):
        """optimi's own division of the moments undone by its own function."""
        from optimi.utils import debias

        group, state = opt.param_groups[0], opt.state[param]
        step = int(group["step"])
        found = {
            "exp_avg": state["exp_avg"].float() * debias(group["beta1"], step),
            "exp_avg_sq": state["exp_avg_sq"].float() * debias(group["beta2"], step),
        }
        if state["kahan_comp"] is not None:
            found["master_param"] = param.detach().float() + state["kahan_comp"].float()
        return found

    def buffer(key):
        return lambda opt, p: {key: opt.state[p]["exp_avg"]}

    package = ["torch-optimi"]
    adamw = lambda p: optimi.AdamW(p, **HYPER["adamw"], triton=False)  # noqa: E731
    make("optimi_adamw", package, adamw, moments)
    make("optimi_adamw_kahan", package, adamw, moments, dtype=torch.bfloat16, next_step=False)
    make("optimi_radam", package, lambda p: optimi.RAdam(p, **HYPER["adamw"], triton=False), moments, next_step=False)
    lion = lambda p: optimi.Lion(p, **{**HYPER["lion"], "weight_decay": 1e-3}, decouple_lr=True, triton=False)  # noqa: E731
    make("optimi_lion", package, lion, buffer("exp_avg"))
    sgd = lambda p: optimi.SGD(p, **HYPER["sgd"], decouple_wd=True, dampening=True, triton=False)  # noqa: E731
    make("optimi_sgdw", package, sgd, buffer("momentum_buffer"))


# ---- flashoptim -----------------------------------------------------------------------------------------------------


def flashoptim() -> None:
    import triton.language as tl
    from flashoptim import optimizers as flash

    def set_data(self, data):
        self._data = None
        self._quantized, self._scales = flash.quantize(
            data, signed=self._signed, sqrt=self._sqrt, softsign=self._softsign
        )

    for kernel in (flash._triton_quantize_kernel, flash._triton_dequantize_kernel):
        kernel.configs = kernel.configs[:1]  # nothing to time in the interpreter
    copysign = types.SimpleNamespace(copysign=lambda x, y: tl.where(y < 0, -x, x))
    on_cpu = [
        mock.patch.object(flash, "_get_sm_count", lambda *args: 1),
        mock.patch.object(flash, "libdevice", copysign),
        mock.patch.object(flash._MaybeQuantizedTensor, "set_data", set_data),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
    ]
    for patch in on_cpu:
        patch.start()

    def decode(opt, param):
        state = opt.state[param]
        found = {key: value.materialize() for key, value in state.items() if hasattr(value, "materialize")}
        if "error_bits" in state:
            found["master_param"] = flash.reconstruct_fp32_param(param, state["error_bits"])
        return found

    package, bf16 = ["flashoptim"], torch.bfloat16
    adamw = lambda p: flash.FlashAdamW(p, **HYPER["adamw"], fused=False)  # noqa: E731
    make("flashoptim_adamw", package, adamw, decode, dtype=bf16)
    lion = lambda p: flash.FlashLion(p, **HYPER["lion"], fused=False, master_weight_bits=32)  # noqa: E731
    make("flashoptim_lion", package, lion, decode, dtype=bf16)
    sgd = lambda p: flash.FlashSGD(  # noqa: E731
        p, **HYPER["sgd"], fused=False, master_weight_bits=None, compress_state_dict=False
    )
    make("flashoptim_sgd", package, sgd, decode)
    for patch in on_cpu:
        patch.stop()


# ---- apex, DeepSpeed ------------------------------------------------------------------------------------------------


def apex() -> None:
    amp_c = types.ModuleType("amp_C")

    def adam(chunk, overflow, lists, lr, beta1, beta2, *rest):
        for grad, _, m, v in zip(*lists):
            m.mul_(beta1).add_(grad, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)

    def sgd(chunk, overflow, lists, decay, momentum, dampening, lr, nesterov, first, *rest):
        for grad, _, buffer in zip(*lists):
            buffer.mul_(momentum).add_(grad, alpha=1 - (0 if first else dampening))

    amp_c.multi_tensor_adam = amp_c.multi_tensor_lamb = adam
    amp_c.multi_tensor_sgd = sgd
    amp_c.multi_tensor_adam_capturable = amp_c.multi_tensor_adam_capturable_master = None
    amp_c.multi_tensor_l2norm = lambda *args: (torch.zeros(1), None)
    sys.modules["amp_C"] = amp_c
    sys.path.insert(0, os.environ["APEX_PYTHON"])
    from apex import optimizers
    from apex.multi_tensor_apply import MultiTensorApply

    MultiTensorApply.available = True
    tensor = torch.tensor

    def on_cpu(*args, device=None, **kwargs):
        return tensor(*args, **kwargs)

    def decode(*keys):
        return lambda opt, p: {key: opt.state[p][key] for key in keys}

    with mock.patch.object(torch, "tensor", on_cpu):
        adamw = lambda p: optimizers.FusedAdam(p, **HYPER["adamw"])  # noqa: E731
        make("apex_adam", ["apex"], adamw, decode("exp_avg", "exp_avg_sq"), next_step=False)
        lamb = lambda p: optimizers.FusedLAMB(p, **HYPER["lamb"])  # noqa: E731
        make("apex_lamb", ["apex"], lamb, decode("exp_avg", "exp_avg_sq"), next_step=False)
        make(
            "apex_sgd",
            ["apex"],
            lambda p: optimizers.FusedSGD(p, **HYPER["sgd"]),
            decode("momentum_buffer"),
            next_step=False,
        )


def deepspeed() -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    def decode(opt, param):
        return {key: opt.state[param][key] for key in ("exp_avg", "exp_avg_sq")}

    make("deepspeed_cpuadam", ["deepspeed"], lambda p: DeepSpeedCPUAdam(p, **HYPER["adamw"]), decode)
    make("deepspeed_fusedadam", ["deepspeed"], lambda p: FusedAdam(p, **HYPER["adamw"]), decode)


ALL = [bitsandbytes, torchao, lion_pytorch, optimi, flashoptim, apex, deepspeed]

if __name__ == "__main__":
    for maker in ALL:
        if not sys.argv[1:] or maker.__name__ in sys.argv[1:]:
            maker()
