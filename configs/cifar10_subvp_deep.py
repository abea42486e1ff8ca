"""CIFAR-10, sub-VP, deep DDPM++ (106.6 M parameters), as in the paper.

python -m sbml.main --config=configs/cifar10_subvp_deep.py

This trains for 950,000 steps of batch 128, which takes days on one accelerator; it was not run
here. The paper's best number without flips of the training images is 2.83 bits/dim;
this config flips them. The settings are in ``paper.py``.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

PAPER = pathlib.Path(__file__).with_name("paper.py")


def get_config() -> ConfigDict:
    """The model ``cifar10_subvp_deep`` of ``paper.py``."""
    return runpy.run_path(str(PAPER))["get_config"]("cifar10_subvp_deep")
