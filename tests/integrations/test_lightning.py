"""The real Lightning: Trainer and Fabric, clipping in the step, precision plugins, checkpoints, wrappers."""

import warnings

import pytest
import torch
from models import EXTRA, NextByte, assert_close, our_adamw, refuse_clipping, state_of, torch_adamw, windows

import fusedopt
from fusedopt.integrations import unwrap

lightning = pytest.importorskip("lightning", reason=EXTRA)

from lightning.fabric.plugins import MixedPrecision as FabricMixedPrecision  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from fusedopt.integrations.lightning import FusedClipping  # noqa: E402

STEPS, BATCH, ACCUMULATED = 6, 2, 2
OVERFLOWS = {0, 3}  # the first step too


class Model(lightning.LightningModule):
    """Makes its optimizer with ``build``; the loss of some steps overflows."""

    def __init__(self, build, overflows=()):
        super().__init__()
        self.inner, self.build, self.overflows = NextByte(), build, overflows
        self.losses, self.rates = [], []

    def configure_optimizers(self):
        opt = self.build(self.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch, index):
        loss = self.inner(batch)
        self.losses.append(loss.item())
        return loss * float("inf") if index in self.overflows else loss


class Fused(FusedClipping, Model):
    pass


def data():
    return torch.utils.data.DataLoader(windows(STEPS * BATCH * ACCUMULATED), batch_size=BATCH)


def fit(model, device, folder, checkpoint=None, **options):
    settings = {
        "accelerator": "gpu" if device.type == "cuda" else "cpu",
        "devices": 1,
        "max_steps": STEPS,
        "precision": "64-true",
        "accumulate_grad_batches": ACCUMULATED,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    if "plugins" in options:
        settings.pop("precision")
    trainer = lightning.Trainer(**{**settings, **options})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=r".*litlogger.*|.*isinstance\(treespec.*")
        trainer.fit(model, data(), ckpt_path=checkpoint)
    return trainer


CLIPS = {
    "norm": {"gradient_clip_val": 0.1},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "none": {},
}


@pytest.mark.parametrize("clip", CLIPS)
def test_gradient_clip_val_is_the_steps(clip, device, tmp_path, monkeypatch):
    theirs = Model(torch_adamw)
    fit(theirs, device, tmp_path, **CLIPS[clip])
    refuse_clipping(monkeypatch)
    ours = Fused(our_adamw)
    trainer = fit(ours, device, tmp_path, **CLIPS[clip])
    assert_close(state_of(ours), state_of(theirs))
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-6) and trainer.global_step == STEPS
    assert trainer.optimizers[0].last_step.clip_coef < 1 or clip != "norm"


def test_bound_of_the_optimizer(device, tmp_path):
    """Without ``gradient_clip_val`` nothing of ours but the optimizer is needed."""
    theirs, ours = Model(torch_adamw), Model(lambda params: our_adamw(params, max_grad_norm=0.1))
    fit(theirs, device, tmp_path, **CLIPS["norm"])
    fit(ours, device, tmp_path)
    assert_close(state_of(ours), state_of(theirs))


@pytest.mark.parametrize("clip", CLIPS)
def test_bf16_mixed(clip, device, tmp_path, monkeypatch):
    """Where Lightning refuses to clip for an optimizer that unscales."""
    theirs = Model(torch_adamw)
    fit(theirs, device, tmp_path, precision="bf16-mixed", **CLIPS[clip])
    refuse_clipping(monkeypatch)
    ours = Fused(lambda params: our_adamw(params, fused=True))
    fit(ours, device, tmp_path, precision="bf16-mixed", **CLIPS[clip])
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-3)


@pytest.mark.parametrize("scaler", [fusedopt.GradScaler, torch.amp.GradScaler], ids=["ours", "torch"])
@pytest.mark.parametrize("clip", CLIPS)
def test_16_mixed(clip, scaler, device, tmp_path, monkeypatch):
    def plugins(cls):
        return {"plugins": [MixedPrecision("16-mixed", device.type, scaler=cls(device.type))]}

    theirs = Model(torch_adamw, OVERFLOWS)
    expected = fit(theirs, device, tmp_path, **plugins(torch.amp.GradScaler), **CLIPS[clip])
    refuse_clipping(monkeypatch)
    ours = Fused(our_adamw, OVERFLOWS)
    trainer = fit(ours, device, tmp_path, **plugins(scaler), **CLIPS[clip])
    scale = trainer.precision_plugin.scaler.get_scale()
    assert scale == expected.precision_plugin.scaler.get_scale() == 65536.0 / 4
    assert ours.losses == pytest.approx(theirs.losses, abs=2e-4)
    if scaler is fusedopt.GradScaler:
        assert trainer.optimizers[0].last_step.skipped_steps == len(OVERFLOWS)


def test_both_clip_once_and_say_so_once(device, tmp_path, monkeypatch):
    expected = Fused(our_adamw)
    fit(expected, device, tmp_path, **CLIPS["norm"])
    refuse_clipping(monkeypatch)
    both = Fused(lambda params: our_adamw(params, max_grad_norm=0.2))
    with pytest.warns(UserWarning, match=r"clips to 0\.1, and the optimizer has max_grad_norm=0\.2") as caught:
        fit(both, device, tmp_path, **CLIPS["norm"])
    assert len([each for each in caught if "clipped once" in str(each.message)]) == 1
    assert_close(state_of(both), state_of(expected), atol=0)


def test_other_optimizers_are_lightnings(device, tmp_path):
    theirs, ours = Model(torch_adamw), Fused(torch_adamw)
    for model in (theirs, ours):
        fit(model, device, tmp_path, **CLIPS["norm"])
    assert_close(state_of(ours), state_of(theirs), atol=0)


def test_resumed_training_has_the_bits_of_one_that_went_on(device, tmp_path):
    options = CLIPS["norm"] | {"precision": "32-true", "limit_train_batches": 3 * ACCUMULATED, "max_steps": -1}
    whole, resumed = Fused(our_adamw), Fused(our_adamw)
    fit(whole, device, tmp_path, max_epochs=2, **options)
    fit(Fused(our_adamw), device, tmp_path, max_epochs=1, **options).save_checkpoint(tmp_path / "half.ckpt")
    trainer = fit(resumed, device, tmp_path, tmp_path / "half.ckpt", max_epochs=2, **options)
    assert trainer.global_step == STEPS and resumed.losses == whole.losses[3 * ACCUMULATED :]
    assert_close(state_of(resumed), state_of(whole), atol=0)


# ---- Fabric -----------------------------------------------------------------------------------------------------


def fabric_loop(device, build, clip=None, overflows=(), **options):
    fabric = lightning.Fabric(accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, **options)
    model = NextByte()
    model, opt = fabric.setup(model, build(model.parameters()))
    losses = []
    for i, batch in enumerate(fabric.to_device(windows(STEPS * BATCH)).split(BATCH)):
        loss = model(batch)
        fabric.backward(loss * float("inf") if i in overflows else loss)
        if clip is not None:
            fabric.clip_gradients(model, opt, max_norm=clip)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return state_of(model), losses, opt


def test_fabric(device):
    theirs, _, _ = fabric_loop(device, torch_adamw, 0.1, precision="64-true")
    ours, _, opt = fabric_loop(device, lambda params: our_adamw(params, max_grad_norm=0.1), precision="64-true")
    assert_close(ours, theirs)
    assert opt.grad_norm == unwrap(opt).grad_norm > 0.1  # results can be read through the wrapper
    assert opt.last_step == unwrap(opt).last_step and opt.last_step.step == STEPS
    assert opt.metrics() == opt.last_step or device.type == "cuda"  # where they come later


def test_fabric_scaler(device):
    def plugins(scaler):
        return {"plugins": [FabricMixedPrecision("16-mixed", device.type, scaler=scaler)]}

    _, theirs, _ = fabric_loop(device, torch_adamw, None, OVERFLOWS, **plugins(torch.amp.GradScaler(device.type)))
    scaler = fusedopt.GradScaler(device.type)
    build = lambda params: our_adamw(params, max_grad_norm=1e6)  # noqa: E731
    _, ours, opt = fabric_loop(device, build, None, OVERFLOWS, **plugins(scaler))
    assert ours == pytest.approx(theirs, abs=2e-4)
    assert scaler.get_scale() == 65536.0 / 4 and opt.skipped_steps == 2


def test_wrappers_are_refused_where_they_would_take_what_is_the_optimizers(device):
    """Their class derives from ours: an attribute that is set on one would not reach the optimizer."""
    fabric = lightning.Fabric(accelerator="gpu" if device.type == "cuda" else "cpu", devices=1)
    model = NextByte()
    model, wrapper = fabric.setup(model, our_adamw(model.parameters()))
    scaler = fusedopt.GradScaler(device.type)
    scaler.scale(torch.ones((), device=device))

    def release():
        wrapper.release_gradients(model)

    for use in (
        *(lambda name=name: setattr(wrapper, name, None) for name in ("max_grad_norm", "backend", "norm_reduce")),
        lambda: setattr(wrapper, "nonfinite", "skip"),
        lambda: fusedopt.GradAccumulator(wrapper),
        lambda: scaler.step(wrapper),
        lambda: scaler.unscale_(wrapper),
        release,
    ):
        with pytest.raises(TypeError, match=r"got FabricAdamW, which wraps an optimizer, .* use its \.optimizer"):
            use()
    unwrap(wrapper).max_grad_norm = 0.5
    assert wrapper.max_grad_norm == 0.5
