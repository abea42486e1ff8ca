from setuptools import find_packages, setup

# All else is in setup.cfg, which cannot add a package to those that are found: the folder configs/
# of a checkout is sbml/configs of a wheel, where ``sbml --config=NAME`` finds it.
setup(
    packages=[*find_packages(include=["sbml", "sbml.*"]), "sbml.configs"],
    package_dir={"sbml.configs": "configs"},
)
