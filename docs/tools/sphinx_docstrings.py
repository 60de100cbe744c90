"""A griffe extension: docstrings become Markdown before mkdocstrings takes them apart."""

import inspect
import sys
from pathlib import Path

import griffe

sys.path.append(str(Path(__file__).parent))

import docstrings


class SphinxDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = docstrings.lists(docstrings.to_markdown(inspect.cleandoc(obj.docstring.value)))
