"""Differences between the two published flows of the Flow++ dequantizer.

                        CIFAR-10                         ImageNet 32x32
    couplings           4                                8
    channels            mixed after each normalisation   not mixed
    convolutions        with a plain kernel              weight-normalised, g V / |V|
    end of a network    a convolution                    concat_elu and a convolution
    context network     3 gated convolutions             8, each with normalisation and attention
                                                         of 4 heads
    filters, blocks     96, 2                            128, 8
    parameters, 32x32   3,466,976                        35,482,720

The context network reads the image and passes its features to the couplings.

Reference: Ho et al. 2019 (Flow++); Song et al. 2021 use both.
"""

from typing import NamedTuple


class Design(NamedTuple):
    """The layers of a flow, and how the networks in it are built.

    ``context`` is the name of the context network in the parameters. It has ``context_blocks``
    gated convolutions, each followed by attention with ``context_heads`` heads, or by none if
    ``context_heads`` is 0.
    """

    couplings: int
    mixes_channels: bool
    weight_norm: bool
    ends_in_elu: bool
    context: str
    context_blocks: int
    context_heads: int


DESIGNS = {
    "cifar10": Design(
        couplings=4,
        mixes_channels=True,
        weight_norm=False,
        ends_in_elu=False,
        context="ShallowProcessor_0",
        context_blocks=3,
        context_heads=0,
    ),
    "imagenet32": Design(
        couplings=8,
        mixes_channels=False,
        weight_norm=True,
        ends_in_elu=True,
        context="DeepProcessor_0",
        context_blocks=8,
        context_heads=4,
    ),
}
