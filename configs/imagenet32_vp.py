"""ImageNet 32x32 (the version of 2016), VP, DDPM++ (61.8 M parameters), as in the paper.

python -m sbml.main --config=configs/imagenet32_vp.py

This config was not run. It trains for 1.3 million steps with batches of 128 images, which takes
days on one accelerator. The paper's best model for these data reaches 3.76 bits/dim. The settings
are in ``paper.py``.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

PAPER = pathlib.Path(__file__).with_name("paper.py")


def get_config() -> ConfigDict:
    """The model ``imagenet32_vp`` of ``paper.py``."""
    return runpy.run_path(str(PAPER))["get_config"]("imagenet32_vp")
