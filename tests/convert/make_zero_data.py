"""Makes data/deepspeed_zero*/ with the real DeepSpeed on two CPU processes (gloo):

DS_ACCELERATOR=cpu PYTHONPATH=. torchrun --nproc-per-node 2 tests/convert/make_zero_data.py

The ranks' files are DeepSpeed's own. truth.pt holds the model, and the float32 weights as DeepSpeed gathers them, then
and after the next step.
"""

import shutil
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from samples import DATA, HYPER, NEXT, STEPS, pattern

torch.set_num_threads(1)
SHAPES = {"embedding": (7, 11), "weight": (5, 7), "bias": (7,), "scale": (5,)}
DECAYED = 2


class Linear(torch.nn.Module):
    """A sum of parameters times constants, which then are its gradients."""

    def __init__(self) -> None:
        super().__init__()
        for i, (name, shape) in enumerate(SHAPES.items()):
            self.register_parameter(name, torch.nn.Parameter(pattern(shape, 100 + i)))

    def forward(self, step: int) -> torch.Tensor:
        grads = [pattern(shape, 10 * step + i) for i, shape in enumerate(SHAPES.values())]
        return sum((p * g.to(p.dtype)).sum() for p, g in zip(self.parameters(), grads))


def engine_of(stage: int, bf16: bool):
    model = Linear()
    parameters = list(model.parameters())
    groups = [{"params": parameters[:DECAYED]}, {"params": parameters[DECAYED:], "weight_decay": 0.0}]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, **HYPER["adamw"]), config=config)[0]


def weights(engine) -> dict[str, torch.Tensor]:
    """float32, whole, as DeepSpeed gathers them."""
    return {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}


def make(name: str, stage: int, bf16: bool) -> None:
    engine = engine_of(stage, bf16)
    for step in range(STEPS):
        engine.backward(engine(step))
        engine.step()
    folder = DATA / name
    engine.save_checkpoint(str(folder), tag="checkpoint")
    model = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    truth = {"master": weights(engine), "model": model}
    engine.backward(engine(NEXT))
    engine.step()
    truth["after"] = weights(engine)
    truth["versions"] = {"deepspeed": deepspeed.__version__, "torch": str(torch.__version__)}
    if engine.global_rank == 0:
        torch.save(truth, folder / "truth.pt")
        for path in sorted(folder.glob("checkpoint/*_optim_states.pt")):
            shutil.move(path, folder / path.name)
        shutil.rmtree(folder / "checkpoint")
        for path in [folder / "latest", *folder.glob("zero_to_*.py")]:
            Path(path).unlink()
    torch.distributed.barrier()


if __name__ == "__main__":
    make("deepspeed_zero1_bf16", 1, bf16=True)
    make("deepspeed_zero2", 2, bf16=False)
