"""Libraries that end the process: what is noted, who starts anew, where a run goes on, that it does after abort()"""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fusedopt.bench import journal, peers, runner
from fusedopt.bench.journal import DeviceLost, Journal, Turn, supervise
from fusedopt.bench.session import BenchRunner, measure, of_others, resolve_peers, resumed
from fusedopt.bench.suites import make_case
from fusedopt.bench.timing import synchronize

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SHORT = runner.Repeats(rounds=1, host_steps=1, traced_steps=0, span_steps=0, copy_bytes=1 << 20, copies=1, processes=1)
CASES = [make_case("tiny", "lion", "fp32", contract) for contract in ("step", "clip_step")]

ABORTING = """
import os, torch

class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, weight_decay, use_triton):
        super().__init__(params, {})

    def step(self):
        if self.param_groups[0]["params"][0].dtype == torch.bfloat16:
            raise NotImplementedError("no bf16")
        os.abort()
"""


def test_a_run_goes_on_after_abort(tmp_path):
    (tmp_path / "lion_pytorch.py").write_text(ABORTING)
    path = tmp_path / "bench.json"
    command = [sys.executable, "-m", "fusedopt", "bench", "--device", "cpu", "--quick", "--threads", "1"]
    command += ["--workload", "tiny", "--optimizer", "lion", "--format", "fp32", "--format", "bf16"]
    command += ["--contract", "step", "--against", "lion-pytorch", "--json", path, "--color", "never"]
    places = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, env=places, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    case = "tiny/lion/fp32/step"
    assert f"{case}: lion-pytorch: it ended the process: SIGABRT; going on without it there" in done.stderr
    assert "FAILED tiny lion fp32 step lion-pytorch: it ended the process: SIGABRT" in done.stdout
    result = json.loads(path.read_text())
    errors = {(row["format"], row["library"]): row["error"] for row in result["rows"]}
    assert errors == {
        ("fp32", "fusedopt-cpu"): None,
        ("fp32", "lion-pytorch"): "it ended the process: SIGABRT",
        ("bf16", "fusedopt-cpu"): None,
        ("bf16", "lion-pytorch"): "NotImplementedError: no bf16",
    }
    assert result["ended_the_process"] == [{"case": case, "library": "lion-pytorch", "how": "SIGABRT"}]
    assert result["command"].endswith(f"--json {path} --color never")  # as it was given
    assert not list(tmp_path.glob("*.running"))


def test_the_parent_neither_imports_libraries_nor_touches_the_device(monkeypatch):
    def touched(*_):
        raise AssertionError("the device was touched")

    monkeypatch.setattr("fusedopt.bench.contracts.torch_fuses", touched)
    monkeypatch.setitem(peers.MODULES, "lion-pytorch", ("antigravity",))  # which opens a browser
    monkeypatch.setitem(peers.MODULES, "optimi", ("no_such_module",))
    cases = [*CASES, make_case("tiny", "none", "bf16", "accumulate")]
    assert of_others(cases, CPU, resolve_peers(("lion-pytorch,optimi,torch",))) == ["lion-pytorch"]
    assert of_others(cases, CPU, resolve_peers(("torch",))) == []
    assert "antigravity" not in sys.modules


# ---- what is noted --------------------------------------------------------------------------------------------------


def test_an_entry_is_there_while_a_library_runs_and_stays_where_the_device_is_lost(tmp_path):
    own = Journal(tmp_path / "a.json")
    with own.running("case", "apex"):
        assert own.read() == Turn("case", "apex")
    assert own.read() is None
    with pytest.raises(KeyboardInterrupt), own.running("case", "apex"):
        raise KeyboardInterrupt
    assert own.read() is None
    with pytest.raises(DeviceLost), own.running("case", "apex"):
        raise DeviceLost("no kernel runs")
    assert own.read().error == "it ended the process: no kernel runs"
    own.path.write_text('{"case": ')
    assert own.read() is None
    assert Journal().read() is None


def test_a_library_that_has_ended_two_processes_is_not_run_any_more():
    own = Journal(ended=[Turn("a", "apex", "SIGSEGV")])
    assert own.why_not("a", "apex") == "it ended the process: SIGSEGV"
    assert own.why_not("b", "apex") is None and own.why_not("a", "optimi") is None
    own.ended.append(Turn("b", "apex"))
    assert own.why_not("c", "apex") == "not run: it ended the process in a, b"


# ---- going on -------------------------------------------------------------------------------------------------------


def run(cases, path, earlier=None):
    torch.set_num_threads(1)
    bench = BenchRunner(CPU, SHORT, ("torch-foreach",), ())
    return measure(bench, cases, math.inf, Console(file=io.StringIO()), "fusedopt bench", path, earlier)


def test_a_resumed_run_takes_over_rows_and_leaves_out_who_ended_it(tmp_path):
    path = tmp_path / "a.json"
    cases = [make_case("tiny", "sgd", "fp32", contract) for contract in ("step", "clip_step")]
    first = run(cases[:1], path)
    Journal(path).write(Turn(str(cases[1]), "torch-foreach", "SIGSEGV"))
    result = run(cases, path, resumed(path, CPU))
    times = [[row["wall_ms"] for row in one["rows"]] for one in (first, result)]
    assert times[1][:2] == times[0] and len(times[1]) == 4
    assert [row["error"] for row in result["rows"]] == [None, None, None, "it ended the process: SIGSEGV"]
    assert len(result["copy_gbps_start_end"]) == 4 and result["seconds"] > first["seconds"]
    assert json.loads(path.read_text()) == result and Journal(path).read() is None
    # of a case that somebody has ended in the middle of nothing counts
    Journal(path).write(Turn(str(cases[0]), "fusedopt-cpu", "SIGSEGV"))
    assert {row["contract"] for row in resumed(path, CPU)["rows"]} == {"clip_step"}


def test_an_older_result_is_not_gone_on_from_by_chance(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"rows": ["old"]}')
    run([], path)
    assert json.loads(path.read_text())["rows"] == []


def test_results_of_another_version_are_not_resumed(tmp_path):
    path = tmp_path / "a.json"
    run([], path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch": "1.0"}))
    with pytest.raises(ValueError, match=r"is of torch 1\.0, expected .*leave out --resume"):
        resumed(path, CPU)


def test_a_lost_device_is_noted(tmp_path, monkeypatch):
    """``torch.cuda.synchronize`` raises for ever after an illegal access."""

    def lost(device):
        raise RuntimeError("an illegal memory access")

    path = tmp_path / "a.json"
    bench = BenchRunner(CPU, SHORT, (), ())
    monkeypatch.setattr(bench, "build", lambda *_: 1 / 0)
    monkeypatch.setattr("fusedopt.bench.timing.synchronize", lost)
    bench.measure_copy = lambda: 1.0
    result = measure(bench, CASES, math.inf, Console(file=io.StringIO()), "fusedopt bench", path)
    monkeypatch.setattr("fusedopt.bench.timing.synchronize", synchronize)
    assert result["rows"][0]["error"].startswith("the device is lost since fusedopt-cpu raised ZeroDivisionError")
    assert result["left_out"] == [str(CASES[1])]
    assert Journal(path).read().case == str(CASES[0]) and resumed(path, CPU)["rows"] == []


# ---- who starts anew ------------------------------------------------------------------------------------------------


class Children:
    """In the place of Popen. endings: what each of the processes does when it is waited for."""

    def __init__(self, *endings):
        self.endings = list(endings)
        self.commands = []

    def __call__(self, command):
        self.commands.append(command[3:])
        return self

    def wait(self, timeout):
        return self.endings.pop(0)()


def killed(path, number=signal.SIGKILL, case="a"):
    def end():
        Journal(path).write(Turn(case, "apex"))
        return -number

    return end


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.json"


def start(monkeypatch, path, *endings, seconds=math.inf, resume=False):
    children = Children(*endings)
    monkeypatch.setattr(journal.subprocess, "Popen", children)
    return supervise(["bench"], path, time.monotonic() + seconds, resume), children.commands


def test_a_child_that_was_killed_is_followed_by_another_one(monkeypatch, path, capsys):
    def orderly():
        assert Journal(path).read() == Turn("a", "apex", "SIGKILL")
        Journal(path).clear()
        return 1

    code, commands = start(monkeypatch, path, killed(path), orderly)
    assert (code, commands) == (1, [["bench"], ["bench", "--resume"]])
    assert "a: apex: it ended the process: SIGKILL" in capsys.readouterr().err


HANGING = """#!{python}
import sys, time
if "--resume" not in sys.argv:
    open({entry!r}, "w").write('{{"case": "a", "library": "apex"}}')
    time.sleep(300)
"""


def test_a_child_that_hangs_in_a_turn_is_killed(monkeypatch, path, tmp_path, capsys):
    program = tmp_path / "program"
    program.write_text(HANGING.format(python=sys.executable, entry=str(Journal(path).path)))
    program.chmod(0o700)
    monkeypatch.setattr(journal.sys, "executable", str(program))
    monkeypatch.setattr(journal, "PATIENCE", 0.5)
    begin = time.monotonic()
    assert supervise(["bench"], path, math.inf, False) == 0
    assert time.monotonic() - begin < 60
    assert Journal(path).read() == Turn("a", "apex", "killed, since a turn took more than 0.5 s")
    assert "a: apex: it ended the process: killed, since" in capsys.readouterr().err


def test_nobody_is_killed_between_turns_or_within_patience(path):
    assert Journal(path).age() == Journal().age() == 0
    Journal(path).write(Turn("a", "apex"))
    assert 0 <= Journal(path).age() < journal.PATIENCE
    os.utime(Journal(path).path, (0, 0))
    assert Journal(path).age() > journal.PATIENCE


def test_children_have_what_is_left_of_the_time(monkeypatch, path):
    _, ((_, option, limit, _),) = start(monkeypatch, path, lambda: 0, seconds=5, resume=True)
    assert option == "--time-limit" and 4 < float(limit) <= 5
    _, (command,) = start(monkeypatch, path, lambda: 0, seconds=-5)
    assert command == ["bench", "--time-limit", "0.0"]


def test_an_end_outside_of_every_turn_is_the_end(monkeypatch, path, capsys):
    code, commands = start(monkeypatch, path, lambda: -signal.SIGSEGV)
    assert code == 1 and len(commands) == 1
    assert "ended (SIGSEGV) outside of every library's turn" in capsys.readouterr().err


def test_a_child_that_refuses_what_it_is_to_go_on_from_is_not_started_again(monkeypatch, path):
    killed(path)()
    code, commands = start(monkeypatch, path, lambda: 2, resume=True)
    assert (code, commands) == (2, [["bench", "--resume"]])


def test_an_interrupt_starts_nothing_anew_and_leaves_handlers_as_they_were(monkeypatch, path):
    def interrupted():
        os.kill(os.getpid(), signal.SIGINT)
        return killed(path, signal.SIGINT)()

    before = signal.getsignal(signal.SIGINT)
    code, commands = start(monkeypatch, path, interrupted)
    assert code == 1 and len(commands) == 1
    assert signal.getsignal(signal.SIGINT) is before
