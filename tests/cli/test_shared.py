"""What all commands share: options, colours, exit codes, `--json`; `fusedopt` alone prints its help."""

import importlib.metadata
import json
import runpy
import sys

import click
import pytest
from click.testing import CliRunner

import fusedopt
from fusedopt.backends import nvrtc
from fusedopt.cli import main
from fusedopt.cli.shared import ExitCode, check_writable, console, exit_codes, finish

COMMANDS = {"doctor": (), "verify": (), "bench": (), "warmup": (), "bench compare": (), "bench plot": ()}
WITH_JSON = [name for name in COMMANDS if name != "bench plot"]  # whose results are files already


def invoke(*arguments: str, **settings):
    return CliRunner().invoke(main, arguments, **settings)


def command_of(name: str) -> click.Command:
    found: click.Command = main
    for part in name.split():
        assert isinstance(found, click.Group)
        found = found.commands[part]
    return found


def options_of(name: str) -> dict[str, click.Parameter]:
    return {option: each for each in command_of(name).params for option in each.opts}


def test_every_command_is_looked_at_here():
    assert set(main.commands) == {name for name in COMMANDS if " " not in name}


@pytest.mark.parametrize("name", COMMANDS)
def test_shared_options_have_one_definition(name):
    options = options_of(name)
    assert options["--color"].type.choices == options_of("doctor")["--color"].type.choices
    if name in WITH_JSON:
        assert (options["--json"].name, options["--json"].metavar) == ("json_path", "FILE")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_exit_codes(name):
    for flag in ("-h", "--help"):
        result = invoke(*name.split(), flag)
        assert result.exit_code == ExitCode.OK
        assert "Exit codes: 0" in result.output and "2, bad input" in " ".join(result.output.split())
    assert command_of(name).epilog.startswith(exit_codes("").split(" 1,")[0])


def test_version_is_that_of_the_code(monkeypatch):
    """Of a checkout, too, that nobody installed."""

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert invoke("--version").output.endswith(f", version {fusedopt.__version__}\n")


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    """``python -m fusedopt``."""
    monkeypatch.setattr(sys, "argv", ["fusedopt", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("fusedopt", run_name="__main__")
    assert ended.value.code == ExitCode.OK and fusedopt.__version__ in capsys.readouterr().out


def test_alone_it_prints_its_help():
    alone, asked = invoke(), invoke("--help")
    assert (alone.exit_code, alone.output) == (ExitCode.OK, asked.output)
    assert all(name in alone.output for name in COMMANDS if " " not in name)


@pytest.mark.parametrize("name", [*COMMANDS, "nonsense"])
def test_bad_input_has_its_own_code(name, tmp_path):
    result = invoke(*name.split(), "--no-such-option")
    assert result.exit_code == ExitCode.BAD_INPUT


@pytest.mark.parametrize("name", WITH_JSON)
def test_a_json_file_that_cannot_be_written_is_noticed_first(name, tmp_path):
    files = [str(tmp_path / "before.json")] * 2 if name == "bench compare" else []
    result = invoke(*name.split(), *files, "--json", str(tmp_path / "missing" / "out.json"))
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "cannot be written" in result.output


def test_trying_a_file_leaves_no_trace(tmp_path):
    (tmp_path / "old").write_text("kept")
    check_writable(str(tmp_path / "new"), str(tmp_path / "old"), None)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "kept"


def test_warmup_writes_what_it_did(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "compile_kernel", lambda kernel, arch: b"cubin")
    result = invoke("warmup", "--arch", "sm_90", "--rule", "lion", "--json", str(tmp_path / "out.json"))
    assert result.exit_code == ExitCode.OK, result.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["kernels"] == len(list((tmp_path / "cache").glob("*.cubin"))) > 0
    assert (written["archs"], written["bytes"]) == (["sm_90"], 5 * written["kernels"])


def test_a_compiler_that_fails_is_no_bad_input(tmp_path, monkeypatch):
    def fail(kernel, arch):
        raise RuntimeError("the compiler fell over")

    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(nvrtc, "compile_kernel", fail)
    result = invoke("warmup", "--arch", "sm_90", "--rule", "lion")
    assert result.exit_code == ExitCode.FAILED and "the compiler fell over" in result.output


@pytest.mark.parametrize(
    ("arguments", "environment", "coloured"),
    [
        (("--color", "always"), {}, True),
        (("--color", "never"), {"FORCE_COLOR": "1"}, False),
        (("--color", "auto"), {}, False),  # no terminal
        ((), {}, False),
        ((), {"FORCE_COLOR": "1"}, True),
    ],
)
@pytest.mark.parametrize("before", [True, False], ids=["of the group", "of the command"])
def test_colours(arguments, environment, coloured, before, monkeypatch):
    @click.command("paint")
    @click.pass_context
    def paint(context):
        console().print("text", style="red")

    from fusedopt.cli.shared import color_option

    monkeypatch.setitem(main.commands, "paint", color_option()(paint))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    result = invoke(*arguments, "paint") if before else invoke("paint", *arguments)
    assert result.exit_code == 0 and ("\x1b[" in result.output) == coloured


def test_finish():
    for failed, code in ((["a case"], ExitCode.FAILED), ([], ExitCode.OK)):
        with pytest.raises(SystemExit) as ended:
            finish(failed=failed)
        assert ended.value.code == code
