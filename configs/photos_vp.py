"""32x32 crops of the photos in scikit-learn and scikit-image, for a trial without a download.

python -m sbml.main --config=configs/photos_vp.py

The images have the shape of CIFAR-10, and the network is reduced, so that a CPU can run everything
that a model of CIFAR-10 would use. It trained for 20 minutes on two CPU cores, and evaluated 64
test crops in five minutes. By the ODE it reaches 3.606 bits/dim, 95% interval [3.277, 3.935], and
by the bound 3.666. With Adam at the rate 2e-3 it reached 3.883 and 3.920.
"""

from ml_collections import ConfigDict

from sbml.program.config.config import default, small_dequantizer


def get_config() -> ConfigDict:
    """Train, evaluate a part of the test crops, and sample."""
    config = default()
    config.mode = ("train", "eval", "sample")
    config.data.source = "photos"
    config.model.update(nf=16, ch_mult=(1, 2, 2), num_res_blocks=2, attn_resolutions=(16,))
    config.score.update(parameterization="levels", label="log_snr")
    config.training.update(
        batch_size=32, num_steps=2_000, log_every=20, checkpoint_every=200, sample_every=1_000
    )
    config.optim.update(name="muon", lr=5e-3, warmup=200, schedule="cosine", ema=0.997)
    config.optim.grad_clip = 1 / 12
    config.eval.update(batch_size=32, max_images=64)
    config.sampling.update(num_images=16, batch_size=16)
    small_dequantizer(config, num_steps=500)
    return config
