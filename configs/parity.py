"""A config of this folder, with the random draws, data and evaluation of Song et al.'s code.

python -m sbml.main --config=configs/parity.py:cifar10_vp

docs/parity.md lists the differences between the two codes, with their reasons and effects.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

# The authors' evaluation uses whole batches of 1,024 shuffled images and leaves out the rest of the
# split. These are the numbers of images that it uses.
WHOLE_BATCHES = {"tfds:cifar10": 9_216, "imagenet32:old": 49_152}


def get_config(name: str = "cifar10_vp") -> ConfigDict:
    """The config ``name`` of this folder, changed to follow the authors' code.

    Raises:
      ValueError: if there is no such config; the message lists the names.
    """
    configs = {p.stem: p for p in pathlib.Path(__file__).parent.glob("*.py")}
    # ``best`` and ``cifar10_vdm`` train on bin centres, which the authors' code does not.
    names = sorted(set(configs) - {"parity", "best", "cifar10_vdm"})
    if name not in names:
        raise ValueError(f"parity:{name}: no such config; choose from {', '.join(names)}")
    config: ConfigDict = runpy.run_path(str(configs[name]))["get_config"]()
    config.data.dequantization = "none"
    config.training.update(times="iid", noises="independent", proposal_bins=0)
    config.score.update(label="time", parameterization="noise")
    if config.optim.name != "adam":
        config.optim.update(name="adam", lr=4e-3)  # the rate of the digits with Adam
    # In each of the 5 sweeps, the authors draw 1,000 times for an image. Here it is one time, which
    # needs a thousandth of the evaluations.
    config.eval.bound.update(times="iid", control=False, proposal_bins=0, n_times=1, sweeps=5)
    config.eval.ode.probes = 1
    config.eval.dequantizers = ("uniform",)
    config.eval.max_images = WHOLE_BATCHES.get(config.data.source, 0)
    config.dequantizer.model.clipped = True
    return config
