"""``python -m fusedopt``: the command line, where scripts are not on the path."""

from .cli import main

main(prog_name="fusedopt")
