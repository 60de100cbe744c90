"""Builds the extension ``fusedopt._C`` with ninja. Everything else about the package is in pyproject.toml.

Neither torch nor a CUDA toolkit is needed: the extension takes addresses, and CUDA kernels are compiled at run time.
g++ and clang build it (CXX says which); on Windows clang does, which comes with Visual Studio as a component.

FUSEDOPT_SANITIZE=address,undefined (or thread) builds it for gcc's sanitizers; see docs/testing.md.
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# macOS says in ARCHFLAGS ("-arch arm64") which processor to build for, where it is not its own.
ARCH_FLAGS = shlex.split(os.environ.get("ARCHFLAGS", "")) if sys.platform == "darwin" else []
MACHINES = [flag for flag in ARCH_FLAGS if flag != "-arch"] or [platform.machine().lower()]
# With FUSEDOPT_BASELINE_ONLY the CPU engine has no copies for newer instruction sets: quick to build, for experiments.
X86 = set(MACHINES) <= {"x86_64", "amd64"} and not os.environ.get("FUSEDOPT_BASELINE_ONLY")

COMMON_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", *ARCH_FLAGS]
# Windows: getenv is no mistake; the C library that Python uses.
WINDOWS_FLAGS = ["-D_CRT_SECURE_NO_WARNINGS", "-fms-runtime-lib=dll"]
COMMON_FLAGS += WINDOWS_FLAGS if sys.platform == "win32" else ["-fPIC", "-pthread"]
# Contraction off: a*b+c rounds twice on every compiler, so that all engines give the same bits.
# The other two only let sqrt and selects be vectorised; they change no result.
ARITHMETIC_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# One copy of the CPU engine per instruction set, chosen at run time.
ISA_FLAGS = {
    "csrc/cpu/isa_avx2.cpp": ["-mavx2", "-mf16c", "-mfma"],
    "csrc/cpu/isa_avx512.cpp": [
        *("-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        "-mprefer-vector-width=512",
    ],
}
SOURCES = [
    "csrc/bindings.cpp",
    "csrc/cpu/checks.cpp",
    "csrc/cpu/isa_baseline.cpp",
    "csrc/cpu/passes.cpp",
    "csrc/host/given_scalar.cpp",
    "csrc/host/repeated_step.cpp",
    "csrc/host/shard.cpp",
    "csrc/host/tensor_layout.cpp",
    "csrc/host/threads.cpp",
    "csrc/host/cuda_driver.cpp",
    "csrc/host/state_guard.cpp",
    "csrc/host/tensor_ref.cpp",
    "csrc/host/watch.cpp",
]
if X86:
    SOURCES += list(ISA_FLAGS)


def sanitizer_flags() -> list[str]:
    """Of the compiler and of the linker. A finding of any sanitizer ends the process."""
    wanted = os.environ.get("FUSEDOPT_SANITIZE", "")
    if not wanted:
        return []
    unknown = sorted(set(wanted.split(",")) - {"address", "undefined", "thread"})
    if unknown:
        raise SystemExit(
            f"FUSEDOPT_SANITIZE: got {unknown[0]!r}, expected 'address', 'undefined' or 'thread', joined by commas; "
            "leave it empty for an ordinary build"
        )
    # -O1: the engines compile for minutes otherwise. pybind11 calls through types that it has not exported: no vptr.
    checks = [f"-fsanitize={wanted}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    return [*checks, "-fno-omit-frame-pointer", "-g1", "-O1"]


def linker_flags() -> list[str]:
    if sys.platform == "darwin":
        return [*ARCH_FLAGS, "-bundle", "-undefined", "dynamic_lookup"]
    if sys.platform == "win32":  # Python's import library is named in a header of Python's
        return ["-shared", quote(f"-L{Path(sys.base_prefix) / 'libs'}")]
    return ["-pthread", "-shared", "-ldl"]


def quote(argument: str) -> str:
    """For the shell that ninja starts; on Windows there is none, but a command line."""
    return subprocess.list2cmdline([argument]) if sys.platform == "win32" else shlex.quote(argument)


class NinjaBuildExt(build_ext):
    """Writes a build.ninja with flags of its own for each source, and runs it."""

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        work = (Path(self.build_temp) / "ninja").resolve()
        work.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [sysconfig.get_paths()["include"], pybind11.get_include()]
        (work / "build.ninja").write_text(self.ninja_file(ext, target, includes))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(work)]
        subprocess.run(command + (["-v"] if self.verbose else []), check=True, stdout=sys.stderr)

    def ninja_file(self, ext: Extension, target: Path, includes: list[str]) -> str:
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "win32" else "c++")
        # $in is escaped by ninja for the shell; paths in this file need "$ " for a space.
        escape = lambda text: str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")  # noqa: E731
        flags = COMMON_FLAGS + ARITHMETIC_FLAGS + (["-DFUSEDOPT_X86"] if X86 else [])
        flags += [quote(f"-I{path}") for path in includes] + os.environ.get("CXXFLAGS", "").split() + sanitizer_flags()
        shared = linker_flags() + sanitizer_flags()
        lines = [
            f"flags = {' '.join(flags)}",
            f"rule compile\n  command = {compiler} -MMD -MF $out.d $flags $isa -c $in -o $out\n  depfile = $out.d",
            "  deps = gcc\n  description = compile $in",
            f"rule link\n  command = {compiler} $in {' '.join(shared)} -o $out\n  description = link $out",
        ]
        objects = []
        for source in ext.sources:
            objects.append(source.replace("/", "_") + ".o")
            lines.append(f"build {objects[-1]}: compile {escape(ROOT / source)}")
            lines.append(f"  isa = {' '.join(ISA_FLAGS.get(source, []))}")
        lines.append(f"build {escape(target)}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


setup(ext_modules=[Extension("fusedopt._C", SOURCES)], cmdclass={"build_ext": NinjaBuildExt})
