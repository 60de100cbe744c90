"""Bad input: the type of the error, a message that says what was got and what to do, and nothing changed."""

import copy
import inspect
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from cases import ONE_EACH, assert_same_bits, memory, normal, parameter, parameters, set_gradients, train

import fusedopt
from fusedopt.main_grads import AccumulatePlan
from fusedopt.optim.plan import OptimizerPlan

OPTIMIZERS = [getattr(fusedopt, name) for name in dict.fromkeys(case.optimizer for case in ONE_EACH)]


def assert_message(error, *patterns):
    """Each pattern occurs, in any order and case."""
    for pattern in patterns:
        assert re.search(pattern, str(error.value), re.IGNORECASE), f"{pattern!r} is not in: {error.value}"


# ---- parameters ---------------------------------------------------------------------------------------------------


def twice():
    p = parameter(normal((3,)))
    return [p, parameter(normal((2,))), p]


def twice_in_groups():
    p = parameter(normal((3,)))
    return [{"params": [p]}, {"params": [p]}]


BAD_PARAMETERS = {
    "empty list": (list, ValueError, ["empty"]),
    "empty generator": (lambda: iter(()), ValueError, ["empty"]),
    "bare tensor": (lambda: parameter(normal((3,))), TypeError, ["tensor", r"list|iterable|\["]),
    "number in the list": (lambda: [parameter(normal((3,))), 1.0], TypeError, ["float", "tensor"]),
    "array in the list": (lambda: [normal((3,)).numpy()], TypeError, ["ndarray", "tensor"]),
    "integers": (lambda: [parameter(normal((3,))), torch.arange(3)], TypeError, ["int64", "float"]),
    "booleans": (lambda: [torch.ones(3, dtype=torch.bool)], TypeError, ["bool", "float"]),
    "half-precision complex": (
        lambda: [torch.empty(3, dtype=torch.complex32)],
        TypeError,
        ["complex32", "complex64", "convert"],
    ),
    "sparse": (lambda: [torch.eye(3).to_sparse()], TypeError, ["sparse", "dense"]),
    "non-leaf": (lambda: [parameter(normal((3,))) * 2], ValueError, ["leaf", "detach|Parameter|computed from"]),
    "twice": (twice, ValueError, ["twice|duplicate|more than once|same parameter", "remove|unique"]),
    "twice, in two groups": (twice_in_groups, ValueError, ["group"]),
    "expanded": (lambda: [normal((1,)).expand(4)], ValueError, ["overlap|share|same memory", "clone|contiguous"]),
    "overlapping windows": (
        lambda: [torch.zeros(6).as_strided((3, 3), (1, 1))],
        ValueError,
        ["overlap|share|same memory", "clone|contiguous"],
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("name", BAD_PARAMETERS)
def test_bad_parameters(name, optimizer):
    make, exception, patterns = BAD_PARAMETERS[name]
    with pytest.raises(exception) as error:
        optimizer(make())
    assert_message(error, *patterns)


@pytest.mark.parametrize("name", [name for name in BAD_PARAMETERS if not name.startswith(("empty", "twice", "bare"))])
def test_bad_added_group(name, device):
    """The optimizer goes on without the group."""
    make, exception, patterns = BAD_PARAMETERS[name]
    params = parameters([5, 6], device=device)
    opt = fusedopt.AdamW(params)
    train(opt, params, 1)
    with pytest.raises(exception) as error:
        opt.add_param_group({"params": make()})
    assert_message(error, *patterns)
    assert [group["params"] for group in opt.param_groups] == [params]
    train(opt, params, 1, first=1)
    assert float(opt.state[params[1]]["step"]) == 2


def test_added_group_with_a_parameter_that_is_there_already(device):
    params = parameters([5, 6], device=device)
    opt = fusedopt.AdamW(params)
    with pytest.raises(ValueError, match="group"):
        opt.add_param_group({"params": params[:1]})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("group", [3, [1, 2], {"lr": 1.0}], ids=str)
def test_added_group_that_is_none(group, device):
    """The error is torch's."""
    params = parameters([5], device=device)
    opt = fusedopt.AdamW(params)
    with pytest.raises((TypeError, KeyError)):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1


def test_a_norm_reduce_that_cannot_be_called():
    opt = fusedopt.AdamW(parameters([5]))
    for attempt in (
        lambda: fusedopt.AdamW(parameters([5]), norm_reduce=3),
        lambda: setattr(opt, "norm_reduce", "sum"),
        lambda: fusedopt.get_total_norm(parameters([5]), norm_reduce=3),
    ):
        with pytest.raises(TypeError, match=r"norm_reduce is a (int|str), expected a function of \(sums, op\); pass"):
            attempt()
    assert opt.norm_reduce is None


def test_parameters_that_change_while_a_step_reads_them(monkeypatch):
    """As another thread may do it: the plan that was just made does not fit. Nothing has changed."""
    params = parameters([5, 6])
    opt = fusedopt.AdamW(params)
    before = [p.detach().clone() for p in params]
    set_gradients(params)
    monkeypatch.setattr(OptimizerPlan, "refresh", lambda plan, optimizer: False)
    with pytest.raises(RuntimeError, match=r"AdamW\.step: parameters or gradients changed while they were being read"):
        opt.step()
    assert not any(opt.state.values())
    assert_same_bits([p.detach() for p in params], before)

    acc = fusedopt.GradAccumulator(params)
    monkeypatch.setattr(AccumulatePlan, "refresh", lambda plan, params: False)
    with pytest.raises(RuntimeError, match=r"GradAccumulator\.accumulate: parameters or gradients changed while"):
        acc.accumulate()
    assert acc.micro_batches == 0


# ---- hyper-parameters ---------------------------------------------------------------------------------------------

BAD_VALUES = [
    ("lr", -1.0),
    ("lr", math.nan),
    ("lr", torch.tensor(-1.0)),
    ("betas", (0.9,)),
    ("betas", (-0.1, 0.9)),
    ("betas", (0.9, 1.0)),
    ("betas", (1.0, 0.9)),
    ("betas", (math.nan, 0.9)),
    ("betas", (0.9, math.nan)),
    ("weight_decay", -0.1),
    ("weight_decay", math.nan),
    ("eps", -1e-8),
    ("eps", math.nan),
    ("momentum", -0.1),
    ("momentum", math.nan),
    ("dampening", math.nan),
    ("alpha", -0.1),
    ("alpha", math.nan),
    ("lr_decay", -0.1),
    ("initial_accumulator_value", -1.0),
    ("initial_accumulator_value", math.nan),
    ("max_grad_norm", 0.0),
    ("max_grad_norm", -1.0),
    ("max_grad_norm", math.nan),
    ("max_grad_value", 0.0),
    ("max_grad_value", -1.0),
    ("max_grad_value", math.nan),
    ("norm_type", 3.0),
    ("norm_type", 0.0),
    ("norm_type", math.nan),
    ("nonfinite", "ignore"),
    ("nonfinite", None),
]
ADDITIONS = {"max_grad_norm": 1.5, "max_grad_value": 2.5, "norm_type": 1.0, "nonfinite": "skip"}


def value_pattern(key, value):
    """The value as it was given; of a tuple the part that is wrong."""
    if key == "betas":
        value = next((beta for beta in value if not 0 <= beta < 1), value)
    return re.escape(str(value.item() if isinstance(value, torch.Tensor) else value))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("key, value", BAD_VALUES, ids=str)
def test_bad_hyper_parameter(key, value, optimizer):
    if key not in ADDITIONS and key not in inspect.signature(optimizer).parameters:
        pytest.skip(f"{optimizer.__name__} has no {key}")
    with pytest.raises(ValueError) as error:
        optimizer(parameters([3]), **{key: value})
    assert_message(error, "beta" if key == "betas" else key, value_pattern(key, value))


@pytest.mark.parametrize("key, value", [row for row in BAD_VALUES if row[0] not in ADDITIONS], ids=str)
def test_bad_hyper_parameter_of_an_added_group(key, value):
    first, second = parameters([3, 4])
    opt = fusedopt.AdamW([first])
    with pytest.raises(ValueError) as error:
        opt.add_param_group({"params": [second], key: value})
    assert_message(error, "beta" if key == "betas" else key, value_pattern(key, value))
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("key, value", [row for row in BAD_VALUES if row[0] in ADDITIONS], ids=str)
def test_bad_assignment(key, value):
    opt = fusedopt.AdamW(parameters([3]), **ADDITIONS)
    with pytest.raises(ValueError) as error:
        setattr(opt, key, value)
    assert_message(error, key, re.escape(str(value)))
    assert {name: getattr(opt, name) for name in ADDITIONS} == ADDITIONS


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_what_torch_does_and_we_do_not(optimizer):
    with pytest.raises(ValueError) as error:
        optimizer(parameters([3]), differentiable=True)
    assert_message(error, "differentiable", r"torch\.optim")


@pytest.mark.parametrize("optimizer", [fusedopt.SGD, fusedopt.SGDW], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("values", [{}, {"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.1}], ids=str)
def test_nesterov_needs_momentum_and_no_dampening(optimizer, values):
    with pytest.raises(ValueError) as error:
        optimizer(parameters([3]), nesterov=True, **values)
    assert_message(error, "nesterov", "momentum > 0", "no dampening")
    opt = optimizer(parameters([3]), momentum=0.9)
    with pytest.raises(ValueError, match="nesterov"):
        opt.add_param_group({"params": parameters([3]), "nesterov": True, "momentum": 0.9, "dampening": 0.1})
    assert len(opt.param_groups) == 1


# ---- gradients ----------------------------------------------------------------------------------------------------


def sparse(params):
    params[1].grad = torch.sparse_coo_tensor([[2]], [1.0], params[1].shape, device=params[1].device)


def other_shape(params):
    params[1].grad.data = params[1].grad.data[:5].clone()


def same_numel_other_shape(params):
    params[2].grad.data = params[2].grad.data.t().contiguous()


BAD_GRADIENTS = {
    sparse: (RuntimeError, ["sparse", r"SparseAdam|to_dense|sparse=False"]),
    other_shape: (ValueError, ["shape", r"\b5\b", r"\b4097\b"]),
    same_numel_other_shape: (ValueError, ["shape", r"3, 8", r"8, 3"]),
}


def assert_refused(opt, params, spoil, exception, patterns):
    """The error comes before the first write, and a step with good gradients is then what it would have been."""
    twins = copy.deepcopy(params)
    expected = type(opt)(twins, max_grad_norm=opt.max_grad_norm)
    for o, ps in ((opt, params), (expected, twins)):
        train(o, ps, 1)
    set_gradients(params, seed=1)
    spoil(params)
    before = memory(opt)
    with pytest.raises(exception) as error:
        opt.step()
    assert_message(error, *patterns)
    assert_same_bits(memory(opt), before)
    for p in params:
        p.grad = None
    for o, ps in ((opt, params), (expected, twins)):
        train(o, ps, 1, first=1)
    assert_same_bits(memory(opt), memory(expected))


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("spoil", BAD_GRADIENTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_bad_gradient(case, spoil, max_grad_norm, device):
    params = [*parameters([5, 4097], device=device), parameter(normal((3, 8), device=device))]
    opt = getattr(fusedopt, case.optimizer)(params, max_grad_norm=max_grad_norm)
    assert_refused(opt, params, spoil, *BAD_GRADIENTS[spoil])


def test_bad_gradient_in_the_first_step(device):
    """Nothing is created or written before every gradient has been looked at."""
    params = parameters([5, 4097], device=device)
    before = [p.detach().clone() for p in params]
    opt = fusedopt.AdamW(params)
    set_gradients(params)
    other_shape(params)
    with pytest.raises(ValueError):
        opt.step()
    assert_same_bits([p.detach() for p in params], before)
    assert all(float(state["step"]) == 0 for state in opt.state.values() if state)


@pytest.mark.gpu
def test_gradient_on_another_device():
    params = parameters([5, 4097])
    opt = fusedopt.AdamW(params)
    train(opt, params, 1)
    params[0].grad = torch.ones(5)
    params[1].data = params[1].data.cuda()
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError) as error:
        opt.step()
    assert_message(error, "cuda", "cpu")
    assert_same_bits([p.detach() for p in params], before)


# ---- checkpoints --------------------------------------------------------------------------------------------------


def shape_differs(checkpoint):
    checkpoint["state"][1]["exp_avg"] = torch.zeros(6)


def transposed_shape(checkpoint):
    checkpoint["state"][2]["exp_avg_sq"] = torch.zeros(8, 3)


def moment_missing(checkpoint):
    del checkpoint["state"][1]["exp_avg_sq"]


def step_missing(checkpoint):
    del checkpoint["state"][0]["step"]


def group_missing(checkpoint):
    checkpoint["param_groups"].append(checkpoint["param_groups"][0] | {"params": []})


def parameter_missing(checkpoint):
    checkpoint["param_groups"][0]["params"].pop()


BAD_CHECKPOINTS = {
    shape_differs: ["exp_avg", r"\b6\b", r"\b4097\b"],
    transposed_shape: ["exp_avg_sq", "8, 3", "3, 8"],
    moment_missing: ["exp_avg_sq", "missing|lacks|expected"],
    step_missing: ["step", "missing|lacks|expected"],
    group_missing: ["group"],
    parameter_missing: ["group"],
}


@pytest.mark.parametrize("spoil", BAD_CHECKPOINTS, ids=lambda f: f.__name__)
def test_bad_checkpoint(spoil, device):
    params = [*parameters([5, 4097], device=device), parameter(normal((3, 8), device=device))]
    opt = fusedopt.AdamW(params, lr=0.01)
    train(opt, params, 2)
    checkpoint = copy.deepcopy(opt.state_dict())
    checkpoint["param_groups"][0]["lr"] = 0.5
    for state in checkpoint["state"].values():
        state["exp_avg"].zero_()
    spoil(checkpoint)
    before = memory(opt)
    with pytest.raises(ValueError) as error:
        opt.load_state_dict(checkpoint)
    assert_message(error, *BAD_CHECKPOINTS[spoil])
    assert_same_bits(memory(opt), before)
    assert opt.param_groups[0]["lr"] == 0.01


# ---- the CUDA backend ---------------------------------------------------------------------------------------------

WITHOUT_CUDA_CORE = """
import sys
sys.modules["cuda.core"] = sys.modules["cuda.core.experimental"] = sys.modules["cuda.bindings"] = None
import torch, fusedopt
p = torch.nn.Parameter(torch.ones(5, device="cuda"))
p.grad = torch.ones_like(p)
try:
    fusedopt.AdamW([p], backend="cuda").step()
except RuntimeError as error:
    print(error)
assert (p == 1).all()
"""

ONE_STEP = """
import torch, fusedopt
p = torch.nn.Parameter(torch.linspace(-1, 1, 5000, device="cuda"))
p.grad = torch.linspace(2, -1, 5000, device="cuda")
fusedopt.AdamW([p], max_grad_norm=1.0).step()
print(p.double().sum().item().hex())
"""


def python(script, **env):
    env = {**os.environ, "PYTHONWARNINGS": "default", **env}
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)


def cache_warnings(run):
    return sum("Warning" in line and "cache" in line for line in run.stderr.splitlines())


@pytest.mark.gpu
def test_without_cuda_core():
    message = python(WITHOUT_CUDA_CORE).stdout
    assert "cuda-core" in message and "pip install" in message


def damaged(files):
    for file in files:
        file.write_bytes(b"\x00" * 64)


def truncated(files):
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def foreign(files):
    """Every entry holds what belongs to another key."""
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)


@pytest.mark.gpu
@pytest.mark.parametrize("spoil", [damaged, truncated, foreign], ids=lambda f: f.__name__)
def test_bad_kernel_cache_is_recompiled(spoil, tmp_path):
    """One warning in the process, the same result, and a good cache afterwards."""
    env = {"FUSEDOPT_CACHE_DIR": str(tmp_path)}
    cold = python(ONE_STEP, **env)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) >= 2, "the norm and the update kernel are cached"
    spoil(files)
    recompiled, warm = python(ONE_STEP, **env), python(ONE_STEP, **env)
    assert cold.stdout == recompiled.stdout == warm.stdout
    assert [cache_warnings(run) for run in (cold, recompiled, warm)] == [0, 1, 0]


@pytest.mark.gpu
def test_unwritable_kernel_cache(tmp_path):
    """A file stands where the directory should be, which stops root as well."""
    obstacle = tmp_path / "file"
    obstacle.write_text("")
    run = python(ONE_STEP, FUSEDOPT_CACHE_DIR=str(obstacle / "cache"))
    assert run.stdout == python(ONE_STEP, FUSEDOPT_CACHE_DIR=str(tmp_path / "good")).stdout
    assert cache_warnings(run) == 1
    assert "FUSEDOPT_CACHE_DIR" in run.stderr


def test_sharded_parameter():
    """A DTensor has no memory of its own: its parts do, and the gradient must have the same ones."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or distributed.is_initialized():
        pytest.skip("needs a process group of its own")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        param, grad = (distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]) for _ in range(2))
        param = torch.nn.Parameter(param)
        param.grad = grad
        with pytest.raises(TypeError) as error:
            fusedopt.functional.adamw_([param], [grad.to_local()], [grad], [grad], [torch.zeros(())], lr=0.1)
        assert_message(error, r"grads\[0\] is a plain tensor beside a parameter that is a DTensor", ".to_local()")
        assert_same_bits([param.to_local().detach(), param.grad.to_local()], [torch.ones(4, 4)] * 2)
    finally:
        distributed.destroy_process_group()
