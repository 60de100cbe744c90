"""The results of a step on one device, as 0-dim tensors that cost nothing until they are read."""

from __future__ import annotations

import torch

__all__ = ["Control", "Controls"]


class Control:
    """``struct Control`` of ``csrc/core/structs.h``: 64 bytes on ``device``, seen through views.

    buffer: a copy of another's to look at, ``(8,)`` float64.
    """

    def __init__(self, device: torch.device, buffer: torch.Tensor | None = None) -> None:
        self.buffer = torch.zeros(8, dtype=torch.float64, device=device) if buffer is None else buffer
        as_float = self.buffer.view(torch.float32)
        self.local_sums = self.buffer[0:2]
        """(Σ|g|^p or max |g|, number of non-finite findings) over this device's gradients, float64."""
        self.total_norm64 = self.buffer[2]
        self.clip_coef64 = self.buffer[3]
        self.total_norm = as_float[8]
        self.clip_coef = as_float[9]
        self.norm_found_inf = as_float[10]
        self.skipped = as_float[11]
        self.skipped_steps = self.buffer.view(torch.int64)[6]
        self.address = self.buffer.data_ptr()
        self.clip_coef_address = self.clip_coef64.data_ptr()
        self.norm_found_inf_address = self.norm_found_inf.data_ptr()
        if buffer is None:
            self.reset_norm()

    def reset_norm(self) -> None:
        """Makes the norm read as "not taken": NaN, with a coefficient of 1."""
        self.total_norm64.fill_(float("nan"))
        self.total_norm.fill_(float("nan"))
        self.clip_coef64.fill_(1.0)
        self.clip_coef.fill_(1.0)
        self.norm_found_inf.fill_(0.0)


class Controls(dict[torch.device, Control]):
    """The results on each device."""

    _reported: Control | None = None

    def reported_on(self, device: torch.device) -> Control:
        """The results that users read, of an optimizer whose first parameter is on ``device``.

        Where that was moved (``model.to``; Lightning does it after training), the results of its steps go along.
        """
        control = self.get(device)
        if control is None:
            control = self[device] = Control(device)
        if self._reported is not control:
            if self._reported is not None:
                control.buffer.copy_(self._reported.buffer)
            self._reported = control
        return control
