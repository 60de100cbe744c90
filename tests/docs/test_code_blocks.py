"""Every fenced block of README.md and docs/: Python runs, page by page; programs, files, options of shell ones exist.

A Python block that cannot run everywhere says why in its first line, for readers too: ``# needs a GPU``, ``# needs
Triton``, ``# needs several processes: …``. It is compiled all the same, and the first two run where there is one. A
block whose first line is ``# file: path`` is a file of `docs/adding-an-optimizer.md`: `test_adding_an_optimizer.py`.
"""

import functools
import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import torch

from fusedopt.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

LIBRARIES = {"docs/integrations.md": ("transformers", "accelerate", "lightning")}
"""What pages are about, and are skipped without."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "sh", "cpp", "diff", "text", "markdown", "dockerfile", ""}
MARKER = re.compile(r"# (?:needs (.+)|file: \S+)\n")
HERE = {"a GPU": torch.cuda.is_available(), "Triton": importlib.util.find_spec("triton") is not None}
"""What blocks may need, and whether it is there. Whatever else they need is not."""
VARIABLE = re.compile(r"[A-Z][A-Z_]*=.*", re.DOTALL)
COMMENT = re.compile(r"(?<!\S)#.*")
SUBSTITUTION = re.compile(r"\$\([^()]*\)")
SEPARATOR = re.compile(r"\n|;|&&|\|\|")


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int

    @property
    def runs_here(self) -> bool:
        """Whether nothing that it needs is missing."""
        marker = MARKER.match(self.text)
        return marker is None or HERE.get(marker[1], False)


def blocks_of(page: Path, language: str | None = None) -> list[Block]:
    text = page.read_text()
    found = [Block(m[1], m[2], text[: m.start(2)].count("\n") + 1) for m in FENCE.finditer(text)]
    return [block for block in found if language in (None, block.language)]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if blocks_of(page, language)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_fences(page):
    """No block is passed over because its fence is spelled in another way."""
    lines = page.read_text().splitlines()
    assert sum(line.lstrip().startswith("```") for line in lines) == 2 * len(blocks_of(page))
    assert {block.language for block in blocks_of(page)} <= LANGUAGES


# ---- Python --------------------------------------------------------------------------------------------------------


def run_page(page: Path) -> None:
    """All blocks in one namespace, in a module of their own, as classes and pickles want it."""
    namespace = {"__name__": "__main__"}
    for block in blocks_of(page, "python"):
        # Line numbers are the page's, so that a traceback shows the place.
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        if block.runs_here:
            exec(code, namespace)


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("page", with_blocks("python"), ids=name_of)
def test_python_blocks(page, device, tmp_path, monkeypatch):
    """On a machine with a GPU pages use it, so they run once, as GPU tests."""
    for library in LIBRARIES.get(name_of(page), ()):
        pytest.importorskip(library, reason=f"needs {library}: the extra test-integrations")
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("pages take the GPU that is here")
    monkeypatch.chdir(tmp_path)
    # Pages are about the graph that breaks at a step; what inductor makes of the rest takes long to compile.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    threads = torch.get_num_threads()
    try:
        run_page(page)
    finally:
        torch.set_num_threads(threads)


# ---- shell ---------------------------------------------------------------------------------------------------------

KNOWN = {"pip", "git", "nvidia-smi", "cd", "c++", "torchrun", "python", "make", "fusedopt", "pre-commit"}


def commands_of(text: str) -> list[list[str]]:
    """The words of each command, without comments, variables and what programs' output goes to."""
    joined = SUBSTITUTION.sub("value", COMMENT.sub("", text.replace("\\\n", " ")))
    split = [shlex.split(part) for part in SEPARATOR.split(joined)]
    stripped = []
    for words in split:
        while words and VARIABLE.fullmatch(words[0]):
            words = words[1:]
        if words:
            stripped.append([word.removeprefix(".venv/bin/") for word in words])
    return stripped


def check_fusedopt(words: list[str]) -> None:
    """Every subcommand and every option is one of the command line's."""
    command: click.Command = main
    for word in words:
        if isinstance(command, click.Group) and word in command.commands:
            command = command.commands[word]
        elif word.startswith("-"):
            options = {
                option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
            }
            options |= {"-h", "--help", "--version"}
            assert word.partition("=")[0] in options, f"{command.name} has no {word}"
    assert command is not main or words[0].startswith("-"), f"fusedopt has no {words[0]}"


def check_python(words: list[str]) -> None:
    """Files and modules are there."""
    if words[0] == "-m":
        name = words[1].replace(".", "/")
        assert (
            words[1] in ("pytest", "venv", "mkdocs", "pip") or (ROOT / name).exists() or (ROOT / f"{name}.py").exists()
        )
    scripts = [word for word in words if word.endswith(".py")]
    for script in scripts:
        assert (ROOT / script.partition("::")[0]).is_file(), f"no {script}"
    folders = [word for word in words if word.startswith("tests/") and "." not in word]
    for folder in folders:
        assert (ROOT / folder).exists(), f"no {folder}"


def check_command(words: list[str]) -> None:
    program, *rest = words
    assert program in KNOWN, f"{program} is not a program that these pages use"
    if program == "fusedopt":
        check_fusedopt(rest)
    elif program in ("python", "torchrun"):
        check_python([word for word in rest if word != "-P"])
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= targets, f"make has no {rest}"


@pytest.mark.parametrize("page", with_blocks("sh"), ids=name_of)
def test_shell_blocks(page):
    for block in blocks_of(page, "sh"):
        for words in commands_of(block.text):
            try:
                check_command(words)
            except AssertionError as error:
                pytest.fail(f"{name_of(page)}:{block.line}: {' '.join(words)}: {error}")


def test_commands_are_taken_apart():
    text = 'A=1 B="x y" fusedopt bench --quick   # some\n'
    text += 'python -m pytest -q; make test \\\n  lint && pip install ".[cuda]"\n'
    assert commands_of(text) == [
        ["fusedopt", "bench", "--quick"],
        ["python", "-m", "pytest", "-q"],
        ["make", "test", "lint"],
        ["pip", "install", ".[cuda]"],
    ]


@pytest.mark.parametrize(
    "text", ["fusedopt bnech", "fusedopt verify --quik", "python benchmarks/stepp.py", "make tset"]
)
def test_what_is_not_there_is_noticed(text):
    with pytest.raises(AssertionError):
        check_command(shlex.split(text))


def test_markers():
    texts = ("x\n", "# needs a GPU\nx\n", "# needs Triton\nx\n", "# needs two processes\nx\n", "# file: a.py\n")
    runs = [Block("python", text, 1).runs_here for text in texts]
    assert runs == [True, HERE["a GPU"], HERE["Triton"], False, False]


if __name__ == "__main__":  # python tests/docs/test_code_blocks.py docs/formats.md: one page, with its tracebacks
    for argument in sys.argv[1:]:
        run_page(Path(argument).resolve())
