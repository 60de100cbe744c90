"""What Triton's compiler makes of the kernels for an H100, seen without one: vector accesses, no contraction."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedopt.backends.triton import _SIZES
from fusedopt.specs import DTYPES, PARAM_FORMATS, RULES, STATE_FORMATS

PROGRAM = Path(__file__).with_name("compile_triton.py")


def compile_all(tmp_path, *arguments):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], env=environment, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)["kernels"]


def check(kernels):
    for name, kernel in kernels.items():
        assert kernel["unwanted"] == [], name
        kind, *formats = name.split("/")
        if kind in ("measure", "update"):
            check_update(name, kernel, kind, RULES[formats[0]], *formats[1:])
        elif kind != "finalize":
            check_stream(name, kernel, kind, *(DTYPES[key].size for key in formats[:2] if key in DTYPES))


def check_stream(name, kernel, kind, grad, main=0):
    """Passes that read gradients, and write them or main gradients. Bytes of an element; main: 0 where there is none.

    The narrower of two streams takes as many elements an access as the wider one.
    """
    written = {"norm": 0, "scale": grad, "accumulate": main}[kind]
    widest = max(grad, main)
    loads = [size for size in (grad, main) if size]
    stores = [written] if written else []
    check_accesses(name, kernel, 16 // widest, loads, stores)


def check_accesses(name, kernel, vector, loads, stores):
    """loads, stores: bytes of an element of each stream. vector: elements of an access.

    The compiler may load the first tile ahead of the loop over tiles and the next one at its end: then every load is
    there twice.
    """
    elements = kernel["elements"]  # of a thread
    loaded, stored = (elements * sum(size for size in sizes if size * vector > 4) for sizes in (loads, stores))
    wide_loads, wide_stores = (
        elements // vector * sum(size * vector == 16 for size in sizes) for sizes in (loads, stores)
    )
    copies = 2 if kernel["loaded"] == 2 * loaded else 1
    assert (kernel["loaded"], kernel["stored"]) == (copies * loaded, stored), name
    assert (kernel["wide_loads"], kernel["wide_stores"]) == (copies * wide_loads, wide_stores), name


def check_update(name, kernel, kind, rule, param, grad, state, main=None):
    """Every stream of an aligned chunk goes by vectors, of 16 bytes where its elements are the largest.

    Only four single bytes are one word, which no vector access is. The measure pass reads the same and stores nothing.
    """
    spec, form = PARAM_FORMATS[param], STATE_FORMATS[state]
    kept = [DTYPES[spec.dtype].size, *([_SIZES[spec.extra[1]]] if spec.extra else [])]
    kept += [_SIZES[form.dtype(moment)] for moment in rule.moments]
    read = [*(kept[1:] if param.endswith("+master") else kept), DTYPES[grad].size]
    read += [DTYPES[main].size] if main else []
    vector = min(8, 16 // max(*read, *kept))
    assert any(size * vector == 16 for size in [*read, *kept]), name
    check_accesses(name, kernel, vector, read, kept if kind == "update" else [])


def test_vector_accesses_and_no_contraction(tmp_path):
    check(compile_all(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_combination(tmp_path):
    check(compile_all(tmp_path, "all"))
