"""Initializations that RISOTTO competes with. They work on the same ResNets and take the same arguments."""

import torch
from torch import nn

from .structure import resnet_structure


@torch.no_grad()
def he_(model: nn.Module, alpha: float = 1.0, generator: torch.Generator | None = None) -> nn.Module:
    """He initialization in place: normal kernels of variance 2 / fan-out, zero biases, gamma = 1, beta = 0.

    The multiplier of every branch starts at alpha. The classifier is normal with variance 1 / fan-in (torch's default
    is uniform of variance 1 / (3 fan-in)), so that logits start at the scale of the features.

    Source: He et al., arXiv 1502.01852; fan-out as in torchvision and timm.
    Raises:
        ValueError: If the network is not a ResNet that `resnet_structure` reads.
    """
    structure = resnet_structure(model)
    for norm in structure.norms:
        norm.reset_parameters()
    convs = list(structure.stem)
    for block in structure.blocks:
        convs += block.convs + ([block.skip] if block.skip is not None else [])
        if block.gain is not None:
            block.gain.fill_(alpha)
    for conv in convs:
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        _normal_(conv, (2 / fan_out) ** 0.5, generator)
    if structure.head is not None:
        _normal_(structure.head, structure.head.in_features**-0.5, generator)
    return model


def _normal_(layer: nn.Conv2d | nn.Linear, std: float, generator: torch.Generator | None) -> None:
    # Drawn in the parameter's shape on the CPU, so that the device of the model does not change the weights.
    layer.weight.copy_(torch.randn(layer.weight.shape, device="cpu", generator=generator) * std)
    if layer.bias is not None:
        layer.bias.zero_()
