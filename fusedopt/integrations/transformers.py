"""The Trainer of transformers with its ``max_grad_norm`` in the step of our optimizers.

::

    from fusedopt.integrations.transformers import Trainer, optimizer_cls_and_kwargs

    args = TrainingArguments("out", learning_rate=2e-5, max_grad_norm=1.0)
    trainer = Trainer(model, args, train_dataset=data,
                      optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, fusedopt.AdamW))
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from ..optim import FusedOptimizer

try:
    import transformers
except ImportError as error:
    raise ImportError(
        f"fusedopt.integrations.transformers: importing transformers failed ({error}), expected version 5.0 or later; "
        "pip install 'transformers[torch]>=5'"
    ) from error

from .accelerate import fuse

if TYPE_CHECKING:
    from transformers import Trainer as AnyTrainer
    from transformers import TrainingArguments
else:
    AnyTrainer = object  # of a mixin

__all__ = ["FusedClipping", "Trainer", "optimizer_cls_and_kwargs"]


class FusedClipping(AnyTrainer):
    """Mixin for any class of Trainers, before it: ``class MyTrainer(FusedClipping, SFTTrainer)``.

    Clipping, ``grad_norm`` in the logs, the scaler and skipped steps are those of
    :class:`fusedopt.integrations.accelerate.Accelerator`. With an optimizer that is not ours nothing changes.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's, with an accelerator that leaves clipping to the step."""
        super().create_accelerator_and_postprocess()
        fuse(self.accelerator)


class Trainer(FusedClipping, transformers.Trainer):
    """``transformers.Trainer`` with :class:`FusedClipping`."""


def optimizer_cls_and_kwargs(
    args: TrainingArguments, cls: type[FusedOptimizer], **options: Any
) -> tuple[type[FusedOptimizer], dict[str, Any]]:
    """For the Trainer's argument of that name: the learning rate of ``args`` and, for Adam's kin, its betas and ε.

    Weight decay is put into the param groups by the Trainer, none for biases and norms.

    Args:
        cls: which optimizer.
        options: more keyword arguments for it, such as formats; they take precedence.
    """
    known = inspect.signature(cls).parameters
    kwargs: dict[str, Any] = {"lr": args.learning_rate}
    if {"betas", "eps"} <= known.keys():
        kwargs |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return cls, {**kwargs, **options}
