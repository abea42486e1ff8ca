"""Compares evaluated runs on one page: ``--mode=compare --runs=runs/a,runs/b``."""

from sbml.core.scalars import notation
from sbml.program.config.fields import errors_of
from sbml.program.report import comparison
from sbml.program.report.comparison import Run
from sbml.program.runtime.workdir import Workdir


def run(workdir: Workdir | None = None, runs: str = "") -> None:
    """Compare evaluated work directories, ``runs="DIR,DIR"``, with the first of them.

    Writes ``comparison.html`` and ``comparison.json`` to ``workdir``, or to ``runs/comparison`` if
    it is None, and prints the paired differences of every number that the runs share.
    """
    if not runs:
        raise ValueError("--mode=compare reads --runs=DIR,DIR: evaluated work directories")
    paths = [path.strip() for path in runs.split(",")]
    if "" in paths:
        raise ValueError(f"--runs={runs}: one of the names is empty; leave it out")
    with errors_of("--runs"):
        workdirs = [Workdir(path).connect() for path in paths]
    evaluated = list(map(Run.read, workdirs, comparison.short_names(workdirs)))
    numbers = comparison.compare(evaluated)
    workdir = workdir or Workdir("runs/comparison")
    workdir.write("comparison.json", numbers)
    workdir.write_bytes("comparison.html", comparison.render(evaluated, numbers).encode())
    for cell in numbers["cells"]:
        print(cell["name"])
        for row in cell["rows"]:
            time = notation(row["smallest_time"], ".3g")
            number = f"{row['bits_per_dim']:z.4f} bits/dim at t={time}"
            line = f"  {row['run']:24s} {number}"
            if "difference" in row:
                low, high = row["difference_interval"]
                line += f", {row['difference']:+z.4f} [{low:+z.4f}, {high:+z.4f}], n={row['pairs']}"
            print(line)
    print(f"page: {workdir / 'comparison.html'}")
