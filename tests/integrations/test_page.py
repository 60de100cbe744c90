"""The blocks of docs/integrations.md run, in their order."""

import re
import warnings
from pathlib import Path

import pytest
from models import EXTRA

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"


@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_blocks_run(tmp_path, monkeypatch, capsys):
    for library in ("transformers", "accelerate", "lightning"):
        pytest.importorskip(library, reason=EXTRA)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    namespace = {"__name__": "page"}
    with warnings.catch_warnings():
        for block in blocks:
            exec(compile(block, PAGE.name, "exec"), namespace)
    assert len(blocks) == 5 and "StepMetrics(step=4" in capsys.readouterr().out
