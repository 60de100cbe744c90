"""Faults that are planted: an operation of torch that finds no memory, an interrupt at a line of the library."""

import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt

PACKAGE = str(Path(fusedopt.__file__).parent)


class OutOfMemory(TorchDispatchMode):
    """The n-th operation of torch that takes memory raises, as an allocator does. `happened` says whether it came to
    that."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left, self.happened = n, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        takes_memory = function.namespace == "aten" and not function.is_view and not function.name().endswith("_")
        if takes_memory:
            self.left -= 1
            if self.left == 0:
                self.happened = True
                raise torch.OutOfMemoryError("out of memory, planted")
        return function(*args, **(kwargs or {}))


class Interrupt:
    """The n-th line of fusedopt that runs raises KeyboardInterrupt in its place, as Ctrl-C does between two lines."""

    def __init__(self, n: int) -> None:
        self.left, self.where = n, None

    def __enter__(self):
        self.before = sys.gettrace(), torch.is_grad_enabled()
        sys.settrace(self.call)
        return self

    def __exit__(self, *exception) -> None:
        trace, grad_enabled = self.before
        sys.settrace(trace)
        # Python may be interrupted between the last line of a `with torch.no_grad()` and its end: nobody can help it.
        torch.set_grad_enabled(grad_enabled)

    def call(self, frame, event, arg):
        return self.line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def line(self, frame, event, arg):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt(f"planted at {self.where}")
        return self.line
