"""What a mutant is, and the list of all. Each is a mistake that somebody made, here or in a library of the kind.

``python tests/mutation`` plants them one by one; see docs/testing.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Mutant", "all_mutants"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutant:
    """An edit of one file, and tests of which one must fail."""

    name: str
    mistake: str
    """What it stands for, in a few words."""
    path: str
    """Of the file, from the root of the repository."""
    old: str
    """Occurs exactly once in it."""
    new: str
    tests: tuple[str, ...]
    """Node ids for pytest, few and quick; "{device}" becomes "cpu" or "cuda"."""
    gpu: bool = False
    """Whether only a GPU can tell: what is mutated runs nowhere else."""

    @property
    def is_compiled(self) -> bool:
        """Whether the extension has to be built. CUDA kernels are compiled when they run."""
        return self.path.startswith("csrc/") and not self.gpu

    def applied(self, text: str) -> str:
        """The file with the mistake in it. ValueError if the file does not hold the old text exactly once."""
        found = text.count(self.old)
        if found != 1:
            raise ValueError(f"mutant {self.name}: {self.path} holds its old text {found} times, expected once")
        return text.replace(self.old, self.new)


def all_mutants() -> list[Mutant]:
    """In the order of the pages of docs/architecture.md: rules, formats, engines, host, Python, Triton, CUDA."""
    import mutants_cuda
    import mutants_engine
    import mutants_host
    import mutants_python
    import mutants_rules
    import mutants_triton

    parts = (mutants_rules, mutants_engine, mutants_host, mutants_python, mutants_triton, mutants_cuda)
    return [mutant for part in parts for mutant in part.MUTANTS]
