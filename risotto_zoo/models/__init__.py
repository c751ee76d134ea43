"""The networks of the zoo; importing this package registers them with timm."""

from . import variants
from .blocks import BasicBlock, Bottleneck
from .resnet import RisottoResNet

__all__ = ["BasicBlock", "Bottleneck", "RisottoResNet", "variants"]
