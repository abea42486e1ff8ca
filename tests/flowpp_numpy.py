"""Song et al.'s Flow++ dequantizers in NumPy, with parameters under the names of their code.

This is independent of ``sbml.dequantizers``: convolutions, attention and mixtures are written out
here. Images are (n, h, w, c). Kernels ``_W`` of 3 x 3 pixels read images as (n, w, h, c).
"""

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

Params = dict[str, np.ndarray]


def concat_elu(x: np.ndarray) -> np.ndarray:
    x = np.concatenate([x, -x], axis=-1)
    return np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1)


def conv(p: Params, name: str, x: np.ndarray) -> np.ndarray:
    if f"{name}_V" in p:
        v = p[f"{name}_V"]
        kernel = p[f"{name}_g"] * v / np.sqrt((v**2).sum((0, 1, 2)))
    else:
        kernel = p[f"{name}_W"].transpose(1, 0, 2, 3)
    h, w = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [padded[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3)]
    return sum(taps) + p[f"{name}_b"]


def linear(p: Params, name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}_W"] + p[f"{name}_b"]


def gate(x: np.ndarray) -> np.ndarray:
    a, b = np.split(x, 2, axis=-1)
    return a / (1 + np.exp(-b))


def gated_conv(
    p: Params, name: str, x: np.ndarray, context: np.ndarray | None, second: Any
) -> np.ndarray:
    h = conv(p, f"{name}_c1", concat_elu(x))
    if context is not None:
        h = h + linear(p, f"{name}_a_proj", concat_elu(context))
    return x + gate(second(p, f"{name}_c2", concat_elu(h)))


def layer_norm(p: Params, name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[f"{name}_g"]
        + (p[f"{name}_b"])
    )


def attention(p: Params, name: str, x: np.ndarray, positions: np.ndarray, heads: int) -> np.ndarray:
    n, h, w, c = x.shape
    qkv = linear(p, f"{name}_proj1", x + positions).reshape(n, h * w, 3, heads, c // heads)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    logits = q @ k.swapaxes(-1, -2) / np.sqrt(c // heads)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    joined = (weights @ v).transpose(0, 2, 1, 3).reshape(n, h, w, c)
    return x + gate(linear(p, f"{name}_proj2", joined))


def log_sum_exp(x: np.ndarray) -> np.ndarray:
    top = x.max(-1)
    return top + np.log(np.exp(x - top[..., None]).sum(-1))


def coupling(
    p: Params, a: np.ndarray, b: np.ndarray, context: np.ndarray, blocks: int, heads: int
) -> tuple[np.ndarray, np.ndarray]:
    """The new b, and the sum of log db'/db for each image."""
    first, last = ("c1", "c2") if "c1_b" in p else ("proj_in", "proj_out")
    x = conv(p, first, a)
    for i in range(blocks):
        x = gated_conv(p, f"block{i}_conv", x, context, linear)
        x = layer_norm(p, f"block{i}_ln1", x)
        x = attention(p, f"block{i}_attn", x, p["pos_emb"], heads)
        x = layer_norm(p, f"block{i}_ln2", x)
    if first == "c1":
        x = concat_elu(x)
    x = conv(p, f"block{blocks - 1}_{last}", x)
    x = x.reshape(*a.shape, x.shape[-1] // a.shape[-1])
    log_scale, shift = np.tanh(x[..., 0]), x[..., 1]
    logits, means, log_scales = np.split(x[..., 2:], 3, axis=-1)
    log_scales = np.maximum(log_scales, -7)
    log_w = logits - log_sum_exp(logits)[..., None]
    z = (b[..., None] - means) * np.exp(-log_scales)
    below, above = -np.logaddexp(0, -z), -np.logaddexp(0, z)
    log_f, log_1mf = log_sum_exp(log_w + below), log_sum_exp(log_w + above)
    log_density = log_sum_exp(log_w + below + above - log_scales)
    slope = log_density - log_f - log_1mf + log_scale
    return np.exp(log_scale) * (log_f - log_1mf) + shift, slope.sum((1, 2, 3))


def flow(
    params: dict[str, Params], image: np.ndarray, eps: np.ndarray, blocks: int, heads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of u ``(n, h, w, c)`` and log q(u) ``(n,)``; ``image`` in [-1/2, 1/2]."""
    context = np.concatenate([image[:, :, 0::2], image[:, :, 1::2]], axis=-1)
    deep = params.get("DeepProcessor_0")
    p = params["ShallowProcessor_0"] if deep is None else deep
    context = conv(p, "proj", context)
    for i in range(sum(name.endswith("_c1_b") for name in p)):
        context = gated_conv(p, f"c{i}", context, None, conv)
        if deep is not None:
            context = layer_norm(p, f"dqln{i}", context)
            context = attention(p, f"dqattn{i}", context, p["pos_emb_dq"], 4)
            context = layer_norm(p, f"ln{i}", context)
    a, b = eps[:, :, 0::2], eps[:, :, 1::2]
    log_det = np.zeros(len(eps))
    for i in range(sum(name.startswith("Norm_") for name in params)):
        norm = params[f"Norm_{i}"]
        a, b = (x * norm[f"norm{j}_g"] + norm[f"norm{j}_b"] for j, x in enumerate((a, b)))
        log_det = log_det + sum(np.log(norm[f"norm{j}_g"]).sum() for j in (0, 1))
        if mixing := params.get(f"Pointwise_{i}"):
            a, b = a @ mixing["W0"], b @ mixing["W1"]
            dets = [np.linalg.slogdet(mixing[name])[1] for name in ("W0", "W1")]
            log_det = log_det + a.shape[1] * a.shape[2] * sum(dets)
        b, change = coupling(params[f"MixLogisticAttnCoupling_{i}"], a, b, context, blocks, heads)
        log_det = log_det + change
        a, b = b, a
    logits = np.stack([a, b], axis=3).reshape(eps.shape)
    sigmoid = -np.logaddexp(0, logits) - np.logaddexp(0, -logits)
    log_normal = -0.5 * (eps**2 + np.log(2 * np.pi))
    return logits, (log_normal - sigmoid).sum((1, 2, 3)) - log_det


def foreign(params: Any) -> dict[str, Params]:
    """The parameters of ``sbml.dequantizers.variational`` under Song et al.'s names."""
    deep = "DeepProcessor_0" in params
    letters = {"kernel": "W", "direction": "V", "bias": "b", "scale": "g"}
    names: dict[str, Params] = {}
    for module, leaves in params.items():
        for path, value in flatten_dict(leaves).items():
            value, name = np.asarray(value), "_".join(path[:-1])
            if deep and module.startswith("MixLogistic"):
                name = "c1" if name == "proj_in" else name.replace("_proj_out", "_c2")
            if name:
                name = f"{name}_{letters[path[-1]]}"
            if "ln" in name:
                value = value.reshape(1, 1, 1, -1)
            if path[-1] == "kernel" and value.ndim == 4:
                value = value.transpose(1, 0, 2, 3)
            names.setdefault(module, {})[name or path[-1]] = value
    return names
