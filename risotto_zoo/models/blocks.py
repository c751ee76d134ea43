"""Residual blocks y = relu(alpha f(x) + h(x)), on timm's blocks and with their module names."""

from typing import Any

import torch
from timm.models import resnet as timm_resnet
from torch import Tensor, nn


class _Residual(nn.Module):
    """What both blocks add to timm's.

    `norm_layer=nn.Identity` makes a block without normalization: its convolutions have biases, its branch the scalar
    alpha. `projection=True` gives it a 1x1 convolution as skip where timm's has none.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        norm_layer: type[nn.Module] = nn.Identity,
        projection: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(inplanes, planes, stride, downsample, norm_layer=norm_layer, **kwargs, **dd)
        convs = [m for m in self.children() if isinstance(m, nn.Conv2d)]
        if projection and self.downsample is None:
            width = convs[-1].out_channels
            self.downsample = timm_resnet.downsample_conv(inplanes, width, 1, stride, norm_layer=norm_layer, **dd)
        normalized = norm_layer is not nn.Identity
        self.register_parameter("alpha", None if normalized else nn.Parameter(torch.ones((), **dd)))
        if not normalized:  # the skip needs no bias of its own: the branch's last one is added to the same sum
            for conv in convs:
                conv.bias = nn.Parameter(torch.zeros(conv.out_channels, **dd))

    def _merge(self, branch: Tensor, x: Tensor) -> Tensor:
        if self.drop_path is not None:
            branch = self.drop_path(branch)
        if self.alpha is not None:
            branch = branch * self.alpha
        if self.downsample is not None:
            x = self.downsample(x)
        branch += x
        return branch


class BasicBlock(_Residual, timm_resnet.BasicBlock):
    """f is two 3x3 convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        branch = self.act1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return self.act2(self._merge(branch, x))


class Bottleneck(_Residual, timm_resnet.Bottleneck):
    """f is a 1x1, a 3x3 and a 1x1 convolution, the inner width a quarter of the outer."""

    def forward(self, x: Tensor) -> Tensor:
        branch = self.act1(self.bn1(self.conv1(x)))
        branch = self.act2(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return self.act3(self._merge(branch, x))
