"""Feature extractors for the metrics of sample quality, by name.

    extractor = EXTRACTORS[name](weights="...", sha256="...", levels=..., cache=...)
    features, probabilities = extractor(images)       uint8 (n, h, w, c) -> (n, d), (n, classes)

``inception`` gives FID, KID and the Inception Score. ``digits_classifier`` is fitted here, in about
a second, to the digits of scikit-learn; its distances have other names, because they are not
comparable with FID and KID.
"""

from sbml.features._extractor import Extractor
from sbml.registry import Registry

EXTRACTORS = Registry(
    "feature extractor",
    {
        "inception": "sbml.features.inception:extractor",
        "digits_classifier": "sbml.features.digits_classifier:extractor",
    },
)

__all__ = ["EXTRACTORS", "Extractor"]
