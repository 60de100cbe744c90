"""The CPU engine: the same bits with every instruction set and thread count, after a fork, and without the GIL."""

import hashlib
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    FUNCTION_HYPER,
    ONE_EACH,
    SIZES,
    call_function,
    hard_values,
    memory,
    normal,
    parameters,
    set_gradients,
)

import fusedopt
from fusedopt import _C, passes
from fusedopt.plan import TensorRow, dtype_code
from fusedopt.specs import CPU_CHUNK, PARAM_FORMATS, RULES, STATE_FORMATS

TESTS = Path(__file__).resolve().parents[1]
ISAS = ["baseline", "avx2", "avx512"]
FLOAT32 = torch.float32

# Tensors of several chunks, and of sizes that no vector divides.
MANY_CHUNKS = [3 * CPU_CHUNK + 5, 17, 2 * CPU_CHUNK - 1, 1023]


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def digest(tensors) -> str:
    sums = hashlib.sha256()
    for t in tensors:
        sums.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()


def grads(params) -> list[torch.Tensor]:
    return [p.grad for p in params]


def update_results(cases, sizes, values=normal) -> dict[str, str]:
    """A digest of parameters and states after two steps with every gradient transform, by case and dtype."""
    results = {}
    for case in cases:
        for dtype in DTYPES:
            params = parameters(sizes, dtype, values=values)
            opt = case.make(params, max_grad_norm=1.0, max_grad_value=0.5, nonfinite="skip")
            for step in range(2):
                set_gradients(params, seed=step, values=values)
                opt.grad_scale = torch.tensor(3.0)
                opt.step()
            results[f"{case} {dtype}"] = digest([*memory(opt), opt.grad_norm, opt.clip_coef])
    return results


def gradient_results(sizes, values=normal) -> dict[str, str]:
    """A digest of norms and of scaled gradients, by function and dtype."""
    results = {}
    for dtype in DTYPES:
        params = parameters(sizes, dtype)
        set_gradients(params, values=values)
        for norm_type in (1.0, 2.0, float("inf")):
            results[f"norm {norm_type} {dtype}"] = digest([fusedopt.get_total_norm(grads(params), norm_type)])
        found_inf = fusedopt.unscale_grads_(params, 3.0)
        results[f"unscale {dtype}"] = digest([*grads(params), found_inf])
        fusedopt.clip_grad_value_(params, 0.25)
        results[f"clip value {dtype}"] = digest(grads(params))
        results[f"clip norm {dtype}"] = digest([fusedopt.clip_grad_norm_(params, 0.5), *grads(params)])
    return results


def accumulate_results(sizes, values=normal) -> dict[str, str]:
    """A digest of main gradients, and of parameters and states after the step that reads them, by dtypes."""
    results = {}
    for dtype in DTYPES:
        for main in (torch.float32, torch.bfloat16):
            params = parameters(sizes, dtype, values=values)
            opt = fusedopt.AdamW(params, lr=0.01, max_grad_norm=1.0, nonfinite="skip")
            accumulator = fusedopt.GradAccumulator(opt, main)
            sums = []
            for k, weight in enumerate((1.0, 0.3, 2.5)):
                set_gradients(params, seed=k, values=values)
                if k < 2:
                    accumulator.accumulate(weight)
                    sums += [buffer.clone() for buffer in accumulator.buffers]
            accumulator.weight = weight
            opt.step()
            results[f"accumulate {dtype} {main}"] = digest([*sums, *memory(opt), opt.grad_norm])
    return results


def all_results(cases, sizes, values=normal) -> dict[str, str]:
    return {
        **update_results(cases, sizes, values),
        **gradient_results(sizes, values),
        **accumulate_results(sizes, values),
    }


def python(script: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script that may import this file and others of the tests."""
    ours = Path(fusedopt.__file__).parents[1]  # the package under test, wherever it was built
    path = os.pathsep.join(filter(None, [str(TESTS), str(TESTS / "cpu"), str(ours), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


# ---- instruction sets ---------------------------------------------------------------------------------------------

DIGESTS = """
import json
from cases import CASES, SIZES, hard_values
from fusedopt import _C
from test_engine import all_results
results, hard = all_results(CASES, SIZES), all_results(CASES, SIZES, hard_values)
print(json.dumps({"isa": _C.cpu_isa(), "normal": results, "hard": hard}))
"""


@pytest.fixture(scope="module")
def default_digests():
    """Of the instruction set that this processor gets without being asked."""
    return {"normal": all_results(CASES, SIZES), "hard": all_results(CASES, SIZES, hard_values)}


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets_give_the_same_bits(isa, default_digests):
    done = python(DIGESTS, FUSEDOPT_CPU_ISA=isa)
    if f"got '{isa}'" in done.stderr and isa != "baseline":
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["isa"] == isa
    for values in ("normal", "hard"):
        assert found[values] == default_digests[values]


@pytest.mark.parametrize("values", [normal, hard_values])
@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_is_float32_rounded_after_each_step(rule, values, threads):
    """Where every stream is bfloat16 there is a loop of its own; what it computes between loads and stores is not."""
    threads(1)
    shapes = [(size,) for size in (*SIZES[:-1], CPU_CHUNK + 129)]
    make = partial(values, dtype=torch.bfloat16, device=torch.device("cpu"))
    params = [make(shape, seed=i) for i, shape in enumerate(shapes)]
    states = [[torch.zeros_like(param) for param in params] for _ in RULES[rule].states]
    steps = [torch.zeros(()) for _ in params]
    for step in range(2):
        grads = [make(shape, seed=100 * (1 + step) + i) for i, shape in enumerate(shapes)]
        wide = [[tensor.float() for tensor in tensors] for tensors in (params, grads, *states)]
        own_steps = [count.clone() for count in steps]
        call_function(rule, wide[0], wide[1], wide[2:], own_steps, **FUNCTION_HYPER[rule])
        call_function(rule, params, grads, states, steps, **FUNCTION_HYPER[rule])
        for kept, exact in zip((params, *states), (wide[0], *wide[2:]), strict=True):
            torch.testing.assert_close(kept, [e.bfloat16() for e in exact], rtol=0, atol=0, equal_nan=True)


def test_unknown_instruction_set_is_an_error():
    done = python("import fusedopt; fusedopt._C.cpu_isa()", FUSEDOPT_CPU_ISA="sse9")
    assert done.returncode == 1
    assert "ValueError: FUSEDOPT_CPU_ISA: got 'sse9', expected one of: " in done.stderr
    assert "baseline" in done.stderr


def test_empty_instruction_set_is_none():
    done = python("import fusedopt; print(fusedopt._C.cpu_isa())", FUSEDOPT_CPU_ISA="")
    assert done.stdout.strip() == fusedopt._C.cpu_isa()


# ---- threads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4])
def test_thread_counts_give_the_same_bits(threads, count):
    threads(1)
    expected = all_results(ONE_EACH, MANY_CHUNKS)
    threads(count)
    assert all_results(ONE_EACH, MANY_CHUNKS) == expected


def test_python_threads_may_step_at_once(threads):
    """Each with an optimizer of its own; the engine's threads are shared."""
    threads(2)

    def train(seed: int, results: dict) -> None:
        params = parameters(MANY_CHUNKS, seed=seed)
        opt = fusedopt.AdamW(params, max_grad_norm=1.0)
        for step in range(3):
            set_gradients(params, seed=step)
            opt.step()
        results[seed] = digest(memory(opt))

    alone, together = {}, {}
    for seed in range(4):
        train(seed, alone)
    workers = [threading.Thread(target=train, args=(seed, together)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert together == alone


FORK = """
import os, sys
import torch
import fusedopt
from cases import parameters, set_gradients
from test_engine import MANY_CHUNKS, digest

torch.set_num_threads(3)
params = parameters(MANY_CHUNKS)
opt = fusedopt.AdamW(params, max_grad_norm=1.0)
set_gradients(params)
opt.step()  # the engine has threads now, which a child does not inherit
child = os.fork()
opt.step()
state = opt.state_dict()["state"].values()
result = digest([*params, *(t for each in state for t in each.values())])  # no copies: torch's threads are gone as well
if child == 0:
    print(result, flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
print(result)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_works_after_a_fork():
    done = python(FORK)
    assert done.returncode == 0, done.stderr
    child, parent = done.stdout.split()
    assert child == parent


# ---- what the engine is given -------------------------------------------------------------------------------------

ONE_TENSOR = torch.zeros(1 << 10, dtype=torch.int64)
"""Memory for the addresses below, of which none is followed."""


def update_with(
    rule="adamw", form="float32", grad="float32", main=None, state="float32", chunk=256, run=_C.cpu_update, **row
):
    """Calls the update pass, or ``run``, on a table of one tensor of 300 elements.

    rule, form (of the parameter), grad, main (None: as grad), state: names, or numbers that are no code. row: what
    differs in the row of the table.
    """
    dtypes = [name if isinstance(name, int) else dtype_code(getattr(torch, name)) for name in (grad, main or grad)]
    index = rule if isinstance(rule, int) else RULES[rule].index
    param_code = form if isinstance(form, int) else PARAM_FORMATS[form].code
    here = ONE_TENSOR.data_ptr()
    given = {
        "param": here,
        "extra": here,
        "states": [here] * 2,
        "scales": [here] * 2,
        "step": here,
        "group": 0,
        "norms": 0,
        **row,
    }
    table = _C.Table(chunk)
    table.add(
        *(given[key] for key in ("param", "extra", "states", "scales", "step")),
        0,
        300,
        given["group"],
        0,
        given["norms"],
    )
    hyper = RULES["adamw"].hyper
    hypers = _C.Hypers([(key, at) for _, key, at in hyper])
    hypers.pack([{key: 0.5 for _, key, _ in hyper}])
    run(table, hypers, index, param_code, *dtypes, STATE_FORMATS[state].code, _C.PassArgs(), 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rule": 99}, "got rule=99, expected 0 to"),
        ({"rule": -1}, "got rule=-1, expected 0 to"),
        ({"form": 99}, "got param_format=99"),
        ({"grad": 99}, "got grad_dtype=99"),
        ({"main": 99}, "got main_dtype=99"),
        ({"main": "float64"}, "got float64 beside another dtype"),
        ({"form": "float64"}, "got float64 beside another dtype"),
        ({"state": "float64"}, "got float64 beside another dtype"),
        ({"group": 3}, "hyper-parameters of 1 param groups, expected 4"),
        ({"state": "int8", "chunk": 100}, "got chunks of 100 elements, expected a multiple of 256"),
        ({"step": 0}, "no address of 'step' for tensor 0"),
        ({"rule": "lamb"}, "cpu_update: got no address of 'norms' for tensor 0"),
        ({"param": 0}, "no address of 'param'"),
        ({"form": "bfloat16+master", "extra": 0}, "no address of 'extra'"),
        ({"states": [0, 0]}, "no address of 'states'"),
        ({"state": "int8", "scales": [0, 0]}, "no address of 'scales'"),
    ],
    ids=str,
)
def test_wrong_codes_are_refused(change, message):
    """And missing addresses: where a table and the codes beside it do not fit, nothing is followed."""
    with pytest.raises(ValueError, match=message):
        update_with(**change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rule": 99}, "cpu_measure: got rule=99, expected 0 to"),
        ({"rule": "adamw"}, "cpu_measure: got rule=.*, which has one phase, expected one of two"),
        ({"rule": "lamb", "grad": 99}, "cpu_measure: got grad_dtype=99"),
        ({"rule": "lamb"}, "cpu_measure: got no address of 'norms' for tensor 0"),
    ],
    ids=str,
)
def test_what_measures_nothing_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        update_with(**change, run=_C.cpu_measure)


def test_accumulation_without_main_gradients_is_refused():
    table = _C.Table(256)
    here = ONE_TENSOR.data_ptr()
    table.set_grad(table.add(here, 0, [], [], here, 0, 300, 0, 0), here)
    with pytest.raises(ValueError, match="cpu_accumulate: got no address of 'main_grad' for tensor 0"):
        _C.cpu_accumulate(table, *[dtype_code(torch.float32)] * 2, _C.PassArgs(), 1)


# ---- sizes and shares ---------------------------------------------------------------------------------------------


def test_norm_of_more_elements_than_int32():
    """2^31 + 4,100 of them, of which all but four stand in the one page of zeros that the system has."""
    n = 2**31 + 4100
    try:
        memory = mmap.mmap(-1, 2 * n)
    except OSError as error:
        pytest.skip(f"no 4 GiB of addresses: {error}")
    grad = torch.frombuffer(memory, dtype=torch.bfloat16)
    grad[[0, 2**31 - 1, 2**31, n - 1]] = 3.0
    assert fusedopt.get_total_norm([grad]).item() == 6.0


@pytest.mark.parametrize(("norm_type", "expected"), [(1.0, 25.0), (2.0, 5.0), (float("inf"), 16.0)])
def test_shares_of_several_devices(norm_type, expected):
    """What the CPU hands over, and what it makes of its share and another device's."""
    gradient = normal((5,))
    (tables,), ((bucket, slot),) = passes.TablesCache().get([TensorRow(5, gradient.device, gradient.dtype)])
    bucket.table.set_grad(slot, gradient.data_ptr())
    scalars = passes.StepScalars(max_grad_norm=1.0, norm_type=norm_type, skip_nonfinite=True)
    passes.begin([tables], scalars, ("norm",))
    tables.backend.norm(tables, finalize=False)
    norm = torch.linalg.vector_norm(gradient.double(), norm_type).item()
    assert tables.control.local_sums.tolist() == pytest.approx([norm**2 if norm_type == 2 else norm, 0.0], rel=1e-6)
    assert tables.control.total_norm.isnan()
    tables.backend.finalize_norm(tables, torch.tensor([[9.0, 0.0], [16.0, 1.0]], dtype=torch.float64))
    assert (tables.control.total_norm, tables.control.norm_found_inf) == (expected, 1.0)
    assert tables.control.clip_coef64.item() == 1.0 / (expected + 1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_norm_over_several_tables(norm_type, backend):
    """As over several devices: each finds the norm of all, and that one of them met an infinity."""
    gradients = [normal((n,), seed=n) for n in (5, 70_000)]
    tables = []
    for gradient in gradients:
        with fusedopt.use_backend(backend):
            (own,), ((bucket, slot),) = passes.TablesCache().get(
                [TensorRow(gradient.numel(), gradient.device, FLOAT32)]
            )
        bucket.table.set_grad(slot, gradient.data_ptr())
        tables.append(own)
    scalars = passes.StepScalars(max_grad_norm=1.0, norm_type=norm_type, skip_nonfinite=True)
    for bad in (False, True):
        if bad:
            gradients[0][3] = float("inf")
        passes.begin(tables, scalars, ("norm",))
        passes.norm(tables)
        norm = torch.linalg.vector_norm(torch.cat(gradients).double(), norm_type).item()
        for own in tables:
            assert own.control.total_norm.item() == pytest.approx(norm, rel=4 * 2.0**-24)
            assert own.control.norm_found_inf.item() == bad


# ---- the GIL ------------------------------------------------------------------------------------------------------

ELEMENTS = 1 << 24  # some 20 ms of work for one thread, against a switch interval of 5 ms


def longest_pause(work) -> float:
    """The longest time that another Python thread stood still during `work()`, as a share of its duration."""
    ticks, stop = [], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-4)

    other = threading.Thread(target=tick)
    other.start()
    time.sleep(0.01)
    start = time.perf_counter()
    work()
    end = time.perf_counter()
    stop.set()
    other.join()
    times = [start, *(t for t in ticks if start < t < end), end]
    return max(b - a for a, b in pairwise(times)) / (end - start)


@pytest.mark.parametrize("work", ["update", "norm", "accumulate", "scale"])
def test_other_python_threads_run_meanwhile(threads, work):
    threads(1)
    params = [torch.nn.Parameter(torch.ones(ELEMENTS))]
    params[0].grad = torch.ones(ELEMENTS)
    opt = fusedopt.AdamW(params)
    accumulator = fusedopt.GradAccumulator(params)

    def accumulate():
        params[0].grad = grad
        accumulator.accumulate()

    grad = params[0].grad
    functions = {
        "update": opt.step,
        "accumulate": accumulate,
        "norm": lambda: fusedopt.get_total_norm(grads(params)),
        "scale": lambda: fusedopt.unscale_grads_(params, 2.0),
    }
    functions[work]()  # makes states and tables
    # Were the GIL held, every share would be close to 1. Others may use the machine, so one that is not is enough.
    assert any(longest_pause(functions[work]) < 0.5 for _ in range(50))


# ---- without torch's C functions ----------------------------------------------------------------------------------


def test_the_suite_passes_without_torchs_c_functions():
    """Tensors are then read through their Python attributes, as with a torch that lacks those functions."""
    environment = {"FUSEDOPT_NO_TORCH_FUNCTIONS": "1"}
    done = python("import fusedopt; print(fusedopt._C.has_torch_functions())", **environment)
    assert done.stdout.strip() == "False", done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", "-p", "no:cacheprovider"]
        + [str(TESTS / "optim" / name) for name in ("test_state.py", "test_torch_parity.py")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
