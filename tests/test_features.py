"""Inception-v3 against torchvision's and pytorch-fid's with random weights; other extractors."""

import functools
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_fid import inception as pytorch_fid
from torchvision.models import inception_v3

from sbml import data
from sbml.features import EXTRACTORS, digits_classifier, inception
from sbml.features._torch_file import _tensor, read_state_dict

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


def with_random_weights(model: Any) -> Any:
    """Of a size that keeps the signal through all layers, and statistics that matter."""
    generator = torch.Generator().manual_seed(1)
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith(("running_var", "bn.weight")):
            state[name] = torch.rand(value.shape, generator=generator) + 0.5
        elif value.ndim == 4:
            fan_in = float(np.prod(value.shape[1:]))
            state[name] = torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5
        elif value.ndim:
            state[name] = torch.randn(value.shape, generator=generator) * 0.05
    model.load_state_dict(state)
    return model.eval()


@functools.cache
def network(fid: bool) -> Any:
    if not fid:
        plain = inception_v3(weights=None, aux_logits=False, init_weights=False)
        return with_random_weights(plain)
    # As pytorch-fid builds it before it downloads the weights.
    model = pytorch_fid._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    for name, width, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        setattr(model, f"Mixed_{name}", pytorch_fid.FIDInceptionA(width, pool_features=pooled))
    for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        setattr(model, f"Mixed_{name}", pytorch_fid.FIDInceptionC(768, channels_7x7=width))
    model.Mixed_7b = pytorch_fid.FIDInceptionE_1(1280)
    model.Mixed_7c = pytorch_fid.FIDInceptionE_2(2048)
    return with_random_weights(model)


@pytest.mark.parametrize("fid", [False, True])
def test_features_and_probabilities_are_pytorchs(fid: bool) -> None:
    theirs = network(fid)
    x = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2) / 255).float()
    options = {"mode": "bilinear", "align_corners": False}
    x = torch.nn.functional.interpolate(x, size=(299, 299), **options)
    seen: list[Any] = []
    hook = theirs.avgpool.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        logits = theirs(2 * x - 1)
    hook.remove()
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    params = inception.from_state_dict(state)
    model = inception.Model(len(params["fc"]["bias"]), fid=fid)
    features, probabilities = inception.look(params, IMAGES, model)
    assert np.abs(features).max() > 1
    np.testing.assert_allclose(features, seen[0].numpy().reshape(2, -1), atol=1e-4)
    np.testing.assert_allclose(probabilities, torch.softmax(logits, 1).numpy(), atol=1e-6)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_read_without_pytorch(zipped: bool, tmp_path: Path) -> None:
    state = {
        "a.weight": torch.arange(24.0).reshape(2, 3, 4),
        "a.transposed": torch.arange(6.0).reshape(2, 3).T,
        "b": torch.nn.Parameter(torch.ones(2, dtype=torch.float64)),
        "count": torch.tensor(7),
    }
    state["shared"] = state["a.weight"][1]
    file = tmp_path / "weights.pth"
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    found = read_state_dict(file)
    assert found.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(found[name], value.detach().numpy())


class Malicious:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("harm"),)


def test_nothing_in_a_weights_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, zipped in enumerate((True, False)):
        file = tmp_path / f"{number}.pth"
        torch.save({"a": Malicious()}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="not a PyTorch state dict: it wants"):
            read_state_dict(file)
    assert not (tmp_path / "harm").exists()
    (tmp_path / "text.pth").write_text("weights")
    with pytest.raises(ValueError, match="not a PyTorch state dict"):
        read_state_dict(tmp_path / "text.pth")


def test_the_file_is_checked_and_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "BATCH", 3)
    file = tmp_path / "weights.pth"
    torch.save(network(True).state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    options = {"weights": str(file), "levels": 256, "cache": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=f"has the SHA-256 {digest}, not 6726825d"):
        EXTRACTORS["inception"](sha256="6726825d", **options)
    extractor = EXTRACTORS["inception"](sha256=digest[:8], **options)
    # Only the published weights make numbers by these names.
    assert extractor.names[0] == f"FID (weights {digest[:8]})"
    features, probabilities = extractor(IMAGES)
    assert features.shape == (2, 2048) and probabilities.shape == (2, 1008)
    [kept] = (tmp_path / "cache" / "features").iterdir()
    written = kept.stat().st_mtime_ns
    again, _ = EXTRACTORS["inception"](sha256=digest[:8], **options)(IMAGES[1:])
    np.testing.assert_allclose(again, features[1:], rtol=1e-5, atol=1e-5)
    assert kept.stat().st_mtime_ns == written


@pytest.mark.parametrize("weights", ["", "nowhere.pth"])
def test_without_weights_the_error_says_what_to_do(weights: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"download pt_inception-2015.*inception_weights"):
        EXTRACTORS["inception"](weights=weights, sha256="", levels=256, cache=str(tmp_path))


def test_other_weights_are_named(tmp_path: Path) -> None:
    state = dict(network(True).state_dict())
    state["fc.bias"] = torch.zeros(3)
    state.pop("Mixed_7c.branch_pool.conv.weight")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"missing: Mixed_7c/branch_pool/kernel \(1, 1, 2048, 192\)"
    ):
        inception.load(tmp_path / "w.pth", "", tmp_path)


def test_the_digits_classifier_classifies() -> None:
    extract = digits_classifier.extractor(weights="", sha256="", levels=17, cache=None)
    images = data.load("digits", "test").images
    features, probabilities = extract(images)
    assert features.shape == (360, digits_classifier.HIDDEN) and (features >= 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert not any(name.startswith(("FID", "KID", "IS")) for name in extract.names)
    assert "% right" in extract.names[0]
    with pytest.raises(ValueError, match="eval.features=inception"):
        digits_classifier.extractor(weights="", sha256="", levels=256, cache=None)
    with pytest.raises(ValueError, match=r"images of shape \(28, 28, 1\)"):
        extract(np.zeros((1, 28, 28, 1), np.uint8))


def test_pickles_that_are_no_state_dict(tmp_path: Path) -> None:
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2]) * 5)
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    for name in ("list.pkl", "arrays.npz"):
        with pytest.raises(ValueError, match="not a PyTorch state dict"):
            read_state_dict(tmp_path / name)


def test_a_tensor_beyond_its_storage_is_refused() -> None:
    """Whatever lies behind it in memory would be read."""
    storage = np.arange(6.0)
    np.testing.assert_array_equal(_tensor(storage, 1, (2, 2), (3, 1)), [[1, 2], [4, 5]])
    assert _tensor(storage, 6, (0, 4), (4, 1)).size == 0
    for offset, size, stride in (
        (2, (2, 2), (3, 1)),
        (0, (7,), (1,)),
        (3, (2,), (-1,)),
        (-1, (1,), (1,)),
    ):
        with pytest.raises(pickle.UnpicklingError, match="goes beyond its storage"):
            _tensor(storage, offset, size, stride)
