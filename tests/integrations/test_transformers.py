"""The real Trainer of transformers: clipping in the step, what its documentation combines, logs, checkpoints."""

import math

import pytest
import torch
from models import (
    BETAS,
    CONTEXT,
    DRIFT,
    EXTRA,
    LR,
    WEIGHT_DECAY,
    assert_close,
    refuse_clipping,
    reset_accelerate,
    state_of,
    windows,
)

import fusedopt
from fusedopt.integrations import unwrap

transformers = pytest.importorskip("transformers", reason=EXTRA)
pytest.importorskip("accelerate", reason=EXTRA)

from fusedopt.integrations.transformers import FusedClipping, Trainer, optimizer_cls_and_kwargs  # noqa: E402

STEPS, BATCH, ACCUMULATED = 6, 2, 2
MAX_NORM, MAX_VALUE = 0.5, 0.02
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def model_of(dtype=torch.float64):
    """GPT-2 of two narrow layers over bytes, without dropout."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256,
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        **NO_DROPOUT,
    )
    return transformers.GPT2LMHeadModel(config).to(dtype)


def text():
    return [{"input_ids": window[1:], "labels": window[1:]} for window in windows(STEPS * BATCH * ACCUMULATED)]


def arguments(folder, device, **changes):
    settings = {
        "output_dir": str(folder),
        "use_cpu": device.type == "cpu",
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATED,
        "learning_rate": LR,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_NORM,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
    }
    args = transformers.TrainingArguments(**{**settings, **changes})
    if device.type == "cuda":
        args._n_gpu = 1  # where there are several, the Trainer would spread the batch over them
    return args


def train(cls, args, resume=None, dtype=torch.float64, **options):
    """Parameters and what was logged of each step."""
    trainer = cls(model_of(dtype), args, train_dataset=text(), **options)
    trainer.train(resume_from_checkpoint=resume)
    return state_of(trainer.model), [each for each in trainer.state.log_history if "grad_norm" in each], trainer


def fused(args, cls=fusedopt.AdamW, **options):
    return {"optimizer_cls_and_kwargs": optimizer_cls_and_kwargs(args, cls, **options)}


class ClipsValues(transformers.Trainer):
    """torch's value clipping before the Trainer's own."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        clip_norm = self.accelerator.clip_grad_norm_

        def clip(parameters, *bound):
            parameters = list(parameters)
            torch.nn.utils.clip_grad_value_(parameters, MAX_VALUE)
            return clip_norm(parameters, *bound)

        self.accelerator.clip_grad_norm_ = clip


def schedule_and_optimizer(args):
    """As ``optimizers=``: of the user's own making."""
    model = model_of()
    decayed = [param for param in model.parameters() if param.ndim >= 2]
    others = [param for param in model.parameters() if param.ndim < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    opt = fusedopt.AdamW(groups, lr=LR, betas=BETAS, max_grad_value=MAX_VALUE)
    return model, opt, transformers.get_cosine_schedule_with_warmup(opt, args.warmup_steps, STEPS)


@pytest.mark.parametrize("given", ["optimizers", "optimizer_cls_and_kwargs"])
def test_all_that_the_trainer_combines(given, device, tmp_path, monkeypatch):
    """Value and norm clipping, warmup and cosine, gradient checkpointing and accumulation, beside torch's AdamW."""
    combined = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "gradient_checkpointing": True}
    args = arguments(tmp_path, device, **combined)
    reference = arguments(tmp_path, device, optim="adamw_torch", **combined)
    theirs, their_logs, _ = train(ClipsValues, reference)
    refuse_clipping(monkeypatch)
    if given == "optimizers":
        model, opt, schedule = schedule_and_optimizer(args)
        trainer = Trainer(model, args, train_dataset=text(), optimizers=(opt, schedule))
        trainer.train()
        ours, logs = state_of(trainer.model), [each for each in trainer.state.log_history if "grad_norm" in each]
    else:
        ours, logs, trainer = train(Trainer, args, **fused(args, max_grad_value=MAX_VALUE))
    assert_close(ours, theirs)
    assert len(logs) == STEPS and trainer.model.transformer.gradient_checkpointing
    assert [each["learning_rate"] for each in logs] == [each["learning_rate"] for each in their_logs]
    for name, rel in (("grad_norm", 1e-6), ("loss", DRIFT)):  # our norm is float32
        assert [each[name] for each in logs] == pytest.approx([each[name] for each in their_logs], rel=rel)
    norms = [each["grad_norm"] for each in logs]
    assert max(norms) > MAX_NORM and unwrap(trainer.optimizer).last_step.clip_coef < 1
    assert trainer.state.log_history[-1]["train_loss"] < logs[0]["loss"]


def test_without_clipping_the_norm_is_logged_all_the_same(device, tmp_path, monkeypatch):
    args = arguments(tmp_path, device, max_grad_norm=0.0)
    theirs, their_logs, _ = train(transformers.Trainer, args)
    refuse_clipping(monkeypatch)
    ours, logs, _ = train(Trainer, args, **fused(args))
    assert_close(ours, theirs)
    assert [each["grad_norm"] for each in logs] == pytest.approx([each["grad_norm"] for each in their_logs], rel=1e-6)


def test_the_norm_is_read_for_the_log_alone(device, tmp_path, monkeypatch):
    """Between logs nothing but the loss, which the Trainer looks at itself, goes to the host."""
    read = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: read.append(self) or item(self))
    args = arguments(tmp_path, device, logging_steps=3, logging_nan_inf_filter=False)
    _, logs, _ = train(Trainer, args, **fused(args))
    assert len(logs) == STEPS // 3
    norms = {each["grad_norm"] for each in logs}
    assert sum(item(each) in norms for each in read) == len(norms)


def test_resumed_training_has_the_bits_of_one_that_went_on(device, tmp_path):
    args = arguments(tmp_path, device, save_strategy="steps", save_steps=3, lr_scheduler_type="cosine", warmup_steps=2)
    whole, logs, _ = train(Trainer, args, dtype=torch.float32, **fused(args))
    resumed, more, _ = train(Trainer, args, str(tmp_path / "checkpoint-3"), torch.float32, **fused(args))
    assert_close(resumed, whole, atol=0)
    assert [each["grad_norm"] for each in more] == [each["grad_norm"] for each in logs]


def test_checkpoint_of_torchs_adamw_goes_on_here(device, tmp_path):
    args = arguments(tmp_path, device, save_strategy="steps", save_steps=3, optim="adamw_torch")
    whole, _, _ = train(transformers.Trainer, args)
    resumed, _, _ = train(Trainer, args, str(tmp_path / "checkpoint-3"), **fused(args))
    assert_close(resumed, whole)


def test_bf16(device, tmp_path, monkeypatch):
    """Autocast, float32 parameters. Rounding of activations drowns that of the step: see test_small_examples."""
    args = arguments(tmp_path, device, bf16=True)
    _, theirs, _ = train(transformers.Trainer, args, dtype=torch.float32)
    refuse_clipping(monkeypatch)
    _, ours, _ = train(Trainer, args, dtype=torch.float32, **fused(args))
    assert ours[0]["grad_norm"] == pytest.approx(theirs[0]["grad_norm"], rel=1e-5)
    assert [each["loss"] for each in ours] == pytest.approx([each["loss"] for each in theirs], abs=1e-3)


def scaled(cls, scaler_class, device):
    """A Trainer with a scale that is far too large, on the CPU too, where Accelerate makes no scaler."""

    class Scaled(cls):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = scaler_class(device.type, init_scale=2.0**24)
            self.accelerator.native_amp, self.accelerator.state._mixed_precision = True, "fp16"

    return Scaled


def test_fp16(device, tmp_path, monkeypatch):
    """The first steps overflow: they are skipped, and the schedule waits for them.

    With torch's fused AdamW it does not: Accelerate takes every step that is called for one that was not skipped.
    """
    settings = {"fp16": device.type == "cuda", "lr_scheduler_type": "cosine", "max_steps": 12}
    args = arguments(tmp_path, device, **settings)
    plain = scaled(transformers.Trainer, torch.amp.GradScaler, device)
    _, theirs, reference = train(
        plain, arguments(tmp_path, device, optim="adamw_torch", **settings), dtype=torch.float32
    )
    refuse_clipping(monkeypatch)
    reset_accelerate()
    _, ours, trainer = train(scaled(Trainer, fusedopt.GradScaler, device), args, dtype=torch.float32, **fused(args))
    scales = [each.accelerator.scaler.get_scale() for each in (trainer, reference)]
    assert scales[0] == scales[1] < 2.0**24
    rates = [each["learning_rate"] for each in ours]
    assert rates == [each["learning_rate"] for each in theirs] and rates[0] == rates[1] > rates[-1]
    assert [each["loss"] for each in ours] == pytest.approx([each["loss"] for each in theirs], abs=2e-4)
    finite = [i for i, each in enumerate(theirs) if math.isfinite(each["grad_norm"])]
    assert 0 < len(finite) < len(ours)
    assert [ours[i]["grad_norm"] for i in finite] == pytest.approx([theirs[i]["grad_norm"] for i in finite], rel=1e-3)


@pytest.mark.gpu
def test_fp16_takes_our_scaler(tmp_path):
    args = arguments(tmp_path, torch.device("cuda"), fp16=True, max_steps=1)
    _, _, trainer = train(Trainer, args, dtype=torch.float32, **fused(args))
    assert type(trainer.accelerator.scaler) is fusedopt.GradScaler


def test_compiled_model(device, tmp_path, monkeypatch):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    args = arguments(tmp_path, device, **compiled)
    theirs, _, _ = train(transformers.Trainer, args)
    refuse_clipping(monkeypatch)
    ours, _, _ = train(Trainer, args, **fused(args))
    assert_close({name: ours[name] for name in sorted(ours)}, {name: theirs[name] for name in sorted(theirs)})


def test_both_clip_once_and_say_so_once(device, tmp_path, monkeypatch):
    args = arguments(tmp_path, device)
    expected, _, _ = train(Trainer, args, **fused(args))
    refuse_clipping(monkeypatch)
    args = arguments(tmp_path, device, max_grad_norm=2 * MAX_NORM)
    with pytest.warns(UserWarning, match=r"the trainer clips to 1, and the optimizer has max_grad_norm=0\.5") as caught:
        both, _, _ = train(Trainer, args, **fused(args, max_grad_norm=MAX_NORM))
    assert len([each for each in caught if "clipped once" in str(each.message)]) == 1
    assert_close(both, expected, atol=0)


def test_trained_twice(device, tmp_path):
    """The Trainer prepares its optimizer in each ``train``."""
    args = arguments(tmp_path, device, max_steps=1)
    trainer = Trainer(model_of(), args, train_dataset=text(), **fused(args))
    for _ in range(2):
        trainer.train()
    assert len(trainer.accelerator._optimizers) == 1 and trainer.optimizer.state


def test_mixin(device, tmp_path):
    class Derived(transformers.Trainer):
        pass

    class Own(FusedClipping, Derived):
        pass

    trainer = Own(model_of(), arguments(tmp_path, device), train_dataset=text())
    assert type(trainer.accelerator).__module__ == "fusedopt.integrations.accelerate"


def test_optimizer_cls_and_kwargs(device, tmp_path):
    args = arguments(tmp_path, device)
    adamw = {"lr": LR, "betas": BETAS, "eps": 1e-8}
    assert optimizer_cls_and_kwargs(args, fusedopt.AdamW) == (fusedopt.AdamW, adamw)
    assert optimizer_cls_and_kwargs(args, fusedopt.Lion) == (fusedopt.Lion, {"lr": LR})
    _, kwargs = optimizer_cls_and_kwargs(args, fusedopt.LAMB, eps=1e-6, state_dtype="int8")
    assert kwargs == adamw | {"eps": 1e-6, "state_dtype": "int8"}


def test_formats(device, tmp_path, monkeypatch):
    """bfloat16 parameters with masters and 8-bit states."""
    refuse_clipping(monkeypatch)
    args = arguments(tmp_path, device)
    options = {"master_weights": "split8", "state_dtype": "int8", "min_8bit_size": 0, "seed": 0}
    _, logs, trainer = train(Trainer, args, dtype=torch.bfloat16, **fused(args, **options))
    assert all(math.isfinite(each["loss"]) for each in logs) and logs[-1]["loss"] < logs[0]["loss"]
    state = unwrap(trainer.optimizer).state[next(iter(trainer.model.parameters()))]
    assert state["param_remainder"].dtype == torch.int8 == state["exp_avg"].dtype
