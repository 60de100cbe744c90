"""Tries an installed fusedopt: what its import costs, that it finds its sources, that it trains like torch.optim."""

import subprocess
import sys
from pathlib import Path

MAX_IMPORT_SECONDS = 0.3  # beyond torch's own
IMPORT_RUNS = 3  # the least of them counts: others may use the machine

TIME_IMPORT = """
import time, torch
start = time.perf_counter()
import fusedopt
print(time.perf_counter() - start)
assert not torch.cuda.is_initialized(), "import fusedopt touched the GPU"
"""


def import_seconds() -> float:
    command = [sys.executable, "-I", "-c", TIME_IMPORT]
    return min(
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(IMPORT_RUNS)
    )


def train(optimizer_class, clip: bool):
    """Parameters of a small model after three steps, clipped to a norm of 1 by torch if `clip`."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
    optimizer = optimizer_class(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        (1e2 * model(torch.randn(8, 16)).square().mean()).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return list(model.parameters())


def main() -> None:
    seconds = import_seconds()
    if seconds >= MAX_IMPORT_SECONDS:
        sys.exit(f"import fusedopt takes {seconds:.3f} s beyond torch's import, expected < {MAX_IMPORT_SECONDS} s")

    import torch

    import fusedopt
    from fusedopt.backends import nvrtc

    package = Path(fusedopt.__file__).parent
    if not package.is_relative_to(sys.prefix):
        sys.exit(f"fusedopt was imported from {package}, expected it to be installed in {sys.prefix}")
    if nvrtc.source_dir() != package / "_csrc":
        sys.exit(f"the CUDA sources are taken from {nvrtc.source_dir()}, expected {package / '_csrc'}")

    ours = train(lambda params: fusedopt.AdamW(params, max_grad_norm=1.0), clip=False)
    torchs = train(torch.optim.AdamW, clip=True)
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)
    if torch.cuda.is_initialized():
        sys.exit("training on the CPU touched the GPU")
    print(f"fusedopt {fusedopt.__version__}, torch {torch.__version__}: import {seconds:.3f} s beyond torch, trains")


if __name__ == "__main__":
    main()
