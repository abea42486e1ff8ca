"""scikit-learn's 8x8 digits with the sub-VP SDE; otherwise as ``digits_vp.py:uniform``.

python -m sbml.main --config=configs/digits_subvp.py

It takes three to seven minutes on two CPU cores. By the ODE it reaches 1.728 bits/dim on the test
images, 95% interval [1.702, 1.753], and by the bound 1.776. With Adam at the rate 4e-3 for 1,700
steps it reached 1.730 and 1.775, so Muon is not better here in one training of each. The smallest
time is 1e-2, the default for sub-VP, instead of 1e-5.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

DIGITS = pathlib.Path(__file__).with_name("digits_vp.py")


def get_config() -> ConfigDict:
    """The settings of ``digits_vp.py:uniform`` with the sub-VP SDE."""
    config = runpy.run_path(str(DIGITS))["get_config"]("uniform")
    config.sde.name = "subvp"
    return config
