"""Plants mistakes in the sources, one at a time, and sees whether the tests notice: ``python tests/mutation``.

Each mutant is put into a copy of the sources, the extension is built again if need be, and a few quick tests run until
one fails. One that survives means that a test is missing. Exit code 0: all were killed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import click
from mutants import ROOT, Mutant, all_mutants
from mutation_report import result_path, write_json, write_table
from trial import Outcome, Tree


def chosen(device: str, names: Sequence[str]) -> list[Mutant]:
    """Those that the device can kill, with one of the names in theirs."""
    fitting = [m for m in all_mutants() if m.gpu == (device == "cuda")]
    found = [m for m in fitting if not names or any(name in m.name or name in m.path for name in names)]
    if not found:
        raise click.UsageError(f"--only: got {', '.join(names)}, which no mutant for {device} has; --list shows all")
    return found


def run_all(mutants: Sequence[Mutant], device: str, jobs: int, folder: Path, path: Path) -> list[Outcome]:
    """On ``jobs`` copies of the sources at a time. Each outcome goes to ``path`` when it is known."""
    build = any(m.is_compiled for m in mutants) or not list((ROOT / "fusedopt").glob("_C.*so"))
    trees: SimpleQueue[Tree] = SimpleQueue()
    writing = Lock()

    def make(number: int) -> Tree:
        (path := folder / str(number)).mkdir()
        return Tree(path, device, build)

    def run(mutant: Mutant) -> Outcome:
        tree = trees.get()
        try:
            outcome = tree.run(mutant)
        finally:
            trees.put(tree)
        with writing:
            write_json(path, device, [outcome])
        click.echo(f"{outcome.result:13} {outcome.seconds:6.1f} s  {mutant.name}  {outcome.by}")
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        made = list(pool.map(make, range(min(jobs, len(mutants)))))
        made[0].check_unchanged(mutants)
        click.echo(f"{len(mutants)} mutants; all their tests pass without them")
        for tree in made:
            trees.put(tree)
        try:
            return list(pool.map(run, mutants))
        finally:
            for tree in made:
                tree.close()


@click.command(help=__doc__)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where tests run.")
@click.option(
    "--only", multiple=True, metavar="NAME", help="Those with this in their name or file. Repeat for several."
)
@click.option("--jobs", default=1, show_default=True, help="How many at a time.")
@click.option("--list", "listing", is_flag=True, help="Write them, and plant none.")
@click.option(
    "--table", "only_table", is_flag=True, help="Write the table of docs/correctness.md from earlier results."
)
@click.option(
    "--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Default: tests/results, for all."
)
def main(device: str, only: tuple[str, ...], jobs: int, listing: bool, only_table: bool, path: Path | None) -> None:
    if only_table:
        write_table()
        return
    mutants = chosen(device, only)
    if listing:
        click.echo("\n".join(f"{m.name}: {m.mistake} ({m.path})" for m in mutants))
        return
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fusedopt-mutants-") as folder:
        outcomes = run_all(mutants, device, jobs, Path(folder), path or result_path(device))
    seconds = time.monotonic() - start
    if path is None:
        write_table()
    alive = [outcome for outcome in outcomes if not outcome.is_killed]
    for outcome in alive:
        click.echo(f"{outcome.result}: {outcome.name} ({outcome.mistake}, {outcome.path}) {outcome.by}")
    click.echo(f"{len(outcomes) - len(alive)} of {len(outcomes)} mutants killed in {seconds:.0f} s")
    sys.exit(1 if alive else 0)


if __name__ == "__main__":
    main()
