"""The networks of the zoo."""

from .blocks import BasicBlock, Bottleneck
from .resnet import RisottoResNet

__all__ = ["BasicBlock", "Bottleneck", "RisottoResNet"]
