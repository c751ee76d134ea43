"""Initializers for ResNets. They import torch only and work in place on our models, timm's and torchvision's."""

from collections.abc import Callable

import torch
from torch import nn

from .baselines import he_
from .matrices import delta_kernel_, looks_linear, semi_orthogonal, signed_permutation, signed_selection
from .risotto import risotto_, risotto_head_

Scheme = Callable[[nn.Module, float, torch.Generator | None], nn.Module]

SCHEMES: dict[str, Scheme] = {"risotto": risotto_, "he": he_}
"""Every scheme by the name that `init=` of the models takes."""

__all__ = [
    "SCHEMES",
    "delta_kernel_",
    "he_",
    "looks_linear",
    "risotto_",
    "risotto_head_",
    "semi_orthogonal",
    "signed_permutation",
    "signed_selection",
]
