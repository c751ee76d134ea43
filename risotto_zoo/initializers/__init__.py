"""Initializers for ResNets. They import torch only and work in place on our models, timm's and torchvision's."""

from collections.abc import Callable

import torch
from torch import nn

from .baselines import fixup_, he_, orthogonal_delta_, rezero_, skipinit_
from .matrices import delta_kernel_, looks_linear, semi_orthogonal, signed_permutation, signed_selection
from .risotto import risotto_, risotto_head_

Scheme = Callable[[nn.Module, float | None, torch.Generator | None], nn.Module]

SCHEMES: dict[str, Scheme] = {
    "risotto": risotto_,
    "he": he_,
    "fixup": fixup_,
    "skipinit": skipinit_,
    "rezero": rezero_,
    "orthogonal_delta": orthogonal_delta_,
}
"""Every scheme by the name that `init=` of the models takes."""

__all__ = [
    "SCHEMES",
    "delta_kernel_",
    "fixup_",
    "he_",
    "looks_linear",
    "orthogonal_delta_",
    "rezero_",
    "risotto_",
    "risotto_head_",
    "semi_orthogonal",
    "signed_permutation",
    "signed_selection",
    "skipinit_",
]
