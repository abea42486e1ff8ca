"""A config for tests that trains in seconds: an MLP on the digits (--config=tests/tiny.py)."""

from ml_collections import ConfigDict

from sbml.program.config.config import default


def get_config() -> ConfigDict:
    config = default("mlp")
    config.mode = ("train", "eval", "sample")
    config.data.update(source="digits", shape=(8, 8, 1), levels=17, flip=False)
    config.model.update(width=32, depth=1)
    config.score.update(parameterization="preconditioned", label="log_snr", data_std=0.7)
    config.training.update(
        batch_size=64, num_steps=40, log_every=1, checkpoint_every=4, keep_every=0, sample_every=0
    )
    config.optim.update(lr=1e-3, warmup=10, ema=0.9)
    config.eval.batch_size = 120
    config.eval.bound.level_images = 0
    config.sampling.update(num_images=4, batch_size=4)
    return config
