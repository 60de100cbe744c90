"""Hooks of mkdocs: links that leave docs/ stay links, and formulas become MathML, which browsers show by themselves."""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = "source"
"""Where the site keeps the files of the repository that pages link to and that are not in docs/."""

_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files outside of docs/ that pages link to become files of the site, pages where they are Markdown."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    for uri in waiting:  # grows: pages from outside have links too
        for target in _targets(uri):
            place = _site_uri(target)
            if not target.startswith("docs/") and files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / target)))
                if place.endswith(".md"):
                    waiting.append(place)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri

    def relinked(match: re.Match[str]) -> str:
        target = _target(uri, match[2])
        if target is None:
            return match[0]
        return f"{match[1]}{posixpath.relpath(_site_uri(target), posixpath.dirname(uri) or '.')}{match[3]}"

    return _LINK.sub(relinked, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return _FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    formula = html.unescape(match[3]).replace("{aligned}", "{align*}")
    return f'<{match[1]} class="arithmatex">{convert(formula, "block" if match[2] == "[" else "inline")}</{match[1]}>'


def _repository_path(uri: str) -> str:
    """Where a page of the site is in the repository."""
    return uri.removeprefix(f"{ELSEWHERE}/") if uri.startswith(f"{ELSEWHERE}/") else f"docs/{uri}"


def _site_uri(path: str) -> str:
    """Where a file of the repository is in the site."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{ELSEWHERE}/{path}"


def _target(uri: str, link: str) -> str | None:
    """The file of the repository that a link of a page means; None where there is none."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(_repository_path(uri)), link))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def _targets(uri: str) -> list[str]:
    text = (ROOT / _repository_path(uri)).read_text()
    return [target for match in _LINK.finditer(text) if (target := _target(uri, match[2]))]
