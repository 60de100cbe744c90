"""The benchmark of streams: its kernels compile, its check notices wrong results, its figures fit together."""

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not installed with the package

from benchmarks import streams
from benchmarks.streams import APART, COPY, KERNELS, UNIT
from fusedopt.backends import nvrtc

SHARED_BYTES = 227 << 10  # of a multiprocessor of sm_90
CPU = torch.device("cpu")


def in_turn(kernel):
    """What a kernel does to arrays, by torch."""

    def launch(arrays):
        for array in arrays[: kernel.written]:
            array += sum(arrays[kernel.written : kernel.read])

    return launch


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_kernels_compile(kernel):
    """For sm_90, and for sm_80 too where they need no bulk copies; blocks fit on a multiprocessor."""
    for arch in ("sm_90",) if kernel.shared_bytes else ("sm_80", "sm_90"):
        cubin = nvrtc.compile_kernel(kernel, arch)
        assert cubin.startswith(b"\x7fELF") and nvrtc.ENTRY.encode() in cubin
    assert kernel.way.per_multiprocessor * (kernel.shared_bytes + 1024) <= SHARED_BYTES


@pytest.mark.parametrize("way", streams.WAYS, ids=lambda way: way.name)
def test_nothing_is_left_over(way):
    """Of a unit: neither by groups of blocks nor by tiles."""
    *_, third, fourth = map(int, way.call.format(0, 0).strip("bulkocs<>").split(","))
    rounds, group, tile = (third, fourth, 1) if way.chunk else (0, 1, third)
    assert way.chunk == rounds * streams.ROUND
    assert UNIT % max(1, way.chunk * group) == 0 and UNIT % tile == 0


@pytest.mark.parametrize("apart", APART)
def test_arrays_fill_their_pool(apart):
    pool = streams.make_pool(UNIT, CPU)
    first, *_, last = arrays = streams.arrays_in(pool, UNIT, apart)
    assert {len(array) for array in arrays} == {UNIT}
    assert arrays[1].data_ptr() - (first.data_ptr() + first.nbytes) == apart
    assert last.data_ptr() + last.nbytes <= pool.data_ptr() + pool.nbytes


@pytest.mark.parametrize("kernel", KERNELS[:: len(KERNELS) // 2], ids=str)
def test_wrong_results_are_noticed(kernel):
    right = in_turn(kernel)
    streams.check(kernel, right, 1024, CPU)

    def too_far(arrays):
        right(arrays)
        arrays[-1][-1:] += 1

    for wrong in (too_far, lambda arrays: None, lambda arrays: right([array[:-1] for array in arrays])):
        with pytest.raises(AssertionError, match="wrong results"):
            streams.check(kernel, wrong, 1024, CPU)


def test_rows():
    times = {(kernel, apart): [3.0, 1.0, 2.0] for kernel in (COPY, KERNELS[0]) for apart in APART}
    rows = streams.make_rows(times, 10**9)
    assert [row["apart_bytes"] for row in rows] == [*APART, *APART]
    assert rows[0] == {
        **{"kernel": "copy", "read": 1, "written": 1, "apart_bytes": 0, "samples": 3},
        **{"ms": 2.0, "ms_q1": 1.5, "ms_q3": 2.5, "gbps": 4000.0, "share": 1.0},
    }
    assert rows[-1]["gbps"] == 14000.0 and rows[-1]["share"] == 3.5


def test_elements():
    assert streams.whole_units("470M") == 448 * UNIT
    assert streams.whole_units("1") == streams.whole_units("1e6") == UNIT
    result = CliRunner().invoke(streams.main, ["--elements", "many"])
    assert result.exit_code == 2 and "many" in result.output


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(streams.main, [])
    assert result.exit_code == 1 and "no CUDA device" in result.output


@pytest.mark.gpu
def test_a_short_run(tmp_path):
    path = tmp_path / "streams.json"
    run = CliRunner().invoke(
        streams.main, ["--elements", "4M", "--time-limit", "0", "--json", str(path)], catch_exceptions=False
    )
    assert run.exit_code == 0, run.output
    result = json.loads(path.read_text())
    assert result["elements"] == 4 * UNIT
    measured = {(row["read"], row["written"], row["kernel"], row["apart_bytes"]) for row in result["rows"]}
    kernels = [COPY, *(kernel for kernel in KERNELS if str(kernel) not in result["left_out"])]
    assert measured == {(each.read, each.written, each.way.name, apart) for each in kernels for apart in APART}
    assert all(row["ms"] > 0 and row["share"] > 0 and row["samples"] == 1 for row in result["rows"])
    assert all(str(kernel) in run.output for kernel in kernels)
    if torch.cuda.get_device_capability() == (9, 0):
        assert not result["left_out"]
