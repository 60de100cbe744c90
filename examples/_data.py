"""What the small examples share: a tiny GPT, batches of text, the command line."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import click
import torch
from _gpt import GPT, standard_library_text, windows
from torch import Tensor, nn

CONTEXT = 128  # bytes a sequence
WIDTH, LAYERS = 128, 4
BATCH_SIZE = 8

_standard_library_text = functools.cache(standard_library_text)


def new_model(device: torch.device, seed: int = 0) -> GPT:
    """0.84 M parameters in float32; the same for the same seed on every device."""
    torch.manual_seed(seed)
    return GPT(CONTEXT, WIDTH, LAYERS).to(device)


def parameter_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict]:
    """Weight decay for matrices and embeddings, none for biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def text_batches(steps: int, device: torch.device, batch_size: int = BATCH_SIZE, seed: int = 0) -> Iterator[Tensor]:
    """``steps`` random windows ``[batch_size, CONTEXT + 1]`` int64 of Python's standard library, for ``GPT.loss``.

    The same for the same seed on every device. The text goes to the device once.
    """
    text = _standard_library_text()[0].to(device)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - CONTEXT, (steps, batch_size), generator=generator).to(device)
    for each in starts:
        yield windows(text, each, CONTEXT)


def run(train: Callable[..., list[float]], *options: Callable) -> None:
    """The command line of an example: ``--steps``, ``--device`` and its own, then its first and last loss."""

    @click.command(help=train.__doc__, context_settings={"show_default": True})
    @click.option("--steps", type=click.IntRange(min=1), default=100)
    @click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
    def main(steps: int, device: str, **others: Any) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise click.BadParameter("torch sees no CUDA device here; use cpu", param_hint="--device")
        losses = train(steps, torch.device(device), **others)
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} nats per byte, {len(losses)} steps on {device}")

    for option in reversed(options):
        main = option(main)
    main()
