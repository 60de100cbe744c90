"""Lightning's Trainer: ``gradient_clip_val`` is a part of the optimizer's step.

    python examples/lightning_trainer.py --steps 100

In bfloat16 on a GPU, where Lightning refuses to clip for an optimizer that unscales. Needs lightning.
"""

import lightning
import torch
from _data import new_model, parameter_groups, run, text_batches

import fusedopt
from fusedopt.integrations.lightning import FusedClipping

ACCUMULATED = 2


class LanguageModel(FusedClipping, lightning.LightningModule):
    """A tiny GPT over bytes."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.gpt, self.steps = new_model(torch.device("cpu")), steps
        self.losses: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.gpt.loss(batch)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> dict:
        opt = fusedopt.AdamW(parameter_groups(self.gpt), lr=1e-3, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, self.steps)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(steps: int, device: torch.device) -> list[float]:
    """Train a tiny GPT with Lightning. Returns the losses, in nats per byte."""
    model = LanguageModel(steps)
    batches = list(text_batches(steps * ACCUMULATED, torch.device("cpu")))
    trainer = lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if device.type == "cuda" else "32-true",
        max_steps=steps,
        accumulate_grad_batches=ACCUMULATED,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    return torch.stack(model.losses[ACCUMULATED - 1 :: ACCUMULATED]).tolist()


if __name__ == "__main__":
    run(train)
