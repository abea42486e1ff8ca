"""Fashion-MNIST, grey images of 28x28, through TFDS.

python -m sbml.main --config=configs/fashion_mnist_vp.py

It trains for about an hour on two CPU cores (66 minutes beside other work), and evaluates 512 test
images in 15 minutes. By the ODE it reaches 2.967 bits/dim, 95% interval [2.895, 3.039], and by the
bound 2.988. With 7,500 steps it reached 2.941. docs/samplers.md shows its samples.

Without a download, it reads the files of Debian's package dataset-fashion-mnist with
--config.data.manual_dir=/usr/share/datasets/fashion-mnist
"""

from ml_collections import ConfigDict

from sbml.program.config.config import default, small_dequantizer


def get_config() -> ConfigDict:
    """Train, evaluate 512 test images and sample, with the resolutions 28, 14 and 7."""
    config = default()
    config.mode = ("train", "eval", "sample")
    config.data.update(source="tfds:fashion_mnist", shape=(28, 28, 1), flip=True)
    config.model.update(
        nf=16, ch_mult=(1, 2, 2), num_res_blocks=2, attn_resolutions=(7,), dropout=0.0
    )
    config.score.update(parameterization="levels", label="log_snr", data_std=0.7)
    config.training.update(
        batch_size=64, num_steps=5_000, log_every=50, checkpoint_every=500, sample_every=2_500
    )
    config.optim.update(lr=2e-3, warmup=200, schedule="cosine", ema=0.999, grad_clip=1 / 12)
    config.eval.update(batch_size=64, max_images=512)
    config.sampling.update(num_images=64, batch_size=64)
    small_dequantizer(config, num_steps=2_000)
    return config
