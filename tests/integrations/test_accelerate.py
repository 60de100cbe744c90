"""The real Accelerate: clipping in the step, accumulation, scalers, skipped steps, bad input."""

import logging
import warnings

import pytest
import torch
from models import (
    EXTRA,
    NextByte,
    assert_close,
    our_adamw,
    refuse_clipping,
    reset_accelerate,
    state_of,
    torch_adamw,
    windows,
)

import fusedopt
from fusedopt.integrations import unwrap

accelerate = pytest.importorskip("accelerate", reason=EXTRA)

from fusedopt.integrations.accelerate import Accelerator, FusedAcceleratedOptimizer, fuse  # noqa: E402

BATCHES, BATCH = 8, 4
OVERFLOWS = {2, 5}


def make(cls, device, scaled=False, **kwargs):
    """An accelerator; with a scaler on the CPU too, where Accelerate itself makes none."""
    reset_accelerate()
    on_cpu = device.type == "cpu"
    accelerator = cls(cpu=on_cpu, mixed_precision="fp16" if scaled else "no", **kwargs)
    if scaled and on_cpu:
        assert accelerator.scaler is None
        scaler = fusedopt.GradScaler if cls is Accelerator else torch.amp.GradScaler
        accelerator.scaler, accelerator.native_amp = scaler("cpu"), True
    return accelerator


def train(accelerator, build, device, clip=None, overflows=(), scheduled=True, dtype=torch.float64):
    """The loop of Accelerate's documentation. Returns parameters, learning rates, skips and norms."""
    model = NextByte().to(device, dtype)
    opt = build(model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    model, opt, schedule = accelerator.prepare(model, opt, schedule)
    rates, skips, norms = [], [], []
    for i, batch in enumerate(windows(BATCHES * BATCH).to(device).split(BATCH)):
        with accelerator.accumulate(model):
            loss = model(batch)
            accelerator.backward(loss * float("inf") if i in overflows else loss)
            if accelerator.sync_gradients and clip is not None:
                norms.append(clip(accelerator, model))
            opt.step()
            schedule.step()
            opt.zero_grad()
        if accelerator.sync_gradients:
            rates.append(opt.param_groups[0]["lr"])
            skips.append(accelerator.optimizer_step_was_skipped)
    return state_of(model), rates, skips, [norm.item() for norm in norms if norm is not None]


def clip_norm(bound, norm_type=2):
    return lambda accelerator, model: accelerator.clip_grad_norm_(model.parameters(), bound, norm_type)


def clip_value(accelerator, model):
    accelerator.clip_grad_value_(model.parameters(), 0.01)


def clip_value_then_norm(accelerator, model):
    clip_value(accelerator, model)
    return accelerator.clip_grad_norm_(model.parameters(), 0.05)


CLIPS = {
    "none": None,
    "norm": clip_norm(0.1),
    "norm 1": clip_norm(0.1, 1),
    "norm inf": clip_norm(0.1, float("inf")),
    "norm alone": clip_norm(float("inf")),
    "value": clip_value,
    "value, norm": clip_value_then_norm,
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_clipping_is_the_steps(clip, accumulated, device, monkeypatch):
    kwargs = {"gradient_accumulation_steps": accumulated}
    theirs = train(make(accelerate.Accelerator, device, **kwargs), torch_adamw, device, CLIPS[clip])
    refuse_clipping(monkeypatch)
    ours = train(make(Accelerator, device, **kwargs), our_adamw, device, CLIPS[clip])
    assert_close(ours[0], theirs[0])
    assert ours[1:3] == theirs[1:3]
    assert ours[3] == pytest.approx(theirs[3], rel=1e-6)  # ours is float32
    assert len(ours[1]) == BATCHES // accumulated and bool(ours[3]) == ("norm" in clip)


@pytest.mark.parametrize("clip", [None, "norm", "value"])
@pytest.mark.parametrize("accelerator_class", [Accelerator, accelerate.Accelerator], ids=["ours", "plain"])
def test_overflow_is_skipped_and_told(accelerator_class, clip, device):
    """In Accelerate's own class too, which watches whether the scaler calls the step."""
    theirs = train(make(accelerate.Accelerator, device, True), torch_adamw, device, CLIPS[clip or "none"], OVERFLOWS)
    bound = {} if clip else {"max_grad_norm": 1e6}
    accelerator = make(accelerator_class, device, True)
    ours = train(accelerator, lambda params: our_adamw(params, **bound), device, CLIPS[clip or "none"], OVERFLOWS)
    assert_close(ours[0], theirs[0])
    assert ours[1:3] == theirs[1:3]
    assert [i for i, skipped in enumerate(ours[2]) if skipped] == sorted(OVERFLOWS)
    assert accelerator.scaler.get_scale() == 65536.0 / 4
    if accelerator_class is Accelerator:
        assert type(accelerator.scaler) is fusedopt.GradScaler


def test_steps_that_the_optimizer_skips_itself_are_told(device):
    accelerator = make(Accelerator, device)
    result = train(accelerator, lambda params: our_adamw(params, nonfinite="skip"), device, None, OVERFLOWS)
    assert [i for i, skipped in enumerate(result[2]) if skipped] == sorted(OVERFLOWS)
    assert result[1][1] == result[1][2] != result[1][3]  # the schedule waits


def test_norms_are_of_their_own_step(device):
    accelerator = make(Accelerator, device)
    model = NextByte().to(device)
    model, opt = accelerator.prepare(model, our_adamw(model.parameters()))
    norms = []
    for batch in windows(2 * BATCH).to(device).split(BATCH):
        accelerator.backward(model(batch))
        norms.append(accelerator.clip_grad_norm_(model.parameters(), 1.0))
        assert norms[-1].isnan()
        opt.step()
        assert norms[-1] == opt.optimizer.grad_norm == unwrap(opt).grad_norm
        opt.zero_grad()
    assert norms[0] != norms[1]
    opt.step()  # without a clip
    assert opt.optimizer.max_grad_norm is None


def test_value_after_norm_is_done_at_once(device):
    """The step would clamp before it takes the norm."""

    def clip(accelerator, model):
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.05)
        clip_value(accelerator, model)
        return norm

    theirs = train(make(accelerate.Accelerator, device), torch_adamw, device, clip)
    ours = train(make(Accelerator, device), our_adamw, device, clip)
    assert_close(ours[0], theirs[0])
    assert ours[3] == pytest.approx(theirs[3], rel=1e-6)


@pytest.mark.parametrize(("own", "asked"), [(0.05, 0.1), (0.1, 0.05)])
def test_two_bounds_are_one_clip_said_once(own, asked, device, monkeypatch):
    expected = train(make(Accelerator, device), our_adamw, device, clip_norm(0.05))
    refuse_clipping(monkeypatch)
    with pytest.warns(UserWarning, match=f"clips to {asked}, and the optimizer has max_grad_norm={own}") as caught:
        both = train(
            make(Accelerator, device), lambda params: our_adamw(params, max_grad_norm=own), device, clip_norm(asked)
        )
    assert len(caught) == 1
    assert_close(both[0], expected[0], atol=0)


def test_bounds_are_the_optimizers_own_again(device):
    """A trainer's bound holds for a step; what the user sets in between counts."""
    accelerator = make(Accelerator, device)
    model = NextByte().to(device)
    model, opt = accelerator.prepare(model, our_adamw(model.parameters()))
    own = opt.optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for clipped in (True, False, True):
            accelerator.backward(model(windows(BATCH).to(device)))
            if clipped:
                clip_value_then_norm(accelerator, model)
            opt.step()
            assert (own.max_grad_norm, own.max_grad_value) == ((0.05, 0.01) if clipped else (None, None))
        own.max_grad_norm = 2.0
        opt.step()
        assert own.max_grad_norm == 2.0


@pytest.mark.parametrize("optimized", ["trained", "all"])
def test_frozen_parameters(optimized, device, monkeypatch):
    """Where the optimizer has them and where it does not."""

    def build(make_optimizer):
        def built(params):
            params = list(params)
            params[0].requires_grad_(False)
            return make_optimizer(params if optimized == "all" else params[1:])

        return built

    theirs = train(make(accelerate.Accelerator, device), build(torch_adamw), device, CLIPS["norm"])
    refuse_clipping(monkeypatch)
    ours = train(make(Accelerator, device), build(our_adamw), device, CLIPS["norm"])
    assert_close(ours[0], theirs[0])


def test_parameters_that_the_optimizer_lacks_are_in_the_norm(device):
    def build(make_optimizer):
        return lambda params: make_optimizer(list(params)[1:])

    theirs = train(make(accelerate.Accelerator, device), build(torch_adamw), device, CLIPS["norm"])
    ours = train(make(Accelerator, device), build(our_adamw), device, CLIPS["norm"])
    assert_close(ours[0], theirs[0])


def test_two_optimizers_are_clipped_by_accelerate(device, caplog):
    def run(cls, build):
        accelerator = make(cls, device)
        model = NextByte().to(device, torch.float64)
        first, second = build(list(model.parameters())[:2]), build(list(model.parameters())[2:])
        model, first, second = accelerator.prepare(model, first, second)
        for batch in windows(2 * BATCH).to(device).split(BATCH):
            accelerator.backward(model(batch))
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            for opt in (first, second):
                opt.step()
                opt.zero_grad()
        return state_of(model)

    theirs = run(accelerate.Accelerator, torch_adamw)
    with caplog.at_level(logging.WARNING, "fusedopt.integrations.accelerate"):
        assert_close(run(Accelerator, our_adamw), theirs)
    assert [record.getMessage() for record in caplog.records] == [
        "Accelerate clips, not the step of the optimizer: the parameters that require a gradient are not those of one "
        "fusedopt optimizer"
    ]


def test_other_optimizers_are_accelerates(device):
    theirs = train(make(accelerate.Accelerator, device, True), torch_adamw, device, CLIPS["norm"], OVERFLOWS)
    ours = train(make(Accelerator, device, True), torch_adamw, device, CLIPS["norm"], OVERFLOWS)
    assert_close(ours[0], theirs[0], atol=0)
    assert ours[1:3] == theirs[1:3]
    assert ours[3] == pytest.approx(theirs[3], rel=0, nan_ok=True)


def test_saved_state_goes_on_bit_for_bit(device, tmp_path):
    def start():
        accelerator = make(Accelerator, device)
        model = NextByte().to(device)
        return accelerator, *accelerator.prepare(model, our_adamw(model.parameters()))

    def step(accelerator, model, opt, seed):
        accelerator.backward(model(windows(BATCH, seed).to(device)))
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()
        opt.zero_grad()

    accelerator, model, opt = start()
    step(accelerator, model, opt, 0)
    accelerator.save_state(tmp_path)
    step(accelerator, model, opt, 1)
    expected = state_of(model)
    accelerator, model, opt = start()
    accelerator.load_state(tmp_path)
    step(accelerator, model, opt, 1)
    assert_close(state_of(model), expected, atol=0)


# ---- bad input --------------------------------------------------------------------------------------------------


def test_optimizer_prepared_twice(device):
    accelerator = make(Accelerator, device)
    opt = our_adamw(NextByte().parameters())
    prepared = accelerator.prepare(opt)
    assert type(prepared) is FusedAcceleratedOptimizer and accelerator.prepare(prepared) is prepared
    with pytest.raises(ValueError, match=r"Accelerator\.prepare: got an AdamW that was prepared before"):
        accelerator.prepare(opt)
    assert len(accelerator._optimizers) == 1


def test_other_norm_than_the_optimizers(device):
    accelerator = make(Accelerator, device)
    with pytest.raises(ValueError, match=r"norm of type 1 for an AdamW with max_grad_norm=0\.5 and norm_type=2"):
        train(accelerator, lambda params: our_adamw(params, max_grad_norm=0.5), device, clip_norm(0.1, 1))


def test_fuse(device):
    accelerator = make(accelerate.Accelerator, device)
    assert fuse(accelerator) is accelerator and fuse(accelerator) is accelerator and type(accelerator) is Accelerator
    accelerator = make(accelerate.Accelerator, device)
    accelerator.prepare(our_adamw(NextByte().parameters()))
    with pytest.raises(ValueError, match="got an Accelerator with 1 prepared optimizers, expected none"):
        fuse(accelerator)
    with pytest.raises(TypeError, match=r"got a Other, expected an accelerate\.Accelerator itself"):
        fuse(make(type("Other", (accelerate.Accelerator,), {}), device))


def test_scaler_keeps_its_settings():
    given = torch.amp.GradScaler("cpu", 1024.0, 3.0, 0.25, 7)
    accelerator = make(accelerate.Accelerator, torch.device("cpu"))
    accelerator.scaler = given
    scaler = fuse(accelerator).scaler
    assert type(scaler) is fusedopt.GradScaler
    settings = ("get_scale", "get_growth_factor", "get_backoff_factor", "get_growth_interval")
    assert [getattr(scaler, name)() for name in settings] == [1024.0, 3.0, 0.25, 7]
