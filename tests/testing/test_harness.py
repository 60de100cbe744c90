"""The harness: wrong optimizers are found, right ones are not; samples, filters, and what is recorded."""

import contextlib
import json
import multiprocessing
import threading
from types import SimpleNamespace

import pytest
import torch
from wrong_optimizers import (
    RIGHT,
    WRONG,
    CountsInTheGroup,
    CountsInTheGroupsTensor,
    Dies,
    HalfPrecisionMoment,
    make_adamw,
    make_groups_alone,
    make_nothing,
)

import fusedopt
from fusedopt import reference, testing
from fusedopt.testing import cases, harness, parallel, tensors
from fusedopt.testing.bounds import Bounded
from fusedopt.testing.trials import FusedTrial

FOREIGN = [getattr(torch.optim, name) for name in ("AdamW", "Adam", "SGD", "RMSprop", "Adagrad")]


def rule_of(cls):
    return ("lion",) if "Lion" in cls.__name__ else ("adamw",)


@pytest.mark.parametrize("cls", WRONG)
def test_every_planted_defect_is_found(cls):
    run = testing.verify(cls, rule=rule_of(cls), quick=True, dtype=("float32",))
    assert run.failed
    assert any(r.failed_elements for r in run.failed), run.failed[0].error


@pytest.mark.parametrize("cls", RIGHT)
def test_the_same_optimizers_without_a_defect_pass(cls):
    run = testing.verify(cls, rule=rule_of(cls), quick=True)
    assert run.judged and not run.failed, run.failed[0].error


@pytest.mark.parametrize("cls", FOREIGN)
def test_torch_is_within_the_bounds(cls):
    run = testing.verify(cls, quick=True)
    assert {r.case.format.dtype for r in run.judged} == {torch.float32, torch.float64}
    assert {r.case.data.name for r in run.judged} >= {"zeros", "nan_last", "chunk_boundary", "late_counters"}
    assert not run.failed, run.failed[0].error


def test_radam_of_torch_is_within_the_bounds_but_for_infinities():
    """Its `lerp_` makes NaN of an infinite moment and an infinite gradient, where the average of both is infinite."""
    run = testing.verify(torch.optim.RAdam, quick=True)
    assert len(run.judged) > 20
    assert all(r.case.data.name.startswith("inf_") and "got nan" in r.error for r in run.failed)


def test_a_sample_of_ours(device):
    """Each data set and each transform once, with formats; all of the sample: `fusedopt verify --quick`."""
    chosen = cases.own_backends(str(device))[:1]
    forms = ("float32-None_states", "bfloat16-split16-int8_states")
    plan = harness.plan(device=str(device), backend=chosen, rule=("adamw-decay",), format=forms, quick=True)
    run = testing.verify(planned=plan)
    assert not run.failed, run.failed[0].error
    assert {r.case.data.name for r in run.judged} == {d.name for d in testing.DATA if not d.heavy}
    assert {r.case.transform for r in run.judged} == set(testing.TRANSFORMS)
    assert run.skipped == plan.total - len(run.results) > 0


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_time_limit_leaves_cases_unreached(jobs):
    plan = harness.plan(rule=("sgd",), format=("float32-None_states",), quick=True)
    run = testing.verify(planned=plan, time_limit=0, jobs=jobs)
    assert len(run.results) == 1 and run.unreached == len(plan.cases) - 1 > 0 and not run.failed


@pytest.mark.parametrize("make", [fusedopt.AdamW, make_adamw])
def test_a_class_and_a_factory(make):
    run = testing.verify(make, rule=("adamw",), case=("mixed", "intermittent"), dtype=("float32",))
    assert run.judged and not run.failed


def test_the_quick_sample_has_every_rule_format_transform_and_data_set():
    full = cases.full_cases("cpu", ["cpu", "reference"])
    quick = cases.quick_cases(full)
    assert len({case.name for case in full}) == len(full) > 10 * len(quick)
    for backend in ("cpu", "reference"):
        for part in (lambda c: c.variant.rule, lambda c: c.format, lambda c: c.transform, lambda c: c.data.name):
            all_of = [c for c in full if c.backend == backend and not c.data.heavy]
            assert {part(c) for c in quick if c.backend == backend} == {part(c) for c in all_of}
    assert {case.variant.rule for case in full} == reference.RULES.keys()
    assert cases.quick_cases(full) == quick


def test_other_backends_than_the_best_get_a_sample_unless_they_are_named():
    choice = {"rule": ("sgd",), "dtype": ("float32",)}
    both, named = harness.plan(**choice), harness.plan(backend=("cpu", "reference"), **choice)
    counts = [sum(c.backend == "reference" for c in plan.cases) for plan in (both, named)]
    assert 0 < counts[0] < counts[1] == sum(c.backend == "cpu" for c in both.cases)
    assert both.total >= named.total


def test_the_worst_element_is_where_it_is_said_to_be():
    class Off(torch.optim.SGD):
        def step(self):
            super().step()
            with torch.no_grad():
                self.param_groups[0]["params"][1].view(-1)[5] += 1e-3

    run = testing.verify(Off, rule=("sgd",), case=("float32/none/zeros",))
    (result, *_) = run.failed
    assert result.worst.endswith("parameter 1, element 5")
    assert result.failed_elements == 3 and result.elements == 3 * (257 + 64 + 1031)
    assert result.worst_ulp > result.bound_ulp and result.largest_ulp >= result.worst_ulp
    assert result.error.startswith("step 1, parameter 1, element 5: ") and "expected" in result.error


def test_an_optimizer_that_raises_is_a_failure_not_an_error():
    class Raises(torch.optim.SGD):
        def step(self):
            raise OverflowError("no")

    run = testing.verify(Raises, rule=("sgd",), case=("zeros",), dtype=("float32",))
    assert run.failed and all(r.error == "OverflowError: no" for r in run.failed)


def test_processes_that_share_cases_find_the_same():
    """And one that dies is one failed case: the others run in another process."""
    choice = {"rule": ("sgd",), "dtype": ("float32",), "case": ("/none/zeros", "/none/nan_last", "/none/tiny")}
    alone = testing.verify(torch.optim.SGD, **choice)
    run = testing.verify(Dies, jobs=2, **choice)
    assert [r.case for r in run.results] == [r.case for r in alone.results]
    for result, expected in zip(run.results, alone.results, strict=True):
        if result.case.data.name == "nan_last":
            assert result.error == "the process that ran it ended with exit code 3"
        else:
            assert testing.report.row_of(result) == testing.report.row_of(expected)


@pytest.mark.slow  # starts half a dozen processes
def test_processes_that_all_die_are_an_error():
    choice = {"rule": ("sgd",), "dtype": ("float32",), "case": ("nan_first", "nan_middle")}
    with pytest.raises(RuntimeError, match="processes ended, one after the other, and no case passed"):
        testing.verify(Dies, jobs=2, **choice)


def test_processes_cannot_be_given_a_closure():
    with pytest.raises(ValueError, match="cannot be given to other processes"):
        testing.verify(lambda params, **_: torch.optim.SGD(params), rule=("sgd",), case=("zeros",), jobs=2)


def test_json_and_page(tmp_path):
    pytest.importorskip("matplotlib")
    from fusedopt.testing import page

    run = testing.verify(HalfPrecisionMoment, rule=("adamw",), case=("huge", "inf_first"))
    testing.write_json(tmp_path / "r.json", run)
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["environment"]["torch"] == torch.__version__ and record["summary"]["failed"] == len(run.failed) > 0
    assert len(record["rows"]) == len(run.results)
    keys = "rule format backend device dtype grad_dtype transform case elements worst_ulp bound_ulp passed worst error"
    assert set(keys.split()) <= record["rows"][0].keys()
    assert sum(record["histogram"]["elements"]) == sum(r.elements for r in run.judged)
    page.write_html(tmp_path / "r.html", run)
    text = (tmp_path / "r.html").read_text()
    assert text.count("data:image/png;base64") == 2 and "failed" in text and "http" not in text
    assert "| adamw |" in testing.markdown(run)


@pytest.mark.parametrize("cls", [CountsInTheGroup, CountsInTheGroupsTensor])
def test_step_counters_of_param_groups_are_set(cls):
    """At 2^24 bias corrections are 1: a counter that stayed behind would show."""
    run = testing.verify(cls, rule=("adamw",), case=("/none/late_counters", "/none/mixed"))
    assert len(run.judged) > 2 and not run.failed, run.failed[0].error


def test_bounds_are_those_of_one_rounding():
    exact = Bounded.exact(torch.tensor([1.0, 1.0]), torch.float32)
    assert not testing.compare(torch.tensor([1.0, 1.0]), exact).wrong.any()
    wrong = testing.compare(torch.tensor([1.0, 1 + 2**-22]), exact).wrong
    assert wrong.tolist() == [False, True]


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"optimizer": "torch.optim"}, "expected package.module:class"),
        ({"optimizer": "no_such_module:X"}, "no_such_module cannot be imported"),
        ({"optimizer": "torch.optim:NoSuch"}, "torch.optim has no 'NoSuch'"),
        ({"optimizer": "wrong_optimizers:NOT_CALLABLE"}, "is a int, expected an optimizer class"),
        ({"optimizer": "wrong_optimizers:make_nothing"}, "such as --rule adamw"),
        ({"optimizer": make_nothing, "rule": ("adamw",)}, "cannot be built"),
        ({"optimizer": object, "rule": ("adamw",)}, "cannot be built"),
        (
            {"optimizer": make_groups_alone, "rule": ("adamw",)},
            "made a SimpleNamespace, expected a torch.optim",
        ),
        ({"optimizer": make_adamw, "rule": ("adamz",)}, "rule: got 'adamz', expected one of"),
        ({"optimizer": make_adamw, "rule": ("adamw",), "dtype": ("int8",)}, "dtype: got 'int8'"),
        ({"rule": ("adamz",)}, "rule: got 'adamz', which none of"),
        ({"case": ("zeroes",)}, "case: got 'zeroes', which none of"),
        ({"backend": ("cuda",)}, "backend: got 'cuda', expected one of cpu"),
        ({"dtype": ("float64",), "format": ("float32-None_states",)}, "which none of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(choice, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        harness.plan(**choice)


# ---- what makes a run on a GPU long --------------------------------------------------------------------------------


@pytest.mark.parametrize(("transform", "transfers"), [("none", 5), ("clip", 6), ("accumulate", 10)])
def test_transfers_of_a_step(transform, transfers, monkeypatch):
    """Gradients to the device; all there is back from it before and after the step; and the norm, or what is summed.
    Two more are of what is on the CPU by then."""
    case = next(c for c in cases.full_cases("cpu", ["cpu"]) if c.transform == transform and c.variant.rule == "adamw")
    trial, made = FusedTrial(case), []
    trial.step(0)
    monkeypatch.setattr(tensors, "_storages_on", lambda some, wanted: made.append(len(some)) or {})
    trial.step(1)
    assert len(made) == transfers


def test_pieces_hold_every_case_once_and_what_compiles_alike_together():
    every = cases.full_cases("cpu", ["cpu", "reference"])
    pieces = parallel._in_turn(list(parallel._pieces(every, parallel.PIECE)), every)
    assert sorted(i for piece in pieces for i in piece) == list(range(len(every)))
    assert max(map(len, pieces)) <= parallel.PIECE
    first = [every[i] for piece in pieces[:40] for i in piece]
    assert {case.backend for case in first} == {"cpu", "reference"}
    assert sum(case.data.heavy for case in first) == sum(case.data.heavy for case in every)
    places = {
        (every[i].backend, every[i].variant.rule, str(every[i].format)): n for n, p in enumerate(pieces) for i in p
    }
    assert places["cpu", "adam", "bfloat16-fp32-None_states"] == places["cpu", "adam", "bfloat16-fp32-fp32_states"]


# ---- processes, in threads ------------------------------------------------------------------------------------------


class Thread(threading.Thread):
    """What a process is to those who start it; it ends as one does, with its end of the pipe."""

    exitcode = 0

    def __init__(self, target, args, daemon):
        super().__init__(target=self.work, args=(target, *args), daemon=daemon)

    def work(self, target, connection, *arguments):
        with connection.other, contextlib.suppress(EOFError, ConnectionError):  # of a parent that has given up
            target(connection, *arguments)

    def terminate(self):
        pass


@pytest.fixture
def in_threads(monkeypatch):
    """In place of processes: those who start them close their end of the other's, which a thread needs."""

    def pipe():
        own, other = multiprocessing.Pipe()
        return own, SimpleNamespace(close=lambda: None, recv=other.recv, send=other.send, other=other)

    context = SimpleNamespace(Pipe=pipe, Process=Thread)
    monkeypatch.setattr(parallel.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(parallel.torch, "set_num_threads", lambda count: None)


class SpoilsTheDevice(torch.optim.SGD):
    """Fails as a kernel does that leaves the GPU's context unusable, where a gradient is NaN."""

    broken = False

    def step(self):
        if any(p.grad is not None and p.grad.isnan().any() for group in self.param_groups for p in group["params"]):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        super().step()


def test_a_case_that_spoils_the_device_ends_its_process(in_threads):
    """It fails; those behind it run in another process."""
    choice = {"rule": ("sgd",), "dtype": ("float32",), "case": ("/none/zeros", "/none/nan_first", "/none/tiny")}
    run = testing.verify(SpoilsTheDevice, jobs=2, **choice)
    assert {r.case.data.name for r in run.failed} == {"nan_first"}
    assert all("illegal memory access" in r.error for r in run.failed)
    assert len(run.judged) > 2 * len(run.failed) and run.unreached == 0


def test_processes_that_end_without_a_case_that_passed(in_threads):
    choice = {"rule": ("sgd",), "dtype": ("float32",), "case": ("nan_first", "nan_middle", "nan_last")}
    with pytest.raises(RuntimeError, match=r"processes ended, one after the other, and no case passed.*illegal memory"):
        testing.verify(SpoilsTheDevice, jobs=2, **choice)


def test_a_process_that_never_began(in_threads, monkeypatch):
    monkeypatch.setattr(parallel, "_work", lambda connection, factory, threads: None)
    with pytest.raises(RuntimeError, match="a process ended with exit code 0 before its first case"):
        testing.verify(torch.optim.SGD, rule=("sgd",), case=("zeros",), jobs=2)


def test_no_cases_are_no_processes():
    assert list(parallel.run_in_processes([], None, 2)) == []


# ---- small parts ----------------------------------------------------------------------------------------------------


def test_a_page_without_failures_with_rules_of_different_formats(tmp_path):
    """Empty fields of the plots stay empty."""
    pytest.importorskip("matplotlib")
    from fusedopt.testing import page

    choice = {"case": ("mixed",), "transform": ("none",), "backend": ("cpu",)}
    plans = [
        harness.plan(rule=("sgd",), format=("float32-None_states",), **choice),
        harness.plan(rule=("lion",), format=("bfloat16-split16-None_states",), **choice),
    ]
    run = testing.verify(planned=plans[0])
    run.results += testing.verify(planned=plans[1]).results
    page.write_html(tmp_path / "r.html", run)
    text = (tmp_path / "r.html").read_text()
    assert "Failures" not in text and "passed" in text and "lion" in text and "sgd" in text


def test_cases_that_were_left_out_are_in_no_table():
    rows = [{"rule": "sgd", "format": "float32-None_states", "largest_ulp": 1.5, "passed": True, "left_out": None}]
    rows.append({**rows[0], "format": "float64-None_states", "left_out": "it means nothing"})
    assert testing.report.format_table(rows)[2:] == ["| sgd | default | 1: 1.50 |"]


def test_states_in_16_bits_are_rounded_once_more():
    choice = {"rule": ("sgd_momentum",), "dtype": ("bfloat16",), "case": ("/none/zeros", "/none/mixed")}
    run = testing.verify(fusedopt.SGD, **choice)
    assert run.judged and not run.failed, run.failed[0].error


def test_different_bits_are_told_with_their_place():
    a = torch.tensor([1.0, 0.0, 3.0])
    testing.tensors.assert_same_bits(a, a.clone())
    with pytest.raises(AssertionError, match=r"tensor 1: 1 of 3 elements differ, first at 1: -0.0 != 0.0"):
        testing.tensors.assert_same_bits([a, torch.tensor([1.0, -0.0, 3.0])], [a, a])


def test_storages_that_are_shared_stay_so():
    """One copy of each, all of it, whatever looks at it."""
    whole = torch.arange(10.0)
    copies = tensors._storages_on([whole[2:4], whole[5:], torch.ones(3, dtype=torch.float64)], torch.device("cpu"))
    (first, second) = copies.values()
    assert (first.nbytes(), second.nbytes()) == (40, 24) and first.data_ptr() != whole.data_ptr()
    assert torch.equal(torch.empty(0).set_(first), whole)
