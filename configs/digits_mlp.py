"""scikit-learn's 8x8 digits with a small MLP: exact traces and K-sample bounds in minutes on a CPU.

python -m sbml.main --config=configs/digits_mlp.py

This is a weak model (it reached 2.77 bits/dim), but it is fast enough to compare dequantizers, with
K = 1 and with K = 20 importance samples. To do so, add these flags:
--mode=train,train_dequantizer,eval
--config.eval.dequantizers=uniform,truncated_normal,variational,categorical
--config.eval.num_importance=1,20
The model is trained on uniformly dequantized images, so the numbers with truncated_normal and
categorical are loose bounds. For tight ones, train with --config.data.dequantization=centre.
"""

from ml_collections import ConfigDict

from sbml.program.config.config import default, small_dequantizer


def get_config() -> ConfigDict:
    """Train, evaluate and sample with 17 grey levels."""
    config = default("mlp")
    config.mode = ("train", "eval", "sample", "quality")
    config.data.update(source="digits", shape=(8, 8, 1), levels=17, flip=False)
    config.model.update(width=256, depth=3)
    config.score.update(parameterization="preconditioned", label="log_snr", data_std=0.7)
    config.training.update(
        batch_size=128, num_steps=2_500, log_every=100, checkpoint_every=2_500, sample_every=0
    )
    config.optim.update(lr=2e-3, warmup=200, schedule="cosine", ema=0.999, grad_clip=1 / 12)
    config.eval.batch_size = 90
    config.eval.quality.features = "digits_classifier"
    small_dequantizer(config, num_steps=500)
    return config
