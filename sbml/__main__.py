"""``python -m sbml`` does what the command ``sbml`` does."""

import runpy

if __name__ == "__main__":
    runpy.run_module("sbml.main", run_name="__main__", alter_sys=True)
