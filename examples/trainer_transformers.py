"""The Trainer of transformers with fusedopt.AdamW: its ``max_grad_norm`` is a part of the optimizer's step.

    python examples/trainer_transformers.py --steps 100

The arguments are the Trainer's own: warmup and cosine, gradient accumulation and checkpointing, bfloat16 on a GPU.
Clipping, with the norm in the logs, takes no passes of its own over the gradients. Needs transformers and accelerate.
"""

import tempfile

import torch
from _data import CONTEXT, run, text_batches
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

import fusedopt
from fusedopt.integrations.transformers import Trainer, optimizer_cls_and_kwargs

BATCH_SIZE, ACCUMULATED = 4, 2


def new_model() -> GPT2LMHeadModel:
    """GPT-2 of 0.84 M parameters over bytes, from a config: nothing is downloaded."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=CONTEXT, n_embd=128, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def train(steps: int, device: torch.device) -> list[float]:
    """Train a tiny GPT-2 with transformers. Returns the logged losses, in nats per byte."""
    batches = text_batches(steps * ACCUMULATED, torch.device("cpu"), BATCH_SIZE)
    data = [{"input_ids": window[:-1], "labels": window[:-1]} for batch in batches for window in batch]  # GPT-2 shifts
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            gradient_accumulation_steps=ACCUMULATED,
            gradient_checkpointing=True,
            max_grad_norm=1.0,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 10),
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=device.type == "cuda",
            use_cpu=device.type == "cpu",
            logging_steps=max(1, steps // 20),
            logging_nan_inf_filter=False,  # the Trainer would look at each loss, and wait for it
            save_strategy="no",
            report_to=[],
        )
        optimizer = optimizer_cls_and_kwargs(args, fusedopt.AdamW)
        trainer = Trainer(new_model(), args, train_dataset=data, optimizer_cls_and_kwargs=optimizer)
        trainer.train()
    return [each["loss"] for each in trainer.state.log_history if "grad_norm" in each]


if __name__ == "__main__":
    run(train)
