"""Writes the PyTorch files that ``tests/test_features.py`` reads.

    PYTHONPATH=tests python tests/data/make_inception.py

It needs torch, torchvision and pytorch-fid, which the tests then do without; the files were made
with versions 2.13.0, 0.28.0 and 0.3.0, by Python 3.11. ``inception.npz`` has images, what
torchvision's and pytorch-fid's Inception-v3 make of them with the random weights of
``inception_weights``, and the shapes of those; ``state_*.pth`` are a state dict in both of
PyTorch's formats, ``malicious_*.pth`` pickles that touch a file when they are loaded.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inception_weights import random_weights, write_state_dict
from pytorch_fid import inception as pytorch_fid
from torchvision.models import inception_v3

DATA = Path(__file__).parent
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


def network(fid: bool) -> Any:
    if not fid:
        return inception_v3(weights=None, aux_logits=False, init_weights=False)
    # As pytorch-fid builds it before it downloads the weights.
    model = pytorch_fid._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    for name, width, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        setattr(model, f"Mixed_{name}", pytorch_fid.FIDInceptionA(width, pool_features=pooled))
    for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        setattr(model, f"Mixed_{name}", pytorch_fid.FIDInceptionC(768, channels_7x7=width))
    model.Mixed_7b = pytorch_fid.FIDInceptionE_1(1280)
    model.Mixed_7c = pytorch_fid.FIDInceptionE_2(2048)
    return model


def with_random_weights(model: Any) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """The model with them, and the shape of everything in its state dict."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        # Through a file, so that PyTorch confirms the format which the tests write.
        file = Path(folder) / "weights.pth"
        write_state_dict(file, random_weights(shapes))
        model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval(), shapes


def answers(model: Any, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Features and class probabilities of ``IMAGES``, computed in ``dtype``."""
    model = model.to(dtype)
    x = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2) / 255).to(dtype)
    options = {"mode": "bilinear", "align_corners": False}
    x = torch.nn.functional.interpolate(x, size=(299, 299), **options)
    seen: list[Any] = []
    hook = model.avgpool.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        logits = model(2 * x - 1)
    hook.remove()
    return seen[0].numpy().reshape(len(IMAGES), -1), torch.softmax(logits, 1).numpy()


def write_answers() -> None:
    arrays: dict[str, Any] = {"images": IMAGES}
    listing = {}
    for name, fid in (("torchvision", False), ("pytorch_fid", True)):
        model, listing[name] = with_random_weights(network(fid))
        # The float64 answers are stored. PyTorch's in float32 have to be within a quarter of the
        # tests' tolerances of them, or it would be luck whether another float32 network's are.
        single, double = answers(model, torch.float32), answers(model, torch.float64)
        for what, limit, a, b in zip(
            ("features", "probabilities"), (2.5e-5, 2.5e-7), single, double, strict=True
        ):
            assert (found := np.abs(a - b).max()) < limit, f"{name}: {what} differ by {found}"
            arrays[f"{name}_{what}"] = b.astype(np.float32)
    np.savez_compressed(DATA / "inception.npz", shapes=json.dumps(listing), **arrays)


class Malicious:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("harm"),)


def write_small_files() -> None:
    state = {
        "a.weight": torch.arange(24.0).reshape(2, 3, 4),
        "a.transposed": torch.arange(6.0).reshape(2, 3).T,
        "b": torch.nn.Parameter(torch.ones(2, dtype=torch.float64)),
        "count": torch.tensor(7),
    }
    state["shared"] = state["a.weight"][1]
    # Python 3.13 alone pickles paths by a name that the other versions do not have.
    assert Path.__module__ == "pathlib"
    for kind, zipped in (("zip", True), ("legacy", False)):
        options: Any = {"_use_new_zipfile_serialization": zipped}
        torch.save(state, DATA / f"state_{kind}.pth", **options)
        # By an older protocol Path.touch would be an attribute, got by a builtin.
        options["pickle_protocol"] = 4
        torch.save({"a": Malicious()}, DATA / f"malicious_{kind}.pth", **options)


if __name__ == "__main__":
    write_answers()
    write_small_files()
