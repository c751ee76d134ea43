"""Initializations that RISOTTO competes with. They work on the same ResNets and take the same arguments.

Where a scheme is defined without normalization only, a net with batch norm is refused. On plain nets of timm and
torchvision, which have no multipliers or scalar biases, the docstrings say what is left of a scheme.
"""

import torch
from torch import nn

from .matrices import delta_kernel_, semi_orthogonal
from .structure import ResNetStructure, check_arguments, resnet_structure

Rng = torch.Generator | None


@torch.no_grad()
def he_(model: nn.Module, alpha: float | None = None, generator: Rng = None) -> nn.Module:
    """He initialization in place: normal kernels of variance 2 / fan-out, zero biases, gamma = 1, beta = 0.

    The multiplier of every branch starts at alpha, 1 if None. Deviation: the classifier is normal with variance
    1 / fan-in (torch's default is uniform of variance 1 / (3 fan-in)): logits start at the scale of the features.

    Source: He et al., arXiv 1502.01852; fan-out as in torchvision and timm.
    Raises:
        ValueError: If the network is not a ResNet that `resnet_structure` reads, or cannot hold an alpha.
    """
    structure = resnet_structure(model)
    _he(structure, 1.0 if alpha is None else alpha, generator)
    return model


@torch.no_grad()
def fixup_(model: nn.Module, alpha: float | None = None, generator: Rng = None) -> nn.Module:
    """Fixup in place, for nets without normalization.

    With L branches of m layers: all layers of a branch but the last are He normal times L^(-1/(2m-2)), the last is
    zero, the classifier is zero, stem and skips are He normal. The multiplier of every branch starts at alpha, 1 if
    None; the scalar biases (before and after each convolution of a branch, the last after the multiplier) start at 0: a
    model made with `init='fixup'` has them in place of its convolutions' biases.

    Source: Zhang et al., arXiv 1901.09321. Deviations: the stem keeps its bias per channel; the skip reads the input
    without the branch's first scalar; the classifier has no scalar before it; on other nets than those of
    `init='fixup'` the scalar biases are missing.
    Raises:
        ValueError: If the network has batch normalization, which Fixup replaces, is no ResNet that is read, or has no
            multipliers to hold an alpha.
    """
    structure = resnet_structure(model)
    _refuse_norms(structure, "fixup")
    _he(structure, 1.0 if alpha is None else alpha, generator)
    for block in structure.blocks:
        scale = len(structure.blocks) ** (-1 / (2 * len(block.convs) - 2))
        for conv in block.convs[:-1]:
            conv.weight.mul_(scale)
        block.convs[-1].weight.zero_()
    if structure.head is not None:
        structure.head.weight.zero_()
    return model


@torch.no_grad()
def skipinit_(model: nn.Module, alpha: float | None = None, generator: Rng = None) -> nn.Module:
    """SkipInit in place: He initialization, and every branch multiplied by a trainable scalar that starts at 0.

    With batch norm the multiplier is the last gamma of the branch, per channel (Goyal et al., arXiv 1706.02677).

    Source: De and Smith, arXiv 2002.10444. Deviation: the paper's dropout before the classifier is the model's
    `drop_rate`, 0 unless asked for.
    Raises:
        ValueError: If alpha is given and not 0, or a block has neither an alpha nor a gamma to hold the 0.
    """
    structure = resnet_structure(model)
    _refuse_alpha(alpha, "skipinit")
    _he(structure, 0.0, generator)
    return model


@torch.no_grad()
def rezero_(model: nn.Module, alpha: float | None = None, generator: Rng = None) -> nn.Module:
    """ReZero in place: every branch multiplied by a trainable scalar that starts at 0, all else as torch makes it.

    What sets it apart from SkipInit on these nets is the scale of the kernels: uniform of variance 1 / (3 fan-in),
    torch's default, since ReZero leaves the layers as they are.

    Source: Bachlechner et al., arXiv 2003.04887. Deviations: as in any ResNet, a ReLU follows the sum, where the
    paper's formula has none; biases start at 0, not uniform; with batch norm the multiplier is the last gamma of the
    branch, per channel.
    Raises:
        ValueError: If alpha is given and not 0, or a block has neither an alpha nor a gamma to hold the 0.
    """
    structure = resnet_structure(model)
    _refuse_alpha(alpha, "rezero")
    _he(structure, 0.0, generator)
    for layer in structure.layers:
        fan_in = layer.weight[0].numel()
        uniform = 2 * torch.rand(layer.weight.shape, device="cpu", generator=generator) - 1
        layer.weight.copy_(uniform * fan_in**-0.5)
    return model


@torch.no_grad()
def orthogonal_delta_(model: nn.Module, alpha: float | None = None, generator: Rng = None) -> nn.Module:
    """Delta-orthogonal kernels in place, without looks-linear structure: what RISOTTO is without its pairs.

    A Haar semi-orthogonal matrix in the centre tap of every kernel, zeros elsewhere, biases 0; times sqrt(2), which
    makes up for the ReLU on average, where a ReLU follows directly, and times 1 for skips and last layers of branches.
    The multiplier of every branch starts at alpha, 1 if None. The classifier is semi-orthogonal.

    Source: Xiao et al., arXiv 1806.05393, whose nets are plain chains of tanh layers; the gains are this project's.
    Raises:
        ValueError: If the network is not a ResNet that `resnet_structure` reads, or cannot hold an alpha.
    """
    structure = resnet_structure(model)
    _he(structure, 1.0 if alpha is None else alpha, generator)
    before_relu = {*structure.stem, *(conv for block in structure.blocks for conv in block.convs[:-1])}
    for conv in structure.convs:
        gain = 2**0.5 if conv in before_relu else 1.0
        delta_kernel_(conv, gain * semi_orthogonal(conv.out_channels, conv.in_channels, generator))
    if structure.head is not None:
        head = structure.head
        head.weight.copy_(semi_orthogonal(head.out_features, head.in_features, generator))
    return model


def _he(structure: ResNetStructure, alpha: float, generator: Rng) -> None:
    check_arguments(structure, alpha, generator)
    structure.reset(alpha)
    for conv in structure.convs:
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        _normal_(conv, (2 / fan_out) ** 0.5, generator)
    if structure.head is not None:
        _normal_(structure.head, structure.head.in_features**-0.5, generator)


def _normal_(layer: nn.Conv2d | nn.Linear, std: float, generator: Rng) -> None:
    # Drawn in the parameter's shape on the CPU, so that the device of the model does not change the weights.
    layer.weight.copy_(torch.randn(layer.weight.shape, device="cpu", generator=generator) * std)
    if layer.bias is not None:
        layer.bias.zero_()


def _refuse_norms(structure: ResNetStructure, scheme: str) -> None:
    if structure.norms:
        raise ValueError(f"{scheme} is defined for nets without normalization; this one has batch norm")


def _refuse_alpha(alpha: float | None, scheme: str) -> None:
    if alpha not in (None, 0):
        raise ValueError(f"{scheme} starts every branch at alpha = 0, not {alpha}; leave alpha out")
