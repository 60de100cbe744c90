"""Variants of the kernels: what the command takes, and that each is compiled from what it says."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import torch
from click.testing import CliRunner

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not installed with the package

from benchmarks.variants import Variant, VariantRunner, main, parsed
from fusedopt.backends import cuda, nvrtc
from fusedopt.bench.runner import QUICK
from fusedopt.bench.suites import make_case

BLOCKS = "FUSEDOPT_UPDATE_BLOCKS(tuning, smallest, largest, extra, rooted)"


def test_settings():
    assert Variant.parse(f"3 blocks:{BLOCKS}=3; FUSEDOPT_ACCUMULATE_ELEMENTS=8") == Variant(
        "3 blocks", {BLOCKS: "3", "FUSEDOPT_ACCUMULATE_ELEMENTS": "8"}
    )
    source = nvrtc.source_dir()
    assert Variant.parse(f"before:source={source}") == Variant("before", source=source)


@pytest.mark.parametrize(
    "text, message",
    [
        ("before", "NAME:SETTING"),
        (":source=csrc", "NAME:SETTING"),
        ("a:FUSEDOPT_ACCUMULATE_ELEMENTS", "NAME:SETTING"),
        ("a:FUSEDOPT_UNHEARD_OF=3", "does not ask for"),
        ("a:FUSEDOPT_UPDATE=3", "does not ask for"),
        ("a:source=.", "no cuda/tuning.cuh"),
    ],
)
def test_bad_settings(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(click.BadParameter, match=message):
        Variant.parse(text)


@pytest.mark.parametrize("names", [("a", "a"), ("fusedopt",)])
def test_names_tell_rows_apart(names):
    with pytest.raises(click.BadParameter, match="each once"):
        parsed(tuple(f"{name}:FUSEDOPT_ACCUMULATE_ELEMENTS=8" for name in names))


@pytest.mark.parametrize("names", [("adamw", "fp32", "step"), ("none", "bf16", "accumulate")])
def test_every_turn_is_of_its_variant(names, tmp_path, monkeypatch):
    """Also those behind the first step: a new plan chooses kernels anew. A stand-in for the GPU holds the kernels."""
    shutil.copytree(nvrtc.source_dir(), tmp_path / "before")
    device = SimpleNamespace(functions={"chosen": 1})
    monkeypatch.setattr(cuda, "_device", lambda index: device)
    variants = [Variant.parse(f"2 blocks:{BLOCKS}=2"), Variant.parse(f"before:source={tmp_path / 'before'}")]
    seen, plain = {}, (nvrtc.source_dir(), {})

    class Recorder(VariantRunner):
        def _turn(self, stage, entry, case, model):
            def recorded(*arguments):
                assert not device.functions  # nobody else's
                seen.setdefault(entry.library, []).append((nvrtc.source_dir(), dict(nvrtc.DEFINES)))
                device.functions["chosen"] = 1
                stage(*arguments)

            return super()._turn(recorded, entry, case, model)

    runner = Recorder(torch.device("cpu"), replace(QUICK, rounds=1), variants)
    case = make_case("tiny", *names)
    rows = runner.run(case, runner.make_model(case))
    assert [row["error"] for row in rows] == [None] * 3
    assert seen == {
        "fusedopt": [plain] * 2,
        "2 blocks": [(plain[0], {BLOCKS: "2"})] * 2,
        "before": [(tmp_path / "before", {})] * 2,
    }
    assert (nvrtc.source_dir(), nvrtc.DEFINES) == plain and not device.functions


@pytest.mark.gpu
def test_each_is_compiled_from_what_it_says(tmp_path):
    """Sources that do not compile cost their own row."""
    for name in ("same", "broken"):
        shutil.copytree(nvrtc.source_dir(), tmp_path / name)
    (tmp_path / "broken" / "cuda" / "engine.cuh").write_text("#error broken\n")
    path = tmp_path / "variants.json"
    variants = [f"2 blocks:{BLOCKS}=2", *(f"{name}:source={tmp_path / name}" for name in ("same", "broken"))]
    arguments = ["--quick", "--workload", "tiny", "--format", "bf16", "--json", str(path), *variants]
    result = CliRunner().invoke(main, arguments)
    rows = {row["library"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["fusedopt-cuda", "2 blocks", "same", "broken"] and result.exit_code == 1
    assert "broken" in rows.pop("broken")["error"]
    for row in rows.values():
        assert not row["error"] and row["gpu_ms"] > 0 and row["launches"] == 1
