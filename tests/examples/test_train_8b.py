"""The 8B example on its tiny model; the shape that it has on a GPU, without the memory; its tokenizer."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fusedopt

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_8b_one_gpu.py"
LLAMA_3_8B_PARAMETERS = 8_030_261_248


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    import train_8b_one_gpu

    return train_8b_one_gpu


@pytest.fixture
def llama(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    import _llama

    return _llama


@pytest.mark.parametrize("release", [False, True], ids=["clipped", "released"])
def test_trains_and_reports(release, device, tmp_path):
    path = tmp_path / "out" / "train_8b.json"
    environment = {**os.environ, "PYTHONPATH": str(Path(fusedopt.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLE, "--size=tiny", f"--device={device}", f"--json={path}"]
    command += ["--release-gradients"] if release else []
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "The loss falls" in run.stdout and "master weights" in run.stdout

    report = json.loads(path.read_text())
    losses, roles, numel = report["losses"], report["bytes_by_role"], report["parameters"]
    assert len(losses) == report["settings"]["steps"]
    assert len(report["grad_norms"]) == (0 if release else len(losses))
    assert losses[0] == pytest.approx(math.log(report["settings"]["shape"]["vocabulary"]), abs=0.1)
    assert max(losses[-3:]) < losses[0] - 1
    assert report["loss_falls"]
    assert all(0 < norm < 100 for norm in report["grad_norms"])
    assert 0 < report["tail_ms"] < report["step_ms"]
    assert (roles["param"], roles.get("grad", 0), roles["master"]) == (2 * numel, 0 if release else 2 * numel, numel)
    assert 2 * numel < roles["states"] < 2.2 * numel  # norms are too small for 8 bits
    assert report["torch_needs_bytes"]["float32"] == {"param": 4 * numel, "grad": 4 * numel, "states": 8 * numel}
    if device.type == "cuda":
        assert sum(roles.values()) < report["peak"]["later_steps"]
        assert report["activation_bytes"] > 0
    else:
        assert report["peak"] is None and report["activation_bytes"] is None


def test_a_loss_that_does_not_fall_is_reported(example):
    outcome = example.Outcome([3.0, 2.0, math.nan, 4.0], [1.0] * 4, 2.0, 1.0, 1.0, {"param": 2}, 1, None)
    assert not outcome.falls
    settings = example.SIZES["tiny"]
    training = example.Training(settings, torch.zeros(100, dtype=torch.int32), torch.device("cpu"))
    console = Console(file=io.StringIO(), record=True)
    example.print_report(training, outcome, 1.0, console)
    assert "DOES NOT FALL" in console.export_text()


def test_memory_table_of_eight_billion(example):
    """As a GPU would report it: what the roles leave of the peak are activations."""
    numel = LLAMA_3_8B_PARAMETERS
    roles = {"param": 2 * numel, "grad": 2 * numel, "master": numel, "states": 2 * numel, "scales": numel // 32}
    peak = example.Peak(first_step=63 * 10**9, later_steps=61 * 10**9)
    outcome = example.Outcome([2.0, 1.0], [1.0] * 2, 2.0, 1.0, 1.0, roles, numel, peak)
    assert outcome.activations == peak.later_steps - sum(roles.values())
    console = Console(file=io.StringIO(), record=True, width=120)
    console.print(example.memory_table(outcome))
    table = console.export_text()
    assert "128.48" in table  # torch, 16 bytes a parameter
    assert f"{outcome.activations / 1e9:.2f}" in table


def test_shape_is_that_of_llama_3_8b(llama):
    with torch.device("meta"):
        model = llama.Llama(llama.LLAMA_3_8B)
    assert sum(p.numel() for p in model.parameters()) == LLAMA_3_8B_PARAMETERS


def test_recomputing_and_chunks_do_not_change_the_gradients(llama, monkeypatch):
    """Against the loss taken at once from activations that are kept."""
    model = llama.Llama.create(llama.TINY, torch.device("cpu"), torch.float32, seed=0)
    windows = torch.randint(llama.TINY.vocabulary, (2, 33))

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters()]

    monkeypatch.setattr(llama, "LOSS_CHUNK", 24)  # 64 tokens: the last chunk is shorter
    chunked_loss, chunked = gradients(model.loss(windows))
    monkeypatch.setattr(llama, "LOSS_CHUNK", 64)
    monkeypatch.setattr(llama, "recomputed", lambda function, *inputs: function(*inputs))
    whole_loss, whole = gradients(model.loss(windows))
    assert chunked_loss == pytest.approx(whole_loss, rel=1e-6)
    for ours, theirs in zip(chunked, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_later_tokens_do_not_reach_earlier_ones(llama):
    """Causal: a changed last token leaves the losses of the tokens before it alone."""
    model = llama.Llama.create(llama.TINY, torch.device("cpu"), torch.float32, seed=0)
    windows = torch.randint(llama.TINY.vocabulary, (1, 17))
    changed = windows.clone()
    changed[0, -2] = (changed[0, -2] + 1) % llama.TINY.vocabulary  # the last input
    first, second = (model.loss(each[:, :-2]).item() for each in (windows, changed))
    assert first == second
    assert model.loss(windows[:, :-1]).item() != model.loss(changed[:, :-1]).item()


def test_rotation_depends_on_distance_alone(llama):
    rotation = llama.rotations(8, 16, torch.device("cpu"))
    q, k = torch.randn(16), torch.randn(16)
    rotated_q, rotated_k = (llama.rotate(x.expand(1, 1, 8, 16), rotation)[0, 0] for x in (q, k))
    scores = rotated_q @ rotated_k.T
    torch.testing.assert_close(scores[3, 1], scores[7, 5])
    torch.testing.assert_close(scores[0, 0], q @ k)


@pytest.mark.parametrize("vocabulary", [260, 300, 2048])
def test_tokenizer_is_lossless(llama, vocabulary):
    text = "def f(x):\n    return x + 1  # größer\n".encode() * 50
    tokenizer = llama.Tokenizer(text, vocabulary)
    for each in (text, b"unseen \xff\x00 words, in bytes", b""):
        tokens = tokenizer.encode(each)
        assert tokenizer.decode(tokens) == each
        assert all(0 <= token < vocabulary for token in tokens.tolist())
    assert len(tokenizer.encode(text)) < len(text)
