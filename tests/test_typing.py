"""The annotations of the public API, as mypy sees them in a user's program, and the stub of the extension module."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusedopt import _C

ROOT = Path(__file__).resolve().parents[1]


def test_a_users_program_is_checked_strictly():
    pytest.importorskip("mypy")
    # The cache is that of `make lint`: without it torch alone takes mypy many seconds.
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "tests/typed_program.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- the stub ---------------------------------------------------------------------------------------------------


def public(names) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def stub_names() -> dict[str, ast.stmt]:
    """By name, or by class and name."""
    tree = ast.parse((ROOT / "fusedopt" / "_C.pyi").read_text())
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{member_name(member)}": member for member in node.body}
    return found


def member_name(member: ast.stmt) -> str:
    return member.target.id if isinstance(member, ast.AnnAssign) else member.name


def module_names() -> set[str]:
    found = public(vars(_C))
    classes = {name for name in found if isinstance(getattr(_C, name), type)}
    special = {"__init__", "__len__"}
    for name in classes:
        members = vars(getattr(_C, name)).keys()
        found |= {f"{name}.{member}" for member in public(members) | special & members}
    return found


def test_the_stub_names_what_the_module_has():
    assert stub_names().keys() == module_names()


def parameters(node: ast.FunctionDef, skip: int) -> tuple[int, list[str]]:
    """How many there are, and the names of those that may be given by name."""
    given = node.args
    everything = [*given.posonlyargs, *given.args][skip:]
    return len(everything), [each.arg for each in everything if each in given.args]


def functions():
    for name, node in stub_names().items():
        owner = name.rpartition(".")[0]
        decorated = isinstance(node, ast.FunctionDef) and node.decorator_list
        if isinstance(node, ast.FunctionDef) and not decorated and name != "RepeatedStep.run":
            yield pytest.param(name, node, bool(owner), id=name)


@pytest.mark.parametrize(("name", "node", "is_method"), list(functions()))
def test_the_stub_has_the_parameters_of_the_module(name, node, is_method):
    """pybind11 writes them into docstrings: `arg0` where they have no names."""
    found = _C
    for part in name.split("."):
        found = getattr(found, part)
    if name.endswith("__len__"):
        return
    text = found.__doc__.splitlines()[0]
    names = re.findall(r"(?:\(|, )(\w+): ", text)[1 if is_method else 0 :]
    count, by_name = parameters(node, 1 if is_method else 0)
    assert count == len(names), text
    assert by_name == [each for each in names if not re.fullmatch(r"arg\d+", each)], text
