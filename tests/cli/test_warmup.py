"""`fusedopt warmup` fills the cache that steps read, compiles nothing twice, and names bad arguments."""

import importlib.metadata
import subprocess
import sys

import pytest
from click.testing import CliRunner

import fusedopt
from fusedopt.backends import nvrtc
from fusedopt.cli import main
from fusedopt.specs import DTYPES, RULES

ADAMW = ("warmup", "--arch", "sm_90", "--rule", "adamw", "--dtype", "float32")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")  # no line of a message is broken
    return tmp_path


@pytest.fixture
def compiled(monkeypatch):
    """A compiler that costs nothing, and the list of what it was asked for."""
    calls = []

    def compile_kernel(kernel, arch):
        calls.append((kernel, arch))
        return b"cubin"

    monkeypatch.setattr(nvrtc, "compile_kernel", compile_kernel)
    return calls


def fusedopt_command(*arguments: str):
    return CliRunner().invoke(main, arguments)


def test_fills_the_cache_once(folder):
    """A process of its own, with the compiler itself; then every kernel of an AdamW step in float32 is a hit."""
    script = "from fusedopt.cli import main; main()"
    command = [sys.executable, "-c", script, *ADAMW]
    first = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert first.returncode == 0, first.stderr
    assert str(folder) in first.stdout

    entries = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    kernels = [kernel for kernel in nvrtc.common_kernels() if {"AdamW", "Float32"} >= formats_and_rules(kernel)]
    assert {nvrtc._cache_path(kernel, "sm_90") for kernel in kernels} == entries.keys()
    assert all(nvrtc._read_entry(path).startswith(b"\x7fELF") for path in entries)

    second = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert second.returncode == 0, second.stderr
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == entries


def formats_and_rules(kernel: nvrtc.KernelSpec) -> set[str]:
    """What a kernel was instantiated for, plain formats by their dtype."""
    arguments = {argument.removeprefix("Plain").removeprefix("State") for argument in kernel.arguments}
    return arguments & ({spec.cpp for spec in DTYPES.values()} | {spec.cpp for spec in RULES.values()})


def test_a_second_run_compiles_nothing(folder, compiled):
    assert fusedopt_command(*ADAMW).exit_code == 0
    assert compiled
    compiled.clear()
    result = fusedopt_command(*ADAMW)
    assert result.exit_code == 0 and "sm_90" in result.output
    assert not compiled


def test_plain_formats_by_default(folder, compiled):
    result = fusedopt_command("warmup", "--arch", "sm_80", "--arch", "sm_90a")
    assert result.exit_code == 0, result.output
    assert {arch for _, arch in compiled} == {"sm_80", "sm_90a"}
    for arch in ("sm_80", "sm_90a"):
        assert {kernel for kernel, of in compiled if of == arch} == set(nvrtc.common_kernels())
    assert f"{len(compiled)} kernels for sm_80, sm_90a" in result.output


def test_rules_and_dtypes_are_chosen(folder, compiled):
    result = fusedopt_command(
        "warmup", "--arch", "sm_90", "--rule", "lion", "--rule", "lamb", "--dtype", "bfloat16", "--jobs", "1"
    )
    assert result.exit_code == 0, result.output
    chosen = {kernel for kernel, _ in compiled}
    structs = {spec.cpp for spec in RULES.values()}
    rules = {
        (kernel.template, kernel.arguments[0])
        for kernel in chosen
        if kernel.arguments and kernel.arguments[0] in structs
    }
    assert rules == {("update_pass", "Lion"), ("update_pass", "Lamb"), ("measure_pass", "Lamb")}
    formats = {spec.cpp for spec in DTYPES.values()}
    assert {name for kernel in chosen for name in formats_and_rules(kernel) if name in formats} == {"BFloat16"}
    templates = {kernel.template for kernel in nvrtc.common_kernels()}
    assert {kernel.template for kernel in chosen} == templates


@pytest.mark.parametrize("arch", ["90", "sm90", "sm_", "sm_9x", "sm_90zz", "gfx90a", "compute_90", "SM_90"])
def test_bad_architecture(folder, compiled, arch):
    result = fusedopt_command("warmup", "--arch", arch)
    assert result.exit_code == 2
    assert f"--arch: got '{arch}', expected sm_ and two or three digits, such as sm_90" in result.output
    assert not compiled and not list(folder.iterdir())


def test_architecture_that_the_compiler_does_not_know(folder):
    result = fusedopt_command("warmup", "--arch", "sm_99", "--rule", "lion", "--dtype", "float32")
    assert result.exit_code == 1
    assert "NVRTC could not compile" in result.output and "sm_99" in result.output
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--rule", "muon"), "'muon' is not one of 'adagrad', 'adam', 'adam_amsgrad'"),
        (("--dtype", "int8"), "'int8' is not one of"),
        (("--jobs", "0"), "0 is not in the range x>=1"),
        (("sm_90",), "unexpected extra argument"),
    ],
)
def test_bad_arguments(folder, compiled, arguments, message):
    result = fusedopt_command("warmup", "--arch", "sm_90", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not compiled


def test_no_gpu_and_no_architecture(folder, compiled, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = fusedopt_command("warmup")
    assert result.exit_code == 2
    assert "such as --arch sm_90" in result.output
    assert not compiled


def test_architectures_of_the_gpus_here(folder, compiled, monkeypatch):
    capabilities = [(9, 0), (8, 0), (9, 0)]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(capabilities))
    monkeypatch.setattr("torch.cuda.get_device_capability", capabilities.__getitem__)
    assert fusedopt_command("warmup", "--rule", "lion", "--dtype", "float32").exit_code == 0
    assert {arch for _, arch in compiled} == {"sm_80", "sm_90"}


def test_missing_compiler(folder, compiled, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    result = fusedopt_command(*ADAMW)
    assert result.exit_code == 1
    assert "pip install 'fusedopt[cuda]'" in result.output
    assert not compiled


def test_help():
    group = fusedopt_command("--help")
    assert group.exit_code == 0 and "warmup" in group.output
    for option in ("--help", "-h"):
        result = fusedopt_command("warmup", option)
        assert result.exit_code == 0
        text = " ".join(result.output.split())
        assert all(words in text for words in ("--arch", "--rule", "--dtype", "--jobs", "Works without a GPU"))


def test_version():
    try:
        importlib.metadata.version("fusedopt")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fusedopt is not installed")
    result = fusedopt_command("--version")
    assert result.exit_code == 0
    assert result.output.split()[-1] == fusedopt.__version__
