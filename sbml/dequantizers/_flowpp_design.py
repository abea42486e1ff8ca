"""What tells the published flows of Flow++'s dequantizer from one another, beside their sizes.

                        CIFAR-10                         ImageNet 32x32
    couplings           4                                8
    channels            mixed after each normalisation   not mixed
    convolutions        a kernel                         weight-normalised, g V / |V|
    a network's end     a convolution                    concat_elu and a convolution
    the image           3 gated convolutions             8, normalised and with 4 heads' attention
    filters, blocks     96, 2                            128, 8
    parameters, 32x32   3,466,976                        35,482,720

Reference: Ho et al. 2019 (Flow++); Song et al. 2021 use both.
"""

from typing import NamedTuple


class Design(NamedTuple):
    """The shape of a flow, and how the networks in it are built.

    ``context`` is the name, in the parameters, of the network that shows the image to the
    couplings; it has ``context_blocks`` gated convolutions, each with attention of
    ``context_heads`` heads after it, or without where they are 0.
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
