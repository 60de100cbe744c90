"""The command line: ``fusedopt``."""

import click

from .. import __version__
from .bench import bench
from .doctor import doctor
from .shared import color_option, exit_codes
from .verify import verify
from .warmup import warmup

__all__ = ["main"]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
    epilog=exit_codes("something was found wrong, or the work could not be done"),
)
@click.version_option(__version__)
@color_option()
@click.pass_context
def main(context: click.Context) -> None:
    """Fused optimizer kernels for PyTorch."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


main.add_command(bench)
main.add_command(doctor)
main.add_command(verify)
main.add_command(warmup)
