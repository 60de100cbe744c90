"""The command line: ``fusedopt``."""

import click

from .bench import bench
from .doctor import doctor
from .verify import verify
from .warmup import warmup

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fusedopt")
def main() -> None:
    """Fused optimizer kernels for PyTorch."""


main.add_command(bench)
main.add_command(doctor)
main.add_command(verify)
main.add_command(warmup)
