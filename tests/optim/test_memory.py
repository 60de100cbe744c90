"""memory_summary(): every byte, against a count by hand."""

import pytest
import torch
from cases import normal, parameter, parameters, set_gradients, train
from format_cases import BFLOAT16, FLOAT16, FLOAT32

import fusedopt
from fusedopt.plan import SEGMENT, aligned_like

SIZES = [5, 0, 4097, 8192]
N, BIG = sum(SIZES), 4097 + 8192
SCALES = 4 * (17 + 32)  # blocks of 256 elements of the two tensors that have 4096 elements or more

# dtype, options, bytes: of parameters, of what is kept beside them, of both moments, of their scales.
ROWS = [
    (FLOAT32, {}, 4 * N, 0, 8 * N, 0),
    (BFLOAT16, {}, 2 * N, 0, 4 * N, 0),
    (torch.float64, {}, 8 * N, 0, 16 * N, 0),
    (BFLOAT16, {"master_weights": "fp32"}, 2 * N, 4 * N, 8 * N, 0),
    (FLOAT16, {"master_weights": "fp32", "state_dtype": "bf16"}, 2 * N, 4 * N, 4 * N, 0),
    (BFLOAT16, {"master_weights": "split16"}, 2 * N, 2 * N, 8 * N, 0),
    (BFLOAT16, {"master_weights": "split8", "state_dtype": "int8"}, 2 * N, N, 2 * BIG + 8 * 5, 2 * SCALES),
    (BFLOAT16, {"stochastic_rounding": True}, 2 * N, 0, 4 * N, 0),
    (FLOAT32, {"state_dtype": "int8", "min_8bit_size": 0}, 4 * N, 0, 2 * N, 2 * (SCALES + 4)),
]


def tables_of(device, tensors, chunks, control=64):
    """Results of a step, 64 bytes; on CUDA 128 bytes per tensor and 16 per chunk of 8,192 elements at least."""
    return control if device.type == "cpu" else control + 128 * tensors + 16 * chunks


@pytest.mark.parametrize("dtype, options, param, master, states, scales", ROWS, ids=str)
def test_bytes_by_role(dtype, options, param, master, states, scales, device):
    params = parameters(SIZES, dtype, device)
    opt = fusedopt.AdamW(params, **options)
    none = dict.fromkeys(("master", "states", "scales", "steps", "grad", "main_grad", "tables"), 0)
    assert opt.memory_summary().bytes == {"param": param, **none}

    train(opt, params, 2)
    summary = opt.memory_summary()
    tables = summary.bytes["tables"]
    assert tables == 64 if device.type == "cpu" else tables >= tables_of(device, len(SIZES), 4)
    assert summary.bytes == {
        "param": param,
        "master": master,
        "states": states,
        "scales": scales,
        "steps": 4 * len(SIZES),
        "grad": param,
        "main_grad": 0,
        "tables": tables,
    }
    assert summary.numel == N
    assert summary.total == 2 * param + master + states + scales + 4 * len(SIZES) + tables
    assert summary.checkpoint == master + states + scales + 4 * len(SIZES)
    assert summary.per_param() == summary.total / N
    assert summary.per_param("states") == states / N
    opt.zero_grad()
    assert opt.memory_summary().bytes["grad"] == 0


def test_lion_has_one_moment(device):
    params = parameters(SIZES, BFLOAT16, device)
    opt = fusedopt.Lion(params, master_weights="split8", state_dtype="int8")
    train(opt, params, 1)
    counted = opt.memory_summary().bytes
    assert (counted["states"], counted["scales"]) == (BIG + 4 * 5, SCALES)


def test_main_gradients_and_groups_with_different_formats(device):
    params = parameters([300, 5000, 7000], BFLOAT16, device)
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "master_weights": "split16", "state_dtype": "int8"},
        {"params": params[2:], "master_weights": "fp32"},
    ]
    opt = fusedopt.AdamW(groups)
    for p in params[1:]:
        p.main_grad = normal(p.shape, FLOAT32, device)
    set_gradients(params[:1])
    opt.step()
    counted = opt.memory_summary().bytes
    tables = counted.pop("tables")
    assert counted == {
        "param": 2 * 12_300,
        "master": 2 * 5000 + 4 * 7000,
        "states": 4 * 300 + 2 * 5000 + 8 * 7000,
        "scales": 2 * 4 * 20,
        "steps": 12,
        "grad": 2 * 300,
        "main_grad": 4 * 12_000,
    }
    assert tables == 64 if device.type == "cpu" else tables >= tables_of(device, 3, 3)


def test_parameters_with_gaps(device):
    """States are dense, and so is the copy that each step fills; elements count, not the storage that they lie in."""
    p = parameter(normal((100, 60), BFLOAT16, device)[:, ::2])
    opt = fusedopt.AdamW([p], master_weights="split8", state_dtype="int8", min_8bit_size=1)
    train(opt, [p], 1)
    counted = opt.memory_summary().bytes
    assert (counted["param"], counted["master"], counted["states"], counted["scales"]) == (6000, 3000, 6000, 2 * 4 * 12)


def test_five_bytes_per_parameter(device):
    """What split8 with int8 moments is for: 3 + 2 and 1/32 for the scales; the gradient comes on top."""
    p = parameter(normal((2**20,), BFLOAT16, device))
    opt = fusedopt.AdamW([p], master_weights="split8", state_dtype="int8")
    train(opt, [p], 1)
    opt.zero_grad()
    summary = opt.memory_summary()
    kept = sum(summary.per_param(role) for role in ("param", "master", "states", "scales"))
    assert kept == 5 + 2 / 64


def test_as_text(device):
    params = parameters([5000], BFLOAT16, device)
    opt = fusedopt.AdamW(params, master_weights="split8", state_dtype="int8")
    train(opt, params, 1)
    summary = opt.memory_summary()
    text = str(summary)
    for role, count in summary.bytes.items():
        assert (role in text) is bool(count), "roles that take nothing are left out"
    assert "5,000 parameters" in text and f"{summary.total:,} bytes" in text and "2.000 per parameter" in text


@pytest.mark.gpu
def test_summary_is_what_the_allocator_gave():
    """States, masters and scales of one large parameter, as torch's allocator counts them, in blocks of 512 bytes."""
    p = parameter(normal((2**22,), BFLOAT16, "cuda"))
    p.grad = torch.zeros_like(p)
    opt = fusedopt.AdamW([p], master_weights="split8", state_dtype="int8")
    before = torch.cuda.memory_allocated()
    opt.step()
    counted = opt.memory_summary().bytes
    taken = sum(counted[role] for role in ("master", "states", "scales", "steps", "tables"))
    pieces = 6 + len(opt._plan.tables[0].device_memory())
    assert taken <= torch.cuda.memory_allocated() - before <= taken + 512 * pieces


@pytest.mark.parametrize("behind", [0, 1, 3, 4, 8, 31, 32, 63, 64, 65, 128])
@pytest.mark.parametrize(
    "dtype, other", [(FLOAT32, FLOAT32), (BFLOAT16, FLOAT32), (FLOAT32, BFLOAT16), (FLOAT16, torch.int8)]
)
def test_a_tensor_is_aligned_like_the_parameter(dtype, other, behind, device):
    param = torch.zeros(400, dtype=dtype, device=device)[behind:].view(1, -1)
    tensor = torch.arange(400 - behind, device=device).to(other).view(1, -1)
    moved = aligned_like(tensor, param)
    assert torch.equal(moved, tensor) and moved.dtype == other and moved.stride() == tensor.stride()
    segment = SEGMENT // param.itemsize
    first = -(param.data_ptr() // param.itemsize) % segment  # the parameter's first element that begins one
    assert moved[0, first:].data_ptr() % (segment * moved.itemsize) == 0
    assert aligned_like(moved, param) is moved


@pytest.mark.gpu
@pytest.mark.parametrize("loaded", [False, True])
def test_states_are_aligned_like_their_parameters(loaded):
    def optimizer(dtype, **options):
        param = parameter(normal((8200,), dtype, "cuda")[1:])
        opt = fusedopt.AdamW([param], **options)
        if loaded:
            other = parameter(param.detach().clone())
            source = fusedopt.AdamW([other], **options)
            train(source, [other], 1)
            opt.load_state_dict(source.state_dict())
        train(opt, [param], 1)
        return param, opt.state[param]

    param, state = optimizer(FLOAT32)
    assert {each.data_ptr() % SEGMENT for each in (param, state["exp_avg"], state["exp_avg_sq"])} == {4}
    param, state = optimizer(BFLOAT16, master_weights="split16")
    assert [state[key].data_ptr() % (2 * SEGMENT) for key in ("exp_avg", "exp_avg_sq")] == [4, 4]
    assert state["param_remainder"].data_ptr() % SEGMENT == param.data_ptr() % SEGMENT == 2
    param, state = optimizer(BFLOAT16, state_dtype="int8")  # groups of elements begin at the first one
    assert [state[key].data_ptr() % SEGMENT for key in ("exp_avg", "exp_avg_sq")] == [0, 0]
