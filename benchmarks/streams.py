"""Times kernels that do nothing but read R and write W streams of float32: how fast could any such kernel be?

    python benchmarks/streams.py --json streams.json        # on a GPU; seconds

An optimizer step reads and writes several long arrays at once, where a copy reads one and writes one. The kernels, in
``streams.cu`` beside this file, differ in what is under way at the same time:

* ``one round``: a block loads 4096 elements of each array, stores them, and ends;
* ``2 rounds in a row``: a block goes on with the elements that follow;
* ``2 rounds, 128 blocks``: neighbouring blocks share their rounds out, so that those under way lie side by side;
* ``bulk, 6 x 1024``: cp.async.bulk copies to and from 6 tiles of each stream in shared memory (sm_90 and later).

Each array begins ``apart_bytes`` after the end of the one before it; lengths are multiples of 4 MiB. Every kernel is
first checked against torch. Then all are timed in turn, by CUDA events around launches in a row: ``ms`` is the median,
``share`` that of the rate at which torch copies one array to another, timed in turn with them, ``apart_bytes`` 0.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

from fusedopt.backends import nvrtc
from fusedopt.bench.report import Row, environment, write
from fusedopt.bench.timing import no_garbage_collection, span_ms

SOURCE = Path(__file__).with_suffix(".cu")
THREADS, ROUND = 256, 4096  # as there
ITEM = torch.float32.itemsize
ARRAYS = 4
APART = (0, 128, 256)  # bytes
UNIT = 1 << 20  # elements: whole groups of blocks, and whole tiles

CHECKED = 4 * UNIT  # elements: on 132 multiprocessors every stage of a bulk copy is used twice and more
REPEATS, LAUNCHES = 9, 3

Launch = Callable[[Sequence[torch.Tensor]], object]
"""Takes the arrays, all equally long."""


@dataclass(frozen=True)
class Way:
    """To move streams."""

    name: str
    call: str = ""  # in streams.cu, for how many read and written
    per_multiprocessor: int = 2  # blocks
    chunk: int = 0  # elements of a block; 0: there are as many blocks as fit, for any number of elements
    staged: int = 0  # elements of each stream in shared memory


@dataclass(frozen=True)
class Kernel:
    """``nvrtc.compile_kernel`` takes it."""

    way: Way
    read: int
    written: int

    def __str__(self) -> str:
        return f"{self.read} read, {self.written} written: {self.way.name}"

    @property
    def shared_bytes(self) -> int:
        return self.read * self.way.staged * ITEM

    def source(self) -> str:
        bounds, call = self.way.per_multiprocessor, self.way.call.format(self.read, self.written)
        return (
            f'{SOURCE.read_text()}extern "C" __global__ void __launch_bounds__(kThreads, {bounds}) {nvrtc.ENTRY}(\n'
            f"    float* a, float* b, float* c, float* d, long long elements) {{\n"
            f"  {call}({{{{a, b, c, d}}, elements}});\n}}\n"
        )


WAYS = (
    Way("one round", "blocks<{}, {}, 1, 1>", chunk=ROUND),
    Way("2 rounds in a row", "blocks<{}, {}, 2, 1>", chunk=2 * ROUND),
    Way("4 rounds in a row", "blocks<{}, {}, 4, 1>", chunk=4 * ROUND),
    Way("2 rounds, 128 blocks", "blocks<{}, {}, 2, 128>", chunk=2 * ROUND),
    Way("bulk, 6 x 1024", "bulk<{}, {}, 1024, 6>", staged=6 * 1024),
    Way("bulk, 3 x 2048", "bulk<{}, {}, 2048, 3>", staged=3 * 2048),
    Way("bulk, 3 x 4096", "bulk<{}, {}, 4096, 3>", per_multiprocessor=1, staged=3 * 4096),
)
STREAMS = ((4, 3), (3, 2))  # read, written: as AdamW; as Lion, and SGD with momentum
KERNELS = tuple(Kernel(way, *streams) for streams in STREAMS for way in WAYS)
COPY = Kernel(Way("copy"), 1, 1)  # torch's


class Device:
    """torch's current device and stream, which must not be the default stream: that one has no handle."""

    def __init__(self) -> None:
        self.core = nvrtc._cuda_core()
        self.index = torch.cuda.current_device()
        self.properties = torch.cuda.get_device_properties(self.index)
        own = self.core.Device(self.index)
        own.set_current()
        self.most_shared = own.properties.max_shared_memory_per_block_optin
        self.stream = self.core.Stream.from_handle(torch.cuda.current_stream().cuda_stream)

    def why_not(self, kernel: Kernel) -> str | None:
        if kernel.shared_bytes and self.properties.major < 9:
            return "needs sm_90"
        return f"needs {kernel.shared_bytes} bytes of shared memory" if kernel.shared_bytes > self.most_shared else None

    def load(self, kernel: Kernel) -> Launch:
        cubin = nvrtc.compile_kernel(kernel, f"sm_{self.properties.major}{self.properties.minor}")
        function = self.core.ObjectCode.from_cubin(cubin).get_kernel(nvrtc.ENTRY)
        if kernel.shared_bytes:
            self._allow_shared(function, kernel.shared_bytes)
        resident = self.properties.multi_processor_count * kernel.way.per_multiprocessor

        def launch(arrays: Sequence[torch.Tensor]) -> None:
            elements = arrays[0].numel()
            grid = elements // kernel.way.chunk if kernel.way.chunk else resident
            config = self.core.LaunchConfig(grid=grid, block=THREADS, shmem_size=kernel.shared_bytes)
            addresses = [array.data_ptr() for array in arrays]
            self.core.launch(self.stream, config, function, *addresses, elements)  # an int travels as 8 bytes

        return launch

    def _allow_shared(self, function: object, nbytes: int) -> None:
        """More than 48 KiB must be asked for, and cuda-core has no call for it."""
        from cuda.bindings import driver

        handle = function.handle if hasattr(function, "handle") else function._handle  # the latter in early versions
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (error,) = driver.cuKernelSetAttribute(
            attribute, nbytes, driver.CUkernel(int(handle)), driver.CUdevice(self.index)
        )
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"cuKernelSetAttribute, {nbytes} bytes of shared memory: {error}")


def make_pool(elements: int, device: torch.device) -> torch.Tensor:
    """Room for the arrays, however far apart."""
    return torch.empty(ARRAYS * elements + (ARRAYS - 1) * max(APART) // ITEM, device=device)


def arrays_in(pool: torch.Tensor, elements: int, apart_bytes: int) -> list[torch.Tensor]:
    return [pool[k * (elements + apart_bytes // ITEM) :][:elements] for k in range(ARRAYS)]


def check(kernel: Kernel, launch: Launch, elements: int, device: torch.device) -> None:
    """AssertionError unless the first arrays become sums of themselves and the unwritten ones, and all else is kept."""
    pool = make_pool(elements, device)
    for apart in APART:
        expected = pool.random_(-8, 8).clone()  # whole numbers: their sums are exact
        arrays = arrays_in(expected, elements, apart)
        for array in arrays[: kernel.written]:
            array += sum(arrays[kernel.written : kernel.read])
        launch(arrays_in(pool, elements, apart))
        if not torch.equal(pool, expected):
            raise AssertionError(f"{kernel}: wrong results, arrays {apart} bytes apart")


def make_rows(times: dict[tuple[Kernel, int], list[float]], elements: int) -> list[Row]:
    rows = []
    for (kernel, apart), samples in times.items():
        q1, ms, q3 = np.percentile(samples, (25, 50, 75)).tolist()
        row = {"kernel": kernel.way.name, "read": kernel.read, "written": kernel.written, "apart_bytes": apart}
        row |= {"ms": ms, "ms_q1": q1, "ms_q3": q3, "samples": len(samples)}
        rows.append(row | {"gbps": (kernel.read + kernel.written) * ITEM * elements / ms / 1e6})
    copy = next(row["gbps"] for row in rows if row["kernel"] == COPY.way.name and row["apart_bytes"] == APART[0])
    return [row | {"share": row["gbps"] / copy} for row in rows]


def measure(elements: int, deadline: float) -> Row:
    """The whole run, as the JSON file holds it."""
    with torch.cuda.stream(torch.cuda.Stream()):
        device, cuda = Device(), torch.device("cuda")
        left_out = {str(kernel): reason for kernel in KERNELS if (reason := device.why_not(kernel))}
        launches: dict[Kernel, Launch] = {COPY: lambda arrays: arrays[1].copy_(arrays[0])}
        for kernel in KERNELS:
            if str(kernel) not in left_out:
                launches[kernel] = device.load(kernel)
                check(kernel, launches[kernel], CHECKED, cuda)
        pool = make_pool(elements, cuda).normal_()
        times: dict[tuple[Kernel, int], list[float]] = {(kernel, apart): [] for kernel in launches for apart in APART}
        with no_garbage_collection():
            for repeat in range(REPEATS):
                if repeat and time.monotonic() > deadline:
                    break
                for (kernel, apart), samples in times.items():
                    arrays, launch = arrays_in(pool, elements, apart), launches[kernel]
                    samples.append(span_ms(lambda launch=launch, arrays=arrays: launch(arrays), lambda: None, LAUNCHES))
    facts = {"elements": elements, "launches": LAUNCHES, "left_out": left_out}
    return environment(cuda) | facts | {"rows": make_rows(times, elements)}


def print_result(console: Console, result: Row) -> None:
    title = f"{result['device']}, {result['elements']:,} elements a stream: GB/s, share of a copy"
    table = Table(title=title, box=None, pad_edge=False)
    table.add_column("streams, kernel", no_wrap=True)
    for apart in APART:
        table.add_column(f"{apart} bytes apart", justify="right", no_wrap=True)
    for line in zip(*[iter(result["rows"])] * len(APART)):
        name = "{read} read, {written} written: {kernel}".format(**line[0])
        table.add_row(name, *(f"{row['gbps']:,.1f} {row['share']:7.2%}" for row in line))
    console.print(table)
    for name, reason in result["left_out"].items():
        console.print(f"left out: {name} ({reason})", markup=False)


def whole_units(text: str) -> int:
    """ "470M" and the like, to the nearest multiple of ``UNIT``."""
    elements = float(text.removesuffix("M")) * (1e6 if text.endswith("M") else 1)
    return max(1, round(elements / UNIT)) * UNIT


@click.command(help=__doc__.split("\n")[0])
@click.option("--elements", type=whole_units, default="470M", metavar="COUNT", help="Of each of the 4 arrays; 470M.")
@click.option("--time-limit", type=float, default=60, show_default=True, help="Begin no turn after so many seconds.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write the results here.")
def main(elements: int, time_limit: float, path: Path | None) -> None:
    deadline = time.monotonic() + time_limit
    if not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA device")
    result = measure(elements, deadline)
    write(path, result)
    print_result(Console(width=None if sys.stdout.isatty() else 120), result)


if __name__ == "__main__":
    main()
