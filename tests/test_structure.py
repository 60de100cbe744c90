"""The layers import one way, the registries agree, and shared memory is read where the C++ structs have it."""

import ast
import ctypes
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from bounds import state_keys
from cases import CASES, parameters, set_gradients
from format_cases import TOGETHER

import fusedopt
from fusedopt import _C, functional, reference, structs
from fusedopt.control import Control
from fusedopt.plan import SEGMENT, dtype_code
from fusedopt.specs import COMPLEX_DTYPES, DTYPES, NORM_TYPES, PARAM_FORMATS, RULES, STATE_BLOCK, STATE_FORMATS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, CSRC = ROOT / "fusedopt", ROOT / "csrc"
MAX_LINES = 600

PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
CXX_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cuh"))
PUBLIC = [getattr(fusedopt, name) for name in fusedopt.__all__]
OPTIMIZERS = [cls for cls in PUBLIC if isinstance(cls, type) and fusedopt.FusedOptimizer in cls.__mro__[1:]]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- Python layers ------------------------------------------------------------------------------------------------

# A module or subpackage may import those of lower rank, and its own. `reference` judges the others: it shares nothing.
RANKS = {
    "reference": 0,
    "specs": 0,
    "structs": 0,
    "_C": 0,
    "formats": 1,
    "control": 1,
    "sharding": 1,
    "checks": 2,
    "compiling": 1,
    "hooks": 1,
    "plan": 2,
    "triton": 2,
    "tensor_norms": 3,
    "backends": 3,
    "passes": 4,
    "functional": 5,
    "clip": 5,
    "main_grads": 5,
    "optim": 6,
    "accumulate": 7,
    "convert": 7,
    "scaler": 7,
    "testing": 8,
    "__init__": 9,
    "bench": 10,
    "integrations": 10,
    "doctor": 10,
    "cli": 11,
    "__main__": 12,
}


def unit_of(path: Path) -> str:
    """The module or subpackage directly below fusedopt/ that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Absolute dotted names of all that a file imports, at any depth; of `from x import y` both x and x.y."""
    package = ["fusedopt", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def imported_units(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported_modules(path) if name.startswith("fusedopt.")]
    return {part[1] for part in parts if part[1] in RANKS}


def test_every_module_has_a_rank():
    """A new module must be put into its layer here."""
    units = {unit_of(path) for path in PYTHON_FILES} | {"_C"}
    assert units == RANKS.keys()


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_imports_point_one_way(path):
    unit = unit_of(path)
    upward = {other for other in imported_units(path) if other != unit and RANKS[other] >= RANKS[unit]}
    assert not upward, f"{name_of(path)} imports {sorted(upward)}, which are not below it"


@pytest.mark.parametrize("name", ["specs", "structs"])
def test_imports_the_standard_library_only(name):
    assert {name.split(".")[0] for name in imported_modules(PACKAGE / f"{name}.py")} <= sys.stdlib_module_names


def test_only_the_triton_engine_imports_triton():
    """And the backend, inside functions: triton may be missing."""
    importers = {name_of(p) for p in PYTHON_FILES if any(m.split(".")[0] == "triton" for m in imported_modules(p))}
    engine = {name_of(p) for p in PYTHON_FILES if unit_of(p) == "triton"}
    assert importers - engine == {"fusedopt/backends/triton.py"}
    top_level = ast.parse((PACKAGE / "backends/triton.py").read_text()).body
    named = [alias.name for node in top_level if isinstance(node, ast.Import) for alias in node.names]
    assert "triton" not in named


def test_only_the_integrations_import_trainers():
    """Each the library that it is named after, so that ``import fusedopt`` imports none of them."""
    trainers = {"transformers", "accelerate", "lightning"}
    for path in PYTHON_FILES:
        imported = {module.split(".")[0] for module in imported_modules(path)} & trainers
        assert imported <= ({path.stem} if unit_of(path) == "integrations" else set()), name_of(path)


def test_reference_imports_torch_only():
    assert {name.split(".")[0] for name in imported_modules(PACKAGE / "reference.py")} == {"torch"}


# ---- C++ layers ---------------------------------------------------------------------------------------------------

MAY_INCLUDE = {
    "core": {"core"},
    "rules": {"core", "rules"},
    "formats": {"core", "formats"},
    "cpu": {"core", "rules", "formats", "cpu", "host"},
    "cuda": {"core", "rules", "formats", "cuda"},
    "host": {"core", "host"},
    "bindings.cpp": {"core", "rules", "cpu", "cuda", "host"},
}
NVRTC_READS = ("core", "rules", "formats", "cuda")


def includes(path: Path) -> list[tuple[str, str]]:
    """(quote or angle bracket, what is included) of each #include."""
    return re.findall(r'^\s*#\s*include\s*(["<])([^">]+)[">]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", CXX_FILES, ids=name_of)
def test_cxx_includes_point_one_way(path):
    unit = path.relative_to(CSRC).parts[0]
    for quote, name in includes(path):
        if quote == '"':
            included = (path.parent / name).resolve()
            assert included.is_file(), f"{name} is not beside the file that includes it"
            assert included.relative_to(CSRC).parts[0] in MAY_INCLUDE[unit], f"{unit} must not include {name}"
        else:
            library = name.split("/")[0]
            assert library not in ("torch", "ATen", "c10", "caffe2") and not name.startswith("cuda"), name


def test_nvrtc_is_given_no_system_header():
    """Except in the branch of platform.h that it does not read."""
    found = {
        (name_of(path), name)
        for path in CXX_FILES
        if path.relative_to(CSRC).parts[0] in NVRTC_READS
        for quote, name in includes(path)
        if quote == "<"
    }
    assert found == {("csrc/core/platform.h", "cmath")}
    before = (CSRC / "core/platform.h").read_text().split("#include <cmath>")[0]
    assert re.findall(r"^#(?:if|else).*", before, re.MULTILINE) == ["#if defined(__CUDACC__)", "#else"]


def test_every_cxx_source_is_built():
    built = set(re.findall(r'"(csrc/[^"]+\.cpp)"', (ROOT / "setup.py").read_text()))
    assert built == {name_of(path) for path in CXX_FILES if path.suffix == ".cpp"}


def test_every_package_is_installed():
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    sources = {"fusedopt._csrc", *(f"fusedopt._csrc.{folder}" for folder in NVRTC_READS)}
    assert set(re.findall(r'"([^"]+)"', listed[1])) == packages | sources


# ---- registries ---------------------------------------------------------------------------------------------------


def test_specs_agree_with_cxx_rules():
    keys = ("struct_name", "name", "states", "moments", "norms", "hyper")
    found = [[row[key] for key in keys] for row in _C.rules()]
    expected = [
        [
            spec.cpp,
            spec.name,
            list(spec.states),
            list(spec.moments),
            spec.norms,
            [hyper for hyper, _, _ in spec.hyper],
        ]
        for spec in sorted(RULES.values(), key=lambda spec: spec.index)
    ]
    assert found == expected
    assert [spec.index for spec in RULES.values()] == list(range(len(RULES)))
    assert all(row["num_states"] == len(row["states"]) == len(row["moments"]) for row in _C.rules())
    assert {moment for spec in RULES.values() for moment in spec.moments} == {"first", "second"}


def test_specs_agree_with_the_reference():
    assert reference.RULES.keys() == RULES.keys()
    for name, spec in RULES.items():
        assert reference.STATES[name] == spec.states
        signature = inspect.signature(reference.RULES[name]).parameters
        assert tuple(signature)[:2] == ("param", "grad")
        assert tuple(signature)[2 : 2 + len(spec.states)] == spec.states
        keywords = {key for key, parameter in signature.items() if parameter.kind is parameter.KEYWORD_ONLY}
        assert keywords == {"step"} | {key for _, key, _ in spec.hyper}


def test_specs_agree_with_the_triton_rules():
    """Names, and one argument for each state; read from the text, since triton may be missing."""
    functions = {
        node.name: [arg.arg for arg in node.args.args]
        for node in ast.parse((PACKAGE / "triton/rules.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    for name, spec in RULES.items():
        assert functions[name][: 2 + len(spec.states)] == ["param", "grad", *spec.states]
        assert len(functions[name]) == 2 + len(spec.states) + 10  # coefficients


def test_specs_agree_with_the_rules_of_the_reference_backend():
    from fusedopt.backends.reference_rules import RULES as in_torch
    from fusedopt.backends.reference_rules import TERMS

    assert TERMS.keys() == {name for name, spec in RULES.items() if spec.norms}
    assert in_torch.keys() == RULES.keys()
    for name, spec in RULES.items():
        given = ("param", "grad", *spec.states, "hyper", "step")
        names = tuple(inspect.signature(in_torch[name]).parameters)
        assert names[: len(given)] == given and len(names) == len(given) + spec.norms


def test_specs_agree_with_the_optimizers():
    assert {cls.rule for cls in OPTIMIZERS} == {spec.family for spec in RULES.values()}
    for cls in OPTIMIZERS:
        keys = {key for spec in RULES.values() if spec.family == cls.rule for _, key, _ in spec.hyper}
        assert keys <= inspect.signature(cls).parameters.keys()
        assert keys <= cls(parameters([1])).param_groups[0].keys()


def test_specs_agree_with_the_functions():
    assert {f"{spec.family}_" for spec in RULES.values()} == set(functional.__all__)
    for spec in RULES.values():
        signature = inspect.signature(getattr(functional, f"{spec.family}_")).parameters
        assert {key for _, key, _ in spec.hyper} <= signature.keys()
        assert {f"{state}s" for state in spec.states} <= signature.keys()


def test_specs_agree_with_the_test_table():
    assert {case.rule for case in CASES} == RULES.keys()
    assert {case.optimizer for case in CASES} == {cls.__name__ for cls in OPTIMIZERS}
    for case in CASES:
        opt = case.make(params := parameters([3]))
        set_gradients(params)
        opt.step()
        assert opt.state.get(params[0], {}).keys() == state_keys(case.rule), case


def enumerators(name: str) -> dict[str, int]:
    """Of an enum class in structs.h, in its order; those without a value count on."""
    body = re.search(rf"enum class {name} : int32 {{(.*?)}}", (CSRC / "core/structs.h").read_text(), re.DOTALL)[1]
    found = {}
    for key, value in re.findall(r"(\w+)(?: = (\d+))?(?:,|\s*$)", body):
        found[key] = int(value) if value else max(found.values(), default=-1) + 1
    return found


def constant(path: str, name: str) -> int:
    return int(re.search(rf"constexpr \w+ {name} = (\d+);", (CSRC / path).read_text())[1])


def test_dtypes_agree_with_cxx():
    assert enumerators("DType") == {f"k{spec.cpp}": spec.code for spec in DTYPES.values()}
    assert constant("core/structs.h", "kNumDTypes") == len(DTYPES)
    assert [dtype_code(getattr(torch, name)) for name in COMPLEX_DTYPES] == [len(DTYPES), len(DTYPES) + 1]
    formats = (CSRC / "formats/plain.h").read_text()
    assert all(re.search(rf"^struct {spec.cpp} {{", formats, re.MULTILINE) for spec in DTYPES.values())
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES)


def listed(path: str, macro: str) -> list[str]:
    """The arguments of X in a list macro, in its order."""
    body = re.search(rf"#define {macro}\(X\)((?:.*\\\n)*.*)", (CSRC / path).read_text())[1]
    return re.findall(r"X\((\w+)\)", body)


FORMATS = {
    "param": (PARAM_FORMATS, "ParamFormat", "kNumParamFormats", "FUSEDOPT_FOR_EACH_PARAM_FORMAT"),
    "state": (STATE_FORMATS, "StateFormat", "kNumStateFormats", "FUSEDOPT_FOR_EACH_STATE_FORMAT"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_agree_with_cxx(kind):
    """Names and order in specs, in the list of structs and in the enum, whose names leave out what kind they are of."""
    registry, enum, number, macro = FORMATS[kind]
    structs = [spec.cpp for spec in registry.values()]
    assert listed(f"formats/{kind}.h", macro) == structs
    plain = (re.sub("^(Plain|State)|(Param|State)$", "", struct) for struct in structs)
    assert enumerators(enum) == {f"k{name}": spec.code for name, spec in zip(plain, registry.values(), strict=True)}
    assert [spec.code for spec in registry.values()] == list(range(constant("core/structs.h", number)))
    assert all(name == spec.name for name, spec in registry.items())


def test_traits_of_formats_agree_with_cxx():
    """Which are random, keep a second tensor, or share scales; as far as the structs say it in a line of their own."""
    texts = {kind: (CSRC / f"formats/{kind}.h").read_text() for kind in FORMATS}

    def body(kind: str, struct: str) -> str:
        alias = re.search(rf"^using {struct} = (\w+)<", texts[kind], re.MULTILINE)
        name = alias[1] if alias else struct
        return re.search(rf"^struct {name} {{(.*?)^}};", texts[kind], re.MULTILINE | re.DOTALL)[1]

    extras = {None: "NoExtra", "float32": "Float32", "int16": "Int16Bits", "int8": "Int8Bits"}
    for spec in PARAM_FORMATS.values():
        text = body("param", spec.cpp)
        assert ("kRandom = true" in text) == spec.random
        assert f"using Extra = {extras[spec.extra and spec.extra[1]]};" in text
    for spec in STATE_FORMATS.values():
        text = body("state", spec.cpp)
        assert ("kRandom = true" in text or "kDithered = true" in text) == spec.random
        assert ("kBlocked = true" in text) == spec.blocked


def test_sizes_agree_with_cxx():
    assert constant("formats/state.h", "kStateBlock") == STATE_BLOCK
    assert constant("cuda/vectors.cuh", "kSegment") == SEGMENT
    assert constant("cuda/vectors.cuh", "kTogether") == TOGETHER


def test_norm_types_agree_with_cxx():
    assert enumerators("NormType") == dict(NORM_TYPES.values())


def test_rows_hold_every_rule():
    assert max(len(spec.states) for spec in RULES.values()) <= constant("core/structs.h", "kMaxStates")
    assert max(len(spec.hyper) for spec in RULES.values()) <= constant("core/structs.h", "kMaxHyper")
    assert max(spec.norms for spec in RULES.values()) <= constant("core/structs.h", "kMaxNorms")


def test_thread_block_agrees_with_the_kernels():
    assert constant("host/cuda_driver.h", "kCudaThreads") == constant("cuda/tuning.cuh", "kThreads")


# ---- memory shared with C++ ---------------------------------------------------------------------------------------

CXX_TYPES = {
    "double": torch.float64,
    "float": torch.float32,
    "int64": torch.int64,
    "uint32": torch.int32,
}
VIEWS = {
    "local_sums": "sum",
    "total_norm64": "total_norm",
    "clip_coef64": "clip_coef",
    "total_norm": "total_norm_f32",
    "clip_coef": "clip_coef_f32",
    "norm_found_inf": "found_inf",
    "skipped": "skipped",
    "skipped_steps": "skipped_steps",
}


def struct_fields(name: str) -> dict[str, tuple[int, torch.dtype]]:
    """Offset in bytes and type of each field of a struct of numbers in structs.h, laid out as C++ does."""
    body = re.search(rf"^struct {name} {{(.*?)^}};", (CSRC / "core/structs.h").read_text(), re.MULTILINE | re.DOTALL)[1]
    fields, offset = {}, 0
    for line in filter(None, (line.split("//")[0].strip() for line in body.splitlines())):
        cxx_type, field = re.fullmatch(r"(\w+) (\w+);", line).groups()
        size = CXX_TYPES[cxx_type].itemsize
        offset += -offset % size
        fields[field] = (offset, CXX_TYPES[cxx_type])
        offset += size
    return fields


C_TYPES = {
    "double": ctypes.c_double,
    "float": ctypes.c_float,
    "int64": ctypes.c_int64,
    "uint64": ctypes.c_uint64,
    "int32": ctypes.c_int32,
    "uint32": ctypes.c_uint32,
    "NormType": ctypes.c_int32,
    "Scaling": structs.Scaling,
    "NormOptions": structs.NormOptions,
}


@pytest.mark.parametrize(
    ("cxx", "path", "struct"),
    [
        ("TensorEntry", "core/structs.h", structs.TensorEntry),
        ("Chunk", "core/structs.h", structs.Chunk),
        ("Hyper", "core/structs.h", structs.Hyper),
        ("Control", "core/structs.h", structs.Control),
        ("NormOptions", "core/structs.h", structs.NormOptions),
        ("Scaling", "core/structs.h", structs.Scaling),
        ("CudaPartial", "cuda/args.h", structs.Partial),
        ("PassArgs", "cuda/args.h", structs.PassArgs),
    ],
)
def test_structs_agree_with_cxx(cxx, path, struct):
    """Names, order and types of fields; pointers are unsigned integers."""
    body = re.search(rf"^struct {cxx} {{(.*?)^}};", (CSRC / path).read_text(), re.MULTILINE | re.DOTALL)[1]
    expected = []
    for line in filter(None, (line.split("//")[0].strip() for line in body.splitlines())):
        kind, pointer, field, size = re.fullmatch(r"(?:const )?(\w+)(\*?) (\w+)(?:\[(\w+)\])?;", line).groups()
        c_type = ctypes.c_uint64 if pointer else C_TYPES[kind]
        if size:
            c_type = c_type * (int(size) if size.isdigit() else constant("core/structs.h", size))
        expected.append((field, c_type))
    assert list(struct._fields_) == expected


def test_structs_read_what_the_extension_packs():
    """Values put in through the bindings come out of the right fields."""
    table = _C.Table(4)
    table.add(param=1, extra=2, states=[3, 4], scales=[5, 6], step=7, main_grad=15, numel=9, group=1, id=11)
    entry, chunks = structs.rows(structs.TensorEntry, table.entries())[0], structs.rows(structs.Chunk, table.chunks())
    assert (entry.param, entry.extra, list(entry.states), list(entry.scales)) == (1, 2, [3, 4, 0, 0], [5, 6, 0, 0])
    assert (entry.step, entry.numel, entry.group, entry.id, entry.chunks, entry.ticket) == (7, 9, 1, 11, 3, 0)
    assert entry.main_grad == 15
    assert [(chunk.tensor, chunk.index, chunk.numel) for chunk in chunks] == [(0, 0, 9), (0, 1, 9), (0, 2, 9)]
    hypers, args = _C.Hypers([("lr", -1), ("betas", 1)]), _C.PassArgs()
    hypers.pack([{"lr": 0.5, "betas": (0.25, 0.75)}, {"lr": 1, "betas": (0.0, 0.125), "maximize": True}])
    hypers.set_lr_address(1, 13, True)
    table.set_grad(0, 18)
    for name in ("tensors", "chunks", "step_table", "control", "partials", "norms", "seed"):
        setattr(args, name, 100 + len(name))
    for name in ("num_groups", "num_chunks", "lead", "first_partial", "num_partials", "finalize"):
        setattr(args, name, 200 + len(name))
    _C.set_scalars([args], 21, 22, 23, 24, 0.5, 1.5, 2, True, 25, 3.5, 26, 4.5, 27)
    size = ctypes.sizeof(structs.PassArgs)
    buffer = torch.zeros(size + table.packed_bytes(2), dtype=torch.uint8)
    assert _C.pack_step(buffer.data_ptr(), 0, args, table, hypers)
    packed = bytes(buffer.tolist())
    read = structs.rows(structs.PassArgs, packed[:size])[0]
    for name in ("tensors", "chunks", "step_table", "control", "partials", "norms", "seed"):
        assert getattr(read, name) == 100 + len(name)
    for name in ("num_groups", "num_chunks", "lead", "first_partial", "num_partials", "finalize"):
        assert getattr(read, name) == 200 + len(name)
    scaling, norm = read.scaling, read.norm
    assert (scaling.grad_scale, scaling.found_inf, scaling.clip_coef, scaling.max_grad_value) == (21, 22, 23, 0.5)
    assert (scaling.grad_weight, scaling.grad_divisor) == (3.5, 4.5)
    assert (scaling.grad_weight_at, scaling.grad_divisor_at) == (26, 27)
    assert (read.norm_found_inf, read.nonfinite_out) == (24, 25)
    assert (norm.max_norm, norm.type, norm.skip_nonfinite) == (1.5, 2, 1)
    end = size + 2 * ctypes.sizeof(structs.Hyper)
    rows = structs.rows(structs.Hyper, packed[size:end])
    assert [list(row.value)[:2] for row in rows] == [[0.5, 0.75], [1.0, 0.125]]
    assert [(row.lr, row.lr_is_double, row.maximize) for row in rows][1] == (13, 1, 1)
    assert int.from_bytes(packed[end:], "little") == 18
    assert not _C.pack_step(0, buffer.data_ptr(), args, table, hypers)  # nothing new: nothing written


def test_control_reads_the_struct_where_it_is():
    control, fields = Control(torch.device("cpu")), struct_fields("Control")
    views = {name for name, value in vars(control).items() if isinstance(value, torch.Tensor)} - {"buffer"}
    assert views == VIEWS.keys()
    for name, field in VIEWS.items():
        view = getattr(control, name)
        assert (view.data_ptr() - control.address, view.dtype) == fields[field], name
    assert fields["nonfinite"] == (fields["sum"][0] + 8, torch.float64)  # local_sums holds both
    assert control.local_sums.shape == (2,)
    last, dtype = list(fields.values())[-1]
    assert control.buffer.nbytes == last + dtype.itemsize


# ---- torch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adagrad", "RAdam"])
def test_state_dict_has_torchs_keys(name):
    def keys(module):
        params = parameters([3])
        opt = getattr(module, name)(params)
        set_gradients(params)
        opt.step()
        saved = opt.state_dict()
        return saved.keys(), saved["param_groups"][0].keys(), saved["state"][0].keys()

    assert keys(fusedopt) == keys(torch.optim)


# ---- the repository -----------------------------------------------------------------------------------------------


def test_versions_agree():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert version == fusedopt.__version__


def lines_to_read(path):
    """Without the rows of tables in pages, which are written from results and looked up."""
    lines = path.read_text().splitlines()
    return sum(path.suffix != ".md" or not line.startswith("|") for line in lines)


def test_files_are_short():
    folders = ("fusedopt", "csrc", "tests", "benchmarks", "examples", "docs", ".ci")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    paths += [path for path in ROOT.iterdir() if path.is_file()]
    texts = [path for path in paths if path.suffix in (".py", ".h", ".cuh", ".cpp", ".md", ".toml")]
    texts += [ROOT / "Makefile", ROOT / ".ci/run"]
    lengths = {name_of(path): lines_to_read(path) for path in texts}
    assert not {name: length for name, length in lengths.items() if length >= MAX_LINES}


def test_test_files_have_names_of_their_own():
    """pytest imports them by these: of two alike one is not collected, which a run of either folder does not show."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
