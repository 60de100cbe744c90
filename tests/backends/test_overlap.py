"""The launch that begins while the norm pass runs: which it is, how the driver is told, that no bit depends on it."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import assert_same_bits, memory, parameters, train

import fusedopt
from fusedopt import _C
from fusedopt.backends import cuda

ROOT = Path(__file__).resolve().parents[2]
BOTH = ("norm", "update")


# ---- which launch --------------------------------------------------------------------------------------------------


def tables_after(opt, passes, num_buckets=1):
    """An optimizer's tables as if the CUDA backend had begun a step of these passes on them."""
    params = [p for group in opt.param_groups for p in group["params"]]
    train(opt, params, 1)
    [tables] = opt._plan.tables
    assert len(tables.buckets) == num_buckets
    for bucket in tables.buckets:
        bucket.capacity = 3840
        bucket.launches = {name: (0, 0, 1) for name in bucket.phases(passes)}
    return tables


@pytest.fixture
def launched(monkeypatch):
    """(kernel's name, whether it may overlap) of each launch of `run(tables)`."""
    device = SimpleNamespace(overlaps=True)
    monkeypatch.setattr(cuda, "_device", lambda index: device)

    def run(tables, passes, finalize=True):
        flags, names = [], []
        monkeypatch.setattr(_C, "cuda_launch", lambda *arguments: flags.append(arguments[-1]))
        passes = [phase for name in passes for phase in (("measure", name) if name == "update" else (name,))]
        for name in passes:
            getattr(cuda, name)(tables, **({"finalize": finalize} if name == "norm" else {}))
            names += [name for bucket in tables.buckets if name != "measure" or bucket.norms]
        repeated = [launch[-1] for name in passes for launch in cuda.launches(tables, (name,))]
        assert repeated == flags, "repeated steps launch as others do"
        return list(zip(names, flags, strict=True))

    run.device = device
    return run


def test_the_update_behind_the_norm(launched):
    tables = tables_after(fusedopt.AdamW(parameters([5, 300])), BOTH)
    assert launched(tables, BOTH) == [("norm", False), ("update", True)]
    launched.device.overlaps = False
    assert launched(tables, BOTH) == [("norm", False), ("update", False)]


def test_no_other_update(launched):
    """The second update runs behind the first one, which is not the norm pass."""
    params = [*parameters([5, 300]), *parameters([7], torch.float64)]
    tables = tables_after(fusedopt.AdamW(params), BOTH, num_buckets=2)
    assert launched(tables, BOTH) == [("norm", False), ("norm", False), ("update", True), ("update", False)]


def test_of_two_phases_the_first(launched):
    tables = tables_after(fusedopt.LAMB(parameters([5, 300])), BOTH)
    assert launched(tables, BOTH) == [("norm", False), ("measure", True), ("update", False)]


def test_not_behind_an_exchange(launched):
    """Between the passes stand the exchange and the launch that finishes the norm."""
    tables = tables_after(fusedopt.AdamW(parameters([5, 300])), BOTH)
    assert launched(tables, BOTH, finalize=False) == [("norm", False), ("update", False)]


@pytest.mark.parametrize(("passes", "name"), [(("update",), "update"), (("norm", "scale"), "scale")], ids=str)
def test_not_without_a_norm_nor_what_writes_gradients(passes, name, launched):
    """A norm of an earlier step does not count."""
    tables = tables_after(fusedopt.AdamW(parameters([5, 300])), passes)
    tables.buckets[0].args.finalize = 1
    assert launched(tables, passes)[-1] == (name, False)


def test_not_behind_a_norm_of_no_blocks(launched):
    tables = tables_after(fusedopt.AdamW(parameters([5, 300])), BOTH)
    tables.buckets[0].launches["norm"] = (0, 0, 0)
    tables.buckets[0].args.finalize = 1
    assert cuda.launches(tables, ("update",))[0][-1] is False


@pytest.mark.parametrize(
    ("driver", "major", "expected"), [(12020, 9, False), (12030, 9, True), (13000, 8, False), (13000, 12, True)]
)
def test_devices_and_drivers(driver, major, expected, monkeypatch):
    """Graphs know such edges from CUDA 12.3 on, devices from sm_90 on."""
    properties = SimpleNamespace(multi_processor_count=1, major=major, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(_C, "cuda_primary_context", lambda index: 0)
    monkeypatch.setattr(_C, "cuda_driver_version", lambda: driver)
    assert cuda.Device(0).overlaps is expected


# ---- how the driver is told ----------------------------------------------------------------------------------------

DRIVER = r"""
#include <stdio.h>
typedef struct { int id; char padding[4]; union { int value; char bytes[64]; }; } Attribute;
typedef struct {
  unsigned gx, gy, gz, bx, by, bz, shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
} Config;
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDeviceGet(int* device, int index) { return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return 0; }
int cuCtxGetCurrent(void** context) { *context = 0; return 0; }
int cuCtxPushCurrent_v2(void* context) { return 0; }
int cuCtxPopCurrent_v2(void** context) { return 0; }
int cuModuleLoadData(void** module, const void* image) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { return 0; }
int cuGetErrorString(int status, const char** text) { *text = "refused"; return 0; }
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** params, void** extra) {
  return printf("%p %u %u %u %u %u %u %u %p 0 0\n", function, gx, gy, gz, bx, by, bz, shared, stream) < 0;
}
#ifndef OLD
int cuLaunchKernelEx(const Config* c, void* function, void** params, void** extra) {
  if (c->count != 1 || !params[0] || extra) return 1;
  return printf("%p %u %u %u %u %u %u %u %p %d %d\n", function, c->gx, c->gy, c->gz, c->bx, c->by, c->bz, c->shared,
                c->stream, c->attributes->id, c->attributes->value) < 0;
}
#endif
"""

LAUNCHES = """
import importlib.util, sys

spec = importlib.util.spec_from_file_location("_C", sys.argv[1])  # not with torch, which may bring the driver
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
for overlaps in (False, True):
    _C.cuda_launch(0, 16, 3, 32, _C.PassArgs(), None, overlaps)
"""

REPEATED = """
import torch, fusedopt
from fusedopt import _C
from fusedopt.backends import context_backend

p = torch.nn.Parameter(torch.ones(5))
p.grad = torch.ones(5)
opt = fusedopt.AdamW([p])
opt.step()
watch, [tables], args = opt._plan.watch, opt._plan.tables, _C.PassArgs()
step = _C.RepeatedStep(
    watch=watch, hypers=[], args=[args], finding=(tables.device, tables.control.norm_found_inf), scalars=opt._scalars,
    hooks=({}, {}), backend=None, context_backend=context_backend, reports=False, accumulator=None, divisor=None,
    has_own_grads=True, run_passes=None,
)
step.launch_on(lambda index: 32, None)
for overlaps in (False, True):
    step.add(None, None, args, 0, 16, 3, 0, overlaps)
assert step.run(opt.__dict__)
"""


def told(program, folder, *macros):
    """What a program tells something that looks like a driver: function, grid, block, shared memory, stream, attribute.

    Returns the attributes, whose number is 0 where there is none.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or pytest.skip("there is no C compiler")
    (folder / "driver.c").write_text(DRIVER)
    options = ["-shared", "-fPIC", *macros, "-o", str(folder / "libcuda.so.1")]
    subprocess.run([compiler, *options, str(folder / "driver.c")], check=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(folder)}
    env.pop("FUSEDOPT_BACKEND", None)
    command = [sys.executable, "-c", program, _C.__file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 9) for line in done.stdout.splitlines()]
    assert all(line[:9] == ["0x10", "3", "1", "1", "256", "1", "1", "0", "0x20"] for line in lines), lines
    return [line[9] for line in lines]


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="gives the driver's library its name on Linux")


@on_linux
@pytest.mark.parametrize(("macros", "attribute"), [((), "6 1"), (("-DOLD",), "0 0")], ids=["new", "old"])
def test_what_the_driver_is_told(macros, attribute, tmp_path):
    """For an old driver, which knows no attributes, the launch is as any other."""
    assert told(LAUNCHES, tmp_path, *macros) == ["0 0", attribute]


@on_linux
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch may bring the driver itself")
def test_what_a_repeated_step_tells_the_driver(tmp_path):
    assert told(REPEATED, tmp_path) == ["0 0", "6 1"]


# ---- the same bits -------------------------------------------------------------------------------------------------

STEPS = 6
MIXED = [5, 0, 4097, 3_000_001]


def mixed_dtypes():
    return [*parameters(MIXED, device="cuda"), *parameters([65_537], torch.bfloat16, "cuda")]


OPTIMIZERS = {
    "adamw": lambda **given: fusedopt.AdamW(parameters(MIXED, device="cuda"), **given),
    "two buckets": lambda **given: fusedopt.AdamW(mixed_dtypes(), **given),
    "int8": lambda **given: fusedopt.AdamW(parameters(MIXED, device="cuda"), state_dtype="int8", seed=1, **given),
    "lamb": lambda **given: fusedopt.LAMB(parameters(MIXED, device="cuda"), **given),
    "large": lambda **given: fusedopt.Lion(parameters([9_000_000], device="cuda"), **given),
}


def gradients(params, step):
    """Norms that differ from step to step by powers of ten; the first parameter has none; infinity in one step."""
    random = torch.Generator("cuda").manual_seed(step)
    for p in params[1:] or params:
        value = torch.randn(p.shape, device="cuda", generator=random).to(p.dtype) * 10.0 ** (3 * (step % 3) - 3)
        p.grad = value if p.grad is None else p.grad.copy_(value)
    if step == 3:
        params[-1].grad[-1] = math.inf


def steps(make, how):
    """What each step leaves. The device is kept busy until the step has been launched: its launches wait in a row."""
    opt = make(max_grad_norm=1.0, nonfinite="skip")
    params = [p for group in opt.param_groups for p in group["params"]]
    if how == "the long way":
        opt.register_step_pre_hook(lambda *_: None)
    gradients(params, 0)
    opt.step()
    run = opt.step
    if how == "captured":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            opt.step()
        run = graph.replay
    results = []
    for step in range(1, STEPS):
        gradients(params, step)
        torch.cuda._sleep(2_000_000)
        run()
        results += [*memory(opt), opt.grad_norm, opt.clip_coef, opt.skipped_steps]
    return results


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["the long way", "repeated", "captured"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_bits_as_one_after_the_other(name, how, monkeypatch):
    """An update that did not wait would take the norm of the step before."""
    overlapping = steps(OPTIMIZERS[name], how)
    monkeypatch.setattr(cuda, "_overlaps", lambda *_: False)
    assert_same_bits(overlapping, steps(OPTIMIZERS[name], how))
