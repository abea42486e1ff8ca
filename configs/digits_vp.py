"""scikit-learn's 8x8 digits, VP, likelihood weighting and importance sampling.

python -m sbml.main --config=configs/digits_vp.py

It takes three to seven minutes on two CPU cores. By the ODE it reaches 1.708 bits/dim on the test
images, 95% interval [1.683, 1.733]. docs/benchmarks/recipes.md and factors.md compare this recipe
with others.

The model is trained on the centres of the bins, and evaluated with the noise of its smallest time.
configs/digits_vp.py:uniform trains it on uniformly dequantized images.
"""

from ml_collections import ConfigDict

from sbml.program.config.config import default, small_dequantizer

DEQUANTIZERS = {"centre": "truncated_normal", "uniform": "uniform"}  # of an evaluation


def get_config(data: str = "centre") -> ConfigDict:
    """Train, evaluate and sample with 17 grey levels.

    Raises:
      ValueError: ``data`` is neither ``centre`` nor ``uniform``.
    """
    if data not in DEQUANTIZERS:
        raise ValueError(f"digits_vp:{data}: choose from {', '.join(DEQUANTIZERS)}")
    config = default()
    config.mode = ("train", "eval", "sample", "quality")
    config.data.update(source="digits", shape=(8, 8, 1), levels=17, flip=False)
    config.data.dequantization = data
    config.model.update(nf=16, ch_mult=(1, 2), num_res_blocks=2, attn_resolutions=(4,), dropout=0.0)
    config.score.update(parameterization="levels", label="log_snr")
    config.training.update(
        batch_size=64, num_steps=1_600, log_every=20, checkpoint_every=500, sample_every=800
    )
    # grad_clip is below the usual norm of the gradient, so most steps are clipped. Muon's rate and
    # clipping were chosen on held-out training images (docs/benchmarks/factors.md).
    config.optim.update(name="muon", lr=1e-2, warmup=100, schedule="cosine", ema=0.99)
    config.optim.grad_clip = 1 / 12
    config.eval.update(batch_size=36, dequantizers=(DEQUANTIZERS[data],))
    config.eval.ode.subset = 36
    config.eval.quality.features = "digits_classifier"
    small_dequantizer(config, num_steps=500)
    return config
