"""Without the libraries: what is said, and what works all the same."""

import importlib
import subprocess
import sys

import pytest
from models import NextByte, our_adamw

from fusedopt.integrations import unwrap


@pytest.mark.parametrize(
    ("module", "library", "message"),
    [
        ("accelerate", "accelerate", r"importing Accelerate failed .* pip install 'accelerate>=1\.1'"),
        ("transformers", "transformers", r"importing transformers failed .* pip install 'transformers\[torch\]>=5'"),
    ],
)
def test_missing_library(module, library, message, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"fusedopt.integrations.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"fusedopt\.integrations\.{module}: {message}"):
        importlib.import_module(f"fusedopt.integrations.{module}")


def test_the_package_imports_none_of_them():
    program = "import fusedopt, fusedopt.integrations, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"transformers", "accelerate", "lightning"} & set(run.stdout.split())


def test_unwrap():
    opt = our_adamw(NextByte().parameters())
    assert unwrap(opt) is opt and unwrap(None) is None and unwrap(NextByte()) is None
