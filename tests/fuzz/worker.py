"""Runs inputs one after another, in a process of its own.

Prints JSON lines: inputs about to be run, findings, and at the end how often each function came back and refused.
"""

from __future__ import annotations

import json
import random
import traceback
from collections import Counter

from fusedopt import _C

from . import scenarios

_REPORT = 100


def main(seed: int, first: int, stop: int, stride: int, marker: str) -> None:
    """Of every ``stride``-th input. marker: file whose contents are the number of the one under way."""
    print(json.dumps({"extension": _C.__file__}), flush=True)
    counts: Counter = Counter()
    with open(marker, "r+b", buffering=0) as at:
        for done, index in enumerate(range(first, stop, stride)):
            at.seek(0)
            at.write(b"%-20d" % index)
            try:
                scenarios.run(random.Random(f"{seed}/{index}"), counts)
            except Exception:
                print(json.dumps({"finding": index, "text": traceback.format_exc()}), flush=True)
            if done % _REPORT == 0:
                print(json.dumps({"at": index}), flush=True)
    table: dict[str, dict[str, int]] = {}
    for (name, outcome), count in sorted(counts.items()):
        table.setdefault(name, {"done": 0, "refused": 0})[outcome] = count
    print(json.dumps({"counts": table}), flush=True)
