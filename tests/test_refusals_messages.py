"""What the messages of refused calls say: a row is a call and a pattern of its ValueError."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unet2d_reference
from flax import linen as nn
from linen import normal, shapes
from refusals import KEY, NAN, VP, score

import sbml
from benchmarks import recipes
from sbml import data, dequantizers, likelihood, losses, networks, samplers, sdes
from sbml.core import bits
from sbml.core.types import check_function
from sbml.dequantizers import truncated_normal
from sbml.dequantizers.variational import Model as Flow
from sbml.likelihood import bound, discrete
from sbml.likelihood.ode import Solver
from sbml.networks import unet2d
from sbml.networks.mlp import Model as Mlp
from sbml.networks.ncsnpp import Model as Ncsnpp
from sbml.networks.vdm import Model as Vdm
from sbml.program.config import config
from sbml.program.report import pictures
from sbml.samplers import DDIM, EulerMaruyama, Langevin
from sbml.score import Adapter, divergence, from_prediction, integers
from sbml.score.divergence import Trace
from sbml.sdes import VE, AlphaBarTable, BetaSchedule, LinearVE, Schedule, SubVP, times
from sbml.statistics import distances
from sbml.statistics.distances import Moments

pytestmark = pytest.mark.usefixtures("unchecked")
Rows = list[tuple[Callable[[], Any], str]]

INF, EPS, MODEL, ONE = math.inf, 1e-5, Mlp(), np.ones(1, np.float32)
OUT, HALF, X = jnp.zeros((3, 4)), jnp.asarray(0.5), jnp.zeros(3)
PIXELS = np.zeros((2, 3, 3, 1), np.uint8)
SMALL = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}
V, VS, INTEGER = np.full(3, 0.5), np.ones((2, 3), np.float32), np.array([5])


class Wrong(sdes.SDE):
    """An SDE whose standard deviation is no number."""

    def __init__(self, std: Any) -> None:
        self.wrong = std

    def mean_coef(self, t: Any) -> Any:
        return 1 - t

    def std(self, t: Any) -> Any:
        return self.wrong


def elbo(x: Any = X, eps: float = EPS, u: Any = V[:1], **choices: Any) -> Any:
    return bound.elbo(score, VP, x, KEY, eps=eps, u=u, **choices)


def integer_elbo(pixels: Any = INTEGER, eps: float = 1e-2, **choices: Any) -> Any:
    noise = choices.pop("noise", discrete.Categorical(8))
    return discrete.elbo(score, VP, pixels, KEY, eps=eps, u=V[:1], noise=noise, **choices)


def logp(x: Any = X, eps: float = EPS, trace: Trace = Trace("exact")) -> Any:
    return likelihood.ode_logp(score, VP, x, None, eps=eps, trace=trace)


def dsm_batch(**wrong: Any) -> Any:
    rows = {"x": np.ones((4, 3)), "t": np.full((4,), 0.5), "keys": jax.random.split(KEY, 4)}
    return losses.dsm_batch(score, VP, **rows | wrong)


def image_set(images: Any, levels: int = 256, **choices: Any) -> Any:
    return data.ImageSet("set", "1", "train", images, levels, **choices)


def grid(images: Any = PIXELS[:1], levels: int = 4, columns: int = 1) -> Any:
    return pictures.image_grid(images, levels, columns)


def unet(**changes: Any) -> Any:
    return unet2d.fields(unet2d_reference.CONFIGS["attention"] | changes)


def unet_of(size: int, **options: Any) -> Any:
    return shapes(unet2d.Model(**unet() | options), (1, size, size, 3))


def vdm_of(x: Any, label: Any, **condition: Any) -> Any:
    return Vdm(width=8, depth=0).init(KEY, x, label, train=False, **condition)


def recipe(text: str) -> Any:
    return recipes.with_recipe(config.default(), text)


# A class or function, and for each of its options: a wrong value, and what the message says.
OPTIONS: dict[Callable[..., Any], list[tuple[str, Any, str]]] = {
    Mlp: [
        ("embedding_type", "rotary", "embedding_type is 'rotary'.*'positional', 'fourier'"),
        ("dtype", "int8", "dtype is 'int8'"),
        ("embedding_size", 7, "embedding_size is 7"),
        ("width", 0, "width is 0"),
        ("depth", -1, "depth is -1"),
        ("depth", 65535, r"depth is 65535.* in \[0, 500\]"),
        ("fourier_scale", 0.0, "fourier_scale is 0.0"),
        ("fourier", (-1.0,), r"fourier is \(-1.0,\)"),
    ],
    Ncsnpp: [
        ("embedding_type", "cosine", "embedding_type is 'cosine'.*'positional', 'fourier'"),
        ("resblock_type", "resnet", "resblock_type is 'resnet'.*'ddpm', 'biggan'"),
        ("progressive", "input_skip", "progressive is 'input_skip'.*'none', 'output_skip'"),
        ("progressive_input", "x", "progressive_input is 'x'.*'none', 'input_skip', 'residual'"),
        ("progressive_combine", "add", "progressive_combine is 'add'.*'sum', 'cat'"),
        ("nonlinearity", "gelu", "nonlinearity is 'gelu'.*'swish', 'elu', 'relu', 'lrelu'"),
        ("dtype", "float16", "dtype is 'float16'.*'float32', 'bfloat16'"),
        ("dropout", 1.0, r"dropout is 1.0.*\[0, 1\)"),
        ("nf", 2, "nf is 2.*at least 4"),
        ("ch_mult", (), r"ch_mult is \(\)"),
        ("num_res_blocks", 0, "num_res_blocks is 0"),
        ("num_res_blocks", 101, r"num_res_blocks is 101.* in \[1, 100\]"),
        ("fir_kernel", (1, -1), r"fir_kernel is \(1, -1\)"),
        ("fourier_scale", 0.0, "fourier_scale is 0.0"),
        ("fourier", (0.0,), r"fourier is \(0.0,\)"),
    ],
    Vdm: [
        ("width", 7, "width is 7"),
        ("depth", -1, "depth is -1"),
        ("depth", 501, "depth is 501"),
        ("dropout", 1.0, r"dropout is 1.0.*\[0, 1\)"),
        ("groups", 3, "groups=3: give a divisor of width=128"),
        ("dtype", "float16", "dtype is 'float16'.*'float32', 'bfloat16', 'float64'"),
        ("fourier", (1.0, 0.0), r"fourier is \(1.0, 0.0\)"),
    ],
    unet: [
        ("_class_name", "UNet2DConditionModel", "_class_name is 'UNet2DConditionModel': give .*"),
        ("out_channels", 6, "in_channels is 3 and out_channels is 6: .* without learned variances"),
        ("num_class_embeds", 10, "num_class_embeds is 10: give a network without classes"),
        ("class_embed_type", "timestep", "class_embed_type is 'timestep': give .* null"),
        ("cross_attention_dim", 64, "cross_attention_dim is 64, but the known keys are block_out_"),
        ("remat", True, "remat is True, but the known keys are"),
        ("act_fn", "tanh", "act_fn is 'tanh':.* 'silu', 'swish', 'mish', 'gelu', 'relu'"),
        ("act_fn", None, "act_fn is None"),
        (
            "up_block_types",
            ["KUpBlock2D"],
            r"up_block_types is \('KUpBlock2D',\).* 'SkipUpBlock2D'",
        ),
        ("down_block_types", [], r"down_block_types is \(\).* 'AttnSkipDownBlock2D'"),
        ("time_embedding_type", "learned", "'learned'.*'positional', 'fourier'"),
        ("resnet_time_scale_shift", "spatial", "'spatial'.*'default', 'scale_shift'"),
        ("downsample_type", "fir", "downsample_type is 'fir':.* 'conv', 'resnet'"),
        ("mid_block_type", "MidBlock", "'MidBlock'.*'UNetMidBlock2D', 'none'"),
        ("downsample_padding", 2, r"downsample_padding is 2:.* in \[0, 1\]"),
        ("block_out_channels", [3, 16], r"block_out_channels is \(3, 16\):.* first at least 4"),
        (
            "block_out_channels",
            [8],
            r"block_out_channels=\(8,\) \(1\), down_block.* one of each per level",
        ),
        ("norm_num_groups", None, "norm_num_groups=0 with .*give the number of groups"),
        ("down_block_types", ["DownBlock2D", "SkipDownBlock2D"], "give the down blocks with Skip"),
        ("up_block_types", ["SkipUpBlock2D", "UpBlock2D"], "and the up blocks with Skip after"),
    ],
    Flow: [
        ("design", "mnist", "design is 'mnist'.*cifar10, imagenet32"),
        ("filters", 0, "filters is 0"),
        ("components", 0, "components is 0"),
        ("dropout", 1.0, "dropout is 1.0"),
        ("levels", 1, "levels is 1"),
    ],
}
NETWORKS: Rows = [
    *(
        (partial(of, **{option: wrong}), message)
        for of, rows in OPTIONS.items()
        for option, wrong, message in rows
    ),
    (lambda: networks.NETWORKS["unet"], r"'unet'.*mlp, ncsnpp"),
    (lambda: Mlp().init(KEY, VS, ONE, train=False), r"label is .* of shape \(1,\)"),
    (lambda: shapes(Ncsnpp(**SMALL), (2, 9, 8, 3)), "9x8.*multiple of 2"),
    (lambda: shapes(Ncsnpp(**SMALL), (2, 8, 8)), r"\(2, 8, 8\).*\(n, h, w, c\)"),
    (
        lambda: shapes(Ncsnpp(**SMALL | {"attn_resolutions": (16,)}), (2, 8, 8, 3)),
        r"\(16,\).*\[8, 4\]",
    ),
    (
        lambda: shapes(Ncsnpp(**SMALL | {"nf": 18}), (2, 8, 8, 3)),
        "GroupNorm_0 has 4 groups for 18 channels: .* multiples of 32",
    ),
    (lambda: shapes(Vdm(width=8, depth=0), (2, 8, 8)), r"x is .* of shape \(2, 8, 8\)"),
    (lambda: vdm_of(normal(0, 2, 4, 4, 3), ONE), r"label is .* of shape \(1,\)"),
    (
        lambda: vdm_of(normal(0, 2, 4, 4, 3), np.repeat(ONE, 2), condition=ONE),
        r"condition is .* \(1,\): .*label has shape \(2,\)",
    ),
    (lambda: unet_of(9), "images of 9x9 .* multiple of 2"),
    (lambda: unet_of(8, norm_num_groups=3), "norm1 has 3 groups for 8 channels"),
    (
        lambda: unet_of(8, attention_head_dim=3),
        "attention_head_dim=3: give a divisor of 16 channels",
    ),
    (
        lambda: unet_of(8, up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D")),
        "norm1 has 20 groups for 32 channels: choose .* multiples of 32 fit",
    ),
    (lambda: Flow(filters=10, heads=4), "filters=10 is not a multiple of heads=4"),
]

DATA: Rows = [
    (lambda: image_set(np.zeros((2, 3, 3, 1), np.float32)), "float32"),
    (lambda: image_set(PIXELS[..., 0]), "shape"),
    (lambda: image_set(PIXELS[:0]), "shape"),
    (lambda: image_set(PIXELS + 17, 17), "a pixel 17"),
    (lambda: image_set(PIXELS, 257), "levels=257"),
    (lambda: image_set(PIXELS, 1), "levels=1"),
    (lambda: image_set(PIXELS, ids=("a",)), "1 ids for 2 images"),
    *(
        (
            partial(data.load, name, "train"),
            "digits, image_folder, imagenet32:<set>, photos, table, tfds:<set>",
        )
        for name in ("digit", "digits:8x8", "digits:", "tfds", "tfds:", "_cache", "")
    ),
    *(
        (
            partial(data.load, f"tfds:{name}", "train", data.Options(cache_dir="unused")),
            "write set, set/config or set:1.2.3",
        )
        for name in ("../x", "cifar 10", "/etc", "mnist/", "mnist:latest", "mnist/..")
    ),
    (lambda: grid(PIXELS[:0]), "^images"),
    (lambda: grid(PIXELS[:1].astype(np.float32)), "^images"),
    (lambda: grid(PIXELS[0]), "^images"),
    (lambda: grid(PIXELS[:1] + 4), "^levels"),
    (lambda: grid(levels=1), "^levels"),
    (lambda: grid(columns=0), "^columns"),
    (lambda: pictures.png(np.zeros((2, 2))), "float64"),
    (lambda: config.default(dequantizer="triangle"), "dequantizer.name=triangle: give one of"),
    (lambda: recipe("level"), "unknown recipe 'level': give field=value or one of iid, lattice"),
    (lambda: recipe("levels+centres"), "unknown recipe 'centres'"),
    (
        lambda: recipe("training.noise=iid"),
        "config.training has no field noise: did you mean training.noises",
    ),
    (lambda: recipe("model.width=64"), r"no field width: did you mean model.nf\? It has"),
    (
        lambda: recipe("levels+trainings.times=iid"),
        "config has no field trainings: did you mean training",
    ),
    *(
        (partial(config.path_of, path), rf"--config={path} is no file: give a file")
        for path in ("digits_vp.py", "none/digits_vp", "./digits_vp")
    ),
    (
        lambda: config.path_of("digits"),
        "this name; did you mean digits_vp. Choose from digits_mlp, .* and 12 more .--help",
    ),
    (lambda: config.load("digits:a"), "no config .*; did you mean digits_vp. Choose from"),
]

SDES: Rows = [
    (lambda: sdes.VP(beta_min=0.0), r"\bbeta_min\b"),
    (lambda: sdes.VP(beta_min=-1.0), r"\bbeta_min\b"),
    (lambda: SubVP(beta_min=3.0, beta_max=2.0), r"\bbeta_min\b"),
    (lambda: sdes.VP(beta_max=NAN), r"\bbeta_max\b"),
    (lambda: sdes.VP(beta_max=1e9), r"\bbeta_max\b"),
    (lambda: VE(sigma_min=0.0), r"\bsigma_min\b"),
    (lambda: VE(sigma_min=2.0, sigma_max=1.0), r"\bsigma_min\b"),
    (lambda: LinearVE(sigma_max=0.0), r"\bsigma_max\b"),
    (lambda: LinearVE(sigma_max=NAN), r"\bsigma_max\b"),
    (
        lambda: losses.weight(VP.levels(1000), HALF, "likelihood"),
        "no likelihood weighting: choose the original",
    ),
    (lambda: SubVP().levels(1000), "limit of no discrete-time model"),
    (lambda: LinearVE().levels(1000), "limit of no discrete-time model"),
    (lambda: VE().levels(1), "n is 1:.* an integer of at least 2"),
    (lambda: VP.levels(1), "n is 1:.* an integer of at least 2"),
    (lambda: VP.levels(20), r"20 noise levels with beta_max=20.0.*more than 20"),
    (lambda: AlphaBarTable([0.9]), "two or more"),
    (lambda: AlphaBarTable([0.9, 0.5, 0.0]), "leave it out"),
    (lambda: AlphaBarTable([1.0, 0.5]), r"numbers in \(0, 1\)"),
    (lambda: AlphaBarTable([0.9, NAN]), r"numbers in \(0, 1\)"),
    (
        lambda: AlphaBarTable([0.9999, 0.99, 0.98]),
        "the last of alpha_bars is 0.98.*cumulative product",
    ),
    (
        lambda: AlphaBarTable([0.9, 0.5, 0.5]),
        r"alpha_bars\[1\]=0.5, alpha_bars\[2\]=0.5: give decreasing",
    ),
    (lambda: BetaSchedule(schedule="cubic"), "schedule is 'cubic'.*'linear'"),
    (lambda: BetaSchedule(beta_start=0.0), "alpha_bars lie in"),
    (lambda: BetaSchedule(beta_end=2.0), "beta_end is 2.0"),
    (lambda: BetaSchedule(steps=10), "more signal than noise"),
    (
        lambda: Schedule(lambda t: jnp.ones(2), lambda t: t * jnp.ones(2)).log_snr(HALF),
        r"Schedule.mean_coef returned .* of shape \(2,\) for t",
    ),
    *(
        (
            lambda std=std: sbml.Density(score, Wrong(std), (3,)),
            rf"Wrong.std returned {std!r} \(.*one number for each",
        )
        for std in (None, "1", {})
    ),
    *(
        (partial(kind, VP, eps), "smallest time eps=")
        for kind in times.PROPOSALS.values()
        for eps in (0.0, -1e-5, 1.0, 2.0, NAN)
    ),
    # Such points would have weights as if they were inside the interval, so the integral would be
    # wrong without an error.
    *(
        (partial(at, np.asarray(u)), message)
        for u, message in (
            ([0.5, 1.5], r"u is .* in \[0.5, 1.5\]: give .* in \[0, 1\]"),
            ([-1e-9, 0.5], r"u is .* in \[-1e-09, 0.5\]"),
            ([0.5, NAN], r"u is .* in \[nan, nan\]"),
            ([5], "u is int"),
        )
        for at in (
            *(kind(VP, EPS).at for kind in times.PROPOSALS.values()),
            times.Grid(10).at,
            partial(times.warp, density=np.ones(4)),
        )
    ),
    *(
        (partial(times.tally, np.zeros((2, 4)), np.asarray(v), np.ones(len(v)), 0.5), message)
        for v, message in (
            ([0.5, 1.5], r"v is .* in \[0.5, 1.5\]: give .* in \[0, 1\]"),
            ([-1e-9, 0.5], r"v is .* in \[-1e-09, 0.5\]"),
            ([0.5, NAN], r"v is .* in \[nan, nan\]"),
            ([5], "v is int"),
        )
    ),
    *(
        (partial(times.tally, np.zeros((2, 4)), v, values, 0.5), r"\b(v|values) is float")
        for v, values in ((V[:, None], V[:, None]), (V, V[:, None]), (V, V[:1]))
    ),
    (lambda: times.warp(V, np.ones((2, 4))), r"density is .* of shape \(2, 4\)"),
    *((partial(times.with_floor, np.ones(3), f), "floor") for f in (0.0, -0.1, 1.1, NAN)),
]

SCORES: Rows = [
    (
        lambda: losses.dsm(score, VP, X, HALF, KEY, weighting="vlb"),
        "weighting is 'vlb':.* give a text among",
    ),
    (lambda: losses.dsm(score, VP, X, jnp.full((3,), 0.5), KEY), "^t is"),
    # Otherwise vmap would map over the rows of t, and broadcasting would give a loss for each
    # dimension.
    (lambda: dsm_batch(t=np.full((4, 3), 0.5)), "^t is"),
    (lambda: dsm_batch(t=np.full((), 0.5)), "^t is"),
    (lambda: dsm_batch(x=np.ones(())), "^x is"),
    (lambda: dsm_batch(keys=np.zeros((4, 2), np.uint32)), "^keys is"),
    (lambda: dsm_batch(keys=np.zeros(4)), "^keys is"),
    (lambda: dsm_batch(keys=jax.random.split(KEY, 3)), "^keys is"),
    (lambda: dsm_batch(keys=KEY), "^keys is"),
    (lambda: dsm_batch(keys=jax.random.split(KEY, (1, 4))), "^keys is"),
    (lambda: dsm_batch(signs=np.ones((4, 3))), "^signs is"),
    (
        lambda: jax.jit(jax.vmap(lambda x, z: losses.perturb(VP, x, HALF, z)))(VS, np.ones(2)),
        "^z is",
    ),
    (
        lambda: elbo(
            trace=Trace("exact"), reduction=bound.Reduction(bound.GaussianControl(0, 1, None))
        ),
        r"trace=Trace\(kind='exact', .* control belongs to the denoising form only",
    ),
    (lambda: elbo(eps=0.0), "smallest time eps=0.0"),
    (lambda: elbo(jnp.zeros(3, jnp.uint8)), "^x is uint8"),
    (
        lambda: elbo(reduction=bound.Reduction(proposal="lattice")),
        "proposal is 'lattice':.* give a text among 'uniform', 'importance'",
    ),
    # This shape would broadcast against n draws without an error, and give far too low a bound.
    (lambda: elbo(u=jnp.full((4, 1), 0.5)), "^u is"),
    (lambda: elbo(u=5), "^u is"),
    (lambda: elbo(u=jnp.asarray([5])), "^u is int32"),
    (
        lambda: elbo(u=jnp.asarray([0.5, 1.5])),
        r"^u is float32 of shape \(2,\) in \[0.5, 1.5\]: give .* in \[0, 1\]",
    ),
    (lambda: elbo(u=jnp.asarray(0.5)), "^u is"),
    (lambda: integer_elbo(np.array([5.0])), "^pixels is float64"),
    (lambda: integer_elbo(eps=2.0), "must lie in"),
    (lambda: integer_elbo(noise="categorical"), "^noise is"),
    (lambda: integer_elbo(reduction=None), "^reduction is"),
    *((partial(logp, eps=eps), "smallest time eps=") for eps in (0.0, -1.0, 1.0, NAN)),
    (lambda: logp(jnp.zeros(3, jnp.uint8)), "^x is uint8"),
    (
        lambda: logp(trace=Trace()),
        "key=None with a rademacher trace.*pass a key, or use the exact trace, Trace",
    ),
    (lambda: Trace("sobol"), "kind is 'sobol':.* give a text among '"),
    (lambda: Trace("gaussian", 0), "probes is 0:.* give an integer of at least 1"),
    (lambda: divergence.probes(KEY, (2, 3), 1, "sobol"), "kind is 'sobol'"),
    (lambda: divergence.probes(KEY, (2, 3), 0), "count is 0:.* an integer of at least 1"),
    (
        lambda: divergence.hutchinson(lambda x: jnp.sum(x)[None], X, VS),
        r"f\(x\) has shape \(1,\) for x of shape \(3,\)",
    ),
    (lambda: divergence.exact(jnp.sum, X), r"f\(x\) has shape \(\) for x of shape \(3,\)"),
    *(
        (partial(divergence.hutchinson, jnp.sin, X, vs), "vs is float32 of shape")
        for vs in (VS[0], VS[:, None], VS[:, :2], VS[0, 0])
    ),
    (lambda: check_function(lambda x: x, "network", "x", "t"), "too many positional arguments"),
    (
        lambda: check_function(lambda x, t, key: x, "network", "x", "t"),
        "missing a required argument: 'key'",
    ),
    (lambda: check_function(lambda x, *, t: x, "net", "x", "t"), "too many positional arguments"),
    (lambda: Solver(method="rk45"), "method is 'rk45': "),
    (lambda: Solver(method="euler"), "method=euler has no error estimate"),
    (lambda: Solver(fixed_steps=0), "fixed_steps is 0: "),
    (lambda: Solver(fixed_steps=-2), "fixed_steps is -2: "),
    (lambda: Solver(max_steps=0), "max_steps is 0: "),
    *(
        (partial(Solver, **{name: bad}), f"{name} is {bad}: give a number")
        for name in ("rtol", "atol", "first_step", "power")
        for bad in (INF, NAN, 0.0, -1.0)
    ),
    (lambda: DDIM(steps=0), "steps is 0:.* an integer of at least 1"),
    (lambda: EulerMaruyama(spacing="cosine"), "spacing is 'cosine':.*time.*log_snr"),
    (lambda: DDIM(eta=2), r"eta is 2:.* in \[0, 1\]"),
    (lambda: Langevin(snr=0.0), "snr is 0.0:.* positive and finite"),
    *(
        (call, "smallest time eps=")
        for eps in (0.0, -1.0, 1.0, 2.0, NAN)
        for call in (
            partial(samplers.decode, score, VP, X, eps=eps),
            partial(samplers.ode_sample, score, VP, (1, 3), KEY, eps=eps),
        )
    ),
    (lambda: Adapter(MODEL, VP, parameterization="speed"), "parameterization is 'speed': "),
    (lambda: Adapter(MODEL, VP, label="beta"), "label is 'beta': "),
    (lambda: Adapter(MODEL, VP, eps=0.0), "eps=0.0"),
    (lambda: Adapter(MODEL, VP, eps=1.0), "eps=1.0"),
    (lambda: Adapter(MODEL, VP, log_snr_range=(5.0, 5.0)), r"log_snr_range is \(5.0, 5.0\): "),
    (
        lambda: Adapter(nn.Dense(1), sdes.Rescaled(VP, 2.0), parameterization="levels", levels=8),
        "sde=Rescaled.*levels",
    ),
    # An infinite one gives infinite scores, and a lower learning rate would not help.
    *(
        (call, f"data_std is {bad}:.* that is positive and finite")
        for bad in (0.0, -1.0, INF, NAN)
        for call in (
            partial(Adapter, MODEL, VP, data_std=bad),
            partial(from_prediction, lambda x, t: x, "edm", VP, data_std=bad),
        )
    ),
    (
        lambda: from_prediction(lambda x, t: x, "v", VP),
        "kind is 'v':.* give a text among 'noise', 'score', ",
    ),
    *(
        (
            lambda kind=kind: from_prediction(lambda x, t: t, kind, VP)(jnp.ones(2), HALF),
            r"shape \(\) for an input of \(2,\)",
        )
        for kind in ("noise", "flow")
    ),
    (lambda: integers.posterior_mean(OUT, X, HALF, 5, "centre"), "out, .* needs 5 numbers"),
    (lambda: integers.posterior_mean(OUT, X, HALF, 4, "bins"), "^data is 'bins'"),
    *(
        (partial(call, levels=65_537), r"levels is 65537:.* integer in \[2, 65536\]")
        for call in (partial(bits.to_model, INTEGER, 0.5), partial(bits.check_dequantized, V))
    ),
    (lambda: Moments.of(np.zeros((1, 3))), "1 features: a covariance needs at least two"),
    (lambda: distances.kernel(np.zeros((1, 3)), np.zeros((5, 3))), "1 and 5 features"),
    (lambda: Moments.of(np.zeros((5, 0))), r"examples of shape \(0,\) have no numbers"),
    (
        lambda: dequantizers.DEQUANTIZERS["logistic"],
        "categorical, learned, truncated_normal, uniform, variational",
    ),
    *(
        (partial(truncated_normal.Model, tau), f"tau is {tau}:.* that is positive and finite")
        for tau in (0, INF, NAN)
    ),
]


@pytest.mark.parametrize(("call", "message"), [*NETWORKS, *DATA, *SDES, *SCORES])
def test_a_refused_call_says_what_is_wrong(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
