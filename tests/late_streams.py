"""Streams whose work is done as late as it may be: what is not waited for has not happened yet.

A stream is a list of things to do; they are done when somebody who waits for them goes on: the host in
`Event.synchronize`, another stream behind `wait_stream` or `wait_event`. So an order that nobody asked for never comes
about by chance, as it would on a device that happens to be quick.
"""

import torch

from fusedopt.optim.offload import _Queues


class Stream:
    def __init__(self, device=None) -> None:
        self.work = []
        self.done = 0

    def do_until(self, count: int) -> None:
        while self.done < count:
            self.done += 1
            self.work[self.done - 1]()

    def drain(self) -> None:
        self.do_until(len(self.work))

    def wait_stream(self, other: "Stream") -> None:
        count = len(other.work)
        self.work.append(lambda: other.do_until(count))

    def wait_event(self, event: "Event") -> None:
        stream, count = event.stream, event.count
        if stream is not None:
            self.work.append(lambda: stream.do_until(count))


class Event:
    def __init__(self) -> None:
        self.stream, self.count = None, 0

    def record(self, stream: Stream) -> None:
        self.stream, self.count = stream, len(stream.work)

    def synchronize(self) -> None:
        self.stream.do_until(self.count)


class Module:
    """In the place of ``torch.cuda``."""

    Stream, Event = Stream, Event

    def __init__(self) -> None:
        self.current = Stream()

    def current_stream(self, device=None) -> Stream:
        return self.current

    def stream(self, stream: Stream) -> "Module":
        self.entered = stream
        return self

    def __enter__(self) -> None:
        self.left, self.current = self.current, self.entered

    def __exit__(self, *_) -> None:
        self.current = self.left


class LateQueues(_Queues):
    """Of tensors on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.module = device, Module()
        self.arriving, self.returning = Stream(), Stream()

    def staging(self, size: int) -> torch.Tensor:
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.module.current.work.append(lambda: target.copy_(source))
