"""Inception-v3 (Szegedy et al. 2015), the network of FID, KID and the Inception Score.

    images -> [0, 1] -> 299x299, bilinear -> [-1, 1] -> features (2048), class probabilities (1008)

The network is the one that TensorFlow published in 2015; pytorch-fid distributes its weights as a
PyTorch state dict. The user provides this file: nothing is downloaded. The file is checked by its
SHA-256, and its batch normalisations are folded into the convolutions.

The Inception Score here is computed over all images at once, from the network's probabilities.
Salimans et al. instead average it over ten tenths of the images and leave out the bias of the last
layer.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from sbml.core.pytrees import in_batches
from sbml.core.types import Array, PyTree
from sbml.program.features import Extractor
from sbml.program.runtime import weights as files
from sbml.program.runtime.trees import differences

FILE = "pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d"  # The first digits: PyTorch puts them at the end of the name of a weights file.
SIZE, BATCH, EPSILON = 299, 50, 1e-3

same: Any = {"window_shape": (3, 3), "padding": "SAME"}
average = functools.partial(nn.avg_pool, **same, count_include_pad=False)
largest = functools.partial(nn.max_pool, **same)
halve = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))

# A branch is a list of convolutions.
Convolution = tuple[Any, ...]  # (name, channels, kernel) or (name, channels, kernel, stride)
Branches = Sequence[Sequence[Convolution | Sequence[Convolution]]]
Map = Callable[[Array], Array]


class _Block(nn.Module):
    """Parallel branches and one branch of pooled inputs, concatenated along the channels.

    A step of a branch is one convolution, or a list of convolutions that read the same input.
    """

    branches: Branches
    pool: Map
    pooled: int = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        results = []
        for branch in self.branches:
            h = x
            for step in branch:
                forks = [step] if isinstance(step[0], str) else step
                h = jnp.concatenate([_conv(h, *fork) for fork in forks], axis=-1)
            results.append(h)
        h = self.pool(x)
        results.append(_conv(h, "branch_pool", self.pooled, (1, 1)) if self.pooled else h)
        return jnp.concatenate(results, axis=-1)


def _conv(x: Array, name: str, features: int, kernel: tuple[int, int], stride: int = 1) -> Array:
    """relu(convolution + bias). Strided convolutions and two others have no padding; the rest are
    padded so that the size stays the same."""
    padding = "VALID" if stride > 1 or name in ("Conv2d_2a_3x3", "Conv2d_4a_3x3") else "SAME"
    return nn.relu(nn.Conv(features, kernel, stride, padding=padding, name=name)(x))


class Model(nn.Module):
    """Features ``(n, 2048)`` and logits ``(n, classes)`` of ``x (n, 299, 299, 3)`` in [-1, 1].

    As in TensorFlow's network of 2015, and other than in torchvision's, averages do not count the
    padding, and the last block takes the maximum.
    """

    classes: int = 1008

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        x = _conv(x, "Conv2d_1a_3x3", 32, (3, 3), 2)
        x = _conv(x, "Conv2d_2a_3x3", 32, (3, 3))
        x = halve(_conv(x, "Conv2d_2b_3x3", 64, (3, 3)))
        x = _conv(x, "Conv2d_3b_1x1", 80, (1, 1))
        x = halve(_conv(x, "Conv2d_4a_3x3", 192, (3, 3)))
        for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = _Block(_A, average, pooled, name=name)(x)
        x = _Block(_B, halve, name="Mixed_6a")(x)
        for name, width in zip("bcde", (128, 160, 160, 192), strict=True):
            x = _Block(_c(width), average, 192, name=f"Mixed_6{name}")(x)
        x = _Block(_D, halve, name="Mixed_7a")(x)
        x = _Block(_E, average, 192, name="Mixed_7b")(x)
        x = _Block(_E, largest, 192, name="Mixed_7c")(x)
        features = x.mean((1, 2))
        return features, nn.Dense(self.classes, name="fc")(features)


def _chain(name: str, *steps: Any) -> list[Convolution]:
    """The convolutions ``name``_1, ``name``_2 ..., one after the other."""
    return [(f"{name}_{i}", *step) for i, step in enumerate(steps, 1)]


ONE, THREE, FIVE = (1, 1), (3, 3), (5, 5)
WIDE, TALL = (1, 7), (7, 1)
_A: Branches = [
    [("branch1x1", 64, ONE)],
    _chain("branch5x5", (48, ONE), (64, FIVE)),
    _chain("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE)),
]
_B: Branches = [
    [("branch3x3", 384, THREE, 2)],
    _chain("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE, 2)),
]
_D: Branches = [
    _chain("branch3x3", (192, ONE), (320, THREE, 2)),
    _chain("branch7x7x3", (192, ONE), (192, WIDE), (192, TALL), (192, THREE, 2)),
]
_E: Branches = [
    [("branch1x1", 320, ONE)],
    [
        ("branch3x3_1", 384, ONE),
        [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))],
    ],
    [
        *_chain("branch3x3dbl", (448, ONE), (384, THREE)),
        [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))],
    ],
]


def _c(n: int) -> Branches:
    return [
        [("branch1x1", 192, ONE)],
        _chain("branch7x7", (n, ONE), (n, WIDE), (192, TALL)),
        _chain("branch7x7dbl", (n, ONE), (n, TALL), (n, WIDE), (n, TALL), (192, WIDE)),
    ]


def from_state_dict(state: dict[str, np.ndarray]) -> dict[str, PyTree]:
    """Parameters of :class:`Model` from torchvision's or pytorch-fid's names and layouts.

    A convolution y followed by scale (y - mean) / sqrt(var + 1e-3) + shift becomes one convolution
    with a bias. Auxiliary heads and counters are left out.
    """
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, value in state.items():
        if not name.startswith("AuxLogits"):
            module, _, leaf = name.rpartition(".")
            modules.setdefault(module, {})[leaf] = np.asarray(value)
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for module, leaves in modules.items():
        if module.endswith(".conv"):
            path, bn = module.removesuffix(".conv"), modules[f"{module[:-5]}.bn"]
            scale = bn["weight"] / np.sqrt(bn["running_var"] + EPSILON)
            kernel = leaves["weight"].transpose(2, 3, 1, 0) * scale
            flat[(*path.split("."), "kernel")] = kernel
            flat[(*path.split("."), "bias")] = bn["bias"] - bn["running_mean"] * scale
        elif module == "fc":
            flat[("fc", "kernel")], flat[("fc", "bias")] = leaves["weight"].T, leaves["bias"]
    params = unflatten_dict(flat)
    classes = len(params["fc"]["bias"]) if "fc" in params else 1008
    image = jnp.zeros((1, SIZE, SIZE, 3))
    expected = jax.eval_shape(Model(classes).init, jax.random.key(0), image)["params"]
    if mismatch := differences(params, expected):
        raise ValueError("these are not the weights of Inception-v3:\n  " + "\n  ".join(mismatch))
    return jax.tree.map(lambda a: np.asarray(a, np.float32), params)


@functools.partial(jax.jit, static_argnames="model")
def look(params: PyTree, images: Array | np.ndarray, model: Model) -> tuple[Array, Array]:
    """Features ``(n, 2048)`` and class probabilities ``(n, classes)`` of uint8 ``images (n, h, w,
    c)``; a grey channel is repeated as red, green and blue."""
    # With the default precision of accelerators, matrix products have fewer digits and FID differs.
    with jax.default_matmul_precision("highest"):
        x = jnp.broadcast_to(images, (*images.shape[:3], 3)) / 255.0
        x = jax.image.resize(x, (len(x), SIZE, SIZE, 3), "bilinear", antialias=False)
        found = model.apply({"params": params}, 2 * x - 1)
    features, logits = cast(tuple[Array, Array], found)
    return features, jax.nn.softmax(logits)


def extractor(*, weights: str, sha256: str, levels: int, cache: str | None) -> Extractor:
    """The extractor of FID, KID and IS with the file ``weights``; ``cache`` is not used."""
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ValueError(
            f"FID, KID and IS need Inception's weights: download {FILE} from the releases of "
            "https://github.com/mseitzer/pytorch-fid and set "
            f"--config.eval.quality.inception_weights to it (now {weights!r}), or use another "
            "eval.quality.features"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(sha256):
        raise ValueError(
            f"{path} has the SHA-256 {digest}, not {sha256}...: download it again, or set "
            "eval.quality.inception_sha256 if you want to use other weights"
        )
    params: PyTree = from_state_dict(files.read(path, "PyTorch state dict"))
    model, params = Model(len(params["fc"]["bias"])), jax.device_put(params)

    def features(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.rint(images * (255 / (levels - 1))).astype(np.uint8)
        each = in_batches(lambda i: look(params, pixels[i], model), np.arange(len(pixels)), BATCH)
        found, probabilities = zip(*(results for _, results in each), strict=True)
        return np.concatenate(found), np.concatenate(probabilities)

    # Only numbers from the published weights are called FID, KID and IS without an addition.
    published = digest.startswith(SHA256)
    names = ("FID", "KID", "IS")
    labels = names if published else tuple(f"{n} (weights {digest[:8]})" for n in names)
    return Extractor(f"inception_{digest[:16]}", labels, features)  # type: ignore[arg-type]
