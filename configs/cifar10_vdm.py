"""CIFAR-10 with the network and schedule of "Variational Diffusion Models" (Kingma et al. 2021).

python -m sbml.main --config=configs/cifar10_vdm.py

Training takes days on several accelerators; it was not run. --mode=convert
--source=DIR_OR_FILE converts a checkpoint of the published code, and --mode=eval then evaluates it:
the first result is the number that the paper reports, the bound with the categorical decoder.
docs/parity.md lists the differences.
"""

from ml_collections import ConfigDict

from sbml.networks import frequencies
from sbml.program.config.config import default


def get_config() -> ConfigDict:
    """A network of 32 blocks with 128 channels, trained on the centres of the bins for t >= 0."""
    config = default("vdm")
    config.data.update(dequantization="centre", flip=False)
    config.sde.name = "linear_gamma"
    config.model.update(width=128, depth=32, dropout=0.1, fourier=frequencies(256))
    config.score.update(parameterization="residual", label="scaled_log_snr")
    config.training.update(batch_size=128, num_steps=10_000_000)
    config.optim.update(warmup=100, beta2=0.99, weight_decay=0.01, grad_clip=0.0)
    config.eval.update(
        estimators=("bound", "ode"), dequantizers=("categorical", "truncated_normal"), tau=0.0
    )
    config.sampling.smallest_time = 0.0
    config.sampling.sampler.update(name="ancestral", steps=1000)
    return config
