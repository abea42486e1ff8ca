"""Audits our estimators, and the mistakes of ``sbml.audit.mistakes``: ``--mode=audit``.

Our estimators must pass in all worlds, and each mistake must fail the checks that it names in the
first world, and no other.
"""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

from sbml.audit.mistakes import MISTAKES
from sbml.audit.ours import OURS
from sbml.audit.suite import FAIL, WORLDS, Report, audit
from sbml.progress import over
from sbml.runtime.versions import versions


def reports() -> tuple[list[Report], list[Report]]:
    """The reports about our estimators, and about the mistakes."""
    first = dict(itertools.islice(WORLDS.items(), 1))
    with ThreadPoolExecutor() as pool:  # Most of the time is compilation, which runs in parallel.
        jobs = [pool.submit(audit, each) for each in OURS]
        jobs += [pool.submit(audit, each.estimator, first) for each in MISTAKES]
        found = [job.result() for job in over(jobs, "audit", "estimator", len(jobs))]
    return found[: len(OURS)], found[len(OURS) :]


def row(report: Report, result: str) -> str:
    """A line of the table: the name, the excess in each world, and the result."""
    excess = [f"{report.excess[w]:+.4f}" if w in report.excess else "" for w in WORLDS]
    return "  ".join([f"{report.estimator:40}", *(f"{each:>9}" for each in excess), result])


def reason(report: Report) -> str:
    """The checks that failed, each with the value of its first failure."""
    failures = {f.check: f.value for f in reversed(report.findings) if f.verdict == FAIL}
    each = [f"{name} ({value:.3g})" for name, value in reversed(failures.items())]
    return f"caught by {', '.join(each)}"


def run() -> None:
    """Print the excess of each estimator in each world, and what its checks found.

    Raises:
      SystemExit: with status 1 if one of ours does not pass, or a mistake is not caught.
    """
    start = time.perf_counter()
    print(f"jax {versions()['jax']}, XLA {versions()['xla']}\n")
    right, wrong = reports()
    caught = [r.failed == m.fails for r, m in zip(wrong, MISTAKES, strict=True)]
    head = "  ".join([f"{'excess in bits/dim':40}", *(f"{name:>9}" for name in WORLDS)])
    print("\n".join([head, "", *(row(r, "pass" if r.passed else "FAILS") for r in right), ""]))
    for report, found in zip(wrong, caught, strict=True):
        print(row(report, reason(report) if found else "NOT CAUGHT"))
    failed = [r.estimator for r in right if not r.passed]
    missed = [r.estimator for r, found in zip(wrong, caught, strict=True) if not found]
    passed = f"{len(right) - len(failed)} of {len(right)} estimators pass"
    seen = f"{sum(caught)} of {len(wrong)} mistakes are caught"
    print(f"\n{passed}, {seen}, in {time.perf_counter() - start:.0f} s")
    if failed or missed:
        for report in [r for r in (*right, *wrong) if r.estimator in failed + missed]:
            print(f"\n{report}")
        raise SystemExit(1)
