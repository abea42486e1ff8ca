"""``python -m sbml`` does what the command ``sbml`` does."""

from sbml.main import run

if __name__ == "__main__":
    run()
