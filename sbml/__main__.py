"""The command ``sbml``, and ``python -m sbml``: both do what ``python -m sbml.main`` does."""

import runpy


def run() -> None:
    """Run ``sbml.main`` as the main module, whose docstring and flags absl shows as the help."""
    runpy.run_module("sbml.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run()
