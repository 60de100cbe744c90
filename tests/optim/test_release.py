"""Gradient release: the bits of ordinary steps, with each gradient gone as soon as it was used."""

import copy
import gc
import weakref

import pytest
import torch
from cases import ONE_EACH, STATELESS, assert_same_bits, memory, normal

import fusedopt

FORMATS = {
    "plain": (torch.float32, {}),
    "split16": (torch.bfloat16, {"master_weights": "split16"}),
    "stochastic": (torch.bfloat16, {"stochastic_rounding": True, "seed": 3}),
    "int8": (torch.float32, {"state_dtype": "int8", "min_8bit_size": 0, "seed": 1}),
}


def network(dtype, device):
    torch.manual_seed(0)
    layers = [
        torch.nn.Linear(33, 65),
        torch.nn.Tanh(),
        torch.nn.Linear(65, 65),
        torch.nn.Tanh(),
        torch.nn.Linear(65, 7),
    ]
    return torch.nn.Sequential(*layers).to(dtype).to(device)


def groups(model):
    """Two, so that a parameter's place in its group is not its place in the optimizer."""
    params = list(model.parameters())
    return [{"params": params[:2], "lr": 1e-2}, {"params": params[2:], "weight_decay": 0.3}]


def backward(model, seed, device, dtype):
    model(normal((4, 33), dtype, device, seed=seed)).square().mean().backward()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", [*ONE_EACH, *STATELESS], ids=str)
def test_same_bits_as_ordinary_steps(case, name, device):
    """Learning rates change, and after the fourth step the release is undone."""
    if case in STATELESS and name == "int8":
        pytest.skip("no states to be 8-bit")
    dtype, options = FORMATS[name]
    ordinary, released = network(dtype, device), network(dtype, device)
    expected, opt = (case.make(groups(model), max_grad_value=0.01, **options) for model in (ordinary, released))
    handle = opt.release_gradients(released)
    for step in range(6):
        for model, one in ((ordinary, expected), (released, opt)):
            one.param_groups[0]["lr"] = 0.01 / (step + 1)
            backward(model, step, device, dtype)
        assert all((p.grad is None) is (step < 4) for p in released.parameters())
        for one in (expected, opt):
            one.step()
            one.zero_grad()
        assert_same_bits(memory(opt), memory(expected))
        if step == 3:
            handle.remove()


def test_the_rule_changes_between_released_steps(device):
    """SGD gets momentum, and state with it, and loses it again; one group of two."""
    ordinary, released = network(torch.float32, device), network(torch.float32, device)
    expected, opt = (fusedopt.SGD(groups(model), lr=1e-2) for model in (ordinary, released))
    opt.release_gradients(released)
    for step, momentum in enumerate((0.0, 0.0, 0.9, 0.9, 0.0, 0.8)):
        for model, one in ((ordinary, expected), (released, opt)):
            one.param_groups[1]["momentum"] = momentum
            backward(model, step, device, torch.float32)
            one.step()
            one.zero_grad()
        assert_same_bits(memory(opt), memory(expected))


def test_the_backend_changes_between_released_steps(device):
    ordinary, released = network(torch.float32, device), network(torch.float32, device)
    expected, opt = (fusedopt.AdamW(groups(model), lr=1e-2) for model in (ordinary, released))
    opt.release_gradients(released)
    for step, backend in enumerate((None, "reference", None)):
        opt.backend = backend
        for model, one in ((ordinary, expected), (released, opt)):
            backward(model, step, device, torch.float32)
            one.step()
            one.zero_grad()
        used = {plan.tables[0].backend.__name__ for plan in opt._release._plans.values()}
        assert all(name.endswith(backend or device.type) for name in used) and used
        assert_same_bits(memory(opt), memory(expected))


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_accumulation_releases_in_the_last_micro_batch(name, hooks, device):
    dtype, options = FORMATS[name]
    ordinary, released = network(dtype, device), network(dtype, device)
    expected, opt = (fusedopt.AdamW(groups(model), **options) for model in (ordinary, released))
    accumulators = [fusedopt.GradAccumulator(one, hooks=hooks) for one in (expected, opt)]
    handle = opt.release_gradients(released)
    for step in range(3):
        for micro_batch in range(3):
            backward(ordinary, 10 * step + micro_batch, device, dtype)
            if micro_batch < 2:
                with handle.paused():
                    backward(released, 10 * step + micro_batch, device, dtype)
                for accumulator in accumulators:
                    accumulator.accumulate(weight=1.0 + micro_batch) if not hooks else accumulator.accumulate()
            else:
                backward(released, 10 * step + micro_batch, device, dtype)
        for one in (expected, opt):
            one.step()
            one.zero_grad()
        assert_same_bits(memory(opt), memory(expected))
    assert {float(entry["step"]) for entry in opt.state.values()} == {3.0}


def test_parameters_that_are_not_released_are_stepped(device):
    """Only a part of the model is released; another part gets no gradient in the backward pass but by hand."""
    ordinary, released = network(torch.float32, device), network(torch.float32, device)
    expected, opt = (fusedopt.AdamW(groups(model)) for model in (ordinary, released))
    opt.release_gradients(released[0])
    for step in range(3):
        for model in (ordinary, released):
            backward(model, step, device, torch.float32)
        assert released[0].weight.grad is None and released[2].weight.grad is not None
        for one in (expected, opt):
            one.step()
            one.zero_grad()
        assert_same_bits(memory(opt), memory(expected))


def test_a_checkpoint_is_loaded_between_released_steps(device):
    ordinary, released = network(torch.float32, device), network(torch.float32, device)
    expected, opt = (fusedopt.AdamW(groups(model), lr=1e-2) for model in (ordinary, released))
    opt.release_gradients(released)
    for step in range(4):
        for model in (ordinary, released):
            backward(model, step, device, torch.float32)
        for one in (expected, opt):
            one.step()
            one.zero_grad()
        if step == 1:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert_same_bits(memory(opt), memory(expected))


def test_a_shared_parameter_is_updated_once(device):
    """Tied weights: the gradient is complete only when both uses have been differentiated."""

    def make():
        model = network(torch.float32, device)
        model[2].weight = torch.nn.Parameter(model[2].weight.detach().clone())
        return model

    def tied_backward(model, seed):
        x = normal((4, 65), device=device, seed=seed)
        shared = model[2]
        shared(torch.tanh(shared(x))).square().mean().backward()

    ordinary, released = make(), make()
    expected, opt = (fusedopt.AdamW(model[2].parameters(), lr=1e-2) for model in (ordinary, released))
    opt.release_gradients(released)
    for seed in range(3):
        for model, one in ((ordinary, expected), (released, opt)):
            tied_backward(model, seed)
            one.step()
            one.zero_grad()
    assert_same_bits(memory(opt), memory(expected))


@pytest.mark.gpu
def test_gradients_do_not_exist_at_once():
    """Twelve layers of 4 MiB: without release 48 MiB of gradients, with it two layers' at most."""
    layer, layers = 4 << 20, 12
    gc.collect()  # what other tests left must not be freed while this one counts

    def peak(release):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(layers))).cuda()
        opt = fusedopt.Lion(model.parameters())
        if release:
            opt.release_gradients(model)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(torch.ones(1, 1024, device="cuda")).sum().backward()
            opt.step()
            opt.zero_grad()
        return torch.cuda.max_memory_allocated() - before

    assert peak(release=False) >= layers * layer
    assert peak(release=True) <= 4 * layer


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"nonfinite": "skip"}], ids=str)
def test_what_needs_all_gradients_is_refused(options, device):
    model = network(torch.float32, device)
    opt = fusedopt.AdamW(model.parameters(), **options)
    with pytest.raises(ValueError, match=r"release_gradients: got .* before"):
        opt.release_gradients(model)
    backward(model, 0, device, torch.float32)
    assert all(p.grad is not None for p in model.parameters())


def test_options_that_need_all_gradients_are_refused_while_releasing(device):
    model = network(torch.float32, device)
    opt = fusedopt.AdamW(model.parameters())
    handle = opt.release_gradients(model)
    with pytest.raises(ValueError, match="total norm"):
        opt.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="nonfinite"):
        opt.nonfinite = "skip"
    assert opt.max_grad_norm is None and opt.nonfinite == "propagate"
    handle.remove()
    opt.max_grad_norm = 1.0


def test_released_twice_or_for_nothing(device):
    model, other = network(torch.float32, device), network(torch.float32, device)
    opt = fusedopt.AdamW(model.parameters())
    with pytest.raises(ValueError, match="no parameter of this optimizer"):
        opt.release_gradients(other)
    handle = opt.release_gradients(model)
    with pytest.raises(RuntimeError, match="already"):
        opt.release_gradients(model)
    handle.remove()
    opt.release_gradients(model)


def test_a_scaled_step_is_refused(device):
    model = network(torch.float32, device)
    opt = fusedopt.AdamW(model.parameters())
    opt.release_gradients(model)
    scaler = fusedopt.GradScaler(device.type)
    scaler.scale(model(normal((4, 33), device=device)).sum()).backward()
    with pytest.raises(RuntimeError, match="unscaled loss"):
        scaler.step(opt)


def test_a_bad_gradient_leaves_the_parameter_alone(device):
    """The error comes out of backward(); state and parameter are as they were."""
    embedding = torch.nn.Embedding(5, 3, sparse=True, device=device)
    opt = fusedopt.AdamW(embedding.parameters())
    opt.release_gradients(embedding)
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="dense gradient"):
        embedding(torch.tensor([1, 2], device=device)).sum().backward()
    assert_same_bits(embedding.weight.detach(), before)
    assert not opt.state


@pytest.mark.parametrize("accumulates", [False, True])
def test_optimizer_is_freed(accumulates, device):
    """Hooks of parameters are out of the sight of Python's collector: what they hold would never be freed."""
    model = network(torch.float32, device)
    opt = fusedopt.AdamW(model.parameters())
    accumulator = fusedopt.GradAccumulator(opt, hooks=True) if accumulates else None
    opt.release_gradients(model)
    for seed in range(2):
        backward(model, seed, device, torch.float32)
        opt.step()
    gone = [weakref.ref(each) for each in (opt, accumulator) if each is not None]
    del opt, accumulator
    gc.collect()
    assert [each() for each in gone] == [None] * len(gone)
    backward(model, 2, device, torch.float32)
    assert all(p.grad is not None for p in model.parameters())


def test_a_released_parameter_that_was_taken_out_of_its_group(device):
    model = network(torch.float32, device)
    opt = fusedopt.AdamW(model.parameters())
    opt.release_gradients()
    opt.param_groups[0]["params"].pop()
    with pytest.raises(ValueError, match=r"in no param group any more, expected one of this optimizer's; remove\(\)"):
        backward(model, 0, device, torch.float32)


def test_removing_twice_is_removing_once(device):
    param = torch.nn.Parameter(torch.ones(3, device=device))
    opt = fusedopt.AdamW([param])
    first = opt.release_gradients()
    first.remove()
    second = opt.release_gradients()
    first.remove()
    assert second.active and not first.active and opt._release is second
