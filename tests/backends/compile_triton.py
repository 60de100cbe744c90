"""Compiles Triton kernels to PTX for sm_90, without a GPU, and prints what is in them, as JSON.

A program of its own, because under TRITON_INTERPRET=1, which the tests run with, nothing is compiled:

    TRITON_INTERPRET=0 python tests/backends/compile_triton.py [all]
"""

import json
import re
import sys
from collections import Counter

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedopt.backends.triton import NO_MAIN, TILES, Tile, options_of, update_constants, update_tile
from fusedopt.backends.triton import _vector as vector_of
from fusedopt.specs import DTYPES, PARAM_FORMATS, RULES, STATE_FORMATS, TRITON_CHUNK
from fusedopt.triton import kernels

FEW = [
    ("adamw", "float32", "float32", "float32"),
    ("adam", "float64", "float64", "float64"),
    ("lion", "float16", "float16", "float16"),
    ("adamw", "bfloat16", "bfloat16", "bfloat16"),
    ("adamw", "bfloat16+master", "bfloat16", "float32"),
    ("adamw", "split16", "bfloat16", "float32"),
    ("adamw", "split8", "bfloat16", "int8"),
    ("lion", "split8", "bfloat16", "int8"),
    ("lion", "bfloat16+stochastic", "bfloat16", "bfloat16+stochastic"),
    ("adam", "float16+master", "float16", "int8"),
    ("adamw", "split16", "float32", "bfloat16"),
    ("sgd", "float32", "float32", "float32"),
    ("sgdw_momentum", "bfloat16+master", "bfloat16", "float32"),
    ("adamw_amsgrad", "float32", "float32", "float32"),
    ("rmsprop_centered_momentum", "float32", "float32", "float32"),
    ("adagrad", "bfloat16", "bfloat16", "bfloat16"),
    ("radam", "float32", "float32", "float32"),
    ("lamb", "float32", "float32", "float32"),
    ("lamb", "split8", "bfloat16", "int8"),
]
# (rule, parameter format, gradient dtype, state format, dtype of main gradients)
ACCUMULATED = [
    ("adamw", "float32", "float32", "float32", "float32"),
    ("adamw", "split16", "bfloat16", "float32", "float32"),
    ("adamw", "bfloat16", "bfloat16", "bfloat16", "bfloat16"),
    ("lion", "split8", "bfloat16", "int8", "float32"),
]
PAIRS = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float64", "float64")]
"""Of gradients and main gradients."""


def every_combination():
    """(rule, parameter format, gradient dtype, state format) of every update that can be asked for."""
    for rule in RULES:
        for param, spec in PARAM_FORMATS.items():
            for grad in DTYPES:
                for state in STATE_FORMATS:
                    if len({name == "float64" for name in (spec.dtype, grad, state)}) == 1:
                        yield rule, param, grad, state


def compile_kernel(kernel, constants: dict, tile: Tile) -> str:
    if "TILE" in kernel.arg_names:
        constants = {**constants, "TILE": tile.elements}
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: "i32" if name in ("finalize", "number") else "i64" for name in names}
    try:  # since Triton 3.3
        everything = signature | dict.fromkeys(constants, "constexpr")
        by_place = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature={name: everything[name] for name in kernel.arg_names}, constexprs=by_place)
    except TypeError:
        source = ASTSource(kernel, signature=signature, constants=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options_of(tile)).asm["ptx"]


def summary(ptx: str, tile: Tile) -> dict:
    """Of a thread: elements, bytes moved by vector accesses, floating-point instructions that may not be there."""
    moved = Counter()
    ours = re.sub(r"// begin inline asm.*?// end inline asm", "", ptx, flags=re.DOTALL)  # exact divisions use fma
    for kind, width, bits in re.findall(r"\b(ld|st)\.global[.:\w]*?\.v(\d)\.[bfu](\d+)", ptx):
        moved[kind] += int(width) * int(bits) // 8
    wide = Counter(re.findall(r"\b(ld|st)\.global[.:\w]*?\.(?:v4\.[bfu]32|v2\.[bfu]64)", ptx))
    unwanted = re.findall(r"\b(?:fma|mad)\.[.\w]*f(?:32|64)|\w+\.approx[.\w]*|\w+\.[.\w]*ftz[.\w]*", ours)
    elements = tile.elements // (32 * tile.warps)
    accesses = {"loaded": moved["ld"], "stored": moved["st"], "wide_loads": wide["ld"], "wide_stores": wide["st"]}
    return {"elements": elements, **accesses, "unwanted": sorted(set(unwanted))}


def main() -> None:
    found = {}
    for rule, param, grad, state, *main in [*(every_combination() if "all" in sys.argv else FEW), *ACCUMULATED]:
        spec, form = PARAM_FORMATS[param], STATE_FORMATS[state]
        tile = update_tile(form)
        for name in ("measure", "update") if RULES[rule].norms else ("update",):
            constants = update_constants(RULES[rule], spec, form, grad, *(main or [NO_MAIN]), name)
            ptx = compile_kernel(getattr(kernels, f"{name}_pass"), {**constants, "CLAMP": False}, tile)
            found["/".join((name, rule, param, grad, state, *main))] = summary(ptx, tile)
    for grad, main in [("float32", NO_MAIN), ("bfloat16", NO_MAIN), *PAIRS]:
        largest = max(DTYPES[name].size for name in (grad, main) if name != NO_MAIN)
        common = {"G": grad, "CHUNK": TRITON_CHUNK, "CLAMP": False, "V": vector_of(largest)}
        for norm_type in (0, 1, 2):
            ptx = compile_kernel(kernels.norm_pass, {**common, "M": main, "TYPE": norm_type}, TILES["norm"])
            found[f"norm/{grad}/{main}/{norm_type}"] = summary(ptx, TILES["norm"])
        if main == NO_MAIN:
            ptx = compile_kernel(kernels.scale_pass, common, TILES["scale"])
            found[f"scale/{grad}/{main}"] = summary(ptx, TILES["scale"])
        else:
            del common["CLAMP"]
            ptx = compile_kernel(kernels.accumulate_pass, {**common, "M": main}, TILES["accumulate"])
            found[f"accumulate/{grad}/{main}"] = summary(ptx, TILES["accumulate"])
    found["finalize"] = summary(compile_kernel(kernels.finalize_pass, {"TYPE": 0}, TILES["norm"]), TILES["norm"])
    print(json.dumps({"triton": triton.__version__, "kernels": found}))


if __name__ == "__main__":
    main()
