"""ImageNet 32x32 (the version of 2016), sub-VP, deep DDPM++ (106.6 M parameters), as in the paper.

python -m sbml.main --config=configs/imagenet32_subvp_deep.py

Likelihood weighting and importance sampling are flags, both on:
--config.training.likelihood_weighting=False --config.training.importance_sampling=False.
The draws of times and noises are ours; the paper's are --config.training.times=iid
--config.training.noises=independent --config.training.proposal_bins=0.
Published by the paper for this data over its models: 3.76 bits/dim at best. Not trained here.
"""

from ml_collections import ConfigDict

from sbml.config import default


def get_config() -> ConfigDict:
    """950,000 steps of batch 128: days on one accelerator."""
    config = default()
    config.data.update(source="imagenet32:old", flip=False)
    config.sde.name = "subvp"
    config.model.update(num_res_blocks=8, dropout=0.0)
    config.dequantizer.model.update(design="imagenet32", filters=128, blocks=8)
    config.dequantizer.training.accumulate = 4  # 1.3 GB of activations an image
    config.training.num_steps = 950_000
    return config
