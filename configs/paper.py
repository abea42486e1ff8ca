"""The models of Song et al. (2021), by name: the paper's eight models and the variants in table 2.

python -m sbml.main --config=configs/paper.py:cifar10_vp_deep

A name is a data set (cifar10, imagenet32), an SDE (vp, subvp) and any of the words

    deep       twice as many blocks: 106.6 M parameters instead of 61.8 M
    flip       random horizontal flips of the training images
    noflip     no flips
    original   the original weighting of the loss, and times uniform in t
    weighted   likelihood weighting, with times uniform in t

joined by underscores. Without ``original`` or ``weighted``, both likelihood weighting and
importance sampling are on. Without ``flip`` or ``noflip``, CIFAR-10 is flipped and ImageNet is not.
Times and noises are drawn by the defaults of this package, which lower the variance of the
gradient. To draw them as the paper does, add
--config.training.times=iid --config.training.noises=independent --config.training.proposal_bins=0.

The training of one model takes days on one accelerator; none of them was run here. The paper's best
models without flips reach 2.83 bits/dim on CIFAR-10, and 3.76 on ImageNet 32x32.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from sbml.program.config.config import default


def _imagenet32(config: ConfigDict) -> None:
    config.data.update(source="imagenet32:old", flip=False)
    config.model.update(dropout=0.0)
    config.dequantizer.model.update(design="imagenet32", filters=128, blocks=8)
    config.dequantizer.training.accumulate = 4  # A training image needs 1.3 GB of memory.


def _deep(config: ConfigDict) -> None:
    config.model.update(num_res_blocks=8)
    config.training.num_steps = 950_000


# The change that each word makes to the default config, the VP model of CIFAR-10.
WORDS: dict[str, Callable[[ConfigDict], None]] = {
    "cifar10": lambda config: None,
    "imagenet32": _imagenet32,
    "vp": lambda config: None,
    "subvp": lambda config: config.sde.update(name="subvp"),
    "deep": _deep,
    "flip": lambda config: config.data.update(flip=True),
    "noflip": lambda config: config.data.update(flip=False),
    "original": lambda config: config.training.update(
        likelihood_weighting=False, importance_sampling=False
    ),
    "weighted": lambda config: config.training.update(importance_sampling=False),
}


def get_config(name: str = "cifar10_vp") -> ConfigDict:
    """The config of the model ``name``.

    Raises:
      ValueError: if ``name`` does not consist of a data set, an SDE and any of the words above, or
        two of the words contradict each other.
    """
    data, _, rest = name.partition("_")
    sde, *words = rest.split("_")
    options = set(WORDS) - {"cifar10", "imagenet32", "vp", "subvp"}
    if data not in ("cifar10", "imagenet32") or sde not in ("vp", "subvp") or set(words) - options:
        raise ValueError(
            f"paper:{name}: no such model; give cifar10 or imagenet32, then vp or subvp, then any "
            f"of {', '.join(sorted(options))}, as in cifar10_subvp_deep"
        )
    for pair in ({"flip", "noflip"}, {"original", "weighted"}):
        if pair <= set(words):
            raise ValueError(f"paper:{name}: give only one of {' and '.join(sorted(pair))}")
    config = default()
    for word in (data, sde, *words):
        WORDS[word](config)
    return config
