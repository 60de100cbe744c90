"""Which backend runs what, who decides, and what is said of one that cannot; and the reference backend, bit for bit."""

import copy
import math
import pickle
import threading
from types import SimpleNamespace

import format_cases
import pytest
import torch
from cases import (
    BY_RULE,
    CASES,
    DTYPES,
    PARAM_LAYOUTS,
    assert_same_bits,
    comparer,
    hard_values,
    memory,
    normal,
    parameter,
    parameters,
    set_gradients,
    train,
)

import fusedopt
from fusedopt import backends, clip, passes
from fusedopt.backends import cpu, cuda, for_device, nvrtc
from fusedopt.backends import triton as triton_backend
from fusedopt.plan import DeviceTables

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch):
    """Choices are remembered; tests that change what is installed must not see, nor leave, what others found."""
    monkeypatch.delenv("FUSEDOPT_BACKEND", raising=False)
    backends._resolve.cache_clear()
    yield
    backends._resolve.cache_clear()


def runs_on(opt) -> set[str]:
    """Names of the backends whose tables an optimizer has."""
    return {tables.backend.__name__.rpartition(".")[2] for tables in opt._plan.tables}


def stepped(device="cpu", **options):
    opt = fusedopt.AdamW(params := parameters([5, 300], device=device), **options)
    train(opt, params, 1)
    return opt


# ---- who decides --------------------------------------------------------------------------------------------------


def test_best_is_the_default(device):
    assert runs_on(stepped(device)) == {device.type}


def test_optimizer_before_context_before_environment(monkeypatch):
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")
    assert runs_on(stepped()) == {"reference"}
    with fusedopt.use_backend("cpu"):
        assert runs_on(stepped()) == {"cpu"}
        assert runs_on(stepped(backend="reference")) == {"reference"}
    with fusedopt.use_backend("auto"):
        assert runs_on(stepped()) == {"cpu"}
        with fusedopt.use_backend("reference"):
            assert runs_on(stepped()) == {"reference"}
        assert runs_on(stepped()) == {"cpu"}
    assert runs_on(stepped(backend="cpu")) == {"cpu"}
    monkeypatch.setenv("FUSEDOPT_BACKEND", "")
    assert runs_on(stepped()) == {"cpu"}


def test_context_ends_with_an_error_and_belongs_to_its_thread():
    with pytest.raises(KeyError), fusedopt.use_backend("reference"):
        found = []
        thread = threading.Thread(target=lambda: found.append(for_device(CPU)))
        thread.start()
        thread.join()
        assert found == [cpu] and for_device(CPU) is not cpu
        raise KeyError
    assert for_device(CPU) is cpu


def test_an_optimizer_changes_its_backend_between_steps():
    """New tables, the same states."""
    opts = [fusedopt.AdamW(parameters([5, 300]), max_grad_norm=math.inf) for _ in range(2)]
    for i, name in enumerate(("cpu", "reference", "auto", "reference")):
        with fusedopt.use_backend(name):
            train(opts[0], opts[0].param_groups[0]["params"], 1, first=i)
        assert runs_on(opts[0]) == {"cpu" if name == "auto" else name}
        train(opts[1], opts[1].param_groups[0]["params"], 1, first=i)
        assert_same_bits(memory(opts[0]), memory(opts[1]))
    plan = opts[1]._plan
    train(opts[1], opts[1].param_groups[0]["params"], 1)
    assert opts[1]._plan is plan  # and none without need


def test_backend_is_no_part_of_groups_and_checkpoints():
    opt = stepped(backend="reference")
    assert opt.backend == "reference"
    assert "backend" not in opt.param_groups[0] and "backend" not in opt.defaults
    assert "reference" not in str(opt.state_dict())
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert twin.backend == "reference"
    opt.backend = None
    train(opt, opt.param_groups[0]["params"], 1)
    assert runs_on(opt) == {"cpu"}


def test_functions_honour_the_choice_and_share_no_tables(monkeypatch):
    used = []
    begin = passes.begin
    monkeypatch.setattr(
        passes, "begin", lambda tables, *a, **k: (used.extend(t.backend for t in tables), begin(tables, *a, **k))
    )
    monkeypatch.setattr(clip, "_tables", passes.TablesCache())
    grads = [normal((50,))]
    norms = []
    for name in ("cpu", "reference", "cpu", "auto"):
        with fusedopt.use_backend(name):
            norms.append(fusedopt.get_total_norm(grads).item())
    assert [module.__name__.rpartition(".")[2] for module in used] == ["cpu", "reference", "cpu", "cpu"]
    assert norms == pytest.approx([norms[0]] * 4, rel=2 * 2.0**-23)


# ---- what is said -------------------------------------------------------------------------------------------------


def test_backends_says_what_there_is():
    found = fusedopt.backends()
    assert tuple(found) == backends.NAMES
    assert found["cpu"].available and found["reference"].available and not found["cpu"].reason
    for one in found.values():
        assert one.description and bool(one.reason) is not one.available
    if not torch.cuda.is_available():
        assert "GPU" in found["cuda"].reason
    assert fusedopt.backends.cpu is cpu  # still the package


@pytest.mark.parametrize("name", ["gpu", "", "CPU", 3])
def test_unknown_names(name, monkeypatch):
    with (
        pytest.raises(ValueError, match=r"use_backend: got .*expected 'auto' or one of cpu, cuda, triton, reference"),
        fusedopt.use_backend(name),
    ):
        pass
    with pytest.raises(ValueError, match="AdamW: backend: got"):
        fusedopt.AdamW(parameters([1]), backend=name)
    opt = stepped()
    with pytest.raises(ValueError, match="AdamW: backend: got"):
        opt.backend = name
    if name == "gpu":
        monkeypatch.setenv("FUSEDOPT_BACKEND", name)
        with pytest.raises(ValueError, match="FUSEDOPT_BACKEND: got 'gpu'"):
            stepped()


def test_backend_of_another_device_is_refused_before_anything_is_written(monkeypatch):
    with pytest.raises(RuntimeError, match="'cuda' was asked for on 'cpu', expected a CUDA device; move"):
        fusedopt.AdamW(parameters([3]), backend="cuda")
    opt = fusedopt.AdamW(params := parameters([3]))
    set_gradients(params)
    before = [p.detach().clone() for p in params]
    monkeypatch.setattr(triton_backend, "_is_interpreted", lambda: False)
    for name, text in (("cuda", "expected a CUDA device"), ("triton", "missing|expected a GPU")):
        with fusedopt.use_backend(name):
            with pytest.raises(RuntimeError, match=text):
                opt.step()
            with pytest.raises(RuntimeError, match=text):
                fusedopt.clip_grad_norm_(params, 1.0)
    assert_same_bits([p.detach() for p in params], before)
    assert not opt.state
    opt.step()


@pytest.mark.parametrize("name", ["cpu", "reference", "cuda", "triton"])
def test_backends_refuse_devices_that_they_do_not_know(name, monkeypatch):
    monkeypatch.setattr(triton_backend, "_is_installed", lambda: True)
    monkeypatch.setattr(triton_backend, "_version", lambda: (3, 6))
    with pytest.raises(RuntimeError, match=f"backend '{name}' was asked for on 'meta'.*expected"):
        for_device(torch.device("meta"), name)


def test_tritons_interpreter_does_not_take_gpus(monkeypatch):
    monkeypatch.setattr(triton_backend, "_is_installed", lambda: True)
    monkeypatch.setattr(triton_backend, "_version", lambda: (3, 6))
    monkeypatch.setattr(triton_backend, "_is_interpreted", lambda: True)
    with pytest.raises(RuntimeError, match=r"on 'cuda' with TRITON_INTERPRET=1.*unset it"):
        triton_backend.require_available(torch.device("cuda"))


def test_triton_missing_or_too_old(monkeypatch):
    monkeypatch.setattr(triton_backend, "_is_installed", lambda: False)
    with pytest.raises(RuntimeError, match=r"triton, which is missing; install it with `pip install 'triton>=3.2'`"):
        fusedopt.AdamW(parameters([3]), backend="triton")
    assert "missing" in fusedopt.backends()["triton"].reason
    monkeypatch.setattr(triton_backend, "_is_installed", lambda: True)
    monkeypatch.setattr(triton_backend, "_version", lambda: (2, 1))
    with pytest.raises(RuntimeError, match=r"got triton 2.1, expected 3.2 or newer"):
        fusedopt.AdamW(parameters([3]), backend="triton")


def test_gpus_fall_back_to_triton(monkeypatch):
    """What is chosen for devices that this machine may lack, by what is installed."""
    gpu, intel = torch.device("cuda", 0), torch.device("xpu", 0)
    monkeypatch.setattr(triton_backend, "_is_installed", lambda: True)
    monkeypatch.setattr(triton_backend, "_version", lambda: (3, 6))
    monkeypatch.setattr(triton_backend, "_is_interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)

    def chosen(device):
        backends._resolve.cache_clear()
        return for_device(device)

    def missing():
        raise RuntimeError("fusedopt: cuda-core is missing; install cuda-core")

    monkeypatch.setattr(nvrtc, "require_compiler", lambda: None)
    monkeypatch.setattr(nvrtc, "has_nvrtc", lambda: True)
    assert chosen(gpu) is cuda
    assert chosen(intel) is triton_backend
    monkeypatch.setattr(nvrtc, "has_nvrtc", lambda: False)
    assert chosen(gpu) is triton_backend
    monkeypatch.setattr(nvrtc, "require_compiler", missing)
    assert chosen(gpu) is triton_backend
    monkeypatch.setattr(triton_backend, "_is_installed", lambda: False)
    with pytest.raises(RuntimeError, match=r"no backend can run on 'cuda:0'.*install cuda-core.*pip install 'triton"):
        chosen(gpu)
    monkeypatch.setattr(nvrtc, "require_compiler", lambda: None)
    assert chosen(gpu) is cuda  # without NVRTC, if there is nothing else: its cache may do
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.raises(RuntimeError, match="triton, which is missing"):
        chosen(gpu)
    monkeypatch.setattr(triton_backend, "_is_installed", lambda: True)
    assert chosen(gpu) is triton_backend
    with pytest.raises(RuntimeError, match="'cuda' was asked for on a ROCm build"):
        for_device(gpu, "cuda")
    with pytest.raises(RuntimeError, match="got a tensor on device 'mps'"):
        chosen(torch.device("mps"))


# ---- the reference backend ----------------------------------------------------------------------------------------


def assert_same_numbers(actual, expected):
    """Same bits, except that NaN may carry any payload and sign."""
    for a, e in zip(actual, expected, strict=True):
        if a.is_floating_point():
            assert torch.equal(a.isnan(), e.isnan())
            a, e = a.nan_to_num(7.0, math.inf, -math.inf), e.nan_to_num(7.0, math.inf, -math.inf)
        assert_same_bits(a, e)


def reference_and_own(make, params, **options):
    own = [parameter(p.detach().clone()) for p in params]
    return make(own, backend="reference", **options), make(params, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_backend(case, dtype, device):
    opts = reference_and_own(case.make, parameters([0, 1, 17, 4097], dtype, device, values=hard_values))
    for seed in range(3):
        for opt in opts:
            set_gradients(params := opt.param_groups[0]["params"], seed, hard_values)
            if seed == 1:
                params[-1].grad[:3] = torch.tensor([math.inf, -math.inf, math.nan])
            opt.step()
        comparer(assert_same_numbers, case.rule, dtype, 3)(memory(opts[0]), memory(opts[1]))


@pytest.mark.parametrize("combination", format_cases.COMBINATIONS, ids=str)
@pytest.mark.parametrize("case", BY_RULE, ids=str)
def test_reference_backend_in_formats(case, combination):
    options = {**combination.options, "min_8bit_size": 0}
    options |= {"seed": 2**63 + 5} if combination.is_random else {}
    opts = reference_and_own(case.make, parameters([0, 9, 257, 4097], combination.dtype), **options)
    for seed in range(3):
        for opt in opts:
            for i, p in enumerate(opt.param_groups[0]["params"]):
                p.grad = format_cases.hard_gradient(p, p.dtype, 100 * seed + i)
            opt.step()
        assert_same_numbers(memory(opts[0]), memory(opts[1]))


@pytest.mark.parametrize("layout", PARAM_LAYOUTS)
def test_reference_backend_on_layouts(layout, device):
    opts = []
    for name in ("reference", None):
        p = parameter(PARAM_LAYOUTS[layout](lambda shape: normal(shape, device=device)))
        opts.append(fusedopt.AdamW([p], backend=name))
        train(opts[-1], [p], 2)
    assert_same_bits(memory(opts[0]), memory(opts[1]))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_reference_backend_clips_and_skips(norm_type, device):
    options = dict(max_grad_norm=0.5, norm_type=norm_type, max_grad_value=2.0, nonfinite="skip")
    opts = reference_and_own(fusedopt.AdamW, parameters([5, 300], device=device), **options)
    for seed, bad in enumerate((False, True, False)):
        for opt in opts:
            opt.grad_scale = torch.tensor(4.0, device=device)
            set_gradients(params := opt.param_groups[0]["params"], seed, scale=4.0)
            if bad:
                params[0].grad[0] = math.nan
            before = memory(opt)
            opt.step()
            assert opt.step_was_skipped.item() is bad
            if bad:
                assert_same_bits(memory(opt), before)
        torch.testing.assert_close(opts[0].grad_norm, opts[1].grad_norm, rtol=2 * 2.0**-23, atol=0, equal_nan=True)
        if torch.equal(opts[0].clip_coef, opts[1].clip_coef):
            assert_same_bits(memory(opts[0]), memory(opts[1]))
    assert opts[0].skipped_steps == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_backend_in_functions(dtype, device):
    results = []
    for name in ("reference", "auto"):
        params = parameters([3, 300], dtype, device)
        set_gradients(params, scale=4.0)
        with fusedopt.use_backend(name):
            found = fusedopt.unscale_grads_(params, torch.tensor(3.0, device=device))
            fusedopt.clip_grad_value_(params, 0.5)
            params[0].grad[0] = math.inf
            found_inf = fusedopt.unscale_grads_(params, 1.0)
        assert (found, found_inf) == (0.0, 1.0)
        results.append([p.grad for p in params])
    assert_same_bits(*results)


def test_backends_say_what_a_gpu_lacks(monkeypatch):
    """Of the device that would suit the backend best; where torch sees none, what a GPU would need beside itself."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert "torch finds no GPU; see whether the driver does" in fusedopt.backends()["cuda"].reason
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert fusedopt.backends()["cuda"].reason.startswith("backend 'cuda' was asked for on 'xpu:0'")
    assert fusedopt.backends()["cpu"].available


@pytest.mark.parametrize("metadata, alone", [({}, True), ({"num_ctas": 2}, False), ({"global_scratch_size": 8}, False)])
def test_launches_without_tritons_launcher(metadata, alone):
    """Where a kernel needs nothing but its arguments."""
    compiled = SimpleNamespace(num_warps=4, profile_scratch_size=0, **metadata)
    assert triton_backend._takes_words_alone(compiled) == alone


def test_reference_backend_rectifies_from_the_sixth_step_on(device):
    """RAdam at beta2 = 0.999: five steps without a second moment, then with it."""
    opts = reference_and_own(fusedopt.RAdam, parameters([5, 300], device=device))
    for seed in range(8):
        for opt in opts:
            set_gradients(opt.param_groups[0]["params"], seed)
            opt.step()
        comparer(assert_same_numbers, "radam", torch.float32, 3)(memory(opts[0]), memory(opts[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reference_backend_reads_learning_rates_in_place(dtype, monkeypatch):
    """As on GPUs. On the CPU tensors are read by the host; the address is put in by hand."""
    lr, pack = torch.tensor(0.3, dtype=dtype), DeviceTables.pack_hypers

    def with_address(self, groups):
        pack(self, groups)
        if self.backend.__name__.endswith("reference"):
            self.buckets[0].hypers.set_value(0, 0, math.nan)
            self.buckets[0].hypers.set_lr_address(0, lr.data_ptr(), dtype == torch.float64)

    monkeypatch.setattr(DeviceTables, "pack_hypers", with_address)
    opts = reference_and_own(fusedopt.Lion, parameters([5]), lr=lr)
    for seed in range(2):
        for opt in opts:
            set_gradients(opt.param_groups[0]["params"], seed)
            opt.step()
    assert_same_numbers(memory(opts[0]), memory(opts[1]))
    assert not memory(opts[0])[0].isnan().any()
