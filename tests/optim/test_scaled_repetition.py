"""Repeated steps under a scaler: the bits of steps that take the long way, whatever the scaler hands over."""

import copy
import math
import random

import pytest
import torch
from cases import BY_NAME, ONE_EACH, assert_same_bits, memory, parameters, set_gradients, train
from scaler_cases import scaled_gradients, scalers

import fusedopt
from fusedopt import _C, passes

SIZES = [5, 0, 4097]


def long_way(opt):
    """The same optimizer without repetition: an observer makes every step take the long way."""
    opt.register_step_pre_hook(observe)
    return opt


def observe(*_):
    pass


@pytest.fixture
def long_steps(monkeypatch):
    """A list with an element for each step that took the long way."""
    taken, begin = [], passes.begin

    def counted(tables, scalars, names, *args, **kwargs):
        taken.extend([1] * ("update" in names))
        return begin(tables, scalars, names, *args, **kwargs)

    monkeypatch.setattr(passes, "begin", counted)
    return taken


def assert_long(taken, expected):
    """How many steps took the long way. Where torch's functions are not found, all do."""
    if _C.has_torch_functions():
        assert len(taken) == expected


# ---- whoever scales -------------------------------------------------------------------------------------------------


class Attributes:
    """A scaler by hand, as the loops that set ``grad_scale`` and ``found_inf`` themselves."""

    def __init__(self, device):
        self.tensor = torch.full((), 2.0**10, device=device)

    def scale(self, loss):
        return loss * self.tensor

    def get_scale(self):
        return self.tensor.item()

    def step(self, opt):
        opt.grad_scale = self.tensor
        opt.step()
        del opt.grad_scale

    def update(self):
        self.tensor = self.tensor * 2  # another tensor each time


def drivers(device):
    ours, torchs = scalers(device)
    return {"attributes": Attributes(device), "ours": ours, "torch's": torchs}


@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_, step"])
@pytest.mark.parametrize("driver", ["attributes", "ours", "torch's"])
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_scaled_steps_are_repeated(case, driver, unscale, device, long_steps):
    """Those that are skipped too. Only the first takes the long way."""
    if unscale and driver == "attributes":
        pytest.skip("has no unscale_")
    memories, options = [], {"nonfinite": "skip"} if driver == "attributes" else {}
    for make in (lambda opt: opt, long_way):
        params = parameters(SIZES, device=device)
        opt, scaler = make(case.make(params, max_grad_norm=0.5, **options)), drivers(device)[driver]
        long_steps.clear()
        for step in range(8):
            scaled_gradients(params, scaler, step, math.inf if step in (3, 6) else None)
            if unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
            assert opt.step_was_skipped.item() is (step in (3, 6))
            assert not {"grad_scale", "found_inf", "_nonfinite_found"} & opt.__dict__.keys()
            scaler.update()
        assert_long(long_steps, 8 if make is long_way else 1)
        memories.append([*memory(opt), opt.grad_norm, opt.skipped_steps])
    assert_same_bits(*memories)


def test_plain_steps_of_torchs_scaler_are_repeated(device, long_steps):
    """Where nobody asked for a fused step, torch's scaler divides the gradients, waits and calls an ordinary step."""
    params = parameters(SIZES, device=device)
    opt, (_, scaler) = fusedopt.AdamW(params), scalers(device)
    for step in range(5):
        scaled_gradients(params, scaler, step)
        scaler.step(opt)
        scaler.update()
    assert_long(long_steps, 1)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_on_other_backends(backend, device, long_steps):
    """Which read the scaler's addresses where the step table was packed."""
    if not fusedopt.backends()[backend].available:
        pytest.skip(fusedopt.backends()[backend].reason)
    memories = []
    for make in (lambda opt: opt, long_way):
        params = parameters([5, 33], device=device)
        opt, (scaler, _) = make(fusedopt.AdamW(params, backend=backend)), scalers(device)
        long_steps.clear()
        for step in range(5):
            scaled_gradients(params, scaler, step, math.nan if step == 2 else None)
            scaler.step(opt)
            assert opt.step_was_skipped.item() is (step == 2)
            scaler.update()
        assert_long(long_steps, 5 if make is long_way else 1)
        memories.append([*memory(opt), opt.grad_norm])
    assert_same_bits(*memories)


def test_two_optimizers_and_one_scaler(device, long_steps):
    states = []
    for make in (lambda opt: opt, long_way):
        params = [parameters(SIZES, device=device), parameters([33], device=device)]
        opts = [make(fusedopt.AdamW(params[0], max_grad_norm=0.5)), make(fusedopt.Lion(params[1]))]
        scaler, _ = scalers(device)
        long_steps.clear()
        scales = []
        for step in range(9):
            for i, (ps, opt) in enumerate(zip(params, opts, strict=True)):
                scaled_gradients(ps, scaler, 2 * step + i, math.nan if step in (2 + i, 6) else None)
                scaler.step(opt)
            scaler.update()
            scales.append(scaler.get_scale())
        assert_long(long_steps, 18 if make is long_way else 2)
        states.append((scales, memory(opts[0]) + memory(opts[1])))
    assert states[0][0] == states[1][0] and min(states[0][0]) < max(states[0][0])
    assert_same_bits(states[0][1], states[1][1])


# ---- what changes between steps -------------------------------------------------------------------------------------


GIVEN = {
    "nothing": lambda opt, device: {},
    "scale": lambda opt, device: {"grad_scale": torch.tensor(4.0, device=device)},
    "shaped scale": lambda opt, device: {"grad_scale": torch.tensor([[4.0]], device=device)},
    "part of a tensor": lambda opt, device: {"grad_scale": torch.tensor([1.0, 4.0, 1.0], device=device)[1]},
    "double scale": lambda opt, device: {"grad_scale": torch.tensor(4.0, dtype=torch.float64, device=device)},
    "half scale": lambda opt, device: {"grad_scale": torch.tensor(4.0, dtype=torch.float16, device=device)},
    "scale on the host": lambda opt, device: {"grad_scale": torch.tensor(4.0)},
    "number": lambda opt, device: {"grad_scale": 4.0},
    "a parameter": lambda opt, device: {"grad_scale": torch.nn.Parameter(torch.tensor(4.0, device=device))},
    "None": lambda opt, device: {"grad_scale": None, "found_inf": None},
    "nothing found": lambda opt, device: {"found_inf": torch.zeros((), device=device)},
    "found": lambda opt, device: {"found_inf": torch.full((), 2.0, device=device)},
    "found, by number": lambda opt, device: {"found_inf": 1},
    "both": lambda opt, device: {
        "grad_scale": torch.tensor(2.0, device=device),
        "found_inf": torch.zeros(1).to(device),
    },
}
REPEATED = {"nothing", "scale", "shaped scale", "part of a tensor", "None", "nothing found", "found", "both"}


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_given(name, device, long_steps):
    """After steps without a scaler, and before some: what cannot be read where it is takes the long way, once."""
    memories = []
    for make in (lambda opt: opt, long_way):
        params = parameters(SIZES, device=device)
        opt = make(fusedopt.AdamW(params, max_grad_norm=0.5))
        train(opt, params, 2)
        long_steps.clear()
        for step in range(2, 6):
            set_gradients(params, seed=step)
            given = GIVEN[name](opt, device) if step % 2 else {}
            opt.__dict__.update(given)
            opt.step()
            for key in given:
                delattr(opt, key)
        if make is not long_way:
            on_host = name == "scale on the host" and device.type == "cpu"
            assert_long(long_steps, 0 if name in REPEATED or on_host else 2)
        memories.append([*memory(opt), opt.skipped_steps])
    assert_same_bits(*memories)


def test_the_scale_tensor_changes_in_place(device, long_steps):
    """Its value, and its memory, even its dtype, behind the same object."""
    memories = []
    for make in (lambda opt: opt, long_way):
        params, scale = parameters(SIZES, device=device), torch.tensor(4.0, device=device)
        opt = make(fusedopt.AdamW(params, fused=True))
        changes = [
            lambda scale=scale: scale.fill_(2.0),
            lambda scale=scale: setattr(scale, "data", torch.tensor(8.0, device=device)),
            lambda scale=scale: setattr(scale, "data", scale.double()),
            lambda scale=scale: setattr(scale, "data", scale.float() / 2),
        ]
        for step, change in enumerate([int, int, *changes]):
            change()
            set_gradients(params, seed=step)
            opt.grad_scale = scale
            opt.step()
        memories.append(memory(opt))
    assert_same_bits(*memories)


@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_a_repeated_scale_is_forgotten(kwargs, device):
    """Plain, scaled, plain steps; the last take the long way, which asks whether its scalars are those of before."""
    params, expected_params = (parameters(SIZES, device=device) for _ in range(2))
    opt, expected = (fusedopt.AdamW(p, **kwargs) for p in (params, expected_params))
    for seed, scale in ((0, None), (1, None), (2, 4.0), (3, 4.0), (4, None)):
        if seed == 4:
            long_way(opt)
        for one, ps in ((opt, params), (expected, expected_params)):
            set_gradients(ps, seed=seed, scale=scale or 1.0 if one is opt else 1.0)
            if one is opt and scale:
                one.grad_scale = torch.tensor(scale, device=device)
            one.step()
            one.__dict__.pop("grad_scale", None)
    assert_same_bits(memory(opt), memory(expected))


def test_a_scaled_step_that_fails_leaves_plain_ones_right(device, monkeypatch):
    """The passes have been told of the scaler when the first scaled step fails, as where a kernel cannot be made."""
    params, expected_params = (parameters(SIZES, device=device) for _ in range(2))
    opt, expected = fusedopt.AdamW(params), long_way(fusedopt.AdamW(expected_params))
    scaler, _ = scalers(device)
    train(opt, params, 2), train(expected, expected_params, 2)
    opt._control().norm_found_inf.fill_(1.0)  # as a step that was skipped has left it
    scaled_gradients(params, scaler)
    backend = opt._plan.tables[0].backend
    with monkeypatch.context() as patch:
        patch.setattr(backend, "begin", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scaler.step(opt)
    train(opt, params, 2, first=2), train(expected, expected_params, 2, first=2)
    assert_same_bits(memory(opt), memory(expected))


def test_no_gradients_after_repeated_steps(device):
    """The scaler is told of nothing then, and says so, as torch's does."""
    params = parameters(SIZES, device=device)
    opt, (scaler, _) = fusedopt.AdamW(params, max_grad_norm=1.0), scalers(device)
    for step in range(3):
        scaled_gradients(params, scaler, step)
        scaler.step(opt)
        scaler.update()
    before = memory(opt)
    opt.zero_grad()
    scaler.step(opt)
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.update()
    assert_same_bits(memory(opt), before)


def test_release_refuses_a_scaler_after_repeated_steps(device, long_steps):
    params = parameters(SIZES, device=device)
    opt = fusedopt.AdamW(params)
    train(opt, params, 3)
    handle = opt.release_gradients()
    for given in ({"grad_scale": torch.ones((), device=device)}, {"found_inf": None}, {"_nonfinite_found": {}}):
        set_gradients(params)
        opt.__dict__.update(given)
        with pytest.raises(RuntimeError, match="release_gradients"):
            opt.step()
        for key in given:
            delattr(opt, key)
    handle.remove()
    long_steps.clear()
    opt.grad_scale = torch.ones((), device=device)
    opt.step()
    assert_long(long_steps, 0)


# ---- accumulated gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("hooks", [False, True], ids=["", "hooks"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_accumulated_steps_are_repeated(case, scaled, hooks, reduction, device, long_steps):
    """Of two micro-batches, then of three; only the first takes the long way."""
    memories = []
    for make in (lambda opt: opt, long_way):
        params = parameters(SIZES, device=device)
        opt, (scaler, _) = make(case.make(params, max_grad_norm=0.5)), scalers(device)
        accumulator = fusedopt.GradAccumulator(opt, reduction=reduction, hooks=hooks)
        long_steps.clear()
        for step in range(8):
            for last in [False] * (1 + step // 4) + [True]:
                bad = math.inf if scaled and step == 2 and last else None
                backward(params, accumulator, scaler if scaled else None, 10 * step + last, bad)
                if hooks or not last:
                    accumulator.accumulate()
            assert accumulator.holds
            scaler.step(opt) if scaled else opt.step()
            scaler.update() if scaled else None
            assert not accumulator.holds
            opt.zero_grad()
            assert opt.step_was_skipped.item() is (scaled and step == 2)
        assert_long(long_steps, 8 if make is long_way else 1)
        memories.append([*memory(opt), opt.grad_norm])
    assert_same_bits(*memories)


def backward(params, accumulator, scaler, seed, bad):
    """Gradients as a backward pass leaves them, of which an accumulator's hooks are told."""
    if scaler is None:
        set_gradients(params, seed=seed)
    else:
        scaled_gradients(params, scaler, seed, bad)
    for param in params if accumulator._hooks else ():
        accumulator._fold(param)


WEIGHTS = {
    "none": lambda step, device: (None, 1.0),
    "numbers": lambda step, device: (0.5 + step, 1.0),
    "own number": lambda step, device: (0.5 + step, 2.0),
    "tensors": lambda step, device: (torch.tensor(0.5 + step, device=device), torch.tensor(1.0, device=device)),
}


def test_accumulation_changes_between_steps(device, long_steps):
    """Weights, steps without gradients of their own, without a sum, without either, and scalers, in any order."""
    memories, rng = [], random.Random(1)
    plan = [(rng.choice(sorted(WEIGHTS)), rng.choice("so+ "), rng.random() < 0.3) for _ in range(40)]
    plan += [("none", kind, False) for a in "so+ " for b in "so+ " for kind in (a, a, b)]
    plan += [("numbers", "+", True)] * 3
    for make in (lambda opt: opt, long_way):
        params = parameters(SIZES, device=device)
        opt, (scaler, _) = make(fusedopt.AdamW(params, max_grad_norm=0.5)), scalers(device)
        accumulator, results = fusedopt.GradAccumulator(opt), []
        train(opt, params, 2)
        long_steps.clear()
        for step, (weights, kind, scaled) in enumerate(plan):
            earlier, own = WEIGHTS[weights](step, device)
            if kind in "s+":  # a sum of earlier micro-batches
                backward(params, accumulator, scaler if scaled else None, 2 * step, None)
                accumulator.accumulate(earlier)
            if kind in "o+":  # gradients of the step's own
                backward(params, accumulator, scaler if scaled else None, 2 * step + 1, None)
                accumulator.weight = own
            if scaled and kind != " ":
                scaler.step(opt)
                scaler.update()
            else:
                opt.step()
            opt.zero_grad()
            results += [*memory(opt), opt.grad_norm]
        memories.append((results, len(long_steps)))
    assert_same_bits(memories[0][0], memories[1][0])
    if _C.has_torch_functions():
        assert memories[0][1] < memories[1][1] - 4


def test_torchs_scaler_is_refused_beside_repeated_accumulation(device):
    params = parameters(SIZES, device=device)
    opt = fusedopt.AdamW(params, max_grad_norm=1.0)
    accumulator, (_, scaler) = fusedopt.GradAccumulator(opt), scalers(device)
    for step in range(3):
        set_gradients(params, seed=step)
        accumulator.accumulate()
        set_gradients(params, seed=10 + step)
        if step < 2:
            opt.step()
    scaler.scale(torch.zeros((), device=device))
    with pytest.raises(RuntimeError, match="GradAccumulator"):
        scaler.step(opt)


# ---- random histories -----------------------------------------------------------------------------------------------


def mixed_groups(device):
    """Param groups of several formats, hence several tables and launches."""
    return [
        {"params": parameters([5, 4097], device=device)},
        {"params": parameters([300], torch.bfloat16, device, seed=1), "master_weights": "split16", "seed": 3},
        {"params": parameters([5000], torch.bfloat16, device, seed=2), "state_dtype": "int8", "seed": 3},
    ]


class History:
    """Steps and changes drawn from a seed, the same whether steps are repeated or not."""

    def __init__(self, seed, device, observed):
        self.random, self.device, self.observed = random.Random(seed), device, observed
        self.opt = BY_NAME["adamw-decay"].make(mixed_groups(device))
        self.scaler, self.torchs = scalers(device)
        if observed:
            long_way(self.opt)

    @property
    def params(self):
        return [p for group in self.opt.param_groups for p in group["params"]]

    def gradients(self, step, scaler=None):
        bad = math.inf if self.random.random() < 0.2 else None
        if scaler is not None:
            scaled_gradients(self.params, scaler, step, bad)
        else:
            set_gradients(self.params, seed=step)
        if self.random.random() < 0.1:
            self.params[0].grad = None

    def plain(self, step):
        self.gradients(step)
        self.opt.step()

    def attributes(self, step):
        self.gradients(step)
        given = GIVEN[self.random.choice(sorted(GIVEN))](self.opt, self.device)
        self.opt.__dict__.update(given)
        self.opt.step()
        for key in given:
            delattr(self.opt, key)

    def scaled(self, step, unscale=False):
        scaler = self.random.choice([self.scaler, self.torchs])
        if scaler is self.torchs and self.device.type == "cuda":
            scaler = self.scaler  # torch's has no CUDA kernel for bfloat16 gradients
        self.gradients(step, scaler)
        if unscale and self.device.type != "cuda":
            scaler.unscale_(self.opt)
        scaler.step(self.opt)
        scaler.update()

    def unscaled(self, step):
        self.scaled(step, unscale=True)

    def change(self, step):
        opt = self.opt
        what = self.random.choice(["lr", "max_grad_norm", "no_norm", "nonfinite", "max_grad_value", "load", "copy"])
        if what == "lr":
            opt.param_groups[1]["lr"] = self.random.random()
        elif what == "max_grad_norm":
            opt.max_grad_norm = self.random.random()
        elif what == "no_norm":
            opt.max_grad_norm = None
        elif what == "nonfinite":
            opt.nonfinite = self.random.choice(["propagate", "skip"])
        elif what == "max_grad_value":
            opt.max_grad_value = self.random.choice([None, 0.5])
        elif what == "load":
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        else:
            self.opt = copy.deepcopy(opt)
            if self.observed and not self.opt._optimizer_step_pre_hooks:
                long_way(self.opt)

    def run(self, steps):
        kinds = [self.plain, self.attributes, self.scaled, self.unscaled, self.change]
        step = 0
        while step < steps:
            kind = self.random.choice(kinds)
            for _ in range(1 if kind == self.change else self.random.randint(1, 4)):
                kind(step)
                step += 1
                yield [*memory(self.opt), self.opt.grad_norm, self.opt.skipped_steps]


@pytest.mark.parametrize("seed", range(6))
def test_random_histories(seed, device, long_steps):
    """Scaled, unscaled and skipped steps of all kinds, changes, checkpoints and copies, in any order."""
    histories = [History(seed, device, observed) for observed in (False, True)]
    taken = [0, 0]
    runs = [history.run(40) for history in histories]
    for _ in range(40):
        results = []
        for i, run in enumerate(runs):
            long_steps.clear()
            results.append(next(run))
            taken[i] += len(long_steps)
        assert_same_bits(*results)
    assert histories[0].scaler.state_dict() == histories[1].scaler.state_dict()
    if _C.has_torch_functions():
        assert taken[0] < taken[1]
