"""How a step table gets from the host to the device: pinned buffers and asynchronous copies.

In eager steps a ring of pinned buffers, each half guarded by an event, feeds one table on the device; a table that is
as it was the step before is not sent again. Under graph capture the copy becomes part of the graph and is repeated by
each replay, from the buffer that the capture saw. So a capture gets a buffer and a table of its own, which nothing
writes to afterwards: replays read what was captured, and eager steps in between do not disturb them, nor they those.
"""

from __future__ import annotations

import torch

from .. import _C
from ..plan import Bucket

__all__ = ["Staging"]

_HALF = 8  # so many steps at least may be under way before the host waits
_SPARE = 4  # for captures, during which memory can hardly be allocated


class Staging:
    """The step table of one bucket: ``PassArgs``, hyper-parameter rows, gradient addresses.

    Kept by the bucket, hence as long as the optimizer's plan, which is how long a captured graph may be replayed.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        """size: bytes, of all tables."""
        self.size = -(-size // 16) * 16
        self.on_host = device.type == "cpu"
        self.table = torch.zeros(self.size, dtype=torch.uint8, device=device)
        """What eager steps read."""
        self.captured: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.spare: list[tuple[torch.Tensor, torch.Tensor]] = []
        if not self.on_host:
            module = torch.get_device_module(device)
            self.ring = [self._pinned() for _ in range(2 * _HALF)]
            self.events = [module.Event() for _ in range(2)]
            self.last = -1  # slot of the ring that holds what the device has; -1: none
            self.is_capturing = getattr(module, "is_current_stream_capturing", bool)
            self._stock()

    def _pinned(self) -> torch.Tensor:
        return torch.zeros(self.size, dtype=torch.uint8, pin_memory=True)

    def _stock(self) -> None:
        while len(self.spare) < _SPARE:
            self.spare.append((self._pinned(), torch.empty_like(self.table)))

    def send(self, bucket: Bucket) -> int:
        """Packs the table of the step under way; returns its address on the device, valid in stream order."""
        if self.on_host:
            _C.pack_step(self.table.data_ptr(), 0, bucket.args, bucket.table, bucket.hypers)
            return self.table.data_ptr()
        if self.is_capturing():
            return self._capture(bucket)
        if len(self.spare) < _SPARE:
            self._stock()
        slot = (self.last + 1) % len(self.ring)
        half, place = divmod(slot, _HALF)
        if place == 0:
            self.events[half].synchronize()  # of the copies that read it last; at once, unless the host is far ahead
        previous = self.ring[self.last].data_ptr() if self.last >= 0 else 0
        if _C.pack_step(self.ring[slot].data_ptr(), previous, bucket.args, bucket.table, bucket.hypers):
            self.table.copy_(self.ring[slot], non_blocking=True)
            if place == _HALF - 1:  # steps on other streams came before this one, or they would race for parameters
                self.events[half].record()
            self.last = slot
        return self.table.data_ptr()

    def _capture(self, bucket: Bucket) -> int:
        if not self.spare:
            raise RuntimeError(
                f"fusedopt: more than {_SPARE} steps of one optimizer were captured without an ordinary one between, "
                "and memory cannot be made ready during a capture; call step() before the capture, or capture fewer"
            )
        host, table = self.spare.pop()
        self.captured.append((host, table))
        _C.pack_step(host.data_ptr(), 0, bucket.args, bucket.table, bucket.hypers)
        table.copy_(host, non_blocking=True)
        return table.data_ptr()
