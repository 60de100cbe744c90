"""Checks a built wheel: its size, the extension module, and that every header that NVRTC reads is in it."""

import argparse
import sys
import zipfile
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("wheel", type=Path)
parser.add_argument("--source", type=Path, required=True, help="the checkout's csrc/")
parser.add_argument("--max-bytes", type=int, required=True)
arguments = parser.parse_args()

size = arguments.wheel.stat().st_size
if size >= arguments.max_bytes:
    sys.exit(f"{arguments.wheel.name} has {size} bytes, expected less than {arguments.max_bytes}")

folders = ("core", "cuda", "formats", "rules")
headers = {
    f"fusedopt/_csrc/{path.relative_to(arguments.source).as_posix()}"
    for folder in folders
    for path in (arguments.source / folder).iterdir()
}
with zipfile.ZipFile(arguments.wheel) as wheel:
    names = set(wheel.namelist())
if missing := headers - names:
    sys.exit(f"{arguments.wheel.name} lacks {sorted(missing)}; see package-data in pyproject.toml")
if not any(name.startswith("fusedopt/_C.") and name.endswith((".so", ".pyd")) for name in names):
    sys.exit(f"{arguments.wheel.name} lacks the extension fusedopt._C")
if untyped := {"fusedopt/py.typed", "fusedopt/_C.pyi"} - names:
    sys.exit(f"{arguments.wheel.name} lacks {sorted(untyped)}, so type checkers would not see its annotations")
if strangers := {name.split("/")[0] for name in names if not name.startswith(("fusedopt/", "fusedopt-"))}:
    sys.exit(f"{arguments.wheel.name} installs {sorted(strangers)} beside fusedopt")
print(f"{arguments.wheel.name}: {size} bytes, {len(names)} files, {len(headers)} headers")
