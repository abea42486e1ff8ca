"""Compares every estimator with closed-form values: ``--mode=verify``."""

import time

from sbml.runtime.versions import versions
from sbml.verify.checks import checks, on_cpu, table


def run() -> None:
    """Print the table of comparisons.

    Raises:
      SystemExit: with status 1 if a row fails.
    """
    start = time.perf_counter()
    with on_cpu():
        print(f"jax {versions()['jax']}, XLA {versions()['xla']}\n")
    rows = checks()
    print(table(rows))
    failed = [row for row in rows if not row.ok]
    count = f"{len(rows) - len(failed)} of {len(rows)} rows agree with the truth"
    print(f"\n{count}, in {time.perf_counter() - start:.0f} s")
    if failed:
        print("failed: " + "; ".join(f"{row.name} ({row.sde})" for row in failed))
        raise SystemExit(1)
