"""A table of numbers: a residual MLP on whitened rows, next to a Gaussian, a mixture and kernels.

python -m sbml.main --config=configs/table.py --config.data.path=FILE

FILE is a CSV, Parquet or npz file. docs/guides/tables.md explains the fields and the report. It
takes about three minutes on two shared CPU cores for tables of 178 x 13 to 569 x 24 numbers. The
size of the network and the dropout were chosen on the validation rows of wine, diabetes and breast
cancer, three tables of scikit-learn.
"""

from ml_collections import ConfigDict

from sbml.program.config.config import default


def get_config() -> ConfigDict:
    """Train, choose a checkpoint on validation rows, and evaluate on test rows."""
    config = default("mlp")
    config.mode = ("table",)
    config.data.update(source="table", flip=False, test_fraction=0.2, validation=0.2)
    config.data.update(drop_columns=(), log_columns=(), logit_columns=())
    config.model.update(width=256, depth=3, dropout=0.3)
    config.score.update(parameterization="preconditioned", label="log_snr", data_std=1.0)
    # All checkpoints are kept, because one of them is chosen.
    config.training.update(
        batch_size=128, num_steps=1_500, log_every=25, checkpoint_every=75, keep_last=20
    )
    config.training.keep_every = 0
    config.optim.update(lr=1e-3, warmup=100, schedule="cosine", ema=0.99)
    config.eval.update(batch_size=256)
    config.sampling.update(num_images=1_000)
    return config
