"""Warnings about a model, its dequantizers and the images, before these are evaluated."""

from sbml.evaluation.inputs import Dequantization, Inputs
from sbml.experiment import trained
from sbml.runtime.checkpoint import Restored
from sbml.runtime.trees import tree_crc32


def warnings(inputs: Inputs, dequantizations: dict[str, Dequantization]) -> list[str]:
    """All warnings; ``dequantizations`` are by name."""
    restored = inputs.restored
    found = [f"damaged, so an older checkpoint was taken: {r}" for r in restored.damaged]
    found += of_training(inputs)
    for name, dequantizer in dequantizations.items():
        found += of_dequantizer(restored, name, dequantizer)
    return found + of_images(inputs)


def of_training(inputs: Inputs) -> list[str]:
    """Warnings if the model was trained on other data, other times, or without dequantization."""
    metadata = inputs.restored.metadata
    found = trained.other_data(metadata, inputs.train)
    found += trained.unseen_times(metadata, inputs.experiment.eval_eps)
    if metadata["config"]["data"]["dequantization"] == "none":
        found.append(
            "the model was trained on k / (levels - 1) without dequantization, and is evaluated "
            "on (k + u) / levels: this mismatch increases bits/dim "
            "(data.dequantization=uniform trains on the data that are evaluated)"
        )
    return found


def of_dequantizer(restored: Restored, name: str, dequantizer: Dequantization) -> list[str]:
    """Warnings if the dequantizer does not fit the score's training data, or was trained for
    another score."""
    found = []
    trained_on = restored.metadata["config"]["data"]["dequantization"]
    if dequantizer.model.at_noise and trained_on == "uniform":
        found.append(
            f"{name}: the model was trained on uniformly dequantized images, but this dequantizer "
            "puts noise around bin centres. The number is a valid but loose bound: evaluate with "
            "--config.eval.dequantizers=uniform, or train with --config.data.dequantization=centre"
        )
    if not dequantizer.model.at_noise and trained_on == "centre":
        found.append(
            f"{name}: the model was trained on bin centres, but this dequantizer needs its density "
            "in the whole bins. The number is a valid but loose bound: evaluate with "
            "--config.eval.dequantizers=truncated_normal, or train with "
            "--config.data.dequantization=uniform"
        )
    if dequantizer.restored is not None:
        score = dequantizer.restored.metadata["score"]
        if score["crc32"] != tree_crc32(restored.state.ema_params):
            found.append(
                f"{name}: trained for another score (step {score['step']}). The number is a valid "
                "but loose bound: train the dequantizer again with --mode=train_dequantizer"
            )
    return found


def of_images(inputs: Inputs) -> list[str]:
    """Warnings if files are not used, or images are not evaluated; cautions of the image sets."""
    images, train, found = inputs.images, inputs.train, []
    for split in {images.split: images, train.split: train}.values():
        if split.skipped:
            paths, count = "; ".join(split.skipped), len(split.skipped)
            files = "file is" if count == 1 else "files are"
            found.append(f"{count} {split.split} {files} not used: {paths}")
    if (count := len(inputs.ids())) < len(images):
        sample = "the first" if inputs.experiment.config.eval.in_order else "a random sample of"
        found.append(f"{sample} {count} of {len(images)} images (eval.max_images)")
    # If the images have scenes, the caution is about the interval, which is not of these images.
    cautions = [images.caution, train.caution if train.scenes is None else ""]
    return [*found, *filter(None, dict.fromkeys(cautions))]
