"""Any config here with the draws, the data and the evaluation of Song et al.'s own code.

python -m sbml.main --config=configs/parity.py:cifar10_vp

docs/parity.md lists each difference, what it costs, and why ours is what it is.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

# Their evaluation takes whole batches of 1,024 shuffled images; the rest of the split is left out.
WHOLE_BATCHES = {"tfds:cifar10": 9_216, "imagenet32:old": 49_152}


def get_config(name: str = "cifar10_vp") -> ConfigDict:
    """The config ``name`` of this folder, changed."""
    path = pathlib.Path(__file__).with_name(f"{name}.py")
    if not path.exists():
        known = sorted(p.stem for p in path.parent.glob("*.py") if p.stem != "parity")
        raise ValueError(f"parity:{name}: no such config; choose from {', '.join(known)}")
    config: ConfigDict = runpy.run_path(str(path))["get_config"]()
    config.data.dequantization = "none"
    config.training.update(times="iid", noises="independent", proposal_bins=0)
    config.score.update(label="time", parameterization="noise")
    config.eval.update(times="iid", control=False, proposal_bins=0, n_times=1, sweeps=5, probes=1)
    config.eval.max_images = WHOLE_BATCHES.get(config.data.source, 0)
    config.dequantizer.model.clipped = True
    return config
