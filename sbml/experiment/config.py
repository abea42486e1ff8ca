"""Every field of a config, with its default and meaning.

A config file calls :func:`default` and sets what differs. Fields hold plain values only; whatever
is derived from several of them is computed in ``experiment.build``, after command-line overrides.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Sequence

import ml_collections
from ml_collections import config_dict

from sbml import networks

# The least that a number may be, by section; the dequantizer's sections are as the score's.
LEAST = {
    "training": {
        **dict.fromkeys(("batch_size", "num_steps", "accumulate", "steps_per_dispatch"), 1),
        **dict.fromkeys(("log_every", "checkpoint_every", "keep_last"), 1),
        **dict.fromkeys(("keep_every", "sample_every", "proposal_bins", "discrete_levels"), 0),
    },
    "optim": dict.fromkeys(
        ("lr", "warmup", "beta1", "beta2", "eps", "weight_decay", "grad_clip", "ema"), 0
    ),
    "eval": {
        **dict.fromkeys(("batch_size", "n_times", "sweeps", "max_sweeps", "probes"), 1),
        **dict.fromkeys(("max_images", "importance_images", "target_se", "tau"), 0),
        **dict.fromkeys(("proposal_bins", "fixed_steps", "subset", "solver_budget"), 0),
    },
    "sampling": {
        **dict.fromkeys(("num_images", "batch_size"), 1),
        **dict.fromkeys(("frames", "fixed_steps"), 0),
    },
    "data": {"levels": 2},
    "latents": {**dict.fromkeys(("frames", "steps", "corrector_steps"), 1), "count": 2, "snr": 0},
}
BELOW_ONE = {"optim": ("beta1", "beta2", "ema")}


def check_ranges(config: ml_collections.ConfigDict) -> None:
    """Refuse numbers that cannot work, before any work is begun.

    Raises:
      ValueError: naming the field, its value and what it may be.
    """
    for name, seed in (
        ("seed", config.seed),
        ("eval.seed", config.eval.seed),
        ("sampling.seed", config.sampling.seed),
    ):
        if not 0 <= seed < 2**32:
            raise ValueError(f"{name}={seed}: need at least 0 and below 2^32")
    shape = config.data.shape
    if len(shape) != 3 or min(shape) < 1:
        given = ",".join(map(str, shape))
        raise ValueError(f"data.shape={given}: need height,width,channels, as in 32,32,3")
    for part, where in ((config, ""), (config.dequantizer, "dequantizer.")):
        for section, fields in LEAST.items():
            for field, least in fields.items():
                if field not in part.get(section, ()):
                    continue
                value, small = part[section][field], field in BELOW_ONE.get(section, ())
                if not least <= value < (1 if small else math.inf):
                    upper = " and below 1" if small else ""
                    raise ValueError(
                        f"{where}{section}.{field}={value}: need at least {least}{upper}"
                    )


def choices_in(value: Collection[str]) -> list[str]:
    """The names in a field such as ``eval.estimators``; the command line's "a,b" is one string."""
    return [name.strip() for item in value for name in item.split(",") if name.strip()]


def model_fields(name: str) -> dict:
    """The fields of network ``name`` with their defaults, as plain values."""
    # flax sets the first two of every Linen module, the score's parameterization the third.
    skip = ("parent", "name", "outputs")
    return {f.name: f.default for f in dataclasses.fields(networks.get(name)) if f.name not in skip}


def _training(batch_size: int, num_steps: int) -> dict:
    return {
        "batch_size": batch_size,
        "num_steps": num_steps,
        "accumulate": 1,  # micro-batches a step
        "steps_per_dispatch": 1,  # more can help accelerators; slow on CPU
        # optimizer's state and average split over the devices: less memory of each, and a step
        # gathers all parameters once more
        "shard_state": False,
        "log_every": 100,
        "checkpoint_every": 5_000,
        "keep_last": 2,
        "keep_every": 50_000,  # 0: none besides the last
        "sample_every": 0,
    }


def _optim(lr: float, warmup: int, ema: float) -> dict:
    return {
        "lr": lr,
        "warmup": warmup,
        "schedule": "constant",  # or cosine, to zero at num_steps
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "grad_clip": 1.0,  # global norm, in the unit of the paper's loss; 0: off
        "ema": ema,
    }


def _eval() -> dict:
    return {
        "split": "test",
        # Every estimator with every dequantizer and every K; the first is the headline.
        "estimators": ("ode", "bound"),  # bound_ssm
        "dequantizers": ("uniform",),  # truncated_normal, variational, categorical
        "num_importance": (1,),  # K draws of the dequantizer in one logarithm
        "importance_images": 0,  # where K > 1, on this many images; 0: max_images
        "batch_size": 128,
        "max_images": 0,  # drawn from the split once and for all; 0: all
        "in_order": False,  # max_images are the first of the split instead
        "seed": 0,
        "smallest_time": config_dict.placeholder(float),  # None: the training's
        # truncated_normal, categorical: the smallest time is where so many standard deviations of
        # the noise fill half a bin, if it is the later one; 0: never
        "tau": 3.0,
        "trace": config_dict.placeholder(str),  # None: rademacher, exact where K > 1
        "probes": 2,  # of a Hutchinson trace, ode's or bound_ssm's; a power of two serves best
        "n_times": 2,  # of the bound, draws an image in one sweep
        "times": "lattice",  # of the bound; or iid
        "importance_sampling": True,  # its times uniform in log-SNR; or in t
        "sweeps": 8,  # of the bound, each over all images
        "target_se": 0.0,  # sweep, 8 times at least, to this standard error in bits/dim; 0: off
        "max_sweeps": 256,
        "control": True,  # Gaussian control variate of the bound
        "proposal_bins": 32,  # of a learned density of the bound's times; 0: uniform
        "method": "tsit5",  # dopri5, heun, euler
        "rtol": 2e-4,
        "atol": 2e-4,
        "fixed_steps": 0,  # 0: step control
        # of float32 products: highest, high, or default, the accelerator's own (TF32, bfloat16)
        "precision": "highest",
        # images for the solver's error and the noise of ode; 0: all; a Kth where K > 1
        "subset": 32,
        "features": "inception",  # of the samples' quality; or digits_classifier
        "inception_weights": "",  # pytorch-fid's state dict, a file
        "inception_sha256": "6726825d",  # that its hash begins with
        "solver_budget": 1e-3,  # bits/dim; a larger solver error marks the number
    }


def _sampling() -> dict:
    return {
        "num_images": 64,
        "batch_size": 64,
        "seed": 0,
        "smallest_time": config_dict.placeholder(float),  # None: 1e-3, or training's if larger
        "denoise_last": True,
        # ode, euler_maruyama, reverse_diffusion, ancestral, ddim, dpm_solver
        "sampler": "ode",
        "method": "dopri5",  # of ode
        "rtol": 1e-3,
        "atol": 1e-3,
        "fixed_steps": 0,  # of ode; 0: step control
        "steps": config_dict.placeholder(int),  # of all others; None: 500
        "spacing": "",  # time, quadratic, log_snr; empty: the sampler's own
        "eta": 0.0,  # of ddim: share of fresh noise
        "corrector": "none",  # after every step: langevin, annealed_langevin
        "corrector_steps": 1,
        "snr": 0.16,  # of a corrector's step
        "frames": 8,  # of the strip from noise to image
    }


def _dequantizer() -> dict:
    """The Flow++ dequantizer of CIFAR-10, trained with a faster average than the score."""
    return {
        "name": "variational",
        "model": {
            "design": "cifar10",  # or imagenet32
            "filters": 96,
            "components": 32,
            "blocks": 2,
            "heads": 4,
            "dropout": 0.0,
            "clipped": False,  # the authors' arithmetic, for parity
        },
        "training": _training(batch_size=128, num_steps=300_000),
        "optim": _optim(lr=2e-4, warmup=5_000, ema=0.99),
    }


def default(network: str = "ncsnpp") -> ml_collections.ConfigDict:
    """The paper's CIFAR-10 settings for VP with likelihood weighting and importance sampling."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "mode": ("train",),  # any of --mode's, in order
            "data": {
                # digits, photos, tfds:<set>, imagenet32:old, imagenet32:new, image_folder
                "source": "tfds:cifar10",
                "shape": (32, 32, 3),  # height, width, channels; the loaded set must agree
                "levels": 256,  # integers 0 .. levels - 1
                "flip": True,  # random horizontal flips in training
                # centre: of the bin, fits truncated_normal; none: k / (levels - 1), as the authors
                "dequantization": "uniform",
                "cache_dir": "",  # prepared arrays; empty: ~/.cache/sbml
                "manual_dir": "",  # archives already on disk, for tfds and imagenet32
                "path": "",  # folder of image_folder
                "crop": "center",  # of image_folder; random, squash (both sides scaled)
                "test_fraction": 0.1,  # of image_folder without train/ and test/ subfolders
                "split_seed": 0,  # of image_folder: which images are held out, random crops
            },
            "sde": {
                "name": "vp",  # vp, subvp, ve, linear_ve, linear_gamma
                "beta_min": 0.1,  # vp, subvp
                "beta_max": 20.0,  # vp, subvp
                "sigma_min": 0.01,  # ve
                "sigma_max": 50.0,  # ve, linear_ve
                "gamma_0": -13.3,  # linear_gamma: -log SNR at t = 0
                "gamma_1": 5.0,  # linear_gamma: -log SNR at t = 1
            },
            "model": {"name": network, **model_fields(network)},
            "score": {
                # noise, score, unscaled, preconditioned, residual, x0, velocity, levels
                "parameterization": "noise",
                "label": "time",  # time (999 t), log_snr, sigma, scaled_log_snr
                "data_std": 0.5,  # in [-1, 1], for preconditioned
                "log_snr_range": (-5.0, 13.3),  # where the label scaled_log_snr is 1000 and 0
            },
            "training": {
                **_training(batch_size=128, num_steps=1_300_000),
                "likelihood_weighting": True,
                "importance_sampling": True,
                # N: the discrete-time loss on N noise levels, DDPM's (vp) or SMLD's (ve); 0: off
                "discrete_levels": 0,
                "times": "lattice",  # or iid
                "noises": "antithetic",  # half the images, each with z and -z; or independent
                "proposal_bins": 32,  # of a density of times that follows the noise; 0: off
                # None: 1e-5, sub-VP 1e-2, ImageNet with both flags above 5e-5 (the paper's)
                "smallest_time": config_dict.placeholder(float),
                "sample_every": 50_000,  # 0: no sample grids during training
            },
            "optim": _optim(lr=2e-4, warmup=5_000, ema=0.9999),
            "eval": _eval(),
            "dequantizer": _dequantizer(),
            "sampling": _sampling(),
            "latents": {
                "count": 8,  # images of eval.split
                "frames": 8,  # of an interpolation
                "steps": 200,  # of a completion, by reverse diffusion
                "corrector_steps": 2,  # by annealed Langevin, after each
                "snr": 0.16,
            },
        }
    ).lock()


def check_overrides(config: ml_collections.ConfigDict, arguments: Sequence[str]) -> None:
    """Refuse ``--config.a.b=value`` for a field that ``config`` does not have.

    Raises:
      ValueError: naming the field and those there are beside it.
    """
    for name in re.findall(r"^--?config\.([\w.]+)", "\n".join(arguments), re.MULTILINE):
        node, known = config, "config"
        for part in name.split("."):
            if not isinstance(node, ml_collections.ConfigDict) or part not in node:
                fields = sorted(node) if isinstance(node, ml_collections.ConfigDict) else []
                raise ValueError(
                    f"unknown field config.{name}: {known} has {', '.join(fields) or 'no fields'}"
                )
            node, known = node[part], f"{known}.{part}"


def small_dequantizer(config: ml_collections.ConfigDict, *, num_steps: int) -> None:
    """Give ``config`` a Flow++ that a CPU trains in minutes."""
    config.dequantizer.model.update(filters=32, components=8, blocks=1)
    config.dequantizer.training.update(
        batch_size=64, num_steps=num_steps, log_every=20, checkpoint_every=num_steps // 2
    )
    nats = float(math.prod(config.data.shape))  # Clips at 1 in nats/dim.
    config.dequantizer.optim.update(lr=2e-3, warmup=50, grad_clip=nats)
