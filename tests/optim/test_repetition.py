"""Steps that are made like the one before: whatever changes between two of them is noticed."""

from types import SimpleNamespace

import pytest
import torch
from cases import BY_NAME, ONE_EACH, assert_same_bits, memory, parameters, set_gradients, train
from torch.optim.optimizer import register_optimizer_step_post_hook

import fusedopt
from fusedopt.optim import repeat
from fusedopt.sharding import Gathering

SIZES = [5, 0, 4097, 65537]


def make(case, device, **options):
    params = parameters(SIZES, device=device)
    opt = case.make([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.3}], **options)
    return params, opt


def long_way(opt):
    """The same optimizer without repetition: an observer makes every step take the long way."""
    opt.register_step_pre_hook(lambda *_: None)
    return opt


def repeats(opt):
    return opt._plan is not None and opt._plan.repetition is not None


CHANGES = {
    "nothing": lambda params, opt: None,
    "lr": lambda params, opt: opt.param_groups[1].update(lr=0.5),
    "tensor_lr": lambda params, opt: opt.param_groups[0].update(lr=torch.tensor(0.25, device=params[0].device)),
    "maximize": lambda params, opt: opt.param_groups[0].update(maximize=True),
    "max_grad_norm": lambda params, opt: setattr(opt, "max_grad_norm", 0.1),
    "norm_type": lambda params, opt: setattr(opt, "norm_type", 1.0),
    "no_norm": lambda params, opt: setattr(opt, "max_grad_norm", None),
    "new_group": lambda params, opt: opt.add_param_group({"params": add_one(params)}),
    "checkpoint": lambda params, opt: opt.load_state_dict(opt.state_dict()),
    "swapped_data": lambda params, opt: setattr(params[2], "data", params[2].data.clone()),
    "replaced_state": lambda params, opt: replace_state(opt.state[params[3]]),
    "frozen": lambda params, opt: params.pop(),
    "counter": lambda params, opt: opt.state[params[0]]["step"].fill_(40),
}


def replace_state(entry):
    key = next(key for key in entry if key != "step")
    entry[key] = entry[key].clone()


def add_one(params):
    params.extend(added := parameters([300], device=params[0].device, seed=9))
    return added


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_changes_between_steps(case, change, device):
    params, opt = make(case, device, max_grad_norm=0.5)
    expected_params, expected = make(case, device, max_grad_norm=0.5)
    long_way(expected)
    frozen = params[-1], expected_params[-1]
    for ps, one in ((params, opt), (expected_params, expected)):
        train(one, ps, 3)
        CHANGES[change](ps, one)
        for p in frozen:
            p.grad = None
        train(one, ps, 3, first=3)
    assert repeats(opt)
    assert_same_bits(memory(opt), memory(expected))
    assert_same_bits(opt.grad_norm, expected.grad_norm)
    assert opt.last_step.step == 6


def test_the_rule_changes_between_steps(device):
    """SGD with and without momentum, by group: each rule has its own kernels and its own row of hyper-parameters."""
    params, opt = make(BY_NAME["sgd-l2"], device)
    expected_params, expected = make(BY_NAME["sgd-l2"], device)
    long_way(expected)
    for ps, one in ((params, opt), (expected_params, expected)):
        for step, momentum in enumerate((0.0, 0.9, 0.9, 0.0)):
            one.param_groups[1]["momentum"] = momentum
            for turn in range(3):
                one.param_groups[0]["lr"] = 0.1 / (1 + turn)
                train(one, ps, 1, first=3 * step + turn)
    assert repeats(opt)
    assert_same_bits(memory(opt), memory(expected))


def test_the_backend_changes_between_steps(device):
    """By attribute and by context."""
    params, opt = make(ONE_EACH[1], device)
    expected_params, expected = make(ONE_EACH[1], device)
    train(long_way(expected), expected_params, 8)
    train(opt, params, 2)
    assert repeats(opt)
    opt.backend = "reference"
    train(opt, params, 2, first=2)
    assert opt._plan.backend == "reference"
    opt.backend = None
    train(opt, params, 2, first=4)
    assert opt._plan.backend is None
    with fusedopt.use_backend("reference"):
        train(opt, params, 2, first=6)
        assert opt._plan.backend == "reference"
    assert_same_bits(memory(opt), memory(expected))


@pytest.mark.gpu
@pytest.mark.parametrize("change", ["nothing", "lr", "tensor_lr", "swapped_data", "no_norm"])
def test_changes_between_steps_on_triton(change):
    """Whose step tables travel through staging buffers."""
    device = torch.device("cuda")
    memories = []
    for observe in (long_way, lambda opt: opt):
        params, opt = make(ONE_EACH[1], device, backend="triton", max_grad_norm=0.5)
        observe(opt)
        train(opt, params, 3)
        CHANGES[change](params, opt)
        train(opt, params, 20, first=3)  # more than there are staging buffers
        assert repeats(opt)
        memories.append(memory(opt))
    assert_same_bits(*memories)


def test_scalers_between_steps(device):
    """A scaled step, and one that is skipped, among repeated ones."""
    case = ONE_EACH[1]
    params, opt = make(case, device, max_grad_norm=0.5)
    expected_params, expected = make(case, device, max_grad_norm=0.5)
    long_way(expected)
    for ps, one in ((params, opt), (expected_params, expected)):
        train(one, ps, 2)
        set_gradients(ps, seed=2, scale=4.0)
        one.grad_scale = torch.tensor(4.0, device=device)
        one.step()
        del one.grad_scale
        one.found_inf = torch.ones((), device=device)
        one.step()
        del one.found_inf
        train(one, ps, 2, first=3)
    assert_same_bits(memory(opt), memory(expected))
    assert opt.skipped_steps.item() == expected.skipped_steps.item() == 1


def test_hooks_and_profilers_are_told_of_every_step(device):
    params, opt = make(ONE_EACH[1], device)
    train(opt, params, 2)
    assert repeats(opt)
    called = []
    handles = [
        opt.register_step_pre_hook(lambda *_: called.append("pre")),
        opt.register_step_post_hook(lambda *_: called.append("post")),
        register_optimizer_step_post_hook(lambda *_: called.append("global")),
    ]
    opt.step()
    for handle in handles:
        handle.remove()
    opt.step()
    assert called == ["pre", "post", "global"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        opt.step()
    assert [e.count for e in profiler.key_averages() if e.key == "Optimizer.step#AdamW.step"] == [1]


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_an_optimizers_own_hook_is_told_of_every_step(register, device):
    """One alone, without hooks of all optimizers beside it."""
    params = parameters([5], device=device)
    opt, called = fusedopt.AdamW(params), []
    train(opt, params, 2)
    getattr(opt, register)(lambda *_: called.append(True))
    train(opt, params, 2)
    assert called == [True, True]


def test_autograd_notices_that_parameters_were_written(device):
    param = torch.nn.Parameter(torch.ones(5, device=device))
    opt = fusedopt.AdamW([param])
    for _ in range(3):
        param.grad = torch.ones_like(param)
        version = param._version
        opt.step()
        assert param._version == version + 1
    param.grad = None
    version = param._version
    opt.step()
    assert param._version == version


def test_an_accumulator_comes_and_goes(device):
    params, opt = make(ONE_EACH[1], device)
    expected_params, expected = make(ONE_EACH[1], device)
    for ps, one in ((params, opt), (expected_params, expected)):
        train(one, ps, 2)
        accumulator = fusedopt.GradAccumulator(one)
        for step in range(2, 5):
            set_gradients(ps, seed=10 * step)
            accumulator.accumulate()
            set_gradients(ps, seed=10 * step + 1)
            one.step()
        accumulator.detach()
        train(one, ps, 2, first=5)
    assert repeats(opt)
    assert_same_bits(memory(opt), memory(expected))


@pytest.mark.gpu
def test_steps_on_several_streams():
    """The stream is the current one of each step."""
    device = torch.device("cuda")
    params, opt = make(ONE_EACH[1], device)
    expected_params, expected = make(ONE_EACH[1], device)
    train(long_way(expected), expected_params, 5)
    for step in range(5):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            train(opt, params, 1, first=step)
        torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(memory(opt), memory(expected))


# ---- what is launched on a GPU, in which order ----------------------------------------------------------------------


class Recorder:
    """In place of ``_C.RepeatedStep``."""

    def __init__(self):
        self.calls = []

    def add(self, *launch):
        self.calls.append(launch)

    def exchange(self, run):
        self.calls.append(run)


def planned(device, finals):
    """Tables of a device whose passes are launches by name, and what finishes the norm there."""

    def launches(tables, names):
        return [(f"{name} of {device}", 1, None) for name in names if name != "measure"]

    backend = SimpleNamespace(launches=launches, finalize_launch=lambda tables: ("finalize", 1, finals))
    return SimpleNamespace(backend=backend)


def test_a_norm_is_finished_between_its_pass_and_the_update():
    """Where other processes or devices have shares in it; the result's address is told to what finishes it."""
    finals = [SimpleNamespace(partials=0, num_partials=0) for _ in range(2)]
    tables = [planned(device, final) for device, final in zip("ab", finals)]
    launches = repeat._launches(tables, ("norm", "update"))
    assert {name: [of for of, *_ in of_pass] for name, of_pass in launches.items()} == {
        "norm": ["norm of a", "norm of b"],
        "measure": [],
        "update": ["update of a", "update of b"],
    }
    results = iter([torch.zeros(3, 2), torch.zeros(4, 2)])
    step = Recorder()
    repeat._add_launches(step, tables, launches, Gathering(lambda: next(results), None), ())
    names = ["exchange" if callable(call) else call[0] for call in step.calls]
    assert names == ["norm of a", "norm of b", "exchange", "finalize", "finalize", "update of a", "update of b"]
    addresses = []
    for rows in (3, 4):
        step.calls[2]()
        assert {final.num_partials for final in finals} == {rows}
        addresses.append({final.partials for final in finals})
    assert all(len(each) == 1 for each in addresses) and addresses[0] != {0}


def test_a_gathering_that_leaves_its_result_in_one_place_is_told_once():
    final, result, ran = SimpleNamespace(partials=0, num_partials=0), torch.zeros(1, 2), []
    step = Recorder()
    tables = [planned("a", final)]
    launches = repeat._launches(tables, ("norm", "update"))
    repeat._add_launches(step, tables, launches, Gathering(lambda: ran.append(1), result), ())
    assert (final.partials, final.num_partials) == (result.data_ptr(), 1)
    step.calls[1]()
    assert ran == [1]


def test_without_a_norm_of_others_passes_follow_one_another():
    step, tables = Recorder(), [planned("a", None)]
    repeat._add_launches(step, tables, repeat._launches(tables, ("norm", "update")), None, ())
    assert [call[0] for call in step.calls] == ["norm of a", "update of a"]


def test_backends_that_do_more_than_launch():
    assert repeat._launches([SimpleNamespace(backend=SimpleNamespace())], ("update",)) is None
    tables = [planned("a", None)]
    tables[0].backend.launches = lambda tables, names: None if names == ("norm",) else []
    assert repeat._launches(tables, ("norm", "update")) is None
    assert repeat._launches(tables, ("update",)) == {"measure": [], "update": []}
