"""Children that are forked while helper threads exist, or work, and after CUDA was used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")


def python(script, timeout=120) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


WHILE_WORKING = """
import os, sys, threading, time
import torch
import fusedopt
from fusedopt import _C

def worker(stop):
    params = [torch.nn.Parameter(torch.ones(500_000)) for _ in range(3)]
    opt = fusedopt.SGD(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    while not stop.is_set():
        opt.step()

torch.set_num_threads(3)
params = [torch.nn.Parameter(torch.ones(300_000)) for _ in range(3)]
opt = fusedopt.SGD(params, lr=0.5)
for p in params:
    p.grad = torch.ones_like(p)
opt.step()
stop = threading.Event()
other = threading.Thread(target=worker, args=(stop,))
other.start()
for k in range(6):
    time.sleep(0.003 * k)
    child = os.fork()
    if child == 0:
        opt.step()
        opt.step()  # the second one with the child's own helper threads
        os._exit(0 if float(params[0][0]) == -0.5 else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, k
stop.set()
other.join()
"""


def test_fork_while_another_thread_steps():
    """The child may find the pool's mutexes held by threads that it does not have: it must not wait for them."""
    done = python(WHILE_WORKING)
    assert done.returncode == 0, done.stderr


LOADER = """
import torch
import fusedopt
from torch.utils.data import DataLoader, Dataset

class Steps(Dataset):
    # What runs in a worker: a step of its own, with threads of its own. Operations of torch have one: its OpenMP does
    # not outlive a fork.
    def __len__(self):
        return 6

    def __getitem__(self, index):
        params = [torch.nn.Parameter(torch.ones(300_000)) for _ in range(3)]
        opt = fusedopt.SGD(params, lr=0.5)
        for p in params:
            p.grad = torch.ones_like(p)
        torch.set_num_threads(3)
        opt.step()
        torch.set_num_threads(1)
        return params[2].sum().item()

if __name__ == "__main__":
    torch.set_num_threads(1)
    here = Steps()[0]  # the engine of this process has threads now
    loader = DataLoader(Steps(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert [float(each) for each in loader] == [here] * 6
"""


def test_data_loader_workers():
    done = python(LOADER)
    assert done.returncode == 0, done.stderr


CUDA = """
import os, sys, torch, fusedopt

params = [torch.nn.Parameter(torch.ones(5, device="cuda"))]
opt = fusedopt.AdamW(params)
params[0].grad = torch.ones_like(params[0])
for _ in range(3):
    opt.step()
torch.cuda.synchronize()
before = params[0].tolist()
child = os.fork()
if child == 0:
    try:
        opt.step()
    except RuntimeError as error:
        print(error, flush=True)
        os._exit(0)
    os._exit(1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert params[0].tolist() == before
opt.step()
assert int(opt.state[params[0]]["step"]) == 4 and params[0].tolist() != before
"""


@pytest.mark.gpu
def test_fork_after_cuda_was_used():
    """A step in the child is an error that names the remedy; the parent goes on."""
    done = python(CUDA)
    assert done.returncode == 0, done.stderr
    assert "spawn" in done.stdout


CPU_BESIDE_CUDA = """
import os, torch, fusedopt

torch.ones(5, device="cuda").sum().item()
params = [torch.nn.Parameter(torch.ones(5))]
opt = fusedopt.AdamW(params)
params[0].grad = torch.ones_like(params[0])
opt.step()
child = os.fork()
if child == 0:
    opt.step()
    os._exit(int(int(opt.state[params[0]]["step"]) != 2))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.gpu
def test_cpu_parameters_in_a_child_of_a_process_that_uses_cuda():
    """They need no CUDA, so they are stepped."""
    done = python(CPU_BESIDE_CUDA)
    assert done.returncode == 0, done.stderr


NO_MORE_THREADS = """
import os, resource, torch, fusedopt
torch.set_num_threads(8)
params = [torch.nn.Parameter(torch.ones(300_000)) for _ in range(3)]
opt = fusedopt.SGD(params, lr=0.5)
for p in params:
    p.grad = torch.ones(300_000)
threads = len(os.listdir("/proc/self/task"))
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 20),) * 2)  # less than a thread's stack
opt.step()
assert len(os.listdir("/proc/self/task")) == threads
torch.set_num_threads(1)
assert all(p.sum().item() == 150_000 for p in params)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_no_thread_can_be_started():
    """The step is made by the threads that there are."""
    done = python(NO_MORE_THREADS)
    assert done.returncode == 0, done.stderr
