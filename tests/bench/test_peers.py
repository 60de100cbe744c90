"""Steps of other libraries: what is read of their states, beside the float64 reference; stand-ins take their place."""

import sys

import pytest
import torch
from stand_ins import modules

from fusedopt.bench import graphs, peers
from fusedopt.bench.checks import check
from fusedopt.bench.contracts import Case
from fusedopt.bench.workloads import WORKLOADS, Model, Workload

CPU = torch.device("cpu")
KINDS = [(library, kind) for library, (_, kinds) in peers.STEPS.items() for kind in kinds]
SCALED = list(peers.SCALED)


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    """All of them are there."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(WORKLOADS, "two", Workload("two", ((40, 30), (600,))))
    peers.why_missing.cache_clear()
    yield
    peers.why_missing.cache_clear()


def case_of(kind: str, contract: str) -> Case:
    optimizer, format_ = kind.split("/")
    return Case("two", optimizer, format_, contract)


def spoil(tail, model):
    """A step that leaves the largest parameter's elements a little beside what they should be."""

    def run():
        tail.run()
        with torch.no_grad():
            model.params[0].add_(0.01)

    return run


@pytest.mark.parametrize("contract", ["step", "clip_step"])
@pytest.mark.parametrize(("library", "kind"), KINDS, ids=map("-".join, KINDS))
def test_what_is_read_of_a_library_is_what_it_keeps(library, kind, contract):
    case = case_of(kind, contract)
    model = Model(WORKLOADS["two"], case.layout.dtype, CPU)
    tail = peers.build(library, case, model.params)
    assert tail.read(model.params[0], slice(0, 5)).states == {}  # before the first step
    assert check(case, tail, model) <= 1
    assert tail.clips_in_place == (contract == "clip_step")


@pytest.mark.parametrize(("library", "kind"), SCALED, ids=map("-".join, SCALED))
def test_apex_under_a_scaler(library, kind):
    case = case_of(kind, "scaler_clip_step")
    model = Model(WORKLOADS["two"], case.layout.dtype, CPU)
    tail = peers.build(library, case, model.params)
    assert check(case, tail, model) <= 1 and tail.clips_in_place


def test_a_step_that_is_wrong_is_noticed():
    case = case_of("adamw/fp32", "step")
    model = Model(WORKLOADS["two"], torch.float32, CPU)
    tail = peers.build("optimi", case, model.params)
    wrong = type(tail)(tail.optimizer, spoil(tail, model), tail.read)
    with pytest.raises(AssertionError, match="rounding explains"):
        check(case, wrong, model)


def test_libraries_are_offered_for_what_they_do():
    offered = {kind: set(peers.offered(case_of(kind, "step"), CPU)) for _, kind in KINDS}
    assert offered["adamw/fp32"] == {"deepspeed", "bitsandbytes", "optimi"}  # apex's is for GPUs
    assert "apex" in peers.offered(case_of("adamw/fp32", "scaler_clip_step"), torch.device("cuda"))
    assert peers.offered(case_of("adamw/fp32", "scaler_clip_step"), CPU) == []
    assert peers.installed(case_of("lion/bf16", "step"), CPU) == ["optimi", "lion-pytorch"]


def test_versions_are_named_where_a_library_says_them():
    cases = [case_of("adamw/fp32", "step")]
    assert peers.versions(cases, CPU) == {"deepspeed": "1.2", "bitsandbytes": "unknown", "optimi": "unknown"}
    assert peers.versions(cases, CPU, ("deepspeed",)) == {"deepspeed": "1.2"}


# ---- steps that are recorded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("contract", ["step", "clip_step"])
def test_a_compiled_step_is_torchs(contract, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda run: compiled.append(run) or run)  # what it makes of it is torch's
    case = case_of("adamw/fp32", contract)
    model = Model(WORKLOADS["two"], torch.float32, CPU)
    tail = graphs.build("torch-compiled", case, model.params)
    assert compiled == [tail.run] and check(case, tail, model) <= 1
    assert tail.optimizer.defaults["foreach"]


def test_graphs_are_offered_on_gpus_alone():
    case = case_of("adamw/fp32", "clip_step")
    assert graphs.offered(case, CPU) == ["torch-compiled"]
    assert graphs.offered(case_of("adamw/fp32", "scaler_clip_step"), CPU) == []
    assert "torch-captured" not in graphs.offered(case_of("lion/fp32", "step"), torch.device("cuda"))


@pytest.mark.parametrize(("library", "ours"), [("fusedopt-captured", True), ("torch-captured", False)])
def test_what_is_captured(library, ours, monkeypatch):
    """A step of torch's that can be captured, or ours; the capture itself needs a GPU."""
    monkeypatch.setattr(graphs, "_captured", lambda tail, params: tail)
    case = case_of("adamw/fp32", "step")
    model = Model(WORKLOADS["two"], torch.float32, CPU)
    if not ours:  # refuses to run capturable steps elsewhere
        tail = graphs.build(library, case, model.params)
        assert tail.optimizer.defaults["capturable"] and tail.optimizer.defaults["fused"]
        return
    assert check(case, graphs.build(library, case, model.params), model) <= 1
