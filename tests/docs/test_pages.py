"""What the pages say of the classes is what the classes say; docstrings become Markdown; links lead somewhere."""

import re
import sys
from pathlib import Path

import pytest

import fusedopt

sys.path.append(str(Path(__file__).resolve().parents[2] / "docs" / "tools"))

import docstrings
import optimizer_pages

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
OPTIMIZERS = [name for name in fusedopt.__all__ if hasattr(getattr(fusedopt, name), "rule")]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_its_page(name):
    page = (optimizer_pages.PAGES / f"{name.lower()}.md").read_text()
    assert optimizer_pages.fill(page) == page, "run python docs/tools/optimizer_pages.py"
    assert f"<!-- class: {name} -->" in page and "$$" in page and "When to use it" in page
    assert f"(optimizers/{name.lower()}.md)" in (ROOT / "docs" / "optimizers.md").read_text()


def test_everything_public_is_in_the_api():
    page = (ROOT / "docs" / "api.md").read_text()
    public = {name for name in fusedopt.__all__ if callable(getattr(fusedopt, name)) and name != "backends"}
    listed = set(re.findall(r"^::: fusedopt\.(\w+)$", page, re.MULTILINE))
    assert public <= listed, public - listed


def headings(page: Path) -> set[str]:
    """Anchors, as the site and the places that show repositories make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page):
    """In the repository: the site has a check of its own."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if ":" in path:
            continue
        target = page.parent / path if path else page
        assert target.is_file(), f"no {link}"
        assert not anchor or anchor in headings(target), f"no {link}"


def test_docstrings_become_markdown():
    text = """Adam (`Kingma & Ba,
    2015 <https://x.org>`_) of :class:`fusedopt.Adam`, :math:`v_t`, ``lr``.

    .. math::
        a &= b \\\\
        c &= d

    State: none.

    Args:
        params: as :class:`A`.
        foo, bar: two
            lines.

    Raises:
        ValueError: never.
    """
    body = docstrings.body(text)
    assert body.startswith("Adam ([Kingma & Ba, 2015](https://x.org)) of `fusedopt.Adam`, $v_t$, `lr`.")
    assert "$$\n\\begin{aligned}\na &= b \\\\\nc &= d\n\\end{aligned}\n$$" in body and body.endswith("State: none.")
    own = docstrings.lists("First:\n    a: one\n        two\n    b: three\n\nArgs:\n    c: four")
    assert own == "First:\n\n- `a`: one two\n- `b`: three\n\nArgs:\n    c: four"
    assert docstrings.arguments(text) == {"params": "as `A`.", "foo, bar": "two lines."}
