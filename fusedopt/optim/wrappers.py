"""What other libraries put around an optimizer."""

from __future__ import annotations

from typing import Any

__all__ = ["check_unwrapped", "is_watched_by_accelerate"]


def check_unwrapped(where: str, optimizer: Any) -> None:
    """TypeError for a wrapper that derives from an optimizer's class and holds the optimizer, as Lightning's do.

    What is set on it would not reach the optimizer.
    """
    if "_options" not in optimizer.__dict__:
        raise TypeError(
            f"{where}: got {type(optimizer).__name__}, which wraps an optimizer, expected the optimizer itself; use "
            "its .optimizer"
        )


def is_watched_by_accelerate(optimizer: Any) -> bool:
    """Whether Accelerate has replaced ``step`` for the time of one, and takes it for skipped if nobody calls it."""
    step = optimizer.__dict__.get("step")
    return getattr(step, "__qualname__", "").startswith("patch_optimizer_step.")
