"""The workloads have the shapes of the models whose names they bear."""

import math

import pytest
import torch

from fusedopt.bench import suites
from fusedopt.bench.checks import check
from fusedopt.bench.contracts import Case, build
from fusedopt.bench.workloads import COUNTS, SIZES, WORKLOADS, Model, Workload

PUBLISHED = {
    "gpt2-124M": (124_439_808, 148),  # GPT-2's checkpoint, its head tied
    "llama-1.3B": (1_345_423_360, 219),  # Sheared-LLaMA-1.3B
    "resnet50": (25_557_032, 161),  # torchvision
    "vit-l": (304_326_632, 296),  # torchvision's vit_l_16
    "bert-large": (335_141_888, 391),  # bert-large-uncased with its pooler
    "one-huge": (2_200_000_000, 1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters_is_the_published_one(name):
    assert (WORKLOADS[name].numel, len(WORKLOADS[name].shapes)) == PUBLISHED[name]


def test_shard_is_an_eighth_of_llama_8b():
    assert 8 * WORKLOADS["llama-8B-shard"].numel == 8_030_261_248  # Llama 3 8B
    assert len(WORKLOADS["llama-8B-shard"].shapes) == 291


def test_many_small_ones_are_as_many_as_they_say():
    assert len(WORKLOADS["1000-small"].shapes) == 1000
    assert len(WORKLOADS["10000-tiny"].shapes) == 10_000
    assert WORKLOADS["10000-tiny"].numel / 10_000 < 256
    assert [len(WORKLOADS[f"tensors-{count}"].shapes) for count in COUNTS] == list(COUNTS)
    names = ["size-1e3", "size-1e4", "size-1e5", "size-1e6", "size-1e7", "size-1e8", "size-1e9", "size-4e9"]
    assert [WORKLOADS[name].numel for name in names] == sorted(SIZES)


def test_odd_tensors_are_odd():
    assert all(math.prod(shape) % 4 for shape in WORKLOADS["llama-1.3B-odd"].shapes)


@pytest.mark.parametrize("offsets", [(1, 1), (1, 2)])
def test_misaligned_tensors_lie_where_they_should_and_are_stepped_right(offsets, monkeypatch):
    workload = Workload("shifted", ((33, 7), (5,)), offsets=offsets)
    monkeypatch.setitem(WORKLOADS, "shifted", workload)
    model = Model(workload, torch.float32, torch.device("cpu"))
    model.backward()
    assert {param.data_ptr() % 16 for param in model.params} == {4 * offsets[0]}
    assert {param.grad.data_ptr() % 16 for param in model.params} == {4 * offsets[1]}
    assert all(torch.equal(param.grad, gradient) for param, gradient in zip(model.params, model.gradients))
    case = Case("shifted", "adamw", "fp32", "clip_step")
    assert check(case, build("fusedopt", case, model.params), model) <= 1


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
@pytest.mark.parametrize("suite", suites.suites("cpu"))
def test_suites_name_what_there_is(suite, device_type):
    cases = suites.select_cases(suite, device_type)
    assert cases and len(set(cases)) == len(cases)
    for case in cases:
        assert case.workload in WORKLOADS and case.contract in suites.CONTRACTS
        assert case.bytes_per_param > 0


def test_cases_are_combined_without_a_suite():
    cases = suites.select_cases(None, "cpu", ("tiny",), ("adamw", "lion"), (), ("step", "accumulate"))
    assert list(map(str, cases)) == ["tiny/adamw/fp32/step", "tiny/none/fp32/accumulate", "tiny/lion/fp32/step"]
