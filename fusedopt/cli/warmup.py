"""``fusedopt warmup``: fills the kernel cache, for container images. Needs no GPU."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import click

from ..backends import nvrtc
from ..specs import DTYPES, RULES
from .shared import console, exit_codes, several, shared_options, write_json

__all__ = ["warmup"]


def _matches(kernel: nvrtc.KernelSpec, rules: tuple[str, ...], dtypes: tuple[str, ...]) -> bool:
    wanted_rules = {RULES[name].cpp for name in rules} or {spec.cpp for spec in RULES.values()}
    wanted_formats = {DTYPES[name].cpp for name in dtypes} or {spec.cpp for spec in DTYPES.values()}
    if kernel.template in ("update_pass", "measure_pass") and kernel.arguments[0] not in wanted_rules:
        return False
    formats = {argument for argument in kernel.arguments if argument in {spec.cpp for spec in DTYPES.values()}}
    return formats <= wanted_formats


@click.command(epilog=exit_codes("a kernel could not be compiled"))
@several("arch", "Architecture, by default those of the GPUs here.", "archs", metavar="sm_XY")
@several("rule", "Only these rules.", "rules", type=click.Choice(sorted(RULES)))
@several("dtype", "Only these parameter dtypes.", "dtypes", type=click.Choice(sorted(DTYPES)))
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(1), help="Compilations at a time.")
@shared_options("Write how many kernels there are, and where, here.")
def warmup(
    archs: tuple[str, ...], rules: tuple[str, ...], dtypes: tuple[str, ...], jobs: int, json_path: str | None
) -> None:
    """Compile CUDA kernels into the cache, so that no first step has to. Works without a GPU."""
    from rich.progress import track

    out, started = console(), time.monotonic()
    archs = archs or _local_architectures()
    if not archs:
        raise click.UsageError("no GPU here to take the architecture from; name one, such as --arch sm_90")
    bad = [arch for arch in archs if not (arch.startswith("sm_") and arch[3:6].rstrip("af").isdigit())]
    if bad:
        raise click.BadParameter(
            f"got {bad[0]!r}, expected sm_ and two or three digits, such as sm_90", param_hint="--arch"
        )
    work = [(kernel, arch) for arch in archs for kernel in nvrtc.common_kernels() if _matches(kernel, rules, dtypes)]
    try:
        nvrtc.require_compiler()
        with ThreadPoolExecutor(jobs) as pool:
            results = pool.map(lambda item: nvrtc.get_cubin(*item), work)
            sizes = [len(cubin) for cubin in track(results, "Compiling", total=len(work), console=out)]
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    out.print(f"{len(sizes)} kernels for {', '.join(archs)}, {sum(sizes) / 1e6:.1f} MB, in {nvrtc.cache_dir()}")
    if json_path:
        facts = {"archs": archs, "kernels": len(sizes), "bytes": sum(sizes), "folder": str(nvrtc.cache_dir())}
        write_json(json_path, {**facts, "seconds": time.monotonic() - started})


def _local_architectures() -> tuple[str, ...]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(sorted({"sm_{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(count)}))
