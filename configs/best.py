"""The recipe of this package at full size, by the name of a data set.

python -m sbml.main --config=configs/best.py:cifar10

    name             network                                        parameters   memory
    cifar10          vdm, 32 blocks of 128 channels                     30.6 M    6.5 GiB
    imagenet32       vdm, 32 blocks of 256 channels                    122.2 M   12.4 GiB
    fashion_mnist    that of fashion_mnist_vp.py, 8 times as wide       43.6 M    2.5 GiB
                     and with twice as many blocks

Memory is that of a training step on one v5e chip, which has 16 GiB, by the compiler
(docs/benchmarks/accelerators.md).

None of these configs was trained, so their bits/dim are not known. The recipe is an integer
denoiser with log-SNR labels and the draws of this package. At equal steps, the integer denoiser is
the best of all predictions on 8x8 digits, Fashion-MNIST and 32x32 photos. On photos its lead over
``velocity`` is significant by the bound only. With 8 channels, its steps on photos take 1.65 and
1.86 times as long as those of ``velocity`` and ``preconditioned``, and at equal time it has no lead
over them; on Fashion-MNIST it leads ``velocity`` by .57 by the bound (docs/benchmarks/factors.md).
The recipe trains on bin centres, so that its own decoder gives a bound of the same kind as VDM's.
VDM's network is better at equal steps in short trainings: by the ODE, .02 bits/dim on digits, .39
on Fashion-MNIST and .66 on photos. But its step takes 2.4, 4.2 and 3.1 times as long in these small
sizes, and at equal time it is worse by the ODE: .11 on digits, .48 on Fashion-MNIST and .32 on
photos. At full size the two networks were not compared.
Fourier features lost .03 bits/dim on the digits, and .2 and .3 by the bound in short trainings on
Fashion-MNIST and photos. With VDM's network on Fashion-MNIST they lost about .35, and made the ODE
very slow. cifar10 and imagenet32 have them all the same, because VDM's published networks do.
Network, batch, optimizer and steps of cifar10 and imagenet32 are those of the published code of
"Variational Diffusion Models" (Kingma et al. 2021); a batch of 128 is 64 images, each with a noise
and its opposite. Batch and optimizer of fashion_mnist are the paper's for CIFAR-10.

    cifar10          expected figure: unknown; VDM's same network reaches 2.64 by its bound
    imagenet32       (of 2016) expected figure: unknown; VDM reaches 3.72 by its bound
    fashion_mnist    expected figure: unknown; fashion_mnist_vp.py reaches 2.967 by the ODE
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from sbml.networks import frequencies
from sbml.program.config.config import default

# About the standard deviation of images in [-1, 1]. At small noise, the network of an integer
# denoiser sees x / DATA_STD.
DATA_STD = 0.5


def _vdm(width: int) -> ConfigDict:
    config = default("vdm")
    config.data.flip = False
    config.model.update(
        width=width, depth=32, dropout=0.1, fourier=frequencies(256, scale=DATA_STD)
    )
    config.score.data_std = DATA_STD
    config.training.update(batch_size=128, num_steps=10_000_000)
    config.optim.update(lr=2e-4, warmup=100, beta2=0.99, weight_decay=0.01, grad_clip=0.0)
    return config


def _imagenet32() -> ConfigDict:
    config = _vdm(256)
    config.data.source = "imagenet32:old"
    # At this time, half a bin holds three standard deviations of the noise, as for cifar10. Without
    # this line, the paper's time for ImageNet would be used, 5e-5, where half a bin holds 1.7.
    config.training.smallest_time = 1.69e-5
    return config


def _fashion_mnist() -> ConfigDict:
    config = default()
    config.data.update(source="tfds:fashion_mnist", shape=(28, 28, 1), flip=True)
    config.model.update(nf=128, ch_mult=(1, 2, 2), num_res_blocks=4, attn_resolutions=(7,))
    config.score.data_std = 0.7
    config.training.num_steps = 200_000
    return config


NAMES: dict[str, Callable[[], ConfigDict]] = {
    "cifar10": lambda: _vdm(128),
    "imagenet32": _imagenet32,
    "fashion_mnist": _fashion_mnist,
}


def get_config(name: str = "cifar10") -> ConfigDict:
    """The recipe for the data set ``name``.

    Raises:
      ValueError: there is none for ``name``.
    """
    if name not in NAMES:
        raise ValueError(f"best:{name}: no such recipe; choose from {', '.join(NAMES)}")
    config = NAMES[name]()
    config.mode = ("train", "eval", "sample")
    config.model.dtype = "bfloat16"
    config.data.dequantization = "centre"
    config.score.update(parameterization="levels", label="log_snr")
    config.eval.update(estimators=("bound", "ode"), dequantizers=("learned", "truncated_normal"))
    return config
