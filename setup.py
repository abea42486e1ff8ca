import os
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

# What a source archive has beside the packages, so that a packager can run the tests and build the
# documentation from it.
FILES = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "ruff.toml")
FOLDERS = ("benchmarks", "docs", "experiments", "tests")
GENERATED = {"__pycache__", "_build", "reference"}


class SourceArchive(sdist):
    """The source archive, with the files above."""

    def make_release_tree(self, base_dir, files):
        # docs/tutorials is a link to a folder, which the archive has a copy of.
        walks = (walk for folder in FOLDERS for walk in os.walk(folder, followlinks=True))
        found = (Path(folder, name) for folder, _, names in walks for name in names)
        kept = (str(path) for path in found if not GENERATED & {*path.parts})
        super().make_release_tree(base_dir, sorted({*files, *FILES, *kept}))


# All else is in setup.cfg, which cannot add a package to those that are found: the folder configs/
# of a checkout is sbml/configs of a wheel, where ``sbml --config=NAME`` finds it.
setup(
    packages=[*find_packages(include=["sbml", "sbml.*"]), "sbml.configs"],
    package_dir={"sbml.configs": "configs"},
    cmdclass={"sdist": SourceArchive},
)
