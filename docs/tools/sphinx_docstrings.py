"""A griffe extension: docstrings become Markdown before mkdocstrings takes them apart."""

import sys
from pathlib import Path

import griffe

sys.path.append(str(Path(__file__).parent))

from docstrings import to_markdown


class SphinxDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
