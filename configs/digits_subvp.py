"""scikit-learn's 8x8 digits, sub-VP, likelihood weighting and importance sampling.

python -m sbml.main --config=configs/digits_subvp.py
"""

from ml_collections import ConfigDict

from sbml.experiment.config import default, small_dequantizer


def get_config() -> ConfigDict:
    """Train, evaluate and sample with 17 grey levels."""
    config = default()
    config.mode = ("train", "eval", "sample", "quality")
    config.sde.name = "subvp"
    config.data.update(source="digits", shape=(8, 8, 1), levels=17, flip=False)
    config.model.update(nf=32, ch_mult=(1, 2), num_res_blocks=2, attn_resolutions=(4,), dropout=0.0)
    config.score.update(parameterization="preconditioned", label="log_snr", data_std=0.7)
    config.training.update(
        batch_size=64, num_steps=900, log_every=20, checkpoint_every=300, sample_every=450
    )
    config.optim.update(lr=2e-3, warmup=100, schedule="cosine", ema=0.99, grad_clip=1 / 12)
    config.eval.update(batch_size=36, subset=36, features="digits_classifier")
    small_dequantizer(config, num_steps=500)
    return config
