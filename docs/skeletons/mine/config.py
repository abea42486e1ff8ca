"""A config with a part of each kind. Leave out the lines of parts that you do not replace."""

from sbml.program.config.config import default


def get_config():
    config = default("mine.network:Small", dequantizer="mine.dequantizer:Shrunk")
    config.mode = ("train", "train_dequantizer", "eval", "sample", "quality", "mine.mode:count")
    config.data.update(source="mine.data:Dice", sides=6, shape=(2, 1, 1), levels=6, flip=False)
    config.sde.update(name="mine.sde:Steep", slope=9.95)
    config.score.update(parameterization="mine.prediction:beyond_linear", label="log_snr")
    config.score.data_std = 0.57
    config.training.update(
        batch_size=64, num_steps=60, log_every=20, checkpoint_every=60, keep_every=0, sample_every=0
    )
    config.optim.update(lr=3e-3, warmup=10, ema=0.9)
    config.dequantizer.training.update(batch_size=64, num_steps=3, checkpoint_every=3)
    config.dequantizer.optim.warmup = 1
    config.eval.update(
        batch_size=100,
        estimators=("ode", "bound", "mine.estimator:Normal"),
        dequantizers=("uniform", "mine.dequantizer:Triangle", "mine.dequantizer:Shrunk"),
    )
    config.eval.bound.sweeps = 2
    config.eval.ode.trace = "exact"
    config.eval.quality.features = "mine.features:raw_pixels"
    config.sampling.update(num_images=64, denoise_last=False, frames=1)
    config.sampling.sampler.update(name="mine.sampler:Scaling", steps=3, factor=0.5)
    return config
