import os
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

# What a source archive has beside the packages, so that a packager can run the tests and build the
# documentation from it.
FILES = (".zenodo.json", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "ruff.toml")
FOLDERS = ("benchmarks", "configs", "docs", "experiments", "tests")
GENERATED = {"__pycache__", "_build", "reference"}


class SourceArchive(sdist):
    """The source archive, with the files above."""

    def make_release_tree(self, base_dir, files):
        # docs/tutorials is a link to a folder, which the archive has a copy of.
        walks = (walk for folder in FOLDERS for walk in os.walk(folder, followlinks=True))
        found = (Path(folder, name) for folder, _, names in walks for name in names)
        kept = (str(path) for path in found if not GENERATED & {*path.parts})
        super().make_release_tree(base_dir, sorted({*files, *FILES, *kept}))


class Modules(build_py):
    """The modules of a wheel, and the folder configs/ of the checkout as sbml/configs.

    ``sbml --config=NAME`` finds the configs there. An editable installation has those of the
    checkout.
    """

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "sbml", "configs")
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree("configs", target, ignore=ignored, dirs_exist_ok=True)


# All else is in setup.cfg. With this ``package_dir``, an editable installation adds the checkout to
# the path. A finder of modules, the default, would come after the folder of the same name if Python
# is started beside the checkout, and ``import sbml`` would find an empty package.
setup(
    packages=find_packages(include=["sbml", "sbml.*"]),
    package_dir={"": "."},
    cmdclass={"build_py": Modules, "sdist": SourceArchive},
)
