"""Compares evaluated runs on one page: ``--mode=compare --runs=runs/a,runs/b``."""

from collections.abc import Sequence
from typing import Any

from etils import epath

from sbml import report
from sbml.report import comparison
from sbml.report.comparison import Run
from sbml.runtime.workdir import Workdir

IGNORES = ("config", "coordinator")
FLAGS = ("runs",)


def run(config: Any, workdir: epath.PathLike | None, runs: Sequence[str] | None) -> None:
    """Compare the evaluated work directories ``runs`` with the first of them.

    Writes ``comparison.html`` and ``comparison.json`` to ``workdir``, or to ``runs/comparison`` if
    it is None, and prints the paired differences of every number that the runs share. ``config`` is
    not used.

    Raises:
      ValueError: a run was not evaluated, or the runs cannot be compared.
    """
    if not runs:
        raise ValueError("--mode=compare reads --runs=DIR,DIR: evaluated work directories")
    if "" in runs:
        raise ValueError(f"--runs={','.join(runs)}: one of the names is empty; leave it out")
    workdirs = [Workdir(path).connect() for path in runs]
    evaluated = list(map(Run.read, workdirs, comparison.short_names(workdirs)))
    numbers = comparison.compare(evaluated)
    workdir = Workdir(workdir or "runs/comparison")
    workdir.write("comparison.json", report.strict(numbers))
    workdir.write_bytes("comparison.html", comparison.render(evaluated, numbers).encode())
    for cell in numbers["cells"]:
        print(cell["name"])
        for row in cell["rows"]:
            number = f"{row['bits_per_dim']:.4f} bits/dim at t={row['smallest_time']:.3g}"
            line = f"  {row['run']:24s} {number}"
            if "difference" in row:
                low, high = row["difference_interval"]
                line += f", {row['difference']:+.4f} [{low:+.4f}, {high:+.4f}], n={row['pairs']}"
            print(line)
    print(f"page: {workdir / 'comparison.html'}")
