"""Docstrings are written for Sphinx; the site and the pages of optimizers want Markdown."""

from __future__ import annotations

import inspect
import re
import textwrap

__all__ = ["arguments", "body", "lists", "to_markdown"]

_MATH = re.compile(r"^( *)\.\. math::\n((?:\1 +.*\n|\s*\n)+)", re.MULTILINE)
_INLINE_MATH = re.compile(r":math:`([^`]+)`")
_ROLE = re.compile(r":(?:class|meth|func|attr):`([^`]+)`")
_LINK = re.compile(r"`([^`<]+?)\s+<([^>`]+)>`_")
_SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Attributes):$|^\S.*:\n    \w+: ", re.MULTILINE)
_OWN_SECTION = re.compile(
    r"^(?!(?:Args|Returns|Raises|Yields|Attributes):)(\S.*):\n((?:    (?:[\w, ]+: .*|    .*)\n)+)\n?", re.MULTILINE
)


def to_markdown(text: str) -> str:
    """Formulas, roles, links and code of reStructuredText as Markdown."""
    text = _MATH.sub(lambda match: _display(match[1], match[2]), text + "\n")
    text = _INLINE_MATH.sub(r"$\1$", text)
    text = _ROLE.sub(r"`\1`", text)
    text = _LINK.sub(lambda match: f"[{' '.join(match[1].split())}]({match[2]})", text)
    return text.replace("``", "`").rstrip()


def _display(indent: str, formula: str) -> str:
    lines = textwrap.dedent(formula).strip().splitlines()
    inner = "\n".join(f"{indent}{line}" for line in lines)
    return f"{indent}$$\n{indent}\\begin{{aligned}}\n{inner}\n{indent}\\end{{aligned}}\n{indent}$$\n\n"


def body(docstring: str) -> str:
    """What comes before the first section, as Markdown."""
    text = inspect.cleandoc(docstring)
    first = _SECTION.search(text)
    return to_markdown(text[: first.start()] if first else text)


def lists(docstring: str) -> str:
    """Sections that only this library has ("Where it runs:") as a line and a list; griffe knows the others."""
    return _OWN_SECTION.sub(_list, docstring + "\n").rstrip()


def _list(section: re.Match[str]) -> str:
    entries = re.split(r"\n(?=    \S)", section[2].rstrip())
    pairs = (" ".join(entry.split()).partition(": ") for entry in entries)
    items = "\n".join(f"- `{name}`: {text}" for name, _, text in pairs)
    return f"{section[1]}:\n\n{items}\n\n"


def arguments(docstring: str) -> dict[str, str]:
    """What ``Args:`` says of each name, as Markdown on one line."""
    _, _, rest = inspect.cleandoc(docstring).partition("\nArgs:\n")
    section = re.split(r"\n(?=\S)", rest)[0]
    entries = re.split(r"\n(?=    \S)", section)
    pairs = (entry.strip().partition(": ") for entry in entries if entry.strip())
    return {names: to_markdown(" ".join(text.split())) for names, _, text in pairs}
